//! The interface to what a network card sends frames to and receives frames from.

use crate::memory::Buffers;
use std::fs::File;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use thiserror::Error;

/// A frame cannot be sent or received.
#[derive(Debug, Error)]
pub enum BackendError {
    /// The backend accepts no frame now. Its file descriptor becomes writable when it does.
    #[error("the network backend accepts no frame now")]
    WouldBlock,
    /// The frame is longer than the backend's frames can be.
    #[error("a frame of {bytes} bytes is longer than {max} bytes")]
    TooLong {
        /// Length of the frame.
        bytes: usize,
        /// The longest frame in bytes that the backend takes.
        max: usize,
    },
    /// The program on the other end has closed the connection.
    #[error("the network backend has closed its connection: the guest has no network from now on")]
    Closed,
    /// A system call failed.
    #[error("I/O with the network backend failed")]
    Io(#[source] io::Error),
}

impl From<io::Error> for BackendError {
    fn from(error: io::Error) -> Self {
        if error.kind() == io::ErrorKind::WouldBlock { Self::WouldBlock } else { Self::Io(error) }
    }
}

/// The offloads that the driver accepts for received frames (virtio 1.3 §5.1.3, `VIRTIO_NET_F_GUEST_*`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offloads {
    /// Frames with a partial checksum; a condition of the others.
    pub checksum: bool,
    /// TCP over IPv4 segments that are longer than the MTU.
    pub tso4: bool,
    /// TCP over IPv6 segments that are longer than the MTU.
    pub tso6: bool,
    /// UDP datagrams that are longer than the MTU.
    pub ufo: bool,
}

/// The state of a queue of a backend: a detached queue receives no frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QueueState {
    /// The backend delivers frames on the queue.
    Attached,
    /// The backend delivers no frames on the queue.
    Detached,
}

/// Sets the state of one queue of a backend, from any thread.
pub type QueueSwitch = Arc<dyn Fn(QueueState) -> io::Result<()> + Send + Sync>;

/// The backend of one queue pair. No method blocks.
pub trait Backend: Send {
    /// Returns a file descriptor that is readable when a frame has arrived, and writable when a frame can be sent.
    fn fd(&self) -> BorrowedFd<'_>;

    /// Returns the file to give to vhost-net, where the backend has one.
    fn vhost_file(&self) -> Option<&File> {
        None
    }

    /// Returns true if frames start with struct `virtio_net_hdr` and may use offloads; otherwise they are plain Ethernet
    /// frames.
    fn has_header(&self) -> bool;

    /// Sets which offloads received frames may use.
    ///
    /// # Errors
    /// Returns the error of the host.
    fn set_offloads(&mut self, offloads: Offloads) -> io::Result<()> {
        let _ = offloads;
        Ok(())
    }

    /// Returns a function that sets whether frames can arrive on this queue.
    ///
    /// # Errors
    /// Returns an error where the file descriptor cannot be duplicated.
    fn queue_switch(&self) -> io::Result<QueueSwitch> {
        Ok(Arc::new(|_| Ok(())))
    }

    /// Receives the next frame to `frame` and returns its length in bytes, or `None` where no frame has arrived.
    ///
    /// # Errors
    /// Returns [`BackendError`] where the connection to the backend is closed or fails.
    fn receive(&mut self, frame: &mut [u8]) -> Result<Option<usize>, BackendError>;

    /// Sends a frame.
    ///
    /// # Errors
    /// Returns [`BackendError::WouldBlock`] where the frame must be sent again once [`Backend::fd`] is writable, and other
    /// errors where the frame is dropped.
    fn send(&mut self, frame: &mut Buffers<'_>) -> Result<(), BackendError>;

    /// Sends the rest of a frame that was sent in part.
    ///
    /// # Errors
    /// Returns [`BackendError::WouldBlock`] where a rest is left, and other errors where the connection fails.
    fn flush(&mut self) -> Result<(), BackendError> {
        Ok(())
    }
}
