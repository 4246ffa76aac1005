//! The parent's side of a command that runs in the guest: its streams, its terminal, and what its agent says.

#[cfg(test)]
mod tests;

use super::control::{AgentTask, ControlLines, Said};
use super::pump::{Pump, PumpState};
use super::stdio::{Direction, private_copy};
use crate::console::terminal_size;
use crate::exit::{EndReason, Signal};
use crate::machine::{FIRST_AGENT_PORT, StopRequest};
use crate::supervise::signals::Signals;
use hwvmm_devices::virtio::vsock::JoinedPort;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, recv, send};
use std::fmt::Write as _;
use std::io::{self, stderr, stdin, stdout};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// How long the guest may go on once its command's status is known: the agent syncs for 5 s at most.
const GUEST_END: Duration = Duration::from_secs(10);
/// How long the readers of stdout and stderr may take nothing once the guest is gone.
const READERS: Duration = Duration::from_secs(5);
/// How long a guest that is ready for a command goes on before it is saved: its kernel has left to do what a boot put off, and each run from
/// the snapshot would do that again.
const SETTLE: Duration = Duration::from_millis(100);
/// Reads and writes of a stream before signals and deadlines are looked at again.
const STEPS: usize = 16;

/// Whether the command gets a terminal, which has no stderr of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::supervise) enum CommandTerminal {
    /// It has three streams.
    None,
    /// It has one terminal.
    Given,
}

/// The streams that the agent has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::supervise) enum AgentStreams {
    /// Those of the command that it boots for.
    Command(CommandTerminal),
    /// Those of any command, of which none is used yet.
    Template,
    /// The same, for a command that comes when the guest has booted.
    Late(CommandTerminal),
}

impl AgentStreams {
    fn terminal(self) -> CommandTerminal {
        match self {
            Self::Command(terminal) | Self::Late(terminal) => terminal,
            Self::Template => CommandTerminal::None,
        }
    }
}

/// The parent's ends of the connections to the agent.
pub(in crate::supervise) struct Ends {
    control: UnixStream,
    stdin: UnixStream,
    stdout: UnixStream,
    stderr: Option<UnixStream>,
    streams: AgentStreams,
}

impl Ends {
    /// Makes the connections. The ports are the guest's ends.
    ///
    /// # Errors
    /// Returns the error of socketpair(2).
    pub(in crate::supervise) fn new(streams: AgentStreams) -> io::Result<(Self, Vec<JoinedPort>)> {
        let mut ports = Vec::new();
        let mut next = |offset: u32| {
            let (near, far) = UnixStream::pair()?;
            near.set_nonblocking(true)?;
            far.set_nonblocking(true)?;
            ports.push(JoinedPort { port: FIRST_AGENT_PORT + offset, socket: far });
            Ok::<_, io::Error>(near)
        };
        let (control, stdin, stdout) = (next(0)?, next(1)?, next(2)?);
        // A guest that waits does not know if its command will have a terminal.
        let without_stderr = streams == AgentStreams::Command(CommandTerminal::Given);
        let stderr = if without_stderr { None } else { Some(next(3)?) };
        Ok((Self { control, stdin, stdout, stderr, streams }, ports))
    }
}

/// A stream of the command.
struct Stream {
    name: &'static str,
    pump: Pump,
}

/// A command that runs in the guest.
pub(in crate::supervise) struct Session {
    /// `None` once it has ended, or what came was no agent's.
    control: Option<UnixStream>,
    lines: ControlLines,
    /// What the agent has said last.
    said: Option<Said>,
    /// When it said how the command ended, or that it failed.
    said_at: Option<Instant>,
    input: Option<Stream>,
    outputs: Vec<Stream>,
    /// Ends of streams that are not used. The guest would see that they are closed.
    _unused: Vec<UnixStream>,
    /// Readable when the terminal's size has changed.
    resized: Option<UnixStream>,
    /// The rest of a line for the agent.
    unsent: Vec<u8>,
    /// The size changed while a line was on its way.
    resized_again: bool,
    /// Why not all of the command's output was written.
    lost: Option<Lost>,
}

/// Why a command's output is not whole. Its status alone would pass for that of a run with all of it.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Lost {
    /// It cannot be written, or nobody took it.
    Unwritten(String),
    /// A signal came while the rest of it was written.
    Signal(Signal),
}

