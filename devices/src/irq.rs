//! Interrupt lines to the guest's interrupt controller.

use std::io;
use std::sync::Arc;
use vm_superio::Trigger;
use vmm_sys_util::eventfd::EventFd;

/// An edge-triggered interrupt line: a write to its eventfd raises it (KVM API §4.75, `KVM_IRQFD` without a resamplefd).
#[derive(Clone)]
pub struct IrqLine(Arc<EventFd>);

impl IrqLine {
    /// Makes a line of the irqfd `event`.
    #[must_use]
    pub fn new(event: Arc<EventFd>) -> Self {
        Self(event)
    }
}

impl Trigger for IrqLine {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}
