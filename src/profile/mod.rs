//! What a run's counts are shown as.

mod advice;
pub mod budget;
mod build;
pub mod data;
mod memory_use;
mod mmu_work;
mod recorder;
pub mod render;
mod stats;
pub mod symbols;
mod text;

pub use advice::Advice;
pub use build::symbols as symbols_of;
pub use data::{Profile, ProfileError};
pub use memory_use::MemoryUse;
pub use recorder::flight_recorder;
pub use stats::RunStats;
