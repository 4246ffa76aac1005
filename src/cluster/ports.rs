//! Port I/O within a cluster: by the same handler as that of an exit.

use super::exec::{Access, Interrupts, PortEnd, Ports};
use super::places::Places;
use crate::exit::handler::Route;
use crate::exit::{EndReason, Handler, Outcome};
use crate::kvm::vcpu::Running;
use crate::kvm::{Direction, Exit, clock};
use crate::measure::clusters::ClusterEnd as End;
use hwvmm_devices::irq::raised_by_this_thread;

/// How long a cluster may be, in ticks of the TSC.
#[derive(Clone, Copy, Debug)]
pub(super) struct Deadline {
    /// The TSC at its start.
    pub(super) start: u64,
    /// While the guest takes interrupts: what came meanwhile waits.
    pub(super) taken: u64,
    /// While it takes none.
    pub(super) masked: u64,
}

/// The ports of a machine, for the length of a cluster.
pub(super) struct HandlerPorts<'a, 'b> {
    handler: &'a Handler,
    vcpu: &'a mut Running<'b>,
    places: &'a mut Places,
    deadline: Deadline,
    /// The accesses that were answered.
    pub(super) answered: u64,
    /// The end of the run, where an access has ended it.
    pub(super) end: Option<EndReason>,
}

impl<'a, 'b> HandlerPorts<'a, 'b> {
    pub(super) fn new(
        handler: &'a Handler,
        vcpu: &'a mut Running<'b>,
        places: &'a mut Places,
        deadline: Deadline,
    ) -> Self {
        Self { handler, vcpu, places, deadline, answered: 0, end: None }
    }

    /// Answers an access to a port of a device; `None` where there is none.
    fn access(&mut self, access: Access, direction: Direction, data: &mut [u8]) -> Option<PortEnd> {
        let port = access.port;
        // Ports that no device of hwvmm's claims may be KVM's.
        self.handler.pio.find(port.into())?;
        let raised = raised_by_this_thread();
        let size = data.len();
        let handled = self.handler.handle(&mut Exit::Pio { port, direction, size, data });
        debug_assert!(matches!(handled.route, Route::Slot(..) | Route::None));
        self.answered += 1;
        self.places.avoided(access.rip, port, direction);
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
    fn input(&mut self, access: Access) -> Option<(u64, PortEnd)> {
        let mut bytes = [0; 8];
        let end = self.access(access, Direction::In, bytes.get_mut(..1 << access.width)?)?;
        Some((u64::from_le_bytes(bytes), end))
    }

    fn output(&mut self, access: Access, value: u64) -> Option<PortEnd> {
        let mut bytes = value.to_le_bytes();
        self.access(access, Direction::Out, bytes.get_mut(..1 << access.width)?)
    }

    fn interrupted(&mut self, interrupts: Interrupts) -> Option<End> {
        if self.vcpu.is_kicked() {
            return Some(End::Kicked);
        }
        let most = match interrupts {
            Interrupts::Taken => self.deadline.taken,
            Interrupts::Masked => self.deadline.masked,
        };
        (clock::tsc().wrapping_sub(self.deadline.start) >= most).then_some(End::Time)
    }
}
