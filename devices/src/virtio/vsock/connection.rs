//! One stream: a Unix socket of the host, and how much either side may send (virtio 1.3 §5.10.6.3).

use super::packet::{SHUTDOWN_RECEIVE, SHUTDOWN_SEND};
use crate::memory::Buffers;
use std::io::{self, Write};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

/// Bytes of the guest's that are kept for a host program that does not read.
pub(super) const BUFFER_BYTES: u32 = 256 << 10;

/// How far a stream is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    /// The host program has not said yet which port it wants.
    Naming,
    /// The guest was asked.
    Asked,
    /// Both sides talk.
    Open,
}

pub(super) struct Connection {
    pub(super) stream: UnixStream,
    pub(super) state: State,
    /// The start of the host program's line, while it names the port.
    pub(super) line: Vec<u8>,
    /// The guest's window: how much it takes, how much of that it has used.
    peer_alloc: u32,
    peer_forwarded: u32,
    /// Bytes sent to the guest, in all (mod 2³²).
    sent: u32,
    /// Bytes of the guest's handed to the stream, in all; and how many of those it knows of.
    forwarded: u32,
    told_forwarded: u32,
    /// Bytes of the guest's that the stream did not take yet.
    unsent: Vec<u8>,
    /// What the guest will not do any more: SHUTDOWN_*.
    peer_shutdown: u32,
    /// The host program has sent its last byte.
    pub(super) ended: bool,
    /// There may be something to read.
    pub(super) readable: bool,
    /// It waits for its turn to send.
    pub(super) in_turn: bool,
}

impl Connection {
    pub(super) fn new(stream: UnixStream, state: State) -> Self {
        Self {
            stream,
            state,
            line: Vec::new(),
            peer_alloc: 0,
            peer_forwarded: 0,
            sent: 0,
            forwarded: 0,
            told_forwarded: 0,
            unsent: Vec::new(),
            peer_shutdown: 0,
            ended: false,
            readable: true,
            in_turn: false,
        }
    }

    /// What the guest said of its window.
    pub(super) fn take_credit(&mut self, alloc: u32, forwarded: u32) {
        self.peer_alloc = alloc;
        self.peer_forwarded = forwarded;
    }

    /// Bytes that the guest takes now. A guest that says nonsense gets nothing.
    pub(super) fn credit(&self) -> usize {
        let in_flight = self.sent.wrapping_sub(self.peer_forwarded);
        usize::try_from(self.peer_alloc.saturating_sub(in_flight)).unwrap_or(0)
    }

    /// Whether there is something to be read for the guest, and it wants it.
    pub(super) fn wants_to_send(&self) -> bool {
        let open = self.state == State::Open && self.readable && !self.ended;
        open && self.peer_shutdown & SHUTDOWN_RECEIVE == 0 && self.credit() > 0
    }

    /// Reads into `place`, as much as the guest takes. 0: the host program has ended.
    ///
    /// # Errors
    /// The stream's; `WouldBlock` where there is nothing now.
    pub(super) fn read_into(&mut self, place: &mut Buffers<'_>) -> io::Result<usize> {
        let mut part = place.split_to(self.credit());
        let count = part.read_from(self.stream.as_fd(), None)?;
        self.sent = self.sent.wrapping_add(u32::try_from(count).unwrap_or(0));
        Ok(count)
    }

    /// Takes the guest's data.
    ///
    /// # Errors
    /// Where the guest sends more than it may, or the stream is gone.
    pub(super) fn take(&mut self, data: &mut Buffers<'_>) -> io::Result<()> {
        if self.peer_shutdown & SHUTDOWN_SEND != 0 {
            return Err(io::Error::other("the guest sends after its end"));
        }
        if self.unsent.len() + data.len() > BUFFER_BYTES as usize {
            return Err(io::Error::other("the guest sends more than it may"));
        }
        self.unsent.extend(data.to_vec());
        self.flush()
    }

    /// Hands on what it can.
    ///
    /// # Errors
    /// The stream's.
    pub(super) fn flush(&mut self) -> io::Result<()> {
        while !self.unsent.is_empty() {
            match self.stream.write(&self.unsent) {
                Ok(count) => {
                    self.unsent.drain(..count);
                    self.forwarded = self.forwarded.wrapping_add(u32::try_from(count).unwrap_or(0));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        if self.peer_shutdown & SHUTDOWN_SEND != 0 {
            let _ = self.stream.shutdown(Shutdown::Write);
        }
        Ok(())
    }

    /// The count for a header; it is known to the guest from now on.
    pub(super) fn tell_forwarded(&mut self) -> u32 {
        self.told_forwarded = self.forwarded;
        self.forwarded
    }

    /// Whether the guest should learn that it may send more.
    pub(super) fn owes_credit(&self) -> bool {
        self.state == State::Open && self.forwarded.wrapping_sub(self.told_forwarded) >= BUFFER_BYTES / 4
    }

    /// What the guest will not do any more.
    pub(super) fn shut_down(&mut self, flags: u32) {
        self.peer_shutdown |= flags & (SHUTDOWN_RECEIVE | SHUTDOWN_SEND);
    }

    /// Whether nothing more can happen: the guest is through, and its last bytes are handed on.
    pub(super) fn is_over(&self) -> bool {
        let all = SHUTDOWN_RECEIVE | SHUTDOWN_SEND;
        self.peer_shutdown & all == all && self.unsent.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_wrap_and_nonsense_gives_nothing() {
        let (ours, _theirs) = UnixStream::pair().expect("a pair");
        let mut connection = Connection::new(ours, State::Open);
        connection.sent = u32::MAX - 9;
        connection.take_credit(100, u32::MAX - 19);
        assert_eq!(connection.credit(), 90);
        connection.sent = connection.sent.wrapping_add(90);
        assert_eq!(connection.credit(), 0);
        // A guest that claims to have used more than it got.
        connection.take_credit(100, 1000);
        assert_eq!(connection.credit(), 0);
    }
}
