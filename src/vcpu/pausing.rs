//! Pauses of a machine, as its other threads see them.

use super::threads::Control;
use crate::exit::EndReason;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

impl Control {
    /// Returns true while the machine is paused.
    #[must_use]
    pub fn is_paused(&self) -> bool {
        self.gate.is_closed()
    }

    /// Since when the machine is paused.
    #[must_use]
    pub fn paused_since(&self) -> Option<Instant> {
        self.gate.closed_since()
    }

    /// How long the machine was paused, in all, but for a pause that is not over.
    #[must_use]
    pub fn paused_before(&self) -> Duration {
        self.gate.closed_before()
    }

    /// Has [`Self::line_seen`] ask for a snapshot, in place of the end of the run.
    pub fn save_at_line(&self) {
        self.saves_at_line.store(true, Ordering::Release);
    }

    /// A console has had the line of `--expect` or `--snapshot-at`, or one that ends the run: `end` says which.
    pub fn line_seen(&self, end: EndReason) {
        if matches!(end, EndReason::Seen(_)) && self.saves_at_line.load(Ordering::Acquire) {
            self.request_snapshot();
        } else {
            self.end(end, None);
        }
    }

    /// Asks the event loop to save the machine.
    pub fn request_snapshot(&self) {
        self.snapshot_due.store(true, Ordering::Release);
        self.wake();
    }

    /// Returns true once for each time that a snapshot was asked for.
    #[must_use]
    pub fn take_snapshot_request(&self) -> bool {
        self.snapshot_due.swap(false, Ordering::AcqRel)
    }

    /// Lets the vCPUs of a paused machine go on.
    pub fn resume(&self) {
        self.gate.open();
    }
}
