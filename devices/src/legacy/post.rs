//! Port 0x80: the power-on self-test code, which Linux also writes to pass a little time.

use crate::bus::{Action, BusDevice};
use std::sync::atomic::{AtomicU8, Ordering};

/// The port; remembers the last code.
#[derive(Default)]
pub struct PostPort(AtomicU8);

impl PostPort {
    /// The last code written; 0 before the first.
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

/// A port whose writes mean something to who counts them only: marks in a profile.
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
