//! Messages on stderr: those of the `log` crate, and those of the command itself.
//!
//! A guest can cause most messages and be quoted in them. So each is one line without control characters and of bounded
//! length, errors and warnings are limited by the place in the code that they come from (`limiter`), and no thread waits for the
//! reader of stderr (`stderr`). A process that may not write to stderr sends its messages to one that does
//! ([`relay`]).

mod limiter;
mod messages;
mod packet;
mod relay;
mod stderr;

pub use messages::{
    Flush, Pending, Sink, finish, init, is_verbose, leave_out_backtraces, print, pump, report_suppressed, say,
};
pub use packet::RelaySender;
pub use relay::{Forwarded, Relay, relay};
