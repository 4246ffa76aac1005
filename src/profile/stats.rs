//! The counts of a run, as data.

use super::MemoryUse;
use crate::exit::ExitReason;
use crate::exit::handler::BusKind;
use crate::kvm::stats::{Kind, Stat};
use crate::machine::RunRecord;
use crate::measure::counters::Accesses;
use crate::measure::{Counters, Measured};
use serde::Serialize;
use std::collections::BTreeMap;

/// The version of the JSON that [`RunStats`] becomes: it changes when a field changes its meaning or goes.
pub(super) const SCHEMA: u32 = 1;

/// One userspace exit reason.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ReasonCount {
    /// How often.
    pub count: u64,
    /// Nanoseconds in hwvmm's handler, together.
    pub handler_ns: u64,
}

/// One device, or one address where nobody is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct DeviceCount {
    /// "pio", "mmio" or "msr".
    pub bus: &'static str,
    /// First address, or the MSR's number.
    pub address: u64,
    /// The device; `None` where nobody is.
    pub device: Option<String>,
    /// Reads.
    pub reads: u64,
    /// Writes.
    pub writes: u64,
}

/// The userspace exits of a run.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct UserspaceExits {
    /// All.
    pub total: u64,
    /// By reason; those that occurred.
    pub by_reason: BTreeMap<&'static str, ReasonCount>,
    /// By device, most first.
    pub by_device: Vec<DeviceCount>,
    /// Accesses to addresses beyond those that were told apart.
    pub beyond: u64,
}

/// A queue of a virtio device. Kicks are VM exits that KVM handles by itself (ioeventfd): no userspace exits.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, serde::Deserialize)]
pub struct VirtioQueue {
    /// The device.
    pub device: String,
    /// The queue's number.
    pub queue: usize,
    /// Notifications by the driver.
    pub kicks: u64,
    /// Interrupts to the driver.
    pub interrupts: u64,
    /// Buffers (chains of descriptors) used.
    pub requests: u64,
}

/// What `--stats` shows.
#[derive(Clone, Debug, Serialize)]
pub struct RunStats {
    /// [`SCHEMA`].
    pub schema: u32,
    /// How the run ended, in words.
    pub end: String,
    /// The exit status.
    pub status: u8,
    /// How the kernel was loaded and entered.
    pub boot: &'static str,
    /// How often the guest was started: more than once with --on-reboot=restart.
    pub starts: u32,
    /// vCPUs.
    pub vcpus: usize,
    /// Nanoseconds that the guest ran, on the clock.
    pub ran_ns: u64,
    /// Nanoseconds of CPU time from hwvmm's start to the first KVM_RUN of the first start.
    pub startup_cpu_ns: u64,
    /// KVM_RUN returning to hwvmm.
    pub userspace_exits: UserspaceExits,
    /// Writes that waited in the kernel for another exit (--tune coalesced-io): each one exit less.
    pub waited: u64,
    /// Queues of virtio devices on which something happened.
    pub virtio: Vec<VirtioQueue>,
    /// KVM's own figures, of the machine and of all vCPUs together; not userspace exits. `None`: KVM has none.
    pub kvm: Option<BTreeMap<String, u64>>,
    /// Memory at the end.
    pub memory: Option<MemoryUse>,
}

