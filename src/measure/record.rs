//! What a run leaves behind: plain, owned data that can be sent to another process.
//!
//! Everything that is said about a run afterwards (statistics, profiles, the flight recorder) is made from this. Sizes are bounded:
//! by the number of vCPUs, devices and KVM's statistics, and by the limits of the parts ([`ExitCounts`], [`UserRecord`],
//! [`FlightEntry`], [`TraceRecord`]).

use super::clusters::ClusterRecord;
use super::counters::ExitCounts;
use super::flight_recorder::FlightEntry;
use super::memory_use::MemoryUse;
use super::tracer::TraceRecord;
use super::user_profile::UserRecord;
use crate::exit::handler::BusKind;
use crate::exit::{ExitReason, RunEnd};
use crate::kvm::stats::Stat;
use hwvmm_arch::boot::BootMethod;
use hwvmm_devices::bus::Bus;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Version of [`RunRecord`]: it changes with its fields.
pub const VERSION: u32 = 6;

/// What a run leaves behind.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunRecord {
    /// The version of the format: [`VERSION`].
    pub version: u32,
    /// The end of the run.
    pub end: RunEnd,
    /// How the kernel was loaded and entered; `None` where the guest never ran.
    pub boot: Option<BootMethod>,
    /// The entry of a boot loader's menu whose kernel the guest has; `None` where the kernel was in a file of its own.
    pub entry: Option<MenuEntry>,
    /// CPU time of hwvmm from its start until the guest ran, in nanoseconds.
    pub startup_cpu_ns: u64,
    /// When the guest was about to run, in nanoseconds of CLOCK_MONOTONIC; 0 where it never ran.
    pub started_at_ns: u64,
    /// How long the guest ran, in nanoseconds of wall-clock time.
    pub ran_ns: u64,
    /// The record of each vCPU, in vCPU order.
    pub vcpus: Vec<VcpuRecord>,
    /// Every range of the two buses; in the order of [`Route::Slot`](crate::exit::Route) for each bus.
    pub devices: Vec<DeviceRange>,
    /// Coalesced writes: those that KVM put into its ring and that were drained at the next exit. They are no exits.
    pub coalesced_writes: u64,
    /// KVM's statistics of the machine; `None` before Linux 5.14.
    pub vm_stats: Option<Vec<Stat>>,
    /// Every queue of every virtio device.
    pub virtio: Vec<VirtioQueue>,
    /// Memory at the end; `None` where it was not measured.
    pub memory: Option<MemoryUse>,
    /// VM exits, where they were traced.
    pub trace: Option<TraceRecord>,
    /// What could not be measured and why, one sentence each.
    pub missing: Vec<String>,
}

impl RunRecord {
    /// Returns the record of a run of which nothing is known but its end.
    #[must_use]
    pub fn ended(end: RunEnd) -> Self {
        Self {
            version: VERSION,
            end,
            boot: None,
            entry: None,
            startup_cpu_ns: 0,
            started_at_ns: 0,
            ran_ns: 0,
            vcpus: Vec::new(),
            devices: Vec::new(),
            coalesced_writes: 0,
            vm_stats: None,
            virtio: Vec::new(),
            memory: None,
            trace: None,
            missing: Vec::new(),
        }
    }

    /// Returns how the kernel was loaded and entered, for people.
    #[must_use]
    pub fn boot_text(&self) -> String {
        self.boot.map_or_else(|| "not started".to_owned(), |boot| boot.to_string())
    }
}

/// An entry in the menu of an image's boot loader.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MenuEntry {
    /// Its number: `0`, or `1>0` in a submenu.
    pub number: String,
    /// Its title, with those of the submenus.
    pub title: String,
}

/// What a vCPU's thread leaves behind.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VcpuRecord {
    /// The counts of its userspace exits.
    pub counts: ExitCounts,
    /// The last userspace exits, oldest first.
    pub flight_recorder: Vec<FlightEntry>,
    /// What exit clusters have done; `None` where no exits were followed.
    pub clusters: Option<ClusterRecord>,
    /// What the profiler measured.
    pub measured: Measured,
    /// KVM's statistics of the vCPU; `None` before Linux 5.14.
    pub stats: Option<Vec<Stat>>,
    /// RIP at the end, where it could be read.
    pub rip: Option<u64>,
    /// Entry point of system calls (MSR IA32_LSTAR) where the guest has set one: it shows where its kernel lies.
    pub lstar: Option<u64>,
}

