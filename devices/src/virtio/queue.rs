//! Virtqueues (virtio 1.3 §2.7); the only file that uses the crate virtio-queue. A device pops descriptor chains, reads and
//! writes their buffers and pushes them to the used ring. Both sides are notified only when they have asked for it.

use super::busy_poll::BusyPoller;
use super::interrupt::DeviceInterrupt;
use super::notify_coalescer::NotifyCoalescer;
use crate::error::chain as error_chain;
use crate::memory::{BufferError, Buffers, Memory, read_u16};
use std::error::Error as StdError;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering, fence};
use std::time::Duration;
use thiserror::Error;
use virtio_bindings::bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{Queue, QueueT};
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::EventFd;

/// Counters of a queue. A kick is a VM exit, which KVM handles without userspace where an ioeventfd is registered; an
/// interrupt may cause VM exits.
#[derive(Debug, Default)]
pub struct QueueCounts {
    /// Number of kicks: available buffer notifications by the driver.
    pub kicks: AtomicU64,
    /// Number of used buffer notifications to the driver.
    pub interrupts: AtomicU64,
    /// Number of descriptor chains that the device used.
    pub requests: AtomicU64,
}

impl QueueCounts {
    fn add(counter: &AtomicU64, value: u64) {
        // Only the queue's worker writes; readers on other threads see a recent value.
        counter.store(counter.load(Ordering::Relaxed) + value, Ordering::Relaxed);
    }
}

/// A descriptor chain (virtio 1.3 §2.7.5): device-readable buffers, then device-writable ones.
pub struct Chain<'m> {
    /// Index of the first descriptor, which identifies the chain in the used ring.
    pub head: u16,
    /// The device-readable buffers.
    pub readable: Buffers<'m>,
    /// The device-writable buffers.
    pub writable: Buffers<'m>,
}

/// Guest physical addresses of a queue's rings.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RingAddresses {
    /// The descriptor table (virtio 1.3 §2.7.5).
    pub descriptor_table: u64,
    /// The available ring (virtio 1.3 §2.7.6).
    pub available_ring: u64,
    /// The used ring (virtio 1.3 §2.7.8).
    pub used_ring: u64,
}

/// A descriptor chain does not follow virtio 1.3 §2.7.
#[derive(Debug, Error)]
enum ChainError {
    #[error("a device-readable descriptor follows a device-writable one")]
    ReadableAfterWritable,
    #[error("a descriptor chain has a loop, an index out of range or a nested indirect table")]
    Unterminated,
    #[error(transparent)]
    Buffer(#[from] BufferError),
}

/// A queue that its driver enabled.
pub struct Virtqueue {
    index: u16,
    queue: Queue,
    memory: Memory,
    kick: Arc<EventFd>,
    interrupt: Arc<DeviceInterrupt>,
    counts: Arc<QueueCounts>,
    name: Arc<str>,
    /// The driver broke the queue; it is not used until a reset.
    broken: bool,
    /// Chains were used since the last used buffer notification.
    used_unsignalled: bool,
    /// `None`: notifications are not coalesced.
    coalescer: Option<NotifyCoalescer>,
    /// `None`: the available ring is not polled.
    busy_poller: Option<BusyPoller>,
}

impl Virtqueue {
    pub(super) fn new(
        index: u16,
        queue: Queue,
        memory: Memory,
        kick: Arc<EventFd>,
        interrupt: Arc<DeviceInterrupt>,
        counts: Arc<QueueCounts>,
        name: Arc<str>,
    ) -> Self {
        Self {
            index,
            queue,
            memory,
            kick,
            interrupt,
            counts,
            name,
            broken: false,
            used_unsignalled: false,
            coalescer: Some(NotifyCoalescer::default()),
            busy_poller: None,
        }
    }

    /// Returns the eventfd that is readable when the driver has kicked.
    #[must_use]
    pub fn kick(&self) -> &EventFd {
        &self.kick
    }

    /// Returns a clone of guest memory, to pass to [`Virtqueue::pop`].
    #[must_use]
    pub fn memory(&self) -> Memory {
        self.memory.clone()
    }

    /// Returns the queue's size in descriptors.
    #[must_use]
    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    /// Returns where the rings are, for a vhost backend that accesses them itself.
    #[must_use]
    pub fn rings(&self) -> RingAddresses {
        RingAddresses {
            descriptor_table: self.queue.desc_table(),
            available_ring: self.queue.avail_ring(),
            used_ring: self.queue.used_ring(),
        }
    }

