//! The parent's side: starts the machine's process, waits for its messages, ends it in time.

use super::assembly::{Assembly, Phase, Unusable};
use super::channel::{self, ChannelError, Received, Receiver, Wait, send_packet};
use super::channels::{self, MachineEnds, ParentEnds};
use super::child::{self, Inherited};
use super::crash::crash;
use super::error::SuperviseError;
use super::kernel_log::KernelLog;
use super::message::Message;
use super::plan::Plan;
use super::signals::Signals;
use super::streams::Session;
use crate::console::set_line_state;
use crate::error::chain;
use crate::exit::{EndReason, RunEnd};
use crate::logging::{self, Forwarded, Pending, Relay};
use crate::machine::{Ran, Start, StopRequest};
use crate::measure::{FlightRecorders, MemoryUse, RunRecord};
use crate::memory::give_back_startup;
use crate::sandbox::{Child, PANICKED, fork};
use crate::snapshot::RecordingFolder;
use hwvmm_devices::path_text::PathText as _;
use hwvmm_devices::virtio::vsock::{HostConnector, Served};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::getpid;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};
use thiserror::Error;

/// How long the machine's process may go without a message once it should end.
const GRACE: Duration = Duration::from_secs(2);
/// How long it may take in all to send what it leaves.
const MAX_ENDING: Duration = Duration::from_secs(20);
/// How long it may take to save its guest: a second for each GiB that is not zero, as a rule.
const SAVE: Duration = Duration::from_secs(600);
/// Packets that are read before signals and deadlines are looked at again.
const PACKETS_AT_ONCE: usize = 64;

/// Messages of progress that are printed: a machine needs a few.
const MAX_PROGRESS: usize = 100;
/// Rounds of messages for stderr that are read after the end of the process.
const MAX_FINAL_ROUNDS: usize = 1000;

/// Lines of the kernel's log that are shown after a failure.
const KERNEL_LOG_LINES: usize = 100;

/// How often to try again to write what stderr does not take.
const STDERR_AGAIN: Duration = Duration::from_millis(100);

/// What is left of a run.
pub struct Supervised {
    /// What the machine has left.
    pub ran: Ran,
    /// The last lines of the kernel's log, without control characters; none where the guest runs no command.
    pub kernel_log: Vec<String>,
}

/// Runs a machine in a process of its own, and returns what it leaves. The process is gone when this returns.
///
/// # Errors
/// [`SuperviseError`].
pub fn run(plan: &Plan<'_>, start: &Start, signals: &mut Signals) -> Result<Supervised, SuperviseError> {
    let vcpus = usize::try_from(plan.config.cpus.count()).unwrap_or(usize::MAX);
    let flight_recorders =
        FlightRecorders::new(vcpus).map_err(|error| SuperviseError::Io("share memory with a process", error))?;
    let (ours, theirs) = channel::pair().map_err(|error| SuperviseError::Io("make a pair of sockets", error))?;
    // Not blocking on either end: the process must not wait for this one to read, and this one not for a report.
    let (reports, refusals) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)
        .map_err(|error| SuperviseError::Io("make a pipe", error.into()))?;
    let made = channels::make(plan).map_err(|error| SuperviseError::Io("make a pair of sockets", error))?;
    let (mut ends, MachineEnds { connector, kernel_log }) = made;
    // Each start of the guest has the whole time.
    let boot_deadline = plan.config.boot_timeout.and_then(|timeout| Instant::now().checked_add(timeout));
    let inherited = Inherited {
        plan,
        start,
        parent: getpid(),
        parent_cpu_ns: crate::measure::cpu_time_ns(),
        boot_deadline,
        flight_recorders: &flight_recorders,
        refusals: refusals.as_fd(),
        connector,
        kernel_log: kernel_log.as_ref().map(AsFd::as_fd),
    };
    let (relay, sender) = logging::relay().map_err(|error| SuperviseError::Io("make a pair of sockets", error))?;
    let (mut ours, mut relay, mut sender, mut reports) =
        (Some(ours), Some(relay), Some(sender), Some(File::from(reports)));
    let child = fork(|| {
        // Nothing that the parent waits for stays open in the child.
        signals.leave_to_parent();
        drop((ours.take(), relay.take(), reports.take(), std::mem::take(&mut ends)));
        match (theirs.try_clone(), sender.take()) {
            (Ok(socket), Some(sender)) => child::work(&inherited, socket, sender),
            _ => PANICKED,
        }
    })?;
    drop((theirs, sender, inherited));
    drop((refusals, kernel_log));
    let kept = ours.zip(reports).ok_or_else(|| SuperviseError::Io("keep a socket", io::ErrorKind::NotFound.into()));
    let (ours, reports) = kept?;
    let ParentEnds { host_connector, streams, kernel_log } = ends;
    let session = streams.map(|ends| Session::new(ends, plan.late_command.clone())).transpose();
    let session = session.map_err(|error| SuperviseError::Io("connect stdin, stdout and stderr", error))?;
    let mut watch = Watch {
        plan,
        signals,
        child,
        receiver: Some(Receiver::new(ours, vcpus)),
        relay,
        host_connector,
        session,
        boot_deadline,
        kernel_log,
        progress_left: MAX_PROGRESS,
        assembly: Assembly::new(vcpus),
        failed: None,
        stop: None,
        saving: None,
        ending: None,
        own_memory: None,
        killed: None,
        reports,
        recording: plan.recording,
    };
    watch.until_the_end()?;
    watch.finish(&flight_recorders)
}