impl VcpuRecord {
    /// Returns the record of a vCPU of which only the last exits are known.
    #[must_use]
    pub fn of_last_exits(flight_recorder: Vec<FlightEntry>) -> Self {
        let rip = flight_recorder.last().and_then(|exit| exit.rip);
        let counts = ExitCounts::default();
        Self { counts, flight_recorder, clusters: None, measured: Measured::Nothing, stats: None, rip, lstar: None }
    }
}

/// What was measured at the exits of a vCPU besides their number.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Measured {
    /// Nothing was measured besides the counts.
    Nothing,
    /// Nanoseconds in hwvmm's exit handler, by reason.
    HandlerTime(BTreeMap<ExitReason, u64>),
    /// The exits by cause, with times (`--profile`).
    Profile(Box<UserRecord>),
}

impl From<()> for Measured {
    fn from((): ()) -> Self {
        Self::Nothing
    }
}

impl From<BTreeMap<ExitReason, u64>> for Measured {
    fn from(ns: BTreeMap<ExitReason, u64>) -> Self {
        Self::HandlerTime(ns)
    }
}

impl From<UserRecord> for Measured {
    fn from(record: UserRecord) -> Self {
        Self::Profile(Box::new(record))
    }
}

/// The range of a bus that a device claims.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceRange {
    /// The bus of the device.
    pub bus: BusKind,
    /// First port or guest physical address.
    pub first: u64,
    /// Last port or guest physical address.
    pub last: u64,
    /// Name of the device.
    pub name: String,
}

impl DeviceRange {
    /// Lists the devices of a bus, in the order of their slots.
    pub fn list(kind: BusKind, bus: &Bus) -> impl Iterator<Item = Self> {
        bus.slots().map(move |slot| Self { bus: kind, first: slot.base, last: slot.last, name: slot.name.to_owned() })
    }
}

