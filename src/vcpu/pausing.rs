//! Pauses of a machine, as its other threads see them.

use super::threads::Control;
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

    /// Lets the vCPUs of a paused machine go on.
    pub fn resume(&self) {
        self.gate.open();
    }
}
