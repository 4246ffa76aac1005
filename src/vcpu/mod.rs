//! vCPUs: the run loop, and one thread for each.

mod pause;
mod pausing;
mod run_loop;
mod saving;
mod threads;

pub use run_loop::{Records, Stop, run};
pub use saving::SaveError;
pub use threads::{Confinement, Control, Inspector, Measure, Threads};
