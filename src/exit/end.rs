//! How a run ends, and the exit status that says so.

use super::signal::Signal;
use crate::escape::{GUEST_BYTES, escape};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::time::Duration;

/// The most that is shown of an error, in bytes.
const MAX_BYTES: usize = 4096;

/// Exit statuses of `hwvmm run`; also in its `--help`. A guest chooses an odd one by isa-debug-exit.
pub mod status {
    /// The guest shut down, `--expect` was seen, `hwvmm ctl SOCKET stop` ended the run, or it was saved (`--template`,
    /// `--snapshot-at`).
    pub const OK: u8 = 0;
    /// Another subcommand than `run` failed.
    pub const FAILURE: u8 = 1;
    /// The guest ended without the status of its command: it could not run it, or turned itself off before.
    pub const NO_COMMAND_STATUS: u8 = 41;
    /// hwvmm itself failed, such as at a file that cannot be read. An even number, so that no guest's isa-debug-exit has it: 1 is what
    /// a test of kvm-unit-tests ends with that passed.
    pub const ERROR: u8 = 42;
    /// The command line is wrong.
    pub const USAGE: u8 = 2;
    /// The guest reset itself.
    pub const RESET: u8 = 32;
    /// The guest made a triple fault.
    pub const TRIPLE_FAULT: u8 = 33;
    /// The guest kernel panicked.
    pub const PANIC: u8 = 34;
    /// Every vCPU is halted with interrupts off.
    pub const HALTED: u8 = 35;
    /// The guest's watchdog ran out.
    pub const WATCHDOG: u8 = 36;
    /// KVM gave up on the guest.
    pub const KVM: u8 = 37;
    /// The guest ended before `--expect` was seen, or the moment of `--snapshot-at` came.
    pub const NOT_SEEN: u8 = 38;
    /// The guest ended well, and made more exits than its budget allows.
    pub const OVER_BUDGET: u8 = 39;
    /// The machine's process crashed: a panic, an abort, a forbidden system call.
    pub const CRASHED: u8 = 40;
    /// The time of `--timeout` or of `--boot-timeout` passed.
    pub const TIMEOUT: u8 = 124;
    /// The user left with Ctrl-A x.
    pub const QUIT: u8 = 130;
}

/// How a guest's one command ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CommandEnd {
    /// It exited with this status.
    Exited(u8),
    /// A signal killed it: its number, from 1 to 64.
    Signaled(u8),
}

impl CommandEnd {
    /// The exit status that a shell gives for this end: 128 and the number for a signal.
    #[must_use]
    pub fn status(self) -> u8 {
        match self {
            Self::Exited(status) => status,
            Self::Signaled(signal) => signal.saturating_add(128),
        }
    }
}

impl fmt::Display for CommandEnd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exited(status) => write!(f, "exited with status {status}"),
            Self::Signaled(number) => {
                write!(f, "was ended by signal {number}")?;
                signal_hook::low_level::signal_name((*number).into()).map_or(Ok(()), |name| write!(f, ", {name}"))
            }
        }
    }
}

/// How the machine's process ended when it should not have.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Crash {
    /// The number of the signal that killed it (signal(7)).
    Signal(i32),
    /// Its sandbox ended it: what it tried.
    Refused(String),
    /// Its code panicked; the message was printed on stderr.
    Panicked,
    /// It exited with this status before its record was complete.
    Exited(i32),
}

impl fmt::Display for Crash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Signal(number) => {
                write!(f, "signal {number}")?;
                signal_hook::low_level::signal_name(*number).map_or(Ok(()), |name| write!(f, ", {name}"))
            }
            Self::Refused(what) => f.write_str(&escape(what, GUEST_BYTES)),
            Self::Panicked => f.write_str("a panic"),
            Self::Exited(status) => write!(f, "exit status {status}"),
        }
    }
}

/// The end of a run: its reason, and the vCPU that it happened on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunEnd {
    /// Why the run ended.
    pub reason: EndReason,
    /// Index of the vCPU whose exit ended the run; `None` for an end from outside, such as a timeout.
    pub vcpu: Option<usize>,
}

