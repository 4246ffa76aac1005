//! The ports that the agent in a guest finds its streams at (src/agent/README.md).

use hwvmm_devices::virtio::ports::{Flow, PortSpec};

/// The vsock port of the host with the control stream. Those of stdin, stdout and stderr follow.
pub const FIRST_AGENT_PORT: u32 = 0x6877_0000;

/// The same streams as ports of a console. A guest whose command has a terminal opens no stderr.
pub(super) const AGENT_PORTS: &[PortSpec] = &[
    PortSpec { name: "hwvmm.control", host_port: FIRST_AGENT_PORT, flow: Flow::Both },
    PortSpec { name: "hwvmm.stdin", host_port: FIRST_AGENT_PORT + 1, flow: Flow::ToGuest },
    PortSpec { name: "hwvmm.stdout", host_port: FIRST_AGENT_PORT + 2, flow: Flow::FromGuest },
    PortSpec { name: "hwvmm.stderr", host_port: FIRST_AGENT_PORT + 3, flow: Flow::FromGuest },
];
