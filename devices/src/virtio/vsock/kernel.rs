//! The socket device with vhost-vsock in the host's kernel: the guest connects to the host's `AF_VSOCK` sockets.

use super::spec::{KIND, QUEUE_SIZE, QUEUES};
use crate::virtio::device::{ActivateError, Activation, DeviceKind, VirtioDevice, read_config_bytes};
use crate::virtio::vhost::{VhostWorker, connect};
use crate::virtio::worker::Worker;
use std::sync::Arc;
use thiserror::Error;
use vhost::vhost_kern::vsock::Vsock as Handle;
use vhost::vsock::VhostVsock;
use vm_memory::GuestMemoryMmap;

/// vhost-vsock cannot be used.
#[derive(Debug, Error)]
pub enum KernelVsockError {
    /// The host has no vhost-vsock, or the user has no access to it.
    #[error("cannot open /dev/vhost-vsock")]
    Open(#[source] vhost::Error),
    /// Another guest of the host has the context ID.
    #[error("cannot use the CID {cid}")]
    Cid {
        /// The context ID.
        cid: u32,
        /// The error of vhost-vsock.
        source: vhost::Error,
    },
}

/// The socket device with vhost-vsock.
pub struct KernelVsock {
    cid: u32,
}

impl KernelVsock {
    /// Makes a device for a guest with the context ID `cid`, which no other guest of the host may have.
    ///
    /// # Errors
    /// Returns [`KernelVsockError`] where the host has no vhost-vsock, or where another guest has the CID.
    pub fn new(cid: u32) -> Result<Self, KernelVsockError> {
        // Opened once now, so that an error is reported before the guest runs.
        open(GuestMemoryMmap::new(), cid)?;
        Ok(Self { cid })
    }
}

fn open(memory: GuestMemoryMmap, cid: u32) -> Result<Handle<Arc<GuestMemoryMmap>>, KernelVsockError> {
    let handle = Handle::new(Arc::new(memory)).map_err(KernelVsockError::Open)?;
    handle.set_guest_cid(u64::from(cid)).map_err(|source| KernelVsockError::Cid { cid, source })?;
    Ok(handle)
}

impl From<KernelVsockError> for ActivateError {
    fn from(error: KernelVsockError) -> Self {
        match error {
            KernelVsockError::Open(source) => Self::Vhost { action: "open /dev/vhost-vsock", source },
            KernelVsockError::Cid { source, .. } => Self::Vhost { action: "set the CID of vhost-vsock", source },
        }
    }
}

impl VirtioDevice for KernelVsock {
    fn kind(&self) -> DeviceKind {
        KIND
    }

    fn queue_max_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; QUEUES]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&u64::from(self.cid).to_le_bytes(), offset, data);
    }

    fn activate(&mut self, mut activation: Activation) -> Result<Vec<Worker>, ActivateError> {
        let queues = vec![activation.take_queue(0)?, activation.take_queue(1)?];
        let handle = open((*activation.memory).clone(), self.cid)?;
        let calls = connect(&handle, &activation.memory, activation.features, &queues)?;
        handle.start().map_err(ActivateError::vhost("start vhost-vsock"))?;
        let stop = move || {
            if let Err(error) = handle.stop() {
                log::error!("vsock: cannot stop vhost-vsock: {error}");
            }
        };
        Ok(vec![Box::new(VhostWorker::new(queues, calls, activation.memory.clone(), stop))])
    }
}
