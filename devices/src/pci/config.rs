//! The configuration space of a PCI function (PCI Local Bus 3.0 §6.1).

use serde::{Deserialize, Serialize};

/// Size of the configuration space in bytes. Offsets beyond read as zeros: there are no extended capabilities.
const BYTES: usize = 256;

// Register offsets (PCI Local Bus 3.0 §6.1, figure 6-1).

const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const LATENCY_TIMER: usize = 0x0d;
const BAR0: usize = 0x10;
const CAPABILITIES: usize = 0x34;
const FIRST_CAPABILITY: usize = 0x40;
/// Status register: Capabilities List.
const STATUS_CAPABILITIES: u8 = 1 << 4;
/// Command register: Memory Space.
const COMMAND_MEMORY: u8 = 1 << 1;
/// Command register: Bus Master.
const COMMAND_MASTER: u8 = 1 << 2;
/// Command register, upper byte: Interrupt Disable. No function has INTx; the bit is writable and has no effect.
const COMMAND_INTX_OFF: u8 = 1 << 2;

/// A usual value of the latency timer, in clocks of the bus. Nothing follows from it.
const LATENCY_CLOCKS: u8 = 64;

/// The identification registers of a function (PCI Local Bus 3.0 §6.2.1).
#[derive(Clone, Copy, Debug)]
pub struct Identity {
    /// Vendor ID, at offset 0 of the configuration space.
    pub vendor: u16,
    /// Device ID, as the vendor assigned it.
    pub device: u16,
    /// Revision ID of the device.
    pub revision: u8,
    /// Class code: base class in the upper byte, subclass in the lower one.
    pub class: u16,
    /// Subsystem Vendor ID: the vendor of the card.
    pub subsystem_vendor: u16,
    /// Subsystem ID, as the subsystem's vendor assigned it.
    pub subsystem_device: u16,
}

/// Base address register 0: a 32-bit memory range at a fixed address.
#[derive(Clone, Copy, Debug)]
pub struct BarLayout {
    /// First guest physical address, a multiple of `bytes`.
    pub base: u32,
    /// Size in bytes, a power of two.
    pub bytes: u32,
}

/// A capability to add to a configuration space (PCI Local Bus 3.0 §6.7).
pub struct Capability<'a> {
    /// The capability ID (PCI Code and ID Assignment §2).
    pub id: u8,
    /// The bytes after the two-byte header (ID and next pointer).
    pub body: &'a [u8],
    /// Mask of the bits of `body` that the guest can write; bytes beyond its end are read-only.
    pub writable: &'a [u8],
}

/// The configuration space of a function.
pub struct ConfigSpace {
    bytes: [u8; BYTES],
    writable: [u8; BYTES],
    bar: Option<BarLayout>,
    /// The guest wrote all ones to BAR 0, so that it reads as its size mask (PCI Local Bus 3.0 §6.2.5.1).
    sizing: bool,
    next_capability: usize,
    /// Offset of the pointer that the next capability is linked to.
    last_link: usize,
}

/// What the guest can have changed in a configuration space, for a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConfigSpaceState {
    /// All bytes, of which only those are used that the guest can write.
    bytes: Vec<u8>,
    /// BAR 0 reads as its size mask.
    sizing: bool,
}

impl ConfigSpace {
    /// Returns the state.
    #[must_use]
    pub fn save(&self) -> ConfigSpaceState {
        ConfigSpaceState { bytes: self.bytes.to_vec(), sizing: self.sizing }
    }

    /// Sets the bits that the guest can write. Returns false, and changes nothing, where the state has another size.
    #[must_use]
    pub fn restore(&mut self, state: &ConfigSpaceState) -> bool {
        let Ok(bytes) = <&[u8; BYTES]>::try_from(state.bytes.as_slice()) else { return false };
        for ((byte, mask), saved) in self.bytes.iter_mut().zip(&self.writable).zip(bytes) {
            *byte = *byte & !mask | saved & mask;
        }
        self.sizing = state.sizing && self.bar.is_some();
        true
    }

