//! The signals that end a run.

use serde::{Deserialize, Serialize};
use std::fmt;

/// The number of glibc's SIGRTMIN, the first real-time signal that is not the C library's own, and that of the last one.
const REAL_TIME: std::ops::RangeInclusive<u8> = 34..=64;

/// The other signals that end a run, by number (signal(7), x86).
///
/// These, and the real-time signals, are all of those whose default action ends a process, but for
///
/// | Signal | What happens |
/// |---|---|
/// | SIGKILL | cannot be caught |
/// | SIGILL, SIGTRAP, SIGABRT, SIGBUS, SIGFPE, SIGSEGV, SIGSYS | hwvmm's own code is at fault: nothing can go on |
/// | SIGXCPU | the user's limit of CPU time (RLIMIT_CPU): the default action, in both processes |
/// | SIGXFSZ | does nothing, so that the write fails with EFBIG |
/// | SIGPIPE | ignored by Rust's runtime: the write fails with EPIPE |
/// | 32, 33 | the C library's own: sigaction(3) refuses them |
const NAMED: [(u8, &str); 12] = [
    (1, "SIGHUP"),
    (2, "SIGINT"),
    (3, "SIGQUIT"),
    (10, "SIGUSR1"),
    (12, "SIGUSR2"),
    (14, "SIGALRM"),
    (15, "SIGTERM"),
    (16, "SIGSTKFLT"),
    (26, "SIGVTALRM"),
    (27, "SIGPROF"),
    (29, "SIGIO"),
    (30, "SIGPWR"),
];

/// A signal that ends a run, so that the terminal is restored and the results are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "u8", into = "u8")]
pub struct Signal(u8);

impl Signal {
    /// SIGHUP: the terminal is gone.
    pub const HUP: Self = Self(1);
    /// SIGINT, which Ctrl-C sends.
    pub const INT: Self = Self(2);
    /// SIGQUIT: prints the flight recorder as well.
    pub const QUIT: Self = Self(3);
    /// SIGTERM: the default of kill(1).
    pub const TERM: Self = Self(15);

    /// All signals that end a run.
    pub fn all() -> impl Iterator<Item = Self> {
        NAMED.iter().map(|(number, _)| *number).chain(REAL_TIME).map(Self)
    }

    /// Number of the signal (signal(7), x86).
    #[must_use]
    pub fn number(self) -> u8 {
        self.0
    }

    /// Returns true for the signals by which a terminal or another program ends a program: SIGHUP, SIGINT, SIGQUIT and SIGTERM.
    #[must_use]
    pub fn is_request(self) -> bool {
        [Self::HUP, Self::INT, Self::QUIT, Self::TERM].contains(&self)
    }
}

impl From<Signal> for u8 {
    fn from(signal: Signal) -> Self {
        signal.0
    }
}

/// The number is not that of a signal that ends a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("signal {0} does not end a run")]
pub struct NotEnding(u8);

impl TryFrom<u8> for Signal {
    type Error = NotEnding;

    fn try_from(number: u8) -> Result<Self, NotEnding> {
        Self::all().find(|signal| signal.0 == number).ok_or(NotEnding(number))
    }
}

impl fmt::Display for Signal {
    /// Writes "SIGTERM", for example, or "real-time signal 40".
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match NAMED.iter().find(|(number, _)| *number == self.0) {
            Some((_, name)) => f.write_str(name),
            None => write!(f, "real-time signal {}", self.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_have_the_numbers_of_the_c_library() {
        for (number, name) in [
            (libc::SIGHUP, "SIGHUP"),
            (libc::SIGUSR1, "SIGUSR1"),
            (libc::SIGUSR2, "SIGUSR2"),
            (libc::SIGALRM, "SIGALRM"),
            (libc::SIGTERM, "SIGTERM"),
            (libc::SIGSTKFLT, "SIGSTKFLT"),
            (libc::SIGVTALRM, "SIGVTALRM"),
            (libc::SIGPROF, "SIGPROF"),
            (libc::SIGIO, "SIGIO"),
            (libc::SIGPWR, "SIGPWR"),
            (libc::SIGRTMIN(), "real-time signal 34"),
            (libc::SIGRTMAX(), "real-time signal 64"),
        ] {
            let signal = Signal::try_from(u8::try_from(number).expect("small")).expect("it ends a run");
            assert_eq!(signal.to_string(), name);
        }
        let requests: Vec<u8> = Signal::all().filter(|signal| signal.is_request()).map(Signal::number).collect();
        assert_eq!(requests, [1, 2, 3, 15]);
    }

    #[test]
    fn other_numbers_are_refused() {
        for number in ["0", "9", "11", "17", "65", "200"] {
            assert!(serde_json::from_str::<Signal>(number).is_err(), "{number}");
        }
        assert_eq!(serde_json::from_str::<Signal>("29").expect("SIGIO").number(), 29);
    }
}
