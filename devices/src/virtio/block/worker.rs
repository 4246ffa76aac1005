//! The worker of one queue of a block device.

use super::engine::{Engine, Started};
use super::image::Image;
use super::options::{Durability, WhenFull};
use super::request::{ID_BYTES, InvalidRequest, Limits, Operation, Request, Status, parse};
use super::uring::{Completion, Ring};
use crate::memory::{Buffers, Memory, OwnedBuffers};
use crate::virtio::chain::Chain;
use crate::virtio::interrupt::DeviceInterrupt;
use crate::virtio::queue::Virtqueue;
use crate::virtio::slot::Slot;
use crate::virtio::worker::watch;
use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use vmm_sys_util::timerfd::TimerFd;

/// How often the size of the image is read again, and requests that wait for space are tried again.
const TICK: Duration = Duration::from_secs(4);

// Data of the events.
const KICK: u32 = 0;
const COMPLETION: u32 = 1;
const TIMER: u32 = 2;

/// A request that has not completed.
struct PendingRequest {
    head: u16,
    operation: Operation,
    /// All of its data, so that it can be started again.
    data: OwnedBuffers,
    /// Bytes that the device will have written to the chain, the status included.
    written: u32,
    status: OwnedBuffers,
}

/// The result of an attempt to start a request.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Start {
    Started,
    /// The io_uring has no entry left.
    RingFull,
}

/// The timer of a queue.
pub(super) type SharedTimer = Arc<Mutex<TimerFd>>;

/// What a worker is made of.
pub(super) struct WorkerSetup {
    pub(super) queue: Virtqueue,
    pub(super) image: Arc<Image>,
    pub(super) engine: Engine,
    /// Where the engine's io_uring goes when the worker ends.
    pub(super) ring: Slot<Ring>,
    pub(super) id: [u8; ID_BYTES],
    pub(super) when_full: WhenFull,
    /// For one of the queues: the driver is notified by it of a change of the image's size.
    pub(super) size_watch: Option<Arc<DeviceInterrupt>>,
    pub(super) timer: SharedTimer,
}

pub(super) struct QueueWorker {
    queue: Virtqueue,
    image: Arc<Image>,
    engine: Engine,
    id: [u8; ID_BYTES],
    when_full: WhenFull,
    /// The pending requests by token.
    pending: Vec<Option<PendingRequest>>,
    free_tokens: Vec<usize>,
    /// Tokens of the requests that wait for space on the host's file system.
    waiting_for_space: Vec<usize>,
    /// Available chains may be left in the queue, as too many requests were in flight.
    stalled: bool,
    /// Set for the queue that watches the size of the image: notifies the driver of a change.
    size_watch: Option<Arc<DeviceInterrupt>>,
    timer: SharedTimer,
    ring: Slot<Ring>,
}

impl QueueWorker {
    pub(super) fn new(setup: WorkerSetup) -> Self {
        let WorkerSetup { queue, image, engine, ring, id, when_full, size_watch, timer } = setup;
        Self {
            queue,
            image,
            engine,
            ring,
            id,
            when_full,
            pending: Vec::new(),
            free_tokens: Vec::new(),
            waiting_for_space: Vec::new(),
            stalled: false,
            size_watch,
            timer,
        }
    }

    fn timer(&self) -> MutexGuard<'_, TimerFd> {
        self.timer.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets the timer expire every [`TICK`].
    fn start_timer(&self) {
        if let Err(error) = self.timer().reset(TICK, Some(TICK)) {
            log::error!("block: cannot set the timer that looks at the image and tries requests again: {error}");
        }
    }

    fn limits(&self) -> Limits {
        Limits {
            bytes: self.image.bytes(),
            read_only: self.image.is_read_only(),
            block_bytes: u64::from(self.image.block_bytes()),
        }
    }

    /// Returns the number of requests that have not completed, those that wait for space included.
    fn in_flight(&self) -> usize {
        self.pending.len() - self.free_tokens.len()
    }

    fn serve(&mut self) {
        let memory = self.queue.memory();
        self.stalled = false;
        loop {
            self.queue.disable_notification();
            loop {
                // A driver has at most this many chains in flight. One that makes a chain available again before it was used
                // must not fill the memory of the host.
                if self.in_flight() >= usize::from(self.queue.size()) {
                    self.stalled = true;
                    break;
                }
                let Some(mut chain) = self.queue.pop(&memory) else { break };
                if self.handle(&mut chain, &memory) == Start::RingFull {
                    self.queue.undo_pop();
                    self.stalled = true;
                    break;
                }
            }
            if let Some(ring) = self.engine.ring() {
                ring.submit();
            }
            // Requests that the host could serve from its page cache have completed by now.
            self.reap();
            let idle = self.engine.ring().is_none_or(|ring| ring.is_idle());
            // Where all of them have completed, no completion is left to continue a queue that was stalled by them.
            if self.stalled && idle && self.in_flight() < usize::from(self.queue.size()) {
                self.stalled = false;
                continue;
            }
            if !self.stalled && self.queue.wait_for_batch() {
                continue;
            }
            self.queue.notify();
            // Polling would delay the completions of requests in flight.
            if !self.stalled && idle && self.queue.busy_poll() {
                continue;
            }
            // Where the queue is stalled, the next completion continues; no kick is needed.
            if self.stalled || !self.queue.enable_notification() {
                return;
            }
        }
    }

