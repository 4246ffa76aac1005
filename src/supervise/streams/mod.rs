//! The streams of a command that runs in the guest: its bytes, and the lines of its control stream.

mod control;
mod pump;

pub use control::{CommandEnd, ControlError, ControlLines, Said};
pub use pump::{Pump, PumpState};
