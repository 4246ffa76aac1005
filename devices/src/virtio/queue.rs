//! Virtqueues (virtio 1.3 §2.7) on top of the crate virtio-queue. A device pops descriptor chains, reads and
//! writes their buffers and pushes them to the used ring. Both sides are notified only when they have asked for it.

use super::busy_poll::BusyPoller;
use super::chain::{Chain, ChainLimits, Descriptors, read_chain};
use super::interrupt::DeviceInterrupt;
use super::notify_coalescer::{MAX_WAIT, NotifyCoalescer};
use super::position::{LastPosition, QueuePosition};
use super::round::Round;
use crate::error::chain as error_chain;
use crate::memory::{BufferError, Memory, read_u16};
use serde::{Deserialize, Serialize};
use std::error::Error as StdError;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};
use std::time::{Duration, Instant};
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

/// Guest physical addresses of a queue's rings.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RingAddresses {
    /// The descriptor table (virtio 1.3 §2.7.5).
    pub descriptor_table: u64,
    /// The available ring (virtio 1.3 §2.7.6).
    pub available_ring: u64,
    /// The used ring (virtio 1.3 §2.7.8).
    pub used_ring: u64,
}

/// What a queue is made of.
pub(super) struct QueueSetup {
    pub(super) index: u16,
    pub(super) queue: Queue,
    pub(super) memory: Memory,
    pub(super) kick: Arc<EventFd>,
    pub(super) interrupt: Arc<DeviceInterrupt>,
    pub(super) counts: Arc<QueueCounts>,
    /// Name of the device, for log messages.
    pub(super) name: Arc<str>,
    /// The most bytes of a chain.
    pub(super) max_chain_bytes: u32,
    /// Set when the worker is to do nothing more, as the driver resets the device or the run ends.
    pub(super) abort: Arc<AtomicBool>,
    /// Told where the queue was when it is dropped.
    pub(super) last: Arc<LastPosition>,
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
    limits: ChainLimits,
    abort: Arc<AtomicBool>,
    last: Arc<LastPosition>,
    /// See [`Self::abandon`].
    is_abandoned: bool,
    /// The chains that the device has taken and not used, by their heads, in this order.
    taken: Vec<u16>,
    round: Round,
    /// The driver broke the queue; it is not used until a reset.
    broken: bool,
    /// When the first chain was used since the last used buffer notification; `None` where there is none.
    unsignalled_since: Option<Instant>,
    /// `None`: notifications are not coalesced.
    coalescer: Option<NotifyCoalescer>,
    /// `None`: the available ring is not polled.
    busy_poller: Option<BusyPoller>,
}

impl Virtqueue {
    pub(super) fn new(setup: QueueSetup) -> Self {
        let QueueSetup { index, queue, memory, kick, interrupt, counts, name, max_chain_bytes, abort, last } = setup;
        let limits = ChainLimits { descriptors: queue.size(), bytes: max_chain_bytes };
        let round = Round::new(queue.size());
        Self {
            index,
            queue,
            memory,
            kick,
            interrupt,
            counts,
            name,
            limits,
            abort,
            last,
            is_abandoned: false,
            taken: Vec::new(),
            round,
            broken: false,
            unsignalled_since: None,
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

    /// Returns the flag that is set when the worker is to do nothing more, for a device whose work for a chain can take long.
    #[must_use]
    pub fn abort_flag(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.abort)
    }

    /// Returns true if the driver has made chains available that the device has not taken.
    #[must_use]
    pub fn has_available(&self) -> bool {
        let available = self.queue.avail_idx(&*self.memory, Ordering::Acquire);
        !self.broken && available.is_ok_and(|available| available.0 != self.queue.next_avail())
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

    /// Reads the kick eventfd, counts the kicks, and starts the next round. Must be called when [`Virtqueue::kick`] is readable,
    /// before [`Virtqueue::pop`].
    pub fn take_kicks(&mut self) {
        let kicks = self.round.restart(self.kick.read().unwrap_or(0));
        if kicks == 0 {
            return;
        }
        QueueCounts::add(&self.counts.kicks, kicks);
        if let Some(coalescer) = &mut self.coalescer {
            coalescer.kicked();
        }
        if let Some(poller) = &mut self.busy_poller {
            poller.kicked();
        }
    }

    /// Returns the next available chain, or `None` where there is none or where the round has ended: the worker is then woken
    /// again soon. A malformed ring or chain breaks the queue: the driver sees `DEVICE_NEEDS_RESET`.
    pub fn pop<'m>(&mut self, memory: &'m Memory) -> Option<Chain<'m>> {
        if self.is_done() {
            return None;
        }
        let descriptors = match self.queue.iter_next(memory) {
            Ok(descriptors) => descriptors?,
            Err(error) => {
                self.fail(&error);
                return None;
            }
        };
        if !self.may_go_on() {
            self.step_back();
            return None;
        }
        match read_chain(descriptors, memory, self.limits) {
            Ok(chain) => {
                self.taken.push(chain.head);
                Some(chain)
            }
            Err(error) => {
                self.fail(&error);
                None
            }
        }
    }