/// Why the parent killed the machine's process.
#[derive(Debug, Error)]
enum Killed {
    #[error("it did not end within {} s", GRACE.as_secs())]
    Late,
    #[error("it was not saved within {} s", SAVE.as_secs())]
    NotSaved,
    #[error("the guest did not run yet")]
    Starting,
    #[error(transparent)]
    Channel(#[from] ChannelError),
    #[error(transparent)]
    Unusable(#[from] Unusable),
}

/// The deadlines of a process that should end.
struct Ending {
    /// Moved by each packet that arrives.
    kill_at: Instant,
    /// The latest time for `kill_at`, which no packet moves.
    kill_at_last: Instant,
}

/// A running process of a machine.
struct Watch<'a> {
    plan: &'a Plan<'a>,
    signals: &'a mut Signals,
    /// The guest's command, where it runs one.
    session: Option<Session>,
    /// When that command must have started at the latest.
    boot_deadline: Option<Instant>,
    /// The kernel's log, where the guest runs a command.
    kernel_log: Option<KernelLog<'a>>,
    child: Child,
    /// `None` once the other end is closed.
    receiver: Option<Receiver>,
    /// Its messages for stderr; `None` once the other end is closed.
    relay: Option<Relay>,
    /// Where it asks for connections to the host's sockets; `None` where it has no device that does, or must not any more.
    host_connector: Option<HostConnector>,
    /// Messages of progress that are still printed.
    progress_left: usize,
    assembly: Assembly,
    /// The error that the process has sent.
    failed: Option<SuperviseError>,
    /// What the process was asked for.
    stop: Option<StopRequest>,
    /// By when the machine must have been saved, once that was asked for.
    saving: Option<Instant>,
    ending: Option<Ending>,
    /// What this process took when the run began to end, where statistics or a profile were asked for.
    own_memory: Option<MemoryUse>,
    killed: Option<Killed>,
    /// What the process' sandbox has refused.
    reports: File,
    /// Where the pages go that the guest has used, until they are written.
    recording: Option<&'a RecordingFolder>,
}

impl Watch<'_> {
    /// Handles messages, signals and deadlines until the process has ended and all of its messages are read.
    fn until_the_end(&mut self) -> Result<(), SuperviseError> {
        loop {
            let ended = self.wait()?;
            while let Some(signal) = self.signals.take() {
                self.request(StopRequest::Signal(signal));
            }
            let now = Instant::now();
            if self.plan.deadline.is_some_and(|at| at <= now) {
                self.request(StopRequest::TimedOut(self.plan.config.timeout.unwrap_or_default()));
            }
            if self.starts_by().is_some_and(|at| at <= now) {
                self.request(StopRequest::NotBooted(self.plan.config.boot_timeout.unwrap_or_default()));
            }
            if self.ending.as_ref().is_some_and(|ending| ending.kill_at <= now) {
                self.kill(Killed::Late);
            } else if self.ending.is_none() && self.saving.is_some_and(|at| at <= now) {
                self.kill(Killed::NotSaved);
            }
            self.print_messages();
            self.serve_command(now);
            if self.host_connector.as_mut().is_some_and(|host| host.serve(now) == Served::Closed) {
                self.host_connector = None;
            }
            if self.receive() == Queue::Empty && ended == ChildEnded::Yes {
                // A bounded number: another process may have got a copy of the socket, and write on.
                (0..MAX_FINAL_ROUNDS).take_while(|_| self.print_messages() == Queue::More).for_each(drop);
                return Ok(());
            }
        }
    }

