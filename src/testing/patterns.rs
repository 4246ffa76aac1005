//! What a Linux kernel prints when something in it is wrong: one table of patterns over the lines of its log.

use regex::bytes::RegexSet;
use serde::{Deserialize, Serialize};
use std::sync::OnceLock;

macro_rules! oopses {
    ($($(#[$doc:meta])* $kind:ident $name:literal $pattern:literal [$($sample:literal),+];)*) => {
        /// Kinds of complaints of a kernel.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(rename_all = "kebab-case")]
        pub enum OopsKind {
            $($(#[$doc])* $kind,)*
        }

        impl OopsKind {
            /// All kinds, in the order in which a line is compared with them.
            pub const ALL: &'static [Self] = &[$(Self::$kind),*];

            /// The name in files and reports.
            #[must_use]
            pub fn name(self) -> &'static str {
                match self { $(Self::$kind => $name,)* }
            }
        }

        /// The table: a line is of the first kind whose pattern it matches.
        pub const OOPSES: &[Oops] = &[
            $(Oops { kind: OopsKind::$kind, pattern: $pattern, samples: &[$($sample),+] },)*
        ];
    };
}

/// A row of the table.
#[derive(Clone, Copy, Debug)]
pub struct Oops {
    /// The kind of the lines that match.
    pub kind: OopsKind,
    /// Regular expression, for the line without the prefix of printk.
    pub pattern: &'static str,
    /// Lines of real kernels that match.
    pub samples: &'static [&'static str],
}

oopses! {
    /// The address sanitizer, mm/kasan/report.c.
    Kasan "kasan" r"^BUG: KASAN: " ["BUG: KASAN: slab-out-of-bounds in kmalloc_oob_right+0xa8/0xbc [kasan_test]"];
    /// The data race detector, kernel/kcsan/report.c.
    Kcsan "kcsan" r"^BUG: KCSAN: " ["BUG: KCSAN: data-race in test_kernel_read / test_kernel_write"];
    /// The undefined behaviour sanitizer, lib/ubsan.c.
    Ubsan "ubsan" r"^UBSAN: " ["UBSAN: array-index-out-of-bounds in drivers/net/foo.c:12:3"];
    /// A processor that does not schedule, or takes no interrupts: kernel/watchdog.c.
    SoftLockup "soft-lockup" r"(?:^watchdog: )?BUG: soft lockup - |^(?:NMI )?[Ww]atchdog: (?:Watchdog detected|CPU\d+: Watchdog detected) hard LOCKUP"
        ["watchdog: BUG: soft lockup - CPU#0 stuck for 22s! [insmod:65]", "watchdog: Watchdog detected hard LOCKUP on cpu 1",
         "watchdog: CPU3: Watchdog detected hard LOCKUP on cpu 3"];
    /// A task that waits too long: kernel/hung_task.c.
    HungTask "hung-task" r"^INFO: task .+ blocked (?:for more than \d+ seconds|in I/O wait for more than \d+ seconds)"
        ["INFO: task kworker/0:1:12 blocked for more than 120 seconds."];
    /// A grace period that does not end: kernel/rcu/tree_stall.h.
    RcuStall "rcu-stall" r"^rcu: INFO: \S+ (?:self-)?detected (?:expedited )?stalls? |^INFO: rcu_\S+ (?:self-)?detected "
        ["rcu: INFO: rcu_preempt detected stalls on CPUs/tasks:", "rcu: INFO: rcu_sched self-detected stall on CPU",
         "rcu: INFO: rcu_preempt detected expedited stalls on CPUs/tasks: { 1-... } 6 jiffies s: 33 root: 0x2/.",
         "INFO: rcu_sched self-detected stall on CPU { 0}"];
    /// The lock dependency checker: kernel/locking/lockdep.c.
    Lockdep "lockdep" r"^WARNING: (?:possible (?:circular|recursive|irq lock inversion|irq inversion)|inconsistent lock state|bad unlock balance|suspicious RCU usage|Nested lock was not taken|lock held when returning|\S+-safe -> \S+-unsafe lock order|held lock freed|bad contention detected|\S+ still has locks held)|^\[ (?:BUG|INFO): |^(?:DEBUG_LOCKS_WARN_ON|BUG: Invalid wait context)|^INFO: trying to register non-static key"
        ["WARNING: possible circular locking dependency detected", "WARNING: possible recursive locking detected",
         "WARNING: inconsistent lock state", "WARNING: bad unlock balance detected!", "WARNING: suspicious RCU usage",
         "WARNING: SOFTIRQ-safe -> SOFTIRQ-unsafe lock order detected", "WARNING: bad contention detected!",
         "WARNING: sh/71 still has locks held!", "DEBUG_LOCKS_WARN_ON(1)", "[ BUG: Invalid wait context ]",
         "[ INFO: possible recursive locking detected ]", "INFO: trying to register non-static key."];
    /// The kernel killed for want of memory: mm/oom_kill.c.
    OutOfMemory "out-of-memory" r"^Out of memory: |^Memory cgroup out of memory: |invoked oom-killer: "
        ["Out of memory: Killed process 71 (stress) total-vm:512000kB, anon-rss:400000kB",
         "Memory cgroup out of memory: Killed process 12 (sh)",
         "stress invoked oom-killer: gfp_mask=0x140dca(GFP_HIGHUSER_MOVABLE), order=0"];
    /// The search for memory that nothing points to: mm/kmemleak.c.
    Kmemleak "kmemleak" r"^kmemleak: \d+ new suspected memory leaks"
        ["kmemleak: 3 new suspected memory leaks (see /sys/kernel/debug/kmemleak)"];
    /// WARN_ON: kernel/panic.c.
    Warning "warning" r"^WARNING: (?:CPU: \d+ PID: \d+ at |\S+:\d+ at |at .+(?:, CPU#\d+|\+0x[0-9a-f]+/))"
        ["WARNING: CPU: 0 PID: 1 at kernel/sched/core.c:1234 foo+0x1a/0x30", "WARNING: kernel/sched/core.c:1234 at foo+0x1a/0x30, CPU#0: init/1",
         "WARNING: at foo+0x1a/0x30, CPU#0: init/1", "WARNING: at kernel/sched/core.c:1234 foo+0x1a/0x30()"];
    /// BUG_ON, a wrong access, a fault within the kernel: arch/x86/kernel/dumpstack.c, arch/x86/kernel/traps.c, arch/x86/mm/fault.c. SLUB's
    /// report has no colon behind BUG: mm/slub.c, slab_bug.
    Bug "bug" r"^BUG: |^BUG \S+ \((?:Not tainted|Tainted: [^)]*)\): |^kernel BUG at |^Oops: |^Oops\b.*\[#\d+\]|^general protection fault|^[A-Za-z][\w ,-]*: [0-9a-f]{4} \[#\d+\]|^list_(?:add|del) corruption|^Unable to handle kernel |^Internal error: "
        ["BUG: kernel NULL pointer dereference, address: 0000000000000008", "BUG: unable to handle page fault for address: ffffc900",
         "BUG: scheduling while atomic: swapper/0/1/0x00000002", "kernel BUG at lib/foo.c:12!",
         "Oops: 0002 [#1] PREEMPT SMP NOPTI", "Oops: general protection fault, probably for non-canonical address 0xdead: 0000 [#1] SMP",
         "general protection fault, probably for non-canonical address 0xdead000000000100: 0000 [#1] SMP",
         "invalid opcode: 0000 [#1] PREEMPT SMP", "segment not present: 0000 [#1]", "alignment check: 0000 [#1] SMP",
         "invalid TSS: 0000 [#1]", "BUG kmalloc-64 (Not tainted): Redzone overwritten",
         "BUG dentry (Tainted: G    B   W         ): Poison overwritten", "list_add corruption. prev->next should be next"];
}

impl OopsKind {
    /// The kind of complaint that `line` is, which has no prefix of printk.
    #[must_use]
    pub fn of_line(line: &[u8]) -> Option<Self> {
        static PATTERNS: OnceLock<Option<RegexSet>> = OnceLock::new();
        // Every pattern has one of these: most lines have none, and are compared with no pattern.
        const WORDS: [&[u8]; 8] = [b"BUG", b"UBSAN", b"LOCKUP", b"INFO", b"WARN", b"emory", b"oom-killer", b" [#"];
        const STARTS: [&[u8]; 4] = [b"Oops", b"general", b"list_", b"Unable"];
        let may = STARTS.iter().any(|start| line.starts_with(start))
            || line.starts_with(b"Internal error: ")
            || WORDS.iter().any(|word| memchr::memmem::find(line, word).is_some());
        if !may {
            return None;
        }
        let patterns = PATTERNS.get_or_init(|| RegexSet::new(OOPSES.iter().map(|oops| oops.pattern)).ok()).as_ref()?;
        let first = patterns.matches(line).into_iter().next()?;
        OOPSES.get(first).map(|oops| oops.kind)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_sample_is_of_its_kind() {
        RegexSet::new(OOPSES.iter().map(|oops| oops.pattern)).expect("regular expressions");
        for oops in OOPSES {
            for sample in oops.samples {
                assert_eq!(OopsKind::of_line(sample.as_bytes()), Some(oops.kind), "{sample}");
            }
        }
        let kinds: Vec<_> = OOPSES.iter().map(|oops| oops.kind).collect();
        assert_eq!(kinds, OopsKind::ALL);
    }

    #[test]
    fn lines_of_a_kernel_that_is_well_are_none() {
        for line in [
            "",
            "Memory: 498012K/523900K available (14336K kernel code)",
            "rcu: Hierarchical RCU implementation.",
            "rcu: INFO: 4 of 4 CPUs",
            "debug: BUG: of a program",
            "Spectre V2 : WARNING: Unprivileged eBPF is enabled with eIBRS on",
            "WARNING: this program is old",
            "x86/bugs: UBSAN",
            "ok 1 BUG: KASAN: in the name of a test",
            "INFO: task is done",
            "kmemleak: Kernel memory leak detector initialized (mem pool available: 15679)",
            "BUG reports (see MAINTAINERS): none",
            "WARNING: at least two of them",
            "step 4: 0000 [1]",
        ] {
            assert_eq!(OopsKind::of_line(line.as_bytes()), None, "{line}");
        }
    }

    #[test]
    fn names_are_those_of_serde() {
        for kind in OopsKind::ALL {
            assert_eq!(serde_json::to_value(kind).expect("JSON"), kind.name());
        }
    }
}
