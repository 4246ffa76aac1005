//! The test device of kvm-unit-tests: ports and memory that store what is written, interrupt lines that the guest sets, and
//! invalidation of the translations of a guest page. It is QEMU's pc-testdev, at the same addresses.

use crate::bus::{Action, BusBuilder, BusDevice, BusError};
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

/// The level of an interrupt line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LineLevel {
    /// The line is deasserted.
    Low,
    /// The line is asserted.
    High,
}

/// What the test device needs of the machine.
pub trait TestHost: Send + Sync {
    /// Sets the level of the interrupt line `gsi`.
    fn set_line(&self, gsi: u32, level: LineLevel);

    /// Invalidates the translation of the page with the guest physical address `gpa`, so that the next access faults.
    fn flush_page(&self, gpa: u64);
}

/// Memory of a device, for accesses of any width and alignment.
struct Latch(Mutex<Box<[u8]>>);

impl Latch {
    fn new(bytes: usize) -> Self {
        Self(Mutex::new(vec![0; bytes].into_boxed_slice()))
    }

    /// Clips the range of `len` bytes at `offset` to `size` bytes.
    fn range(offset: u64, len: usize, size: usize) -> Range<usize> {
        let start = usize::try_from(offset).unwrap_or(usize::MAX).min(size);
        start..start.saturating_add(len).min(size)
    }
}

impl BusDevice for Latch {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let bytes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let range = Self::range(offset, data.len(), bytes.len());
        let len = range.len();
        data[..len].copy_from_slice(&bytes[range]);
    }

    fn write(&self, offset: u64, data: &[u8]) -> Action {
        let mut bytes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let range = Self::range(offset, data.len(), bytes.len());
        let len = range.len();
        bytes[range].copy_from_slice(&data[..len]);
        Action::None
    }
}

/// A 32-bit write of a guest physical address invalidates the translation of its page.
struct FlushPort(Arc<dyn TestHost>);

impl BusDevice for FlushPort {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, offset: u64, data: &[u8]) -> Action {
        if let (0, Ok(gpa)) = (offset, <[u8; 4]>::try_from(data)) {
            self.0.flush_page(u32::from_le_bytes(gpa).into());
        }
        Action::None
    }
}

/// One port for each interrupt line: a write of 0 deasserts the line, of any other value asserts it.
struct Lines(Arc<dyn TestHost>);

impl BusDevice for Lines {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    /// Sets a line to the level of the low byte of the written value.
    fn write(&self, offset: u64, data: &[u8]) -> Action {
        if let (Ok(gsi), Some(value)) = (u32::try_from(offset), data.first()) {
            self.0.set_line(gsi, if *value == 0 { LineLevel::Low } else { LineLevel::High });
        }
        Action::None
    }
}

/// Puts the test device on the buses: ports 0xe0 (latch), 0xe4 (flush), 0xe8 (latch) and 0x2000 (24 interrupt lines), and
/// 64 KiB of memory at 0xff00_0000 each access to which exits.
///
/// # Errors
/// Returns [`BusError`] where another device is at one of these addresses.
pub fn add_test_device(pio: &mut BusBuilder, mmio: &mut BusBuilder, host: &Arc<dyn TestHost>) -> Result<(), BusError> {
    // Both ranges access the same four bytes.
    let latch = Arc::new(Latch::new(4));
    pio.insert(0xe0, 4, "test latch", Arc::clone(&latch) as _)?;
    pio.insert(0xe4, 4, "test flush", Arc::new(FlushPort(Arc::clone(host))))?;
    pio.insert(0xe8, 4, "test latch, bytes", latch)?;
    pio.insert(0x2000, 24, "test interrupt lines", Arc::new(Lines(Arc::clone(host))))?;
    mmio.insert(0xff00_0000, 0x1_0000, "test memory", Arc::new(Latch::new(0x1_0000)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[derive(Default)]
    struct Host(Mutex<Vec<Call>>);

    #[derive(Debug, PartialEq)]
    enum Call {
        SetLine(u32, LineLevel),
        FlushPage(u64),
    }

    impl TestHost for Host {
        fn set_line(&self, gsi: u32, level: LineLevel) {
            self.0.lock().expect("not poisoned").push(Call::SetLine(gsi, level));
        }

        fn flush_page(&self, gpa: u64) {
            self.0.lock().expect("not poisoned").push(Call::FlushPage(gpa));
        }
    }

    #[test]
    fn ports_do_what_they_are_for() {
        let host = Arc::new(Host::default());
        let (mut pio, mut mmio) = (BusBuilder::default(), BusBuilder::default());
        add_test_device(&mut pio, &mut mmio, &(Arc::clone(&host) as _)).expect("free");
        let (pio, mmio) = (pio.freeze(), mmio.freeze());
        let write = |port, data: &[u8]| {
            let found = pio.find(port).expect("a device");
            assert_eq!(found.device.write(found.offset, data), Action::None);
        };
        write(0xe0, &[1, 2, 3, 4]);
        write(0xe1, &[9]);
        let mut data = [0; 4];
        pio.find(0xe8).expect("a device").device.read(0, &mut data);
        assert_eq!(data, [1, 9, 3, 4]);
        write(0xe4, &0x1234_5000_u32.to_le_bytes());
        // Not 32 bits wide: ignored.
        write(0xe4, &[1]);
        write(0x200b, &[0x80, 0, 0, 0]);
        write(0x200b, &[0]);
        write(0x2017, &[]);
        let calls =
            [Call::FlushPage(0x1234_5000), Call::SetLine(11, LineLevel::High), Call::SetLine(11, LineLevel::Low)];
        assert_eq!(*host.0.lock().expect("not poisoned"), calls);
        assert!(mmio.find(0xff00_ffff).is_some() && mmio.find(0xff01_0000).is_none());
    }

    proptest! {
        #[test]
        fn a_latch_is_memory(accesses in proptest::collection::vec((0_u64..70, proptest::collection::vec(any::<u8>(), 0..9)), 0..40)) {
            let latch = Latch::new(64);
            let mut model = [0_u8; 64];
            for (at, data) in accesses {
                latch.write(at, &data);
                for (cell, byte) in model.iter_mut().skip(usize::try_from(at).unwrap()).zip(&data) {
                    *cell = *byte;
                }
                let mut read = vec![0xff; data.len()];
                latch.read(at, &mut read);
                for (index, byte) in read.iter().enumerate() {
                    let cell = model.get(usize::try_from(at).unwrap() + index).copied();
                    prop_assert_eq!(*byte, cell.unwrap_or(0xff));
                }
            }
        }
    }
}
