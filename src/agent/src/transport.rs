//! The connections to the host: vsock, or Unix sockets in tests.

use crate::instructions::Instructions;
use crate::report::{Failure, Stage};
use rustix::io::Errno;
use socket2::{Domain, SockAddr, Socket, Type};
use std::io;
use std::os::fd::OwnedFd;

/// The host's CID (virtio 1.3, 5.10.4).
const HOST_CID: u32 = 2;
/// The port of the control stream. Stdin, stdout and stderr are at the next three.
const FIRST_PORT: u32 = 0x6877_0000;

/// The command's streams.
#[derive(Debug)]
pub(crate) struct StreamSockets {
    pub(crate) stdin: OwnedFd,
    pub(crate) stdout: OwnedFd,
    /// None with a terminal.
    pub(crate) stderr: Option<OwnedFd>,
}

/// All connections.
#[derive(Debug)]
pub(crate) struct Sockets {
    pub(crate) control: OwnedFd,
    pub(crate) streams: StreamSockets,
}

/// Connects all streams. The kernel gives up each connection after 2 s (`VSOCK_DEFAULT_CONNECT_TIMEOUT`).
pub(crate) fn connect(instructions: &Instructions) -> Result<Sockets, Failure> {
    let one = |name: &str, offset: u32| {
        let port = FIRST_PORT + offset;
        open(instructions, port).map_err(|error| {
            let option = match error.raw_os_error().map(Errno::from_raw_os_error) {
                Some(Errno::AFNOSUPPORT | Errno::NODEV) => {
                    " (the kernel has no driver for it: CONFIG_VSOCKETS and CONFIG_VIRTIO_VSOCKETS)"
                }
                _ => "",
            };
            Stage::Connect
                .failed(format_args!("vsock port {port:#x} of the host, for {name}"), format_args!("{error}{option}"))
        })
    };
    let control = one("control", 0)?;
    let stdin = one("stdin", 1)?;
    let stdout = one("stdout", 2)?;
    let stderr = if instructions.terminal.is_some() { None } else { Some(one("stderr", 3)?) };
    Ok(Sockets { control, streams: StreamSockets { stdin, stdout, stderr } })
}

fn open(instructions: &Instructions, port: u32) -> io::Result<OwnedFd> {
    let (domain, address) = match &instructions.sockets {
        Some(folder) => (Domain::UNIX, SockAddr::unix(folder.join(port.to_string()))?),
        None => (Domain::VSOCK, SockAddr::vsock(HOST_CID, port)),
    };
    let socket = Socket::new(domain, Type::STREAM, None)?;
    socket.connect(&address)?;
    Ok(socket.into())
}
