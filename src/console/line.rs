//! Lines of hwvmm's own among a guest's output: they start at the beginning of a line.

use rustix::stdio::{stderr, stdout};
use serde::{Deserialize, Serialize};
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, Ordering};

/// True while the last byte that a console has written to stdout is no newline. One for the process, as stdout is.
static MID_LINE: AtomicBool = AtomicBool::new(false);

/// Records what a console has written to stdout.
pub(super) fn written(bytes: &[u8]) {
    if let Some(last) = bytes.last() {
        MID_LINE.store(*last != b'\n', Ordering::Relaxed);
    }
}

/// Where a console's output has left stdout.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum LineState {
    /// At the beginning of a line.
    Start,
    /// In the middle of a line.
    Middle,
}

/// Returns where the consoles of this process have left stdout.
#[must_use]
pub fn line_state() -> LineState {
    if MID_LINE.load(Ordering::Relaxed) { LineState::Middle } else { LineState::Start }
}

/// Records where another process has left stdout.
pub fn set_line_state(state: LineState) {
    MID_LINE.store(state == LineState::Middle, Ordering::Relaxed);
}

fn is_same_file(a: BorrowedFd<'_>, b: BorrowedFd<'_>) -> bool {
    match (rustix::fs::fstat(a), rustix::fs::fstat(b)) {
        (Ok(a), Ok(b)) => (a.st_dev, a.st_ino) == (b.st_dev, b.st_ino),
        _ => false,
    }
}

/// Returns what to print on stderr before a line of hwvmm's own: a newline where stderr is the same terminal, pipe or file
/// as stdout and a console has left it in the middle of a line, otherwise nothing. The newline is returned once.
#[must_use]
pub fn fresh_line() -> &'static str {
    let mid_line = MID_LINE.load(Ordering::Relaxed) && is_same_file(stdout(), stderr());
    if mid_line && MID_LINE.swap(false, Ordering::Relaxed) { "\n" } else { "" }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn pipes_are_told_apart() {
        let (a, b) = (std::io::pipe().expect("a pipe").1, std::io::pipe().expect("a pipe").1);
        let copy = a.try_clone().expect("a copy");
        assert!(is_same_file(a.as_fd(), copy.as_fd()) && !is_same_file(a.as_fd(), b.as_fd()));
    }
}