macro_rules! kinds {
    ($($kind:ident $name:literal $pattern:pat,)*) => {
        /// The kinds of [`EndReason`], as result files name them: for programs, which should not have to read the text of an end. By its
        /// status alone no end is known: a guest chooses the status of [`EndReason::DebugExit`].
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
        pub enum EndKind {
            $(
                #[doc = concat!("[`EndReason::", stringify!($kind), "`]")]
                #[serde(rename = $name)]
                $kind,
            )*
        }

        impl EndKind {
            /// Its name in result files.
            #[must_use]
            pub fn name(self) -> &'static str {
                match self {
                    $(Self::$kind => $name,)*
                }
            }
        }

        impl EndReason {
            /// The kind of this end.
            #[must_use]
            pub fn kind(&self) -> EndKind {
                match self {
                    $($pattern => EndKind::$kind,)*
                }
            }
        }
    };
}

kinds! {
    PowerOff "power-off" Self::PowerOff,
    SystemHalted "system-halted" Self::SystemHalted,
    Reset "reset" Self::Reset,
    TripleFault "triple-fault" Self::TripleFault,
    Panicked "panic" Self::Panicked(_),
    Halted "halted" Self::Halted,
    DebugExit "debug-exit" Self::DebugExit(_),
    Command "command" Self::Command(_),
    NoCommand "no-command" Self::NoCommand(_),
    NoCommandStatus "no-command-status" Self::NoCommandStatus(_),
    Watchdog "watchdog" Self::Watchdog,
    Kvm "kvm" Self::Kvm(_),
    Seen "seen" Self::Seen(_),
    NotSeen "not-seen" Self::NotSeen(_),
    TimedOut "timed-out" Self::TimedOut(_),
    NotBooted "not-booted" Self::NotBooted(_),
    Quit "quit" Self::Quit,
    Stopped "stopped" Self::Stopped,
    Saved "saved" Self::Saved,
    NotSaved "not-saved" Self::NotSaved(_),
    Signal "signal" Self::Signal(_),
    Unbootable "unbootable" Self::Unbootable(_),
    Failed "failed" Self::Failed(_),
    Crashed "crashed" Self::Crashed(_),
}

/// Why a run ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum EndReason {
    /// The guest turned itself off.
    PowerOff,
    /// The guest halted permanently after its kernel said that it would.
    SystemHalted,
    /// The guest reset itself.
    Reset,
    /// The guest's processor shut down.
    TripleFault,
    /// The guest panicked; what it said, where it said something.
    Panicked(Option<String>),
    /// Every started vCPU is halted with interrupts off.
    Halted,
    /// The guest chose the status (isa-debug-exit).
    DebugExit(u8),
    /// The guest's one command has ended.
    Command(CommandEnd),
    /// The guest could not run its one command: why, where it said so.
    NoCommand(Option<String>),
    /// The guest ended in an orderly way before its command had a status.
    NoCommandStatus(Box<EndReason>),
    /// The guest's watchdog ran out.
    Watchdog,
    /// KVM cannot go on: an exit that cannot be handled, with its data.
    Kvm(String),
    /// The text that `--expect` matched.
    Seen(String),
    /// The guest ended, cleanly, without `--expect`'s pattern.
    NotSeen(Box<EndReason>),
    /// The time of `--timeout` passed: its length.
    TimedOut(Duration),
    /// The guest had not booted when the time of `--boot-timeout` passed: its length.
    NotBooted(Duration),
    /// The user pressed Ctrl-A x.
    Quit,
    /// `hwvmm ctl SOCKET stop`.
    Stopped,
    /// The guest was saved: ready for a command (`--template`), or at the moment of `--snapshot-at`.
    Saved,
    /// The guest ended, cleanly, before the snapshot of `--snapshot-at` was made.
    NotSaved(Box<EndReason>),
    /// A signal to hwvmm.
    Signal(Signal),
    /// The kernel is none that can be booted so: why. The guest never ran.
    Unbootable(String),
    /// hwvmm itself cannot go on.
    Failed(String),
    /// The machine's process ended before it had sent its record.
    Crashed(Crash),
}

