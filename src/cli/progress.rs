//! The line on a terminal that says how far a suite is: `12/40, 3 running: boot[cpus=2], net, ...`.

use crate::escape::escape;
use std::io;

/// Columns of a terminal that does not say how many it has.
const COLUMNS: u16 = 80;
/// Bytes of a test's name in the line.
const NAME_BYTES: usize = 60;
/// To the first column, and clear the line (ECMA-48, CR and EL).
pub(super) const CLEAR: &str = "\r\x1b[K";

/// How far a suite is.
pub(super) struct Progress {
    tests: usize,
    ended: usize,
    /// The names of the tests that run, in the order in which they were started.
    running: Vec<String>,
}

impl Progress {
    /// None of `tests` tests has been started.
    pub(super) fn new(tests: usize) -> Self {
        Self { tests, ended: 0, running: Vec::new() }
    }

    /// The test of this name was started.
    pub(super) fn start(&mut self, name: &str) {
        self.running.push(name.to_owned());
    }

    /// It has ended.
    pub(super) fn end(&mut self, name: &str) {
        self.ended += 1;
        if let Some(place) = self.running.iter().position(|running| running == name) {
            self.running.remove(place);
        }
    }

    /// The line, cut off where a terminal of so many columns would break it.
    pub(super) fn line(&self, columns: u16) -> String {
        let mut text = format!("{}/{}", self.ended, self.tests);
        if !self.running.is_empty() {
            let names = self.running.iter().map(|name| escape(name, NAME_BYTES));
            text += &format!(", {} running: {}", self.running.len(), names.collect::<Vec<_>>().join(", "));
        }
        // The cursor stands in the last column.
        let room = usize::from(columns).saturating_sub(1);
        if text.chars().count() <= room {
            return text;
        }
        text.chars().take(room.saturating_sub(3)).chain("...".chars()).take(room).collect()
    }
}

/// The number of columns of the terminal on stdout.
pub(super) fn columns() -> u16 {
    let size = rustix::termios::tcgetwinsize(io::stdout());
    size.map(|size| size.ws_col).ok().filter(|columns| *columns > 0).unwrap_or(COLUMNS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_has_what_runs_and_fits() {
        let mut progress = Progress::new(40);
        assert_eq!(progress.line(80), "0/40");
        progress.start("boot[cpus=2]");
        progress.start("a\x1b[2J");
        assert_eq!(progress.line(80), "0/40, 2 running: boot[cpus=2], a\\x1b[2J");
        progress.end("boot[cpus=2]");
        assert_eq!(progress.line(80), "1/40, 1 running: a\\x1b[2J");
        assert_eq!(progress.line(17), "1/40, 1 runni...");
        for columns in 0..30 {
            assert!(progress.line(columns).chars().count() <= usize::from(columns.saturating_sub(1)));
        }
    }
}
