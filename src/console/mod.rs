//! Consoles on the user's terminal, pipe or file: output that loses no byte, input no faster than the guest takes it, and
//! the lines that end a run.

mod input;
mod line;
mod output;
mod terminal;
mod watch;

pub use input::{Input, Keys};
pub use line::fresh_line;
pub use output::{Output, Sink};
pub use terminal::{RawTerminal, terminal_size};
pub use watch::{Announcements, Watch};
