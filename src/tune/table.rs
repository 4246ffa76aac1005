//! The table of levers.

/// The part of the machine that a lever is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Group {
    /// Guest memory and its page faults.
    Memory,
    /// Hardware that the guest probes for at boot.
    Probing,
    /// Interrupt controllers, timers and IPIs.
    Interrupts,
    /// Kicks and interrupts of virtio devices.
    Devices,
    /// Writes that KVM queues.
    Coalescing,
    /// CPUID, MSRs and idle instructions.
    Cpu,
    /// What the guest's kernel does at boot without need.
    Kernel,
}

impl Group {
    /// The heading in `--tune help`.
    #[must_use]
    pub fn title(self) -> &'static str {
        match self {
            Self::Memory => "Memory",
            Self::Probing => "Hardware probing",
            Self::Interrupts => "Interrupts and timers",
            Self::Devices => "Virtio devices",
            Self::Coalescing => "Coalesced I/O",
            Self::Cpu => "Processor",
            Self::Kernel => "Guest's kernel",
        }
    }
}

/// The values that a lever takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ValueKind {
    /// `on`, `off` or `auto`.
    Switch,
    /// The same, or a number of microseconds.
    Time,
    /// The same, or `gain`.
    Gain,
}

impl ValueKind {
    /// What the lever takes beside `on`, `off` and `auto`, for a message.
    pub(super) fn more(self) -> &'static str {
        match self {
            Self::Switch => "",
            Self::Time => ", or a number of microseconds up to 100000",
            Self::Gain => ", or gain",
        }
    }
}

struct Row {
    name: &'static str,
    group: Group,
    on: bool,
    what: &'static str,
    without: &'static str,
}

/// Defines the levers. A row is `Variant: "name", Group, on by default, "what it does", "what happens without it";`.
macro_rules! levers {
    ($($variant:ident: $name:literal, $group:ident, $on:literal, $what:literal, $without:literal;)*) => {
        /// A switch that makes the guest exit less.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Lever {
            $(#[doc = $what] $variant,)*
        }

        impl Lever {
            /// All levers, in the order of the table.
            pub const ALL: [Self; Self::COUNT] = [$(Self::$variant),*];
            /// The number of levers.
            pub const COUNT: usize = [$($name),*].len();
            const ROWS: [Row; Self::COUNT] =
                [$(Row { name: $name, group: Group::$group, on: $on, what: $what, without: $without }),*];
        }
    };
}

