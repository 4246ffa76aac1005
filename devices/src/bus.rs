//! The port and memory buses: which device handles an access to a port or a guest physical address. A bus is built once and
//! then frozen into a sorted list, so that a look-up takes no lock.

use std::sync::Arc;
use thiserror::Error;

/// What the machine has to do after a guest's write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Nothing: the guest continues.
    None,
    /// Reset the machine, as the guest asked for.
    Reset,
    /// Power the machine off.
    PowerOff,
    /// The guest kernel reported that it panicked (pvpanic).
    Panicked,
    /// End the VMM with this exit status (isa-debug-exit).
    DebugExit(u8),
    /// End the run: the guest's one command has ended, or cannot be run.
    CommandEnd(CommandEnd),
}

/// How a guest's one command ended, as the guest says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CommandEnd {
    /// It exited with this status.
    Exited(u8),
    /// The signal with this number ended it.
    Signaled(u8),
    /// The guest could not run it.
    Failed,
}

/// A device on a port or memory bus.
///
/// `offset` is in bytes from the start of the device's range. The guest decides the length of `data` and the offset; a device
/// must handle all values. The methods are called from any vCPU thread, also from several at a time.
pub trait BusDevice: Send + Sync {
    /// Handles a read. `data` is all ones before the call; bytes that the device does not set stay so.
    fn read(&self, offset: u64, data: &mut [u8]);

    /// Handles a write of `data` and returns what the machine has to do.
    fn write(&self, offset: u64, data: &[u8]) -> Action;

    /// Handles the items of a string instruction (OUTS), `size` bytes each, all written to `offset`. Stops after the first
    /// item whose action is not [`Action::None`].
    fn write_string(&self, offset: u64, size: usize, data: &[u8]) -> Action {
        data.chunks_exact(size.max(1))
            .map(|item| self.write(offset, item))
            .find(|a| *a != Action::None)
            .unwrap_or(Action::None)
    }

    /// Hands on output that the device has held back, if any. Called ten times a second, before `--expect` matches a line
    /// without an end, and at the end of a run.
    fn flush(&self) {}
}

/// A device cannot be put on the bus.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum BusError {
    /// The range overlaps that of another device.
    #[error("the range of {name} at {base:#x} overlaps {other}")]
    Overlap {
        /// Name of the device to add.
        name: String,
        /// First address of its range.
        base: u64,
        /// Name of the device that is on the bus.
        other: String,
    },
    /// The range is empty, or reaches beyond the end of the address space.
    #[error("the range of {name} at {base:#x} has an invalid length of {len:#x} bytes")]
    Length {
        /// Name of the device to add.
        name: String,
        /// First address of its range.
        base: u64,
        /// Length of its range in bytes.
        len: u64,
    },
}

struct Range {
    base: u64,
    last: u64,
    name: String,
    device: Arc<dyn BusDevice>,
}

/// A bus under construction.
#[derive(Default)]
pub struct BusBuilder {
    ranges: Vec<Range>,
}

impl BusBuilder {
    /// Puts `device` on the `len` addresses from `base` on. `name` identifies it in counters and reports.
    ///
    /// # Errors
    /// Returns [`BusError`] where the range is empty, too long, or overlaps another.
    pub fn insert(
        &mut self,
        base: u64,
        len: u64,
        name: impl Into<String>,
        device: Arc<dyn BusDevice>,
    ) -> Result<(), BusError> {
        let name = name.into();
        let Some(last) = len.checked_sub(1).and_then(|less| base.checked_add(less)) else {
            return Err(BusError::Length { name, base, len });
        };
        let at = self.ranges.partition_point(|range| range.base <= base);
        let before = at.checked_sub(1).and_then(|i| self.ranges.get(i)).filter(|range| range.last >= base);
        let after = self.ranges.get(at).filter(|range| range.base <= last);
        if let Some(other) = before.or(after) {
            return Err(BusError::Overlap { name, base, other: other.name.clone() });
        }
        self.ranges.insert(at, Range { base, last, name, device });
        Ok(())
    }

    /// Returns the finished bus.
    #[must_use]
    pub fn freeze(self) -> Bus {
        Bus { ranges: self.ranges.into_boxed_slice() }
    }
}

