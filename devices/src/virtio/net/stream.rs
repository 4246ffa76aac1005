//! Frames on a Unix stream socket, each behind its length as 32 bits in network order: what passt (and QEMU's
//! `-netdev stream`) speaks.

use super::backend::Backend;
use crate::memory::Buffers;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;

const LENGTH_BYTES: usize = 4;
/// The longest frame that is sent or taken: passt's, and IPv4's, limit.
const MAX_FRAME_BYTES: usize = 65535 + 14;

/// The socket.
pub struct Stream {
    socket: UnixStream,
    /// Bytes received and not handed on: whole frames and the start of one.
    received: Vec<u8>,
    /// How much of `received` is used up.
    used: usize,
    /// The rest of a frame that the socket did not take.
    unsent: Vec<u8>,
    closed: bool,
}

impl Stream {
    /// Frames on `socket`.
    ///
    /// # Errors
    /// Where it cannot be made non-blocking.
    pub fn new(socket: UnixStream) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        Ok(Self { socket, received: Vec::new(), used: 0, unsent: Vec::new(), closed: false })
    }

    /// A whole frame out of what was received, if there is one.
    fn next_frame(&mut self, frame: &mut [u8]) -> io::Result<Option<usize>> {
        let rest = self.received.get(self.used..).unwrap_or_default();
        let Some((length, body)) = rest.split_first_chunk::<LENGTH_BYTES>() else { return Ok(None) };
        let length = usize::try_from(u32::from_be_bytes(*length)).unwrap_or(usize::MAX);
        if length > MAX_FRAME_BYTES.min(frame.len()) {
            self.closed = true;
            return Err(io::Error::other(format!("a frame of {length} bytes: the network program is out of step")));
        }
        let Some(body) = body.get(..length) else { return Ok(None) };
        frame[..length].copy_from_slice(body);
        self.used += LENGTH_BYTES + length;
        if self.used == self.received.len() {
            self.received.clear();
            self.used = 0;
        }
        Ok(Some(length))
    }
}

impl Backend for Stream {
    fn fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    fn has_header(&self) -> bool {
        false
    }

    fn receive(&mut self, frame: &mut [u8]) -> io::Result<Option<usize>> {
        loop {
            if self.closed {
                return Ok(None);
            }
            if let Some(length) = self.next_frame(frame)? {
                return Ok(Some(length));
            }
            self.received.drain(..self.used);
            self.used = 0;
            let start = self.received.len();
            self.received.resize(start + MAX_FRAME_BYTES + LENGTH_BYTES, 0);
            let count = self.socket.read(&mut self.received[start..]);
            self.received.truncate(start + count.as_ref().map_or(0, |count| *count));
            match count {
                Ok(0) => {
                    self.closed = true;
                    return Err(io::Error::other("the network program has ended: the guest is cut off"));
                }
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    fn send(&mut self, frame: &mut Buffers<'_>) -> io::Result<()> {
        self.flush()?;
        let length = frame.len();
        if self.closed || length > MAX_FRAME_BYTES {
            return Err(io::Error::other(format!("{length} bytes are not sent")));
        }
        let length = u32::try_from(length).unwrap_or(0);
        self.unsent.extend(length.to_be_bytes());
        self.unsent.extend(frame.to_vec());
        // The frame is ours now: what the socket does not take goes before the next.
        match self.flush() {
            Err(error) if error.kind() != io::ErrorKind::WouldBlock => Err(error),
            _ => Ok(()),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        while !self.unsent.is_empty() {
            match self.socket.write(&self.unsent) {
                Ok(count) => drop(self.unsent.drain(..count)),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::Memory;
    use std::sync::Arc;
    use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

    #[test]
    fn frames_keep_their_bounds_however_they_are_cut() {
        let (ours, mut theirs) = UnixStream::pair().expect("a pair");
        let mut stream = Stream::new(ours).expect("non-blocking");
        let mut frame = [0; 100];
        assert_eq!(stream.receive(&mut frame).expect("open"), None);
        for byte in [0, 0, 0, 3, 7, 8] {
            theirs.write_all(&[byte]).expect("room");
            assert_eq!(stream.receive(&mut frame).expect("open"), None);
        }
        theirs.write_all(&[9, 0, 0, 0, 0, 0, 0, 0, 1, 5]).expect("room");
        assert_eq!(stream.receive(&mut frame).expect("open"), Some(3));
        assert_eq!(frame[..3], [7, 8, 9]);
        assert_eq!(stream.receive(&mut frame).expect("open"), Some(0));
        assert_eq!(stream.receive(&mut frame).expect("open"), Some(1));
        // Nonsense is said once, then there is silence.
        theirs.write_all(&[0xff; 8]).expect("room");
        assert!(stream.receive(&mut frame).is_err());
        assert_eq!(stream.receive(&mut frame).expect("silent"), None);
    }

    #[test]
    fn a_full_socket_takes_whole_frames_in_order() {
        let (ours, mut theirs) = UnixStream::pair().expect("a pair");
        let mut stream = Stream::new(ours).expect("non-blocking");
        let memory =
            Memory::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1_0000)]).expect("small"), Arc::new(()));
        let mut sent = 0_u8;
        loop {
            memory.write_slice(&[sent; 9000], GuestAddress(0)).expect("there");
            let mut frame = Buffers::default();
            frame.push(&memory, GuestAddress(0), 9000).expect("there");
            match stream.send(&mut frame) {
                Ok(()) => sent += 1,
                Err(error) => {
                    assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
                    assert_eq!(frame.len(), 9000, "the frame is still the caller's");
                    break;
                }
            }
        }
        for number in 0..sent {
            let mut frame = [0; 9004];
            theirs.set_read_timeout(Some(std::time::Duration::from_secs(5))).expect("a timeout");
            let mut at = 0;
            while at < frame.len() {
                let _ = stream.flush();
                at += theirs.read(&mut frame[at..]).expect("in time");
            }
            assert_eq!((frame[..4].to_vec(), frame[4], frame[9003]), (vec![0, 0, 0x23, 0x28], number, number));
        }
    }
}
