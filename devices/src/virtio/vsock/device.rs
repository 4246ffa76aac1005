//! The socket device in userspace.

use super::connector::Connector;
use super::muxer::Muxer;
use super::spec::{KIND, QUEUE_SIZE, QUEUES};
use crate::path_text::PathText as _;
use crate::socket::Listener;
use crate::virtio::device::{ActivateError, Activation, DeviceKind, InterruptVectors, VirtioDevice, read_config_bytes};
use crate::virtio::device_thread::DeviceThread;
use crate::virtio::worker::Worker;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use thiserror::Error;

/// The Unix socket for host programs cannot be created.
#[derive(Debug, Error)]
#[error("cannot listen on the socket {}{}", .path.shown(), Listener::remedy(.source))]
pub struct VsockError {
    path: PathBuf,
    source: io::Error,
}

/// The socket device with Unix sockets of the host.
pub struct Vsock {
    cid: u32,
    listener: Option<Arc<Listener>>,
    connector: Arc<Connector>,
}

impl Vsock {
    /// Makes a device for a guest with the context ID `cid`, at least [`super::FIRST_CID`]. `path` is the Unix socket for host
    /// programs, without which none can connect, and `connector` reaches those that the guest can connect to.
    ///
    /// # Errors
    /// Returns [`VsockError`] where the socket at `path` cannot be created.
    pub fn new(cid: u32, path: Option<&Path>, connector: Arc<Connector>) -> Result<Self, VsockError> {
        let listen = |path: &Path| Listener::new(path).map_err(|source| VsockError { path: path.to_owned(), source });
        Ok(Self { cid, listener: path.map(listen).transpose()?.map(Arc::new), connector })
    }
}

impl VirtioDevice for Vsock {
    fn kind(&self) -> DeviceKind {
        KIND
    }

    fn queue_max_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; QUEUES]
    }

    fn interrupt_vectors(&self) -> InterruptVectors {
        InterruptVectors::Shared
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&u64::from(self.cid).to_le_bytes(), offset, data);
    }

    fn thread_role(&self) -> DeviceThread {
        DeviceThread::Vsock
    }

    fn activate(&mut self, mut activation: Activation) -> Result<Vec<Worker>, ActivateError> {
        let (receive, transmit) = (activation.take_queue(0)?, activation.take_queue(1)?);
        let (listener, connector) = (self.listener.clone(), Arc::clone(&self.connector));
        let muxer = Muxer::new(u64::from(self.cid), listener, connector, receive, transmit);
        Ok(vec![Box::new(muxer)])
    }
}
