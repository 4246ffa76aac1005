//! Queue pairs that vhost-net in the host's kernel processes.

use super::backend::{Backend, Offloads};
use super::pair::PairResources;
use crate::memory::Memory;
use crate::virtio::device::{ActivateError, Activation};
use crate::virtio::queue::Virtqueue;
use crate::virtio::slot::Slot;
use crate::virtio::vhost::{VhostWorker, connect, new_calls};
use std::fs::File;
use std::io;
use std::sync::Arc;
use thiserror::Error;
use vhost::VhostBackend;
use vhost::net::VhostNet;
use vhost::vhost_kern::net::Net;
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

/// Number of queues of a pair.
const QUEUES: usize = 2;

/// vhost-net cannot be used.
#[derive(Debug, Error)]
pub enum VhostNetError {
    /// The host has no vhost-net, or the user has no access to it.
    #[error("cannot open /dev/vhost-net")]
    Open(#[source] vhost::Error),
    /// The backend is not a tap interface.
    #[error("vhost-net needs a tap interface")]
    NoTap,
    /// A file descriptor could not be made.
    #[error("cannot make a file descriptor for vhost-net")]
    Io(#[source] io::Error),
}

/// vhost-net for one queue pair.
pub(super) struct VhostPair {
    handle: Arc<Net<Arc<GuestMemoryMmap>>>,
    calls: Arc<Vec<EventFd>>,
    tap: Arc<File>,
}

impl VhostPair {
    /// Opens vhost-net for queues in `memory` and the tap interface in `backend`.
    pub(super) fn open(memory: &Memory, backend: &Slot<Box<dyn Backend>>) -> Result<Self, VhostNetError> {
        let taken = backend.take();
        let tap = taken.as_deref().and_then(Backend::vhost_file).map(File::try_clone);
        backend.put(taken);
        let tap = tap.ok_or(VhostNetError::NoTap)?.map_err(VhostNetError::Io)?;
        let handle = Net::new(Arc::new((**memory).clone())).map_err(VhostNetError::Open)?;
        handle.set_owner().map_err(VhostNetError::Open)?;
        let calls = new_calls(QUEUES).map_err(VhostNetError::Io)?;
        Ok(Self { handle: Arc::new(handle), calls, tap: Arc::new(tap) })
    }

    /// Returns the worker that has vhost-net process `queues`.
    pub(super) fn worker(
        &self,
        resources: &PairResources,
        offloads: Offloads,
        queues: Vec<Virtqueue>,
        activation: &Activation,
    ) -> VhostWorker {
        let (handle, tap, pair) = (Arc::clone(&self.handle), Arc::clone(&self.tap), resources.clone());
        let (memory, features) = (activation.memory.clone(), activation.features);
        let start = move |queues: &[Virtqueue], calls: &[EventFd]| {
            pair.set_offloads(offloads).map_err(ActivateError::io("set the offloads of the tap interface"))?;
            connect(&*handle, &memory, features, queues, calls)?;
            (0..QUEUES).try_for_each(|index| {
                handle
                    .set_backend(index, Some(&*tap))
                    .map_err(ActivateError::vhost("connect vhost-net to the tap interface"))
            })
        };
        let (handle, pair) = (Arc::clone(&self.handle), resources.clone());
        let stop = move || {
            for index in 0..QUEUES {
                if let Err(error) = handle.set_backend(index, None) {
                    log::error!("net: cannot stop vhost-net: {error}");
                }
            }
            pair.reset_queue();
        };
        let (interrupt, memory) = (Arc::clone(&activation.interrupt), activation.memory.clone());
        VhostWorker::new(queues, Arc::clone(&self.calls), start, stop, interrupt, memory)
    }
}
