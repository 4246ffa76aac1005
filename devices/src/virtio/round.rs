//! The bound on what a worker does for a queue each time its event loop wakes it. The driver, or a disk whose reads go to the
//! ring, can make chains available as fast as the device uses them; the worker must still see a reset, and its other events.

/// The fewest chains of a round: a small queue would have its worker return to the event loop too often.
const MIN_CHAINS: u32 = 256;

/// One round of a queue: from a wake-up of its worker until the worker waits for events again.
#[derive(Debug)]
pub(super) struct Round {
    limit: u32,
    left: u32,
    ended: bool,
    /// Kicks that the queue gave itself, to be woken again, since the eventfd was read.
    own_kicks: u64,
}

impl Round {
    pub(super) fn new(queue_size: u16) -> Self {
        let limit = u32::from(queue_size).max(MIN_CHAINS);
        Self { limit, left: limit, ended: false, own_kicks: 0 }
    }

    /// Starts the next round, as `kicks` were read from the eventfd. Returns how many of them the driver gave.
    pub(super) fn restart(&mut self, kicks: u64) -> u64 {
        self.left = self.limit;
        self.ended = false;
        kicks.saturating_sub(std::mem::take(&mut self.own_kicks))
    }

    /// Takes one step of the round: a chain, or another look at the available ring. Returns false where none is left.
    pub(super) fn step(&mut self) -> bool {
        let left = self.left.checked_sub(1);
        self.left = left.unwrap_or(0);
        left.is_some()
    }

    /// Ends the round. The queue must kick itself.
    pub(super) fn end(&mut self) {
        self.ended = true;
        self.own_kicks += 1;
    }

    pub(super) fn has_ended(&self) -> bool {
        self.ended
    }
}
