//! What the machine's process and its parent have for the guest's connections to this host, and for its command. Made before the fork.

use super::kernel_log::KernelLog;
use super::plan::Plan;
use super::streams::{AgentStreams, CommandTerminal, Ends};
use crate::config::VsockBackend;
use hwvmm_devices::virtio::vsock::{Connector, HostConnector, HostPorts, connector};
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

/// The parent's ends. The machine's process drops its copies.
#[derive(Default)]
pub(super) struct ParentEnds<'a> {
    /// Makes the connections that the guest asks for; `None` where it has no device that does.
    pub(super) host_connector: Option<HostConnector>,
    /// The connections to the agent, where the guest runs a command.
    pub(super) streams: Option<Ends>,
    /// The kernel's log, where the guest runs a command.
    pub(super) kernel_log: Option<KernelLog<'a>>,
}

/// The ends of the machine's process. The parent drops its copies.
#[derive(Default)]
pub(super) struct MachineEnds {
    /// Asks the parent for connections.
    pub(super) connector: Option<Arc<Connector>>,
    /// Takes the kernel's log.
    pub(super) kernel_log: Option<OwnedFd>,
}

/// Makes all that `plan` needs.
///
/// # Errors
/// Returns the error of socketpair(2) or pipe2(2).
pub(super) fn make<'a>(plan: &Plan<'a>) -> io::Result<(ParentEnds<'a>, MachineEnds)> {
    let (mut ours, mut theirs) = (ParentEnds::default(), MachineEnds::default());
    let path = plan.config.vsock_path();
    let mut joined = Vec::new();
    if plan.config.has_agent() {
        let terminal = if plan.terminal.is_some() { CommandTerminal::Given } else { CommandTerminal::None };
        let streams = match (&plan.config.template, plan.snapshot) {
            (Some(_), _) => AgentStreams::Template,
            (None, Some(_)) => AgentStreams::Late(terminal),
            (None, None) => AgentStreams::Command(terminal),
        };
        let (streams, ports) = Ends::new(streams)?;
        let (log, writer) = KernelLog::new(plan.kernel_log)?;
        (ours.streams, ours.kernel_log, theirs.kernel_log) = (Some(streams), Some(log), Some(writer));
        joined = ports;
    }
    // Without a command, too, the ports of one in a snapshot have to be answered.
    let connects = plan.config.vsock.as_ref().is_some_and(|vsock| vsock.backend != VsockBackend::Vhost);
    if connects || !joined.is_empty() {
        let (asks, connects) = connector(HostPorts { path, joined })?;
        (theirs.connector, ours.host_connector) = (Some(Arc::new(asks)), Some(connects));
    }
    Ok((ours, theirs))
}
