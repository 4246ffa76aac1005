//! The counts of a run, as data.

use crate::exit::{EndKind, ExitReason};
use crate::kvm::stats::{Kind, Stat};
use crate::measure::clusters::ClusterCounts;
use crate::measure::counters::{AccessSpace, Accesses, DeviceCount};
use crate::measure::record::VirtioQueue;
use crate::measure::{Measured, MemoryUse, RunRecord};
use serde::Serialize;
use std::collections::BTreeMap;

/// The version of the JSON that [`RunStats`] becomes: it changes when a field changes its meaning or goes.
pub(super) const SCHEMA: u32 = 1;

/// One userspace exit reason.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct ReasonCount {
    /// The number of exits.
    pub count: u64,
    /// Nanoseconds in hwvmm's handler, together.
    pub handler_ns: u64,
}

/// The userspace exits of a run.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct UserspaceExits {
    /// The number of exits of all reasons.
    pub total: u64,
    /// By reason; those that occurred.
    pub by_reason: BTreeMap<ExitReason, ReasonCount>,
    /// By device, most first.
    pub by_device: Vec<DeviceCount>,
    /// The number of accesses to further addresses, which are counted together.
    pub beyond: u64,
}

/// The statistics that `--stats` and `--stats-out` write.
#[derive(Clone, Debug, Serialize)]
pub struct RunStats {
    /// The version of the format.
    pub schema: u32,
    /// How the run ended, in words.
    pub end: String,
    /// What kind of end that is.
    pub end_kind: EndKind,
    /// The exit status of the run.
    pub status: u8,
    /// How the kernel was loaded and entered.
    pub boot: String,
    /// How often the guest was started: more than once with --on-reboot=restart.
    pub starts: u32,
    /// The number of vCPUs.
    pub vcpus: usize,
    /// Nanoseconds that the guest ran, on the clock.
    pub ran_ns: u64,
    /// Nanoseconds of CPU time from hwvmm's start to the first KVM_RUN of the first start.
    pub startup_cpu_ns: u64,
    /// When the guest of the first start was about to run, in nanoseconds of CLOCK_MONOTONIC; 0 where it never ran.
    pub started_at_ns: u64,
    /// KVM_RUN returning to hwvmm.
    pub userspace_exits: UserspaceExits,
    /// Coalesced writes (--tune coalesced-io), drained at the next exit: each is one exit less.
    pub coalesced_writes: u64,
    /// What exit clusters have done (--tune exit-clusters), of all vCPUs together; `None` where no exits were followed.
    pub clusters: Option<ClusterCounts>,
    /// Queues of virtio devices on which something happened.
    pub virtio: Vec<VirtioQueue>,
    /// KVM's statistics, of the machine and of all vCPUs together; not userspace exits. `None`: KVM has none.
    pub kvm: Option<BTreeMap<String, u64>>,
    /// Memory at the end.
    pub memory: Option<MemoryUse>,
}

pub(super) fn clusters(record: &RunRecord) -> Option<ClusterCounts> {
    sum_of_clusters(record.vcpus.iter().filter_map(|vcpu| vcpu.clusters.as_ref()).map(|clusters| clusters.counts))
}

fn sum_of_clusters(counts: impl Iterator<Item = ClusterCounts>) -> Option<ClusterCounts> {
    counts.reduce(|mut sum, counts| {
        sum.add(&counts);
        sum
    })
}

/// The most names that are summed up over the starts of a guest, of each kind: its machine has the same ones each time, but a process
/// that the guest has taken over may send others.
const MAX_SUMS: usize = 8192;

/// Counts come from the machine's process, which may send any: sums saturate.
fn add(sum: &mut u64, more: u64) {
    *sum = sum.saturating_add(more);
}

