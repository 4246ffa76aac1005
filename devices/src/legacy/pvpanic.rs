//! pvpanic: the port on which a guest kernel reports that it panicked (QEMU docs/specs/pvpanic.rst).

use crate::bus::{Action, BusDevice};

/// Event bit: the kernel panicked.
const PANICKED: u8 = 1;
/// Event bit: the kernel panicked and continues in a crash kernel.
const CRASH_LOADED: u8 = 1 << 1;

/// The pvpanic device, on one port.
pub struct PvPanic;

impl BusDevice for PvPanic {
    /// Returns the mask of the supported events.
    fn read(&self, _offset: u64, data: &mut [u8]) {
        if let Some(value) = data.first_mut() {
            *value = PANICKED | CRASH_LOADED;
        }
    }

    fn write(&self, _offset: u64, data: &[u8]) -> Action {
        match data.first() {
            Some(events) if events & PANICKED != 0 => Action::Panicked,
            Some(events) if events & CRASH_LOADED != 0 => {
                log::warn!("the guest panicked and continues in its crash kernel");
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
    fn only_a_panic_without_a_crash_kernel_ends_the_run() {
        assert_eq!(PvPanic.write(0, &[PANICKED]), Action::Panicked);
        assert_eq!(PvPanic.write(0, &[CRASH_LOADED]), Action::None);
        assert_eq!(PvPanic.write(0, &[]), Action::None);
    }
}
