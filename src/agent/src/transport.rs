//! The connections to the host: vsock, or Unix sockets in tests.

use crate::instructions::Instructions;
use crate::report::{Failure, PATIENCE, Stage};
use crate::streams::wait_for;
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

/// Connects all streams at once: the guest sleeps once for all answers of the host, not for each. The kernel gives up a connection after 2 s
/// (`VSOCK_DEFAULT_CONNECT_TIMEOUT`).
pub(crate) fn connect(instructions: &Instructions) -> Result<Sockets, Failure> {
    let begin = |name: &'static str, offset: u32| {
        let port = FIRST_PORT + offset;
        let socket = begin(instructions, port).map_err(|error| failed(name, port, &error))?;
        Ok(Connecting { name, port, socket })
    };
    let control = begin("control", 0)?;
    let stdin = begin("stdin", 1)?;
    let stdout = begin("stdout", 2)?;
    let stderr = if instructions.terminal.is_some() { None } else { Some(begin("stderr", 3)?) };
    let streams = StreamSockets {
        stdin: stdin.finish()?,
        stdout: stdout.finish()?,
        stderr: stderr.map(Connecting::finish).transpose()?,
    };
    Ok(Sockets { control: control.finish()?, streams })
}

fn failed(name: &str, port: u32, error: &io::Error) -> Failure {
    let option = match error.raw_os_error().map(Errno::from_raw_os_error) {
        Some(Errno::AFNOSUPPORT | Errno::NODEV) => {
            " (the kernel has no driver for it: CONFIG_VSOCKETS and CONFIG_VIRTIO_VSOCKETS)"
        }
        _ => "",
    };
    Stage::Connect.failed(format_args!("vsock port {port:#x} of the host, for {name}"), format_args!("{error}{option}"))
}

/// A connection that the host may not have answered yet.
struct Connecting {
    name: &'static str,
    port: u32,
    socket: Socket,
}

impl Connecting {
    /// Waits for the answer. The socket stays in non-blocking mode.
    fn finish(self) -> Result<OwnedFd, Failure> {
        let answered = wait_for(&self.socket, PollFlags::OUT, Instant::now() + PATIENCE).map_err(io::Error::from);
        match answered.and_then(|()| self.socket.take_error()) {
            Ok(None) => Ok(self.socket.into()),
            Ok(Some(error)) | Err(error) => Err(failed(self.name, self.port, &error)),
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
        let sockets = connect(&instructions(&folder)).expect("connected");
        assert!(sockets.streams.stderr.is_some());
        rustix::io::write(&sockets.control, b"started").expect("written");
        std::fs::remove_dir_all(&folder).expect("removed");
    }
}