impl EndReason {
    /// The exit status of hwvmm for this end (see [`status`]).
    #[must_use]
    pub fn status(&self) -> u8 {
        match self {
            Self::PowerOff | Self::SystemHalted | Self::Seen(_) | Self::Stopped | Self::Saved => status::OK,
            Self::Reset => status::RESET,
            Self::TripleFault => status::TRIPLE_FAULT,
            Self::Panicked(_) => status::PANIC,
            Self::Halted => status::HALTED,
            Self::DebugExit(status) => *status,
            Self::Command(end) => end.status(),
            Self::NoCommand(_) | Self::NoCommandStatus(_) => status::NO_COMMAND_STATUS,
            Self::Watchdog => status::WATCHDOG,
            Self::Kvm(_) => status::KVM,
            Self::NotSeen(_) | Self::NotSaved(_) => status::NOT_SEEN,
            Self::TimedOut(_) | Self::NotBooted(_) => status::TIMEOUT,
            Self::Quit => status::QUIT,
            Self::Signal(signal) => 128 + signal.number(),
            Self::Unbootable(_) | Self::Failed(_) => status::ERROR,
            Self::Crashed(_) => status::CRASHED,
        }
    }

    /// Returns true if the guest or the user ended the run on purpose. The last exits are then not shown.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        match self {
            Self::PowerOff
            | Self::SystemHalted
            | Self::Reset
            | Self::DebugExit(_)
            | Self::Command(_)
            | Self::NoCommand(_)
            | Self::NoCommandStatus(_)
            | Self::Seen(_)
            | Self::Quit
            | Self::Stopped
            | Self::Saved
            | Self::Unbootable(_) => true,
            // SIGQUIT is how one asks a program for what it knows.
            Self::Signal(signal) => *signal != Signal::QUIT,
            Self::NotSeen(end) | Self::NotSaved(end) => end.is_clean(),
            Self::TripleFault
            | Self::Panicked(_)
            | Self::Halted
            | Self::Watchdog
            | Self::Kvm(_)
            | Self::TimedOut(_)
            | Self::NotBooted(_)
            | Self::Failed(_)
            | Self::Crashed(_) => false,
        }
    }

    /// The end of a run whose command has not told its status: a guest that ended in an orderly way did so before it.
    #[must_use]
    pub fn without_command_status(self) -> Self {
        match self {
            Self::PowerOff | Self::SystemHalted | Self::Reset => Self::NoCommandStatus(Box::new(self)),
            other => other,
        }
    }

    /// The end of a run whose output did not match `--expect`: a clean end becomes [`EndReason::NotSeen`].
    #[must_use]
    pub fn without_the_expected(self) -> Self {
        match self {
            Self::PowerOff | Self::SystemHalted | Self::Reset | Self::Stopped => Self::NotSeen(Box::new(self)),
            other => other,
        }
    }

    /// The end of a run that was to make a snapshot: a clean end without it becomes [`EndReason::NotSaved`].
    #[must_use]
    pub fn without_the_snapshot(self) -> Self {
        match self {
            Self::PowerOff | Self::SystemHalted | Self::Reset | Self::Stopped | Self::Seen(_) => {
                Self::NotSaved(Box::new(self))
            }
            other => other,
        }
    }
}