levers! {
    HugePages: "huge-pages", Memory, true,
        "Guest memory is aligned to 2 MiB in the host and in the guest, and the kernel is asked for transparent huge pages \
         (-m SIZE,hugepages=... overrides it)",
        "memory is mapped in pages of 4 KiB, with a nested page fault for each";
    Prefault: "prefault", Memory, false,
        "All guest memory is allocated before the guest runs, by several threads, and mapped with KVM_PRE_FAULT_MEMORY where \
         the host has it. Off by default: it takes time and memory at the start",
        "each page is allocated and mapped when the guest first touches it";
    WorkingSet: "working-set", Memory, true,
        "A run from a snapshot has the pages ready that an earlier one has written down (the first from a template, or one with \
         --record-working-set): they are mapped or copied before the guest runs, and mapped in the nested page tables by KVM_PRE_FAULT_MEMORY. Where KVM does not have that, parts of memory \
         that use many pages are copied to huge pages (with huge-pages=on)",
        "each page is read, copied and mapped when the guest first touches it";
    FreePages: "free-pages", Memory, true,
        "With --balloon, the guest reports its free pages (VIRTIO_BALLOON_F_REPORTING) and the host takes them back",
        "the host keeps the pages that the guest has freed";
    HostUnpack: "host-unpack", Memory, true,
        "hwvmm unpacks the kernel and the initrd, and keeps the unpacked kernel for the next run (--unpack overrides it)",
        "the guest unpacks them in each boot";
    LegacyFree: "legacy-free", Probing, true,
        "The ACPI tables (FADT) say that there is no keyboard controller, no CMOS clock and no VGA",
        "the guest probes for these devices";
    UartCount: "uart-count", Probing, true,
        "The default command line has 8250.nr_uarts=N, with the number of UARTs of the machine",
        "Linux probes for four UARTs";
    PciProbing: "pci-probing", Probing, true,
        "Without PCI devices the default command line has pci=conf1,noearly: Linux checks for PCI configuration ports and scans \
         no bus. With PCI devices it has pci=noearly: Linux does not scan for chipsets that need early quirks",
        "Linux scans PCI buses, which takes about 300 accesses without any device";
    AcpiReset: "acpi-reset", Probing, true,
        "The default command line of a guest with one vCPU has reboot=f: Linux resets by the ACPI reset register at once, \
         without first disabling the I/O APIC and writing to CMOS. Not with more vCPUs: Linux would halt without stopping them",
        "Linux makes about 40 accesses before it resets";
    SplitIrqchip: "split-irqchip", Interrupts, true,
        "KVM emulates the local APICs only (KVM_CAP_SPLIT_IRQCHIP). The I/O APIC is hwvmm's, with as many pins as there are \
         interrupt lines, and is left out if there are none. Not for multiboot kernels",
        "KVM emulates the PIC and the I/O APIC as well, and Linux programs each of the 24 pins of the I/O APIC three times";
    X2Apic: "x2apic", Interrupts, true,
        "The guest uses x2APIC, whose registers are MSRs",
        "the guest uses xAPIC, whose registers are memory-mapped: KVM decodes and emulates an instruction for each access";
    TscDeadline: "tsc-deadline", Interrupts, true,
        "The local APIC timer has TSC-deadline mode: one MSR write arms it",
        "the guest calibrates the timer's frequency and programs its count registers";
    PeriodicTick: "periodic-tick", Interrupts, false,
        "The local APIC timer has no TSC-deadline mode, and the default command line has nohz=off highres=off: Linux programs a \
         periodic timer once. Off by default: an idle guest wakes up for each tick, and timers are as coarse as the tick",
        "the guest arms its timer for each tick, with an MSR write (while it is busy) or for its next timer (while it is idle)";
    PvEoi: "pv-eoi", Interrupts, true,
        "KVM_FEATURE_PV_EOI: the guest ends an interrupt by clearing a bit in memory",
        "the guest writes the EOI register, a VM exit unless the processor has APICv or AVIC";
    PvIpi: "pv-ipi", Interrupts, true,
        "KVM_FEATURE_PV_SEND_IPI: one hypercall sends an interrupt to many vCPUs",
        "the guest writes the APIC's command register once for each vCPU";
    PvTlbFlush: "pv-tlb-flush", Interrupts, true,
        "KVM_FEATURE_PV_TLB_FLUSH: the TLB of a vCPU that is not running is flushed when it runs next",
        "the guest sends an interrupt to each vCPU and waits for it";
    PvSchedYield: "pv-sched-yield", Interrupts, true,
        "KVM_FEATURE_PV_SCHED_YIELD: a vCPU that waits for another one yields the processor to it",
        "the vCPU spins";
    PvUnhalt: "pv-unhalt", Interrupts, true,
        "KVM_FEATURE_PV_UNHALT: a vCPU that waits for a spinlock halts until the owner wakes it",
        "the vCPU spins, and exits by PAUSE";
    Ioeventfd: "ioeventfd", Devices, true,
        "A queue notification signals an eventfd in the kernel (KVM_IOEVENTFD)",
        "each notification is a userspace exit";
    ReadonlyRegisters: "readonly-registers", Devices, true,
        "virtio registers and PCI configuration space are mapped read-only into the guest (KVM_MEM_READONLY), so that \
         reads do not exit. PCI devices are in segment 1, because Linux reads segment 0 through ports",
        "each read of a register is a userspace exit";
    EventIdx: "event-idx", Devices, true,
        "VIRTIO_F_EVENT_IDX: driver and device each say from which ring entry on they want notifications",
        "driver and device use flags to suppress notifications, which take effect later";
    BusyPoll: "busy-poll", Devices, true,
        "After a request the device polls the queue for the next one, for as long as requests took to arrive lately, at most \
         the given number of microseconds (on: 200; auto: on if the host has more processors than the guest)",
        "the driver notifies the device of each request";
    NotifyCoalescing: "notify-coalescing", Devices, true,
        "While many requests are in flight, the device delays an interrupt for a moment so that it covers more of them",
        "the device interrupts the driver as soon as one request is done";
    CoalescedIo: "coalesced-io", Coalescing, true,
        "KVM queues writes to UARTs, I/O APIC entries, virtio-mmio queue addresses and unmapped ports until the next userspace \
         exit, at most 100 ms (KVM_CAP_COALESCED_PIO, KVM_CAP_COALESCED_MMIO); polled output of a UART is written in lines",
        "each of these writes is a userspace exit, and each byte of polled output is written by itself";
    ExitClusters: "exit-clusters", Coalescing, true,
        "After an exit for port I/O hwvmm interprets the guest's next instructions. on: at sites where that has lately saved an exit for \
         each 100 instructions or less; gain: where it took less time than the exits that it saved. The default is gain in a guest of one \
         vCPU, off in others, which have pv-tlb-flush instead. Never with shadow paging",
        "each of these accesses is an exit";
    CpuidTsc: "cpuid-tsc", Cpu, true,
        "CPUID has the frequencies of the TSC and of the APIC timer (leaf 0x40000010, and 0x15 on Intel)",
        "the guest takes the frequency from kvmclock, or calibrates";
    MceBanks: "mce-banks", Cpu, true,
        "The vCPU has one bank of machine-check registers. hwvmm injects no machine checks, so no bank is ever used",
        "the vCPU has KVM's 32 banks, and the guest reads and writes the registers of each";
    HideMtrr: "hide-mtrr", Cpu, false,
        "CPUID has no MTRRs, so the guest does not read about 40 MSRs. Off by default: Linux then disables PAT as well, and \
         write-combining mappings (graphics) become slow",
        "the guest reads and writes the MTRRs, which have no effect on a virtual machine's RAM";
    HaltPoll: "halt-poll", Cpu, false,
        "KVM polls for the given number of microseconds (on: 200) before it puts a halted vCPU to sleep (KVM_CAP_HALT_POLL). \
         Off by default: the vCPU wakes up sooner, but polling takes host processor time",
        "KVM polls as its module parameter halt_poll_ns says";
    DisableHlt: "disable-hlt", Cpu, false,
        "HLT does not exit (KVM_CAP_X86_DISABLE_EXITS). Off by default: an idle guest takes a whole host processor, and the host \
         cannot see that it is idle",
        "each HLT is a VM exit";
    DisablePause: "disable-pause", Cpu, false,
        "PAUSE does not exit (KVM_CAP_X86_DISABLE_EXITS). Off by default: a vCPU that spins for one that is not running takes \
         its whole time slice",
        "loops of PAUSE exit, and KVM runs another vCPU";
    DisableMwait: "disable-mwait", Cpu, false,
        "MWAIT does not exit (KVM_CAP_X86_DISABLE_EXITS). Off by default: as for disable-hlt; besides, the guest can put the host \
         processor into deep sleep states",
        "MWAIT is an invalid instruction for the guest";
    NoCryptoSelftests: "no-crypto-selftests", Kernel, false,
        "The default command line has cryptomgr.notests: Linux does not test its ciphers and hashes. Off by default, but for the \
         tests of `hwvmm test`: a kernel that is built to test them is then not tested",
        "Linux runs the test vectors of each algorithm that it registers, for more than half of the time of a stock kernel's boot";
    UncheckedModules: "unchecked-modules", Kernel, false,
        "The modules that a guest with a command needs are loaded without their signatures, where Linux takes them so. Off by default: \
         such a kernel is marked as tainted (E in /proc/sys/kernel/tainted)",
        "Linux checks the signature of each module, for a fifth of the time until a command runs";
}

