//! The client's end of the control socket.

use super::protocol::{MAX_FILES, MAX_RESPONSE_BYTES, MAX_VCPUS, Request, RequestError, Response};
use crate::snapshot::{Draft, FolderError};
use hwvmm_devices::path_text::PathText as _;
use hwvmm_devices::socket::connect_nonblocking;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use rustix::process::Uid;
use std::io::{self, IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use thiserror::Error;

/// How long a machine has for its whole response.
const TIMEOUT: Duration = Duration::from_secs(10);

/// A request did not get the response it asks for.
#[derive(Debug, Error)]
pub enum ClientError {
    /// Nothing listens on the socket, or the file is missing.
    #[error("no machine answers at {}: is it running, with --api?", .path.shown())]
    Connect {
        /// The path of the control socket.
        path: PathBuf,
        /// The error of connect(2).
        source: io::Error,
    },
    /// A read or a write on the connection failed.
    #[error("the connection to the machine at {} failed", .path.shown())]
    Io {
        /// The path of the control socket.
        path: PathBuf,
        /// The error of the read or the write.
        source: io::Error,
    },
    /// There is no whole response within the time.
    #[error("the machine at {} did not answer within {} s", .path.shown(), .timeout.as_secs_f64())]
    TimedOut {
        /// The path of the control socket.
        path: PathBuf,
        /// The time that it had.
        timeout: Duration,
    },
    /// The machine closed the connection before it had sent a line.
    #[error("the machine at {} closed the connection without a response: has its run ended?", .path.shown())]
    Closed {
        /// The path of the control socket.
        path: PathBuf,
    },
    /// The response has no newline within [`MAX_RESPONSE_BYTES`].
    #[error("the response of {} has more than {max_bytes} bytes, the most that hwvmm reads: is this a control socket of hwvmm?", .path.shown())]
    TooLong {
        /// The path of the control socket.
        path: PathBuf,
        /// The limit in bytes.
        max_bytes: usize,
    },
    /// The response is no response of this protocol.
    #[error("the response of {} is not of this version's protocol", .path.shown())]
    Malformed {
        /// The path of the control socket.
        path: PathBuf,
        /// The error of the JSON parser.
        source: serde_json::Error,
    },
    /// The response has more vCPUs than a machine has.
    #[error("the response of {} has {vcpus} vCPUs, and a machine has at most {MAX_VCPUS}: is this a control socket of hwvmm?", .path.shown())]
    TooManyVcpus {
        /// The path of the control socket.
        path: PathBuf,
        /// The number of vCPUs in the response.
        vcpus: usize,
    },
    /// A process of another user listens on the socket.
    #[error("user {uid} listens on {}, and not this user ({user}): run hwvmm as the user whose machine it is", .path.shown())]
    Peer {
        /// The path of the control socket.
        path: PathBuf,
        /// The user that listens.
        uid: u32,
        /// The user that this process runs as.
        user: u32,
    },
    /// The response is valid, and belongs to another request.
    #[error("the machine at {} answered another request", .path.shown())]
    Mismatch {
        /// The path of the control socket.
        path: PathBuf,
    },
    /// The machine refused the request.
    #[error(transparent)]
    Refused(#[from] RequestError),
}

/// How long a machine has to write its memory.
const SNAPSHOT_TIMEOUT: Duration = Duration::from_secs(600);

/// A snapshot was not made.
#[derive(Debug, Error)]
pub enum SnapshotError {
    /// Its folder.
    #[error(transparent)]
    Folder(#[from] FolderError),
    /// The machine.
    #[error(transparent)]
    Client(#[from] ClientError),
}

/// Has the machine whose control socket is at `path` write its memory and state to the new folder `target`. The folder and its
/// files are made here, with this user's rights, and the machine gets the open files. It appears under its name when it is
/// whole; otherwise nothing is left of it.
///
/// # Errors
/// [`SnapshotError`].
pub fn snapshot(path: &Path, target: &Path) -> Result<Response, SnapshotError> {
    let draft = Draft::new(target)?;
    let response = exchange(path, Request::Snapshot, &draft.files(), SNAPSHOT_TIMEOUT)?;
    if !matches!(response, Response::Snapshot { .. }) {
        return Err(ClientError::Mismatch { path: path.to_owned() }.into());
    }
    draft.keep()?;
    Ok(response)
}

/// Sends a request to the machine whose control socket is at `path`, and waits up to 10 s for its response, which is never
/// [`Response::Error`].
///
/// # Errors
/// [`ClientError`].
pub fn request(path: &Path, request: Request) -> Result<Response, ClientError> {
    exchange(path, request, &[], TIMEOUT)
}

fn exchange(
    path: &Path,
    request: Request,
    files: &[BorrowedFd<'_>],
    timeout: Duration,
) -> Result<Response, ClientError> {
    let deadline = Instant::now() + timeout;
    let io_error = |source| ClientError::Io { path: path.to_owned(), source };
    let mut socket =
        connect_nonblocking(path).map_err(|source| ClientError::Connect { path: path.to_owned(), source })?;
    // Where the machine has ended, any user may have made a socket of the same name.
    let peer = rustix::net::sockopt::socket_peercred(&socket).map_err(|error| io_error(error.into()))?.uid;
    check_peer(path, peer, rustix::process::geteuid())?;
    socket.set_nonblocking(false).map_err(io_error)?;
    let mut line = serde_json::to_vec(&request).map_err(|error| io_error(error.into()))?;
    line.push(b'\n');
    // A request fits into the socket's buffer: this does not wait.
    send(&mut socket, &line, files).map_err(io_error)?;
    let line = match read_line(&mut socket, deadline) {
        Ok(line) => line,
        Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
            return Err(ClientError::TimedOut { path: path.to_owned(), timeout });
        }
        Err(error) => return Err(io_error(error)),
    };
    if line.len() > MAX_RESPONSE_BYTES {
        return Err(ClientError::TooLong { path: path.to_owned(), max_bytes: MAX_RESPONSE_BYTES });
    }
    if line.is_empty() {
        return Err(ClientError::Closed { path: path.to_owned() });
    }
    match serde_json::from_slice(&line) {
        Ok(Response::Error(error)) => Err(error.into()),
        Ok(Response::Exits(live)) if live.vcpus.len() > MAX_VCPUS => {
            Err(ClientError::TooManyVcpus { path: path.to_owned(), vcpus: live.vcpus.len() })
        }
        Ok(response) => Ok(response),
        Err(source) => Err(ClientError::Malformed { path: path.to_owned(), source }),
    }
}

/// Returns an error unless the process that listens runs as `user` or as root.
fn check_peer(path: &Path, peer: Uid, user: Uid) -> Result<(), ClientError> {
    if peer == user || peer.is_root() {
        return Ok(());
    }
    Err(ClientError::Peer { path: path.to_owned(), uid: peer.as_raw(), user: user.as_raw() })
}

/// Sends a line, and the open files `files` with it.
fn send(socket: &mut UnixStream, line: &[u8], files: &[BorrowedFd<'_>]) -> io::Result<()> {
    if files.is_empty() {
        return socket.write_all(line);
    }
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FILES))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !ancillary.push(SendAncillaryMessage::ScmRights(files)) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let sent = sendmsg(&*socket, &[IoSlice::new(line)], &mut ancillary, SendFlags::NOSIGNAL)?;
    if sent == line.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
}

/// Reads until a newline, the end of the stream, or more than [`MAX_RESPONSE_BYTES`]. The error is `TimedOut` or
/// `WouldBlock` at the deadline.
fn read_line(socket: &mut UnixStream, deadline: Instant) -> io::Result<Vec<u8>> {
    let mut line = Vec::new();
    let mut chunk = [0; 16 << 10];
    while line.len() <= MAX_RESPONSE_BYTES && !line.ends_with(b"\n") {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        socket.set_read_timeout(Some(left))?;
        match socket.read(&mut chunk) {
            Ok(0) => break,
            Ok(count) => line.extend_from_slice(&chunk[..count]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(line)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;

    /// The error of a client whose peer reads the request, then does `answer`.
    fn error_of(timeout: Duration, answer: impl FnOnce(&mut UnixStream) + Send) -> ClientError {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("socket");
        let listener = UnixListener::bind(&path).expect("bound");
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let (mut peer, _) = listener.accept().expect("a client");
                let _ = peer.read(&mut [0; 256]);
                answer(&mut peer);
            });
            exchange(&path, Request::Status, &[], timeout).expect_err("no response")
        })
    }

    #[test]
    fn a_client_waits_no_longer_than_its_deadline() {
        let start = Instant::now();
        let error = error_of(Duration::from_millis(200), |peer| {
            // Bytes that arrive do not extend the deadline.
            for _ in 0..8 {
                let _ = peer.write_all(b"{");
                std::thread::sleep(Duration::from_millis(50));
            }
        });
        assert!(matches!(error, ClientError::TimedOut { .. }), "{error:?}");
        assert!(start.elapsed() < Duration::from_secs(5) && error.to_string().contains("0.2 s"), "{error}");
    }

    #[test]
    fn an_endless_response_is_cut_off_with_the_limit_named() {
        let error = error_of(Duration::from_secs(20), |peer| while peer.write_all(&[b'x'; 4096]).is_ok() {});
        assert!(matches!(error, ClientError::TooLong { .. }), "{error:?}");
        assert!(error.to_string().contains("8388608"), "{error}");
    }

    #[test]
    fn only_this_user_and_root_are_believed() {
        let (root, alice, mallory) = (Uid::ROOT, Uid::from_raw(1000), Uid::from_raw(1001));
        let check = |peer, user| check_peer(Path::new("/tmp/vm.sock"), peer, user);
        assert!(check(alice, alice).is_ok() && check(root, alice).is_ok());
        for user in [alice, root] {
            let error = check(mallory, user).expect_err("refused").to_string();
            assert!(error.contains("user 1001 listens on /tmp/vm.sock"), "{error}");
        }
    }

    #[test]
    fn other_errors_are_told_apart() {
        let second = Duration::from_secs(20);
        assert!(matches!(error_of(second, |_| {}), ClientError::Closed { .. }));
        let error = error_of(second, |peer| peer.write_all(b"{\"state\":\"running\"}\n").expect("written"));
        assert!(matches!(error, ClientError::Malformed { .. }), "{error:?}");
        let refusal = b"{\"response\":\"error\",\"error\":\"no-balloon\"}\n";
        let error = error_of(second, |peer| peer.write_all(refusal).expect("written"));
        assert!(matches!(error, ClientError::Refused(RequestError::NoBalloon)), "{error:?}");
        let many = format!(
            "{{\"response\":\"exits\",\"at_ns\":1,\"vcpus\":[{}{{\"kvm\":{{}}}}]}}\n",
            "{\"kvm\":{}},".repeat(254)
        );
        let error = error_of(second, |peer| peer.write_all(many.as_bytes()).expect("written"));
        assert!(matches!(error, ClientError::TooManyVcpus { vcpus: 255, .. }), "{error:?}");
        let missing = request(Path::new("/no/such/socket"), Request::Stop);
        assert!(matches!(missing, Err(ClientError::Connect { .. })));
    }
}
