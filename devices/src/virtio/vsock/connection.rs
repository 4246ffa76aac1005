//! A stream connection between the guest and a Unix socket of the host, with its flow control (virtio 1.3 §5.10.6.3).

use super::packet::{SHUTDOWN_RECEIVE, SHUTDOWN_SEND};
use crate::memory::Buffers;
use std::io::{self, Write};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use thiserror::Error;

/// Size in bytes of the receive buffer for data of the guest, per connection (`buf_alloc`).
pub(super) const BUFFER_BYTES: u32 = 256 << 10;
/// The most bytes that a device keeps for host programs that do not read, over all its connections. Without it, the receive
/// buffers of all connections would add up to 256 MiB.
pub(super) const MAX_UNSENT_BYTES: usize = 16 << 20;

/// A connection must be reset.
#[derive(Debug, Error)]
pub(super) enum ConnectionError {
    /// The guest has sent data after a shutdown with `VIRTIO_VSOCK_SHUTDOWN_SEND`.
    #[error("the guest sent data after it had shut its side down")]
    SendAfterShutdown,
    /// The guest has ignored `buf_alloc`.
    #[error("the guest sent {bytes} bytes more than the receive buffer of {BUFFER_BYTES} bytes can take")]
    BufferOverrun {
        /// Bytes beyond the end of the buffer.
        bytes: usize,
    },
    /// The host programs of all connections together have left too much unread.
    #[error(
        "host programs leave more than {MAX_UNSENT_BYTES} bytes of the guest unread, the most that is kept for them"
    )]
    TooMuchUnsent,
    /// The packet is shorter than its header says.
    #[error("a packet has {found} bytes of data, its header says {expected}")]
    ShortPacket {
        /// `len` of the header.
        expected: usize,
        /// Bytes in the packet's buffers.
        found: usize,
    },
    /// The operation is not valid in the connection's state.
    #[error("operation {op} is not valid in the state {state:?}")]
    InvalidOperation {
        /// `op` of the header.
        op: u16,
        /// The state of the connection when the packet arrived.
        state: State,
    },
    /// The Unix socket failed.
    #[error("the Unix socket failed")]
    Socket(#[from] io::Error),
}

/// The state of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    /// The host program has not sent its CONNECT line.
    AwaitingConnectLine,
    /// A connection request was sent to the guest, which has not responded.
    Requested,
    /// Data can be sent in both directions.
    Established,
}

pub(super) struct Connection {
    pub(super) stream: UnixStream,
    pub(super) state: State,
    /// The start of the host program's CONNECT line.
    pub(super) line: Vec<u8>,
    /// The guest's last `buf_alloc` and `fwd_cnt`.
    peer_buf_alloc: u32,
    peer_fwd_cnt: u32,
    /// Number of bytes sent to the guest, modulo 2³².
    sent: u32,
    /// `fwd_cnt`: number of bytes from the guest that were written to the socket, modulo 2³²; and its value in the last packet
    /// to the guest.
    fwd_cnt: u32,
    last_fwd_cnt: u32,
    /// Bytes from the guest that the socket has not accepted.
    unsent: Vec<u8>,
    /// The `SHUTDOWN_*` flags that the guest has sent.
    peer_shutdown: u32,
    /// The host program has closed its sending side.
    pub(super) end_of_stream: bool,
    /// The socket may be readable.
    pub(super) readable: bool,
    /// The connection is in the queue of those that may have data for the guest.
    pub(super) queued: bool,
}

impl Connection {
    pub(super) fn new(stream: UnixStream, state: State) -> Self {
        Self {
            stream,
            state,
            line: Vec::new(),
            peer_buf_alloc: 0,
            peer_fwd_cnt: 0,
            sent: 0,
            fwd_cnt: 0,
            last_fwd_cnt: 0,
            unsent: Vec::new(),
            peer_shutdown: 0,
            end_of_stream: false,
            readable: true,
            queued: false,
        }
    }

    /// Updates the guest's credit from a packet header.
    pub(super) fn update_credit(&mut self, buf_alloc: u32, fwd_cnt: u32) {
        self.peer_buf_alloc = buf_alloc;
        self.peer_fwd_cnt = fwd_cnt;
    }

    /// Returns how many bytes the guest can receive now; 0 where its counters are invalid.
    pub(super) fn credit(&self) -> usize {
        let in_flight = self.sent.wrapping_sub(self.peer_fwd_cnt);
        usize::try_from(self.peer_buf_alloc.saturating_sub(in_flight)).unwrap_or(0)
    }

    /// Returns true if the socket may have data that the guest can receive.
    pub(super) fn can_send(&self) -> bool {
        let open = self.state == State::Established && self.readable && !self.end_of_stream;
        open && self.peer_shutdown & SHUTDOWN_RECEIVE == 0 && self.credit() > 0
    }

