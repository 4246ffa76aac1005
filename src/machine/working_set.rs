//! The pages that a run from a snapshot uses: written down by one run, and made ready for those after it.

use super::setup::{Event, Setup};
use crate::config::RunConfig;
use crate::kvm::{System, Vcpu};
use crate::memory::{GuestRam, MemoryError, PAGE_BYTES, Ready, Used};
use crate::probe::Host;
use crate::snapshot::{PageRange, PageUse, WorkingSet, bytes_of_banks};
use crate::tune::Lever;
use hwvmm_arch::layout::{GpaRange, ram_banks};
use kvm_bindings::KVM_CAP_PRE_FAULT_MEMORY;
use std::fs::File;
use std::io;
use std::path::Path;
use std::time::Instant;

const HUGE_PAGE_BYTES: u64 = 2 << 20;
const PAGES_OF_HUGE: u64 = HUGE_PAGE_BYTES / PAGE_BYTES;
/// Pages that Linux maps with one that is read (fault_around_bytes): they tell of one fault.
const PAGES_AROUND: u64 = 16;
/// A part of memory is copied to a huge page for at least as many faults. The copy takes some 0.3 ms, a VM exit in a nested machine 10 to
/// 50 µs.
const FAULTS_OF_HUGE: u64 = 4;

/// Has the host's pages of `set` ready, before KVM is told of the memory. `file` is what it is mapped from. A page that is not ready is
/// logged, as the guest gets it when it uses it.
///
/// # Errors
/// Where the file cannot be read: the guest must not go on with a part of its memory.
pub(super) fn prepare(
    set: &WorkingSet,
    ram: &GuestRam,
    file: &File,
    config: &RunConfig,
    system: &System,
) -> Result<(), MemoryError> {
    let maps_ahead = system.capability(KVM_CAP_PRE_FAULT_MEMORY) > 0;
    if !maps_ahead && config.tune.wants(Lever::HugePages) && has_huge_pages() {
        let mut copied = 0;
        for offset in huge_pages(set) {
            copied += u64::from(ram.copy_huge_page(file, offset)?);
        }
        log::debug!("working set: {copied} huge pages");
    }
    for range in &set.ranges {
        let ready = match range.usage {
            PageUse::Read => Ready::ToRead,
            PageUse::Written => Ready::ToWrite,
        };
        let (offset, bytes) = (u64::from(range.first) * PAGE_BYTES, u64::from(range.pages) * PAGE_BYTES);
        if let Err(error) = ram.make_ready(offset, bytes, ready) {
            config.tune.cannot(Lever::WorkingSet, &error.to_string());
            break;
        }
    }
    Ok(())
}

/// Has KVM map the pages of `set`, where it can.
pub(super) fn map(set: &WorkingSet, vcpu: &Vcpu, memory_bytes: u64) {
    for range in set.ranges.iter().flat_map(|range| gpas(range, memory_bytes)) {
        if let Err(error) = vcpu.pre_fault(range) {
            log::info!("working set: {error}: {}; the guest's first touches still exit", error.source);
            break;
        }
    }
}

/// Where the pages of `range` are in guest memory: in both banks, if it has pages of both.
fn gpas(range: &PageRange, memory_bytes: u64) -> Vec<GpaRange> {
    let (first, end) = (u64::from(range.first) * PAGE_BYTES, range.end() * PAGE_BYTES);
    let mut before = 0;
    let mut found = Vec::new();
    for bank in ram_banks(memory_bytes) {
        let behind = before + bank.bytes;
        let (from, to) = (first.clamp(before, behind), end.clamp(before, behind));
        if from < to {
            found.push(GpaRange { start: bank.start + (from - before), bytes: to - from });
        }
        before = behind;
    }
    found
}

fn has_huge_pages() -> bool {
    Host::at(Path::new("/")).transparent_huge_pages().is_some_and(|mode| mode != "never")
}

/// The places in the file of the huge pages that are worth a copy: parts of memory with many pages that are used.
fn huge_pages(set: &WorkingSet) -> Vec<u64> {
    let mut found = Vec::new();
    let (mut huge, mut faults) = (0, 0);
    let mut count = |of: u64, more: u64| {
        if of != huge {
            (huge, faults) = (of, 0);
        }
        faults += more;
        if faults >= FAULTS_OF_HUGE && found.last() != Some(&(huge * HUGE_PAGE_BYTES)) {
            found.push(huge * HUGE_PAGE_BYTES);
        }
    };
    for range in &set.ranges {
        let (mut page, end) = (u64::from(range.first), range.end());
        while page < end {
            let of = page / PAGES_OF_HUGE;
            let next = end.min((of + 1) * PAGES_OF_HUGE);
            count(
                of,
                match range.usage {
                    PageUse::Written => next - page,
                    PageUse::Read => (next - page).div_ceil(PAGES_AROUND),
                },
            );
            page = next;
        }
    }
    found
}

