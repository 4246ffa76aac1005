//! The lines that the agent in the guest sends on the control stream. The guest is hostile: they are bounded, and checked one by one.

use crate::exit::CommandEnd;
use thiserror::Error;

/// The longest line in bytes, without its newline: `failed`, a stage, and a text of at most 1 KiB.
const MAX_LINE_BYTES: usize = 1100;
/// The longest name of a stage in bytes.
const MAX_STAGE_BYTES: usize = 32;
/// How many bytes of a wrong line are shown.
const SHOWN_BYTES: usize = 80;

/// A line of the agent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Said {
    /// The guest waits for a command.
    Ready,
    /// The command is about to be executed.
    Started,
    /// The agent cannot go on.
    Failed {
        /// What it was doing: lower-case letters and `-`.
        stage: String,
        /// Why, in printable ASCII.
        text: String,
    },
    /// The command has ended, and its output was read.
    Ended(CommandEnd),
}

/// The guest sent on the control stream what no agent sends. Nothing after it is looked at.
#[derive(Debug, Error, PartialEq, Eq)]
pub(super) enum ControlError {
    /// A line has no end within the longest that there are.
    #[error("the guest sent a control line of more than {MAX_LINE_BYTES} bytes")]
    TooLong,
    /// A line is none of the agent's.
    #[error("the guest sent the control line '{0}', which is unknown")]
    Unknown(String),
    /// A line came where it has no place, such as an end before the start.
    #[error("the guest sent the control line '{0}' out of its order")]
    OutOfOrder(String),
}

/// What the agent is for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(in crate::supervise) enum AgentTask {
    /// It runs a command.
    #[default]
    Run,
    /// It gets ready for the command of another run.
    Wait,
}

/// How far the agent has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Nothing was said yet by an agent that runs a command.
    Preparing,
    /// Nothing was said yet by one that waits.
    Booting,
    Waiting,
    Running,
    Done,
}

/// Reads control lines out of bytes as they come.
#[derive(Debug)]
pub(super) struct ControlLines {
    /// The line that has no end yet: at most [`MAX_LINE_BYTES`] bytes.
    partial: Vec<u8>,
    phase: Phase,
}

impl ControlLines {
    /// Lines of an agent with this task.
    pub(super) fn of(task: AgentTask) -> Self {
        let phase = match task {
            AgentTask::Run => Phase::Preparing,
            AgentTask::Wait => Phase::Booting,
        };
        Self { partial: Vec::new(), phase }
    }

    /// Takes `bytes`, and returns the lines that end in them: two at most over the whole stream.
    ///
    /// # Errors
    /// [`ControlError`] at the first line that is wrong. The stream is not to be read any more.
    pub(super) fn take(&mut self, bytes: &[u8]) -> Result<Vec<Said>, ControlError> {
        let mut said = Vec::new();
        for part in bytes.split_inclusive(|&byte| byte == b'\n') {
            let (text, ended) = part.strip_suffix(b"\n").map_or((part, false), |text| (text, true));
            if self.partial.len() + text.len() > MAX_LINE_BYTES {
                return Err(ControlError::TooLong);
            }
            self.partial.extend_from_slice(text);
            if ended {
                let line = std::mem::take(&mut self.partial);
                said.push(self.line(&line)?);
            }
        }
        Ok(said)
    }

    /// Takes one line, and checks that it has its place here.
    fn line(&mut self, line: &[u8]) -> Result<Said, ControlError> {
        let shown = || line[..line.len().min(SHOWN_BYTES)].escape_ascii().to_string();
        let said = parse(line).ok_or_else(|| ControlError::Unknown(shown()))?;
        self.phase = match (self.phase, &said) {
            (Phase::Preparing, Said::Started) => Phase::Running,
            (Phase::Booting, Said::Ready) => Phase::Waiting,
            (Phase::Preparing | Phase::Booting | Phase::Waiting | Phase::Running, Said::Failed { .. })
            | (Phase::Running, Said::Ended(_)) => Phase::Done,
            _ => return Err(ControlError::OutOfOrder(shown())),
        };
        Ok(said)
    }
}

fn parse(line: &[u8]) -> Option<Said> {
    let line = std::str::from_utf8(line).ok()?;
    let (word, rest) = line.split_once(' ').unwrap_or((line, ""));
    match word {
        "ready" if line == "ready" => Some(Said::Ready),
        "started" if line == "started" => Some(Said::Started),
        "exited" => Some(Said::Ended(CommandEnd::Exited(number(rest)?))),
        "signaled" => match number(rest)? {
            signal @ 1..=64 => Some(Said::Ended(CommandEnd::Signaled(signal))),
            _ => None,
        },
        "failed" => {
            let (stage, text) = rest.split_once(' ')?;
            let named = (1..=MAX_STAGE_BYTES).contains(&stage.len())
                && stage.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'-');
            let printable = text.bytes().all(|byte| byte == b' ' || byte.is_ascii_graphic());
            (named && printable).then(|| Said::Failed { stage: stage.to_owned(), text: text.to_owned() })
        }
        _ => None,
    }
}

