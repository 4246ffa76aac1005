//! Exit counters of a running machine. A vCPU publishes its counters when it is kicked, so each look costs one exit a vCPU,
//! which is counted as `interrupted`.

use super::protocol::{
    AccessSpace, DeviceCount, LiveExits, MAX_ADDRESSES, RequestError, Response, UserspaceExits, VcpuExits,
};
use crate::exit::handler::BusKind;
use crate::exit::{ExitReason, Handler};
use crate::kvm::stats::{Kind, Reader};
use crate::measure::{Accesses, Counters};
use crate::snapshot::Files;
use crate::vcpu::Inspector;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How long to wait for the vCPUs' counters. The older counters of a vCPU that is busy in a device model are used then.
const REPORT_TIMEOUT: Duration = Duration::from_millis(50);
const REPORT_POLL: Duration = Duration::from_micros(200);
/// For how long a look answers later requests too. Each look kicks all vCPUs, and the event loop waits for them.
const REPORT_LASTS: Duration = Duration::from_millis(20);

/// What a snapshot has.
#[derive(Clone, Copy, Debug)]
pub struct Saved {
    /// The size of guest memory.
    pub memory_bytes: u64,
    /// The bytes of it that are written.
    pub written_bytes: u64,
    /// The number of disks, whose images are not in it.
    pub disks: usize,
}

/// Writes the memory and the state of a machine that is paused.
pub type Saver = dyn Fn(&Inspector, &Files) -> Result<Saved, RequestError> + Send + Sync;

/// Reads the counters of a running machine, and its state.
pub struct Live {
    inspector: Inspector,
    handler: Arc<Handler>,
    stats: Vec<Option<Reader>>,
    start: Instant,
    saver: Box<Saver>,
    /// When the last look ended, and what it found.
    last: Mutex<Option<(Instant, LiveExits)>>,
}

fn by_device(counters: &Counters, handler: &Handler) -> Vec<DeviceCount> {
    let mut all = Vec::new();
    for (slots, kind) in [(&handler.pio, BusKind::Pio), (&handler.mmio, BusKind::Mmio)] {
        for (slot, accesses) in slots.slots().zip(counters.slots(kind)) {
            let (address, device) = (slot.base, Some(slot.name.to_owned()));
            all.push(DeviceCount { bus: kind.into(), address, device, reads: accesses.reads, writes: accesses.writes });
        }
    }
    all.retain(|device| total(device) > 0);
    all
}

fn total(device: &DeviceCount) -> u64 {
    device.reads.saturating_add(device.writes)
}

/// Keeps the [`MAX_ADDRESSES`] of `all` with the most exits. Returns them and the number of exits of the others. The guest
/// chooses the addresses: without a limit it could make the response longer than a client reads.
fn most(mut all: Vec<DeviceCount>) -> (Vec<DeviceCount>, u64) {
    all.sort_by_key(|device| std::cmp::Reverse(total(device)));
    let others = all.split_off(all.len().min(MAX_ADDRESSES));
    (all, others.iter().map(total).fold(0, u64::saturating_add))
}

/// The exits for unmapped addresses and MSRs, and the number of those that are not told apart.
fn by_address(counters: &Counters) -> (Vec<DeviceCount>, u64) {
    let other = |bus, address, accesses: Accesses| DeviceCount {
        bus,
        address,
        device: None,
        reads: accesses.reads,
        writes: accesses.writes,
    };
    let unmapped = counters.unmapped().map(|(kind, address, accesses)| other(kind.into(), address, accesses)).collect();
    let msrs = counters.msrs().map(|(index, accesses)| other(AccessSpace::Msr, index.into(), accesses)).collect();
    let ((mut all, few), (msrs, fewer)) = (most(unmapped), most(msrs));
    all.extend(msrs);
    (all, counters.beyond().total().saturating_add(few).saturating_add(fewer))
}

fn userspace_exits(counters: &Counters, handler: &Handler) -> UserspaceExits {
    let by_reason = ExitReason::ALL.iter().map(|reason| (*reason, counters.reason(*reason)));
    let mut by_device = by_device(counters, handler);
    let (others, beyond) = by_address(counters);
    by_device.extend(others);
    UserspaceExits {
        total: counters.total(),
        by_reason: by_reason.filter(|(_, count)| *count > 0).collect(),
        by_device,
        beyond,
    }
}

