//! Counts of userspace exits. [`Counters`] belong to one vCPU's thread and know devices by their slot; [`ExitCounts`] are what is
//! left of them when the thread ends: plain data, with the devices' names.

use crate::exit::ExitReason;
use crate::exit::handler::{BusKind, Route};
use hwvmm_devices::bus::Bus;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Unmapped addresses, and MSRs, that are counted one by one. Accesses to more are counted together.
pub(super) const MAX_ADDRESSES: usize = 1024;

/// Numbers of accesses by the guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Accesses {
    /// The number of exits for reads.
    pub reads: u64,
    /// The number of exits for writes.
    pub writes: u64,
}

impl Accesses {
    /// Returns the sum of both.
    #[must_use]
    pub fn total(self) -> u64 {
        self.reads.saturating_add(self.writes)
    }

    fn add(&mut self, reason: ExitReason) {
        if matches!(reason, ExitReason::PioOut | ExitReason::MmioWrite | ExitReason::MsrWrite) {
            self.writes += 1;
        } else {
            self.reads += 1;
        }
    }
}

/// An address space whose accesses can exit to user space.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AccessSpace {
    /// The I/O ports: IN, OUT and their string forms.
    Pio,
    /// Guest physical addresses outside of memory.
    Mmio,
    /// The model-specific registers (MSRs).
    Msr,
}

impl AccessSpace {
    /// Returns the name in tables, the same as in JSON.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Pio => "pio",
            Self::Mmio => "mmio",
            Self::Msr => "msr",
        }
    }
}

impl From<BusKind> for AccessSpace {
    fn from(bus: BusKind) -> Self {
        match bus {
            BusKind::Pio => Self::Pio,
            BusKind::Mmio => Self::Mmio,
        }
    }
}

/// Exits for one device, one unmapped address, or one MSR.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceCount {
    /// The address space of the access.
    pub bus: AccessSpace,
    /// First port or gpa of the device, the unmapped port or gpa itself, or the MSR's index (ECX).
    pub address: u64,
    /// Name of the device; `None` for an unmapped address and for an MSR.
    pub device: Option<String>,
    /// The number of exits for reads.
    pub reads: u64,
    /// The number of exits for writes.
    pub writes: u64,
}

/// The counts of a vCPU whose thread has ended. Besides the devices at most 1024 unmapped
/// addresses and as many MSRs.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExitCounts {
    /// By reason; reasons that have not occurred are left out.
    pub by_reason: BTreeMap<ExitReason, u64>,
    /// By device; those without an exit are left out.
    pub by_device: Vec<DeviceCount>,
    /// Accesses to more unmapped addresses and MSRs than are counted one by one.
    pub beyond: Accesses,
}

impl ExitCounts {
    /// Returns the number of all exits.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.by_reason.values().fold(0, |sum, count| sum.saturating_add(*count))
    }
}

/// The running counts of one vCPU.
#[derive(Clone, Debug)]
pub struct Counters {
    reasons: [u64; ExitReason::COUNT],
    pio: Vec<Accesses>,
    mmio: Vec<Accesses>,
    unmapped: BTreeMap<(BusKind, u64), Accesses>,
    msrs: BTreeMap<u32, Accesses>,
    beyond: Accesses,
}

impl Counters {
    /// Makes counters that are all zero, for a machine with these buses.
    #[must_use]
    pub fn new(pio: &Bus, mmio: &Bus) -> Self {
        Self {
            reasons: [0; ExitReason::COUNT],
            pio: vec![Accesses::default(); pio.slots().count()],
            mmio: vec![Accesses::default(); mmio.slots().count()],
            unmapped: BTreeMap::new(),
            msrs: BTreeMap::new(),
            beyond: Accesses::default(),
        }
    }

    /// Counts one exit by its reason and its route.
    pub fn record(&mut self, reason: ExitReason, route: Route) {
        self.reasons[reason.index()] += 1;
        let accesses = match route {
            Route::Slot(BusKind::Pio, slot) => self.pio.get_mut(slot),
            Route::Slot(BusKind::Mmio, slot) => self.mmio.get_mut(slot),
            Route::Unmapped(bus, address) => keyed(&mut self.unmapped, (bus, address)),
            Route::Msr(index) => keyed(&mut self.msrs, index),
            Route::None => return,
        };
        accesses.unwrap_or(&mut self.beyond).add(reason);
    }

