//! What is written down about exits: counters, the flight recorder, profiles of userspace exits, and VM exits one by one
//! from KVM's tracepoints.

pub mod counters;
pub mod flight_recorder;
pub mod profiler;
pub mod tally;
pub mod timeline;
pub mod tracer;
pub mod user_profile;

pub use counters::Counters;
pub use flight_recorder::{ExitRecord, FlightRecorder};
pub use profiler::{HandlerTime, Measured, NoProfile, Profiler};
pub use user_profile::UserProfile;
