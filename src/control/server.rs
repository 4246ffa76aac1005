//! The machine's end of the control socket. It runs on the event loop's thread and never waits for a client.

use super::live::Live;
use super::protocol::{BalloonStatus, MAX_FILES, MAX_REQUEST_BYTES, Request, RequestError, Response, RunState, Status};
use crate::exit::EndReason;
use crate::snapshot::check_targets;
use crate::vcpu::Control;
use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use hwvmm_devices::path_text::PathText as _;
use hwvmm_devices::socket::Listener;
use hwvmm_devices::virtio::balloon::{BalloonControl, STAT_NAMES};
use rustix::io::Errno;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use std::collections::HashMap;
use std::io::{self, IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::Instant;
use thiserror::Error;

/// The largest number of connections. One more closes the oldest, so that clients that never send a line do not block others.
const MAX_CLIENTS: usize = 16;

/// Bytes of a page of the balloon (virtio 1.3, section 5.5.6).
const PAGE_BYTES: u64 = 4096;

/// The socket cannot be made.
#[derive(Debug, Error)]
#[error("cannot listen on the control socket {}{}", .path.shown(), Listener::remedy(.source))]
pub struct ListenError {
    path: PathBuf,
    source: io::Error,
}

/// How far a connection is.
enum Progress {
    /// What has been received of the request line.
    Receiving(Vec<u8>),
    /// The response line, and how many of its bytes have been sent.
    Sending(Vec<u8>, usize),
}

struct Client {
    stream: UnixStream,
    accepted: Instant,
    progress: Progress,
    /// Files that came with the request.
    files: Vec<OwnedFd>,
}

/// What reading from a client has brought.
enum Received {
    /// The line is not complete.
    Part,
    /// A line without its newline, or why it is refused.
    Line(Result<String, RequestError>),
    /// The client is gone.
    Closed,
}

/// Reads what has arrived, behind what `line` has already. A line may also end with the client's side of the connection.
fn receive(stream: &UnixStream, line: &mut Vec<u8>, files: &mut Vec<OwnedFd>) -> Received {
    let mut bytes = [0; MAX_REQUEST_BYTES];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FILES))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
    let closed = match recvmsg(stream, &mut [IoSliceMut::new(&mut bytes)], &mut ancillary, flags) {
        Ok(received) => {
            line.extend_from_slice(&bytes[..received.bytes]);
            received.bytes == 0
        }
        Err(Errno::AGAIN | Errno::INTR) => false,
        Err(_) => return Received::Closed,
    };
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(received) = message {
            // Those beyond are closed.
            files.extend(received.take(MAX_FILES.saturating_sub(files.len())));
        }
    }
    let newline = line.iter().position(|byte| *byte == b'\n');
    let end = newline.unwrap_or(line.len());
    if end >= MAX_REQUEST_BYTES {
        Received::Line(Err(RequestError::TooLong { max_bytes: MAX_REQUEST_BYTES }))
    } else if newline.is_some() || (closed && end > 0) {
        Received::Line(Ok(String::from_utf8_lossy(&line[..end]).trim().to_owned()))
    } else if closed {
        Received::Closed
    } else {
        Received::Part
    }
}

/// Sends what the socket's buffer takes. True while there is more to send.
fn send(stream: &mut UnixStream, response: &[u8], sent: &mut usize) -> bool {
    while *sent < response.len() {
        match stream.write(&response[*sent..]) {
            Ok(count) => *sent += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return true,
            Err(error) => {
                log::debug!("control socket: {error}");
                return false;
            }
        }
    }
    false
}

/// Answers requests on the socket.
pub struct Server {
    listener: Listener,
    clients: HashMap<RawFd, Client>,
    balloon: Option<Arc<BalloonControl>>,
    /// The largest size that the balloon is set to, in bytes.
    max_balloon_bytes: u64,
    control: Arc<Control>,
    live: Arc<OnceLock<Live>>,
}

impl Server {
    /// Listens at `path`. The balloon is set to `max_balloon_bytes` at most. Only the user that runs hwvmm can connect (mode 0600).
    ///
    /// # Errors
    /// [`ListenError`], with the path.
    pub fn new(
        path: &Path,
        balloon: Option<Arc<BalloonControl>>,
        max_balloon_bytes: u64,
        control: Arc<Control>,
    ) -> Result<Self, ListenError> {
        let listener = Listener::new(path).map_err(|source| ListenError { path: path.to_owned(), source })?;
        Ok(Self { listener, clients: HashMap::new(), balloon, max_balloon_bytes, control, live: Arc::default() })
    }

    /// The place for the reader of the vCPUs' counters, which is set once the vCPUs run.
    #[must_use]
    pub fn live(&self) -> Arc<OnceLock<Live>> {
        Arc::clone(&self.live)
    }

