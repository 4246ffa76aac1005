//! The interrupts of the PCI transport: MSI-X vectors, and the ISR status.

use super::super::interrupt::{InterruptSource, VirtioInterrupt};
use super::super::shown_state::ShowsState;
use super::{NO_VECTOR, PciDevice};
use crate::pci::Msix;
use std::io;
use std::sync::atomic::{AtomicU8, AtomicU16, Ordering};
use std::sync::{OnceLock, Weak};

/// The bit of the ISR status for a change of the configuration (virtio 1.3 §4.1.4.5).
const CONFIG_CHANGED: u8 = 2;

/// The MSI-X vectors that the driver assigned, and the ISR status.
pub(super) struct PciInterrupt {
    pub(super) msix: Msix,
    pub(super) config_vector: AtomicU16,
    pub(super) queue_vectors: Vec<AtomicU16>,
    pub(super) isr_status: AtomicU8,
    device: OnceLock<Weak<PciDevice>>,
}

impl PciInterrupt {
    /// No vector is assigned to any of the `queues`, which are as many.
    pub(super) fn new(msix: Msix, queues: usize) -> Self {
        Self {
            msix,
            config_vector: AtomicU16::new(NO_VECTOR),
            queue_vectors: (0..queues).map(|_| AtomicU16::new(NO_VECTOR)).collect(),
            isr_status: AtomicU8::new(0),
            device: OnceLock::new(),
        }
    }

    /// Sets whose pages a change of the configuration is shown in.
    pub(super) fn set_device(&self, device: Weak<PciDevice>) {
        // This is the first set of a new `OnceLock`, which cannot fail.
        let _ = self.device.set(device);
    }

    /// Removes all assignments, as a device reset does.
    pub(super) fn reset(&self) {
        self.config_vector.store(NO_VECTOR, Ordering::Release);
        self.isr_status.store(0, Ordering::Release);
        for vector in &self.queue_vectors {
            vector.store(NO_VECTOR, Ordering::Release);
        }
    }

    /// Sets the ISR status, and sends the message of the vector that is assigned to `source`.
    pub(super) fn send(&self, source: InterruptSource) -> io::Result<()> {
        let (bit, vector) = match source {
            InterruptSource::Queue(queue) => (1, self.queue_vectors.get(usize::from(queue))),
            InterruptSource::Config => (CONFIG_CHANGED, Some(&self.config_vector)),
        };
        self.isr_status.fetch_or(bit, Ordering::AcqRel);
        match vector.map(|vector| vector.load(Ordering::Acquire)) {
            Some(vector) if vector != NO_VECTOR => self.msix.trigger(vector),
            _ => Ok(()),
        }
    }
}

impl VirtioInterrupt for PciInterrupt {
    fn trigger(&self, source: InterruptSource) -> io::Result<()> {
        if source == InterruptSource::Config
            && let Some(device) = self.device.get().and_then(Weak::upgrade)
        {
            device.config_changed();
        }
        self.send(source)
    }

    fn clear(&self) {
        self.isr_status.store(0, Ordering::Release);
    }

    fn repeat(&self) -> io::Result<()> {
        // Those of queues are sent to each of them. With MSI-X the driver need not read the ISR status: one too many is no harm.
        let changed = self.isr_status.load(Ordering::Acquire) & CONFIG_CHANGED != 0;
        if changed { self.send(InterruptSource::Config) } else { Ok(()) }
    }

    fn reset_ended(&self) {
        if let Some(device) = self.device.get().and_then(Weak::upgrade) {
            device.show_late_reset();
        }
    }
}