/// Reads a number of digits alone: `parse` takes a sign too.
fn number(text: &str) -> Option<u8> {
    text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok())?
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn take(bytes: &[u8]) -> Result<Vec<Said>, ControlError> {
        ControlLines::of(AgentTask::Run).take(bytes)
    }

    #[test]
    fn an_agent_that_waits_says_that_it_is_ready() {
        let waiting = |bytes: &[u8]| ControlLines::of(AgentTask::Wait).take(bytes);
        assert_eq!(waiting(b"ready\n"), Ok(vec![Said::Ready]));
        assert_eq!(waiting(b"ready\nfailed root gone\n").expect("valid").len(), 2);
        for bad in ["started\n", "ready\nready\n", "ready\nstarted\n", "exited 0\n", "failed a b\nready\n"] {
            assert!(matches!(waiting(bad.as_bytes()), Err(ControlError::OutOfOrder(_))), "{bad:?}");
        }
        assert!(matches!(waiting(b"ready \n"), Err(ControlError::Unknown(_))));
        assert!(matches!(take(b"ready\n"), Err(ControlError::OutOfOrder(_))), "a command was given");
    }

    #[test]
    fn lines_may_come_byte_by_byte() {
        let whole = b"started\nexited 7\n";
        let expected = vec![Said::Started, Said::Ended(CommandEnd::Exited(7))];
        assert_eq!(take(whole), Ok(expected.clone()));
        let mut lines = ControlLines::of(AgentTask::Run);
        let said: Vec<Said> = whole.iter().flat_map(|byte| lines.take(&[*byte]).expect("valid")).collect();
        assert_eq!(said, expected);
    }

    #[test]
    fn ends_have_the_status_of_a_shell() {
        assert_eq!(CommandEnd::Exited(126).status(), 126);
        assert_eq!(CommandEnd::Signaled(9).status(), 137);
        assert_eq!(take(b"started\nsignaled 15\n").expect("valid")[1], Said::Ended(CommandEnd::Signaled(15)));
    }

    #[test]
    fn a_failure_has_a_stage_and_a_text() {
        let failed = Said::Failed { stage: "root".into(), text: "no \\x0a folder".into() };
        assert_eq!(take(b"failed root no \\x0a folder\n"), Ok(vec![failed.clone()]));
        assert_eq!(take(b"started\nfailed root no \\x0a folder\n").expect("valid")[1], failed);
    }

    #[test]
    fn what_no_agent_sends_is_refused() {
        for bad in [
            "",
            "started ",
            " started",
            "exited",
            "exited ",
            "exited +1",
            "exited 256",
            "exited -1",
            "exited 1 ",
            "exited 1\r",
            "signaled 0",
            "signaled 65",
            "failed",
            "failed root",
            "failed Root x",
            "failed  x",
            "failed root \u{1b}[2J",
            "failed root \u{e4}",
            "ended 1",
        ] {
            let sent = format!("{bad}\n");
            assert!(matches!(take(sent.as_bytes()), Err(ControlError::Unknown(_))), "{bad:?}");
        }
        assert!(matches!(take(b"\xff\n"), Err(ControlError::Unknown(_))));
    }

    #[test]
    fn lines_out_of_their_order_are_refused() {
        for bad in ["exited 1\n", "started\nstarted\n", "started\nexited 1\nexited 0\n", "failed a b\nstarted\n"] {
            assert!(matches!(take(bad.as_bytes()), Err(ControlError::OutOfOrder(_))), "{bad:?}");
        }
    }

    #[test]
    fn a_line_without_an_end_is_bounded() {
        let mut lines = ControlLines::of(AgentTask::Run);
        assert_eq!(lines.take(&[b'a'; MAX_LINE_BYTES]), Ok(Vec::new()));
        assert_eq!(lines.take(b"a"), Err(ControlError::TooLong));
        assert!(lines.partial.len() <= MAX_LINE_BYTES);
        let longest = format!("failed instructions {}\n", "x".repeat(1024));
        assert!(take(longest.as_bytes()).is_ok());
    }

    proptest! {
        #[test]
        fn no_bytes_panic_or_say_more_than_two_things(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            if let Ok(said) = take(&bytes) {
                prop_assert!(said.len() <= 2);
            }
        }
    }
}