impl Session {
    /// Connects hwvmm's own stdin, stdout and stderr. To be made after the machine's process was forked: signals are caught, and file
    /// descriptors opened, that it must not have. `message` is sent to the agent first: its command, where the guest waits for that.
    ///
    /// # Errors
    /// Where a stream cannot be prepared.
    pub(in crate::supervise) fn new(ends: Ends, message: Vec<u8>) -> io::Result<Self> {
        let terminal = ends.streams.terminal();
        let mut session = Self::without_streams(ends.control, AgentTask::Run);
        session.unsent = message;
        if ends.streams == AgentStreams::Template {
            session.lines = ControlLines::of(AgentTask::Wait);
            session._unused = [ends.stdin, ends.stdout].into_iter().chain(ends.stderr).collect();
            return Ok(session);
        }
        let stream =
            |name, source: OwnedFd, sink: OwnedFd| Ok::<_, io::Error>(Stream { name, pump: Pump::new(source, sink)? });
        let output = |name, from: UnixStream, to: OwnedFd| stream(name, from.into(), to);
        session.input = Some(stream("stdin", private_copy(stdin().as_fd(), Direction::Read)?, ends.stdin.into())?);
        session.outputs.push(output("stdout", ends.stdout, private_copy(stdout().as_fd(), Direction::Write)?)?);
        match (ends.stderr, terminal) {
            (Some(from), CommandTerminal::None) => {
                session.outputs.push(output("stderr", from, private_copy(stderr().as_fd(), Direction::Write)?)?);
            }
            (unused, _) => session._unused.extend(unused),
        }
        session.resized = match terminal {
            CommandTerminal::None => None,
            CommandTerminal::Given => {
                let (receiver, sender) = UnixStream::pair()?;
                receiver.set_nonblocking(true)?;
                signal_hook::low_level::pipe::register(signal_hook::consts::SIGWINCH, sender)?;
                Some(receiver)
            }
        };
        Ok(session)
    }

    fn without_streams(control: UnixStream, task: AgentTask) -> Self {
        Self {
            control: Some(control),
            lines: ControlLines::of(task),
            said: None,
            said_at: None,
            input: None,
            outputs: Vec::new(),
            _unused: Vec::new(),
            resized: None,
            unsent: Vec::new(),
            resized_again: false,
            lost: None,
        }
    }

