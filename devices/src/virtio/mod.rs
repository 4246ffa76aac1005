//! Virtio devices (virtio 1.3): what a device is, what it gets when the driver is ready, and what carries it.
//!
//! A device knows no registers and no transport; a transport ([`pci`], [`mmio`]) knows no device. How to add a device:
//! README.md beside this file.

pub mod balloon;
pub mod block;
mod busy_poll;
pub mod console;
pub mod fs;
#[cfg(any(test, feature = "test-utils"))]
pub mod hostile;
pub mod mmio;
#[cfg(any(test, feature = "test-utils"))]
pub mod mock;
pub mod net;
mod notify_coalescer;
pub mod pci;
mod queue;
pub mod rng;
#[cfg(test)]
mod tests;
mod transport;
mod vhost;
pub mod vsock;
mod worker;

pub use queue::{Chain, QueueCounts, Virtqueue};
pub use transport::{Doorbell, TransportOptions};
pub use worker::WorkerThread;

use crate::bus::BusDevice;
use crate::memory::Memory;
use event_manager::MutEventSubscriber;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use thiserror::Error;

/// VIRTIO_F_INDIRECT_DESC (virtio 1.3 §6).
pub const F_INDIRECT_DESC: u64 = 1 << 28;
/// VIRTIO_F_EVENT_IDX.
pub const F_EVENT_IDX: u64 = 1 << 29;
/// VIRTIO_F_VERSION_1.
pub const F_VERSION_1: u64 = 1 << 32;

/// What kind of device (virtio 1.3 §5): its number, a short name, and its PCI class.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceKind {
    /// The virtio device id.
    pub id: u16,
    /// The name used in counts and logs, such as "block".
    pub name: &'static str,
    /// PCI class and subclass, as in the upper two bytes of the class code.
    pub pci_class: u16,
}

/// Why the driver is interrupted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InterruptSource {
    /// Buffers of this queue were used.
    Queue(u16),
    /// The device's configuration changed.
    Config,
}

/// How a device interrupts its driver; made by the transport.
pub trait VirtioInterrupt: Send + Sync {
    /// Interrupts.
    ///
    /// # Errors
    /// Where the eventfd behind it refuses.
    fn trigger(&self, source: InterruptSource) -> io::Result<()>;
}

/// What a running device tells its driver beside used buffers.
pub struct Signals {
    interrupt: Arc<dyn VirtioInterrupt>,
    generation: AtomicU32,
    needs_reset: AtomicBool,
}

impl Signals {
    pub(crate) fn new(interrupt: Arc<dyn VirtioInterrupt>) -> Arc<Self> {
        Arc::new(Self { interrupt, generation: AtomicU32::new(0), needs_reset: AtomicBool::new(false) })
    }

    /// Says that a queue's buffers were used.
    pub fn used(&self, queue: u16) {
        self.trigger(InterruptSource::Queue(queue));
    }

    /// Says that the configuration changed (virtio 1.3 §2.5). Call it after the change.
    pub fn config_changed(&self) {
        self.generation.fetch_add(1, Ordering::AcqRel);
        self.trigger(InterruptSource::Config);
    }

    /// Says that the device cannot go on (DEVICE_NEEDS_RESET, virtio 1.3 §2.1.2).
    pub fn needs_reset(&self) {
        if !self.needs_reset.swap(true, Ordering::AcqRel) {
            self.trigger(InterruptSource::Config);
        }
    }

    pub(crate) fn generation(&self) -> u32 {
        self.generation.load(Ordering::Acquire)
    }

    pub(crate) fn is_broken(&self) -> bool {
        self.needs_reset.load(Ordering::Acquire)
    }

    pub(crate) fn clear(&self) {
        self.needs_reset.store(false, Ordering::Release);
    }

    fn trigger(&self, source: InterruptSource) {
        if let Err(error) = self.interrupt.trigger(source) {
            log::error!("cannot interrupt the guest ({source:?}): {error}");
        }
    }
}

/// What a device gets when its driver is ready (DRIVER_OK).
pub struct Activation {
    /// The features that device and driver agreed on.
    pub features: u64,
    /// Guest memory.
    pub memory: Memory,
    /// For the driver.
    pub signals: Arc<Signals>,
    /// The queues by number; `None` where the driver did not set one up.
    pub queues: Vec<Option<Virtqueue>>,
}

impl Activation {
    /// Takes queue `index`.
    ///
    /// # Errors
    /// [`ActivateError::NoQueue`] where the driver did not set it up.
    pub fn queue(&mut self, index: u16) -> Result<Virtqueue, ActivateError> {
        self.queues.get_mut(usize::from(index)).and_then(Option::take).ok_or(ActivateError::NoQueue(index))
    }

    /// Whether a feature was agreed on.
    #[must_use]
    pub fn has(&self, feature: u64) -> bool {
        self.features & feature == feature
    }
}

/// A device cannot start.
#[derive(Debug, Error)]
pub enum ActivateError {
    /// The driver left out a queue that the device cannot do without.
    #[error("the driver did not set up queue {0}")]
    NoQueue(u16),
    /// A host resource.
    #[error("cannot {0}")]
    Io(&'static str, #[source] io::Error),
}

/// What a device has running while its driver is ready: each on a thread with an event loop of its own, so that one
/// that waits holds up no other.
pub type Worker = Box<dyn MutEventSubscriber + Send>;

/// A transport with its device, as the machine sees it.
pub trait VirtioTransport: BusDevice {
    /// What happens on the queues.
    fn counts(&self) -> Vec<Arc<QueueCounts>>;

    /// Sets what the transport may do against exits; before the guest sees the device.
    fn set_options(&self, options: TransportOptions);

    /// Ends the device's threads, once they have done what the guest asked for so far. The guest must not run any more.
    fn stop(&self);
}

/// A virtio device behind any transport.
pub trait VirtioDevice: Send {
    /// What it is.
    fn kind(&self) -> DeviceKind;

    /// The device's own feature bits. The transport adds VERSION_1, INDIRECT_DESC and EVENT_IDX.
    fn device_features(&self) -> u64 {
        0
    }

    /// The largest size of each queue: a power of two, at most 32768.
    fn queue_max_sizes(&self) -> Vec<u16>;

    /// Fills `data` from the configuration space; what is beyond its end stays as it is.
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let _ = (offset, data);
    }

    /// Takes a write to the configuration space. Most are read-only: ignored.
    fn write_config(&mut self, offset: u64, data: &[u8]) {
        log::debug!("{}: write of {} bytes to read-only configuration at {offset:#x}", self.kind().name, data.len());
    }

    /// Starts.
    ///
    /// # Errors
    /// Where it cannot; the driver sees DEVICE_NEEDS_RESET.
    fn activate(&mut self, activation: Activation) -> Result<Vec<Worker>, ActivateError>;

    /// Goes back to where it was before [`VirtioDevice::activate`]. Its workers have ended by now.
    fn reset(&mut self) {}
}

/// Copies the part of `config` at `offset` that `data` has room for.
pub(crate) fn read_config_bytes(config: &[u8], offset: u64, data: &mut [u8]) {
    let Some(rest) = usize::try_from(offset).ok().and_then(|offset| config.get(offset..)) else { return };
    let len = rest.len().min(data.len());
    data[..len].copy_from_slice(&rest[..len]);
}
