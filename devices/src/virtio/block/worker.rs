//! One queue of a disk at work.

use super::engine::{Engine, Started};
use super::image::Image;
use super::request::{Limits, Operation, Refused, Request, Status, parse};
use super::{ID_BYTES, MAX_ERASE_SECTORS, WhenFull};
use crate::memory::{Buffers, Held};
use crate::virtio::worker::watch;
use crate::virtio::{Chain, Signals, Virtqueue};
use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use std::io;
use std::sync::Arc;
use std::time::Duration;
use vmm_sys_util::timerfd::TimerFd;

/// How often the disk's size is looked at, and a full host disk tried again.
const TICK: Duration = Duration::from_secs(4);

const KICK: u32 = 0;
const DONE: u32 = 1;
const TIMER: u32 = 2;

/// A request that is not answered yet.
struct Open {
    head: u16,
    operation: Operation,
    /// All of its data, for trying again.
    data: Held,
    /// Bytes that the device will have written, the status with them.
    written: u32,
    status: Held,
}

pub(super) struct QueueWorker {
    queue: Virtqueue,
    image: Arc<Image>,
    engine: Engine,
    id: [u8; ID_BYTES],
    when_full: WhenFull,
    open: Vec<Option<Open>>,
    free: Vec<usize>,
    /// Requests that wait for room on the host's disk.
    waiting: Vec<usize>,
    /// The queue was left with chains in it, for want of room on the ring.
    stalled: bool,
    watch_size: Option<Arc<Signals>>,
    timer: TimerFd,
}

impl QueueWorker {
    /// # Errors
    /// Where no timer is to be had.
    pub(super) fn new(
        queue: Virtqueue,
        image: Arc<Image>,
        engine: Engine,
        id: [u8; ID_BYTES],
        when_full: WhenFull,
        watch_size: Option<Arc<Signals>>,
    ) -> io::Result<Self> {
        let mut timer = TimerFd::new()?;
        if watch_size.is_some() {
            timer.reset(TICK, Some(TICK))?;
        }
        let (open, free, waiting) = (Vec::new(), Vec::new(), Vec::new());
        Ok(Self { queue, image, engine, id, when_full, open, free, waiting, stalled: false, watch_size, timer })
    }

    fn limits(&self) -> Limits {
        Limits {
            bytes: self.image.bytes(),
            read_only: self.image.is_read_only(),
            max_erase_sectors: MAX_ERASE_SECTORS,
            block_bytes: u64::from(self.image.block_bytes()),
        }
    }

    fn serve(&mut self) {
        let memory = self.queue.memory();
        self.stalled = false;
        loop {
            self.queue.disable_notification();
            while let Some(mut chain) = self.queue.pop(&memory) {
                if !self.take(&mut chain, &memory) {
                    self.queue.undo_pop();
                    self.stalled = true;
                    break;
                }
            }
            if let Some(ring) = self.engine.ring() {
                ring.submit();
            }
            // What the host had at hand is done by now: no need to wait for its event.
            self.reap();
            if !self.stalled && self.queue.wait_for_batch() {
                continue;
            }
            self.queue.notify();
            // With requests at the host, what those bring must not wait.
            let idle = self.engine.ring().is_none_or(|ring| ring.is_idle());
            if !self.stalled && idle && self.queue.busy_poll() {
                continue;
            }
            // Stalled: the next completion looks again; the driver need not kick.
            if self.stalled || !self.queue.enable_notification() {
                return;
            }
        }
    }

