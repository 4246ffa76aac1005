//! A virtio transport as the machine sees it: the device on its bus, and the addresses to register as ioeventfds.

use super::device_thread::ThreadStart;
use super::queue::QueueCounts;
use super::saved::{PauseError, VirtioState, VirtioStateError};
use super::worker::WorkerError;
use crate::bus::BusDevice;
use crate::page::PageError;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};
use thiserror::Error;
use vmm_sys_util::eventfd::EventFd;

/// A device on its transport.
pub trait VirtioTransport: BusDevice {
    /// Returns the counters of each queue, by queue index.
    fn counts(&self) -> Vec<Arc<QueueCounts>>;

    /// Sets how the transport avoids kicks and interrupts. Must be called before the guest accesses the device.
    fn set_options(&self, options: TransportOptions);

    /// Starts the device's threads, which call `start` first. Must be called before the guest runs: a device without threads
    /// cannot be started by its driver.
    ///
    /// # Errors
    /// Returns [`TransportError`] where a thread cannot be started or prepared.
    fn start_threads(&self, start: &ThreadStart) -> Result<(), TransportError>;

    /// Pauses the device: its requests in flight are completed, what was written is flushed, and no worker has its queues. The vCPUs
    /// must wait. [`VirtioTransport::resume`] is to be called afterwards, whatever this returns.
    ///
    /// # Errors
    /// Returns [`PauseError`] where that is not so by `deadline`.
    fn pause(&self, deadline: Instant) -> Result<(), PauseError>;

    /// Returns the state of a device that is paused.
    ///
    /// # Errors
    /// Returns [`PauseError`] where the device has no state that can be saved.
    fn save(&self) -> Result<VirtioState, PauseError>;

    /// Sets the state of a device that no driver has accessed. It is paused then.
    ///
    /// # Errors
    /// Returns [`VirtioStateError`] where it is none that this device can have.
    fn restore(&self, state: &VirtioState) -> Result<(), VirtioStateError>;

    /// Lets a device that is paused go on; each queue is looked at once, and each interrupt that may have been lost is repeated.
    /// Returns false where its old workers still wait for the host: it is to be called again later.
    fn resume(&self) -> bool;

    /// Has the device's threads end once their workers have handled all buffers that are available. The vCPUs must have
    /// stopped.
    fn request_stop(&self);

    /// Waits until the device's threads have ended, or until `deadline`. Then the workers handle no more buffers, and threads
    /// that wait for the host are left to themselves.
    fn wait_stopped(&self, deadline: Instant);
}

/// A guest physical address whose write is a kick of one queue. The machine registers an ioeventfd for it.
pub struct Doorbell {
    /// Guest physical address of the register that is written.
    pub gpa: u64,
    /// The 32-bit value that the write must have; `None`: any value.
    pub datamatch: Option<u32>,
    /// The queue's kick eventfd.
    pub event: Arc<EventFd>,
}

/// How a transport and its queues avoid kicks and interrupts.
#[derive(Clone, Copy, Debug)]
pub struct TransportOptions {
    /// If true, `VIRTIO_F_EVENT_IDX` is offered (virtio 1.3 §6).
    pub event_idx: bool,
    /// Delay used buffer notifications for a moment where a batch of requests is likely to follow.
    pub coalesce_notifications: bool,
    /// The longest time that a worker polls the available ring in place of waiting for a kick; `None`: no polling.
    pub busy_poll: Option<Duration>,
}

impl Default for TransportOptions {
    fn default() -> Self {
        Self { event_idx: true, coalesce_notifications: true, busy_poll: None }
    }
}

/// A device cannot be put on its transport.
#[derive(Debug, Error)]
pub enum TransportError {
    /// An eventfd for a queue's kicks could not be created.
    #[error("cannot create an eventfd for a virtqueue")]
    EventFd(#[from] io::Error),
    /// A thread of the device cannot be started.
    #[error(transparent)]
    Thread(#[from] WorkerError),
    /// The page of registers could not be mapped.
    #[error(transparent)]
    Page(#[from] PageError),
    /// The PCI configuration space has no room for the device's capabilities.
    #[error("the PCI configuration space has no room for the capabilities of a device with {queues} queues")]
    NoCapabilitySpace {
        /// Number of the device's queues.
        queues: usize,
    },
}
