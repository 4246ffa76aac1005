//! A message as it goes from one process of hwvmm to another.

use crate::console::LineState;
use log::Level;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};

/// The longest message, in bytes.
pub(super) const MESSAGE_BYTES: usize = 8 << 10;
/// Bytes of a packet before its text: kind, severity, state of the line, lost messages (4), place (8), further messages (8); little-endian.
const HEADER_BYTES: usize = 23;
/// The longest packet: a message with what its escaping adds at its end.
pub(super) const PACKET_BYTES: usize = HEADER_BYTES + MESSAGE_BYTES + 64;

/// How a message begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Severity {
    /// What the command says: `hwvmm: `.
    Say,
    Error,
    Warning,
    /// With -v and -vv.
    Verbose,
}

impl Severity {
    const ALL: [Self; 4] = [Self::Say, Self::Error, Self::Warning, Self::Verbose];

    /// The prefix of its line.
    pub(super) fn prefix(self) -> &'static str {
        match self {
            Self::Say | Self::Verbose => "hwvmm: ",
            Self::Error => "hwvmm: error: ",
            Self::Warning => "hwvmm: warning: ",
        }
    }
}

impl From<Level> for Severity {
    fn from(level: Level) -> Self {
        match level {
            Level::Error => Self::Error,
            Level::Warn => Self::Warning,
            Level::Info | Level::Debug | Level::Trace => Self::Verbose,
        }
    }
}

/// Where in the code a message is: a hash of the module and the line. And its severity.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Place {
    pub(super) id: u64,
    pub(super) severity: Severity,
}

/// What a packet is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// A message, and how many like it were not sent.
    Message,
    /// How many messages like this one were not sent.
    Count,
}

/// One message between two processes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Packet {
    pub(super) kind: Kind,
    pub(super) place: Place,
    /// How many messages of this place were not sent before this one.
    pub(super) more: u64,
    /// Where the sender's consoles have left stdout.
    pub(super) line: LineState,
    /// Messages that could not be sent before this one.
    pub(super) lost: u32,
    pub(super) text: String,
}

impl Packet {
    fn encode(&self) -> Vec<u8> {
        let line = u8::from(self.line == LineState::Middle);
        let mut bytes = vec![self.kind as u8, self.place.severity as u8, line];
        bytes.extend(self.lost.to_le_bytes());
        bytes.extend(self.place.id.to_le_bytes());
        bytes.extend(self.more.to_le_bytes());
        bytes.extend(self.text.bytes().take(PACKET_BYTES - HEADER_BYTES));
        bytes
    }

    /// Returns `None` where the packet is not one of hwvmm's.
    pub(super) fn decode(bytes: &[u8]) -> Option<Self> {
        let (header, text) = bytes.split_first_chunk::<HEADER_BYTES>()?;
        let ([kind, severity, line, l0, l1, l2, l3], rest) = header.split_first_chunk::<7>()?;
        let (id, more) = rest.split_first_chunk::<8>()?;
        let kind = [Kind::Message, Kind::Count].into_iter().find(|known| *known as u8 == *kind)?;
        let severity = Severity::ALL.into_iter().find(|known| *known as u8 == *severity)?;
        let line = match line {
            0 => LineState::Start,
            1 => LineState::Middle,
            _ => return None,
        };
        Some(Self {
            kind,
            place: Place { id: u64::from_le_bytes(*id), severity },
            more: u64::from_le_bytes(more.try_into().ok()?),
            line,
            lost: u32::from_le_bytes([*l0, *l1, *l2, *l3]),
            text: String::from_utf8_lossy(text).into_owned(),
        })
    }
}

/// The end that sends. Its socket is non-blocking.
pub struct RelaySender(File);

impl RelaySender {
    /// Sends through a non-blocking socket.
    pub(super) fn new(socket: File) -> Self {
        Self(socket)
    }

    /// Waits a moment for the other process to read.
    pub(super) fn wait_for_room(&self) {
        // An error shows in the next write.
        let _ = poll(&mut [PollFd::new(&self.0, PollFlags::OUT)], Some(&Timespec { tv_sec: 0, tv_nsec: 100_000_000 }));
    }

    /// Sends a message. Returns false if it is lost: the other process has not read so many, or is gone.
    pub(super) fn send(&self, packet: &Packet) -> bool {
        loop {
            match rustix::io::write(&self.0, &packet.encode()) {
                Ok(_) => return true,
                Err(Errno::INTR) => {}
                Err(_) => return false,
            }
        }
    }
}

impl AsFd for RelaySender {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn any_bytes_are_a_packet_or_none(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            if let Some(packet) = Packet::decode(&bytes) {
                prop_assert_eq!(Packet::decode(&packet.encode()), Some(packet));
            }
        }
    }
}