/// Writes down which pages of memory the guest has used by a time.
pub(super) struct Recorder<'a> {
    ram: GuestRam,
    /// /proc/self/pagemap.
    pagemap: File,
    /// `None` once they are written down, and where that time is never.
    at: Option<Instant>,
    done: bool,
    on_event: &'a dyn Fn(Event<'_>),
}

impl<'a> Recorder<'a> {
    /// Prepares for it where the run is to write them down. To be called before the process is confined.
    ///
    /// # Errors
    /// Where /proc/self/pagemap cannot be opened.
    pub(super) fn new(setup: &Setup<'a>, ram: &GuestRam, start: Instant) -> io::Result<Option<Self>> {
        let Some(time) = setup.config.record_working_set else { return Ok(None) };
        let pagemap = File::open("/proc/self/pagemap")?;
        let at = start.checked_add(time);
        Ok(Some(Self { ram: ram.clone(), pagemap, at, done: false, on_event: setup.on_event }))
    }

    /// Writes them down if it is time. Returns when that will be.
    pub(super) fn look(&mut self, now: Instant) -> Option<Instant> {
        if self.at.is_some_and(|at| at <= now) {
            self.record();
        }
        self.at
    }

    /// Writes them down if that was not done before: the run has ended.
    pub(super) fn finish(mut self) {
        if !self.done {
            self.record();
        }
    }

    fn record(&mut self) {
        (self.at, self.done) = (None, true);
        let mut ranges: Vec<PageRange> = Vec::new();
        let read = self.ram.for_each_used(&self.pagemap, |page, used| {
            let usage = match used {
                Used::Read => PageUse::Read,
                Used::Written => PageUse::Written,
            };
            match (ranges.last_mut(), u32::try_from(page)) {
                (Some(last), _) if last.end() == page && last.usage == usage => last.pages += 1,
                (_, Ok(first)) => ranges.push(PageRange { first, pages: 1, usage }),
                // More memory than a machine can have.
                (_, Err(_)) => {}
            }
        });
        match read {
            Ok(()) => (self.on_event)(Event::WorkingSet(WorkingSet::new(bytes_of_banks(&self.ram), ranges))),
            Err(error) => log::warn!("the pages that the guest has used are not known: /proc/self/pagemap: {error}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(first: u32, pages: u32, usage: PageUse) -> PageRange {
        PageRange { first, pages, usage }
    }

    #[test]
    fn pages_of_both_banks_have_their_gpas() {
        let memory = 5 << 30;
        let below = u32::try_from(ram_banks(memory)[0].bytes / PAGE_BYTES).expect("small");
        let across = gpas(&range(below - 1, 3, PageUse::Read), memory);
        let end = ram_banks(memory)[0].bytes;
        assert_eq!(
            across,
            [GpaRange { start: end - 0x1000, bytes: 0x1000 }, GpaRange { start: 1 << 32, bytes: 0x2000 }]
        );
        assert_eq!(gpas(&range(1, 2, PageUse::Written), memory), [GpaRange { start: 0x1000, bytes: 0x2000 }]);
        assert!(gpas(&range(u32::MAX, 1, PageUse::Read), memory).is_empty());
    }

    #[test]
    fn huge_pages_are_for_parts_with_many_faults() {
        let of = |ranges: &[PageRange]| huge_pages(&WorkingSet::new(1 << 30, ranges.to_vec()));
        assert!(of(&[range(0, 3, PageUse::Written)]).is_empty());
        assert_eq!(of(&[range(0, 4, PageUse::Written)]), [0]);
        // Neighbours of a page that was read say little.
        assert!(of(&[range(0, 48, PageUse::Read)]).is_empty());
        assert_eq!(of(&[range(0, 49, PageUse::Read)]), [0]);
        // Across two, and scattered.
        assert_eq!(of(&[range(500, 20, PageUse::Written)]), [0, 2 << 20]);
        assert!(of(&[range(510, 4, PageUse::Written)]).is_empty());
        let scattered: Vec<_> = (0..4).map(|number| range(1024 + 16 * number, 1, PageUse::Read)).collect();
        assert_eq!(of(&scattered), [4 << 20]);
        assert_eq!(of(&[range(0, 2048, PageUse::Written)]), [0, 2 << 20, 4 << 20, 6 << 20]);
    }
}
