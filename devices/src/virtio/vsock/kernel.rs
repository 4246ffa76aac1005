//! The socket device with vhost-vsock in the host's kernel: the guest connects to the host's `AF_VSOCK` sockets.

use super::spec::{KIND, QUEUE_SIZE, QUEUES};
use crate::memory::Memory;
use crate::virtio::device::{ActivateError, Activation, DeviceKind, VirtioDevice, read_config_bytes};
use crate::virtio::device_thread::DeviceThread;
use crate::virtio::queue::Virtqueue;
use crate::virtio::vhost::{VhostWorker, connect, new_calls};
use crate::virtio::worker::Worker;
use std::io;
use std::sync::Arc;
use thiserror::Error;
use vhost::VhostBackend;
use vhost::vhost_kern::vsock::Vsock as Handle;
use vhost::vsock::VhostVsock;
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

/// The queues that vhost-vsock processes: receive and transmit.
const VHOST_QUEUES: usize = 2;

/// vhost-vsock cannot be used.
#[derive(Debug, Error)]
pub enum KernelVsockError {
    /// The host has no vhost-vsock, or the user has no access to it.
    #[error("cannot open /dev/vhost-vsock")]
    Open(#[source] vhost::Error),
    /// An eventfd could not be created.
    #[error("cannot create an eventfd for vhost-vsock")]
    Io(#[source] io::Error),
    /// Another guest of the host has the context ID.
    #[error("cannot use the CID {cid}")]
    Cid {
        /// The context ID that was asked for.
        cid: u32,
        /// The error of vhost-vsock.
        source: vhost::Error,
    },
}

type VhostHandle = Handle<Arc<GuestMemoryMmap>>;

/// The socket device with vhost-vsock.
pub struct KernelVsock {
    cid: u32,
    handle: Arc<VhostHandle>,
    calls: Arc<Vec<EventFd>>,
}

impl KernelVsock {
    /// Makes a device for a guest with the context ID `cid`, which no other guest of the host may have, and with its queues in
    /// `memory`.
    ///
    /// # Errors
    /// Returns [`KernelVsockError`] where the host has no vhost-vsock, or where another guest has the CID.
    pub fn new(cid: u32, memory: &Memory) -> Result<Self, KernelVsockError> {
        let handle = Handle::new(Arc::new((**memory).clone())).map_err(KernelVsockError::Open)?;
        handle.set_guest_cid(u64::from(cid)).map_err(|source| KernelVsockError::Cid { cid, source })?;
        handle.set_owner().map_err(KernelVsockError::Open)?;
        let calls = new_calls(VHOST_QUEUES).map_err(KernelVsockError::Io)?;
        Ok(Self { cid, handle: Arc::new(handle), calls })
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

    fn thread_role(&self) -> DeviceThread {
        DeviceThread::Vhost
    }

    fn activate(&mut self, mut activation: Activation) -> Result<Vec<Worker>, ActivateError> {
        let queues = vec![activation.take_queue(0)?, activation.take_queue(1)?];
        let (memory, features, handle) = (activation.memory.clone(), activation.features, Arc::clone(&self.handle));
        let start = move |queues: &[Virtqueue], calls: &[EventFd]| {
            connect(&*handle, &memory, features, queues, calls)?;
            handle.start().map_err(ActivateError::vhost("start vhost-vsock"))
        };
        let handle = Arc::clone(&self.handle);
        let stop = move || {
            if let Err(error) = handle.stop() {
                log::error!("vsock: cannot stop vhost-vsock: {error}");
            }
        };
        let Activation { memory, interrupt, .. } = activation;
        Ok(vec![Box::new(VhostWorker::new(queues, Arc::clone(&self.calls), start, stop, interrupt, memory))])
    }
}
