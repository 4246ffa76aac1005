//! The socket device (virtio 1.3 §5.10): streams between the guest and Unix sockets of the host, in the way that
//! Firecracker made known.
//!
//! - The guest connects to port P of the host (CID 2): hwvmm connects to the Unix socket `PATH_P`.
//! - A host program connects to `PATH` and writes `CONNECT P\n`: hwvmm connects to the guest's port P, and answers
//!   `OK LOCAL_PORT\n` once the guest accepts; else it closes.

mod connection;
mod kernel;
mod muxer;
mod packet;
#[cfg(test)]
mod tests;

pub use kernel::KernelVsock;

use super::{ActivateError, Activation, DeviceKind, VirtioDevice, Worker, read_config_bytes};
use crate::socket::Listener;
use muxer::Muxer;
use std::io;
use std::path::{Path, PathBuf};
use thiserror::Error;

/// Guests' addresses: 0 to 2 are the hypervisor's, all ones is anybody.
pub const FIRST_CID: u32 = 3;
const HOST_CID: u64 = 2;
const QUEUE_SIZE: u16 = 256;

/// The device cannot be made.
#[derive(Debug, Error)]
#[error("cannot listen on the socket {}{}", .path.display(), Listener::remedy(.source))]
pub struct VsockError {
    path: PathBuf,
    source: io::Error,
}

/// The device.
pub struct Vsock {
    cid: u32,
    listener: Listener,
}

impl Vsock {
    /// A guest with the address `cid` ([`FIRST_CID`] or more), whose streams meet the host at `path`.
    ///
    /// # Errors
    /// Where the socket cannot be made.
    pub fn new(cid: u32, path: &Path) -> Result<Self, VsockError> {
        let listener = Listener::new(path).map_err(|source| VsockError { path: path.to_owned(), source })?;
        Ok(Self { cid, listener })
    }
}

fn kind() -> DeviceKind {
    DeviceKind { id: 19, name: "vsock", pci_class: 0x0780 }
}

impl VirtioDevice for Vsock {
    fn kind(&self) -> DeviceKind {
        kind()
    }

    fn queue_max_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; 3]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&u64::from(self.cid).to_le_bytes(), offset, data);
    }

    fn activate(&mut self, mut activation: Activation) -> Result<Vec<Worker>, ActivateError> {
        let listener = self.listener.socket().try_clone().map_err(|error| ActivateError::Io("copy a socket", error))?;
        let (receive, transmit) = (activation.queue(0)?, activation.queue(1)?);
        let muxer = Muxer::new(u64::from(self.cid), self.listener.path().to_owned(), listener, receive, transmit);
        Ok(vec![Box::new(muxer)])
    }
}
