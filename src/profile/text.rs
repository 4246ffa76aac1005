//! The counts of a run, as tables for people; 100 columns at most.

use super::stats::RunStats;
use super::units::{milliseconds, share};
use crate::measure::clusters::ClusterEnd;
use crate::measure::counters::{AccessSpace, DeviceCount};
use std::fmt;

/// KVM's figures that tell most, in this order; the others that are not 0 follow.
const FIRST: [&str; 12] = [
    "exits",
    "io_exits",
    "mmio_exits",
    "halt_exits",
    "irq_exits",
    "signal_exits",
    "pf_taken",
    "pf_fixed",
    "pf_emulate",
    "tlb_flush",
    "irq_injections",
    "insn_emulation",
];
/// Rows of the device table before the rest is summed up.
const DEVICE_ROWS: usize = 24;

impl fmt::Display for RunStats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let exits = &self.userspace_exits;
        writeln!(f, "userspace exits: {} (KVM_RUN returned to hwvmm)", exits.total)?;
        if self.coalesced_writes > 0 {
            writeln!(f, "  and {} coalesced writes (drained at the next exit)", self.coalesced_writes)?;
        }
        self.clusters(f)?;
        let mut reasons: Vec<_> = exits.by_reason.iter().collect();
        reasons.sort_by_key(|(_, count)| std::cmp::Reverse(count.count));
        if !reasons.is_empty() {
            writeln!(f, "  {:<18} {:>10} {:>8} {:>14}", "reason", "count", "share", "in hwvmm, ms")?;
        }
        for (reason, counted) in reasons {
            let name = reason.name();
            let (part, ms) = (share(counted.count, exits.total), milliseconds(counted.handler_ns));
            writeln!(f, "  {name:<18} {:>10} {part:>8} {ms:>14.3}", counted.count)?;
        }
        if !exits.by_device.is_empty() {
            writeln!(f, "  {:<18} {:<12} {:>10} {:>10} {:>8}", "device", "address", "reads", "writes", "share")?;
        }
        for device in exits.by_device.iter().take(DEVICE_ROWS) {
            let part = share(device.reads.saturating_add(device.writes), exits.total);
            let (name, address) = (device_name(device), format!("{} {:#x}", device.bus.name(), device.address));
            writeln!(f, "  {name:<18} {address:<12} {:>10} {:>10} {part:>8}", device.reads, device.writes)?;
        }
        let more = exits.by_device.iter().skip(DEVICE_ROWS).flat_map(|device| [device.reads, device.writes]);
        let rest = more.fold(exits.beyond, u64::saturating_add);
        if rest > 0 {
            writeln!(f, "  and {rest} more at other addresses")?;
        }
        self.virtio(f)?;
        self.kvm(f)?;
        if let Some(memory) = &self.memory {
            writeln!(
                f,
                "memory: guest {} KiB ({} KiB its own), hwvmm {} KiB ({} KiB its own)",
                memory.guest_kib, memory.guest_own_kib, memory.vmm_kib, memory.vmm_private_kib
            )?;
        }
        write!(
            f,
            "time: {:.1} ms of CPU to the first KVM_RUN; the guest ran {:.1} ms",
            milliseconds(self.startup_cpu_ns),
            milliseconds(self.ran_ns)
        )
    }
}

fn device_name(device: &DeviceCount) -> &str {
    match (&device.device, device.bus) {
        (Some(name), _) => name,
        (None, AccessSpace::Msr) => "(unknown MSR)",
        (None, AccessSpace::Pio | AccessSpace::Mmio) => "(unmapped)",
    }
}

impl RunStats {
    fn clusters(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(counts) = &self.clusters else { return Ok(()) };
        writeln!(
            f,
            "  and {} exits avoided: accesses answered in {} clusters of {} interpreted instructions, {:.1} ms in all",
            counts.avoided_exits,
            counts.clusters,
            counts.instructions,
            milliseconds(counts.ns)
        )?;
        let mut ends: Vec<_> = ClusterEnd::NAMES.iter().zip(counts.ends).filter(|(_, count)| *count > 0).collect();
        ends.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
        let ends: Vec<_> = ends.iter().map(|(name, count)| format!("{name} {count}")).collect();
        writeln!(f, "    clusters by end: {}", ends.join(", "))?;
        writeln!(
            f,
            "    {} walks of the guest's page tables, {} blocks of instructions compared with memory, {} of them decoded",
            counts.walks, counts.compared, counts.decoded
        )
    }

    fn virtio(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.virtio.is_empty() {
            return Ok(());
        }
        writeln!(f, "virtio queues (a kick is a VM exit that KVM answers by itself):")?;
        writeln!(f, "  {:<18} {:>5} {:>12} {:>12} {:>12}", "device", "queue", "kicks", "interrupts", "requests")?;
        for queue in &self.virtio {
            let name = &queue.device;
            writeln!(
                f,
                "  {name:<18} {:>5} {:>12} {:>12} {:>12}",
                queue.queue, queue.kicks, queue.interrupts, queue.requests
            )?;
        }
        Ok(())
    }

    fn kvm(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(kvm) = &self.kvm else {
            return writeln!(f, "KVM's statistics: none (KVM_GET_STATS_FD needs Linux 5.14)");
        };
        writeln!(f, "KVM's statistics (VM exits are by the processor; KVM handles most of them):")?;
        let mut names: Vec<&str> = FIRST.into_iter().filter(|name| kvm.contains_key(*name)).collect();
        names.extend(kvm.iter().filter(|(n, v)| **v > 0 && !FIRST.contains(&n.as_str())).map(|(n, _)| n.as_str()));
        for row in names.chunks(3) {
            let cells: Vec<String> = row.iter().map(|name| format!("{name:<20} {:>9}", kvm[*name])).collect();
            writeln!(f, "  {}", cells.join("  ").trim_end())?;
        }
        if let Some(work) = super::mmu_work::describe(kvm) {
            writeln!(f, "  {work}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exit::ExitReason;
    use crate::measure::record::VirtioQueue;
    use crate::profile::stats::{ReasonCount, SCHEMA, UserspaceExits};
    use std::collections::BTreeMap;

    #[test]
    fn the_tables_say_which_exits_they_count_and_fit_100_columns() {
        let stats = RunStats {
            schema: SCHEMA,
            end: "the guest powered off".into(),
            end_kind: crate::exit::EndKind::PowerOff,
            status: 0,
            boot: String::new(),
            starts: 1,
            vcpus: 1,
            ran_ns: 2_500_000,
            startup_cpu_ns: 1_000_000,
            started_at_ns: 1,
            userspace_exits: UserspaceExits {
                total: 3,
                by_reason: BTreeMap::from([(ExitReason::PioOut, ReasonCount { count: 3, handler_ns: 1000 })]),
                by_device: vec![DeviceCount {
                    bus: AccessSpace::Pio,
                    address: 0x61,
                    device: None,
                    reads: 1,
                    writes: 2,
                }],
                beyond: 0,
            },
            virtio: vec![VirtioQueue { device: "disk0".into(), queue: 0, kicks: 1, interrupts: 2, requests: 3 }],
            kvm: Some(BTreeMap::from([("exits".into(), 123_456_789), ("tlb_flush".into(), 2), ("zero".into(), 0)])),
            memory: None,
            coalesced_writes: 0,
            clusters: None,
        };
        let text = stats.to_string();
        assert!(text.contains("userspace exits: 3") && text.contains("100.0 %"), "{text}");
        assert!(text.contains("(unmapped)") && text.contains("123456789") && !text.contains("zero"), "{text}");
        assert!(text.lines().all(|line| line.chars().count() <= 100));
    }
}