    /// Starts the request of a chain, or completes it where it is invalid.
    fn handle(&mut self, chain: &mut Chain<'_>, memory: &Memory) -> Start {
        let head = chain.head;
        match parse(chain, self.limits()) {
            Err(InvalidRequest { status, status_buffer }) => {
                let len = u32::from(status_buffer.is_some());
                if let Some(mut buffer) = status_buffer {
                    buffer.write(&[status as u8]);
                }
                self.queue.push(head, len);
                Start::Started
            }
            Ok(Request { operation, mut data, mut status }) => {
                if operation == Operation::Id {
                    let written = data.write(&self.id);
                    status.write(&[Status::Ok as u8]);
                    self.queue.push(head, u32::try_from(written + 1).unwrap_or(0));
                    return Start::Started;
                }
                let written = if matches!(operation, Operation::Read { .. }) { data.len() } else { 0 };
                let request = PendingRequest {
                    head,
                    operation,
                    data: data.into_owned(memory),
                    written: u32::try_from(written + 1).unwrap_or(u32::MAX),
                    status: status.into_owned(memory),
                };
                let token = self.free_tokens.pop().unwrap_or(self.pending.len());
                if token == self.pending.len() {
                    self.pending.push(None);
                }
                self.start(token, request)
            }
        }
    }

    /// Starts a request. Where the ring is full, the request is dropped and its token is free.
    fn start(&mut self, token: usize, request: PendingRequest) -> Start {
        match self.engine.start(request.operation, request.data.clone(), token) {
            Ok(Started::Done(result)) => {
                self.pending[token] = Some(request);
                self.complete(token, result);
                Start::Started
            }
            Ok(Started::Pending) => {
                self.pending[token] = Some(request);
                Start::Started
            }
            Err(_data) => {
                self.free_tokens.push(token);
                Start::RingFull
            }
        }
    }

    fn reap(&mut self) {
        let Some(ring) = self.engine.ring() else { return };
        for Completion { token, result } in ring.reap() {
            self.complete(token, result);
        }
    }

    /// Writes the status of a request and pushes its chain, or lets it wait for space on the host's file system.
    fn complete(&mut self, token: usize, result: io::Result<()>) {
        let Some(mut request) = self.pending.get_mut(token).and_then(Option::take) else { return };
        let result = match request.operation {
            Operation::Flush => self.image.with_kept_error(result),
            // Its driver sends no flushes.
            Operation::Write { .. } if self.engine.durability() == Durability::EachWrite => {
                self.image.with_kept_error(result)
            }
            _ => result,
        };
        let full = matches!(&result, Err(error) if error.raw_os_error() == Some(libc::ENOSPC));
        if full && self.when_full == WhenFull::Stop {
            log::warn!("block: the host's file system is full: the request waits for space");
            self.pending[token] = Some(request);
            self.waiting_for_space.push(token);
            self.start_timer();
            return;
        }
        let status = match result {
            Ok(()) => Status::Ok,
            Err(error) => {
                log::warn!("block: {:?} failed: {error}", request.operation);
                Status::IoError
            }
        };
        request.status.with(|buffer: &mut Buffers<'_>| buffer.write(&[status as u8]));
        self.queue.push(request.head, request.written);
        self.free_tokens.push(token);
    }

    /// Completes the requests in flight, and those of the chains that wait behind a full io_uring: what the driver made available
    /// before a reset, or before the end of the run, reaches the disk. The device status is not 0 until then (virtio 1.3 §2.4).
    /// Where that takes longer than a reset may, the queue gives no more chains out. Requests that wait for space on the host
    /// are given up, as they were never completed.
    fn finish(&mut self) {
        self.queue.take_kicks();
        while self.engine.ring().is_some_and(|ring| !ring.is_idle()) {
            let Some(ring) = self.engine.ring() else { return };
            match ring.wait() {
                Ok(completions) => {
                    completions.into_iter().for_each(|done| self.complete(done.token, done.result));
                }
                Err(error) => {
                    log::error!("block: cannot wait for the operations in flight: {error}");
                    self.queue.abandon();
                    return;
                }
            }
            if self.stalled {
                self.serve();
            }
        }
        self.queue.notify();
    }

    fn tick(&mut self) {
        let _ = self.timer().wait();
        if let Some(interrupt) = &self.size_watch
            && self.image.update_size()
        {
            log::info!("block: the size of the disk is {} bytes now", self.image.bytes());
            interrupt.signal_config_changed();
        }
        for token in std::mem::take(&mut self.waiting_for_space) {
            if let Some(request) = self.pending.get_mut(token).and_then(Option::take)
                && self.start_again(token, request) == Start::RingFull
            {
                self.waiting_for_space.push(token);
            }
        }
    }

    /// Starts a request that waited for space. It keeps its token where the ring is full.
    fn start_again(&mut self, token: usize, request: PendingRequest) -> Start {
        let kept = PendingRequest { data: request.data.clone(), status: request.status.clone(), ..request };
        let start = self.start(token, request);
        if start == Start::RingFull {
            self.free_tokens.retain(|free| *free != token);
            self.pending[token] = Some(kept);
        }
        start
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
        if events.data() == COMPLETION && !self.stalled && !self.queue.may_busy_poll() {
            self.queue.notify();
        } else {
            self.serve();
        }
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        watch(ops, Events::with_data(self.queue.kick(), KICK, EventSet::IN));
        if self.size_watch.is_some() {
            self.start_timer();
        } else if let Err(error) = self.timer().clear() {
            log::error!("block: cannot stop the timer: {error}");
        }
        watch(ops, Events::with_data(&*self.timer(), TIMER, EventSet::IN));
        if let Some(ring) = self.engine.ring() {
            watch(ops, Events::with_data(ring.event(), COMPLETION, EventSet::IN));
        }
    }
}

impl Drop for QueueWorker {
    fn drop(&mut self) {
        self.finish();
        self.ring.put(self.engine.take_ring());
    }
}
