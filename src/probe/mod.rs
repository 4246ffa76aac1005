//! What this host can do, found out by trying: nothing is believed that a throw-away vCPU has not done.

mod cost;
mod host;
mod mmu;
mod trial;

pub use cost::{Cost, Kind as CostKind, Price, costs};
pub use host::{Host, Mmu};
pub use mmu::{Holder, MmuError, MmuState, command_for};
pub use trial::{Failure, STEPS, Trial, run as run_trial, without_exits};
