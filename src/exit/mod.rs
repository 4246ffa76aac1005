//! The exit handler: every way back from KVM_RUN is named, answered, and counted at one place.

pub mod counters;
pub mod end;
pub mod flight_recorder;
pub mod handler;
pub mod profiler;
pub mod reason;
pub mod tally;
pub mod timeline;
pub mod user_profile;

pub use counters::Counters;
pub use end::EndReason;
pub use flight_recorder::{ExitRecord, FlightRecorder};
pub use handler::{Handler, Outcome, Route};
pub use profiler::{HandlerTime, Measured, NoProfile, Profiler};
pub use reason::ExitReason;
pub use user_profile::UserProfile;
