//! How many clones the host has room for at once.

use crate::memory::available_bytes;
use rustix::process::{Resource, getrlimit};

/// The memory that is set aside for a clone whose guest writes little, in bytes.
pub(super) const CLONE_BYTES: u64 = 32 << 20;
/// Open files of this process besides those of clones.
const OTHER_FILES: u64 = 32;
/// Open files for a clone: two pipes, the statistics, and what is open while it is started.
const CLONE_FILES: u64 = 8;

/// What the host has for clones.
pub(super) struct Room {
    /// The most that run at once.
    at_once: usize,
    /// Memory that they may take, in bytes.
    memory_bytes: u64,
    /// What one is thought to take.
    clone_bytes: u64,
}

impl Room {
    /// The room of this host for `wanted` clones at once.
    pub(super) fn of_host(wanted: u32) -> Self {
        let files = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
        Self::new(wanted, available_bytes().unwrap_or(u64::MAX), files)
    }

    fn new(wanted: u32, memory_bytes: u64, files: u64) -> Self {
        let by_files = files.saturating_sub(OTHER_FILES) / CLONE_FILES;
        let at_once = u64::from(wanted).min(by_files).max(1);
        Self { at_once: usize::try_from(at_once).unwrap_or(usize::MAX), memory_bytes, clone_bytes: CLONE_BYTES }
    }

    /// Returns true if there is none for a single clone.
    pub(super) fn is_none(&self) -> bool {
        self.memory_bytes < self.clone_bytes
    }

    /// The memory that clones may take, in bytes.
    pub(super) fn memory_bytes(&self) -> u64 {
        self.memory_bytes
    }

    /// Returns true if there is room for one more beside `running` ones. One alone may always run.
    pub(super) fn has_room(&self, running: usize) -> bool {
        let taken = (running as u64).saturating_add(1).saturating_mul(self.clone_bytes);
        running == 0 || running < self.at_once && taken <= self.memory_bytes
    }

    /// A clone took this memory, in KiB, of `most_bytes` that one can take: others will, too. A process that a guest has taken over tells it.
    pub(super) fn took(&mut self, own_kib: u64, most_bytes: u64) {
        self.clone_bytes = self.clone_bytes.max(own_kib.saturating_mul(1024).min(most_bytes));
    }

    /// No more processes can be started than the `running` ones.
    pub(super) fn is_full_at(&mut self, running: usize) {
        self.at_once = self.at_once.min(running.max(1));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_files_and_the_wish_are_limits() {
        let room = Room::new(20, u64::MAX, u64::MAX);
        assert!(room.has_room(19) && !room.has_room(20) && !room.is_none());
        let mut room = Room::new(20, 10 * CLONE_BYTES, u64::MAX);
        assert!(room.has_room(9) && !room.has_room(10));
        room.took(2 * CLONE_BYTES / 1024, u64::MAX);
        assert!(room.has_room(4) && !room.has_room(5), "others take as much");
        room.took(u64::MAX, 100 * CLONE_BYTES);
        assert!(room.has_room(0) && !room.has_room(1), "one may run");
        let room = Room::new(1000, u64::MAX, 1024);
        assert!(room.has_room(123) && !room.has_room(124));
        assert!(Room::new(3, CLONE_BYTES - 1, 1024).is_none());
        let mut room = Room::new(20, u64::MAX, u64::MAX);
        room.is_full_at(5);
        assert!(room.has_room(4) && !room.has_room(5));
    }
}
