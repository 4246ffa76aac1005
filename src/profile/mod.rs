//! What a run's counts are shown as.

mod memory_use;
mod stats;
mod text;

pub use memory_use::MemoryUse;
pub use stats::RunStats;
