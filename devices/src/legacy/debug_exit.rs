//! isa-debug-exit: a write ends the VMM with an exit status that the guest chooses, as QEMU's device of that name does.

use crate::bus::{Action, BusDevice};

/// The isa-debug-exit device, which has four ports.
pub struct DebugExit;

impl BusDevice for DebugExit {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    /// Ends the VMM with the exit status `value × 2 + 1`, truncated to 8 bits. It is never 0, as with QEMU.
    fn write(&self, _offset: u64, data: &[u8]) -> Action {
        data.first().map_or(Action::None, |value| Action::DebugExit(value << 1 | 1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_status_is_odd_and_from_the_low_byte() {
        assert_eq!(DebugExit.write(0, &[0]), Action::DebugExit(1));
        assert_eq!(DebugExit.write(0, &[38, 0, 0, 0]), Action::DebugExit(77));
        assert_eq!(DebugExit.write(0, &[0xff, 1]), Action::DebugExit(255));
        assert_eq!(DebugExit.write(0, &[]), Action::None);
    }
}