    /// What has to be waited for.
    pub(in crate::supervise) fn interests(&self) -> Vec<PollFd<'_>> {
        let wanted = if self.unsent.is_empty() { PollFlags::IN } else { PollFlags::IN | PollFlags::OUT };
        let mut fds: Vec<PollFd<'_>> = self.control.iter().map(|control| PollFd::new(control, wanted)).collect();
        fds.extend(self.resized.iter().map(|resized| PollFd::new(resized, PollFlags::IN)));
        for Stream { pump, .. } in self.input.iter().chain(&self.outputs) {
            fds.extend(pump.source().map(|source| PollFd::from_borrowed_fd(source, PollFlags::IN)));
            fds.extend(pump.sink().map(|(sink, events)| PollFd::from_borrowed_fd(sink, events)));
        }
        fds
    }

    /// Moves what can be moved, and takes what the agent says, without waiting for anything.
    pub(in crate::supervise) fn serve(&mut self) {
        self.take_lines();
        self.tell_size();
        if let Some(stream) = &mut self.input
            && stream.advance() != Go::On
        {
            self.input = None;
        }
        let lost = &mut self.lost;
        self.outputs.retain_mut(|stream| {
            let go = stream.advance();
            if let Go::Failed(error) = &go {
                lost.get_or_insert_with(|| Lost::Unwritten(format!("its {} was cut off: {error}", stream.name)));
            }
            go == Go::On
        });
    }

    /// Reads the control stream. What is not an agent's ends it: nothing after it counts.
    fn take_lines(&mut self) {
        let Some(control) = &self.control else { return };
        let mut bytes = [0; 4096];
        let count = match recv(control, &mut bytes[..], RecvFlags::DONTWAIT) {
            Ok((count, _)) => count,
            Err(Errno::AGAIN | Errno::INTR) => return,
            Err(_) => 0,
        };
        match self.lines.take(bytes.get(..count).unwrap_or_default()) {
            Ok(_) if count == 0 => self.control = None,
            Ok(said) => said.into_iter().for_each(|said| {
                if said != Said::Started {
                    self.said_at = Some(Instant::now());
                }
                self.said = Some(said);
            }),
            Err(error) => {
                log::warn!("{error}: the control stream is not read any further");
                self.control = None;
            }
        }
    }

    /// Tells the agent the size of the terminal, where it has changed.
    fn tell_size(&mut self) {
        if let Some(resized) = &self.resized
            && recv(resized, &mut [0; 64][..], RecvFlags::DONTWAIT).is_ok_and(|(count, _)| count > 0)
        {
            self.resized_again = true;
        }
        if self.unsent.is_empty() && std::mem::take(&mut self.resized_again) {
            let (columns, rows) = terminal_size();
            self.unsent = format!("window {rows} {columns}\n").into_bytes();
        }
        let Some(control) = &self.control else { return self.unsent.clear() };
        if self.unsent.is_empty() {
            return;
        }
        match send(control, &self.unsent, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
            Ok(count) => drop(self.unsent.drain(..count.min(self.unsent.len()))),
            Err(Errno::AGAIN | Errno::INTR) => {}
            Err(_) => self.unsent.clear(),
        }
    }

    /// Returns true once the agent has said that the command runs, or that it cannot.
    pub(in crate::supervise) fn has_started(&self) -> bool {
        self.said.is_some()
    }

    /// When the guest is saved that waits for a command; `None` where it does not.
    pub(in crate::supervise) fn saves_at(&self) -> Option<Instant> {
        self.said_at.filter(|_| self.said == Some(Said::Ready)).map(|at| at + SETTLE)
    }

    /// When the guest is stopped that goes on after its command; `None` where it has not said how that ended.
    pub(in crate::supervise) fn stops_at(&self) -> Option<Instant> {
        self.said_at.filter(|_| self.said != Some(Said::Ready)).map(|at| at + GUEST_END)
    }

    /// How to end a guest that goes on.
    pub(in crate::supervise) fn stop_request(&self) -> Option<StopRequest> {
        match self.said.as_ref()? {
            Said::Ready | Said::Started => None,
            Said::Failed { .. } => Some(StopRequest::NoCommand),
            Said::Ended(end) => Some(StopRequest::Command(*end)),
        }
    }

    /// The end of the run with what the agent has said. A guest that cannot write to I/O ports is powered off, and the agent's word alone
    /// says how the command ended.
    pub(in crate::supervise) fn explain(&self, end: EndReason) -> EndReason {
        match (self.explain_with_words(end), &self.lost) {
            (EndReason::Command(command), Some(Lost::Unwritten(why))) => {
                EndReason::Failed(format!("the command {command}, but {why}"))
            }
            (EndReason::Command(_), Some(Lost::Signal(signal))) => EndReason::Signal(*signal),
            (end, _) => end,
        }
    }

    fn explain_with_words(&self, end: EndReason) -> EndReason {
        match (end, &self.said) {
            (EndReason::PowerOff | EndReason::SystemHalted, Some(Said::Ended(end))) => EndReason::Command(*end),
            (
                end @ (EndReason::NoCommand(_) | EndReason::PowerOff | EndReason::SystemHalted | EndReason::Saved),
                Some(Said::Failed { stage, text }),
            ) => {
                let mut why = format!("{stage}: {text}");
                if let EndReason::NoCommand(Some(hint)) = end {
                    // Writing to a String cannot fail.
                    let _ = write!(why, "; {hint}");
                }
                EndReason::NoCommand(Some(why))
            }
            (end, _) => end.without_command_status(),
        }
    }

    /// Writes what is left of the command's output once the machine's process is gone, as long as its readers take it: at most
    /// [`READERS`] without one that does, and until a signal comes.
    pub(in crate::supervise) fn finish(&mut self, signals: &mut Signals) -> io::Result<()> {
        self.input = None;
        self.resized = None;
        let mut give_up = Instant::now() + READERS;
        loop {
            self.serve();
            let now = Instant::now();
            if self.outputs.is_empty() {
                return Ok(());
            }
            if let Some(signal) = signals.take() {
                self.lost.get_or_insert(Lost::Signal(signal));
                return Ok(());
            }
            if now >= give_up {
                log::warn!("the command's output is cut off: its rest has no reader");
                let why = "its output was cut off: the rest had no reader";
                self.lost.get_or_insert_with(|| Lost::Unwritten(why.to_owned()));
                return Ok(());
            }
            let limit = Timespec::try_from(give_up - now).ok();
            let mut fds: Vec<_> =
                signals.fd().map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)).into_iter().collect();
            fds.extend(self.interests());
            match poll(&mut fds, limit.as_ref()) {
                Ok(0) | Err(Errno::INTR) => {}
                Ok(_) => give_up = Instant::now() + READERS,
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// Whether a stream goes on.
#[derive(Clone, PartialEq, Eq)]
enum Go {
    On,
    Ended,
    /// It cannot go on: why.
    Failed(String),
}

impl Stream {
    /// Moves what can be moved, a bounded number of times.
    fn advance(&mut self) -> Go {
        for _ in 0..STEPS {
            let Some(ready) = self.ready() else { return Go::On };
            match self.pump.advance(ready) {
                PumpState::Open => {}
                PumpState::Ended => return Go::Ended,
                PumpState::Failed(error) => {
                    log::warn!("the command's {} is closed: {error}", self.name);
                    return Go::Failed(error.to_string());
                }
            }
        }
        Go::On
    }

    /// What poll(2) says of the sink; `None` if there is nothing to do.
    fn ready(&self) -> Option<PollFlags> {
        let (sink, events) = self.pump.sink()?;
        let mut fds = vec![PollFd::from_borrowed_fd(sink, events)];
        fds.extend(self.pump.source().map(|source| PollFd::from_borrowed_fd(source, PollFlags::IN)));
        match poll(&mut fds, Some(&Timespec::default())) {
            Ok(count) if count > 0 => fds.first().map(PollFd::revents),
            _ => None,
        }
    }
}
