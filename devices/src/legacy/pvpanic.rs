//! pvpanic: the port by which a guest kernel says that it panicked (QEMU docs/specs/pvpanic.rst).

use crate::bus::{Action, BusDevice};

const PANICKED: u8 = 1;
const CRASH_LOADED: u8 = 1 << 1;

/// The one-byte port.
pub struct PvPanic;

impl BusDevice for PvPanic {
    /// The events that it takes.
    fn read(&self, _offset: u64, data: &mut [u8]) {
        if let Some(value) = data.first_mut() {
            *value = PANICKED | CRASH_LOADED;
        }
    }

    fn write(&self, _offset: u64, data: &[u8]) -> Action {
        match data.first() {
            Some(events) if events & PANICKED != 0 => Action::Panicked,
            Some(events) if events & CRASH_LOADED != 0 => {
                log::warn!("the guest panicked and goes on into its crash kernel");
                Action::None
            }
            _ => Action::None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_told_from_a_crash_kernel() {
        assert_eq!(PvPanic.write(0, &[PANICKED]), Action::Panicked);
        assert_eq!(PvPanic.write(0, &[CRASH_LOADED]), Action::None);
        assert_eq!(PvPanic.write(0, &[]), Action::None);
    }
}
