//! Interrupt lines to the guest's interrupt controller.

use std::cell::Cell;
use std::io;
use std::sync::Arc;
use vm_superio::Trigger;
use vmm_sys_util::eventfd::EventFd;

thread_local! {
    static RAISED: Cell<u64> = const { Cell::new(0) };
}

/// How many times the calling thread has raised an interrupt line or sent a message, of any device.
#[must_use]
pub fn raised_by_this_thread() -> u64 {
    RAISED.get()
}

/// Counts an interrupt that the calling thread raises.
pub(crate) fn note_raised() {
    RAISED.set(RAISED.get().wrapping_add(1));
}

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
        note_raised();
        self.0.write(1)
    }
}
