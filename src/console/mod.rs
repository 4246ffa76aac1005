//! Consoles on the user's terminal, pipe or file: output that loses no byte, input no faster than the guest takes it, and
//! the lines that end a run.

mod input;
mod line;
mod lines;
mod output;
mod pattern;
mod terminal;
mod watch;

pub use input::{Input, Keys, Unread, UnreadInput};
pub use line::{LineState, fresh_line, line_state, set_line_state};
pub use lines::{Extent, Line, Lines, without_prefix};
pub use output::{Output, Sink};
pub use terminal::{RawTerminal, StreamFlags, discard_input, leave_terminal_to_parent, terminal_size};
pub use watch::{Announcements, Fed, Look, QUIET, Watch, Writing};
