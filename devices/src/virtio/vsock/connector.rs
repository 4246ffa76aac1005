//! Connections of the guest to Unix sockets of the host, made by another process.
//!
//! The device's own process may not connect to anything: code that has taken it over could otherwise reach every socket of its
//! user. It sends the port, and the other process, which forms the path itself, connects and sends the connection back
//! (SCM_RIGHTS, unix(7)). Both ends are here.
//!
//! The packets are of [`PACKET_BYTES`]: the number of the request, then the port (request) or the errno, 0 for none (answer); each 32
//! bits, little-endian.

use rustix::fs::{CWD, FileType, Mode, OFlags, fstat, openat};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, SocketAddrUnix, SocketFlags, SocketType, connect, recv, recvmsg, send, sendmsg, socket_with, socketpair,
};
use std::ffi::OsString;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// Size in bytes of a request and of an answer.
const PACKET_BYTES: usize = 8;
/// The most requests of a device without an answer.
const MAX_OUTSTANDING: usize = 128;
/// Connections that are made at once, and then one in each [`INTERVAL`].
const BURST: u32 = 1024;
const INTERVAL: Duration = Duration::from_millis(1);
/// Requests that are answered before the process looks at other things again.
const REQUESTS_AT_ONCE: usize = 16;

/// A port of the host that is joined to a connection which was made before.
#[derive(Debug)]
pub struct JoinedPort {
    /// The port that the guest connects to.
    pub port: u32,
    /// The connection, in non-blocking mode: the guest's first connection to the port gets it.
    pub socket: UnixStream,
}

/// The ports of the host that a guest can connect to. All others are refused.
#[derive(Debug, Default)]
pub struct HostPorts<'a> {
    /// The sockets `PATH_PORT` of this path.
    pub path: Option<&'a Path>,
    /// Ports that have a connection each. The path has no say in them.
    pub joined: Vec<JoinedPort>,
}

/// Makes both ends: the device's, and that of the process that connects the guest to `ports`.
///
/// # Errors
/// Returns the error of socketpair(2).
pub fn connector(ports: HostPorts<'_>) -> io::Result<(Connector, HostConnector)> {
    let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
    let device = Connector { socket: ours, next: AtomicU32::new(0), outstanding: AtomicUsize::new(0) };
    let bucket = Bucket { left: BURST, last: Instant::now() };
    let sockets = HostSockets {
        named: ports.path.map(NamedSockets::new),
        joined: ports.joined.into_iter().map(|joined| (joined.port, Some(joined.socket.into()))).collect(),
    };
    Ok((device, HostConnector { socket: theirs, sockets, bucket }))
}

fn packet(number: u32, value: u32) -> [u8; PACKET_BYTES] {
    (u64::from(value) << 32 | u64::from(number)).to_le_bytes()
}

fn fields(packet: [u8; PACKET_BYTES]) -> (u32, u32) {
    let [a, b, c, d, e, f, g, h] = packet;
    (u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, g, h]))
}

/// The device's end: asks for connections.
pub struct Connector {
    socket: OwnedFd,
    /// The number of the next request.
    next: AtomicU32,
    /// Requests that have no answer yet, those from before a reset of the device among them.
    outstanding: AtomicUsize,
}

/// What became of a request.
pub struct Answer {
    /// The number that [`Connector::request`] returned.
    pub number: u32,
    /// The connection, in non-blocking mode, or the host's error.
    pub result: io::Result<UnixStream>,
}

impl Connector {
    /// Asks for a connection to the host's socket for `port`, and returns the number of the request.
    ///
    /// # Errors
    /// Returns `WouldBlock` where too many requests have no answer, or the error of send(2).
    pub fn request(&self, port: u32) -> io::Result<u32> {
        if self.outstanding.load(Ordering::Relaxed) >= MAX_OUTSTANDING {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        send(&self.socket, &packet(number, port), SendFlags::DONTWAIT | SendFlags::NOSIGNAL)?;
        self.outstanding.fetch_add(1, Ordering::Relaxed);
        Ok(number)
    }

    /// Takes the next answer, without waiting for it.
    #[must_use]
    pub fn answer(&self) -> Option<Answer> {
        let mut bytes = [0; PACKET_BYTES];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        let received = recvmsg(&self.socket, &mut [IoSliceMut::new(&mut bytes)], &mut ancillary, flags);
        if received.ok()?.bytes != PACKET_BYTES {
            return None;
        }
        self.outstanding.fetch_sub(1, Ordering::Relaxed);
        let (number, errno) = fields(bytes);
        let mut files = ancillary.drain().flat_map(|message| match message {
            RecvAncillaryMessage::ScmRights(files) => Some(files),
            _ => None,
        });
        let stream = files.next().and_then(|mut files| files.next()).map(UnixStream::from);
        let errno = i32::try_from(errno).ok().filter(|errno| *errno > 0).unwrap_or(libc::EMFILE);
        let result = stream.ok_or_else(|| io::Error::from_raw_os_error(errno));
        Some(Answer { number, result })
    }
}

impl AsFd for Connector {
    /// Readable once there is an answer.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// The sockets of the host that a guest can connect to.
struct HostSockets {
    named: Option<NamedSockets>,
    /// By port; `None` once a connection of the guest has it.
    joined: Vec<(u32, Option<OwnedFd>)>,
}

impl HostSockets {
    fn connect(&mut self, port: u32) -> Result<OwnedFd, Errno> {
        if let Some((_, socket)) = self.joined.iter_mut().find(|(joined, _)| *joined == port) {
            return socket.take().ok_or(Errno::CONNREFUSED);
        }
        self.named.as_ref().ok_or(Errno::CONNREFUSED)?.connect(port)
    }
}

/// The sockets of the host that have names.
struct NamedSockets {
    /// The folder, opened once: what its path names later is not used.
    folder: Result<OwnedFd, Errno>,
    /// The name of the socket for port P is this, `_` and P.
    prefix: OsString,
}

impl NamedSockets {
    fn new(path: &Path) -> Self {
        let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let folder = openat(CWD, parent, flags, Mode::empty());
        Self { folder, prefix: path.file_name().unwrap_or_default().to_owned() }
    }

