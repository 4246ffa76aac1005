//! The same device with the host's kernel behind it (vhost-vsock): streams meet the host's own vsock sockets.

use super::{QUEUE_SIZE, kind};
use crate::virtio::vhost::{Vhost, connect};
use crate::virtio::{ActivateError, Activation, DeviceKind, VirtioDevice, Worker, read_config_bytes};
use std::io;
use std::sync::Arc;
use vhost::vhost_kern::vsock::Vsock as Handle;
use vhost::vsock::VhostVsock;
use vm_memory::GuestMemoryMmap;

/// The device.
pub struct KernelVsock {
    cid: u32,
}

impl KernelVsock {
    /// A guest with the address `cid`, which no other guest of this host may have.
    ///
    /// # Errors
    /// Where the host has no vhost-vsock, or the address is taken.
    pub fn new(cid: u32) -> io::Result<Self> {
        // Tried now, for an error that the user sees.
        open(&Arc::new(GuestMemoryMmap::new()), cid)?;
        Ok(Self { cid })
    }
}

fn open(memory: &Arc<GuestMemoryMmap>, cid: u32) -> io::Result<Handle<Arc<GuestMemoryMmap>>> {
    let other = |error: vhost::Error| io::Error::other(error.to_string());
    let handle = Handle::new(Arc::clone(memory)).map_err(other)?;
    handle.set_guest_cid(u64::from(cid)).map_err(other)?;
    Ok(handle)
}

impl VirtioDevice for KernelVsock {
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
        let queues = vec![activation.queue(0)?, activation.queue(1)?];
        let handle = open(&Arc::new((*activation.memory).clone()), self.cid);
        let handle = handle.map_err(|error| ActivateError::Io("open /dev/vhost-vsock", error))?;
        let calls = connect(&handle, &activation.memory, activation.features, &queues)?;
        let failed = |error: vhost::Error| ActivateError::Io("start vhost-vsock", io::Error::other(error.to_string()));
        handle.start().map_err(failed)?;
        let stop = move || {
            if let Err(error) = handle.stop() {
                log::error!("vsock: vhost: {error}");
            }
        };
        Ok(vec![Box::new(Vhost::new(queues, calls, activation.memory.clone(), stop))])
    }
}
