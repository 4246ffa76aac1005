//! Queues that a vhost backend in the host's kernel processes (Linux include/uapi/linux/vhost.h): kicks and buffers do not
//! reach hwvmm. Interrupts do, so that the transport can hold back those that the driver has masked.

use super::device::ActivateError;
use super::interrupt::DeviceInterrupt;
use super::queue::Virtqueue;
use super::worker::watch;
use crate::error::chain as error_chain;
use crate::memory::Memory;
use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Starts the backend with the queues, whose interrupts are to go to the eventfds.
type Start = Box<dyn FnMut(&[Virtqueue], &[EventFd]) -> Result<(), ActivateError> + Send>;

/// The worker of a vhost device: starts the backend, passes its interrupts on, and stops it when it is dropped.
pub(super) struct VhostWorker {
    start: Start,
    stop: Box<dyn FnMut() + Send>,
    queues: Vec<Virtqueue>,
    /// For each queue: readable when the backend has used buffers and the driver is to be interrupted (`VHOST_SET_VRING_CALL`).
    calls: Arc<Vec<EventFd>>,
    interrupt: Arc<DeviceInterrupt>,
    // The backend accesses guest memory until `stop` returns.
    _memory: Memory,
}

/// Makes the eventfds for the interrupts of `queues` queues.
///
/// # Errors
/// Returns the error of eventfd(2).
pub(super) fn new_calls(queues: usize) -> io::Result<Arc<Vec<EventFd>>> {
    (0..queues).map(|_| EventFd::new(EFD_NONBLOCK)).collect::<io::Result<Vec<_>>>().map(Arc::new)
}

/// Gives the backend, which must have an owner, guest memory, the negotiated `features` and `queues`, which become its rings
/// from index 0 on.
pub(super) fn connect(
    backend: &impl VhostBackend,
    memory: &Memory,
    features: u64,
    queues: &[Virtqueue],
    calls: &[EventFd],
) -> Result<(), ActivateError> {
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
    for (index, (queue, call)) in queues.iter().zip(calls).enumerate() {
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
        backend.set_vring_num(index, queue.size()).map_err(vring_error)?;
        backend.set_vring_addr(index, &config).map_err(vring_error)?;
        backend.set_vring_base(index, 0).map_err(vring_error)?;
        backend.set_vring_call(index, call).map_err(vring_error)?;
        backend.set_vring_kick(index, queue.kick()).map_err(vring_error)?;
    }
    Ok(())
}

impl VhostWorker {
    /// Makes the worker for `queues`, whose interrupts come by `calls`. `stop` must stop the backend.
    pub(super) fn new(
        queues: Vec<Virtqueue>,
        calls: Arc<Vec<EventFd>>,
        start: impl FnMut(&[Virtqueue], &[EventFd]) -> Result<(), ActivateError> + Send + 'static,
        stop: impl FnMut() + Send + 'static,
        interrupt: Arc<DeviceInterrupt>,
        memory: Memory,
    ) -> Self {
        Self { start: Box::new(start), stop: Box::new(stop), queues, calls, interrupt, _memory: memory }
    }
}

impl MutEventSubscriber for VhostWorker {
    fn process(&mut self, events: Events, _ops: &mut EventOps<'_>) {
        for (queue, call) in self.queues.iter_mut().zip(self.calls.iter()) {
            if call.as_raw_fd() == events.fd() {
                let _ = call.read();
                queue.interrupt();
            }
        }
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        if let Err(error) = (self.start)(&self.queues, &self.calls) {
            log::warn!("the device cannot start and needs a reset: {}", error_chain(&error));
            self.interrupt.set_needs_reset();
            return;
        }
        for call in self.calls.iter() {
            watch(ops, Events::new(call, EventSet::IN));
        }
    }
}

impl Drop for VhostWorker {
    fn drop(&mut self) {
        (self.stop)();
    }
}
