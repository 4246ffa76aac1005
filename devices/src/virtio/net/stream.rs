//! Frames on a Unix stream socket, each preceded by its length in 32 bits in network byte order: the protocol of passt and of
//! QEMU's `-netdev stream`.

use super::backend::{Backend, BackendError};
use crate::memory::Buffers;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;

const LENGTH_BYTES: usize = 4;
/// Length in bytes of the longest frame: a maximal IPv4 packet with its Ethernet header, which is also passt's limit.
const MAX_FRAME_BYTES: usize = 65535 + 14;

/// A backend on a Unix stream socket.
pub struct Stream {
    socket: UnixStream,
    /// Received bytes: whole frames, and the start of one.
    received: Vec<u8>,
    /// Number of bytes of `received` that were returned as frames.
    used: usize,
    /// The rest of a frame that was sent in part.
    unsent: Vec<u8>,
    closed: bool,
}

impl Stream {
    /// Makes a backend of `socket`.
    ///
    /// # Errors
    /// Returns an error where the socket cannot be set to non-blocking.
    pub fn new(socket: UnixStream) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        Ok(Self { socket, received: Vec::new(), used: 0, unsent: Vec::new(), closed: false })
    }

    /// Copies the next received frame to `frame` and returns its length, or `None` where no whole frame was received.
    fn next_frame(&mut self, frame: &mut [u8]) -> Result<Option<usize>, BackendError> {
        let rest = self.received.get(self.used..).unwrap_or_default();
        let Some((length, body)) = rest.split_first_chunk::<LENGTH_BYTES>() else { return Ok(None) };
        let length = usize::try_from(u32::from_be_bytes(*length)).unwrap_or(usize::MAX);
        let max = MAX_FRAME_BYTES.min(frame.len());
        if length > max {
            // The stream cannot be synchronized again.
            self.closed = true;
            return Err(BackendError::TooLong { bytes: length, max });
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

    fn receive(&mut self, frame: &mut [u8]) -> Result<Option<usize>, BackendError> {
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
                    return Err(BackendError::Closed);
                }
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn send(&mut self, frame: &mut Buffers<'_>) -> Result<(), BackendError> {
        self.flush()?;
        let length = frame.len();
        if self.closed {
            return Err(BackendError::Closed);
        }
        if length > MAX_FRAME_BYTES {
            return Err(BackendError::TooLong { bytes: length, max: MAX_FRAME_BYTES });
        }
        let length = u32::try_from(length).unwrap_or(0);
        self.unsent.extend(length.to_be_bytes());
        self.unsent.extend(frame.to_vec());
        // The frame was copied: a rest of it is sent before the next frame.
        match self.flush() {
            Err(BackendError::WouldBlock) => Ok(()),
            result => result,
        }
    }

    fn flush(&mut self) -> Result<(), BackendError> {
        while !self.unsent.is_empty() {
            match self.socket.write(&self.unsent) {
                Ok(count) => drop(self.unsent.drain(..count)),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
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
    fn frames_keep_their_bounds_whatever_the_segments() {
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
        // An invalid length is reported once; nothing is received afterwards.
        theirs.write_all(&[0xff; 8]).expect("room");
        assert!(matches!(stream.receive(&mut frame), Err(BackendError::TooLong { .. })));
        assert_eq!(stream.receive(&mut frame).expect("closed"), None);
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
                    assert!(matches!(error, BackendError::WouldBlock), "{error}");
                    assert_eq!(frame.len(), 9000, "the frame is not consumed");
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
