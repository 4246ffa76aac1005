//! An exit that can be followed.

use crate::kvm::{Direction, Exit};

/// Port I/O that has been answered, and whose exit can be followed.
#[derive(Clone, Copy, Debug)]
pub struct PortExit {
    /// The direction of the access.
    pub(super) direction: Direction,
    /// The log2 of its bytes.
    pub(super) width: u8,
    /// What was read or written.
    pub(super) value: u64,
}

impl PortExit {
    /// Returns the port I/O of an exit that has been answered; `None` for other exits, strings, and accesses that KVM completes in
    /// another way.
    #[must_use]
    pub fn of(exit: &Exit<'_>) -> Option<Self> {
        // KVM moves RIP on at once for port 0x7e (KVM_X86_QUIRK_OUT_7E_INC_RIP).
        let Exit::Pio { port, direction, size, data } = exit else { return None };
        if *port == 0x7e || data.len() != *size {
            return None;
        }
        let width = match size {
            1 => 0,
            2 => 1,
            4 => 2,
            _ => return None,
        };
        let mut bytes = [0; 8];
        bytes.get_mut(..*size)?.copy_from_slice(data);
        Some(Self { direction: *direction, width, value: u64::from_le_bytes(bytes) })
    }
}
