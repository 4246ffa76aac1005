//! The memory balloon (virtio 1.3 §5.5): takes memory from the guest and returns it, lets the guest report free pages to the
//! host, and gets memory statistics from the guest.

mod control;
#[cfg(test)]
mod tests;
mod worker;

pub use control::{BalloonControl, BalloonStats, STAT_NAMES};

use crate::virtio::device::{ActivateError, Activation, DeviceKind, VirtioDevice, read_config_bytes};
use crate::virtio::device_thread::DeviceThread;
use crate::virtio::saved::{DeviceFault, DeviceState, SaveFault};
use crate::virtio::worker::Worker;
use std::io;
use std::sync::Arc;
use worker::{Pages, Statistics};

// Feature bits (virtio 1.3 §5.5.3).
const F_STATS_VQ: u64 = 1 << 1;
const F_DEFLATE_ON_OOM: u64 = 1 << 2;
const F_PAGE_REPORTING: u64 = 1 << 5;
/// Maximum size of a queue, in descriptors.
const QUEUE_SIZE: u16 = 128;
/// The most bytes that one free page report names, which the host discards. Linux reports at most 32 ranges of 4 MiB.
const MAX_REPORT_BYTES: u32 = 1 << 30;

/// The setting of free page reporting (`VIRTIO_BALLOON_F_PAGE_REPORTING`): the host takes back the pages that the guest
/// reports.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum FreePageReporting {
    /// The feature is not offered.
    #[default]
    Off,
    /// The feature is offered.
    On,
}

/// The traditional memory balloon device (virtio 1.3 §5.5).
pub struct Balloon {
    control: Arc<BalloonControl>,
    reporting: FreePageReporting,
    /// The largest size that a state may have.
    max_pages: u32,
}

impl Balloon {
    /// Makes a balloon with a target size of `target` bytes.
    ///
    /// # Errors
    /// Returns an error where no eventfd can be created.
    pub fn new(target: u64, reporting: FreePageReporting) -> io::Result<Self> {
        let control = Arc::new(BalloonControl::new()?);
        control.set_target(target);
        Ok(Self { control, reporting, max_pages: u32::MAX })
    }

    /// Has [`VirtioDevice::restore`] take no size from a state that is larger than `bytes`.
    #[must_use]
    pub fn at_most(self, bytes: u64) -> Self {
        Self { max_pages: u32::try_from(bytes / control::PAGE_BYTES).unwrap_or(u32::MAX), ..self }
    }

    /// Returns the host's side of the balloon.
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
        let reporting = match self.reporting {
            FreePageReporting::On => F_PAGE_REPORTING,
            FreePageReporting::Off => 0,
        };
        F_STATS_VQ | F_DEFLATE_ON_OOM | reporting
    }

    fn queue_max_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; 4]
    }

    fn thread_role(&self) -> DeviceThread {
        DeviceThread::Balloon
    }

    fn thread_count(&self) -> usize {
        2
    }

    fn max_chain_bytes(&self) -> u32 {
        MAX_REPORT_BYTES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut config = [0; 8];
        config[..4].copy_from_slice(&self.control.target_pages().to_le_bytes());
        config[4..].copy_from_slice(&self.control.actual_pages().to_le_bytes());
        read_config_bytes(&config, offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        if let (4, Ok(actual)) = (offset, <[u8; 4]>::try_from(data)) {
            self.control.set_actual_pages(u32::from_le_bytes(actual));
        }
    }

    fn save(&self) -> Result<Option<DeviceState>, SaveFault> {
        let (target_pages, actual_pages) = (self.control.target_pages(), self.control.actual_pages());
        Ok(Some(DeviceState::Balloon { target_pages, actual_pages }))
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), DeviceFault> {
        let DeviceState::Balloon { target_pages, actual_pages } = *state else { return Err(DeviceFault::Other) };
        self.control.restore(target_pages.min(self.max_pages), actual_pages.min(self.max_pages));
        Ok(())
    }

    fn activate(&mut self, mut activation: Activation) -> Result<Vec<Worker>, ActivateError> {
        let (inflate, deflate) = (activation.take_queue(0)?, activation.take_queue(1)?);
        // Linux gives optional queues consecutive indices: those of features that were not negotiated are skipped.
        let mut next = 2;
        let mut optional_queue = |feature: u64| {
            let negotiated = activation.has_feature(feature);
            let index = next;
            next += u16::from(negotiated);
            negotiated.then(|| activation.take_queue(index)).transpose()
        };
        let stats = optional_queue(F_STATS_VQ)?;
        let reporting = optional_queue(F_PAGE_REPORTING)?;
        self.control.set_interrupt(Some(activation.interrupt));
        let mut workers: Vec<Worker> = vec![Box::new(Pages::new(inflate, deflate, reporting, self.control()))];
        if let Some(queue) = stats {
            workers.push(Box::new(Statistics::new(queue, self.control())));
        }
        Ok(workers)
    }

    fn reset(&mut self) {
        self.control.set_interrupt(None);
        self.control.set_actual_pages(0);
    }
}
