//! Interrupts from a device to its driver: used buffers, configuration changes and `DEVICE_NEEDS_RESET`.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

/// What an interrupt tells the driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InterruptSource {
    /// The device used buffers of the queue with this index (used buffer notification, virtio 1.3 §2.3).
    Queue(u16),
    /// The device configuration or the device status changed (configuration change notification, virtio 1.3 §2.3).
    Config,
}

/// The transport's way to interrupt the driver: one line, or one MSI-X vector per source.
pub trait VirtioInterrupt: Send + Sync {
    /// Sets the transport's interrupt status for `source` and raises the interrupt.
    ///
    /// # Errors
    /// Returns the error of the write to the eventfd behind the interrupt.
    fn trigger(&self, source: InterruptSource) -> io::Result<()>;

    /// Clears the transport's interrupt status, at the end of a reset.
    fn clear(&self);

    /// Raises the interrupt again where the driver has not acknowledged it: on its way it may have been lost with the machine that a
    /// snapshot was made of.
    ///
    /// # Errors
    /// Returns the error of the write to the eventfd behind the interrupt.
    fn repeat(&self) -> io::Result<()> {
        Ok(())
    }

    /// Called on a device's thread when a reset has ended that the driver's write of the device status did not wait for. A
    /// transport whose driver sees the status without an access updates it.
    fn reset_ended(&self) {}
}

/// What a running device notifies its driver of. Shared by the transport and the device's workers.
pub struct DeviceInterrupt {
    interrupt: Arc<dyn VirtioInterrupt>,
    config_generation: AtomicU32,
    needs_reset: AtomicBool,
}

impl DeviceInterrupt {
    pub(crate) fn new(interrupt: Arc<dyn VirtioInterrupt>) -> Arc<Self> {
        Arc::new(Self { interrupt, config_generation: AtomicU32::new(0), needs_reset: AtomicBool::new(false) })
    }

    /// Sends a used buffer notification for the queue with index `queue`.
    pub fn signal_used_queue(&self, queue: u16) {
        self.trigger(InterruptSource::Queue(queue));
    }

    /// Increments the configuration generation (virtio 1.3 §2.5) and sends a configuration change notification. Must be
    /// called after the change.
    pub fn signal_config_changed(&self) {
        // By two: the number between is shown while the configuration is written (see shown_state.rs).
        self.config_generation.fetch_add(2, Ordering::AcqRel);
        self.trigger(InterruptSource::Config);
    }

    /// Sets `DEVICE_NEEDS_RESET` in the device status (virtio 1.3 §2.1.2) and notifies the driver.
    pub fn set_needs_reset(&self) {
        if !self.needs_reset.swap(true, Ordering::AcqRel) {
            self.trigger(InterruptSource::Config);
        }
    }

    /// Raises an interrupt again that the driver has not acknowledged.
    pub(crate) fn repeat(&self) {
        if let Err(error) = self.interrupt.repeat() {
            log::error!("virtio: cannot raise the interrupt again: {error}");
        }
    }

    /// Says that a reset has ended that the driver's write of the device status did not wait for.
    pub(crate) fn reset_ended(&self) {
        self.interrupt.reset_ended();
    }

    pub(crate) fn config_generation(&self) -> u32 {
        self.config_generation.load(Ordering::Acquire)
    }

    pub(crate) fn needs_reset(&self) -> bool {
        self.needs_reset.load(Ordering::Acquire)
    }

    /// Sets what a snapshot has, without a notification.
    pub(crate) fn restore(&self, config_generation: u32, needs_reset: bool) {
        self.config_generation.store(config_generation, Ordering::Release);
        self.needs_reset.store(needs_reset, Ordering::Release);
    }

    /// Clears `DEVICE_NEEDS_RESET` and what interrupts were for, at the end of a reset: no worker can raise one any more.
    pub(crate) fn clear(&self) {
        self.needs_reset.store(false, Ordering::Release);
        self.interrupt.clear();
    }

    fn trigger(&self, source: InterruptSource) {
        if let Err(error) = self.interrupt.trigger(source) {
            log::error!("virtio: cannot raise the interrupt for {source:?}: {error}");
        }
    }
}
