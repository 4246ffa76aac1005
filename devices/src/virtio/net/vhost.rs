//! Queue pairs that vhost-net in the host's kernel processes.

use super::backend::Backend;
use crate::virtio::device::{ActivateError, Activation};
use crate::virtio::queue::Virtqueue;
use crate::virtio::vhost::{VhostWorker, connect};
use std::sync::Arc;
use thiserror::Error;
use vhost::net::VhostNet;
use vhost::vhost_kern::net::Net;
use vm_memory::GuestMemoryMmap;

/// The host has no vhost-net, or the user has no access to it.
#[derive(Debug, Error)]
#[error("cannot open /dev/vhost-net")]
pub struct VhostNetError(#[source] vhost::Error);

/// Opens and closes vhost-net, so that a missing one is reported before the guest runs.
pub(super) fn probe() -> Result<(), VhostNetError> {
    Net::new(Arc::new(GuestMemoryMmap::<()>::new())).map(|_| ()).map_err(VhostNetError)
}

/// Starts vhost-net for one queue pair.
pub(super) fn start(
    backend: Option<&dyn Backend>,
    receive: Virtqueue,
    transmit: Virtqueue,
    activation: &Activation,
) -> Result<VhostWorker, ActivateError> {
    let file = backend.and_then(Backend::vhost_file).ok_or(ActivateError::Vhost {
        action: "use vhost-net: the network backend is not a tap interface",
        source: vhost::Error::InvalidOperation,
    })?;
    let file = file.try_clone().map_err(ActivateError::io("duplicate the file descriptor of the tap interface"))?;
    let handle =
        Net::new(Arc::new((*activation.memory).clone())).map_err(ActivateError::vhost("open /dev/vhost-net"))?;
    let queues = vec![receive, transmit];
    let calls = connect(&handle, &activation.memory, activation.features, &queues)?;
    let queue_count = queues.len();
    for index in 0..queue_count {
        handle
            .set_backend(index, Some(&file))
            .map_err(ActivateError::vhost("connect vhost-net to the tap interface"))?;
    }
    let stop = move || {
        for index in 0..queue_count {
            if let Err(error) = handle.set_backend(index, None) {
                log::error!("net: cannot stop vhost-net: {error}");
            }
        }
    };
    Ok(VhostWorker::new(queues, calls, activation.memory.clone(), stop))
}
