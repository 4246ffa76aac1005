//! The command's run: its streams, its terminal, its signals and its end.

use crate::command::{self, Stdios};
use crate::control::{End, FromHost, Lines, ToHost};
use crate::instructions::{CommandSpec, Window};
use crate::report::{Failure, Reporter, Stage, kernel_log};
use crate::streams::{Kind, Progress, Pump, Side, timespec};
use crate::transport::{self, Connection};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::process::{Pid, Signal, WaitOptions, WaitStatus, kill_process, kill_process_group, wait};
use rustix::pty::OpenptFlags;
use rustix::termios::{Winsize, tcsetwinsize};
use std::io::{PipeReader, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::rc::Rc;
use std::time::{Duration, Instant};

/// How long output may take to come once the command is gone: processes that it left behind may hold its pipes for ever.
const QUIET: Duration = Duration::from_millis(200);

/// Runs the command, and returns when all that it wrote has reached the host.
pub(crate) fn run(
    spec: &CommandSpec,
    connections: transport::Streams,
    control: Rc<OwnedFd>,
    reporter: &Reporter,
) -> Result<End, Failure> {
    let io = |error: Errno| Stage::Streams.failed("the command's streams", error);
    let (stdios, pumps, terminal) = match spec.terminal {
        Some(window) => on_terminal(connections, window)?,
        None => on_pipes(connections).map_err(io)?,
    };
    // The command is in the agent's session, unless it has a terminal. This fails where the agent leads one already.
    let _ = rustix::process::setsid();
    reporter.say(&ToHost::Started).map_err(|error| Stage::Connect.failed("control", error))?;
    let command = command::start(spec, stdios)?;
    let ended = reap(command).map_err(|error| Stage::Command.failed("the thread that waits for it", error))?;
    let mut session =
        Session { command, ended, pumps, terminal, control: Some(control), lines: Lines::default(), over: None };
    let end = session.serve().map_err(io)?;
    session.settle().map_err(io)?;
    // The status port says it too.
    let _ = reporter.say(&ToHost::Ended(end));
    Ok(end)
}

/// The host's side of a stream.
fn host(connection: Connection) -> Result<Side, Errno> {
    Side::new(connection.file, connection.kind)
}

type Streams = (Stdios, Vec<Pump>, Option<OwnedFd>);

fn on_pipes(connections: transport::Streams) -> Result<Streams, Errno> {
    let pipe = || rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC);
    let ((stdin, to_stdin), (from_stdout, stdout), (from_stderr, stderr)) = (pipe()?, pipe()?, pipe()?);
    let mut pumps = vec![
        Pump::new(host(connections.stdin)?, Side::new(to_stdin, Kind::Pipe)?),
        Pump::new(Side::new(from_stdout, Kind::Pipe)?, host(connections.stdout)?),
    ];
    if let Some(connection) = connections.stderr {
        pumps.push(Pump::new(Side::new(from_stderr, Kind::Pipe)?, host(connection)?));
    }
    Ok((Stdios { stdin, stdout, stderr }, pumps, None))
}

fn on_terminal(connections: transport::Streams, window: Window) -> Result<Streams, Failure> {
    let failed = |error: Errno| Stage::Terminal.failed("/dev/ptmx", error);
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let master = rustix::pty::openpt(flags).map_err(failed)?;
    rustix::pty::unlockpt(&master).map_err(failed)?;
    let name = rustix::pty::ptsname(&master, Vec::new()).map_err(failed)?;
    crate::root::open_to_all(Path::new(&*name.to_string_lossy()))?;
    let open = || rustix::fs::open(&*name, OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC, Mode::empty());
    let stdios =
        Stdios { stdin: open().map_err(failed)?, stdout: open().map_err(failed)?, stderr: open().map_err(failed)? };
    set_window(&master, window);
    let copy = || rustix::io::fcntl_dupfd_cloexec(&master, 3);
    let pty = || Side::new(copy()?, Kind::Pipe);
    let pumps =
        (|| Ok(vec![Pump::new(host(connections.stdin)?, pty()?), Pump::new(pty()?, host(connections.stdout)?)]))()
            .map_err(failed)?;
    Ok((stdios, pumps, Some(master)))
}