impl fmt::Display for EndReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PowerOff => f.write_str("the guest powered off"),
            Self::SystemHalted => f.write_str("the guest halted"),
            Self::Reset => f.write_str("the guest reset itself"),
            Self::TripleFault => f.write_str("triple fault: the guest's processor shut down"),
            Self::Panicked(None) => f.write_str("the guest panicked"),
            Self::Panicked(Some(words)) => write!(f, "the guest panicked: {}", escape(words, GUEST_BYTES)),
            Self::Halted => f.write_str("every vCPU is halted with interrupts off: nothing can wake the guest"),
            Self::Command(end) => write!(f, "the command {end}"),
            Self::NoCommand(None) => f.write_str("the guest could not run the command"),
            Self::NoCommand(Some(why)) => {
                write!(f, "the guest could not run the command: {}", escape(why, MAX_BYTES))
            }
            Self::NoCommandStatus(end) => write!(f, "{end}, and the command's status is not known"),
            Self::DebugExit(status) => write!(f, "the guest ended the run with status {status}"),
            Self::Watchdog => f.write_str("the guest's watchdog ran out"),
            Self::Kvm(what) => write!(f, "KVM cannot run the guest further: {}", escape(what, MAX_BYTES)),
            Self::Seen(what) => write!(f, "seen: {}", escape(what, GUEST_BYTES)),
            Self::NotSeen(end) => write!(f, "{end}, and --expect was not seen"),
            Self::TimedOut(after) => write!(f, "timed out after {} s", after.as_secs_f64()),
            Self::NotBooted(after) => write!(f, "the guest had not booted after {} s", after.as_secs_f64()),
            Self::Quit => f.write_str("ended by the user"),
            Self::Stopped => f.write_str("stopped through the control socket"),
            Self::Saved => f.write_str("the guest was saved"),
            Self::NotSaved(end) => write!(f, "{end}, and was not saved"),
            Self::Signal(signal) => write!(f, "ended by {signal}"),
            Self::Unbootable(what) | Self::Failed(what) => f.write_str(&escape(what, MAX_BYTES)),
            Self::Crashed(Crash::Refused(what)) => {
                write!(
                    f,
                    "the sandbox ended the machine's process: {}; the guest has taken it over, or this is a bug in hwvmm",
                    escape(what, GUEST_BYTES)
                )
            }
            Self::Crashed(crash) => write!(f, "the machine's process crashed ({crash}): this is a bug in hwvmm"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;

    #[test]
    fn statuses_tell_ends_apart() {
        let ends = [
            EndReason::PowerOff,
            EndReason::Reset,
            EndReason::TripleFault,
            EndReason::Panicked(None),
            EndReason::Halted,
            EndReason::NoCommand(None),
            EndReason::Watchdog,
            EndReason::Kvm(String::new()),
            EndReason::NotSeen(Box::new(EndReason::PowerOff)),
            EndReason::TimedOut(Duration::from_secs(1)),
            EndReason::Quit,
            EndReason::Failed(String::new()),
            EndReason::Crashed(Crash::Panicked),
        ];
        let by_status: HashMap<u8, &EndReason> = ends.iter().map(|end| (end.status(), end)).collect();
        assert_eq!(by_status.len(), ends.len());
    }

    #[test]
    fn no_test_ends_with_the_status_of_a_failure_of_hwvmm() {
        let chosen = (0..=u8::MAX).map(|value| EndReason::DebugExit(value << 1 | 1).status());
        let failures = [status::ERROR, status::USAGE, status::CRASHED];
        assert!(chosen.into_iter().all(|status| !failures.contains(&status)));
    }

    #[test]
    fn ends_of_a_command_have_the_status_of_a_shell() {
        assert_eq!(EndReason::Command(CommandEnd::Exited(126)).status(), 126);
        assert_eq!(EndReason::Command(CommandEnd::Signaled(9)).status(), 137);
        assert_eq!(
            EndReason::Command(CommandEnd::Signaled(9)).to_string(),
            "the command was ended by signal 9, SIGKILL"
        );
        assert_eq!(EndReason::PowerOff.without_command_status().status(), status::NO_COMMAND_STATUS);
        assert_eq!(EndReason::Panicked(None).without_command_status(), EndReason::Panicked(None));
    }

    #[test]
    fn a_stop_that_was_asked_for_is_no_failure() {
        assert_eq!(EndReason::Stopped.status(), status::OK);
        assert!(EndReason::Stopped.is_clean());
        assert_eq!(EndReason::Stopped.without_the_expected().status(), status::NOT_SEEN);
    }

    #[test]
    fn a_panic_stays_a_panic_without_the_expected() {
        assert_eq!(EndReason::Panicked(None).without_the_expected(), EndReason::Panicked(None));
        assert_eq!(EndReason::PowerOff.without_the_expected().status(), status::NOT_SEEN);
    }
}
