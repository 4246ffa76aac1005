//! What subcommands print, and the exit status of a failure.

use crate::console::fresh_line;
use crate::error::chain;
use crate::exit::end::status;
use std::error::Error;
use std::io::{self, Write};
use std::process::ExitCode;

/// Prints a line of hwvmm's own on stderr, at the beginning of a line. A stderr that takes nothing is no error.
pub(super) fn say(text: &str) {
    let _ = writeln!(io::stderr(), "{}hwvmm: {text}", fresh_line());
}

/// Prints an error with its sources. Returns the exit status of a failure.
pub(super) fn fail(error: &dyn Error) -> ExitCode {
    say(&chain(error));
    ExitCode::from(status::ERROR)
}

/// Prints on stdout. A reader that has seen enough is no error.
pub(super) fn print_all(bytes: &[u8]) -> ExitCode {
    match io::stdout().write_all(bytes).and_then(|()| io::stdout().flush()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => ExitCode::SUCCESS,
        Err(error) => fail(&error),
    }
}