fn set_window(terminal: impl AsFd, window: Window) {
    let size = Winsize { ws_row: window.rows, ws_col: window.columns, ws_xpixel: 0, ws_ypixel: 0 };
    if let Err(error) = tcsetwinsize(terminal, size) {
        kernel_log(&format!("the terminal's size: {error}"));
    }
}

/// Reaps all processes in a thread that sleeps in wait4(2): those that lost their parent too. How `command` ended comes
/// through the pipe, in two bytes.
fn reap(command: Pid) -> std::io::Result<PipeReader> {
    let (reader, mut writer) = std::io::pipe()?;
    std::thread::Builder::new().stack_size(64 << 10).spawn(move || {
        loop {
            match wait(WaitOptions::empty()) {
                Ok(Some((pid, status))) if pid == command => {
                    // The other end is open as long as a thread waits for it.
                    let _ = writer.write_all(&encode(status));
                }
                Ok(_) | Err(Errno::INTR) => {}
                // No processes are left.
                Err(_) => return,
            }
        }
    })?;
    Ok(reader)
}

fn encode(status: WaitStatus) -> [u8; 2] {
    let byte = |number: Option<i32>| number.and_then(|number| u8::try_from(number).ok());
    match (byte(status.exit_status()), byte(status.terminating_signal())) {
        (Some(exited), _) => [1, exited],
        (None, Some(signal)) => [2, signal],
        (None, None) => [3, 0],
    }
}

fn decode(bytes: [u8; 2]) -> End {
    match bytes {
        [1, status] => End::Exited(status),
        [2, signal] => End::Signaled(signal),
        _ => End::Failed,
    }
}

struct Session {
    command: Pid,
    ended: PipeReader,
    /// Stdin first, then the outputs.
    pumps: Vec<Pump>,
    terminal: Option<OwnedFd>,
    control: Option<Rc<OwnedFd>>,
    lines: Lines,
    /// How the command ended, once it has.
    over: Option<End>,
}

/// The events that poll(2) returned.
struct Ready {
    ended: bool,
    control: bool,
    /// For each pump: if the side that is written to was hung up.
    closed: Vec<bool>,
}

impl Session {
    fn serve(&mut self) -> Result<End, Errno> {
        let mut last_data = Instant::now();
        loop {
            let wait = match self.over {
                Some(end) if self.pumps.iter().all(Pump::is_over) => return Ok(end),
                // A host that reads slowly gets all the same.
                Some(_) if self.pumps.iter().any(Pump::holds_bytes) => None,
                Some(end) => match QUIET.checked_sub(last_data.elapsed()) {
                    Some(left) => Some(left),
                    // A guest that stood still meanwhile has not looked at what was there all the time.
                    None if self.has_moved_output() => {
                        last_data = Instant::now();
                        continue;
                    }
                    None => return Ok(end),
                },
                None => None,
            };
            let ready = self.wait(wait)?;
            if ready.control {
                self.obey();
            }
            for (pump, closed) in self.pumps.iter_mut().zip(ready.closed) {
                if pump.run(closed) == Progress::Moved {
                    last_data = Instant::now();
                }
            }
            if ready.ended {
                self.command_ended()?;
                last_data = Instant::now();
            }
        }
    }

    /// Moves output that can be moved now. Returns true if there was some.
    fn has_moved_output(&mut self) -> bool {
        let outputs = self.pumps.iter_mut().skip(1);
        outputs
            .filter(|pump| !pump.is_over())
            .map(|pump| pump.run(false))
            .filter(|progress| *progress == Progress::Moved)
            .count()
            > 0
    }

