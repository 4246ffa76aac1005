//! The memory balloon (virtio 1.3 §5.5): takes memory from the guest and gives it back, gives pages that the guest has
//! free to the host by itself (free page reporting), and asks the guest how it fares.

#[cfg(test)]
mod tests;
mod worker;

use super::{ActivateError, Activation, DeviceKind, Signals, VirtioDevice, Worker, read_config_bytes};
use std::io;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use worker::{Pages, Statistics};

const F_STATS_VQ: u64 = 1 << 1;
const F_DEFLATE_ON_OOM: u64 = 1 << 2;
const F_REPORTING: u64 = 1 << 5;
const QUEUE_SIZE: u16 = 128;
/// Bytes of a page, whatever the guest's own (§5.5.6).
const PAGE_BYTES: u64 = 4096;

/// What the guest says of its memory (§5.5.6.3): bytes, but for the counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BalloonStats {
    /// By tag: swapped in, swapped out, major faults, minor faults, free, total, available, disk caches, huge page
    /// allocations, failures of those. `None`: not said.
    pub values: [Option<u64>; 10],
}

/// The names of [`BalloonStats::values`], by tag.
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

/// The host's side.
pub struct BalloonControl {
    target_pages: AtomicU32,
    actual_pages: AtomicU32,
    /// Bytes that free page reporting gave to the host, over all time.
    reported_bytes: AtomicU64,
    signals: Mutex<Option<Arc<Signals>>>,
    stats: Mutex<BalloonStats>,
    ask: EventFd,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl BalloonControl {
    /// Asks the guest to give up `bytes` in all; fewer than before gives some back.
    pub fn set_target(&self, bytes: u64) {
        let pages = u32::try_from(bytes / PAGE_BYTES).unwrap_or(u32::MAX);
        self.target_pages.store(pages, Ordering::Release);
        if let Some(signals) = lock(&self.signals).as_ref() {
            signals.config_changed();
        }
    }

    /// What the guest was asked to give up, in bytes.
    #[must_use]
    pub fn target(&self) -> u64 {
        u64::from(self.target_pages.load(Ordering::Acquire)) * PAGE_BYTES
    }

    /// What it says that it gave up, in bytes.
    #[must_use]
    pub fn actual(&self) -> u64 {
        u64::from(self.actual_pages.load(Ordering::Acquire)) * PAGE_BYTES
    }

    /// What free page reporting gave to the host so far, in bytes.
    #[must_use]
    pub fn reported(&self) -> u64 {
        self.reported_bytes.load(Ordering::Acquire)
    }

    /// What the guest said last; and asks it to say it again. The first answer comes with the guest's driver.
    #[must_use]
    pub fn stats(&self) -> BalloonStats {
        if let Err(error) = self.ask.write(1) {
            log::warn!("balloon: {error}");
        }
        *lock(&self.stats)
    }
}

/// The device.
pub struct Balloon {
    control: Arc<BalloonControl>,
    /// The guest may report free pages.
    reporting: bool,
}

impl Balloon {
    /// A balloon that asks for `target` bytes at once.
    ///
    /// # Errors
    /// Where no eventfd is to be had.
    pub fn new(target: u64, reporting: bool) -> io::Result<Self> {
        let control = Arc::new(BalloonControl {
            target_pages: AtomicU32::new(0),
            actual_pages: AtomicU32::new(0),
            reported_bytes: AtomicU64::new(0),
            signals: Mutex::default(),
            stats: Mutex::default(),
            ask: EventFd::new(EFD_NONBLOCK)?,
        });
        control.set_target(target);
        Ok(Self { control, reporting })
    }

    /// The host's side.
    #[must_use]
    pub fn control(&self) -> Arc<BalloonControl> {
        Arc::clone(&self.control)
    }
}

impl VirtioDevice for Balloon {
    fn kind(&self) -> DeviceKind {
        DeviceKind { id: 5, name: "balloon", pci_class: 0x00ff }
    }

    fn device_features(&self) -> u64 {
        F_STATS_VQ | F_DEFLATE_ON_OOM | if self.reporting { F_REPORTING } else { 0 }
    }

    fn queue_max_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; 4]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut config = [0; 8];
        config[..4].copy_from_slice(&self.control.target_pages.load(Ordering::Acquire).to_le_bytes());
        config[4..].copy_from_slice(&self.control.actual_pages.load(Ordering::Acquire).to_le_bytes());
        read_config_bytes(&config, offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        if let (4, Ok(actual)) = (offset, <[u8; 4]>::try_from(data)) {
            self.control.actual_pages.store(u32::from_le_bytes(actual), Ordering::Release);
        }
    }

    fn activate(&mut self, mut activation: Activation) -> Result<Vec<Worker>, ActivateError> {
        let (inflate, deflate) = (activation.queue(0)?, activation.queue(1)?);
        // Queues that were not agreed on do not count (§5.5.2, as drivers do it).
        let mut next = 2;
        let mut optional = |feature: u64, activation: &mut Activation| {
            let there = activation.has(feature);
            let index = next;
            next += u16::from(there);
            there.then(|| activation.queue(index)).transpose()
        };
        let stats = optional(F_STATS_VQ, &mut activation)?;
        let reporting = optional(F_REPORTING, &mut activation)?;
        *lock(&self.control.signals) = Some(Arc::clone(&activation.signals));
        let mut workers: Vec<Worker> = vec![Box::new(Pages::new(inflate, deflate, reporting, self.control()))];
        if let Some(queue) = stats {
            workers.push(Box::new(Statistics::new(queue, self.control())));
        }
        Ok(workers)
    }

    fn reset(&mut self) {
        *lock(&self.control.signals) = None;
        self.control.actual_pages.store(0, Ordering::Release);
    }
}
