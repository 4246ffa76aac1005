//! The message with a command that comes on the control stream: the line `command LENGTH`, and as many bytes of records behind it, which are
//! those of the instructions.

use crate::instructions::{CommandSpec, InstructionsError};
use thiserror::Error;

/// The most bytes of records: as many as the host sends.
pub(crate) const MAX_BYTES: usize = 2 << 20;
/// What the line begins with.
const WORD: &[u8] = b"command ";
/// The most digits of a length.
const MAX_DIGITS: usize = 7;

/// The host has sent what is no command.
#[derive(Debug, Error, PartialEq, Eq)]
pub(crate) enum MessageError {
    #[error("the line {0:?} is not \"command LENGTH\"")]
    Line(String),
    #[error("a command of {0} bytes is more than {MAX_BYTES}")]
    TooLong(usize),
    #[error(transparent)]
    Records(#[from] InstructionsError),
}

/// A message that comes in whatever pieces.
#[derive(Debug, Default)]
pub(crate) struct CommandMessage {
    /// The line without its end while there is no length, then the records.
    bytes: Vec<u8>,
    length: Option<usize>,
}

impl CommandMessage {
    /// How many of the bytes that come next may be given to [`Self::push`]: what is behind the message is none of it.
    pub(crate) fn wanted(&self) -> usize {
        self.length.map_or(1, |length| length.saturating_sub(self.bytes.len()))
    }

    /// Takes at most [`Self::wanted`] bytes. Returns the command once it is whole.
    ///
    /// # Errors
    /// [`MessageError`]. The message is not to be gone on with.
    pub(crate) fn push(&mut self, bytes: &[u8]) -> Result<Option<CommandSpec>, MessageError> {
        for byte in bytes.iter().take(self.wanted()) {
            match self.length {
                Some(_) => self.bytes.push(*byte),
                None if *byte == b'\n' => self.line()?,
                None if self.bytes.len() >= WORD.len() + MAX_DIGITS => return Err(self.no_line()),
                None => self.bytes.push(*byte),
            }
        }
        match self.length {
            Some(length) if length == self.bytes.len() => Ok(Some(CommandSpec::parse(&self.bytes)?)),
            _ => Ok(None),
        }
    }

    fn no_line(&self) -> MessageError {
        MessageError::Line(self.bytes.escape_ascii().to_string())
    }

    fn line(&mut self) -> Result<(), MessageError> {
        let digits = self.bytes.strip_prefix(WORD).filter(|digits| digits.iter().all(u8::is_ascii_digit));
        let length = digits.and_then(|digits| std::str::from_utf8(digits).ok()?.parse().ok());
        let length = length.ok_or_else(|| self.no_line())?;
        if length > MAX_BYTES {
            return Err(MessageError::TooLong(length));
        }
        self.length = Some(length);
        self.bytes.clear();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn whole(records: &[u8]) -> Vec<u8> {
        [format!("command {}\n", records.len()).as_bytes(), records].concat()
    }

    #[test]
    fn a_command_does_not_depend_on_pieces_and_leaves_what_follows() {
        let bytes = [&whole(b"arg=sh\0arg=\n\0workdir=/tmp\0")[..], b"signal 2\n"].concat();
        for size in 1..=bytes.len() {
            let (mut message, mut rest) = (CommandMessage::default(), &bytes[..]);
            let spec = loop {
                let (piece, behind) = rest.split_at(size.min(message.wanted()));
                rest = behind;
                if let Some(spec) = message.push(piece).expect("valid") {
                    break spec;
                }
            };
            assert_eq!((spec.command, rest), (vec!["sh".into(), "\n".into()], &b"signal 2\n"[..]), "pieces of {size}");
        }
    }

    #[test]
    fn what_is_no_command_is_refused() {
        let push = |bytes: &[u8]| {
            let mut message = CommandMessage::default();
            let mut rest = bytes;
            while !rest.is_empty() {
                let (piece, behind) = rest.split_at(message.wanted().clamp(1, rest.len()));
                rest = behind;
                message.push(piece)?;
            }
            Ok::<_, MessageError>(message)
        };
        for line in [
            "\n",
            "command\n",
            "command \n",
            "command +1\n",
            "command 1 \n",
            "Command 1\n",
            "window 24 80\n",
            "a line that is too long",
        ] {
            assert!(matches!(push(line.as_bytes()), Err(MessageError::Line(_))), "{line:?}");
        }
        assert!(matches!(push(b"command 12345678\n"), Err(MessageError::Line(_))));
        assert_eq!(push(b"command 2097153\n").err(), Some(MessageError::TooLong(MAX_BYTES + 1)));
        assert_eq!(push(b"command 0\n").err(), Some(MessageError::Records(InstructionsError::NoCommand)));
        for records in [&b"arg=a"[..], b"arg\0", b"module=a.ko\0arg=a\0", b"user=0:0\0"] {
            assert!(matches!(push(&whole(records)), Err(MessageError::Records(_))), "{records:?}");
        }
        let cut = push(&whole(b"arg=a\0")[..12]).expect("the rest may come");
        assert_eq!(cut.wanted(), 4);
    }

    /// What libFuzzer starts from (tests/fuzz), and small changes of it: pieces make no difference, and nothing panics.
    #[test]
    fn messages_of_the_corpus_are_commands_or_errors() {
        let read = |bytes: &[u8], size: usize| {
            let (mut message, mut rest) = (CommandMessage::default(), bytes);
            while !rest.is_empty() {
                let (piece, behind) = rest.split_at(size.min(message.wanted()).clamp(1, rest.len()));
                rest = behind;
                if let Some(spec) = message.push(piece)? {
                    return Ok::<_, MessageError>(Some(spec));
                }
            }
            Ok(None)
        };
        let mut commands = 0;
        let corpus = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/fuzz/corpus/agent_message");
        for entry in std::fs::read_dir(corpus).expect("the corpus") {
            let bytes = std::fs::read(entry.expect("an entry").path()).expect("read");
            for at in 1..bytes.len() {
                let mut changed = bytes.clone();
                changed[at] ^= 1 << (at % 8);
                for bytes in [&bytes[1..], &bytes[1..at], &changed[1..]] {
                    let whole = read(bytes, usize::MAX);
                    assert_eq!(whole, read(bytes, 7));
                    commands += usize::from(matches!(whole, Ok(Some(_))));
                }
            }
        }
        assert!(commands > 100, "{commands}");
    }

    #[test]
    fn an_endless_line_takes_no_memory() {
        let mut message = CommandMessage::default();
        let error = (0..100).find_map(|_| message.push(b"c").err()).expect("refused");
        assert!(matches!(error, MessageError::Line(line) if line.len() < 100));
    }
}
