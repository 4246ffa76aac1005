//! The exit handler: each reason for which KVM_RUN returns has a name, an answer, and an effect on the run.

pub mod end;
pub mod handler;
pub mod reason;
pub mod signal;

pub use end::{CommandEnd, Crash, EndKind, EndReason, RunEnd};
pub use handler::{Handler, Outcome, Route};
pub use reason::ExitReason;
pub use signal::Signal;