    /// Makes a configuration space without capabilities.
    #[must_use]
    pub fn new(identity: Identity, bar: Option<BarLayout>) -> Self {
        let mut bytes = [0; BYTES];
        let mut put = |at: usize, value: u16| bytes[at..at + 2].copy_from_slice(&value.to_le_bytes());
        put(0x00, identity.vendor);
        put(0x02, identity.device);
        put(0x0a, identity.class);
        put(0x2c, identity.subsystem_vendor);
        put(0x2e, identity.subsystem_device);
        bytes[0x08] = identity.revision;
        if let Some(bar) = bar {
            bytes[BAR0..BAR0 + 4].copy_from_slice(&bar.base.to_le_bytes());
        }
        // Linux writes the latency timer of a bus master where it is below 16, INTx's bit where it is clear, and clears and sets the bit for
        // memory around each access to a BAR that it sizes. Firmware could have left them so.
        bytes[COMMAND + 1] = COMMAND_INTX_OFF;
        bytes[LATENCY_TIMER] = LATENCY_CLOCKS;
        let mut writable = [0; BYTES];
        writable[COMMAND] = COMMAND_MEMORY | COMMAND_MASTER;
        writable[COMMAND + 1] = COMMAND_INTX_OFF;
        writable[0x0c] = 0xff; // cache line size: no effect
        writable[0x3c] = 0xff; // interrupt line: no effect
        Self { bytes, writable, bar, sizing: false, next_capability: FIRST_CAPABILITY, last_link: CAPABILITIES }
    }

    /// Adds a capability and returns its offset. `None` where it does not fit.
    pub fn add_capability(&mut self, capability: &Capability<'_>) -> Option<usize> {
        let at = self.next_capability;
        let body = at + 2;
        let end = body.checked_add(capability.body.len()).filter(|end| *end <= BYTES)?;
        self.bytes[at] = capability.id;
        self.bytes[body..end].copy_from_slice(capability.body);
        for (mask, bits) in self.writable[body..end].iter_mut().zip(capability.writable) {
            *mask = *bits;
        }
        self.bytes[self.last_link] = u8::try_from(at).ok()?;
        self.bytes[STATUS] |= STATUS_CAPABILITIES;
        self.last_link = at + 1;
        self.next_capability = end.next_multiple_of(4);
        Some(at)
    }

    /// Copies the registers from byte `offset` on to `data`; zeros beyond the end of the configuration space.
    pub fn read(&self, offset: usize, data: &mut [u8]) {
        for (index, byte) in (offset..).zip(data) {
            *byte = match self.bar {
                Some(bar) if self.sizing && (BAR0..BAR0 + 4).contains(&index) => {
                    (!(bar.bytes - 1)).to_le_bytes()[index - BAR0]
                }
                _ => self.bytes.get(index).copied().unwrap_or(0),
            };
        }
    }

    /// Writes the writable bits at byte `offset`. BAR 0 can be sized, but not moved.
    pub fn write(&mut self, offset: usize, data: &[u8]) {
        if offset == BAR0 && self.bar.is_some() {
            self.write_bar(data);
        }
        for (index, byte) in (offset..).zip(data) {
            let Some(mask) = self.writable.get(index) else { break };
            self.bytes[index] = self.bytes[index] & !mask | byte & mask;
        }
    }

    fn write_bar(&mut self, data: &[u8]) {
        self.sizing = data == [0xff; 4];
        if let (Some(bar), false, Ok(value)) = (self.bar, self.sizing, <[u8; 4]>::try_from(data))
            && u32::from_le_bytes(value) != bar.base
        {
            log::warn!(
                "PCI: the guest moves a BAR from {:#x} to {:#x}: ignored, BARs cannot be moved",
                bar.base,
                u32::from_le_bytes(value)
            );
        }
    }

    /// Returns the byte at `offset`; 0 beyond the end.
    #[must_use]
    pub fn byte(&self, offset: usize) -> u8 {
        self.bytes.get(offset).copied().unwrap_or(0)
    }

