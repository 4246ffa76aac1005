//! A process for a job on foreign files: it has the files that it is given, and little else.
//!
//! The process is a copy of this one (fork(2)), with one thread. It closes all other files, limits its memory, its CPU time and what it
//! writes, and enters the sandbox as a [`ThreadRole::Parser`]. Its answer comes through a pipe. Whatever its job does, this
//! process gets an answer of limited length, or an error, within a limited time.

use super::fork::{Child, ForkError, PANICKED, fork};
use super::roles::ThreadRole;
use super::trap::Refused;
use super::{Mode, Sandbox, inherited, sys};
use crate::escape::escape;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{
    Pid, Resource, Rlimit, Signal, WaitStatus, getpid, getppid, set_parent_process_death_signal, setrlimit,
};
use std::fmt;
use std::fs::File;
use std::io::{self, Read, Write};
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};
use thiserror::Error;

/// Address space of a process before its job takes any: this program, its libraries, its stack.
const OWN_BYTES: u64 = 64 << 20;
/// What is kept of the messages of a process, in bytes.
const MESSAGES_BYTES: usize = 400;
/// Bytes of its answer that are read at once.
const PIECE: usize = 64 << 10;

/// What a job may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Address space in bytes.
    pub memory_bytes: u64,
    /// CPU time; the kernel counts in whole seconds.
    pub cpu: Duration,
    /// The time until it is killed.
    pub wall: Duration,
    /// The offset in bytes behind which it writes no file.
    pub file_bytes: u64,
    /// The length of its answer in bytes.
    pub answer_bytes: usize,
}

/// Where a job runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Isolation {
    /// In a process of its own, with the filters of the mode. In [`Mode::Off`] the limits hold.
    Process(Mode),
    /// In the calling thread, without limits: for fuzz targets, and for tests, whose process has threads.
    None,
}

/// Why there is no answer. In the texts, "it" is the process.
#[derive(Debug, Error)]
pub enum ConfinedError {
    /// There is no process for it.
    #[error(transparent)]
    Fork(#[from] ForkError),
    /// Pipes, poll(2), waitpid(2).
    #[error("cannot {0}")]
    Io(&'static str, #[source] io::Error),
    /// It made a system call that its sandbox does not permit.
    #[error("it was ended by SIGSYS: {refused}{messages}; {BUG}")]
    Refused {
        /// The system call and the thread that made it.
        refused: Refused,
        /// What it wrote to stderr.
        messages: Messages,
    },
    /// A signal ended it.
    #[error("it was ended by {}{messages}; {BUG}", signal_name(*.signal))]
    Signal {
        /// The number of the signal.
        signal: i32,
        /// What it wrote to stderr.
        messages: Messages,
    },
    /// The job panicked; it ended with the status of a panic.
    #[error("it panicked{0}; {BUG}")]
    Panicked(Messages),
    /// It ended with a status that is none of its own.
    #[error("it ended with status {status}{messages}")]
    Exited {
        /// The exit status.
        status: i32,
        /// What it wrote to stderr.
        messages: Messages,
    },
    /// It used all of its CPU time.
    #[error("it took more than {} s of CPU time, and was ended (SIGXCPU); do not trust the file", .0.as_secs())]
    Cpu(Duration),
    /// It did not end in time.
    #[error("it did not end within {} s, and was killed; check that the file can be read", .0.as_secs_f64())]
    Late(Duration),
    /// It wrote more than it may to a file.
    #[error("it wrote more than {0} bytes, and was ended (SIGXFSZ); {BUG}")]
    File(u64),
    /// Its answer was too long.
    #[error("it answered with more than {0} bytes, and was killed; {BUG}")]
    Answer(usize),
    /// Its answer cannot be read.
    #[error("its answer cannot be read; {BUG}")]
    Nonsense,
}

/// What to think of a process that did not end as it should.
const BUG: &str = "this is a bug in hwvmm; do not trust the file";

/// The messages of a process; empty where it wrote none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Messages(String);

impl fmt::Display for Messages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() { Ok(()) } else { write!(f, ": {}", self.0) }
    }
}

fn signal_name(signal: i32) -> String {
    signal_hook::low_level::signal_name(signal).map_or_else(|| format!("signal {signal}"), str::to_owned)
}

/// The ends of the pipes between both processes that one of them has.
struct Ends {
    answer: OwnedFd,
    /// What a filter refused, and the standard error of the process; both do not block.
    refused: OwnedFd,
    messages: OwnedFd,
}

