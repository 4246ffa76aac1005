//! The guest's console on the user's terminal (or pipe, or file): output that loses no byte, input that waits for the
//! guest, and an eye on what is said.

mod input;
mod output;
mod terminal;
mod watch;

pub use input::Input;
pub use output::Output;
pub use terminal::{RawTerminal, terminal_size};
pub use watch::{Seen, Watch};
