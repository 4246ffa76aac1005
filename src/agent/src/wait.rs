//! Waits for a command, in a guest that is saved meanwhile and goes on many times: each time the links to the host are others.

use crate::control::ToHost;
use crate::instructions::{CommandSpec, Instructions};
use crate::message::CommandMessage;
use crate::ports;
use crate::report::{Failure, PATIENCE, Reporter, Stage};
use crate::streams::{Kind, timespec};
use crate::transport::{self, Connections, Streams};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::time::{Duration, Instant};

/// How long to wait before the host is tried to be reached again.
const AGAIN: Duration = Duration::from_millis(10);

/// The command, and the connections that it came by.
pub(crate) struct Called {
    pub(crate) spec: CommandSpec,
    pub(crate) streams: Streams,
    pub(crate) control: Rc<OwnedFd>,
}

/// The connections by which it may come.
pub(crate) struct Link {
    pub(crate) control: Rc<OwnedFd>,
    /// What the control stream is.
    pub(crate) kind: Kind,
    pub(crate) streams: Streams,
}

/// Says that the guest is ready, and waits for its command, for as long as that takes. A connection that is reset by then is made anew, and
/// what came by it is dropped.
pub(crate) fn for_command(instructions: &Instructions, link: Link, reporter: &mut Reporter) -> Result<Called, Failure> {
    let failed = |error: &dyn std::fmt::Display| Stage::Instructions.failed("the command from the host", error);
    let Link { mut control, mut kind, mut streams } = link;
    reporter.say(&ToHost::Ready).map_err(|error| Stage::Connect.failed("control", error))?;
    let mut message = CommandMessage::default();
    // By when a message that has begun must be whole.
    let mut deadline = None;
    loop {
        let left = deadline.map(|at: Instant| at.saturating_duration_since(Instant::now()));
        match poll(&mut [PollFd::new(&*control, PollFlags::IN)], left.map(timespec).as_ref()) {
            Ok(0) if left.is_some_and(|left| left.is_zero()) => return Err(failed(&"it was cut off")),
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(failed(&error)),
        }
        let mut bytes = vec![0; message.wanted().min(64 << 10)];
        match rustix::io::read(&*control, &mut bytes) {
            Err(Errno::AGAIN | Errno::INTR) => {}
            Ok(count) if count > 0 => {
                let come = message.push(bytes.get(..count).unwrap_or_default()).map_err(|error| failed(&error))?;
                if let Some(spec) = come {
                    return Ok(Called { spec, streams, control });
                }
                deadline.get_or_insert_with(|| Instant::now() + PATIENCE);
            }
            // The host's end is gone: this is another run of the guest.
            Ok(_) | Err(_) => {
                (message, deadline) = (CommandMessage::default(), None);
                if matches!(kind, Kind::Port(_)) {
                    // The port stays open, and the host connects it anew. What was closed here would be closed to that one.
                    ports::wait_connected(&*control).map_err(|error| Stage::Connect.failed("control", error))?;
                } else {
                    let fresh = reconnect(instructions)?;
                    (kind, streams) = (fresh.control.kind, fresh.streams);
                    control = reporter.control(fresh.control.file)?;
                }
            }
        }
    }
}