fn pipes() -> rustix::io::Result<(Ends, Ends)> {
    let answer = pipe_with(PipeFlags::CLOEXEC)?;
    let refused = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
    let messages = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
    let ours = Ends { answer: answer.0, refused: refused.0, messages: messages.0 };
    Ok((ours, Ends { answer: answer.1, refused: refused.1, messages: messages.1 }))
}

/// Runs `job`, which uses no other files than `files`, and returns its answer. The answer is as hostile as the files: the caller
/// checks it.
///
/// # Errors
/// [`ConfinedError`]; [`ForkError::Threads`] in it where this process has more than one thread.
pub fn confined(
    isolation: Isolation,
    limits: &Limits,
    files: &[BorrowedFd<'_>],
    job: impl FnOnce() -> Vec<u8>,
) -> Result<Vec<u8>, ConfinedError> {
    confined_with(isolation, limits, files, &[], job)
}

/// As [`confined`], with files that another part of this process has open, by their numbers. What is not open by then is left out.
///
/// # Errors
/// As [`confined`].
pub fn confined_with(
    isolation: Isolation,
    limits: &Limits,
    files: &[BorrowedFd<'_>],
    numbers: &[RawFd],
    job: impl FnOnce() -> Vec<u8>,
) -> Result<Vec<u8>, ConfinedError> {
    let Isolation::Process(mode) = isolation else { return Ok(job()) };
    let limits = limits_under_test(*limits);
    let (ours, theirs) = pipes().map_err(|error| ConfinedError::Io("make a pipe", error.into()))?;
    let parent = getpid();
    let child = fork(|| match work(mode, &limits, (files, numbers), &theirs, parent, job) {
        Ok(()) => 0,
        Err(error) => {
            // To the pipe that carries its messages.
            let _ = writeln!(io::stderr(), "{error}");
            1
        }
    })?;
    drop(theirs);
    wait(child, ours, &limits)
}

/// The process' side.
fn work(
    mode: Mode,
    limits: &Limits,
    (files, numbers): (&[BorrowedFd<'_>], &[RawFd]),
    theirs: &Ends,
    parent: Pid,
    job: impl FnOnce() -> Vec<u8>,
) -> Result<(), Box<dyn std::error::Error>> {
    // Messages and panics go to the pipe, not to the terminal.
    log::set_max_level(log::LevelFilter::Off);
    sys::no_backtrace();
    std::panic::set_hook(Box::new(|info| {
        let _ = writeln!(io::stderr(), "{info}");
    }));
    let messages = &theirs.messages;
    rustix::stdio::dup2_stdin(messages)?;
    rustix::stdio::dup2_stdout(messages)?;
    if mode != Mode::Log {
        rustix::stdio::dup2_stderr(messages)?;
    }
    // Before anything is opened by a number that was another file's.
    inherited::close_inherited_files()?;
    let kept = files.iter().map(AsRawFd::as_raw_fd).chain([theirs.answer.as_raw_fd(), theirs.refused.as_raw_fd()]);
    close_all_but(kept.chain(numbers.iter().copied()).chain([0, 1, 2]).collect());
    set_parent_process_death_signal(Some(Signal::KILL))?;
    if getppid() != Some(parent) {
        return Ok(());
    }
    // A write beyond its limit ends it; hwvmm has a handler, for its own files.
    sys::restore_default(libc::SIGXFSZ)?;
    // rustix asks the kernel where the clocks are when one is read first.
    let _ = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    // Not dropped: to close a file is not permitted then.
    let sandbox = ManuallyDrop::new(Sandbox::new(mode, theirs.refused.try_clone()?)?);
    sandbox.confine_process(&[])?;
    limit(limits, mode)?;
    sandbox.enter(ThreadRole::Parser, "parser")?;
    misbehave(limits, files);
    let mut answer = job();
    if is_asked("answer") {
        answer = vec![0; limits.answer_bytes + 1];
    }
    let mut done = 0;
    while let Some(rest) = answer.get(done..).filter(|rest| !rest.is_empty()) {
        match rustix::io::write(&theirs.answer, rest) {
            Ok(count) => done += count,
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Closes all files but those in `kept`.
fn close_all_but(mut kept: Vec<RawFd>) {
    kept.sort_unstable();
    let mut first = 0;
    for last in kept.into_iter().chain([RawFd::MAX]) {
        let (Ok(from), Ok(to)) = (u32::try_from(first), u32::try_from(last - 1)) else {
            first = last + 1;
            continue;
        };
        if from <= to {
            sys::close_range(from, to);
        }
        first = last.saturating_add(1);
    }
}

/// Sets the limits of this process.
fn limit(limits: &Limits, mode: Mode) -> rustix::io::Result<()> {
    let set = |resource, most| setrlimit(resource, Rlimit { current: Some(most), maximum: Some(most) });
    let memory = limits.memory_bytes.saturating_add(OWN_BYTES);
    set(Resource::As, memory)?;
    set(Resource::Data, memory)?;
    set(Resource::Fsize, limits.file_bytes)?;
    set(Resource::Core, 0)?;
    // A filter that asks makes a file descriptor.
    if mode != Mode::Log {
        set(Resource::Nofile, 0)?;
    }
    // The soft limit ends it by SIGXCPU, the hard one by SIGKILL.
    let seconds = limits.cpu.as_secs().max(1);
    setrlimit(Resource::Cpu, Rlimit { current: Some(seconds), maximum: Some(seconds + 1) })
}

/// Waits until `fd` can be read, or until `deadline`. Returns true if it can be read.
fn readable(fd: &impl AsFd, deadline: Instant) -> Result<bool, ConfinedError> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        match poll(&mut [PollFd::new(fd, PollFlags::IN)], Timespec::try_from(left).ok().as_ref()) {
            Ok(ready) => return Ok(ready > 0),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(ConfinedError::Io("wait for a process", error.into())),
        }
    }
}

/// Reads the answer until the process ends. A process that is to be killed is killed when `child` is dropped.
fn wait(mut child: Child, ours: Ends, limits: &Limits) -> Result<Vec<u8>, ConfinedError> {
    let deadline = Instant::now() + limits.wall;
    let (mut answer, mut piece) = (Vec::new(), vec![0; PIECE]);
    loop {
        if !readable(&ours.answer, deadline)? {
            return Err(ConfinedError::Late(limits.wall));
        }
        match rustix::io::read(&ours.answer, &mut piece) {
            Ok(0) => break,
            Ok(count) => answer.extend_from_slice(piece.get(..count).unwrap_or_default()),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(ConfinedError::Io("read the answer of a process", error.into())),
        }
        if answer.len() > limits.answer_bytes {
            return Err(ConfinedError::Answer(limits.answer_bytes));
        }
    }
    // It has ended, or has closed the pipe and goes on.
    if !readable(&child, deadline)? {
        return Err(ConfinedError::Late(limits.wall));
    }
    let status = child.wait().map_err(|error| ConfinedError::Io("wait for the end of a process", error))?;
    let refused = Refused::read(File::from(ours.refused));
    match why(status, refused, read_messages(ours.messages), limits) {
        None => Ok(answer),
        Some(error) => Err(error),
    }
}

/// Why a process has no answer; `None` where it has one.
fn why(status: WaitStatus, refused: Option<Refused>, messages: Messages, limits: &Limits) -> Option<ConfinedError> {
    let Some(signal) = status.terminating_signal() else {
        return match status.exit_status() {
            Some(0) => None,
            Some(status) if status == i32::from(PANICKED) => Some(ConfinedError::Panicked(messages)),
            status => Some(ConfinedError::Exited { status: status.unwrap_or(0), messages }),
        };
    };
    Some(match (signal, refused) {
        (libc::SIGSYS, Some(refused)) => ConfinedError::Refused { refused, messages },
        (libc::SIGXCPU, _) => ConfinedError::Cpu(limits.cpu),
        (libc::SIGXFSZ, _) => ConfinedError::File(limits.file_bytes),
        _ => ConfinedError::Signal { signal, messages },
    })
}

/// What a process that has ended wrote to its standard error, on one line.
fn read_messages(pipe: OwnedFd) -> Messages {
    let mut bytes = Vec::new();
    // An error is that of an empty pipe which some other process has open.
    let _ = File::from(pipe).take(MESSAGES_BYTES as u64).read_to_end(&mut bytes);
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    Messages(escape(&lines.join(" "), MESSAGES_BYTES))
}

/// Returns true if a test asks for this fault. Release builds have no faults.
fn is_asked(fault: &str) -> bool {
    #[cfg(any(debug_assertions, feature = "fault-injection"))]
    return super::fault::is_asked(ThreadRole::Parser, fault);
    #[cfg(not(any(debug_assertions, feature = "fault-injection")))]
    return false && fault.is_empty();
}

/// The limits; with less CPU time where a test uses it up.
fn limits_under_test(limits: Limits) -> Limits {
    if is_asked("spin") { Limits { cpu: Duration::from_secs(1), ..limits } } else { limits }
}

/// Writes more than it may, where a test asks for that.
fn misbehave(limits: &Limits, files: &[BorrowedFd<'_>]) {
    for file in files.iter().filter(|_| is_asked("write")) {
        let _ = rustix::io::pwrite(file, &[1], limits.file_bytes);
    }
}