pub(super) fn nanoseconds(time: std::time::Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

impl RunStats {
    /// The counts of one start.
    #[must_use]
    pub fn new(finish: &RunRecord) -> Self {
        let guest: Vec<_> = finish.ram.host_ranges().map(|range| (range.start, range.bytes)).collect();
        let mut stats = Self {
            schema: SCHEMA,
            end: finish.ended.end.to_string(),
            status: finish.ended.end.status(),
            boot: finish.description,
            starts: 1,
            vcpus: finish.vcpus.len(),
            ran_ns: nanoseconds(finish.ran),
            startup_cpu_ns: nanoseconds(finish.startup_cpu),
            userspace_exits: userspace_exits(finish),
            waited: finish.handler.ring.as_ref().map_or(0, crate::kvm::CoalescedRing::drained),
            virtio: virtio_queues(finish),
            kvm: None,
            memory: MemoryUse::now(&guest).ok(),
        };
        if let Some(machine) = &finish.vm_stats {
            let mut kvm = BTreeMap::new();
            add_kvm(&mut kvm, machine);
            finish.vcpu_stats.iter().flatten().for_each(|vcpu| add_kvm(&mut kvm, vcpu));
            stats.kvm = Some(kvm);
        }
        stats
    }

    /// Adds the counts of a later start of the same guest.
    pub fn add_start(&mut self, later: Self) {
        self.starts += later.starts;
        self.waited += later.waited;
        self.ran_ns += later.ran_ns;
        (self.end, self.status, self.memory) = (later.end, later.status, later.memory);
        self.userspace_exits.merge(later.userspace_exits);
        for theirs in later.virtio {
            match self.virtio.iter_mut().find(|mine| mine.device == theirs.device && mine.queue == theirs.queue) {
                Some(mine) => {
                    mine.kicks += theirs.kicks;
                    mine.interrupts += theirs.interrupts;
                    mine.requests += theirs.requests;
                }
                None => self.virtio.push(theirs),
            }
        }
        match (&mut self.kvm, later.kvm) {
            (Some(mine), Some(theirs)) => {
                for (name, value) in theirs {
                    *mine.entry(name).or_default() += value;
                }
            }
            (mine, _) => *mine = None,
        }
    }
}

pub(super) fn virtio_queues(finish: &RunRecord) -> Vec<VirtioQueue> {
    let get = |counter: &std::sync::atomic::AtomicU64| counter.load(std::sync::atomic::Ordering::Relaxed);
    let queues = finish.virtio.iter().flat_map(|device| {
        device.counts.iter().enumerate().map(move |(queue, counts)| VirtioQueue {
            device: device.name.clone(),
            queue,
            kicks: get(&counts.kicks),
            interrupts: get(&counts.interrupts),
            requests: get(&counts.requests),
        })
    });
    queues.filter(|queue| queue.kicks + queue.interrupts + queue.requests > 0).collect()
}

/// Adds cumulative counts; histograms and momentary values say nothing in a sum.
pub(super) fn add_kvm(sums: &mut BTreeMap<String, u64>, stats: &[Stat]) {
    for stat in stats.iter().filter(|stat| stat.kind == Kind::Cumulative) {
        *sums.entry(stat.name.clone()).or_default() += stat.values.iter().sum::<u64>();
    }
}

fn userspace_exits(finish: &RunRecord) -> UserspaceExits {
    let handler = &finish.handler;
    let mut counters = Counters::new(&handler.pio, &handler.mmio);
    let mut ns = [0_u64; ExitReason::COUNT];
    for vcpu in &finish.vcpus {
        counters.merge(&vcpu.counters);
        match &vcpu.measured {
            Measured::HandlerTime(times) => ns.iter_mut().zip(times.iter()).for_each(|(sum, time)| *sum += time),
            Measured::Profile(profile) => {
                profile.causes().for_each(|(cause, tally)| ns[cause.reason.index()] += tally.handler_ns);
            }
            Measured::Nothing => {}
        }
    }
    let mut exits =
        UserspaceExits { total: counters.total(), beyond: counters.beyond().total(), ..UserspaceExits::default() };
    for reason in ExitReason::ALL {
        let count = counters.reason(*reason);
        if count > 0 {
            exits.by_reason.insert(reason.name(), ReasonCount { count, handler_ns: ns[reason.index()] });
        }
    }
    let mut add = |bus, address, device, accesses: Accesses| {
        if accesses.total() > 0 {
            let Accesses { reads, writes } = accesses;
            exits.by_device.push(DeviceCount { bus, address, device, reads, writes });
        }
    };
    for (bus, kind, name) in [(&handler.pio, BusKind::Pio, "pio"), (&handler.mmio, BusKind::Mmio, "mmio")] {
        for ((address, device), accesses) in bus.slots().zip(counters.slots(kind)) {
            add(name, address, Some(device.to_owned()), *accesses);
        }
    }
    for (bus, address, accesses) in counters.unmapped() {
        add(if bus == BusKind::Pio { "pio" } else { "mmio" }, address, None, accesses);
    }
    for (index, accesses) in counters.msrs() {
        add("msr", u64::from(index), None, accesses);
    }
    exits.sort();
    exits
}

impl UserspaceExits {
    fn sort(&mut self) {
        self.by_device.sort_by_key(|device| (std::cmp::Reverse(device.reads + device.writes), device.address));
    }

    fn merge(&mut self, other: Self) {
        self.total += other.total;
        self.beyond += other.beyond;
        for (name, theirs) in other.by_reason {
            let mine = self.by_reason.entry(name).or_insert(ReasonCount { count: 0, handler_ns: 0 });
            mine.count += theirs.count;
            mine.handler_ns += theirs.handler_ns;
        }
        for theirs in other.by_device {
            let same =
                |d: &&mut DeviceCount| (d.bus, d.address, &d.device) == (theirs.bus, theirs.address, &theirs.device);
            match self.by_device.iter_mut().find(same) {
                Some(mine) => {
                    mine.reads += theirs.reads;
                    mine.writes += theirs.writes;
                }
                None => self.by_device.push(theirs),
            }
        }
        self.sort();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exits(count: u64) -> UserspaceExits {
        let device = DeviceCount { bus: "pio", address: 0x3f8, device: Some("UART 1".into()), reads: count, writes: 1 };
        UserspaceExits {
            total: count + 1,
            by_reason: BTreeMap::from([("pio_in", ReasonCount { count, handler_ns: 5 })]),
            by_device: vec![device],
            beyond: 0,
        }
    }

    #[test]
    fn starts_add_up() {
        let mut sum = exits(2);
        sum.merge(exits(3));
        assert_eq!(sum.total, 7);
        assert_eq!(sum.by_reason["pio_in"], ReasonCount { count: 5, handler_ns: 10 });
        assert_eq!((sum.by_device.len(), sum.by_device[0].reads, sum.by_device[0].writes), (1, 5, 2));
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
