//! The workers of the balloon.

use super::control::{BalloonControl, PAGE_BYTES, STAT_NAMES, StatEntry};
use crate::error::chain as error_chain;
use crate::memory::{Buffers, Memory, discard};
use crate::virtio::queue::Virtqueue;
use crate::virtio::worker::watch;
use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use vm_memory::GuestAddress;

/// The most page numbers that are read from one request: 1 GiB. Linux sends 256.
const MAX_PAGES: usize = 1 << 18;
/// After how many runs of pages the worker looks if the device is being reset.
const RUNS_BETWEEN_LOOKS: usize = 256;
/// Size in bytes of struct `virtio_balloon_stat`: tag and value.
const STAT_BYTES: usize = 10;

/// Handles the inflate, deflate and free page reporting queues.
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

    fn inflate(&mut self) {
        let (memory, abort) = (self.inflate.memory(), self.inflate.abort_flag());
        self.inflate.serve(|chain| {
            discard_runs(&memory, &page_runs(&mut chain.readable), &abort);
            Some(0)
        });
    }

    fn discard_reported(&mut self) {
        let Some(queue) = &mut self.reporting else { return };
        let control = &self.control;
        queue.serve(|chain| {
            let bytes = chain.writable.len() as u64;
            match chain.writable.discard() {
                Ok(()) => control.add_reported(bytes),
                Err(error) => log::debug!("balloon: {bytes} reported bytes not discarded: {}", error_chain(&error)),
            }
            Some(0)
        });
    }
}

/// Balloon pages with consecutive page numbers.
#[derive(Clone, Copy)]
struct PageRun {
    /// Number of the first page: its guest physical address in units of [`PAGE_BYTES`].
    first: u32,
    /// Length of the run in balloon pages.
    count: u32,
}

/// Reads page numbers and joins consecutive ones.
fn page_runs(numbers: &mut Buffers<'_>) -> Vec<PageRun> {
    let mut found: Vec<u32> = Vec::new();
    while found.len() < MAX_PAGES
        && let Ok(number) = numbers.read_obj::<u32>()
    {
        found.push(u32::from_le(number));
    }
    found.sort_unstable();
    found.dedup();
    let mut runs: Vec<PageRun> = Vec::new();
    for number in found {
        match runs.last_mut() {
            Some(run) if run.first.checked_add(run.count) == Some(number) => run.count += 1,
            _ => runs.push(PageRun { first: number, count: 1 }),
        }
    }
    runs
}

/// Discards pages, a system call for each run: for as many as a chain can have that takes up to seconds. The rest is left where
/// the device is being reset.
fn discard_runs(memory: &Memory, runs: &[PageRun], abort: &AtomicBool) {
    for part in runs.chunks(RUNS_BETWEEN_LOOKS) {
        if abort.load(Ordering::Relaxed) {
            return;
        }
        part.iter().for_each(|run| discard_run(memory, *run));
    }
}

fn discard_run(memory: &Memory, PageRun { first, count }: PageRun) {
    let gpa = GuestAddress(u64::from(first) * PAGE_BYTES);
    let bytes = usize::try_from(u64::from(count) * PAGE_BYTES).unwrap_or(0);
    if let Err(error) = discard(memory, gpa, bytes) {
        log::debug!("balloon: {count} pages at {:#x} not discarded: {}", gpa.0, error_chain(&error));
    }
}

impl MutEventSubscriber for Pages {
    fn process(&mut self, _events: Events, _ops: &mut EventOps<'_>) {
        self.inflate();
        // Deflating needs no action: the host allocates a page when the guest accesses it.
        self.deflate.serve(|_| Some(0));
        self.discard_reported();
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        for queue in [&self.inflate, &self.deflate].into_iter().chain(&self.reporting) {
            watch(ops, Events::new(queue.kick(), EventSet::IN));
        }
    }
}

/// Handles the statistics queue. The driver's only buffer stays with the device until new statistics are requested.
pub(super) struct Statistics {
    queue: Virtqueue,
    control: Arc<BalloonControl>,
    /// Head of the chain with the driver's buffer.
    buffer: Option<u16>,
}

impl Statistics {
    pub(super) fn new(queue: Virtqueue, control: Arc<BalloonControl>) -> Self {
        Self { queue, control, buffer: None }
    }

    fn read_statistics(&mut self) {
        let memory = self.queue.memory();
        while let Some(mut chain) = self.queue.pop(&memory) {
            let entries = read_entries(&mut chain.readable);
            self.control.update_stats(&entries);
            // A driver that makes a second buffer available gets the first one back.
            if let Some(head) = self.buffer.replace(chain.head) {
                self.queue.push(head, 0);
            }
        }
    }
}

/// Reads entries of struct `virtio_balloon_stat`, at most one for each tag that there is.
fn read_entries(buffer: &mut Buffers<'_>) -> Vec<StatEntry> {
    let mut entries = Vec::new();
    let mut entry = [0; STAT_BYTES];
    while entries.len() < STAT_NAMES.len() && buffer.read(&mut entry) == STAT_BYTES {
        let [tag_low, tag_high, value @ ..] = entry;
        entries.push(StatEntry { tag: u16::from_le_bytes([tag_low, tag_high]), value: u64::from_le_bytes(value) });
    }
    entries
}

impl MutEventSubscriber for Statistics {
    fn process(&mut self, events: Events, _ops: &mut EventOps<'_>) {
        if events.fd() == self.control.stats_request().as_raw_fd() {
            let _ = self.control.stats_request().read();
            if let Some(head) = self.buffer.take() {
                self.queue.push(head, 0);
                self.queue.notify();
            }
            return;
        }
        self.queue.take_kicks();
        loop {
            self.read_statistics();
            self.queue.notify();
            if !self.queue.enable_notification() {
                return;
            }
        }
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        watch(ops, Events::new(self.queue.kick(), EventSet::IN));
        watch(ops, Events::new(self.control.stats_request(), EventSet::IN));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::{Bytes, GuestMemoryMmap};

    #[test]
    fn a_reset_ends_the_discard_of_many_pages() {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 8 << 20)]).expect("memory");
        let memory = Memory::new(memory, Arc::new(()));
        let runs: Vec<PageRun> = (0..1024).map(|run| PageRun { first: run * 2, count: 1 }).collect();
        let pages = || runs.iter().map(|run| GuestAddress(u64::from(run.first) * PAGE_BYTES));
        let left = || pages().filter(|page| memory.read_obj::<u8>(*page).expect("memory") != 0).count();
        pages().for_each(|page| memory.write_obj(1_u8, page).expect("memory"));
        discard_runs(&memory, &runs, &AtomicBool::new(true));
        assert_eq!(left(), runs.len());
        discard_runs(&memory, &runs, &AtomicBool::new(false));
        assert_eq!(left(), 0);
    }
}
