//! What the PCI transport has besides the state that all transports share, for snapshots.

use super::super::saved::{BusState, StateFault};
use super::{MSIX_ENABLE, MSIX_MASK_ALL, PciDevice};
use crate::pci::MsixControl;
use std::sync::atomic::Ordering;

impl PciDevice {
    pub(super) fn save_bus(&self) -> BusState {
        let interrupt = &self.interrupt;
        BusState::Pci {
            config: self.config().save(),
            isr_status: interrupt.isr_status.load(Ordering::Acquire),
            config_vector: interrupt.config_vector.load(Ordering::Acquire),
            queue_vectors: interrupt.queue_vectors.iter().map(|vector| vector.load(Ordering::Acquire)).collect(),
            msix: interrupt.msix.save(),
        }
    }

    /// Sets what [`Self::save_bus`] has returned. Vectors that the device does not have are none.
    pub(super) fn restore_bus(&self, bus: &BusState) -> Result<(), StateFault> {
        let BusState::Pci { config, isr_status, config_vector, queue_vectors, msix } = bus else {
            return Err(StateFault::Bus);
        };
        let interrupt = &self.interrupt;
        if queue_vectors.len() != interrupt.queue_vectors.len() {
            return Err(StateFault::Queues);
        }
        if !self.config().restore(config) {
            return Err(StateFault::ConfigSpace);
        }
        interrupt.isr_status.store(isr_status & 3, Ordering::Release);
        interrupt.config_vector.store(self.existing_vector(*config_vector), Ordering::Release);
        for (vector, saved) in interrupt.queue_vectors.iter().zip(queue_vectors) {
            vector.store(self.existing_vector(*saved), Ordering::Release);
        }
        let control = self.config().byte(self.msix_capability + 3);
        let control =
            MsixControl { enabled: control & MSIX_ENABLE != 0, function_masked: control & MSIX_MASK_ALL != 0 };
        if interrupt.msix.restore(msix, control) { Ok(()) } else { Err(StateFault::Queues) }
    }
}