/// Connects all streams anew, within [`PATIENCE`].
fn reconnect(instructions: &Instructions) -> Result<Connections, Failure> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match transport::connect(instructions) {
            Err(_) if Instant::now() < deadline => std::thread::sleep(AGAIN),
            done => return done,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::unix::net::{UnixListener, UnixStream};
    use std::path::{Path, PathBuf};
    use std::thread::JoinHandle;

    /// The host: listeners for the four streams, in a folder that is removed.
    struct Host {
        folder: PathBuf,
        listeners: Vec<UnixListener>,
    }

    impl Host {
        fn new(name: &str) -> Self {
            let folder = std::env::temp_dir().join(format!("hwvmm-agent-{name}-{}", std::process::id()));
            std::fs::create_dir_all(&folder).expect("made");
            let port = |offset: u32| folder.join((0x6877_0000 + offset).to_string());
            let listeners = (0..4).map(|offset| UnixListener::bind(port(offset)).expect("bound")).collect();
            Self { folder, listeners }
        }

        /// The streams that the agent has connected, control first.
        fn accept(&self) -> Vec<UnixStream> {
            self.listeners.iter().map(|listener| listener.accept().expect("a connection").0).collect()
        }
    }

    impl Drop for Host {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.folder);
        }
    }

    /// What the agent made of what it was sent: the command, and its first stream.
    struct Got {
        command: Vec<std::ffi::OsString>,
        stdin: OwnedFd,
    }

    /// An agent that waits, on a thread of its own.
    fn agent(folder: &Path) -> JoinHandle<Result<Got, String>> {
        let instructions = Instructions { sockets: Some(folder.to_owned()), ..Instructions::default() };
        std::thread::spawn(move || {
            let mut reporter = Reporter::default();
            let text = |failure: Failure| failure.to_string();
            let Connections { control, streams } = transport::connect(&instructions).map_err(text)?;
            let (kind, control) = (control.kind, reporter.control(control.file).map_err(text)?);
            let called = for_command(&instructions, Link { control, kind, streams }, &mut reporter).map_err(text)?;
            Ok(Got { command: called.spec.command, stdin: called.streams.stdin.file })
        })
    }

    fn hear_ready(control: &mut UnixStream) {
        let mut line = [0; 6];
        control.read_exact(&mut line).expect("a line");
        assert_eq!(&line, b"ready\n");
    }

    fn message(records: &str) -> Vec<u8> {
        format!("command {}\n{records}", records.len()).into_bytes()
    }

    #[test]
    fn a_command_comes_when_the_guest_is_ready() {
        let host = Host::new("ready");
        let agent = agent(&host.folder);
        let mut streams = host.accept();
        hear_ready(&mut streams[0]);
        std::thread::sleep(Duration::from_millis(50));
        assert!(!agent.is_finished(), "it waits");
        for piece in message("arg=sh\0arg=-c\0").chunks(3) {
            streams[0].write_all(piece).expect("written");
        }
        let got = agent.join().expect("no panic").expect("a command");
        assert_eq!(got.command, ["sh", "-c"]);
    }

    /// As after a restore: the connections of before are gone, with half a message.
    #[test]
    fn a_command_comes_by_the_connection_that_is_made_after_a_reset() {
        let host = Host::new("reset");
        let agent = agent(&host.folder);
        let mut before = host.accept();
        hear_ready(&mut before[0]);
        let old = message("arg=old\0");
        before[0].write_all(&old[..old.len() - 2]).expect("written");
        before[1].write_all(b"old input").expect("written");
        // The guest has read it.
        std::thread::sleep(Duration::from_millis(50));
        drop(before);
        let mut after = host.accept();
        after[1].write_all(b"new input").expect("written");
        after[0].write_all(&message("arg=new\0")).expect("written");
        let got = agent.join().expect("no panic").expect("a command");
        assert_eq!(got.command, ["new"]);
        let mut input = [0; 64];
        let count = rustix::io::read(&got.stdin, &mut input).expect("input");
        assert_eq!(&input[..count], b"new input", "no byte of before");
    }

    #[test]
    fn what_is_no_command_is_refused() {
        for (name, bytes, words) in [
            ("long", b"command 9999999\n".to_vec(), "more than 2097152"),
            ("line", b"signal 15\n".to_vec(), "signal 15"),
            ("unknown", message("arg=a\0module=b\0"), "unknown key"),
            ("empty", message(""), "no command"),
        ] {
            let host = Host::new(name);
            let agent = agent(&host.folder);
            let mut streams = host.accept();
            hear_ready(&mut streams[0]);
            streams[0].write_all(&bytes).expect("written");
            let error = agent.join().expect("no panic").err().expect("refused");
            assert!(error.starts_with("instructions: ") && error.contains(words), "{error}");
        }
    }

    #[test]
    fn a_message_that_is_cut_off_is_not_waited_for_without_end() {
        let host = Host::new("cut");
        let agent = agent(&host.folder);
        let mut streams = host.accept();
        hear_ready(&mut streams[0]);
        let start = Instant::now();
        streams[0].write_all(b"command 100\narg=a\0").expect("written");
        let error = agent.join().expect("no panic").err().expect("refused");
        assert!(error.contains("cut off") && start.elapsed() >= PATIENCE, "{error}");
    }

    #[test]
    fn a_host_that_is_gone_is_an_error() {
        let host = Host::new("gone");
        let agent = agent(&host.folder);
        let mut streams = host.accept();
        hear_ready(&mut streams[0]);
        drop((streams, host));
        let error = agent.join().expect("no panic").err().expect("refused");
        assert!(error.starts_with("connect: "), "{error}");
    }

    /// What follows it are lines, of which this is none.
    #[test]
    fn a_second_command_is_no_part_of_the_first() {
        let host = Host::new("twice");
        let agent = agent(&host.folder);
        let mut streams = host.accept();
        hear_ready(&mut streams[0]);
        streams[0].write_all(&[message("arg=one\0"), message("arg=two\0")].concat()).expect("written");
        assert_eq!(agent.join().expect("no panic").expect("a command").command, ["one"]);
        let mut lines = crate::control::Lines::default();
        assert!(lines.push(&message("arg=signal 15\0")).is_empty());
    }
}