    /// Reads from the socket to `buffers`, as much as the guest can receive. Returns the number of bytes; 0 at the end of the
    /// stream.
    ///
    /// # Errors
    /// Returns the error of readv(2): `WouldBlock` where there is no data now.
    pub(super) fn read_into(&mut self, buffers: &mut Buffers<'_>) -> io::Result<usize> {
        let mut part = buffers.split_to(self.credit());
        let count = part.read_from(self.stream.as_fd(), None)?;
        self.sent = self.sent.wrapping_add(u32::try_from(count).unwrap_or(0));
        Ok(count)
    }

    /// Returns how many bytes of the guest are kept for the host program.
    pub(super) fn unsent_bytes(&self) -> usize {
        self.unsent.len()
    }

    /// Writes data of the guest to the socket, or keeps what the socket does not accept, at most `room` bytes more than now.
    ///
    /// # Errors
    /// Returns an error where the guest must not send the data, where it does not fit, or where the socket fails.
    pub(super) fn send(&mut self, data: &mut Buffers<'_>, room: usize) -> Result<(), ConnectionError> {
        if self.peer_shutdown & SHUTDOWN_SEND != 0 {
            return Err(ConnectionError::SendAfterShutdown);
        }
        let total = self.unsent.len() + data.len();
        if let Some(bytes) = total.checked_sub(BUFFER_BYTES as usize).filter(|bytes| *bytes > 0) {
            return Err(ConnectionError::BufferOverrun { bytes });
        }
        let before = self.unsent.len();
        self.unsent.extend(data.to_vec());
        self.flush()?;
        if self.unsent.len() > before.saturating_add(room) {
            return Err(ConnectionError::TooMuchUnsent);
        }
        Ok(())
    }

    /// Writes data of the guest that was kept to the socket.
    ///
    /// # Errors
    /// Returns an error where the socket fails; a full socket is not an error.
    pub(super) fn flush(&mut self) -> io::Result<()> {
        while !self.unsent.is_empty() {
            match self.stream.write(&self.unsent) {
                Ok(count) => {
                    self.unsent.drain(..count);
                    self.fwd_cnt = self.fwd_cnt.wrapping_add(u32::try_from(count).unwrap_or(0));
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

    /// Returns the `fwd_cnt` for the header of a packet to the guest.
    pub(super) fn fwd_cnt_for_packet(&mut self) -> u32 {
        self.last_fwd_cnt = self.fwd_cnt;
        self.fwd_cnt
    }

    /// Returns true if a credit update is due: the guest does not know of a quarter of the buffer that is free again.
    pub(super) fn needs_credit_update(&self) -> bool {
        self.state == State::Established && self.fwd_cnt.wrapping_sub(self.last_fwd_cnt) >= BUFFER_BYTES / 4
    }

    /// Notes the flags of a shutdown packet of the guest.
    pub(super) fn shut_down(&mut self, flags: u32) {
        self.peer_shutdown |= flags & (SHUTDOWN_RECEIVE | SHUTDOWN_SEND);
    }

    /// Returns true if the guest has shut both sides down and all its data was written to the socket.
    pub(super) fn is_closed(&self) -> bool {
        let all = SHUTDOWN_RECEIVE | SHUTDOWN_SEND;
        self.peer_shutdown & all == all && self.unsent.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::Memory;
    use std::sync::Arc;
    use vm_memory::{GuestAddress, GuestMemoryMmap};

    #[test]
    fn counters_wrap_and_invalid_ones_give_no_credit() {
        let (ours, _theirs) = UnixStream::pair().expect("a pair");
        let mut connection = Connection::new(ours, State::Established);
        connection.sent = u32::MAX - 9;
        connection.update_credit(100, u32::MAX - 19);
        assert_eq!(connection.credit(), 90);
        connection.sent = connection.sent.wrapping_add(90);
        assert_eq!(connection.credit(), 0);
        // A guest that claims to have received more than was sent.
        connection.update_credit(100, 1000);
        assert_eq!(connection.credit(), 0);
    }

    #[test]
    fn what_does_not_fit_for_all_connections_ends_the_connection() {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 8192)]).expect("memory");
        let memory = Memory::new(memory, Arc::new(()));
        let (ours, _theirs) = UnixStream::pair().expect("a pair");
        ours.set_nonblocking(true).expect("non-blocking");
        let mut connection = Connection::new(ours, State::Established);
        let mut send = |room| {
            let mut data = Buffers::default();
            data.push(&memory, GuestAddress(0), 4096).expect("in memory");
            (connection.send(&mut data, room), connection.unsent_bytes())
        };
        // Until the socket is full, nothing is kept, and no room is needed.
        let full = (0..4096).map(|_| send(4096)).find(|(_, unsent)| *unsent > 0).expect("a full socket");
        assert!(full.0.is_ok());
        assert!(send(4096).0.is_ok());
        assert!(matches!(send(4095).0, Err(ConnectionError::TooMuchUnsent)));
    }
}
