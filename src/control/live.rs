//! Exit counters of a running machine. A vCPU publishes its counters when it is kicked, so each look costs one exit a vCPU,
//! which is counted as `interrupted`.

use super::protocol::{Bus, DeviceExits, LiveExits, UserspaceExits, VcpuExits};
use crate::exit::handler::BusKind;
use crate::exit::{ExitReason, Handler};
use crate::kvm::stats::{Kind, Reader};
use crate::measure::Counters;
use crate::vcpu::Inspector;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long to wait for the vCPUs' counters. The older counters of a vCPU that is busy in a device model are used then.
const REPORT_TIMEOUT: Duration = Duration::from_millis(50);
const REPORT_POLL: Duration = Duration::from_micros(200);

/// Reads the counters of a running machine.
pub struct Live {
    inspector: Inspector,
    handler: Arc<Handler>,
    stats: Vec<Option<Reader>>,
    start: Instant,
}

fn bus(kind: BusKind) -> Bus {
    match kind {
        BusKind::Pio => Bus::Pio,
        BusKind::Mmio => Bus::Mmio,
    }
}

fn by_device(counters: &Counters, handler: &Handler) -> Vec<DeviceExits> {
    let mut all = Vec::new();
    for (slots, kind) in [(&handler.pio, BusKind::Pio), (&handler.mmio, BusKind::Mmio)] {
        for (slot, accesses) in slots.slots().zip(counters.slots(kind)) {
            let (address, device) = (slot.base, Some(slot.name.to_owned()));
            all.push(DeviceExits { bus: bus(kind), address, device, reads: accesses.reads, writes: accesses.writes });
        }
    }
    for (kind, address, accesses) in counters.unmapped() {
        all.push(DeviceExits { bus: bus(kind), address, device: None, reads: accesses.reads, writes: accesses.writes });
    }
    for (index, accesses) in counters.msrs() {
        let (address, reads, writes) = (u64::from(index), accesses.reads, accesses.writes);
        all.push(DeviceExits { bus: Bus::Msr, address, device: None, reads, writes });
    }
    all.retain(|device| device.reads + device.writes > 0);
    all
}

fn userspace_exits(counters: &Counters, handler: &Handler) -> UserspaceExits {
    let by_reason = ExitReason::ALL.iter().map(|reason| (*reason, counters.reason(*reason)));
    UserspaceExits {
        total: counters.total(),
        by_reason: by_reason.filter(|(_, count)| *count > 0).collect(),
        by_device: by_device(counters, handler),
    }
}

fn kvm_counters(reader: Option<&Reader>) -> BTreeMap<String, u64> {
    let stats = reader.and_then(|reader| reader.read().ok()).unwrap_or_default();
    let counters = stats.into_iter().filter(|stat| stat.kind == Kind::Cumulative);
    counters.filter_map(|stat| if let [value] = stat.values[..] { Some((stat.name, value)) } else { None }).collect()
}

impl Live {
    /// Makes a reader of the vCPUs of `inspector`, whose KVM statistics `stats` reads (by vCPU index; `None` where KVM has
    /// none). The buses of `handler` name the devices.
    pub fn new(inspector: Inspector, handler: Arc<Handler>, stats: Vec<Option<Reader>>) -> Self {
        Self { inspector, handler, stats, start: Instant::now() }
    }

    /// Kicks all vCPUs and returns their counters, after 50 ms at most.
    pub fn exits(&self) -> LiveExits {
        self.inspector.ask();
        let deadline = Instant::now() + REPORT_TIMEOUT;
        while !self.inspector.all_answered() && Instant::now() < deadline {
            std::thread::sleep(REPORT_POLL);
        }
        let vcpu = |(counters, stats): (Option<Counters>, &Option<Reader>)| VcpuExits {
            userspace_exits: counters.map(|counters| userspace_exits(&counters, &self.handler)),
            kvm: kvm_counters(stats.as_ref()),
        };
        LiveExits {
            at_ns: u64::try_from(self.start.elapsed().as_nanos()).unwrap_or(u64::MAX),
            vcpus: self.inspector.counters().into_iter().zip(&self.stats).map(vcpu).collect(),
        }
    }
}
