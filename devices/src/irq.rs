//! Interrupt lines.

use std::io;
use std::sync::Arc;
use vm_superio::Trigger;
use vmm_sys_util::eventfd::EventFd;

/// A line that raises an edge when its eventfd is written (KVM: an irqfd without a resample fd).
#[derive(Clone)]
pub struct IrqLine(Arc<EventFd>);

impl IrqLine {
    /// A line over `event`.
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
