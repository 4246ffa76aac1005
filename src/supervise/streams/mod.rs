//! The streams of a command that runs in the guest: its bytes, and the lines of its control stream.

mod control;
mod pump;
mod session;
mod stdio;

pub(super) use session::{AgentStreams, CommandTerminal, Ends, Session};