    fn respond(&self, request: Request, files: Vec<OwnedFd>) -> Result<Response, RequestError> {
        match request {
            Request::Status => Ok(Response::Status(Status { state: self.state(), balloon: self.balloon() })),
            Request::Exits => {
                let live = self.live.get().ok_or(RequestError::NotRunning)?;
                Ok(Response::Exits(live.exits()))
            }
            Request::Balloon { target_bytes } => {
                let balloon = self.balloon.as_ref().ok_or(RequestError::NoBalloon)?;
                if target_bytes > self.max_balloon_bytes {
                    return Err(RequestError::BalloonTooLarge { target_bytes, max_bytes: self.max_balloon_bytes });
                }
                balloon.set_target(target_bytes.next_multiple_of(PAGE_BYTES));
                self.balloon().map(Response::Balloon).ok_or(RequestError::NoBalloon)
            }
            Request::Pause => {
                let live = self.live.get().ok_or(RequestError::NotRunning)?;
                if live.pause() { Ok(Response::Paused) } else { Err(RequestError::Busy) }
            }
            Request::Resume => {
                self.live.get().ok_or(RequestError::NotRunning)?;
                self.control.resume();
                Ok(Response::Running)
            }
            Request::Snapshot => {
                let live = self.live.get().ok_or(RequestError::NotRunning)?;
                live.snapshot(&check_targets(files).ok_or(RequestError::NoFiles)?)
            }
            Request::Stop => {
                self.control.end(EndReason::Stopped, None);
                Ok(Response::Stopping)
            }
        }
    }

    fn state(&self) -> RunState {
        if self.control.ended().is_some() {
            RunState::Stopping
        } else if self.control.is_paused() {
            RunState::Paused
        } else if self.live.get().is_some() {
            RunState::Running
        } else {
            RunState::Starting
        }
    }

    fn balloon(&self) -> Option<BalloonStatus> {
        let balloon = self.balloon.as_ref()?;
        let stats = STAT_NAMES.iter().zip(balloon.stats().values);
        Some(BalloonStatus {
            target_bytes: balloon.target(),
            actual_bytes: balloon.actual(),
            reported_bytes: balloon.reported(),
            guest: stats.filter_map(|(name, value)| Some(((*name).to_owned(), value?))).collect(),
        })
    }

    /// Closes the connection that was accepted first, if there is one.
    fn close_oldest(&mut self, ops: &mut EventOps<'_>) -> Option<()> {
        let oldest = self.clients.iter().min_by_key(|(_, client)| client.accepted).map(|(fd, _)| *fd)?;
        let client = self.clients.remove(&oldest)?;
        forget(&client.stream, ops);
        Some(())
    }

    /// Accepts all connections that wait: the listener is edge-triggered, so that one that is left is not looked at again before
    /// the next client.
    fn accept(&mut self, ops: &mut EventOps<'_>) {
        loop {
            let stream = match self.listener.socket().accept() {
                Ok((stream, _)) => stream,
                Err(error) => match error.kind() {
                    io::ErrorKind::Interrupted | io::ErrorKind::ConnectionAborted => continue,
                    io::ErrorKind::WouldBlock => return,
                    // No file descriptor is left, as a rule. That of the oldest client is used, as where there are too many.
                    _ if self.close_oldest(ops).is_some() => continue,
                    _ => return log::warn!("control socket: a client cannot be accepted: {error}"),
                },
            };
            if self.clients.len() >= MAX_CLIENTS {
                self.close_oldest(ops);
            }
            if stream.set_nonblocking(true).is_ok() && ops.add(Events::new(&stream, EventSet::IN)).is_ok() {
                let client = Client {
                    stream,
                    accepted: Instant::now(),
                    progress: Progress::Receiving(Vec::new()),
                    files: Vec::new(),
                };
                self.clients.insert(client.stream.as_raw_fd(), client);
            }
        }
    }

    /// Answers a line; empty where that fails.
    fn response_line(&self, line: Result<String, RequestError>, files: Vec<OwnedFd>) -> Vec<u8> {
        let response =
            line.and_then(|line| self.respond(Request::parse(&line)?, files)).unwrap_or_else(Response::Error);
        let mut bytes = serde_json::to_vec(&response).unwrap_or_else(|error| {
            log::error!("control socket: {error}");
            Vec::new()
        });
        bytes.push(b'\n');
        bytes
    }

    /// Goes on with a client whose socket is ready. It is closed after the response, and on any error.
    fn serve(&mut self, fd: RawFd, ops: &mut EventOps<'_>) {
        let Some(mut client) = self.clients.remove(&fd) else { return };
        let Client { stream, progress, files, .. } = &mut client;
        if let Progress::Receiving(line) = progress {
            match receive(stream, line, files) {
                Received::Part => return drop(self.clients.insert(fd, client)),
                Received::Closed => return forget(stream, ops),
                Received::Line(line) => {
                    *progress = Progress::Sending(self.response_line(line, std::mem::take(files)), 0);
                }
            }
        }
        let more = match progress {
            Progress::Receiving(_) => false,
            Progress::Sending(response, sent) => send(stream, response, sent),
        };
        if more && ops.modify(Events::new(stream, EventSet::OUT)).is_ok() {
            self.clients.insert(fd, client);
        } else {
            forget(stream, ops);
        }
    }
}

