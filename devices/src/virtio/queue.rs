//! Virtqueues: the one room that knows virtio-queue. A device pops chains, fills them, pushes them back; notifications
//! in both directions are kept to what the other side asked for.

use super::Signals;
use super::busy_poll::Poller;
use super::notify_coalescer::NotifyCoalescer;
use crate::memory::{Buffers, Memory, read_u16};
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering, fence};
use std::time::Duration;
use virtio_bindings::bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{Queue, QueueT};
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::EventFd;

/// What happened on a queue. Kicks are exits (the kernel takes them, by ioeventfd); interrupts may be.
#[derive(Debug, Default)]
pub struct QueueCounts {
    /// Notifications by the driver.
    pub kicks: AtomicU64,
    /// Notifications of the driver.
    pub interrupts: AtomicU64,
    /// Chains used.
    pub requests: AtomicU64,
}

impl QueueCounts {
    fn add(counter: &AtomicU64, value: u64) {
        // One writer: the queue's worker. A reader sees a snapshot.
        counter.store(counter.load(Ordering::Relaxed) + value, Ordering::Relaxed);
    }
}

/// A chain of descriptors: what the device may read, then what it may write.
pub struct Chain<'m> {
    /// The first descriptor, which names the chain when it is given back.
    pub head: u16,
    /// Device-readable bytes.
    pub readable: Buffers<'m>,
    /// Device-writable bytes.
    pub writable: Buffers<'m>,
}

/// A queue that its driver set up.
pub struct Virtqueue {
    index: u16,
    queue: Queue,
    memory: Memory,
    kick: Arc<EventFd>,
    signals: Arc<Signals>,
    counts: Arc<QueueCounts>,
    name: Arc<str>,
    broken: bool,
    /// Chains pushed since the driver was last told.
    used_unsignalled: bool,
    /// `None`: never wait.
    coalescer: Option<NotifyCoalescer>,
    /// `None`: never look.
    poller: Option<Poller>,
}

impl Virtqueue {
    pub(super) fn new(
        index: u16,
        queue: Queue,
        memory: Memory,
        kick: Arc<EventFd>,
        signals: Arc<Signals>,
        counts: Arc<QueueCounts>,
        name: Arc<str>,
    ) -> Self {
        Self {
            index,
            queue,
            memory,
            kick,
            signals,
            counts,
            name,
            broken: false,
            used_unsignalled: false,
            coalescer: Some(NotifyCoalescer::default()),
            poller: None,
        }
    }

    /// Readable when the driver kicked.
    #[must_use]
    pub fn kick(&self) -> &EventFd {
        &self.kick
    }

    /// Guest memory; a clone of it is what [`Virtqueue::pop`] wants.
    #[must_use]
    pub fn memory(&self) -> Memory {
        self.memory.clone()
    }

    /// The number of entries.
    #[must_use]
    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    /// The ring's addresses, for a backend that works on it by itself: descriptors, available, used.
    #[must_use]
    pub fn addresses(&self) -> [u64; 3] {
        [self.queue.desc_table(), self.queue.avail_ring(), self.queue.used_ring()]
    }

    /// Takes the kicks there are; call it when [`Virtqueue::kick`] is readable, before looking for chains.
    pub fn take_kicks(&mut self) {
        if let Ok(kicks) = self.kick.read() {
            QueueCounts::add(&self.counts.kicks, kicks);
            if let Some(coalescer) = &mut self.coalescer {
                coalescer.kicked();
            }
            if let Some(poller) = &mut self.poller {
                poller.kicked();
            }
        }
    }

