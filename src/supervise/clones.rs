//! Many runs from one snapshot at once, each a process `hwvmm run` of its own.

use super::lines::Lines;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Pid, Signal, kill_process};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::io::{self, Read};
use std::os::fd::AsFd;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, ChildStderr, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// How long a run may go on behind its time-out, or behind the request to end, before it is killed. It ends a machine's process that
/// hangs after 20 s.
const GRACE: Duration = Duration::from_secs(25);
/// How often the user's wish to end, and processes that have ended, are looked for.
const LOOK: Duration = Duration::from_millis(20);
/// How long the output of a run that has ended is waited for: another process may have got its pipe.
const REST: Duration = Duration::from_secs(1);
/// Bytes that are read at once.
const READ_BYTES: usize = 64 << 10;

/// What the clones are.
pub struct ClonePlan<'a> {
    /// How many.
    pub count: u32,
    /// The options of each `hwvmm run`, `--from` among them.
    pub options: &'a [OsString],
    /// How long each may run.
    pub timeout: Duration,
    /// Set when all are to end.
    pub interrupted: &'a AtomicBool,
    /// Takes the output of the guest, and the messages of hwvmm, of a clone, counted from 0.
    pub on_output: &'a dyn Fn(u32, CloneOutput<'_>),
}

/// What a clone has said.
pub enum CloneOutput<'a> {
    /// A line of the guest's console, or a part of a long one.
    Console(&'a [u8]),
    /// A line of messages.
    Message(&'a [u8]),
}

/// How a clone has ended, and what it took.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct CloneResult {
    /// Which one, counted from 0.
    pub clone: u32,
    /// The end of its run; `None` where that is not known.
    pub end: Option<String>,
    /// The exit status of its run; 128 and the number of a signal that ended it.
    pub status: u8,
    /// Milliseconds until its console had a line, from the start of its process.
    pub first_line_ms: Option<u64>,
    /// Memory that no other process shares, in KiB: pages that the guest has written, and what both processes of hwvmm have for
    /// themselves.
    pub own_kib: Option<u64>,
    /// The part of it that is the guest's.
    pub guest_own_kib: Option<u64>,
    /// Exits to user space.
    pub userspace_exits: Option<u64>,
    /// VM exits, as KVM counts them.
    pub vm_exits: Option<u64>,
}

/// What is read of the statistics of a run.
#[derive(Deserialize)]
struct Stats {
    end: String,
    userspace_exits: Exits,
    #[serde(default)]
    kvm: BTreeMap<String, u64>,
    memory: Option<Memory>,
}

#[derive(Deserialize)]
struct Exits {
    total: u64,
}

#[derive(Deserialize)]
struct Memory {
    guest_own_kib: u64,
    vmm_private_kib: u64,
}

/// A run, and what it has said.
struct Running {
    child: Child,
    started: Instant,
    stdout: Option<ChildStdout>,
    stderr: Option<ChildStderr>,
    console: Lines,
    messages: Lines,
    status: Option<ExitStatus>,
    ended: Option<Instant>,
    /// It was asked to end, or killed.
    kill_at: Instant,
    killed: bool,
    result: CloneResult,
}

/// Starts all clones, and waits until they have ended. Returns what is known of each, in order. None is left when this returns, or
/// when this process ends in another way (PR_SET_PDEATHSIG).
///
/// # Errors
/// Where a process cannot be started, or poll(2) fails; those that run are ended.
pub fn run_clones(plan: &ClonePlan<'_>) -> io::Result<Vec<CloneResult>> {
    let mut clones = Clones { plan, running: Vec::new() };
    for number in 0..plan.count {
        clones.running.push(Running::start(plan, number)?);
    }
    clones.wait()?;
    Ok(clones.running.iter_mut().map(|running| std::mem::take(&mut running.result)).collect())
}

struct Clones<'a> {
    plan: &'a ClonePlan<'a>,
    running: Vec<Running>,
}

impl Drop for Clones<'_> {
    fn drop(&mut self) {
        for running in self.running.iter_mut().filter(|running| running.status.is_none()) {
            let _ = running.child.kill();
            let _ = running.child.wait();
        }
    }
}

impl Clones<'_> {
    fn wait(&mut self) -> io::Result<()> {
        let mut asked = false;
        loop {
            let now = Instant::now();
            if !asked && self.plan.interrupted.load(Ordering::Relaxed) {
                asked = true;
                self.running.iter_mut().for_each(|running| running.ask_to_end(now));
            }
            let mut fds: Vec<PollFd<'_>> = self.running.iter().flat_map(Running::interests).collect();
            if fds.is_empty() && self.running.iter().all(|running| running.status.is_some()) {
                return Ok(());
            }
            let timeout = Timespec::try_from(LOOK).ok();
            match poll(&mut fds, timeout.as_ref()) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
            // In the order of `interests`.
            let mut ready = fds.iter().map(|fd| !fd.revents().is_empty()).collect::<Vec<_>>().into_iter();
            for running in &mut self.running {
                running.serve(&mut ready, self.plan)?;
            }
        }
    }
}