fn forget(stream: &UnixStream, ops: &mut EventOps<'_>) {
    if let Err(error) = ops.remove(Events::new(stream, EventSet::IN)) {
        log::debug!("control socket: {error:?}");
    }
}

impl MutEventSubscriber for Server {
    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        if events.fd() == self.listener.socket().as_raw_fd() {
            self.accept(ops);
        } else {
            self.serve(events.fd(), ops);
        }
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        let events = Events::new(self.listener.socket(), EventSet::IN | EventSet::EDGE_TRIGGERED);
        if let Err(error) = ops.add(events) {
            log::error!("control socket: {error:?}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::client;
    use super::*;
    use event_manager::{EventManager, SubscriberOps};
    use std::io::{BufRead, Read};
    use std::os::unix::fs::PermissionsExt;
    use std::sync::atomic::{AtomicBool, Ordering};

    /// A server on a thread of its own, without a machine.
    fn with_server(test: impl FnOnce(&Path, &Control)) {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("control");
        let control = Arc::new(Control::new().expect("a control"));
        let server = Server::new(&path, None, 0, Arc::clone(&control)).expect("listening");
        let done = AtomicBool::new(false);
        let done = &done;
        std::thread::scope(|scope| {
            scope.spawn(move || {
                let mut manager = EventManager::new().expect("an event manager");
                manager.add_subscriber(Box::new(server) as Box<dyn MutEventSubscriber>);
                while !done.load(Ordering::Acquire) {
                    manager.run_with_timeout(10).expect("events");
                }
            });
            // A test that fails must not leave the thread behind: the scope waits for it.
            let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| test(&path, &control)));
            done.store(true, Ordering::Release);
            result.expect("the test");
        });
    }

    fn send_text(path: &Path, text: &[u8]) -> Response {
        let mut socket = UnixStream::connect(path).expect("connected");
        socket.write_all(text).expect("written");
        let mut line = String::new();
        io::BufReader::new(socket).read_line(&mut line).expect("read");
        serde_json::from_str(&line).expect("a response")
    }

    #[test]
    fn requests_are_answered_and_refused_by_type() {
        with_server(|path, control| {
            let status = Response::Status(Status { state: RunState::Starting, balloon: None });
            assert_eq!(client::request(path, Request::Status).expect("a response"), status);
            assert_eq!(send_text(path, b"status\n"), status);
            let refused = |request| match client::request(path, request) {
                Err(client::ClientError::Refused(error)) => error,
                other => panic!("not refused: {other:?}"),
            };
            for early in [Request::Exits, Request::Pause, Request::Resume, Request::Snapshot] {
                assert_eq!(refused(early), RequestError::NotRunning);
            }
            assert_eq!(refused(Request::Balloon { target_bytes: 0 }), RequestError::NoBalloon);
            assert_eq!(send_text(path, b"halt\n"), Response::Error(RequestError::Unknown { line: "halt".into() }));
            let too_long = Response::Error(RequestError::TooLong { max_bytes: MAX_REQUEST_BYTES });
            assert_eq!(send_text(path, &[b' '; MAX_REQUEST_BYTES]), too_long);
            assert!(control.ended().is_none());
            assert_eq!(client::request(path, Request::Stop).expect("a response"), Response::Stopping);
            assert_eq!(control.ended().map(|end| end.reason), Some(EndReason::Stopped));
        });
    }

    #[test]
    fn clients_that_send_nothing_do_not_block_others() {
        with_server(|path, _| {
            let _silent: Vec<UnixStream> =
                (0..2 * MAX_CLIENTS).map(|_| UnixStream::connect(path).expect("connected")).collect();
            client::request(path, Request::Status).expect("a response");
        });
    }

    #[test]
    fn a_response_larger_than_the_sockets_buffer_arrives_whole() {
        let (mut machine, mut client) = UnixStream::pair().expect("a pair");
        machine.set_nonblocking(true).expect("set");
        let (response, mut sent) = (vec![b'x'; 1 << 20], 0);
        assert!(send(&mut machine, &response, &mut sent), "more than the buffer takes");
        let (mut all, mut bytes) = (0, [0; 1 << 16]);
        while all < response.len() {
            all += client.read(&mut bytes).expect("read");
            send(&mut machine, &response, &mut sent);
        }
        assert_eq!((all, sent), (response.len(), response.len()));
    }

    #[test]
    fn only_the_owner_can_connect() {
        with_server(|path, _| {
            let mode = std::fs::metadata(path).expect("there").permissions().mode();
            assert_eq!(mode & 0o777, 0o600);
        });
    }
}