impl RunStats {
    /// Makes the statistics of one start of a machine.
    #[must_use]
    pub fn new(record: &RunRecord) -> Self {
        let of_vcpus = record.vcpus.iter().filter_map(|vcpu| vcpu.stats.as_ref());
        let kvm = record.vm_stats.as_ref().map(|machine| {
            let mut kvm = BTreeMap::new();
            add_kvm(&mut kvm, machine);
            of_vcpus.for_each(|vcpu| add_kvm(&mut kvm, vcpu));
            kvm
        });
        Self {
            schema: SCHEMA,
            end: record.end.reason.to_string(),
            end_kind: record.end.reason.kind(),
            status: record.end.reason.status(),
            boot: record.boot_text(),
            starts: 1,
            vcpus: record.vcpus.len(),
            ran_ns: record.ran_ns,
            startup_cpu_ns: record.startup_cpu_ns,
            started_at_ns: record.started_at_ns,
            userspace_exits: userspace_exits(record),
            coalesced_writes: record.coalesced_writes,
            clusters: clusters(record),
            virtio: used_queues(record),
            kvm,
            memory: record.memory,
        }
    }

    /// Adds the counts of a later start of the same guest.
    pub fn add_start(&mut self, later: Self) {
        self.starts = self.starts.saturating_add(later.starts);
        add(&mut self.coalesced_writes, later.coalesced_writes);
        add(&mut self.ran_ns, later.ran_ns);
        (self.end, self.end_kind, self.status, self.memory) = (later.end, later.end_kind, later.status, later.memory);
        self.clusters = sum_of_clusters(self.clusters.into_iter().chain(later.clusters));
        self.userspace_exits.merge(later.userspace_exits);
        self.add_queues(later.virtio);
        match (&mut self.kvm, later.kvm) {
            (Some(mine), Some(theirs)) => {
                for (name, value) in theirs {
                    let has_room = mine.len() < MAX_SUMS;
                    match mine.get_mut(&name) {
                        Some(sum) => add(sum, value),
                        None if has_room => _ = mine.insert(name, value),
                        None => {}
                    }
                }
            }
            (mine, _) => *mine = None,
        }
    }

    fn add_queues(&mut self, later: Vec<VirtioQueue>) {
        let key = |queue: &VirtioQueue| (queue.device.clone(), queue.queue);
        let mut places: BTreeMap<_, _> = self.virtio.iter().enumerate().map(|(place, one)| (key(one), place)).collect();
        for theirs in later {
            if let Some(place) = places.get(&key(&theirs)) {
                let mine = &mut self.virtio[*place];
                add(&mut mine.kicks, theirs.kicks);
                add(&mut mine.interrupts, theirs.interrupts);
                add(&mut mine.requests, theirs.requests);
            } else if self.virtio.len() < MAX_SUMS {
                places.insert(key(&theirs), self.virtio.len());
                self.virtio.push(theirs);
            }
        }
    }
}

/// Returns the virtio queues on which something happened.
pub(super) fn used_queues(record: &RunRecord) -> Vec<VirtioQueue> {
    let used = |queue: &&VirtioQueue| (queue.kicks, queue.interrupts, queue.requests) != (0, 0, 0);
    record.virtio.iter().filter(used).cloned().collect()
}

/// Adds cumulative counts to `sums`. Sums of histograms and of values of the moment would mean nothing.
pub(super) fn add_kvm(sums: &mut BTreeMap<String, u64>, stats: &[Stat]) {
    for stat in stats.iter().filter(|stat| stat.kind == Kind::Cumulative) {
        let sum = sums.entry(stat.name.clone()).or_default();
        *sum = stat.values.iter().fold(*sum, |sum, value| sum.saturating_add(*value));
    }
}

fn userspace_exits(record: &RunRecord) -> UserspaceExits {
    let mut exits = UserspaceExits::default();
    let mut devices: BTreeMap<(AccessSpace, u64, Option<String>), Accesses> = BTreeMap::new();
    for vcpu in &record.vcpus {
        let counts = &vcpu.counts;
        exits.total = exits.total.saturating_add(counts.total());
        exits.beyond = exits.beyond.saturating_add(counts.beyond.reads).saturating_add(counts.beyond.writes);
        for (reason, count) in &counts.by_reason {
            add(&mut exits.reason(*reason).count, *count);
        }
        for DeviceCount { bus, address, device, reads, writes } in &counts.by_device {
            let sum = devices.entry((*bus, *address, device.clone())).or_default();
            sum.reads = sum.reads.saturating_add(*reads);
            sum.writes = sum.writes.saturating_add(*writes);
        }
        match &vcpu.measured {
            Measured::HandlerTime(times) => {
                times.iter().for_each(|(reason, ns)| add(&mut exits.reason(*reason).handler_ns, *ns));
            }
            Measured::Profile(profile) => {
                let causes = profile.causes.iter();
                causes.for_each(|one| add(&mut exits.reason(one.cause.reason).handler_ns, one.handler_ns));
            }
            Measured::Nothing => {}
        }
    }
    let count = |((bus, address, device), sum): ((AccessSpace, u64, Option<String>), Accesses)| DeviceCount {
        bus,
        address,
        device,
        reads: sum.reads,
        writes: sum.writes,
    };
    exits.by_device = devices.into_iter().map(count).collect();
    exits.sort();
    exits
}

