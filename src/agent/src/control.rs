//! Lines of the control stream.

use crate::instructions::Window;
use std::fmt;

/// The longest line that the host sends, in bytes.
const LINE_BYTES: usize = 128;
/// The longest text of a failure, in bytes.
const TEXT_BYTES: usize = 1024;
/// SIGHUP, SIGINT and SIGTERM: those that the host may send.
const SIGNALS: [i32; 3] = [1, 2, 15];

/// What the host tells the agent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FromHost {
    /// The terminal has another size.
    Window(Window),
    /// The command's process group is to get this signal.
    Signal(i32),
}

impl FromHost {
    /// Reads a line without its end. Lines that the agent does not know are `None`: a newer host may send them.
    fn parse(line: &str) -> Option<Self> {
        let mut words = line.split_ascii_whitespace();
        let read = match words.next()? {
            "window" => {
                Self::Window(Window { rows: words.next()?.parse().ok()?, columns: words.next()?.parse().ok()? })
            }
            "signal" => Self::Signal(words.next()?.parse().ok().filter(|number| SIGNALS.contains(number))?),
            _ => return None,
        };
        words.next().is_none().then_some(read)
    }
}

/// Takes the bytes of the control stream apart, in whatever pieces they come.
#[derive(Debug, Default)]
pub(crate) struct Lines {
    line: Vec<u8>,
}

impl Lines {
    /// The messages that end within `bytes`. Of a line that is too long the rest is dropped, and it means nothing.
    pub(crate) fn push(&mut self, bytes: &[u8]) -> Vec<FromHost> {
        let mut messages = Vec::new();
        for byte in bytes {
            if *byte != b'\n' {
                if self.line.len() <= LINE_BYTES {
                    self.line.push(*byte);
                }
                continue;
            }
            if self.line.len() <= LINE_BYTES {
                messages.extend(std::str::from_utf8(&self.line).ok().and_then(FromHost::parse));
            }
            self.line.clear();
        }
        messages
    }
}

/// How a run ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// The command exited with this status.
    Exited(u8),
    /// A signal ended the command.
    Signaled(u8),
    /// The agent could not run the command.
    Failed,
}

/// What the agent tells the host.
#[derive(Debug)]
pub(crate) enum ToHost<'a> {
    /// The guest waits for its command.
    Ready,
    /// The command is about to be executed.
    Started,
    /// The agent cannot go on.
    Failed { stage: &'static str, text: &'a str },
    /// The command ended.
    Ended(End),
}

impl fmt::Display for ToHost<'_> {
    /// With the line's end.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ready => f.write_str("ready\n"),
            Self::Started => f.write_str("started\n"),
            Self::Failed { stage, text } => writeln!(f, "failed {stage} {}", printable(text)),
            Self::Ended(End::Exited(status)) => writeln!(f, "exited {status}"),
            Self::Ended(End::Signaled(signal)) => writeln!(f, "signaled {signal}"),
            Self::Ended(End::Failed) => Ok(()),
        }
    }
}

/// `text` in printable ASCII, of at most [`TEXT_BYTES`].
pub(crate) fn printable(text: &str) -> String {
    let mut out = String::new();
    for byte in text.bytes() {
        let piece = match byte {
            b' '..=b'~' if byte != b'\\' => char::from(byte).to_string(),
            _ => format!("\\x{byte:02x}"),
        };
        if out.len() + piece.len() > TEXT_BYTES {
            break;
        }
        out.push_str(&piece);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_do_not_depend_on_pieces() {
        let bytes = b"window 24 80\nsignal 2\nsignal 9\nsignal x\nwindow 1\nwindow 1 2 3\nwindow 70000 1\n\nnew line\nsignal 15\nsig";
        let expected = [FromHost::Window(Window { rows: 24, columns: 80 }), FromHost::Signal(2), FromHost::Signal(15)];
        for size in 1..=bytes.len() {
            let mut lines = Lines::default();
            let read: Vec<_> = bytes.chunks(size).flat_map(|piece| lines.push(piece)).collect();
            assert_eq!(read, expected, "pieces of {size}");
        }
    }

    #[test]
    fn a_long_line_takes_no_memory() {
        let mut lines = Lines::default();
        assert!(lines.push(&[b'a'; 100_000]).is_empty());
        assert!(lines.line.len() <= LINE_BYTES + 1);
        assert_eq!(lines.push(b"\nsignal 1\n"), [FromHost::Signal(1)]);
    }

    #[test]
    fn messages_are_one_printable_line() {
        assert_eq!(ToHost::Ended(End::Exited(7)).to_string(), "exited 7\n");
        assert_eq!(ToHost::Ended(End::Signaled(9)).to_string(), "signaled 9\n");
        let failed = ToHost::Failed { stage: "root", text: "a\nb\\\u{e4}" }.to_string();
        assert_eq!(failed, "failed root a\\x0ab\\x5c\\xc3\\xa4\n");
        assert!(printable(&"\n".repeat(5000)).len() <= TEXT_BYTES);
    }
}
