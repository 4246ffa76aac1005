//! The streams of a command that runs in the guest: its bytes, and the lines of its control stream.

mod control;
mod ends;
mod pump;
mod session;
mod stdio;

pub(super) use ends::{AgentStreams, CommandTerminal, Ends};
pub(super) use session::Session;
