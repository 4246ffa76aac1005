//! The connections to the host: vsock; ports of a virtio console, where the kernel has no vsock; Unix sockets in tests.

use crate::instructions::Instructions;
use crate::ports::{self, Ports};
use crate::report::{Failure, Stage};
use crate::streams::Kind;
use rustix::io::Errno;
use socket2::{Domain, SockAddr, Socket, Type};
use std::io;
use std::os::fd::OwnedFd;

/// The host's CID (virtio 1.3, 5.10.4).
const HOST_CID: u32 = 2;
/// The port of the control stream. Stdin, stdout and stderr are at the next three.
const FIRST_PORT: u32 = 0x6877_0000;

/// One connection.
#[derive(Debug)]
pub(crate) struct Connection {
    pub(crate) file: OwnedFd,
    /// How its end is told.
    pub(crate) kind: Kind,
}

/// The command's streams.
#[derive(Debug)]
pub(crate) struct Streams {
    pub(crate) stdin: Connection,
    pub(crate) stdout: Connection,
    /// None with a terminal.
    pub(crate) stderr: Option<Connection>,
}

/// All connections.
#[derive(Debug)]
pub(crate) struct Connections {
    pub(crate) control: OwnedFd,
    pub(crate) streams: Streams,
}

/// Connects all streams: by vsock, whose connections the kernel gives up after 2 s (`VSOCK_DEFAULT_CONNECT_TIMEOUT`), or by the console's
/// ports where the kernel has no driver for vsock, or the machine no such device.
pub(crate) fn connect(instructions: &Instructions) -> Result<Connections, Failure> {
    let socket = |name: &'static str, offset: u32| {
        open(instructions, FIRST_PORT + offset)
            .map(|file| Connection { file, kind: Kind::Socket })
            .map_err(|error| (name, offset, error))
    };
    let ports = match socket("control", 0) {
        Ok(control) => {
            return all(instructions, control, socket).map_err(|(name, offset, error)| vsock_failed(name, offset, error));
        }
        Err((name, offset, error)) => match error.raw_os_error().map(Errno::from_raw_os_error) {
            Some(Errno::AFNOSUPPORT | Errno::NODEV) => Ports::find().map_err(|missing| {
                let what = format_args!("vsock port {:#x} of the host, for {name}", FIRST_PORT + offset);
                Stage::Connect.failed(
                    what,
                    format_args!("{error} (the kernel has no driver for it: CONFIG_VSOCKETS and CONFIG_VIRTIO_VSOCKETS); {missing}"),
                )
            })?,
            _ => return Err(vsock_failed(name, offset, error)),
        },
    };
    let port = |name: &'static str, _| {
        let (file, device) = ports.open(name).map_err(|error| (name, error))?;
        Ok(Connection { file, kind: Kind::Port(device) })
    };
    let failed = |(name, error): (&str, ports::PortError)| {
        Stage::Connect.failed(format_args!("the console's port for {name}"), error)
    };
    let control = port("control", 0).map_err(failed)?;
    all(instructions, control, port).map_err(failed)
}

/// The connections beside `control`, each made by `one`, which is given its name and how far it is behind the first port.
fn all<E>(
    instructions: &Instructions,
    control: Connection,
    one: impl Fn(&'static str, u32) -> Result<Connection, E>,
) -> Result<Connections, E> {
    let stdin = one("stdin", 1)?;
    let stdout = one("stdout", 2)?;
    let stderr = if instructions.terminal.is_some() { None } else { Some(one("stderr", 3)?) };
    Ok(Connections { control: control.file, streams: Streams { stdin, stdout, stderr } })
}

fn vsock_failed(name: &str, offset: u32, error: io::Error) -> Failure {
    Stage::Connect.failed(format_args!("vsock port {:#x} of the host, for {name}", FIRST_PORT + offset), error)
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