fn kvm_counters(reader: Option<&Reader>) -> BTreeMap<String, u64> {
    let stats = reader.and_then(|reader| reader.read().ok()).unwrap_or_default();
    let counters = stats.into_iter().filter(|stat| stat.kind == Kind::Cumulative);
    counters.filter_map(|stat| if let [value] = stat.values[..] { Some((stat.name, value)) } else { None }).collect()
}

impl Live {
    /// Makes a reader of the vCPUs of `inspector`, whose KVM statistics `stats` reads (by vCPU index; `None` where KVM has
    /// none). The buses of `handler` name the devices. `saver` makes snapshots.
    pub fn new(inspector: Inspector, handler: Arc<Handler>, stats: Vec<Option<Reader>>, saver: Box<Saver>) -> Self {
        Self { inspector, handler, stats, start: Instant::now(), saver, last: Mutex::new(None) }
    }

    /// Kicks all vCPUs and returns their counters, after 50 ms at most. Within 20 ms of the last time it returns the same again.
    pub fn exits(&self) -> LiveExits {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        match &*last {
            Some((at, exits)) if at.elapsed() < REPORT_LASTS => exits.clone(),
            _ => {
                let exits = self.look();
                *last = Some((Instant::now(), exits.clone()));
                exits
            }
        }
    }

    /// Pauses the machine. Returns false where a vCPU does not come out in time; then none is paused.
    #[must_use]
    pub fn pause(&self) -> bool {
        let is_paused = self.inspector.pause();
        // Those of a paused machine are final: what was counted before it stopped is none of them.
        *self.last.lock().unwrap_or_else(PoisonError::into_inner) = None;
        is_paused
    }

    /// Writes the memory and the state of the machine to `files`, while it is paused. It goes on then, unless it was paused before.
    ///
    /// # Errors
    /// [`RequestError::Busy`] where a vCPU does not come out in time, or why the snapshot cannot be made.
    pub fn snapshot(&self, files: &Files) -> Result<Response, RequestError> {
        let control = self.inspector.control();
        let was_paused = control.is_paused();
        let start = Instant::now();
        if !self.pause() {
            return Err(RequestError::Busy);
        }
        let result = (self.saver)(&self.inspector, files);
        if !was_paused {
            control.resume();
        }
        let Saved { memory_bytes, written_bytes, disks } = result?;
        let paused_ms = u64::try_from(start.elapsed().as_millis()).unwrap_or(u64::MAX);
        Ok(Response::Snapshot { memory_bytes, written_bytes, paused_ms, disks, stays_paused: was_paused })
    }

    fn look(&self) -> LiveExits {
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

#[cfg(test)]
mod tests {
    use super::super::protocol::{MAX_RESPONSE_BYTES, MAX_VCPUS};
    use super::*;
    use crate::exit::handler::Route;
    use hwvmm_devices::BusBuilder;

    #[test]
    fn a_guest_cannot_make_a_response_too_long_to_read() {
        let none = BusBuilder::default().freeze();
        let mut counters = Counters::new(&none, &none);
        for number in 0..5000_u32 {
            let gpa = u64::MAX - u64::from(number);
            counters.record(ExitReason::MmioWrite, Route::Unmapped(BusKind::Mmio, gpa));
            counters.record(ExitReason::MsrWrite, Route::Msr(u32::MAX - number));
        }
        (0..9).for_each(|_| counters.record(ExitReason::MmioRead, Route::Unmapped(BusKind::Mmio, u64::MAX - 700)));
        let (mut by_device, beyond) = by_address(&counters);
        assert_eq!((by_device.len(), by_device[0].reads), (2 * MAX_ADDRESSES, 9), "the most frequent come first");
        assert_eq!(by_device.iter().map(total).sum::<u64>() + beyond, counters.total(), "none is lost");
        // A hundred devices more, and the longest numbers.
        let device = DeviceCount { device: Some("a long name of a device".into()), ..by_device[0].clone() };
        by_device.extend(vec![device; 100]);
        by_device.iter_mut().for_each(|device| (device.reads, device.writes) = (u64::MAX, u64::MAX));
        let exits = UserspaceExits { total: u64::MAX, by_device, beyond, ..UserspaceExits::default() };
        let kvm = (0..60).map(|number| (format!("a_counter_of_the_kernel_{number}"), u64::MAX)).collect();
        let vcpus = vec![VcpuExits { userspace_exits: Some(exits), kvm }; MAX_VCPUS];
        let line = serde_json::to_vec(&Response::Exits(LiveExits { at_ns: u64::MAX, vcpus })).expect("JSON");
        assert!(line.len() < MAX_RESPONSE_BYTES, "{}", line.len());
    }
}