    /// Connects to the socket for `port`, without waiting. A symbolic link is not followed: the guest may write to the folder by a
    /// share, and must not choose what is connected to.
    fn connect(&self, port: u32) -> Result<OwnedFd, Errno> {
        let folder = self.folder.as_ref().map_err(|error| *error)?;
        let mut name = self.prefix.clone();
        name.push(format!("_{port}"));
        let file = openat(folder, name, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?;
        if FileType::from_raw_mode(fstat(&file)?.st_mode) != FileType::Socket {
            return Err(Errno::CONNREFUSED);
        }
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        // By the open file, so that it is what was looked at.
        connect(&socket, &SocketAddrUnix::new(format!("/proc/self/fd/{}", file.as_raw_fd()))?)?;
        Ok(socket)
    }
}

/// How many connections may be made now.
struct Bucket {
    left: u32,
    /// When `left` was last right.
    last: Instant,
}

impl Bucket {
    fn fill(&mut self, now: Instant) {
        let passed = now.saturating_duration_since(self.last).as_nanos() / INTERVAL.as_nanos();
        let passed = u32::try_from(passed).unwrap_or(u32::MAX);
        if passed > 0 {
            self.left = self.left.saturating_add(passed).min(BURST);
            self.last = now;
        }
    }

    fn take(&mut self, now: Instant) -> bool {
        self.fill(now);
        match self.left.checked_sub(1) {
            Some(left) => {
                self.left = left;
                true
            }
            None => false,
        }
    }
}

/// What [`HostConnector::serve`] has done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Served {
    /// All requests that were there are answered.
    All,
    /// There may be more.
    Some,
    /// There may be more, for which it is too early.
    Later,
    /// The other end is closed, or has sent what is no request: there is nothing to serve any more.
    Closed,
}

/// The end of the process that connects.
pub struct HostConnector {
    socket: OwnedFd,
    sockets: HostSockets,
    bucket: Bucket,
}

impl HostConnector {
    /// Answers a bounded number of requests that have arrived, and waits for nothing. An answer that the other end has no room for
    /// is dropped: it has then not taken many others.
    pub fn serve(&mut self, now: Instant) -> Served {
        for _ in 0..REQUESTS_AT_ONCE {
            if !self.bucket.take(now) {
                return Served::Later;
            }
            // One byte more than there may be.
            let mut bytes = [0; PACKET_BYTES + 1];
            match recv(&self.socket, &mut bytes[..], RecvFlags::DONTWAIT) {
                Ok((PACKET_BYTES, _)) => {}
                Err(Errno::AGAIN) => {
                    self.bucket.left += 1;
                    return Served::All;
                }
                Err(Errno::INTR) => continue,
                Ok(_) | Err(_) => return Served::Closed,
            }
            let [request @ .., _] = bytes;
            let (number, port) = fields(request);
            let result = self.sockets.connect(port);
            self.send_answer(number, &result);
        }
        Served::Some
    }

    /// Returns when [`HostConnector::serve`] goes on after [`Served::Later`]; `None` where it can at once.
    #[must_use]
    pub fn resumes_at(&self, now: Instant) -> Option<Instant> {
        let at = self.bucket.last + INTERVAL;
        (self.bucket.left == 0 && at > now).then_some(at)
    }

    /// Sends an answer. The connection is the other end's then: this process keeps no copy.
    fn send_answer(&self, number: u32, result: &Result<OwnedFd, Errno>) {
        let errno = result.as_ref().err().map_or(0, |error| error.raw_os_error().unsigned_abs());
        let files = result.as_ref().ok().map(AsFd::as_fd);
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !files.as_slice().is_empty() {
            ancillary.push(SendAncillaryMessage::ScmRights(files.as_slice()));
        }
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        let bytes = packet(number, errno);
        if let Err(error) = sendmsg(&self.socket, &[IoSlice::new(&bytes)], &mut ancillary, flags) {
            log::debug!("vsock: the machine's process does not take a connection: {error}");
        }
    }
}

impl AsFd for HostConnector {
    /// Readable once there is a request.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

#[cfg(test)]
#[path = "connector_tests.rs"]
mod tests;
