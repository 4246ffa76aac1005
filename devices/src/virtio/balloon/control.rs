//! The host's side of the memory balloon: target size, and what the guest reports.

use crate::virtio::interrupt::DeviceInterrupt;
use std::io;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Size in bytes of a balloon page, whatever the page size of the guest (virtio 1.3 §5.5.6).
pub(super) const PAGE_BYTES: u64 = 4096;

/// The guest's memory statistics (virtio 1.3 §5.5.6.3).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BalloonStats {
    /// The values by tag, with the names and units in [`STAT_NAMES`]; `None` where the guest did not report one.
    pub values: [Option<u64>; 10],
}

/// One statistic that the guest reports (struct `virtio_balloon_stat`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct StatEntry {
    /// Index of the value in [`BalloonStats::values`].
    pub(super) tag: u16,
    pub(super) value: u64,
}

/// The names of [`BalloonStats::values`], by tag (virtio 1.3 §5.5.6.4). Values are counts where the name has no unit.
pub const STAT_NAMES: [&str; 10] = [
    "swap_in_bytes",
    "swap_out_bytes",
    "major_faults",
    "minor_faults",
    "free_bytes",
    "total_bytes",
    "available_bytes",
    "disk_caches_bytes",
    "hugetlb_allocations",
    "hugetlb_failures",
];

/// The host's side of a balloon.
pub struct BalloonControl {
    target_pages: AtomicU32,
    actual_pages: AtomicU32,
    reported_bytes: AtomicU64,
    interrupt: Mutex<Option<Arc<DeviceInterrupt>>>,
    stats: Mutex<BalloonStats>,
    stats_request: EventFd,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl BalloonControl {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self {
            target_pages: AtomicU32::new(0),
            actual_pages: AtomicU32::new(0),
            reported_bytes: AtomicU64::new(0),
            interrupt: Mutex::default(),
            stats: Mutex::default(),
            stats_request: EventFd::new(EFD_NONBLOCK)?,
        })
    }

    /// Sets the size of the balloon that the guest is asked for, in bytes. Memory in the balloon is not available to the guest.
    pub fn set_target(&self, bytes: u64) {
        let pages = u32::try_from(bytes / PAGE_BYTES).unwrap_or(u32::MAX);
        self.target_pages.store(pages, Ordering::Release);
        if let Some(interrupt) = lock(&self.interrupt).as_ref() {
            interrupt.signal_config_changed();
        }
    }

    /// Returns the size of the balloon that the guest is asked for, in bytes.
    #[must_use]
    pub fn target(&self) -> u64 {
        u64::from(self.target_pages()) * PAGE_BYTES
    }

    /// Returns the size of the balloon that the guest reported last, in bytes.
    #[must_use]
    pub fn actual(&self) -> u64 {
        u64::from(self.actual_pages()) * PAGE_BYTES
    }

    /// Returns how many bytes free page reporting has given back to the host, since the start. Memory that the guest used and
    /// freed again counts again.
    #[must_use]
    pub fn reported(&self) -> u64 {
        self.reported_bytes.load(Ordering::Acquire)
    }

    /// Returns the statistics that the guest reported last, and requests new ones. The first report comes when the guest's
    /// driver starts.
    #[must_use]
    pub fn stats(&self) -> BalloonStats {
        if let Err(error) = self.stats_request.write(1) {
            log::warn!("balloon: cannot request the guest's statistics: {error}");
        }
        *lock(&self.stats)
    }

    /// `num_pages` of the device configuration.
    pub(super) fn target_pages(&self) -> u32 {
        self.target_pages.load(Ordering::Acquire)
    }

    /// `actual` of the device configuration.
    pub(super) fn actual_pages(&self) -> u32 {
        self.actual_pages.load(Ordering::Acquire)
    }

    pub(super) fn set_actual_pages(&self, pages: u32) {
        self.actual_pages.store(pages, Ordering::Release);
    }

    /// Sets what a snapshot has, which the guest knows.
    pub(super) fn restore(&self, target_pages: u32, actual_pages: u32) {
        self.target_pages.store(target_pages, Ordering::Release);
        self.set_actual_pages(actual_pages);
    }

    pub(super) fn set_interrupt(&self, interrupt: Option<Arc<DeviceInterrupt>>) {
        *lock(&self.interrupt) = interrupt;
    }

    pub(super) fn add_reported(&self, bytes: u64) {
        self.reported_bytes.fetch_add(bytes, Ordering::AcqRel);
    }

    /// Takes over what the guest reported. Entries with a tag that there is not are ignored.
    pub(super) fn update_stats(&self, entries: &[StatEntry]) {
        let mut stats = lock(&self.stats);
        for StatEntry { tag, value } in entries {
            if let Some(stat) = stats.values.get_mut(usize::from(*tag)) {
                *stat = Some(*value);
            }
        }
    }

    /// Returns the eventfd that is readable when new statistics are requested.
    pub(super) fn stats_request(&self) -> &EventFd {
        &self.stats_request
    }
}
