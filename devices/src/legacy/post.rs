//! Ports that only record or ignore writes: the POST code port 0x80, and the port for marks in a profile.

use crate::bus::{Action, BusDevice};
use std::sync::atomic::{AtomicU8, Ordering};

/// The port for power-on self-test codes. Linux also writes to it for a short delay.
#[derive(Default)]
pub struct PostPort(AtomicU8);

impl PostPort {
    /// Has `code` as the last code.
    pub fn restore(&self, code: u8) {
        self.0.store(code, Ordering::Relaxed);
    }

    /// Returns the last code written; 0 before the first write.
    #[must_use]
    pub fn last(&self) -> u8 {
        self.0.load(Ordering::Relaxed)
    }
}

impl BusDevice for PostPort {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        if let Some(value) = data.first_mut() {
            *value = self.last();
        }
    }

    fn write(&self, _offset: u64, data: &[u8]) -> Action {
        if let Some(code) = data.first() {
            log::debug!("POST code {code:#04x}");
            self.0.store(*code, Ordering::Relaxed);
        }
        Action::None
    }
}

/// The port for marks: a write has no effect on the machine, and the profiler starts a new phase for it.
#[derive(Default)]
pub struct MarkPort;

impl BusDevice for MarkPort {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn write(&self, _offset: u64, _data: &[u8]) -> Action {
        Action::None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_code_reads_back() {
        let port = PostPort::default();
        port.write(0, &[0x42]);
        port.write(0, &[]);
        let mut data = [0xff; 2];
        port.read(0, &mut data);
        assert_eq!(data, [0x42, 0xff]);
    }
}
