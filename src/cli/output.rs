//! What subcommands print, and the exit status of a failure. The room `logging` writes to stderr.

use crate::error::chain;
use crate::escape::{escape_json, escape_text};
use crate::exit::end::status;
use serde::Serialize;
use std::error::Error;
use std::io::{self, Write};
use std::process::ExitCode;

pub(super) use crate::logging::{print as print_stderr, say};

/// Prints an error with its sources. Returns the exit status of a failure, which that of `run` replaces.
pub(super) fn fail(error: &dyn Error) -> ExitCode {
    say(&chain(error));
    ExitCode::from(status::FAILURE)
}

/// Prints text on stdout, without control characters: parts of it come from the host's other users, from a guest, or
/// from a file.
pub(super) fn print_text(text: &str) -> ExitCode {
    print_all(escape_text(text).as_bytes())
}

/// As [`print_text`], for a subcommand whose exit status 1 means something else.
pub(super) fn try_print_text(text: &str) -> io::Result<()> {
    try_print_all(escape_text(text).as_bytes())
}

/// Prints JSON on stdout, on one line. Control characters are JSON's escapes.
pub(super) fn print_json(value: &impl Serialize) -> ExitCode {
    match serde_json::to_string(value) {
        Ok(json) => print_all(format!("{}\n", escape_json(&json)).as_bytes()),
        Err(error) => fail(&error),
    }
}

/// Prints bytes on stdout as they are. A reader that has seen enough is no error.
pub(super) fn print_all(bytes: &[u8]) -> ExitCode {
    match try_print_all(bytes) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(&error),
    }
}

fn try_print_all(bytes: &[u8]) -> io::Result<()> {
    match io::stdout().write_all(bytes).and_then(|()| io::stdout().flush()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        printed => printed,
    }
}