    /// The next chain, if the driver has made one available. A chain that is malformed breaks the queue: the device
    /// then needs a reset.
    pub fn pop<'m>(&mut self, memory: &'m Memory) -> Option<Chain<'m>> {
        if self.broken {
            return None;
        }
        let popped = match self.queue.iter_next(memory) {
            Ok(popped) => popped?,
            Err(error) => {
                self.fail(&error.to_string());
                return None;
            }
        };
        match gather(popped, memory) {
            Ok(chain) => Some(chain),
            Err(error) => {
                self.fail(&error.to_string());
                None
            }
        }
    }

    /// Puts the chain that was popped last back to the front of the queue.
    pub fn undo_pop(&mut self) {
        self.queue.set_next_avail(self.queue.next_avail().wrapping_sub(1));
    }

    /// Gives a chain back with `len` bytes written to it. The driver learns of it with [`Virtqueue::notify`].
    pub fn push(&mut self, head: u16, len: u32) {
        if self.broken {
            return;
        }
        QueueCounts::add(&self.counts.requests, 1);
        self.used_unsignalled = true;
        if let Err(error) = self.queue.add_used(&*self.memory, head, len) {
            self.fail(&error.to_string());
        }
    }

    /// Interrupts the driver, where chains were given back since the last time and it wants to know.
    pub fn notify(&mut self) {
        if self.broken || !std::mem::take(&mut self.used_unsignalled) {
            return;
        }
        if let Some(coalescer) = &mut self.coalescer {
            coalescer.signalled();
        }
        if let Some(poller) = &mut self.poller {
            poller.signalled();
        }
        match self.wants_interrupt() {
            Ok(true) => {
                QueueCounts::add(&self.counts.interrupts, 1);
                self.signals.used(self.index);
            }
            Ok(false) => {}
            Err(error) => self.fail(&error.to_string()),
        }
    }

    /// Interrupts the driver, where somebody else keeps the ring and has found out that it wants to know.
    pub fn interrupt(&mut self) {
        QueueCounts::add(&self.counts.interrupts, 1);
        self.signals.used(self.index);
    }

    /// virtio-queue does the event index and leaves VRING_AVAIL_F_NO_INTERRUPT (virtio 1.3 §2.7.7.2) to others.
    fn wants_interrupt(&mut self) -> io::Result<bool> {
        if self.queue.event_idx_enabled() {
            return self.queue.needs_notification(&*self.memory).map_err(io::Error::other);
        }
        fence(Ordering::SeqCst);
        let flags = read_u16(&self.memory, GuestAddress(self.queue.avail_ring()))?;
        Ok(u32::from(flags) & VRING_AVAIL_F_NO_INTERRUPT == 0)
    }

    /// Asks the driver not to kick: somebody looks anyway.
    pub fn disable_notification(&mut self) {
        if !self.broken
            && let Err(error) = self.queue.disable_notification(&*self.memory)
        {
            self.fail(&error.to_string());
        }
    }

    /// Asks the driver to kick again. True where chains came in meanwhile: look again.
    pub fn enable_notification(&mut self) -> bool {
        if self.broken {
            return false;
        }
        match self.queue.enable_notification(&*self.memory) {
            Ok(more) => more,
            Err(error) => {
                self.fail(&error.to_string());
                false
            }
        }
    }

    /// From now on the queue is looked at for up to `limit` after the driver was told, where that pays, in place of a kick.
    pub fn set_busy_poll(&mut self, limit: Duration) {
        self.poller = Some(Poller::new(limit));
    }

    /// Whether the queue is looked at (see [`Virtqueue::set_busy_poll`]).
    #[must_use]
    pub fn polls(&self) -> bool {
        self.poller.is_some()
    }

    /// Looks for more chains for a moment, where that pays; true where there are some. The driver must have been asked not to
    /// kick ([`Virtqueue::disable_notification`]), and told of what is done.
    pub fn busy_poll(&mut self) -> bool {
        if self.broken {
            return false;
        }
        let (queue, memory) = (&self.queue, &self.memory);
        let Some(poller) = &mut self.poller else { return false };
        poller.look(|| {
            queue.avail_idx(&**memory, Ordering::Acquire).is_ok_and(|available| available.0 != queue.next_avail())
        })
    }

    /// From now on the driver is told at once: for work whose other end takes a pause for trouble.
    pub fn disable_coalescing(&mut self) {
        self.coalescer = None;
    }

    /// Waits a moment for more chains, where that has paid lately and where something is done that the driver does not
    /// know of; true where there are some. The driver must have been asked not to kick ([`Virtqueue::disable_notification`]).
    pub fn wait_for_batch(&mut self) -> bool {
        if self.broken || !self.used_unsignalled {
            return false;
        }
        let (queue, memory) = (&self.queue, &self.memory);
        let Some(coalescer) = &mut self.coalescer else { return false };
        coalescer.wait_for(|| {
            queue.avail_idx(&**memory, Ordering::Acquire).is_ok_and(|available| available.0 != queue.next_avail())
        })
    }

    /// As [`Virtqueue::enable_notification`], for chains behind all that are there now: for a device that has looked at those, and
    /// needs more of them at once.
    pub fn enable_notification_beyond_available(&mut self) -> bool {
        let next = self.queue.next_avail();
        match self.queue.avail_idx(&*self.memory, Ordering::Acquire) {
            Ok(all) => self.queue.set_next_avail(all.0),
            Err(error) => {
                self.fail(&error.to_string());
                return false;
            }
        }
        let more = self.enable_notification();
        self.queue.set_next_avail(next);
        more
    }

    /// The loop that most devices are: takes the kicks, has `each` chain answered (with the number of bytes written),
    /// gives it back, tells the driver where it wants to be told. `None` from `each` leaves the chain for later.
    pub fn serve(&mut self, mut each: impl FnMut(&mut Chain<'_>) -> Option<u32>) {
        self.take_kicks();
        let memory = self.memory();
        loop {
            self.disable_notification();
            while let Some(mut chain) = self.pop(&memory) {
                let Some(len) = each(&mut chain) else {
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

    /// Says that the driver broke the rules: nothing more is done on this queue until a reset.
    pub fn fail(&mut self, what: &str) {
        if !std::mem::replace(&mut self.broken, true) {
            log::warn!("{}, queue {}: {what}; the device needs a reset", self.name, self.index);
            self.signals.needs_reset();
        }
    }
}

type Popped<'m> = virtio_queue::DescriptorChain<&'m vm_memory::GuestMemoryMmap>;

/// One chain off a queue, with ring errors told apart from "none".
trait IterNext {
    fn iter_next<'m>(&mut self, memory: &'m Memory) -> Result<Option<Popped<'m>>, virtio_queue::Error>;
}

impl IterNext for Queue {
    fn iter_next<'m>(&mut self, memory: &'m Memory) -> Result<Option<Popped<'m>>, virtio_queue::Error> {
        use virtio_queue::QueueOwnedT;
        let mut chains = self.iter(&**memory)?;
        Ok(chains.next())
    }
}

/// Walks a chain once. virtio-queue ends a walk early, without a word, at a loop, at an index out of range and at a
/// table inside a table: the last descriptor that it gives then still says that another follows.
fn gather<'m>(popped: Popped<'m>, memory: &'m Memory) -> io::Result<Chain<'m>> {
    let mut chain = Chain { head: popped.head_index(), readable: Buffers::default(), writable: Buffers::default() };
    let mut ended = false;
    let mut seen_writable = false;
    for descriptor in popped {
        ended = !descriptor.has_next();
        if descriptor.is_write_only() {
            seen_writable = true;
            chain.writable.push(memory, descriptor.addr(), descriptor.len())?;
        } else if seen_writable {
            return Err(io::Error::other("a device-readable descriptor behind a device-writable one"));
        } else {
            chain.readable.push(memory, descriptor.addr(), descriptor.len())?;
        }
    }
    if ended { Ok(chain) } else { Err(io::Error::other("a descriptor chain without an end")) }
}