    fn wait(&self, wait: Option<Duration>) -> Result<Ready, Errno> {
        let mut files: Vec<PollFd<'_>> = Vec::new();
        let mut lasts = Vec::new();
        for pump in &self.pumps {
            let interests = pump.interests();
            files.extend(interests);
            lasts.push(files.len());
        }
        let ended = files.len();
        if self.over.is_none() {
            files.push(PollFd::new(&self.ended, PollFlags::IN));
        }
        let control = files.len();
        if let Some(socket) = &self.control {
            files.push(PollFd::new(&**socket, PollFlags::IN));
        }
        match poll(&mut files, wait.map(timespec).as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error),
        }
        let seen =
            |index: usize, flags: PollFlags| files.get(index).is_some_and(|file| file.revents().intersects(flags));
        let mut first = 0;
        let closed = lasts
            .into_iter()
            .map(|last| {
                let any = last > std::mem::replace(&mut first, last);
                any && seen(last - 1, PollFlags::HUP | PollFlags::ERR)
            })
            .collect();
        Ok(Ready {
            ended: self.over.is_none() && seen(ended, PollFlags::all()),
            control: self.control.is_some() && seen(control, PollFlags::all()),
            closed,
        })
    }

    /// The command is gone: it takes no more input.
    fn command_ended(&mut self) -> Result<(), Errno> {
        let mut bytes = [0; 2];
        let mut filled = 0;
        while let Some(rest) = bytes.get_mut(filled..).filter(|rest| !rest.is_empty()) {
            match rustix::io::read(&self.ended, rest) {
                Ok(0) => break,
                Ok(count) => filled += count,
                Err(Errno::INTR) => {}
                Err(error) => return Err(error),
            }
        }
        self.over = Some(decode(bytes));
        if let Some(stdin) = self.pumps.first_mut() {
            stdin.stop();
        }
        Ok(())
    }

    /// Does what the host says by the control stream.
    fn obey(&mut self) {
        let Some(control) = &self.control else { return };
        let mut bytes = [0; 512];
        let count = match rustix::io::read(control, &mut bytes) {
            Ok(0) => 0,
            Ok(count) => count,
            Err(Errno::AGAIN | Errno::INTR) => return,
            Err(_) => 0,
        };
        if count == 0 {
            self.control = None;
            return;
        }
        for message in self.lines.push(bytes.get(..count).unwrap_or_default()) {
            match message {
                FromHost::Window(window) => {
                    if let Some(terminal) = &self.terminal {
                        set_window(terminal, window);
                    }
                }
                FromHost::Signal(number) => self.signal(number),
            }
        }
    }

    fn signal(&self, number: i32) {
        let Some(signal) = Signal::from_named_raw(number) else { return };
        // The id is the command's until it was reaped. Its group may outlive it, and may not be there yet.
        if self.over.is_none() && kill_process_group(self.command, signal).is_err() {
            // It has ended meanwhile.
            let _ = kill_process(self.command, signal);
        }
    }

    /// Ends the streams, and waits until the host has all that is in them, however slowly its reader takes it: what is still on its way
    /// when the guest ends is lost, and nobody would see that.
    ///
    /// # Errors
    /// Where output may be lost: a status would say that it is whole.
    fn settle(&mut self) -> Result<(), Errno> {
        for pump in &mut self.pumps {
            pump.stop();
        }
        self.pumps.iter().skip(1).try_for_each(|pump| {
            pump.wait_for_answer()?;
            pump.lost().map_or(Ok(()), Err)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ends_survive_the_pipe() {
        for (script, end) in
            [("exit 7", End::Exited(7)), ("kill -9 $$", End::Signaled(9)), ("exit 255", End::Exited(255))]
        {
            let mut child = std::process::Command::new("sh").args(["-c", script]).spawn().expect("a shell");
            let pid = Pid::from_child(&child);
            let status = loop {
                if let Some((_, status)) = rustix::process::waitpid(Some(pid), WaitOptions::empty()).expect("waited") {
                    break status;
                }
            };
            assert_eq!(decode(encode(status)), end);
            // It was reaped already.
            let _ = child.wait();
        }
        assert_eq!(decode([0, 0]), End::Failed);
    }
}