    /// Returns true if the worker is to do nothing more for the queue now: it is broken, the round has ended, or the device is
    /// being reset.
    fn is_done(&self) -> bool {
        self.broken || self.round.has_ended() || self.abort.load(Ordering::Relaxed)
    }

    /// Takes a step of the round. Returns false where none is left: the round ends, and the queue kicks itself, so that the
    /// event loop wakes the worker again.
    fn may_go_on(&mut self) -> bool {
        if self.round.step() {
            return true;
        }
        self.round.end();
        if let Err(error) = self.kick.write(1) {
            log::debug!("{}: queue {} cannot kick itself: {error}", self.name, self.index);
        }
        false
    }

    /// Makes the chain that was popped last available again, as the next one.
    pub fn undo_pop(&mut self) {
        self.taken.pop();
        self.step_back();
    }

    fn step_back(&mut self) {
        self.queue.set_next_avail(self.queue.next_avail().wrapping_sub(1));
    }

    /// Adds the chain `head` to the used ring, with `len` bytes written to it. [`Virtqueue::notify`] tells the driver; it is
    /// called here where the driver has waited for `MAX_WAIT`, as the worker may have many more chains to use before.
    pub fn push(&mut self, head: u16, len: u32) {
        if self.broken {
            return;
        }
        if let Some(at) = self.taken.iter().position(|taken| *taken == head) {
            self.taken.remove(at);
        }
        QueueCounts::add(&self.counts.requests, 1);
        if let Err(error) = self.queue.add_used(&*self.memory, head, len) {
            self.fail(&error);
            return;
        }
        let since = *self.unsignalled_since.get_or_insert_with(Instant::now);
        if since.elapsed() >= MAX_WAIT {
            self.notify();
        }
    }

    /// Sends a used buffer notification, where chains were used since the last one and the driver has not disabled it. Where
    /// the round has ended, that is left to the next one, which follows at once, but for no longer than `MAX_WAIT` since the
    /// first of these chains was used.
    pub fn notify(&mut self) {
        let Some(since) = self.unsignalled_since else { return };
        if self.broken || self.abort.load(Ordering::Relaxed) {
            return;
        }
        if self.round.has_ended() && since.elapsed() < MAX_WAIT {
            return;
        }
        self.unsignalled_since = None;
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

    /// Asks the driver to kick again. Returns true if chains became available meanwhile, without a kick. Where the round has
    /// ended, that is left to the next one.
    pub fn enable_notification(&mut self) -> bool {
        if self.is_done() {
            return false;
        }
        match self.queue.enable_notification(&*self.memory) {
            Ok(available) => available && self.may_go_on(),
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
        if self.is_done() {
            return false;
        }
        let (queue, memory) = (&self.queue, &self.memory);
        let Some(poller) = &mut self.busy_poller else { return false };
        let found = poller.poll(|| {
            queue.avail_idx(&**memory, Ordering::Acquire).is_ok_and(|available| available.0 != queue.next_avail())
        });
        found && self.may_go_on()
    }

    /// Makes [`Virtqueue::wait_for_batch`] never wait, for a peer that takes a delay for packet loss.
    pub fn disable_coalescing(&mut self) {
        self.coalescer = None;
    }

    /// Waits a moment for more chains, where that has paid lately and where a used buffer notification is due, which it delays
    /// by `MAX_WAIT` at most. Returns true if chains are available. Notifications must be disabled ([`Virtqueue::disable_notification`]).
    pub fn wait_for_batch(&mut self) -> bool {
        let Some(since) = self.unsignalled_since else { return false };
        let left = MAX_WAIT.saturating_sub(since.elapsed());
        if self.is_done() || left.is_zero() {
            return false;
        }
        let (queue, memory) = (&self.queue, &self.memory);
        let Some(coalescer) = &mut self.coalescer else { return false };
        let found = coalescer.wait(left, || {
            queue.avail_idx(&**memory, Ordering::Acquire).is_ok_and(|available| available.0 != queue.next_avail())
        });
        found && self.may_go_on()
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

    /// Gives up the chains that were taken and not used, as the host does not say whether it has done them: it may still access their
    /// buffers. The device needs a reset.
    pub fn abandon(&mut self) {
        self.is_abandoned = true;
        self.broken = true;
        self.interrupt.set_needs_reset();
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

impl Drop for Virtqueue {
    fn drop(&mut self) {
        let (next_available, next_used) = (self.queue.next_avail(), self.queue.next_used());
        let taken = std::mem::take(&mut self.taken);
        // Those that the host may still do must not be done twice.
        let taken = if self.is_abandoned { Vec::new() } else { taken };
        self.last.set(QueuePosition { next_available, next_used, taken, is_abandoned: self.is_abandoned });
    }
}

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
