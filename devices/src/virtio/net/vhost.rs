//! Queue pairs that the host's kernel works on (vhost-net).

use super::Backend;
use crate::virtio::vhost::{Vhost, connect};
use crate::virtio::{ActivateError, Activation, Virtqueue};
use std::io;
use std::sync::Arc;
use vhost::net::VhostNet;
use vhost::vhost_kern::net::Net;

/// Whether the host has it.
pub(super) fn probe() -> io::Result<()> {
    open(&Arc::new(vm_memory::GuestMemoryMmap::new())).map(|_| ())
}

type Handle = Net<Arc<vm_memory::GuestMemoryMmap>>;

fn open(memory: &Arc<vm_memory::GuestMemoryMmap>) -> io::Result<Handle> {
    Net::new(Arc::clone(memory)).map_err(|error| io::Error::other(error.to_string()))
}

/// Gives one pair to the kernel.
pub(super) fn start(
    backend: Option<&dyn Backend>,
    receive: Virtqueue,
    transmit: Virtqueue,
    activation: &Activation,
) -> Result<Vhost, ActivateError> {
    let file = backend.and_then(Backend::vhost_file).and_then(|file| file.try_clone().ok());
    let file =
        file.ok_or_else(|| ActivateError::Io("use vhost without a tap interface", io::ErrorKind::Unsupported.into()))?;
    let handle = open(&Arc::new((*activation.memory).clone()))
        .map_err(|error| ActivateError::Io("open /dev/vhost-net", error))?;
    let queues = vec![receive, transmit];
    let calls = connect(&handle, &activation.memory, activation.features, &queues)?;
    for index in 0..queues.len() {
        let failed =
            |error: vhost::Error| ActivateError::Io("connect vhost to the tap", io::Error::other(error.to_string()));
        handle.set_backend(index, Some(&file)).map_err(failed)?;
    }
    let stop = move || {
        for index in 0..2 {
            if let Err(error) = handle.set_backend(index, None) {
                log::error!("net: vhost: {error}");
            }
        }
    };
    Ok(Vhost::new(queues, calls, activation.memory.clone(), stop))
}