    /// Moves what the command reads and writes. A guest that goes on after its command is stopped.
    fn serve_command(&mut self, now: Instant) {
        if let Some(kernel_log) = &mut self.kernel_log {
            kernel_log.serve();
        }
        let Some(session) = &mut self.session else { return };
        session.serve();
        if self.saving.is_none() && session.saves_at().is_some_and(|at| at <= now) {
            self.saving = Some(now + SAVE);
            self.send(StopRequest::Save);
            return;
        }
        if session.stops_at().is_some_and(|at| at <= now)
            && let Some(request) = session.stop_request()
        {
            self.request(request);
        }
    }

    /// When the command must have started at the latest; `None` where there is none, or it has.
    fn starts_by(&self) -> Option<Instant> {
        self.boot_deadline.filter(|_| self.session.as_ref().is_some_and(|session| !session.has_started()))
    }

    /// Waits until something happens.
    fn wait(&self) -> Result<ChildEnded, SuperviseError> {
        let deadline = self.plan.deadline.into_iter().chain(self.starts_by()).min();
        let deadline = deadline.filter(|_| self.stop.is_none() && self.ending.is_none());
        let kill_at = self.ending.as_ref().filter(|_| self.killed.is_none()).map(|ending| ending.kill_at);
        let connects_at = self.host_connector.as_ref().and_then(|host| host.resumes_at(Instant::now()));
        let stops_at = self.session.as_ref().filter(|_| self.stop.is_none() && self.ending.is_none());
        let stops_at = stops_at.and_then(Session::stops_at);
        let saves = self.session.as_ref().filter(|_| self.stop.is_none() && self.ending.is_none());
        let saves = self.saving.or(saves.and_then(Session::saves_at)).filter(|_| self.ending.is_none());
        let next = deadline.into_iter().chain(kill_at).chain(saves).chain(connects_at).chain(stops_at).min();
        let stderr_takes_nothing = (logging::pump() == Pending::Yes).then_some(STDERR_AGAIN);
        let left =
            next.map(|at| at.saturating_duration_since(Instant::now())).into_iter().chain(stderr_takes_nothing).min();
        let timeout = left.and_then(|left| Timespec::try_from(left).ok());
        let mut fds = vec![PollFd::new(&self.child, PollFlags::IN)];
        fds.extend(self.signals.fd().map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)));
        fds.extend(self.receiver.iter().map(|receiver| PollFd::new(receiver, PollFlags::IN)));
        let host_connector = self.host_connector.iter().filter(|_| connects_at.is_none());
        fds.extend(host_connector.map(|host| PollFd::new(host, PollFlags::IN)));
        fds.extend(self.relay.iter().map(|relay| PollFd::new(relay, PollFlags::IN)));
        let log = self.kernel_log.iter().filter_map(KernelLog::fd);
        fds.extend(log.map(|log| PollFd::from_borrowed_fd(log, PollFlags::IN)));
        fds.extend(self.session.iter().flat_map(Session::interests));
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(SuperviseError::Io("wait for the machine's process", error.into())),
        }
        let ended = fds.first().is_some_and(|fd| !fd.revents().is_empty());
        Ok(if ended { ChildEnded::Yes } else { ChildEnded::No })
    }

    /// Prints the messages that have arrived, a bounded number.
    fn print_messages(&mut self) -> Queue {
        match self.relay.as_ref().map(Relay::forward) {
            Some(Forwarded::Some) => return Queue::More,
            Some(Forwarded::Closed) => self.relay = None,
            Some(Forwarded::All) | None => {}
        }
        Queue::Empty
    }

    /// Takes what has arrived, a bounded number of packets.
    fn receive(&mut self) -> Queue {
        for _ in 0..PACKETS_AT_ONCE {
            let Some(receiver) = &mut self.receiver else { return Queue::Empty };
            match receiver.receive() {
                Ok(Received::Nothing) => return Queue::Empty,
                Ok(Received::Closed) => {
                    self.receiver = None;
                    self.start_to_end();
                    return Queue::Empty;
                }
                Ok(Received::Part) => {}
                Ok(Received::Message(message)) => self.take(*message),
                Err(error) => {
                    self.receiver = None;
                    self.kill(error.into());
                    return Queue::Empty;
                }
            }
            if let Some(ending) = &mut self.ending {
                ending.kill_at = (Instant::now() + GRACE).min(ending.kill_at_last);
            }
        }
        Queue::More
    }

    fn take(&mut self, message: Message) {
        match message {
            // A machine that runs has nothing more to prepare: this process must not wait for stderr then.
            Message::Progress(what) if self.assembly.phase() == Phase::Starting => {
                if let Some(left) = self.progress_left.checked_sub(1) {
                    self.progress_left = left;
                    (self.plan.progress)(&what);
                }
            }
            Message::Failed(error) => {
                self.failed.get_or_insert(SuperviseError::Machine(error));
                self.start_to_end();
            }
            // Once: the process could make this one write without an end.
            Message::WorkingSet(set) if self.assembly.phase() == Phase::Running && self.recording.is_some() => {
                self.recording.take().into_iter().for_each(|folder| folder.keep_or_log(&set));
            }
            message => {
                // This process only waits from now on: what its start took goes back.
                if matches!(message, Message::Started { .. })
                    && let Err(error) = give_back_startup()
                {
                    log::debug!("memory used at the start is kept: {error}");
                }
                if let Err(error) = self.assembly.take(message) {
                    self.receiver = None;
                    self.kill(error.into());
                }
                if let Some(why) = self.assembly.take_unbootable() {
                    self.failed.get_or_insert(SuperviseError::Unbootable(why));
                    self.start_to_end();
                }
            }
        }
        if self.assembly.phase() >= Phase::Ending {
            self.start_to_end();
        }
    }

    /// Asks the process to end the run, once. One whose guest does not run yet has nothing to tell, and is killed.
    fn request(&mut self, request: StopRequest) {
        if self.stop.is_some() || self.ending.is_some() {
            return;
        }
        self.stop = Some(request);
        self.start_to_end();
        if self.assembly.phase() == Phase::Starting {
            self.kill(Killed::Starting);
            return;
        }
        self.send(request);
    }

    fn send(&self, request: StopRequest) {
        let sent = serde_json::to_vec(&request).map_err(io::Error::from).and_then(|packet| match &self.receiver {
            // A process that reads nothing is killed in time: it must not stop this one.
            Some(receiver) => send_packet(receiver.as_fd(), &packet, Wait::No),
            None => Ok(()),
        });
        if let Err(error) = sent {
            log::debug!("the machine's process takes no request: {error}");
        }
    }

    fn start_to_end(&mut self) {
        let now = Instant::now();
        // Before the record of the run is in memory.
        let config = self.plan.config;
        if self.ending.is_none() && (config.stats.is_some() || config.profile.is_some()) {
            self.own_memory = MemoryUse::now(&[]).ok();
        }
        self.ending.get_or_insert(Ending { kill_at: now + GRACE, kill_at_last: now + MAX_ENDING });
    }

    fn kill(&mut self, why: Killed) {
        if self.killed.is_none() {
            self.child.kill();
            self.killed = Some(why);
        }
    }

    fn finish(mut self, flight_recorders: &FlightRecorders) -> Result<Supervised, SuperviseError> {
        let status = self.child.wait().map_err(|error| SuperviseError::Io("wait for the machine's process", error))?;
        self.remove_sockets();
        self.finish_command()?;
        set_line_state(self.assembly.line());
        if let Some(error) = self.failed {
            return Err(error);
        }
        let (phase, told) = (self.assembly.phase(), self.assembly.end().cloned());
        let unknown = |reason| RunEnd { reason, vcpu: None };
        let (end, missing) = match (&self.killed, self.stop) {
            (None, _) if phase == Phase::Complete => (told, None),
            (Some(Killed::Starting), Some(stop)) => (Some(unknown(stop.end())), None),
            (Some(killed @ Killed::Late), stop) => {
                let what = format!("the machine's process was killed: {killed}");
                log::warn!("{what}");
                (told.or(stop.map(|stop| unknown(stop.end()))), Some(what))
            }
            (Some(killed), _) => {
                let what = format!("the machine's process was killed: {}", chain(killed));
                (Some(unknown(EndReason::Failed(what.clone()))), Some(what))
            }
            (None, _) => {
                let end = unknown(EndReason::Crashed(crash(status, &self.reports)));
                let missing = end.reason.to_string();
                (Some(end), Some(missing))
            }
        };
        let end = end.unwrap_or_else(|| unknown(EndReason::Crashed(crash(status, &self.reports))));
        let end = match &self.session {
            Some(session) => RunEnd { reason: session.explain(end.reason), vcpu: end.vcpu },
            None => end,
        };
        let end = match &self.kernel_log {
            Some(log) => RunEnd { reason: log.explain(end.reason), vcpu: end.vcpu },
            None => end,
        };
        let kernel_log = self.kernel_log.as_mut().map(|log| log.last_lines(KERNEL_LOG_LINES)).unwrap_or_default();
        let unread = self.assembly.take_unread();
        let mut record = self.assembly.record(end, flight_recorders);
        let checked = match phase {
            Phase::Complete => record.check(flight_recorders.iter().count()),
            Phase::Starting | Phase::Running | Phase::Ending => record.check_lengths(),
        };
        if let Err(error) = checked {
            let what = format!("the record of the machine's process is not valid: {error}");
            record = RunRecord::ended(unknown(EndReason::Failed(what)));
        }
        record.missing.extend(missing);
        if let Some(memory) = &mut record.memory
            && let Some(parent) = &self.own_memory
        {
            memory.add_process(parent);
        }
        Ok(Supervised { ran: Ran { record, unread }, kernel_log })
    }

    /// Writes the rest of the command's output, and reads the rest of the kernel's log.
    fn finish_command(&mut self) -> Result<(), SuperviseError> {
        if let Some(kernel_log) = &mut self.kernel_log {
            (0..MAX_FINAL_ROUNDS).for_each(|_| kernel_log.serve());
        }
        // The guest's ends of streams that it has not connected to.
        self.host_connector = None;
        match &mut self.session {
            Some(session) => {
                session.finish(self.signals).map_err(|error| SuperviseError::Io("write the command's output", error))
            }
            None => Ok(()),
        }
    }

    /// Removes the sockets at which a process that was killed had listened.
    fn remove_sockets(&self) {
        for path in self.plan.config.socket_paths() {
            if let Err(error) = hwvmm_devices::socket::remove_dead(path) {
                log::debug!("cannot remove {}: {error}", path.shown());
            }
        }
    }
}

/// The state of the machine's process.
#[derive(Clone, Copy, PartialEq, Eq)]
enum ChildEnded {
    Yes,
    No,
}

/// What is left in the channel.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Queue {
    Empty,
    More,
}
