//! Statistics and profiles of runs, made from their records ([`RunRecord`](crate::measure::RunRecord)).

mod advice;
pub mod budget;
mod build;
pub mod data;
pub mod file;
mod histogram;
pub mod kinds;
mod mmu_work;
mod recorder;
pub mod render;
mod stats;
pub mod symbols;
mod text;
mod units;

pub use advice::Advice;
pub use build::RunSymbols;
pub use data::Profile;
pub use file::ProfileError;
pub use recorder::{Extent, flight_recorder};
pub use stats::RunStats;
