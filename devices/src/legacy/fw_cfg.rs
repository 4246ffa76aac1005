//! QEMU's firmware configuration device, with the items that test kernels read: number of vCPUs and memory size. A write to
//! one port selects an item, reads of another return its bytes (QEMU docs/specs/fw_cfg.rst, the interface without DMA).

use crate::bus::{Action, BusDevice};
use std::sync::{Mutex, PoisonError};

// Item keys.
const SIGNATURE: u16 = 0;
const ID: u16 = 1;
const RAM_SIZE: u16 = 3;
const NB_CPUS: u16 = 5;
/// The key of the memory limit of kvm-unit-tests: how much of [`RAM_SIZE`] a test may use, 0 for all.
const MAX_RAM: u16 = 0x11;

#[derive(Default)]
struct State {
    /// The bytes of the selected item.
    item: Vec<u8>,
    /// Index of the next byte to read.
    next: usize,
}

/// The fw_cfg device: 16-bit selector at the first port, 8-bit data at the second.
pub struct FwCfg {
    cpus: u16,
    memory_bytes: u64,
    state: Mutex<State>,
}

impl FwCfg {
    /// The selector port, the first port of the device.
    pub const BASE: u16 = 0x510;
    /// The number of ports.
    pub const LEN: u64 = 2;

    /// Makes the device for a machine with `cpus` vCPUs and `memory_bytes` bytes of memory.
    #[must_use]
    pub fn new(cpus: u32, memory_bytes: u64) -> Self {
        let cpus = u16::try_from(cpus).unwrap_or(u16::MAX);
        Self { cpus, memory_bytes, state: Mutex::default() }
    }

    fn item(&self, key: u16) -> Vec<u8> {
        match key {
            SIGNATURE => b"QEMU".to_vec(),
            // Bit 0: the traditional interface, without DMA.
            ID => 1_u32.to_le_bytes().to_vec(),
            RAM_SIZE => self.memory_bytes.to_le_bytes().to_vec(),
            NB_CPUS => self.cpus.to_le_bytes().to_vec(),
            MAX_RAM => 0_u64.to_le_bytes().to_vec(),
            _ => Vec::new(),
        }
    }
}

impl BusDevice for FwCfg {
    /// Returns the next byte of the selected item; 0 beyond its end.
    fn read(&self, offset: u64, data: &mut [u8]) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        data.fill(0);
        if let (1, [byte]) = (offset, data) {
            *byte = state.item.get(state.next).copied().unwrap_or(0);
            state.next = state.next.saturating_add(1);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) -> Action {
        if let (0, Ok(key)) = (offset, <[u8; 2]>::try_from(data)) {
            let item = self.item(u16::from_le_bytes(key));
            *self.state.lock().unwrap_or_else(PoisonError::into_inner) = State { item, next: 0 };
        }
        Action::None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn items_are_read_byte_by_byte_and_end_in_zeroes() {
        let device = FwCfg::new(3, 0x1_2345_6000);
        let read = |key: u16, bytes: usize| {
            device.write(0, &key.to_le_bytes());
            let mut out = vec![0xff; bytes];
            out.iter_mut().for_each(|byte| device.read(1, std::slice::from_mut(byte)));
            out
        };
        assert_eq!(read(NB_CPUS, 4), [3, 0, 0, 0]);
        assert_eq!(read(RAM_SIZE, 8), 0x1_2345_6000_u64.to_le_bytes());
        assert_eq!(read(SIGNATURE, 5), *b"QEMU\0");
        assert_eq!((read(MAX_RAM, 8), read(0x7777, 2)), (vec![0; 8], vec![0; 2]));
        // Accesses to another port or of another width do not advance.
        let mut wide = [0xff; 2];
        device.write(0, &NB_CPUS.to_le_bytes());
        device.read(1, &mut wide);
        device.read(0, &mut wide);
        device.write(1, &[1]);
        let mut byte = [0xff];
        device.read(1, &mut byte);
        assert_eq!((wide, byte), ([0, 0], [3]));
    }
}