    /// Returns the number of all exits.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.reasons.iter().fold(0, |sum, count| sum.saturating_add(*count))
    }

    /// Returns the number of exits of one reason.
    #[must_use]
    pub fn reason(&self, reason: ExitReason) -> u64 {
        self.reasons[reason.index()]
    }

    /// Accesses to the devices of a bus, by slot.
    #[must_use]
    pub fn slots(&self, bus: BusKind) -> &[Accesses] {
        match bus {
            BusKind::Pio => &self.pio,
            BusKind::Mmio => &self.mmio,
        }
    }

    /// Accesses to unmapped addresses.
    pub fn unmapped(&self) -> impl Iterator<Item = (BusKind, u64, Accesses)> {
        self.unmapped.iter().map(|((bus, address), accesses)| (*bus, *address, *accesses))
    }

    /// Accesses to MSRs that KVM does not emulate.
    pub fn msrs(&self) -> impl Iterator<Item = (u32, Accesses)> {
        self.msrs.iter().map(|(index, accesses)| (*index, *accesses))
    }

    /// Accesses to more unmapped addresses and MSRs than are counted one by one.
    #[must_use]
    pub fn beyond(&self) -> Accesses {
        self.beyond
    }

    /// Returns the counts with the devices' names. `pio` and `mmio` are the buses that the counters were made for.
    #[must_use]
    pub fn resolve(&self, pio: &Bus, mmio: &Bus) -> ExitCounts {
        let mut counts = ExitCounts { beyond: self.beyond, ..ExitCounts::default() };
        let occurred = ExitReason::ALL.iter().map(|reason| (*reason, self.reason(*reason)));
        counts.by_reason.extend(occurred.filter(|(_, count)| *count > 0));
        let mut add = |bus, address, device, Accesses { reads, writes }: Accesses| {
            if reads + writes > 0 {
                counts.by_device.push(DeviceCount { bus, address, device, reads, writes });
            }
        };
        for (bus, kind) in [(pio, BusKind::Pio), (mmio, BusKind::Mmio)] {
            for (slot, accesses) in bus.slots().zip(self.slots(kind)) {
                add(kind.into(), slot.base, Some(slot.name.to_owned()), *accesses);
            }
        }
        self.unmapped().for_each(|(bus, address, accesses)| add(bus.into(), address, None, accesses));
        self.msrs().for_each(|(index, accesses)| add(AccessSpace::Msr, index.into(), None, accesses));
        counts
    }
}

/// Returns the entry for `key`; `None` if the map is full and does not have it.
fn keyed<K: Ord>(map: &mut BTreeMap<K, Accesses>, key: K) -> Option<&mut Accesses> {
    if map.len() >= MAX_ADDRESSES && !map.contains_key(&key) {
        return None;
    }
    Some(map.entry(key).or_default())
}

#[cfg(test)]
mod tests {
    use super::*;
    use hwvmm_devices::BusBuilder;
    use hwvmm_devices::legacy::PvPanic;
    use std::sync::Arc;

    fn bus() -> Bus {
        let mut pio = BusBuilder::default();
        pio.insert(0x505, 1, "pvpanic", Arc::new(PvPanic)).expect("free");
        pio.freeze()
    }

    fn counters() -> Counters {
        Counters::new(&bus(), &BusBuilder::default().freeze())
    }

    #[test]
    fn every_exit_is_counted_once_by_reason_and_by_route() {
        let mut counters = counters();
        counters.record(ExitReason::PioOut, Route::Slot(BusKind::Pio, 0));
        counters.record(ExitReason::PioIn, Route::Slot(BusKind::Pio, 0));
        counters.record(ExitReason::PioIn, Route::Unmapped(BusKind::Pio, 0x61));
        counters.record(ExitReason::MsrWrite, Route::Msr(0x1234));
        counters.record(ExitReason::Interrupted, Route::None);
        assert_eq!((counters.total(), counters.reason(ExitReason::PioIn)), (5, 2));
        let counts = counters.resolve(&bus(), &BusBuilder::default().freeze());
        assert_eq!((counts.total(), counts.by_reason[&ExitReason::PioIn]), (5, 2));
        assert!(!counts.by_reason.contains_key(&ExitReason::Hlt), "what has not occurred is left out");
        let count = |bus, address, device: Option<&str>, reads, writes| {
            let device = device.map(str::to_owned);
            DeviceCount { bus, address, device, reads, writes }
        };
        assert_eq!(
            counts.by_device,
            [
                count(AccessSpace::Pio, 0x505, Some("pvpanic"), 1, 1),
                count(AccessSpace::Pio, 0x61, None, 1, 0),
                count(AccessSpace::Msr, 0x1234, None, 0, 1),
            ]
        );
    }

    #[test]
    fn a_guest_cannot_make_the_counters_grow_without_end() {
        let mut counters = counters();
        (0..5000).for_each(|gpa| counters.record(ExitReason::MmioWrite, Route::Unmapped(BusKind::Mmio, gpa)));
        assert_eq!(counters.unmapped().count(), MAX_ADDRESSES);
        assert_eq!(counters.beyond().writes, 5000 - MAX_ADDRESSES as u64);
        assert_eq!(counters.total(), 5000);
    }
}