    /// Reads the kick eventfd and counts the kicks. Must be called when [`Virtqueue::kick`] is readable, before
    /// [`Virtqueue::pop`].
    pub fn take_kicks(&mut self) {
        if let Ok(kicks) = self.kick.read() {
            QueueCounts::add(&self.counts.kicks, kicks);
            if let Some(coalescer) = &mut self.coalescer {
                coalescer.kicked();
            }
            if let Some(poller) = &mut self.busy_poller {
                poller.kicked();
            }
        }
    }

    /// Returns the next available chain, or `None` where there is none. A malformed ring or chain breaks the queue: the
    /// driver sees `DEVICE_NEEDS_RESET`.
    pub fn pop<'m>(&mut self, memory: &'m Memory) -> Option<Chain<'m>> {
        if self.broken {
            return None;
        }
        let descriptors = match self.queue.iter_next(memory) {
            Ok(descriptors) => descriptors?,
            Err(error) => {
                self.fail(&error);
                return None;
            }
        };
        match read_chain(descriptors, memory) {
            Ok(chain) => Some(chain),
            Err(error) => {
                self.fail(&error);
                None
            }
        }
    }

    /// Makes the chain that was popped last available again, as the next one.
    pub fn undo_pop(&mut self) {
        self.queue.set_next_avail(self.queue.next_avail().wrapping_sub(1));
    }

    /// Adds the chain `head` to the used ring, with `len` bytes written to it. [`Virtqueue::notify`] tells the driver.
    pub fn push(&mut self, head: u16, len: u32) {
        if self.broken {
            return;
        }
        QueueCounts::add(&self.counts.requests, 1);
        self.used_unsignalled = true;
        if let Err(error) = self.queue.add_used(&*self.memory, head, len) {
            self.fail(&error);
        }
    }

    /// Sends a used buffer notification, where chains were used since the last one and the driver has not disabled it.
    pub fn notify(&mut self) {
        if self.broken || !std::mem::take(&mut self.used_unsignalled) {
            return;
        }
        if let Some(coalescer) = &mut self.coalescer {
            coalescer.signalled();
        }
        if let Some(poller) = &mut self.busy_poller {
            poller.signalled();
        }
        let needed = if self.queue.event_idx_enabled() {
            self.queue.needs_notification(&*self.memory).map_err(|error| self.fail(&error))
        } else {
            self.interrupts_enabled().map_err(|error| self.fail(&error))
        };
        if needed == Ok(true) {
            self.interrupt();
        }
    }

    /// Sends a used buffer notification unconditionally, for a vhost backend that has decided that one is needed.
    pub fn interrupt(&mut self) {
        QueueCounts::add(&self.counts.interrupts, 1);
        self.interrupt.signal_used_queue(self.index);
    }

    /// Returns true if the driver has not set `VRING_AVAIL_F_NO_INTERRUPT` (virtio 1.3 §2.7.7), which virtio-queue does not
    /// check.
    fn interrupts_enabled(&self) -> Result<bool, BufferError> {
        fence(Ordering::SeqCst);
        let flags = read_u16(&self.memory, GuestAddress(self.queue.avail_ring()))?;
        Ok(u32::from(flags) & VRING_AVAIL_F_NO_INTERRUPT == 0)
    }

    /// Asks the driver not to kick, while the device processes the available ring.
    pub fn disable_notification(&mut self) {
        if !self.broken
            && let Err(error) = self.queue.disable_notification(&*self.memory)
        {
            self.fail(&error);
        }
    }

    /// Asks the driver to kick again. Returns true if chains became available meanwhile, without a kick.
    pub fn enable_notification(&mut self) -> bool {
        if self.broken {
            return false;
        }
        match self.queue.enable_notification(&*self.memory) {
            Ok(available) => available,
            Err(error) => {
                self.fail(&error);
                false
            }
        }
    }

    /// Lets [`Virtqueue::busy_poll`] poll for up to `limit` after a used buffer notification.
    pub fn set_busy_poll(&mut self, limit: Duration) {
        self.busy_poller = Some(BusyPoller::new(limit));
    }

    /// Returns true if the available ring may be polled (see [`Virtqueue::set_busy_poll`]).
    #[must_use]
    pub fn may_busy_poll(&self) -> bool {
        self.busy_poller.is_some()
    }

    /// Polls the available ring for a moment, where that has paid lately. Returns true if chains are available.
    /// Notifications must be disabled ([`Virtqueue::disable_notification`]) and sent ([`Virtqueue::notify`]) before.
    pub fn busy_poll(&mut self) -> bool {
        if self.broken {
            return false;
        }
        let (queue, memory) = (&self.queue, &self.memory);
        let Some(poller) = &mut self.busy_poller else { return false };
        poller.poll(|| {
            queue.avail_idx(&**memory, Ordering::Acquire).is_ok_and(|available| available.0 != queue.next_avail())
        })
    }

    /// Makes [`Virtqueue::wait_for_batch`] never wait, for a peer that takes a delay for packet loss.
    pub fn disable_coalescing(&mut self) {
        self.coalescer = None;
    }

    /// Waits a moment for more chains, where that has paid lately and where a used buffer notification is due. Returns true
    /// if chains are available. Notifications must be disabled ([`Virtqueue::disable_notification`]).
    pub fn wait_for_batch(&mut self) -> bool {
        if self.broken || !self.used_unsignalled {
            return false;
        }
        let (queue, memory) = (&self.queue, &self.memory);
        let Some(coalescer) = &mut self.coalescer else { return false };
        coalescer.wait(|| {
            queue.avail_idx(&**memory, Ordering::Acquire).is_ok_and(|available| available.0 != queue.next_avail())
        })
    }

    /// As [`Virtqueue::enable_notification`], but for chains beyond those that are available now: for a device that needs more
    /// buffers at once than the available chains have.
    pub fn enable_notification_beyond_available(&mut self) -> bool {
        let next = self.queue.next_avail();
        match self.queue.avail_idx(&*self.memory, Ordering::Acquire) {
            Ok(available) => self.queue.set_next_avail(available.0),
            Err(error) => {
                self.fail(&error);
                return false;
            }
        }
        let available = self.enable_notification();
        self.queue.set_next_avail(next);
        available
    }

    /// Handles all available chains, the loop of most devices: reads the kick eventfd, calls `handle` for each chain, pushes
    /// it with the number of written bytes that `handle` returns, and notifies the driver. Where `handle` returns `None`, the
    /// chain stays available and the loop ends.
    pub fn serve(&mut self, mut handle: impl FnMut(&mut Chain<'_>) -> Option<u32>) {
        self.take_kicks();
        let memory = self.memory();
        loop {
            self.disable_notification();
            while let Some(mut chain) = self.pop(&memory) {
                let Some(len) = handle(&mut chain) else {
                    self.undo_pop();
                    self.notify();
                    return;
                };
                self.push(chain.head, len);
            }
            if self.wait_for_batch() {
                continue;
            }
            self.notify();
            if !self.busy_poll() && !self.enable_notification() {
                break;
            }
        }
    }

    /// Stops the queue until a reset, as the driver violated the specification.
    fn fail(&mut self, error: &dyn StdError) {
        if !std::mem::replace(&mut self.broken, true) {
            let error = error_chain(error);
            log::warn!("{}: queue {} is broken and the device needs a reset: {error}", self.name, self.index);
            self.interrupt.set_needs_reset();
        }
    }
}