impl UserspaceExits {
    fn reason(&mut self, reason: ExitReason) -> &mut ReasonCount {
        self.by_reason.entry(reason).or_default()
    }

    fn sort(&mut self) {
        self.by_device
            .sort_by_key(|device| (std::cmp::Reverse(device.reads.saturating_add(device.writes)), device.address));
    }

    fn merge(&mut self, other: Self) {
        add(&mut self.total, other.total);
        add(&mut self.beyond, other.beyond);
        for (reason, theirs) in other.by_reason {
            let mine = self.reason(reason);
            add(&mut mine.count, theirs.count);
            add(&mut mine.handler_ns, theirs.handler_ns);
        }
        let key = |count: &DeviceCount| (count.bus, count.address, count.device.clone());
        let mut places: BTreeMap<_, _> =
            self.by_device.iter().enumerate().map(|(place, one)| (key(one), place)).collect();
        for theirs in other.by_device {
            if let Some(place) = places.get(&key(&theirs)) {
                let mine = &mut self.by_device[*place];
                add(&mut mine.reads, theirs.reads);
                add(&mut mine.writes, theirs.writes);
            } else if self.by_device.len() < MAX_SUMS {
                places.insert(key(&theirs), self.by_device.len());
                self.by_device.push(theirs);
            } else {
                add(&mut self.beyond, theirs.reads.saturating_add(theirs.writes));
            }
        }
        self.sort();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exits(count: u64) -> UserspaceExits {
        let device = DeviceCount {
            bus: AccessSpace::Pio,
            address: 0x3f8,
            device: Some("UART 1".into()),
            reads: count,
            writes: 1,
        };
        UserspaceExits {
            total: count + 1,
            by_reason: BTreeMap::from([(ExitReason::PioIn, ReasonCount { count, handler_ns: 5 })]),
            by_device: vec![device],
            beyond: 0,
        }
    }

    #[test]
    fn starts_add_up() {
        let mut sum = exits(2);
        sum.merge(exits(3));
        assert_eq!(sum.total, 7);
        assert_eq!(sum.by_reason[&ExitReason::PioIn], ReasonCount { count: 5, handler_ns: 10 });
        assert_eq!((sum.by_device.len(), sum.by_device[0].reads, sum.by_device[0].writes), (1, 5, 2));
    }

    #[test]
    fn names_that_change_with_each_start_take_bounded_memory() {
        let named = |start: u64| {
            let of = |number: u64| DeviceCount { address: start << 32 | number, ..exits(1).by_device[0].clone() };
            UserspaceExits { by_device: (0..6000).map(of).collect(), ..exits(1) }
        };
        let mut sum = named(0);
        (1..10).for_each(|start| sum.merge(named(start)));
        assert_eq!(sum.by_device.len(), MAX_SUMS);
        let counted: u64 = sum.by_device.iter().map(|count| count.reads + count.writes).sum();
        assert_eq!(counted + sum.beyond, 10 * 6000 * 2, "no access is lost");
    }

    #[test]
    fn only_counts_are_summed_of_kvms_figures() {
        let stat = |name: &str, kind, value| Stat { name: name.into(), kind, values: vec![value] };
        let mut sums = BTreeMap::new();
        let stats = [stat("exits", Kind::Cumulative, 5), stat("guest_mode", Kind::Instant, 1)];
        add_kvm(&mut sums, &stats);
        add_kvm(&mut sums, &stats);
        assert_eq!(sums, BTreeMap::from([("exits".to_owned(), 10)]));
    }
}
