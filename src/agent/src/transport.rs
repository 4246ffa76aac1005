//! The connections to the host: vsock; ports of a virtio console, where the kernel has no vsock; Unix sockets in tests.

use crate::instructions::{Instructions, Task};
use crate::ports::Ports;
use crate::report::{Failure, PATIENCE, Stage};
use crate::streams::{Kind, wait_for};
use rustix::event::PollFlags;
use rustix::io::Errno;
use socket2::{Domain, SockAddr, Socket, Type};
use std::io;
use std::os::fd::OwnedFd;
use std::time::Instant;

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
    pub(crate) control: Connection,
    pub(crate) streams: Streams,
}

/// Connects all streams: by vsock, or by the console's ports where the kernel has no driver for vsock, or the machine no such device.
pub(crate) fn connect(instructions: &Instructions) -> Result<Connections, Failure> {
    match Connecting::begin(instructions, "control", 0) {
        Ok(control) => by_sockets(instructions, control),
        Err(failed) if failed.has_no_driver() => match Ports::find() {
            Ok(ports) => by_ports(instructions, &ports),
            Err(missing) => Err(failed.because(format_args!(
                " (the kernel has no driver for it: CONFIG_VSOCKETS and CONFIG_VIRTIO_VSOCKETS); {missing}"
            ))),
        },
        Err(failed) => Err(failed.into()),
    }
}

/// Connects all sockets at once: the guest sleeps once for all answers of the host, not for each. The kernel gives up a connection after 2 s
/// (`VSOCK_DEFAULT_CONNECT_TIMEOUT`).
fn by_sockets(instructions: &Instructions, control: Connecting) -> Result<Connections, Failure> {
    let stdin = Connecting::begin(instructions, "stdin", 1)?;
    let stdout = Connecting::begin(instructions, "stdout", 2)?;
    let stderr = if has_stderr(instructions) { Some(Connecting::begin(instructions, "stderr", 3)?) } else { None };
    let streams = Streams {
        stdin: stdin.finish()?,
        stdout: stdout.finish()?,
        stderr: stderr.map(Connecting::finish).transpose()?,
    };
    Ok(Connections { control: control.finish()?, streams })
}

/// Returns false if the command has a terminal. One that comes later may have none.
fn has_stderr(instructions: &Instructions) -> bool {
    match &instructions.task {
        Task::Run(spec) => spec.terminal.is_none(),
        Task::Wait => true,
    }
}

/// Opens the ports. The host connects them in the order in which they are opened: once the last is connected, a stream that is hung up has
/// ended.
fn by_ports(instructions: &Instructions, ports: &Ports) -> Result<Connections, Failure> {
    let failed = |name: &str, error| Stage::Connect.failed(format_args!("the console's port for {name}"), error);
    let open = |name: &'static str| {
        let (file, device) = ports.open(name).map_err(|error| failed(name, error))?;
        Ok::<_, Failure>(Connection { file, kind: Kind::Port(device) })
    };
    let (stdin, stdout) = (open("stdin")?, open("stdout")?);
    let stderr = if has_stderr(instructions) { Some(open("stderr")?) } else { None };
    let (file, device) = ports.open_connected("control").map_err(|error| failed("control", error))?;
    let control = Connection { file, kind: Kind::Port(device) };
    Ok(Connections { control, streams: Streams { stdin, stdout, stderr } })
}

/// A socket that cannot be connected.
struct SocketFailure {
    name: &'static str,
    port: u32,
    error: io::Error,
}

impl SocketFailure {
    /// Returns true if the kernel has no driver for vsock, or the machine no such device.
    fn has_no_driver(&self) -> bool {
        let errno = self.error.raw_os_error().map(Errno::from_raw_os_error);
        matches!(errno, Some(Errno::AFNOSUPPORT | Errno::NODEV))
    }

    fn because(&self, reason: impl std::fmt::Display) -> Failure {
        let Self { name, port, error } = self;
        Stage::Connect
            .failed(format_args!("vsock port {port:#x} of the host, for {name}"), format_args!("{error}{reason}"))
    }
}

impl From<SocketFailure> for Failure {
    fn from(failed: SocketFailure) -> Self {
        failed.because("")
    }
}

/// A connection that the host may not have answered yet.
struct Connecting {
    name: &'static str,
    port: u32,
    socket: Socket,
}

impl Connecting {
    /// Begins to connect the stream `name`, whose port is `offset` behind the first.
    fn begin(instructions: &Instructions, name: &'static str, offset: u32) -> Result<Self, SocketFailure> {
        let port = FIRST_PORT + offset;
        match begin(instructions, port) {
            Ok(socket) => Ok(Self { name, port, socket }),
            Err(error) => Err(SocketFailure { name, port, error }),
        }
    }

    /// Waits for the answer. The socket stays in non-blocking mode.
    fn finish(self) -> Result<Connection, SocketFailure> {
        let answered = wait_for(&self.socket, PollFlags::OUT, Instant::now() + PATIENCE).map_err(io::Error::from);
        match answered.and_then(|()| self.socket.take_error()) {
            Ok(None) => Ok(Connection { file: self.socket.into(), kind: Kind::Socket }),
            Ok(Some(error)) | Err(error) => Err(SocketFailure { name: self.name, port: self.port, error }),
        }
    }
}

fn begin(instructions: &Instructions, port: u32) -> io::Result<Socket> {
    let (domain, address) = match &instructions.sockets {
        Some(folder) => (Domain::UNIX, SockAddr::unix(folder.join(port.to_string()))?),
        None => (Domain::VSOCK, SockAddr::vsock(HOST_CID, port)),
    };
    let socket = Socket::new(domain, Type::STREAM.nonblocking(), None)?;
    match socket.connect(&address) {
        Err(error) if error.raw_os_error() != Some(Errno::INPROGRESS.raw_os_error()) => Err(error),
        _ => Ok(socket),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;

    fn instructions(folder: &std::path::Path) -> Instructions {
        Instructions { sockets: Some(folder.to_owned()), ..Instructions::default() }
    }

    #[test]
    fn all_streams_are_connected_or_the_one_that_is_not_is_named() {
        let folder = std::env::temp_dir().join(format!("hwvmm-agent-{}", std::process::id()));
        std::fs::create_dir_all(&folder).expect("made");
        let listen = |offset: u32| UnixListener::bind(folder.join((FIRST_PORT + offset).to_string())).expect("bound");
        let mut hosts: Vec<UnixListener> = (0..3).map(listen).collect();
        let failure = connect(&instructions(&folder)).expect_err("nobody listens for stderr").to_string();
        assert!(failure.contains("vsock port 0x68770003 of the host, for stderr"), "{failure}");
        hosts.push(listen(3));
        let connections = connect(&instructions(&folder)).expect("connected");
        assert!(connections.streams.stderr.is_some());
        rustix::io::write(&connections.control.file, b"started").expect("written");
        std::fs::remove_dir_all(&folder).expect("removed");
    }
}
