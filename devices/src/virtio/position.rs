//! Where a queue is in its rings while no worker has it: the device is paused.

use crate::memory::Memory;
use std::sync::{Mutex, PoisonError};
use vm_memory::{Bytes as _, GuestAddress};

/// Bytes of an available ring before its entries, and of an entry (virtio 1.3 §2.7.6).
const HEADER: u64 = 4;
const ENTRY: u64 = 2;

/// Where the device is in a queue's rings.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct QueuePosition {
    /// The index in the available ring of the chain that the device takes next.
    pub(super) next_available: u16,
    /// The index in the used ring of the next chain that the device uses.
    pub(super) next_used: u16,
    /// The heads of the chains that were taken and not used.
    pub(super) taken: Vec<u16>,
    /// Chains were given up that the host may still do.
    pub(super) is_abandoned: bool,
}

/// The position of a queue when its worker ended.
#[derive(Debug, Default)]
pub(super) struct LastPosition(Mutex<QueuePosition>);

impl LastPosition {
    pub(super) fn set(&self, position: QueuePosition) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = position;
    }

    pub(super) fn get(&self) -> QueuePosition {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl QueuePosition {
    /// Makes the chains that were taken and not used available again, as the next ones, so that the device takes them anew. To be
    /// called while neither driver nor device runs.
    ///
    /// Their heads are written to the entries of the available ring before the next one. No entry is needed any more there: a
    /// driver has no more chains in flight than the ring has entries. One that breaks this rule loses chains of its own. Drivers
    /// only write these entries, and never read them.
    pub(super) fn put_back(&mut self, memory: &Memory, available_ring: u64, size: u16) {
        for head in std::mem::take(&mut self.taken).into_iter().rev() {
            let index = self.next_available.wrapping_sub(1);
            let Some(entry) = index.checked_rem(size).map(u64::from) else { return };
            let gpa = available_ring.checked_add(HEADER + entry * ENTRY);
            if gpa.is_none_or(|gpa| memory.write_obj(head.to_le(), GuestAddress(gpa)).is_err()) {
                log::warn!("virtio: the available ring at {available_ring:#x} cannot be written");
                return;
            }
            self.next_available = index;
        }
    }
}
