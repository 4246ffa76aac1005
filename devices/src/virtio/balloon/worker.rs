//! The balloon at work.

use super::{BalloonControl, PAGE_BYTES, lock};
use crate::memory::{Buffers, Memory, give_back};
use crate::virtio::Virtqueue;
use crate::virtio::worker::watch;
use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use vm_memory::GuestAddress;

/// The most page numbers looked at in one request: 1 GiB. Linux sends 256 at once.
const MAX_PAGES: usize = 1 << 18;
const STAT_BYTES: usize = 10;

/// The queues on which pages come and go.
pub(super) struct Pages {
    inflate: Virtqueue,
    deflate: Virtqueue,
    reporting: Option<Virtqueue>,
    control: Arc<BalloonControl>,
}

impl Pages {
    pub(super) fn new(
        inflate: Virtqueue,
        deflate: Virtqueue,
        reporting: Option<Virtqueue>,
        control: Arc<BalloonControl>,
    ) -> Self {
        Self { inflate, deflate, reporting, control }
    }

    fn take_pages(&mut self) {
        let memory = self.inflate.memory();
        self.inflate.serve(|chain| {
            for (first, count) in runs(&mut chain.readable) {
                release(&memory, first, count);
            }
            Some(0)
        });
    }

    fn take_reports(&mut self) {
        let Some(queue) = &mut self.reporting else { return };
        let control = &self.control;
        queue.serve(|chain| {
            let bytes = chain.writable.len() as u64;
            match chain.writable.give_back() {
                Ok(()) => drop(control.reported_bytes.fetch_add(bytes, Ordering::AcqRel)),
                Err(error) => log::debug!("balloon: {bytes} free bytes stay: {error}"),
            }
            Some(0)
        });
    }
}

/// Page numbers, put together where they follow each other: first and how many.
fn runs(numbers: &mut Buffers<'_>) -> Vec<(u32, u32)> {
    let mut found: Vec<u32> = Vec::new();
    while found.len() < MAX_PAGES
        && let Ok(number) = numbers.read_obj::<u32>()
    {
        found.push(u32::from_le(number));
    }
    found.sort_unstable();
    found.dedup();
    let mut runs: Vec<(u32, u32)> = Vec::new();
    for number in found {
        match runs.last_mut() {
            Some((first, count)) if first.checked_add(*count) == Some(number) => *count += 1,
            _ => runs.push((number, 1)),
        }
    }
    runs
}

fn release(memory: &Memory, first: u32, count: u32) {
    let gpa = GuestAddress(u64::from(first) * PAGE_BYTES);
    let bytes = usize::try_from(u64::from(count) * PAGE_BYTES).unwrap_or(0);
    if let Err(error) = give_back(memory, gpa, bytes) {
        log::debug!("balloon: {count} pages at {gpa:?} stay: {error}");
    }
}

impl MutEventSubscriber for Pages {
    fn process(&mut self, _events: Events, _ops: &mut EventOps<'_>) {
        self.take_pages();
        // Pages that go back to the guest need nothing: they come with the guest's first touch.
        self.deflate.serve(|_| Some(0));
        self.take_reports();
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        for queue in [&self.inflate, &self.deflate].into_iter().chain(&self.reporting) {
            watch(ops, Events::new(queue.kick(), EventSet::IN));
        }
    }
}

/// The statistics queue: the driver's one buffer waits here until somebody asks.
pub(super) struct Statistics {
    queue: Virtqueue,
    control: Arc<BalloonControl>,
    waiting: Option<u16>,
}

impl Statistics {
    pub(super) fn new(queue: Virtqueue, control: Arc<BalloonControl>) -> Self {
        Self { queue, control, waiting: None }
    }

    fn take_statistics(&mut self) {
        let memory = self.queue.memory();
        while let Some(mut chain) = self.queue.pop(&memory) {
            let mut stats = lock(&self.control.stats);
            let mut entry = [0; STAT_BYTES];
            while chain.readable.read(&mut entry) == STAT_BYTES {
                let [t0, t1, value @ ..] = entry;
                if let Some(place) = stats.values.get_mut(usize::from(u16::from_le_bytes([t0, t1]))) {
                    *place = Some(u64::from_le_bytes(value));
                }
            }
            drop(stats);
            // A driver that sends a second buffer gets the first back.
            if let Some(head) = self.waiting.replace(chain.head) {
                self.queue.push(head, 0);
            }
        }
    }
}

impl MutEventSubscriber for Statistics {
    fn process(&mut self, events: Events, _ops: &mut EventOps<'_>) {
        if events.fd() == self.control.ask.as_raw_fd() {
            let _ = self.control.ask.read();
            if let Some(head) = self.waiting.take() {
                self.queue.push(head, 0);
                self.queue.notify();
            }
            return;
        }
        self.queue.take_kicks();
        loop {
            self.take_statistics();
            self.queue.notify();
            if !self.queue.enable_notification() {
                return;
            }
        }
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        watch(ops, Events::new(self.queue.kick(), EventSet::IN));
        watch(ops, Events::new(&self.control.ask, EventSet::IN));
    }
}
