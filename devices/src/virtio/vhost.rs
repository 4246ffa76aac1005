//! Queues that a vhost backend in the host's kernel processes (Linux include/uapi/linux/vhost.h): kicks and buffers do not
//! reach hwvmm. Interrupts do, so that the transport can hold back those that the driver has masked.

use super::device::ActivateError;
use super::queue::Virtqueue;
use super::worker::watch;
use crate::memory::Memory;
use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use std::os::fd::AsRawFd;
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// A queue that the backend processes.
struct VhostQueue {
    queue: Virtqueue,
    /// Readable when the backend has used buffers and the driver is to be interrupted (`VHOST_SET_VRING_CALL`).
    call: EventFd,
}

/// The worker of a vhost device: passes the backend's interrupts on, and stops the backend when it is dropped.
pub(super) struct VhostWorker {
    stop: Box<dyn FnMut() + Send>,
    queues: Vec<VhostQueue>,
    // The backend accesses guest memory until `stop` returns.
    _memory: Memory,
}

/// Gives the backend guest memory, the negotiated `features` and `queues`, which become its rings from index 0 on. Returns
/// the call eventfd of each queue.
pub(super) fn connect(
    backend: &impl VhostBackend,
    memory: &Memory,
    features: u64,
    queues: &[Virtqueue],
) -> Result<Vec<EventFd>, ActivateError> {
    backend.set_owner().map_err(ActivateError::vhost("set the owner of the vhost backend"))?;
    let known = backend.get_features().map_err(ActivateError::vhost("get the features of the vhost backend"))?;
    backend.set_features(features & known).map_err(ActivateError::vhost("set the features of the vhost backend"))?;
    let regions: Vec<VhostUserMemoryRegionInfo> = memory
        .iter()
        .map(|region| VhostUserMemoryRegionInfo {
            guest_phys_addr: region.start_addr().raw_value(),
            memory_size: region.len(),
            userspace_addr: region.as_ptr().addr() as u64,
            mmap_offset: 0,
            mmap_handle: -1,
        })
        .collect();
    backend.set_mem_table(&regions).map_err(ActivateError::vhost("set the memory table of the vhost backend"))?;
    let mut calls = Vec::new();
    for (index, queue) in queues.iter().enumerate() {
        let vring_error = ActivateError::vhost("configure a vring of the vhost backend");
        let rings = queue.rings();
        let config = VringConfigData {
            queue_max_size: queue.size(),
            queue_size: queue.size(),
            flags: 0,
            desc_table_addr: rings.descriptor_table,
            used_ring_addr: rings.used_ring,
            avail_ring_addr: rings.available_ring,
            log_addr: None,
        };
        let call = EventFd::new(EFD_NONBLOCK).map_err(ActivateError::io("create an eventfd"))?;
        backend.set_vring_num(index, queue.size()).map_err(vring_error)?;
        backend.set_vring_addr(index, &config).map_err(vring_error)?;
        backend.set_vring_base(index, 0).map_err(vring_error)?;
        backend.set_vring_call(index, &call).map_err(vring_error)?;
        backend.set_vring_kick(index, queue.kick()).map_err(vring_error)?;
        calls.push(call);
    }
    Ok(calls)
}

impl VhostWorker {
    /// Makes the worker for `queues`, whose call eventfds are `calls`. `stop` must stop the backend.
    pub(super) fn new(
        queues: Vec<Virtqueue>,
        calls: Vec<EventFd>,
        memory: Memory,
        stop: impl FnMut() + Send + 'static,
    ) -> Self {
        let queues = queues.into_iter().zip(calls).map(|(queue, call)| VhostQueue { queue, call }).collect();
        Self { stop: Box::new(stop), queues, _memory: memory }
    }
}

impl MutEventSubscriber for VhostWorker {
    fn process(&mut self, events: Events, _ops: &mut EventOps<'_>) {
        for VhostQueue { queue, call } in &mut self.queues {
            if call.as_raw_fd() == events.fd() {
                let _ = call.read();
                queue.interrupt();
            }
        }
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        for VhostQueue { call, .. } in &self.queues {
            watch(ops, Events::new(call, EventSet::IN));
        }
    }
}

impl Drop for VhostWorker {
    fn drop(&mut self) {
        (self.stop)();
    }
}
