//! A socket device whose connections a thread of the same process makes.

use super::{HostConnector, HostPorts, Served, Vsock, connector};
use rustix::event::{PollFd, PollFlags, poll};
use std::error::Error;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

/// A device as of [`Vsock::new`], and a thread that connects for it until it is dropped.
pub(in crate::virtio) fn device(cid: u32, path: &Path) -> Result<Vsock, Box<dyn Error>> {
    let (device, host) = connector(HostPorts { path: Some(path), joined: Vec::new() })?;
    std::thread::spawn(move || serve(host));
    Ok(Vsock::new(cid, Some(path), Arc::new(device))?)
}

fn serve(mut host: HostConnector) {
    loop {
        let polled = poll(&mut [PollFd::new(&host, PollFlags::IN)], None);
        if polled.is_err() || host.serve(Instant::now()) == Served::Closed {
            return;
        }
    }
}