    /// Returns the 32-bit register at byte `offset`.
    #[must_use]
    pub fn dword(&self, offset: usize) -> u32 {
        let mut data = [0; 4];
        for (index, byte) in (offset..).zip(&mut data) {
            *byte = self.byte(index);
        }
        u32::from_le_bytes(data)
    }

    /// Returns true if the guest has enabled memory space (command register), so that the BAR responds.
    #[must_use]
    pub fn memory_enabled(&self) -> bool {
        self.bytes[COMMAND] & COMMAND_MEMORY != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn space() -> ConfigSpace {
        let identity = Identity {
            vendor: 0x1af4,
            device: 0x1042,
            revision: 1,
            class: 0x0180,
            subsystem_vendor: 1,
            subsystem_device: 2,
        };
        ConfigSpace::new(identity, Some(BarLayout { base: 0xc000_8000, bytes: 0x8000 }))
    }

    fn dword(space: &ConfigSpace, at: usize) -> u32 {
        let mut data = [0; 4];
        space.read(at, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn the_bar_can_be_sized_and_not_moved() {
        let mut space = space();
        space.write(BAR0, &[0xff; 4]);
        assert_eq!(dword(&space, BAR0), 0xffff_8000);
        space.write(BAR0, &0xc000_8000_u32.to_le_bytes());
        assert_eq!(dword(&space, BAR0), 0xc000_8000);
        space.write(BAR0, &0xd000_0000_u32.to_le_bytes());
        assert_eq!(dword(&space, BAR0), 0xc000_8000);
        space.write(BAR0 + 4, &[0xff; 4]);
        assert_eq!(dword(&space, BAR0 + 4), 0, "there is no second BAR");
    }

    #[test]
    fn capabilities_are_linked_and_end() {
        let mut space = space();
        let first = space.add_capability(&Capability { id: 0x11, body: &[1; 10], writable: &[] }).expect("room");
        let second = space.add_capability(&Capability { id: 9, body: &[2; 3], writable: &[0, 0xf0] }).expect("room");
        assert_eq!((first, second), (0x40, 0x4c));
        assert_eq!(usize::from(space.byte(CAPABILITIES)), first);
        assert_eq!(usize::from(space.byte(first + 1)), second);
        assert_eq!(space.byte(second + 1), 0);
        space.write(second + 2, &[0xff; 3]);
        assert_eq!([2, 3, 4].map(|i| space.byte(second + i)), [2, 0xf2, 2]);
        assert!(space.add_capability(&Capability { id: 9, body: &[0; 250], writable: &[] }).is_none());
    }

    #[test]
    fn a_state_sets_what_the_guest_can_write_and_nothing_else() {
        let mut old = space();
        old.write(COMMAND, &[0, COMMAND_INTX_OFF]);
        old.write(0x3c, &[7]);
        old.write(BAR0, &[0xff; 4]);
        let mut new = space();
        assert!(new.restore(&old.save()));
        assert_eq!(new.save(), old.save());
        assert!(!new.memory_enabled() && dword(&new, BAR0) == 0xffff_8000);
        let hostile = ConfigSpaceState { bytes: vec![0xff; BYTES], sizing: false };
        assert!(new.restore(&hostile));
        assert_eq!((dword(&new, 0), dword(&new, 8), dword(&new, BAR0)), (0x1042_1af4, 0x0180_0001, 0xc000_8000));
        let before = new.save();
        for bytes in [0, 1, BYTES - 1, BYTES + 1] {
            assert!(!new.restore(&ConfigSpaceState { bytes: vec![0; bytes], sizing: true }));
        }
        assert_eq!(new.save(), before);
    }

    proptest! {
        #[test]
        fn identity_survives_any_write(writes in proptest::collection::vec((0_usize..5000, proptest::collection::vec(any::<u8>(), 0..9)), 0..40)) {
            let mut space = space();
            for (at, data) in writes {
                space.write(at, &data);
                space.read(at, &mut vec![0; data.len()]);
            }
            prop_assert_eq!(dword(&space, 0), 0x1042_1af4);
            prop_assert_eq!(dword(&space, 8), 0x0180_0001);
        }
    }
}
