//! Port I/O within a cluster: by the same handler as that of an exit.

use super::exec::{PortEnd, Ports};
use crate::exit::handler::Route;
use crate::exit::{EndReason, Handler, Outcome};
use crate::kvm::vcpu::Running;
use crate::kvm::{Direction, Exit, clock};
use crate::measure::clusters::ClusterEnd as End;
use hwvmm_devices::irq::raised_by_this_thread;

/// The ports of a machine, for the length of a cluster.
pub(super) struct HandlerPorts<'a, 'b> {
    handler: &'a Handler,
    vcpu: &'a mut Running<'b>,
    start: u64,
    most_ticks: u64,
    /// The accesses that were answered.
    pub(super) answered: u64,
    /// The end of the run, where an access has ended it.
    pub(super) end: Option<EndReason>,
}

impl<'a, 'b> HandlerPorts<'a, 'b> {
    pub(super) fn new(handler: &'a Handler, vcpu: &'a mut Running<'b>, start: u64, most_ticks: u64) -> Self {
        Self { handler, vcpu, start, most_ticks, answered: 0, end: None }
    }

    /// Answers an access to a port of a device; `None` where there is none.
    fn access(&mut self, port: u16, direction: Direction, data: &mut [u8]) -> Option<PortEnd> {
        // Ports that no device of hwvmm's claims may be KVM's.
        self.handler.pio.find(port.into())?;
        let raised = raised_by_this_thread();
        let size = data.len();
        let handled = self.handler.handle(&mut Exit::Pio { port, direction, size, data });
        debug_assert!(matches!(handled.route, Route::Slot(..) | Route::None));
        self.answered += 1;
        match handled.outcome {
            Outcome::End(end) => {
                self.end = Some(end);
                Some(PortEnd::Stop)
            }
            Outcome::Continue | Outcome::Kicked if raised_by_this_thread() != raised => Some(PortEnd::Interrupt),
            Outcome::Continue | Outcome::Kicked => Some(PortEnd::Nothing),
        }
    }
}

impl Ports for HandlerPorts<'_, '_> {
    fn input(&mut self, port: u16, width: u8) -> Option<(u64, PortEnd)> {
        let mut bytes = [0; 8];
        let end = self.access(port, Direction::In, bytes.get_mut(..1 << width)?)?;
        Some((u64::from_le_bytes(bytes), end))
    }

    fn output(&mut self, port: u16, width: u8, value: u64) -> Option<PortEnd> {
        let mut bytes = value.to_le_bytes();
        self.access(port, Direction::Out, bytes.get_mut(..1 << width)?)
    }

    fn interrupted(&mut self) -> Option<End> {
        if self.vcpu.is_kicked() {
            return Some(End::Kicked);
        }
        (clock::tsc().wrapping_sub(self.start) >= self.most_ticks).then_some(End::Time)
    }
}
