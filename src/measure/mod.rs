//! What is written down about exits: counters, the flight recorder, profiles of userspace exits, and VM exits from KVM's
//! tracepoints. [`record::RunRecord`] is what is left of them when a run has ended.

pub mod counters;
pub mod flight_recorder;
pub mod memory_use;
pub mod profiler;
pub mod record;
pub mod tally;
pub mod timeline;
pub mod tracer;
pub mod user_profile;

pub use counters::Counters;
pub use flight_recorder::{ExitRecord, FlightRecorder};
pub use memory_use::MemoryUse;
pub use profiler::{HandlerTime, NoProfile, Profiler};
pub use record::{Measured, RunRecord, VcpuRecord};
pub use user_profile::UserProfile;
