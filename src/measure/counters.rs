//! Counts of userspace exits. They belong to one vCPU thread and are merged when it ends.

use crate::exit::ExitReason;
use crate::exit::handler::{BusKind, Route};
use hwvmm_devices::bus::Bus;
use std::collections::BTreeMap;

/// Different unmapped addresses (or MSRs) that are told apart; a guest that touches more gets them counted together.
const MAX_ADDRESSES: usize = 1024;

/// Reads and writes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Accesses {
    /// By the guest.
    pub reads: u64,
    /// By the guest.
    pub writes: u64,
}

impl Accesses {
    /// Both together.
    #[must_use]
    pub fn total(self) -> u64 {
        self.reads + self.writes
    }

    fn add(&mut self, reason: ExitReason) {
        if matches!(reason, ExitReason::PioOut | ExitReason::MmioWrite | ExitReason::MsrWrite) {
            self.writes += 1;
        } else {
            self.reads += 1;
        }
    }

    fn merge(&mut self, other: Self) {
        self.reads += other.reads;
        self.writes += other.writes;
    }
}

/// The counts of one vCPU, or of several merged.
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
    /// All zero, for machines with these buses.
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

    /// Counts one exit.
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

    /// Adds the counts of another vCPU of the same machine (or of the same machine's next start).
    pub fn merge(&mut self, other: &Self) {
        self.reasons.iter_mut().zip(other.reasons).for_each(|(mine, theirs)| *mine += theirs);
        self.pio.iter_mut().zip(&other.pio).for_each(|(mine, theirs)| mine.merge(*theirs));
        self.mmio.iter_mut().zip(&other.mmio).for_each(|(mine, theirs)| mine.merge(*theirs));
        for (key, theirs) in &other.unmapped {
            keyed(&mut self.unmapped, *key).unwrap_or(&mut self.beyond).merge(*theirs);
        }
        for (key, theirs) in &other.msrs {
            keyed(&mut self.msrs, *key).unwrap_or(&mut self.beyond).merge(*theirs);
        }
        self.beyond.merge(other.beyond);
    }

    /// All exits.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.reasons.iter().sum()
    }

    /// The exits of one reason.
    #[must_use]
    pub fn reason(&self, reason: ExitReason) -> u64 {
        self.reasons[reason.index()]
    }

    /// Accesses by slot of a bus.
    #[must_use]
    pub fn slots(&self, bus: BusKind) -> &[Accesses] {
        match bus {
            BusKind::Pio => &self.pio,
            BusKind::Mmio => &self.mmio,
        }
    }

    /// Accesses to addresses where nobody is.
    pub fn unmapped(&self) -> impl Iterator<Item = (BusKind, u64, Accesses)> {
        self.unmapped.iter().map(|((bus, address), accesses)| (*bus, *address, *accesses))
    }

    /// Accesses to MSRs that nobody knows.
    pub fn msrs(&self) -> impl Iterator<Item = (u32, Accesses)> {
        self.msrs.iter().map(|(index, accesses)| (*index, *accesses))
    }

    /// Accesses to addresses and MSRs beyond those told apart.
    #[must_use]
    pub fn beyond(&self) -> Accesses {
        self.beyond
    }
}

/// The entry for `key`, or `None` where there are too many already.
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

    fn counters() -> Counters {
        let mut pio = BusBuilder::default();
        pio.insert(0x505, 1, "pvpanic", Arc::new(PvPanic)).expect("free");
        Counters::new(&pio.freeze(), &BusBuilder::default().freeze())
    }

    #[test]
    fn every_exit_is_counted_once_by_reason_and_by_route() {
        let mut counters = counters();
        counters.record(ExitReason::PioOut, Route::Slot(BusKind::Pio, 0));
        counters.record(ExitReason::PioIn, Route::Slot(BusKind::Pio, 0));
        counters.record(ExitReason::PioIn, Route::Unmapped(BusKind::Pio, 0x61));
        counters.record(ExitReason::Interrupted, Route::None);
        assert_eq!(counters.total(), 4);
        assert_eq!(counters.slots(BusKind::Pio), [Accesses { reads: 1, writes: 1 }]);
        let mut twice = counters.clone();
        twice.merge(&counters);
        assert_eq!((twice.total(), twice.reason(ExitReason::PioIn)), (8, 4));
        assert_eq!(twice.unmapped().next(), Some((BusKind::Pio, 0x61, Accesses { reads: 2, writes: 0 })));
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
