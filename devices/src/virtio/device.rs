//! A virtio device as its transport sees it (virtio 1.3 §2): type, features, queues, configuration, activation, reset.

use super::device_thread::{DeviceThread, ThreadPreparation};
use super::interrupt::DeviceInterrupt;
use super::queue::{RingAddresses, Virtqueue};
use super::ring_area::RingArea;
use super::saved::{DeviceFault, DeviceState, SaveFault};
use super::worker::{Worker, WorkerError};
use crate::memory::Memory;
use std::error::Error as StdError;
use std::io;
use std::sync::Arc;
use thiserror::Error;

/// The most bytes of a chain for a device that does not say otherwise: 1 MiB of data, the longest request of a FUSE file
/// system, and as much again for headers and what else a driver adds.
pub const DEFAULT_MAX_CHAIN_BYTES: u32 = 2 << 20;

/// Brings what was written to stable storage; returns the error of fsync(2) or of a write.
pub type FlushWork = Box<dyn FnOnce() -> io::Result<()> + Send>;

/// The type of a device (virtio 1.3 §5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceKind {
    /// The virtio device ID (virtio 1.3 §5).
    pub id: u16,
    /// The name used in counters and log messages, such as "block".
    pub name: &'static str,
    /// PCI class code: base class in the upper byte, subclass in the lower one.
    pub pci_class: u16,
}

/// How many interrupts a device asks a transport for that has several.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InterruptVectors {
    /// One for each queue, which may then go to different vCPUs.
    PerQueue,
    /// One for all queues: fewer registers to write when the driver starts.
    Shared,
}

/// A virtio device behind any transport.
pub trait VirtioDevice: Send {
    /// Returns the device's type.
    fn kind(&self) -> DeviceKind;

    /// Returns the feature bits of the device type. The transport adds [`super::F_VERSION_1`],
    /// [`super::F_INDIRECT_DESC`] and [`super::F_EVENT_IDX`].
    fn device_features(&self) -> u64 {
        0
    }

    /// Returns the maximum size of each queue, in descriptors: a power of two, at most 32768 (virtio 1.3 §2.7).
    fn queue_max_sizes(&self) -> Vec<u16>;

    /// Returns how many interrupts the queues are to have.
    fn interrupt_vectors(&self) -> InterruptVectors {
        InterruptVectors::PerQueue
    }

    /// Returns the most bytes that the buffers of a descriptor chain may have together. A longer chain breaks its queue, and
    /// the driver sees `DEVICE_NEEDS_RESET`. It bounds the work of one request, so it is well above what drivers send.
    fn max_chain_bytes(&self) -> u32 {
        DEFAULT_MAX_CHAIN_BYTES
    }

    /// Returns what the device's threads are for.
    fn thread_role(&self) -> DeviceThread;

    /// Returns the number of the device's threads: the most workers that [`VirtioDevice::activate`] returns. They start before
    /// the guest runs.
    fn thread_count(&self) -> usize {
        1
    }

    /// Returns what each of the device's threads does first when it starts. Most have nothing to do.
    fn thread_preparation(&self) -> ThreadPreparation {
        Arc::new(|| Ok(()))
    }

    /// Copies the device configuration from byte `offset` on to `data`. Bytes of `data` beyond its end are not changed.
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let _ = (offset, data);
    }

    /// Handles a write to the device configuration at byte `offset`. Most devices have no writable fields; the write is
    /// then ignored.
    fn write_config(&mut self, offset: u64, data: &[u8]) {
        log::debug!(
            "{}: {} bytes written to the read-only device configuration at {offset:#x}: ignored",
            self.kind().name,
            data.len()
        );
    }

    /// Starts the device, as the driver has set `DRIVER_OK`. The transport runs each of the returned workers on one of the
    /// device's threads. This is called on a vCPU's thread, which may make few system calls: what needs others is done before,
    /// when the device is made, or in the workers' `init`.
    ///
    /// # Errors
    /// Returns an error where the device cannot start; the driver then sees `DEVICE_NEEDS_RESET`.
    fn activate(&mut self, activation: Activation) -> Result<Vec<Worker>, ActivateError>;

    /// The workers are told to end as at a reset, but for a pause: what they share with the guest stays. Most devices have nothing to do.
    fn prepare_pause(&mut self) {}

    /// Returns what brings to stable storage what the driver has written, for a snapshot. It is run on a thread of the device that
    /// has no worker then. Most devices have nothing to do.
    fn flush(&self) -> Option<FlushWork> {
        None
    }

    /// Returns what the device has besides its queues, for a snapshot. Called while no worker has its queues; `None` where the
    /// device cannot be saved.
    ///
    /// # Errors
    /// Returns [`SaveFault`] where the device has what no snapshot can have.
    fn save(&self) -> Result<Option<DeviceState>, SaveFault> {
        Ok(None)
    }

    /// Sets what [`VirtioDevice::save`] has returned, in another run, or checks that it is of this device.
    ///
    /// # Errors
    /// Returns [`DeviceFault`] where it is of another device.
    fn restore(&mut self, state: &DeviceState) -> Result<(), DeviceFault> {
        let _ = state;
        Err(DeviceFault::Other)
    }

    /// Returns the device to its state before [`VirtioDevice::activate`]. Its workers were dropped when this is called.
    fn reset(&mut self) {}
}

