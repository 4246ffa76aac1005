//! Queues that the host's kernel works on by itself (vhost, Linux Documentation/driver-api/vhost): kicks and buffers never
//! reach hwvmm. Interrupts pass through it, so that masked messages wait as they must.

use super::worker::watch;
use super::{ActivateError, Virtqueue};
use crate::memory::Memory;
use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use std::io;
use std::os::fd::AsRawFd;
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// A queue in the kernel's hands, and the eventfd by which it says that buffers were used.
struct Relay {
    queue: Virtqueue,
    call: EventFd,
}

/// Hands the kernel's interrupts on; ends the backend when it goes.
pub(super) struct Vhost {
    /// Called when the guest is through with the device.
    stop: Box<dyn FnMut() + Send>,
    relays: Vec<Relay>,
    // The kernel uses it until `stop`.
    _memory: Memory,
}

fn failed(what: &'static str) -> impl Fn(vhost::Error) -> ActivateError {
    move |error| ActivateError::Io(what, io::Error::other(error.to_string()))
}

/// Tells the kernel of the guest's memory and of `queues`, the backend's rings from 0.
pub(super) fn connect(
    backend: &impl VhostBackend,
    memory: &Memory,
    features: u64,
    queues: &[Virtqueue],
) -> Result<Vec<EventFd>, ActivateError> {
    backend.set_owner().map_err(failed("own the vhost backend"))?;
    let known = backend.get_features().map_err(failed("ask the vhost backend"))?;
    backend.set_features(features & known).map_err(failed("set the vhost backend's features"))?;
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
    backend.set_mem_table(&regions).map_err(failed("give the vhost backend the guest's memory"))?;
    let mut calls = Vec::new();
    for (index, queue) in queues.iter().enumerate() {
        let set_up = failed("give the vhost backend a ring");
        let [desc_table_addr, avail_ring_addr, used_ring_addr] = queue.addresses();
        let (queue_max_size, queue_size) = (queue.size(), queue.size());
        let ring = VringConfigData {
            queue_max_size,
            queue_size,
            flags: 0,
            desc_table_addr,
            used_ring_addr,
            avail_ring_addr,
            log_addr: None,
        };
        let call = EventFd::new(EFD_NONBLOCK).map_err(|error| ActivateError::Io("make an eventfd", error))?;
        backend.set_vring_num(index, queue.size()).map_err(&set_up)?;
        backend.set_vring_addr(index, &ring).map_err(&set_up)?;
        backend.set_vring_base(index, 0).map_err(&set_up)?;
        backend.set_vring_call(index, &call).map_err(&set_up)?;
        backend.set_vring_kick(index, queue.kick()).map_err(&set_up)?;
        calls.push(call);
    }
    Ok(calls)
}

impl Vhost {
    /// Relays for `queues`, whose interrupts come on `calls`. `stop` ends the backend.
    pub(super) fn new(
        queues: Vec<Virtqueue>,
        calls: Vec<EventFd>,
        memory: Memory,
        stop: impl FnMut() + Send + 'static,
    ) -> Self {
        let relays = queues.into_iter().zip(calls).map(|(queue, call)| Relay { queue, call }).collect();
        Self { stop: Box::new(stop), relays, _memory: memory }
    }
}

impl MutEventSubscriber for Vhost {
    fn process(&mut self, events: Events, _ops: &mut EventOps<'_>) {
        for relay in &mut self.relays {
            if relay.call.as_raw_fd() == events.fd() {
                let _ = relay.call.read();
                relay.queue.interrupt();
            }
        }
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        for relay in &self.relays {
            watch(ops, Events::new(&relay.call, EventSet::IN));
        }
    }
}

impl Drop for Vhost {
    fn drop(&mut self) {
        (self.stop)();
    }
}
