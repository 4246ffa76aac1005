//! What the host has for guests: processors, and what a run takes.

use std::num::NonZero;

/// What a run takes beyond the memory of its guest.
pub(super) const OVERHEAD_BYTES: u64 = 48 << 20;

/// Processors that this process may use.
pub(super) fn processors() -> usize {
    std::thread::available_parallelism().map_or(1, NonZero::get)
}