impl Lever {
    fn row(self) -> &'static Row {
        &Self::ROWS[self.index()]
    }

    /// The index in [`Lever::ALL`].
    #[must_use]
    pub fn index(self) -> usize {
        self as usize
    }

    /// The name of the lever in `--tune`.
    #[must_use]
    pub fn name(self) -> &'static str {
        self.row().name
    }

    /// The lever with the given name.
    #[must_use]
    pub fn by_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|lever| lever.name() == name)
    }

    /// The part of the machine that the lever is about.
    #[must_use]
    pub fn group(self) -> Group {
        self.row().group
    }

    /// Returns true if the lever is used by default.
    #[must_use]
    pub fn is_default_on(self) -> bool {
        self.row().on
    }

    /// The values that the lever takes.
    #[must_use]
    pub fn value_kind(self) -> ValueKind {
        match self {
            Self::HaltPoll | Self::BusyPoll => ValueKind::Time,
            Self::ExitClusters => ValueKind::Gain,
            _ => ValueKind::Switch,
        }
    }

    /// What the lever does, in sentences without the last full stop.
    #[must_use]
    pub fn what(self) -> &'static str {
        self.row().what
    }

    /// What happens without the lever, as a clause without capital and full stop.
    #[must_use]
    pub fn without(self) -> &'static str {
        self.row().without
    }
}