    /// Starts what a chain asks for. False where there is no room for it now.
    fn take(&mut self, chain: &mut Chain<'_>, memory: &crate::memory::Memory) -> bool {
        let head = chain.head;
        match parse(chain, self.limits()) {
            Err(Refused { status, place }) => {
                let len = u32::from(place.is_some());
                if let Some(mut place) = place {
                    place.write(&[status as u8]);
                }
                self.queue.push(head, len);
                true
            }
            Ok(Request { operation, mut data, mut status }) => {
                if operation == Operation::Id {
                    let written = data.write(&self.id);
                    status.write(&[Status::Ok as u8]);
                    self.queue.push(head, u32::try_from(written + 1).unwrap_or(0));
                    return true;
                }
                let written = if matches!(operation, Operation::Read { .. }) { data.len() } else { 0 };
                let open = Open {
                    head,
                    operation,
                    data: data.hold(memory),
                    written: u32::try_from(written + 1).unwrap_or(u32::MAX),
                    status: status.hold(memory),
                };
                let token = self.free.pop().unwrap_or(self.open.len());
                if token == self.open.len() {
                    self.open.push(None);
                }
                self.start(token, open)
            }
        }
    }

    /// Starts or starts again. False where the ring is full.
    fn start(&mut self, token: usize, open: Open) -> bool {
        match self.engine.start(open.operation, open.data.clone(), token) {
            Ok(Started::Done(result)) => {
                self.open[token] = Some(open);
                self.finish(token, result);
                true
            }
            Ok(Started::Pending) => {
                self.open[token] = Some(open);
                true
            }
            Err(_full) => {
                self.free.push(token);
                false
            }
        }
    }

    fn reap(&mut self) {
        let Some(ring) = self.engine.ring() else { return };
        for (token, result) in ring.reap() {
            self.finish(token, result);
        }
    }

    fn finish(&mut self, token: usize, result: io::Result<()>) {
        let Some(mut open) = self.open.get_mut(token).and_then(Option::take) else { return };
        let full = matches!(&result, Err(error) if error.raw_os_error() == Some(libc::ENOSPC));
        if full && self.when_full == WhenFull::Stop {
            log::warn!("block: the host's disk is full: the request waits for room");
            self.open[token] = Some(open);
            self.waiting.push(token);
            if let Err(error) = self.timer.reset(TICK, Some(TICK)) {
                log::error!("block: {error}");
            }
            return;
        }
        let status = match result {
            Ok(()) => Status::Ok,
            Err(error) => {
                log::warn!("block: {:?}: {error}", open.operation);
                Status::IoError
            }
        };
        open.status.with(|place: &mut Buffers<'_>| place.write(&[status as u8]));
        self.queue.push(open.head, open.written);
        self.free.push(token);
    }

    fn tick(&mut self) {
        let _ = self.timer.wait();
        if let Some(signals) = &self.watch_size
            && self.image.measure()
        {
            log::info!("block: the disk has {} bytes now", self.image.bytes());
            signals.config_changed();
        }
        for token in std::mem::take(&mut self.waiting) {
            if let Some(open) = self.open.get_mut(token).and_then(Option::take) {
                let again = Open { data: open.data.clone(), status: open.status.clone(), ..open };
                if !self.start_again(token, again) {
                    self.waiting.push(token);
                }
            }
        }
    }

    fn start_again(&mut self, token: usize, open: Open) -> bool {
        let kept = Open { data: open.data.clone(), status: open.status.clone(), ..open };
        if self.start(token, open) {
            return true;
        }
        // `start` gave the token back: it is still ours.
        self.free.retain(|free| *free != token);
        self.open[token] = Some(kept);
        false
    }
}

impl MutEventSubscriber for QueueWorker {
    fn process(&mut self, events: Events, _ops: &mut EventOps<'_>) {
        match events.data() {
            KICK => self.queue.take_kicks(),
            TIMER => self.tick(),
            _ => {}
        }
        self.reap();
        if events.data() == DONE && !self.stalled && !self.queue.polls() {
            self.queue.notify();
        } else {
            self.serve();
        }
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        watch(ops, Events::with_data(self.queue.kick(), KICK, EventSet::IN));
        watch(ops, Events::with_data(&self.timer, TIMER, EventSet::IN));
        if let Some(ring) = self.engine.ring() {
            watch(ops, Events::with_data(ring.event(), DONE, EventSet::IN));
        }
    }
}
