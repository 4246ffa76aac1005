//! A clone: a process `hwvmm run` of its own, its output, its end.

use super::lines::Lines;
use super::plan::{CloneOutput, ClonePlan};
use super::result::{CloneResult, microseconds};
use crate::measure::monotonic_ns;
use rustix::event::{PollFd, PollFlags};
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::process::{Pid, Signal, kill_process};
use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, ChildStderr, ChildStdout, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// How long a run may go on behind its time-out, or behind the request to end, before it is killed. It ends a machine's process that
/// hangs after 20 s.
const GRACE: Duration = Duration::from_secs(25);
/// How long the output of a run that has ended is waited for: another process may have got its pipe.
const REST: Duration = Duration::from_secs(1);
/// Bytes that are read at once.
const READ_BYTES: usize = 64 << 10;

/// A run, and what it has said.
pub(super) struct Running {
    child: Child,
    started: Instant,
    /// The same time on CLOCK_MONOTONIC, in nanoseconds.
    started_ns: u64,
    stdout: Option<ChildStdout>,
    stderr: Option<ChildStderr>,
    output: Lines,
    errors: Lines,
    /// Where the run writes its statistics.
    stats: File,
    status: Option<ExitStatus>,
    ended: Option<Instant>,
    /// When it is killed; `None` where the clock does not reach that time.
    kill_at: Option<Instant>,
    killed: bool,
    pub(super) result: CloneResult,
}

impl Running {
    /// Starts the clone with this number.
    ///
    /// # Errors
    /// Where the host has no process, memory or file for it.
    pub(super) fn start(plan: &ClonePlan<'_>, number: u32) -> io::Result<Self> {
        let stats = File::from(memfd_create("hwvmm-stats", MemfdFlags::CLOEXEC)?);
        let id = std::process::id();
        // This very program, also where its file has been replaced meanwhile.
        let mut command = Command::new("/proc/self/exe");
        command.arg0("hwvmm").arg("run").arg("--end-with-parent").arg(id.to_string());
        command.arg("--stats=json").arg(format!("--stats-out=/proc/{id}/fd/{}", stats.as_raw_fd()));
        command.args((plan.arguments)(number));
        // A group of its own: Ctrl-C is for this process, which ends all in order.
        command.process_group(0).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let (started, started_ns) = (Instant::now(), monotonic_ns());
        let mut child = command.spawn()?;
        let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
        let kill_at = started.checked_add(plan.timeout.saturating_add(GRACE));
        Ok(Self {
            child,
            started,
            started_ns,
            stdout,
            stderr,
            output: Lines::default(),
            errors: Lines::default(),
            stats,
            status: None,
            ended: None,
            kill_at,
            killed: false,
            result: CloneResult { clone: number, ..CloneResult::default() },
        })
    }

    /// Returns true once its process has ended and all of its output is read.
    pub(super) fn is_over(&self) -> bool {
        self.status.is_some() && self.stdout.is_none() && self.stderr.is_none()
    }

    /// The pipes that are open.
    pub(super) fn interests(&self) -> impl Iterator<Item = PollFd<'_>> {
        let stdout = self.stdout.iter().map(|pipe| PollFd::from_borrowed_fd(pipe.as_fd(), PollFlags::IN));
        let stderr = self.stderr.iter().map(|pipe| PollFd::from_borrowed_fd(pipe.as_fd(), PollFlags::IN));
        stdout.chain(stderr)
    }

    /// Has the run end in order.
    pub(super) fn ask_to_end(&mut self, now: Instant) {
        if self.status.is_none() {
            if let Some(pid) = Pid::from_raw(i32::try_from(self.child.id()).unwrap_or(0)) {
                // The child is not waited for yet, so that the ID is its own.
                let _ = kill_process(pid, Signal::TERM);
            }
            let soon = now + GRACE;
            self.kill_at = Some(self.kill_at.map_or(soon, |at| at.min(soon)));
        }
    }

    /// Reads what there is, and looks whether the process has ended. `ready` says for each of [`Self::interests`] if something is.
    pub(super) fn serve(&mut self, ready: &mut impl Iterator<Item = bool>, plan: &ClonePlan<'_>) -> io::Result<()> {
        let (number, started) = (self.result.clone, self.started);
        // What it has printed before its end is read behind it.
        let ended = self.status.is_some().then_some(self.result.ended_us);
        if self.stdout.is_some() && ready.next() == Some(true) {
            let first = &mut self.result.first_line_us;
            let is_open = read(self.stdout.as_mut(), &mut self.output, |line| {
                first.get_or_insert_with(|| ended.unwrap_or_else(|| microseconds(started)));
                (plan.on_output)(number, CloneOutput::Line(line));
            });
            if !is_open {
                self.stdout = None;
            }
        }
        if self.stderr.is_some() && ready.next() == Some(true) {
            let on_output = plan.on_output;
            let is_open =
                read(self.stderr.as_mut(), &mut self.errors, |line| on_output(number, CloneOutput::Error(line)));
            if !is_open {
                self.stderr = None;
            }
        }
        self.look_for_the_end(Instant::now())
    }

    fn look_for_the_end(&mut self, now: Instant) -> io::Result<()> {
        if self.status.is_none() {
            self.status = self.child.try_wait()?;
            if let Some(status) = self.status {
                let signal = || status.signal().and_then(|signal| u8::try_from(128 + signal).ok());
                self.result.status =
                    status.code().and_then(|code| u8::try_from(code).ok()).or_else(signal).unwrap_or(255);
                self.result.ended_us = microseconds(self.started);
                self.result.read(&self.stats, self.started_ns);
                self.ended = Some(now);
            } else if self.kill_at.is_some_and(|at| at <= now) && !self.killed {
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

impl Drop for Running {
    fn drop(&mut self) {
        if self.status.is_none() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
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

/// The arguments of `hwvmm run` for the clone with this number: the options given, with `{n}` for the number, and the command.
#[must_use]
pub fn clone_arguments(common: &[OsString], given: &[String], command: &[OsString], number: u32) -> Vec<OsString> {
    let numbered = given.iter().map(|option| format!("--{}", option.replace("{n}", &number.to_string())).into());
    let mut arguments: Vec<OsString> = common.iter().cloned().chain(numbered).collect();
    if !command.is_empty() {
        arguments.push("--".into());
        arguments.extend_from_slice(command);
    }
    arguments
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_clone_has_its_number_in_options_and_not_in_its_command() {
        let (common, command) = (["--from".into(), "d{n}".into()], ["echo".into(), "{n}".into()]);
        let given = ["disk=a-{n}.img,id=x{n}".to_owned(), "rng".to_owned()];
        let found = clone_arguments(&common, &given, &command, 7);
        assert_eq!(found, ["--from", "d{n}", "--disk=a-7.img,id=x7", "--rng", "--", "echo", "{n}"]);
        assert_eq!(clone_arguments(&common, &[], &[], 7), ["--from", "d{n}"]);
    }
}