/// What a device gets when the driver has set `DRIVER_OK`.
pub struct Activation {
    /// The negotiated feature bits.
    pub features: u64,
    /// The guest's memory, which holds the rings and the buffers of the queues.
    pub memory: Memory,
    /// Sends used buffer and configuration change notifications to the driver.
    pub interrupt: Arc<DeviceInterrupt>,
    /// The queues by index; `None` where the driver did not enable one.
    pub queues: Vec<Option<Virtqueue>>,
}

impl Activation {
    /// Takes the queue with index `index` out of [`Activation::queues`].
    ///
    /// # Errors
    /// Returns [`ActivateError::MissingQueue`] where the driver did not enable it.
    pub fn take_queue(&mut self, index: u16) -> Result<Virtqueue, ActivateError> {
        self.queues.get_mut(usize::from(index)).and_then(Option::take).ok_or(ActivateError::MissingQueue(index))
    }

    /// Returns true if all bits of `feature` were negotiated.
    #[must_use]
    pub fn has_feature(&self, feature: u64) -> bool {
        self.features & feature == feature
    }
}

/// A device cannot start.
#[derive(Debug, Error)]
pub enum ActivateError {
    /// The driver did not enable a queue that the device needs.
    #[error("the driver did not enable queue {0}, which the device needs")]
    MissingQueue(u16),
    /// The driver gave a queue a size or an address that virtio 1.3 §2.7 does not allow.
    #[error("queue {index} has an invalid size or ring address")]
    InvalidQueue {
        /// Index of the queue.
        index: u16,
        /// The size or address that virtio-queue refuses.
        source: virtio_queue::Error,
    },
    /// The rings of a queue are not, or not all, in guest memory.
    #[error("the rings of queue {index} are not in guest memory: {rings:#x?}")]
    RingsOutsideMemory {
        /// Index of the queue.
        index: u16,
        /// Where the driver put the rings.
        rings: RingAddresses,
    },
    /// Two areas of the device's queues overlap.
    #[error("{first} and {second} overlap")]
    OverlappingRings {
        /// The area that starts first.
        first: RingArea,
        /// The area that starts in it.
        second: RingArea,
    },
    /// A host resource is missing.
    #[error("cannot {action}")]
    Io {
        /// What was to be done, such as "create a timer".
        action: &'static str,
        /// The error of the system call.
        source: io::Error,
    },
    /// The vhost backend in the host's kernel refused a request.
    #[error("cannot {action}")]
    Vhost {
        /// What was to be done, such as "set the owner of the vhost backend".
        action: &'static str,
        /// The error of the request to the backend.
        source: vhost::Error,
    },
    /// The device failed in a way of its own.
    #[error(transparent)]
    Device(Box<dyn StdError + Send + Sync>),
    /// A worker's thread cannot be used.
    #[error(transparent)]
    Worker(#[from] WorkerError),
}

impl ActivateError {
    /// Returns a closure for `map_err` that makes an [`ActivateError::Io`] of an I/O error.
    pub(crate) fn io(action: &'static str) -> impl Fn(io::Error) -> Self + Copy {
        move |source| Self::Io { action, source }
    }

    /// Returns a closure for `map_err` that makes an [`ActivateError::Vhost`] of a vhost error.
    pub(crate) fn vhost(action: &'static str) -> impl Fn(vhost::Error) -> Self + Copy {
        move |source| Self::Vhost { action, source }
    }
}

/// Copies `config` from byte `offset` on to `data`, as far as both reach.
pub(crate) fn read_config_bytes(config: &[u8], offset: u64, data: &mut [u8]) {
    let Some(rest) = usize::try_from(offset).ok().and_then(|offset| config.get(offset..)) else { return };
    let len = rest.len().min(data.len());
    data[..len].copy_from_slice(&rest[..len]);
}