/// The device that handles an access.
pub struct Found<'a> {
    /// Index of the device's range in [`Bus::slots`], for counters.
    pub slot: usize,
    /// Offset of the access in the range, in bytes.
    pub offset: u64,
    /// The device to call.
    pub device: &'a dyn BusDevice,
}

/// A range of a bus and the name of the device that claims it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot<'a> {
    /// First address of the range.
    pub base: u64,
    /// Last address of the range, which belongs to it.
    pub last: u64,
    /// Name that the device was inserted under.
    pub name: &'a str,
}

/// A finished bus, to which no device can be added.
pub struct Bus {
    ranges: Box<[Range]>,
}

impl Bus {
    /// Returns the device that handles an access whose first byte is at `address`.
    #[must_use]
    pub fn find(&self, address: u64) -> Option<Found<'_>> {
        let slot = self.ranges.partition_point(|range| range.base <= address).checked_sub(1)?;
        let range = self.ranges.get(slot).filter(|range| address <= range.last)?;
        Some(Found { slot, offset: address - range.base, device: range.device.as_ref() })
    }

    /// Has each device hand on what it has held back.
    pub fn flush(&self) {
        self.ranges.iter().for_each(|range| range.device.flush());
    }

    /// Returns each range, in the order of [`Found::slot`]: by address.
    pub fn slots(&self) -> impl Iterator<Item = Slot<'_>> {
        self.ranges.iter().map(|range| Slot { base: range.base, last: range.last, name: &range.name })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    struct Nothing;
    impl BusDevice for Nothing {
        fn read(&self, _offset: u64, _data: &mut [u8]) {}
        fn write(&self, _offset: u64, data: &[u8]) -> Action {
            if data == [9] { Action::Reset } else { Action::None }
        }
    }

    fn put(bus: &mut BusBuilder, base: u64, len: u64) -> Result<(), BusError> {
        bus.insert(base, len, format!("{base}"), Arc::new(Nothing))
    }

    #[test]
    fn edges_belong_to_the_right_slot() {
        let mut bus = BusBuilder::default();
        put(&mut bus, 0x3f8, 8).expect("free");
        put(&mut bus, 0x60, 1).expect("free");
        put(&mut bus, u64::MAX, 1).expect("free");
        let bus = bus.freeze();
        let at = |address| bus.find(address).map(|found| (found.slot, found.offset));
        assert_eq!(at(0x5f), None);
        assert_eq!(at(0x60), Some((0, 0)));
        assert_eq!(at(0x61), None);
        assert_eq!(at(0x3ff), Some((1, 7)));
        assert_eq!(at(0x400), None);
        assert_eq!(at(u64::MAX), Some((2, 0)));
    }

    #[test]
    fn empty_and_overlong_ranges_are_refused() {
        let mut bus = BusBuilder::default();
        assert!(matches!(put(&mut bus, 1, 0), Err(BusError::Length { .. })));
        assert!(matches!(put(&mut bus, u64::MAX, 2), Err(BusError::Length { .. })));
    }

    #[test]
    fn a_string_stops_at_the_first_action() {
        assert_eq!(Nothing.write_string(0, 1, &[1, 9, 2]), Action::Reset);
        assert_eq!(Nothing.write_string(0, 0, &[1]), Action::None);
    }

    proptest! {
        #[test]
        fn the_bus_agrees_with_a_list(ranges in proptest::collection::vec((0_u64..64, 1_u64..8), 1..12)) {
            let mut bus = BusBuilder::default();
            let mut owner = [None; 80];
            for (base, len) in ranges {
                let cells = usize::try_from(base).unwrap()..usize::try_from(base + len).unwrap();
                let free = owner[cells.clone()].iter().all(Option::is_none);
                prop_assert_eq!(put(&mut bus, base, len).is_ok(), free);
                if free {
                    owner[cells].fill(Some(base));
                }
            }
            let bus = bus.freeze();
            for (address, owner) in (0_u64..).zip(owner) {
                prop_assert_eq!(bus.find(address).map(|found| address - found.offset), owner);
            }
        }
    }
}