type Descriptors<'m> = virtio_queue::DescriptorChain<&'m vm_memory::GuestMemoryMmap>;

/// Pops one chain, and distinguishes a ring error from an empty ring.
trait IterNext {
    fn iter_next<'m>(&mut self, memory: &'m Memory) -> Result<Option<Descriptors<'m>>, virtio_queue::Error>;
}

impl IterNext for Queue {
    fn iter_next<'m>(&mut self, memory: &'m Memory) -> Result<Option<Descriptors<'m>>, virtio_queue::Error> {
        use virtio_queue::QueueOwnedT;
        let mut chains = self.iter(&**memory)?;
        Ok(chains.next())
    }
}

/// Collects the buffers of a chain. virtio-queue ends its iteration without an error at a loop, at an index out of range and
/// at a nested indirect table; the last descriptor then still has `VIRTQ_DESC_F_NEXT` set.
fn read_chain<'m>(descriptors: Descriptors<'m>, memory: &'m Memory) -> Result<Chain<'m>, ChainError> {
    let mut chain =
        Chain { head: descriptors.head_index(), readable: Buffers::default(), writable: Buffers::default() };
    let mut ended = false;
    let mut seen_writable = false;
    for descriptor in descriptors {
        ended = !descriptor.has_next();
        if descriptor.is_write_only() {
            seen_writable = true;
            chain.writable.push(memory, descriptor.addr(), descriptor.len())?;
        } else if seen_writable {
            return Err(ChainError::ReadableAfterWritable);
        } else {
            chain.readable.push(memory, descriptor.addr(), descriptor.len())?;
        }
    }
    if ended { Ok(chain) } else { Err(ChainError::Unterminated) }
}
