//! A device with ports whose connections a thread of the same process makes.

use super::{Flow, PortSpec, Ports};
use crate::virtio::vsock::{HostConnector, HostPorts, JoinedPort, Served, connector};
use rustix::event::{PollFd, PollFlags, poll};
use std::io;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Instant;

/// The ports: the host has no connection for the last.
pub(in crate::virtio) const SPECS: &[PortSpec] = &[
    PortSpec { name: "both", host_port: 7, flow: Flow::Both },
    PortSpec { name: "in", host_port: 8, flow: Flow::ToGuest },
    PortSpec { name: "out", host_port: 9, flow: Flow::FromGuest },
    PortSpec { name: "nobody's", host_port: 10, flow: Flow::FromGuest },
];

/// A device, and the host's ends of its connections.
pub(in crate::virtio) fn device() -> io::Result<(Ports, Vec<UnixStream>)> {
    let (mut host, mut joined) = (Vec::new(), Vec::new());
    for spec in SPECS.iter().take(3) {
        let (near, far) = UnixStream::pair()?;
        far.set_nonblocking(true)?;
        host.push(near);
        joined.push(JoinedPort { port: spec.host_port, socket: far });
    }
    let (asks, connects) = connector(HostPorts { path: None, joined })?;
    std::thread::spawn(move || serve(connects));
    Ok((Ports::new(Arc::new(asks), SPECS), host))
}

fn serve(mut host: HostConnector) {
    while poll(&mut [PollFd::new(&host, PollFlags::IN)], None).is_ok() {
        if host.serve(Instant::now()) == Served::Closed {
            return;
        }
    }
}