/// A queue of a virtio device. Kicks are VM exits that KVM handles by itself (ioeventfd), not userspace exits.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VirtioQueue {
    /// Name of the device, such as `disk0`.
    pub device: String,
    /// Index of the queue.
    pub queue: usize,
    /// Available buffer notifications by the driver.
    pub kicks: u64,
    /// Used buffer notifications to the driver.
    pub interrupts: u64,
    /// The number of descriptor chains that were used.
    pub requests: u64,
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::exit::{EndReason, Route, Signal};
    use crate::kvm::stats::Kind;
    use crate::measure::clusters::{AvoidedAt, ClusterCounts, EndedAt};
    use crate::measure::counters::{AccessSpace, Accesses, DeviceCount};
    use crate::measure::flight_recorder::Detail;
    use crate::measure::tally::Tally;
    use crate::measure::timeline::Timeline;
    use crate::measure::tracer::{VmCause, VmCauseRecord, VmDetail, VmRecord};
    use crate::measure::user_profile::{Mark, MarkKind, UserCause, UserCauseRecord};
    use hwvmm_arch::boot::{Decompressor, EntryProtocol};
    use hwvmm_arch::exit_code::{AccessKind, Class, Isa};

    fn user_record() -> UserRecord {
        let mut outside = Tally::default();
        outside.add(1_000);
        let cause = UserCause {
            reason: ExitReason::PioOut,
            route: Route::Slot(BusKind::Pio, 0),
            address: 0x3f8,
            size: 1,
            rip: Some(0xffff_ffff_8100_0000),
            cpl: Some(0),
        };
        let mut timeline = Timeline::default();
        timeline.add(5, ExitReason::PioOut);
        UserRecord {
            causes: vec![UserCauseRecord { cause, outside: outside.record(), handler_ns: 600 }],
            timeline,
            marks: vec![Mark { name: MarkKind::Console, at_ns: 5 }],
        }
    }

    fn vm_record() -> VmRecord {
        let detail = VmDetail::Port { port: 0x3f8, size: 1, kind: AccessKind::Write };
        let cause = VmCause { isa: Isa::Svm, code: 0x7b, detail, rip: 0xffff_ffff_8100_0000, early: false };
        let mut timeline = Timeline::default();
        timeline.add(5, Class::Pio);
        let causes = vec![VmCauseRecord { cause, outside: Tally::default().record() }];
        VmRecord { causes, timeline, first_kernel_ns: Some(5), ..VmRecord::default() }
    }

    /// A record with one of everything.
    pub(crate) fn sample() -> RunRecord {
        let detail = Detail { address: 0x3f8, data: 0x41, size: 1, count: 1 };
        let entry = FlightEntry { at_ns: 5, reason: ExitReason::PioOut, detail, rip: Some(0x1000), cpl: Some(0) };
        let uart =
            DeviceCount { bus: AccessSpace::Pio, address: 0x3f8, device: Some("UART 1".into()), reads: 0, writes: 1 };
        let counts = ExitCounts {
            by_reason: BTreeMap::from([(ExitReason::PioOut, 1)]),
            by_device: vec![uart],
            beyond: Accesses::default(),
        };
        let stat = |name: &str, kind, values: &[u64]| Stat { name: name.into(), kind, values: values.to_vec() };
        let vcpu = VcpuRecord {
            counts,
            flight_recorder: vec![entry],
            clusters: Some(ClusterRecord {
                counts: ClusterCounts {
                    clusters: 2,
                    avoided_exits: 9,
                    instructions: 300,
                    ns: 5_000,
                    ..ClusterCounts::default()
                },
                avoided_at: vec![AvoidedAt { rip: 0xffff_ffff_8100_0000, port: 0x3f8, write: true, count: 9 }],
                ended_at: vec![EndedAt { rip: 0xffff_ffff_8100_0010, end: 1, count: 2 }],
            }),
            measured: user_record().into(),
            stats: Some(vec![stat("exits", Kind::Cumulative, &[7]), stat("waits", Kind::Histogram, &[1, 2])]),
            rip: Some(0x1000),
            lstar: None,
        };
        RunRecord {
            version: VERSION,
            end: RunEnd { reason: EndReason::PowerOff, vcpu: Some(0) },
            boot: Some(BootMethod { decompressor: Decompressor::Host, protocol: EntryProtocol::Linux64 }),
            entry: Some(MenuEntry { number: "1>0".into(), title: "More > Linux".into() }),
            startup_cpu_ns: 1_000,
            started_at_ns: 5_000,
            ran_ns: 2_000,
            vcpus: vec![vcpu],
            devices: vec![DeviceRange { bus: BusKind::Pio, first: 0x3f8, last: 0x3ff, name: "UART 1".into() }],
            coalesced_writes: 3,
            vm_stats: Some(vec![stat("pages_2m", Kind::Instant, &[4])]),
            virtio: vec![VirtioQueue { device: "disk0".into(), queue: 0, kicks: 1, interrupts: 2, requests: 3 }],
            memory: Some(MemoryUse {
                guest_kib: 1,
                guest_own_kib: 1,
                vmm_kib: 2,
                vmm_private_kib: 1,
                own_kib: Some(3),
            }),
            trace: Some(TraceRecord {
                vcpus: vec![Some(vm_record()), None],
                mmu: BTreeMap::from([("kvm_mmu_get_page".into(), 9)]),
                missing: vec!["vCPU 1: no".into()],
            }),
            missing: vec!["no names of functions".into()],
        }
    }

    /// The corpus of the fuzz target is this version's.
    #[test]
    fn the_fuzz_corpus_has_the_sample() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fuzz/corpus/run_record/sample");
        let json = std::fs::read(path).expect("the corpus");
        assert_eq!(serde_json::from_slice::<RunRecord>(&json).expect("a record"), sample());
    }

    #[test]
    fn a_record_survives_json() {
        let mut record = sample();
        let ends = [
            EndReason::NotSeen(Box::new(EndReason::PowerOff)),
            EndReason::Panicked(Some("words".into())),
            EndReason::Signal(Signal::QUIT),
            EndReason::TimedOut(std::time::Duration::from_millis(1500)),
            EndReason::NotBooted(std::time::Duration::from_millis(1500)),
            EndReason::DebugExit(3),
        ];
        for reason in ends {
            record.end.reason = reason;
            let json = serde_json::to_string(&record).expect("JSON");
            assert_eq!(serde_json::from_str::<RunRecord>(&json).expect("a record"), record, "{json}");
        }
        for measured in [().into(), BTreeMap::from([(ExitReason::Hlt, 5)]).into()] {
            record.vcpus[0].measured = measured;
            let json = serde_json::to_string(&record).expect("JSON");
            assert_eq!(serde_json::from_str::<RunRecord>(&json).expect("a record"), record, "{json}");
        }
    }
}