impl Running {
    fn start(plan: &ClonePlan<'_>, number: u32) -> io::Result<Self> {
        let started = Instant::now();
        // This very program, also where its file has been replaced meanwhile.
        let mut command = Command::new("/proc/self/exe");
        command.arg0("hwvmm").arg("run").arg("--end-with-parent").arg(std::process::id().to_string());
        command.arg("--stats=json").args(plan.options);
        // A group of its own: Ctrl-C is for this process, which ends all in order.
        command.process_group(0).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn()?;
        let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
        let kill_at = started.checked_add(plan.timeout.saturating_add(GRACE)).unwrap_or(started + GRACE);
        Ok(Self {
            child,
            started,
            stdout,
            stderr,
            console: Lines::default(),
            messages: Lines::default(),
            status: None,
            ended: None,
            kill_at,
            killed: false,
            result: CloneResult { clone: number, ..CloneResult::default() },
        })
    }

    /// The pipes that are open.
    fn interests(&self) -> impl Iterator<Item = PollFd<'_>> {
        let stdout = self.stdout.iter().map(|pipe| PollFd::from_borrowed_fd(pipe.as_fd(), PollFlags::IN));
        let stderr = self.stderr.iter().map(|pipe| PollFd::from_borrowed_fd(pipe.as_fd(), PollFlags::IN));
        stdout.chain(stderr)
    }

    /// Has the run end in order.
    fn ask_to_end(&mut self, now: Instant) {
        if self.status.is_none() {
            if let Some(pid) = Pid::from_raw(i32::try_from(self.child.id()).unwrap_or(0)) {
                // The child is not waited for yet, so that the ID is its own.
                let _ = kill_process(pid, Signal::TERM);
            }
            self.kill_at = self.kill_at.min(now + GRACE);
        }
    }

    /// Reads what there is, and looks whether the process has ended.
    fn serve(&mut self, ready: &mut impl Iterator<Item = bool>, plan: &ClonePlan<'_>) -> io::Result<()> {
        let number = self.result.clone;
        if self.stdout.is_some() && ready.next() == Some(true) {
            let (first, started) = (&mut self.result.first_line_ms, self.started);
            let open = read(self.stdout.as_mut(), &mut self.console, |line| {
                first.get_or_insert_with(|| u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX));
                (plan.on_output)(number, CloneOutput::Console(line));
            });
            if !open {
                self.stdout = None;
            }
        }
        if self.stderr.is_some() && ready.next() == Some(true) {
            let result = &mut self.result;
            let open = read(self.stderr.as_mut(), &mut self.messages, |line| match statistics(line) {
                Some(stats) => take(result, stats),
                None => (plan.on_output)(number, CloneOutput::Message(line)),
            });
            if !open {
                self.stderr = None;
            }
        }
        let now = Instant::now();
        if self.status.is_none() {
            self.status = self.child.try_wait()?;
            if let Some(status) = self.status {
                let signal = || status.signal().and_then(|signal| u8::try_from(128 + signal).ok());
                self.result.status =
                    status.code().and_then(|code| u8::try_from(code).ok()).or_else(signal).unwrap_or(255);
                self.ended = Some(now);
            } else if self.kill_at <= now && !self.killed {
                self.killed = true;
                self.child.kill()?;
            }
        }
        if self.ended.is_some_and(|ended| ended + REST <= now) {
            (self.stdout, self.stderr) = (None, None);
        }
        Ok(())
    }
}

/// Reads once from `pipe`, and calls `each` for each line. Returns false at its end.
fn read(pipe: Option<&mut impl Read>, lines: &mut Lines, each: impl FnMut(&[u8])) -> bool {
    let mut bytes = vec![0; READ_BYTES];
    match pipe.map(|pipe| pipe.read(&mut bytes)) {
        Some(Ok(count)) if count > 0 => {
            lines.feed(&bytes[..count], each);
            true
        }
        Some(Err(error)) if error.kind() == io::ErrorKind::Interrupted => true,
        _ => {
            lines.finish(each);
            false
        }
    }
}

/// The statistics, which are one line of JSON. No message is: each begins with hwvmm's name.
fn statistics(line: &[u8]) -> Option<Stats> {
    line.starts_with(b"{").then(|| serde_json::from_slice(line).ok()).flatten()
}

fn take(result: &mut CloneResult, stats: Stats) {
    result.end = Some(stats.end);
    result.userspace_exits = Some(stats.userspace_exits.total);
    result.vm_exits = stats.kvm.get("exits").copied();
    if let Some(Memory { guest_own_kib, vmm_private_kib }) = stats.memory {
        result.guest_own_kib = Some(guest_own_kib);
        result.own_kib = Some(guest_own_kib.saturating_add(vmm_private_kib));
    }
}

/// The options of a clone: those of every one, then the user's, which may replace them.
#[must_use]
pub fn clone_options(from: &OsStr, has_virtio_console: bool, timeout: Duration, given: &[OsString]) -> Vec<OsString> {
    let mut options: Vec<OsString> = vec!["--from".into(), from.into()];
    options.push(format!("--timeout={}ms", timeout.as_millis()).into());
    if has_virtio_console {
        options.extend(["--console".into(), "virtio".into()]);
    }
    options.extend_from_slice(given);
    options
}
