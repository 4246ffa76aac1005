//! What a network card's frames go to.

use crate::memory::Buffers;
use std::fs::File;
use std::io;
use std::os::fd::BorrowedFd;

/// What the driver takes from the backend without the work being done: checksums, and segments put together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offloads {
    /// Frames without a checksum.
    pub checksum: bool,
    /// Large TCP frames over IPv4.
    pub tso4: bool,
    /// The same over IPv6.
    pub tso6: bool,
    /// Large UDP frames.
    pub ufo: bool,
}

/// Turns a queue of the backend on and off, from another thread.
pub(super) type Switch = Box<dyn Fn(bool) -> io::Result<()> + Send>;

/// The backend of one queue pair. It never waits.
pub trait Backend: Send {
    /// Readable when a frame has come, writable when one can go.
    fn fd(&self) -> BorrowedFd<'_>;

    /// The file that the host's kernel can work on by itself (vhost-net), where there is one.
    fn vhost_file(&self) -> Option<&File> {
        None
    }

    /// Whether frames start with virtio's header, offloads and all; else they are plain Ethernet.
    fn has_header(&self) -> bool;

    /// What the driver takes.
    ///
    /// # Errors
    /// The host's.
    fn set_offloads(&mut self, offloads: Offloads) -> io::Result<()> {
        let _ = offloads;
        Ok(())
    }

    /// Whether frames may come on this queue.
    ///
    /// # Errors
    /// The host's.
    fn set_enabled(&mut self, enabled: bool) -> io::Result<()> {
        let _ = enabled;
        Ok(())
    }

    /// The same for another thread.
    ///
    /// # Errors
    /// Where the file descriptor cannot be copied.
    fn switch(&self) -> io::Result<Switch> {
        Ok(Box::new(|_| Ok(())))
    }

    /// The next frame, into `frame`; its length, or `None` where there is none now.
    ///
    /// # Errors
    /// The host's.
    fn receive(&mut self, frame: &mut [u8]) -> io::Result<Option<usize>>;

    /// Sends a frame. `WouldBlock`: try again when the file descriptor is writable.
    ///
    /// # Errors
    /// The host's.
    fn send(&mut self, frame: &mut Buffers<'_>) -> io::Result<()>;

    /// Sends on what is left of an earlier frame.
    ///
    /// # Errors
    /// The host's.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
