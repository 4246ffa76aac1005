//! One try of a test: a process `hwvmm run`, watched until it has ended.

use super::case::Case;
use super::file::KtapUse;
use super::folder::{FolderError, new_file, write_new};
use super::log::{Findings, Log};
use super::outcome::{Facts, ProcessEnd, Stop};
use super::stats::Stats;
use crate::escape::escape;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};
use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use thiserror::Error;

/// How long the console may be quiet after the line of a panic before the run is ended. hwvmm itself ends a run at the last line of
/// Linux' panics: this is for kernels that print none.
const PANIC_QUIET: Duration = Duration::from_millis(80);
/// How long a run may go on behind its time-out before it is ended from here.
const LATE: Duration = Duration::from_secs(30);
/// How long a run may take to end that was asked to. It ends a machine's process that hangs after 20 s.
const GRACE: Duration = Duration::from_secs(25);
/// How often the user's wish to end the suite is looked for.
const LOOK: Duration = Duration::from_millis(100);
/// Reads of each output before other things are looked at again.
const READS: usize = 16;
/// Bytes that are read at once.
const READ_BYTES: usize = 64 << 10;
/// Bytes of a kernel's log on a file system that does not take back what has been read.
const MAX_KERNEL_LOG_BYTES: u64 = 256 << 20;
/// Bytes of hwvmm's messages that are kept.
const MESSAGES_BYTES: usize = 4 << 20;
/// Bytes of its last message that reports show.
const SAID_BYTES: usize = 400;

/// A test could not be run at all.
#[derive(Debug, Error)]
pub(super) enum AttemptError {
    #[error(transparent)]
    Folder(#[from] FolderError),
    #[error("the options cannot be written as TOML")]
    Toml(#[from] toml::ser::Error),
    #[error("cannot {0}")]
    Io(&'static str, #[source] io::Error),
}

/// Whether a run is profiled, for its baseline.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Profiled {
    Yes,
    No,
}

/// The files of a try.
pub(super) struct Files {
    folder: PathBuf,
}

impl Files {
    pub(super) fn new(folder: PathBuf) -> Self {
        Self { folder }
    }

    pub(super) fn folder(&self) -> &Path {
        &self.folder
    }

    /// The statistics, as JSON.
    fn stats(&self) -> PathBuf {
        self.folder.join("stats.json")
    }

    /// The profile, where there is a baseline.
    pub(super) fn profile(&self) -> PathBuf {
        self.folder.join("profile.json")
    }

    /// The kernel's log where the guest runs a command, while the run lasts.
    fn kernel_log(&self) -> PathBuf {
        self.folder.join("kernel-log")
    }

    /// The options of the run.
    fn options(&self) -> PathBuf {
        self.folder.join("run.toml")
    }

    /// The line for a shell that runs it again.
    pub(super) fn again(&self, case: &Case) -> String {
        let folder = case.folder.canonicalize().unwrap_or_else(|_| case.folder.clone());
        let words = [OsStr::new("run"), OsStr::new("--config"), self.options().as_os_str()].map(quoted);
        format!("cd {} && hwvmm {}", quoted(folder.as_os_str()), words.join(" "))
    }
}

/// A word for a shell. Bytes that are not UTF-8 are shown as the shell's `$'\xNN'`.
fn quoted(word: &OsStr) -> String {
    let plain = |byte: &u8| byte.is_ascii_alphanumeric() || b"/._-+=:@%,".contains(byte);
    let bytes = word.as_bytes();
    if !bytes.is_empty() && bytes.iter().all(plain) {
        return word.to_string_lossy().into_owned();
    }
    if word.to_str().is_some_and(|text| !text.chars().any(crate::escape::is_active)) {
        return format!("'{}'", word.to_string_lossy().replace('\'', r"'\''"));
    }
    let byte = |byte: &u8| if plain(byte) { char::from(*byte).to_string() } else { format!(r"\x{byte:02x}") };
    format!("$'{}'", bytes.iter().map(byte).collect::<String>())
}

/// Runs a test once. What it leaves is in `files`.
///
/// # Errors
/// Where the process cannot be started or watched.
pub(super) fn attempt(
    case: &Case,
    files: &Files,
    profiled: Profiled,
    interrupted: &AtomicBool,
) -> Result<Facts, AttemptError> {
    write_new(&files.options(), &toml::to_string(&case.options)?)?;
    write_new(&files.folder.join("again.sh"), &format!("{}\n", files.again(case)))?;
    let logs = Logs::new(case, files)?;
    let kernel_log = case.has_command().then(|| KernelLog::new(files)).transpose()?;
    let messages = Messages { file: new_file(&files.folder.join("hwvmm.log"))?, left: MESSAGES_BYTES, end: Vec::new() };
    let mut command = command(case, files, profiled);
    if kernel_log.is_some() {
        command.arg("--kernel-log").arg(files.kernel_log());
        if !case.has_log_level() {
            // What the kernel complains of, up to warnings, and not its other messages: each byte is an exit.
            command.args(["--append", "loglevel=5"]);
        }
    }
    let mut child = command.spawn().map_err(|error| AttemptError::Io("start hwvmm", error))?;
    let watched = Watch::new(&mut child, case, Guest { logs, kernel_log }, messages)
        .and_then(|watch| watch.until_the_end(interrupted));
    if watched.is_err() {
        // It must not go on alone; where it has ended already, there is nothing to kill.
        let _ = child.kill();
        let _ = child.wait();
    }
    let Ended { status, stop, findings, said } = watched?;
    let end = match (status.code(), status.signal()) {
        (Some(code), _) => ProcessEnd::Exited(u8::try_from(code).unwrap_or(u8::MAX)),
        (None, signal) => ProcessEnd::Killed(signal.unwrap_or_default()),
    };
    Ok(Facts { end, stop, stats: Stats::read(&files.stats()), findings, said })
}

fn command(case: &Case, files: &Files, profiled: Profiled) -> Command {
    // This very program, also where its file has been replaced meanwhile.
    let mut command = Command::new("/proc/self/exe");
    command.arg0("hwvmm").arg("run").arg("--config").arg(files.options());
    command.arg("--stats=json").arg("--stats-out").arg(files.stats());
    if profiled == Profiled::Yes {
        command.arg("--profile-out").arg(files.profile());
    }
    // A group of its own: Ctrl-C is for the suite, which ends its runs in order.
    command.current_dir(&case.folder).process_group(0);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// The logs of what a guest prints.
struct Logs {
    console: Log,
    /// What a command prints on stdout.
    output: Option<Log>,
}

impl Logs {
    fn new(case: &Case, files: &Files) -> Result<Self, FolderError> {
        let log = |name: &str, ktap| Ok(Log::new(new_file(&files.folder.join(name))?, ktap));
        Ok(if case.has_command() {
            let output = Some(log("output.log", case.settings.ktap)?);
            Self { console: log("console.log", KtapUse::Ignored)?, output }
        } else {
            Self { console: log("console.log", case.settings.ktap)?, output: None }
        })
    }

    /// What was found in them. Only the kernel's log has panics and complaints; sub-tests are in a command's output.
    fn finish(self) -> io::Result<Findings> {
        let mut findings = self.console.finish()?;
        if let Some(output) = self.output {
            let output = output.finish()?;
            findings.ktap = output.ktap;
            if findings.panic.is_none() {
                findings.tail.extend(output.tail);
            }
        }
        Ok(findings)
    }
}

/// The kernel's log of a guest that runs a command: a file that hwvmm writes. What has been read of it is given back to the file
/// system, so that a guest does not fill the disk.
struct KernelLog {
    path: PathBuf,
    file: File,
    /// Bytes that have been read.
    read: u64,
}

impl KernelLog {
    fn new(files: &Files) -> Result<Self, FolderError> {
        let path = files.kernel_log();
        Ok(Self { file: new_file(&path)?, path, read: 0 })
    }

    /// What is there; nothing where all has been read.
    fn read_some<'a>(&mut self, bytes: &'a mut [u8]) -> io::Result<&'a [u8]> {
        let count = self.file.read_at(bytes, self.read)?;
        self.read += count as u64;
        let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        if count > 0 && fallocate(&self.file, mode, 0, self.read).is_err() && self.read > MAX_KERNEL_LOG_BYTES {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        Ok(bytes.get(..count).unwrap_or_default())
    }
}

impl Drop for KernelLog {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_file(&self.path) {
            log::debug!("cannot remove a kernel's log: {error}");
        }
    }
}

/// What is read of a guest.
struct Guest {
    logs: Logs,
    kernel_log: Option<KernelLog>,
}

/// hwvmm's own messages: a file of bounded length, and the last line.
struct Messages {
    file: File,
    left: usize,
    end: Vec<u8>,
}

impl Messages {
    fn take(&mut self, bytes: &[u8]) -> io::Result<()> {
        let kept = &bytes[..bytes.len().min(self.left)];
        self.left -= kept.len();
        self.end.extend(bytes);
        let more = self.end.len().saturating_sub(READ_BYTES);
        self.end.drain(..more);
        self.file.write_all(kept)
    }

    /// The last message, without the indented lines that belong to it, and without its "hwvmm: ".
    fn last(&self) -> String {
        let text = String::from_utf8_lossy(&self.end);
        let last = text.lines().rev().find_map(|line| line.strip_prefix("hwvmm: "));
        escape(last.unwrap_or_default(), SAID_BYTES)
    }
}

/// A run that has ended.
struct Ended {
    status: ExitStatus,
    stop: Option<Stop>,
    findings: Findings,
    said: String,
}

struct Watch<'a> {
    child: &'a mut Child,
    pidfd: OwnedFd,
    case: &'a Case,
    guest: Guest,
    messages: Messages,
    /// `None` once its other end is closed.
    stdout: Option<File>,
    stderr: Option<File>,
    started: Instant,
    last_output: Instant,
    stop: Option<Stop>,
    kill_at: Option<Instant>,
}

impl<'a> Watch<'a> {
    fn new(child: &'a mut Child, case: &'a Case, guest: Guest, messages: Messages) -> Result<Self, AttemptError> {
        let failed = |error: Errno| AttemptError::Io("watch hwvmm", error.into());
        let pidfd = pidfd_open(Pid::from_child(child), PidfdFlags::empty()).map_err(failed)?;
        let stdout = child.stdout.take().map(|pipe| File::from(OwnedFd::from(pipe)));
        let stderr = child.stderr.take().map(|pipe| File::from(OwnedFd::from(pipe)));
        for pipe in stdout.iter().chain(&stderr) {
            rustix::io::ioctl_fionbio(pipe, true).map_err(failed)?;
        }
        let now = Instant::now();
        let (stop, kill_at) = (None, None);
        Ok(Self { child, pidfd, case, guest, messages, stdout, stderr, started: now, last_output: now, stop, kill_at })
    }

    fn until_the_end(mut self, interrupted: &AtomicBool) -> Result<Ended, AttemptError> {
        let failed = |error| AttemptError::Io("wait for hwvmm", error);
        let status = loop {
            self.wait().map_err(failed)?;
            (0..READS).take_while(|_| self.read()).for_each(drop);
            if let Some(status) = self.child.try_wait().map_err(failed)? {
                break status;
            }
            self.look(interrupted);
        };
        // What it has written is in the pipes. A process that it has left may hold them open: that one is not waited for.
        while self.read() {}
        let Self { guest, messages, mut stop, .. } = self;
        let said = messages.last();
        let findings = match guest.logs.finish() {
            Ok(findings) => findings,
            Err(error) => {
                stop.get_or_insert(Stop::Output(error.to_string()));
                Findings::default()
            }
        };
        Ok(Ended { status, stop, findings, said })
    }

    /// Waits for output, for the end of the process, and for the next time at which something is due.
    fn wait(&self) -> io::Result<()> {
        let now = Instant::now();
        let due = self.due().into_iter().chain([now + LOOK]).min().unwrap_or(now);
        let timeout = Timespec::try_from(due.saturating_duration_since(now)).ok();
        let mut fds = vec![PollFd::new(&self.pidfd, PollFlags::IN)];
        fds.extend(
            self.stdout.iter().chain(&self.stderr).map(|pipe| PollFd::from_borrowed_fd(pipe.as_fd(), PollFlags::IN)),
        );
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    fn silent_at(&self) -> Option<Instant> {
        self.last_output.checked_add(self.case.settings.silence?)
    }

    fn late_at(&self) -> Option<Instant> {
        self.started.checked_add(self.case.needs.timeout)?.checked_add(LATE)
    }

    fn panic_at(&self) -> Option<Instant> {
        self.guest.logs.console.has_panic().then(|| self.last_output + PANIC_QUIET)
    }

    /// When something is to be done.
    fn due(&self) -> Option<Instant> {
        match self.stop {
            Some(_) => self.kill_at,
            None => [self.silent_at(), self.late_at(), self.panic_at()].into_iter().flatten().min(),
        }
    }

    /// Does what is due.
    fn look(&mut self, interrupted: &AtomicBool) {
        let now = Instant::now();
        let is_due = |at: Option<Instant>| at.is_some_and(|at| at <= now);
        if self.stop.is_some() {
            if is_due(self.kill_at) {
                // Where it has ended just now, there is nothing to kill.
                let _ = self.child.kill();
                self.kill_at = None;
            }
            return;
        }
        if interrupted.load(Ordering::Relaxed) {
            self.end(Stop::Interrupted);
        } else if is_due(self.panic_at()) {
            self.end(Stop::Panic);
        } else if is_due(self.silent_at()) {
            self.end(Stop::Silence(self.case.settings.silence.unwrap_or_default()));
        } else if is_due(self.late_at()) {
            self.end(Stop::Late);
        }
    }

    /// Asks the run to end. SIGQUIT has it print its last exits.
    fn end(&mut self, why: Stop) {
        let signal = if why == Stop::Interrupted { Signal::TERM } else { Signal::QUIT };
        if let Err(error) = kill_process(Pid::from_child(self.child), signal) {
            log::debug!("a run cannot be ended: {error}");
        }
        self.stop = Some(why);
        self.kill_at = Some(Instant::now() + GRACE);
    }

    /// Reads once from each pipe. Returns true if there was something.
    fn read(&mut self) -> bool {
        let mut bytes = vec![0; READ_BYTES];
        let Guest { logs, kernel_log } = &mut self.guest;
        let output = read_some(&mut self.stdout, &mut bytes);
        let mut any = !output.is_empty();
        let mut taken = logs.output.as_mut().unwrap_or(&mut logs.console).take(output);
        if let Some(kernel_log) = kernel_log {
            let console = kernel_log.read_some(&mut bytes);
            any |= console.as_ref().is_ok_and(|bytes| !bytes.is_empty());
            taken = taken.and(console).and_then(|bytes| logs.console.take(bytes));
        }
        if any {
            self.last_output = Instant::now();
        }
        if let Err(error) = taken {
            self.lose(&error);
        }
        let messages = read_some(&mut self.stderr, &mut bytes);
        if let Err(error) = self.messages.take(messages) {
            self.lose(&error);
        }
        any || !messages.is_empty()
    }

    /// Output cannot be kept.
    fn lose(&mut self, error: &io::Error) {
        if !matches!(self.stop, Some(Stop::Output(_))) {
            self.end(Stop::Output(error.to_string()));
        }
    }
}

/// Reads what is there, and closes a pipe at its end.
fn read_some<'a>(pipe: &mut Option<File>, bytes: &'a mut [u8]) -> &'a [u8] {
    let Some(file) = pipe else { return &[] };
    match rustix::io::read(&*file, &mut *bytes) {
        Ok(0) => *pipe = None,
        Ok(count) => return bytes.get(..count).unwrap_or_default(),
        Err(Errno::AGAIN | Errno::INTR) => {}
        Err(error) => {
            log::debug!("a run's output cannot be read: {error}");
            *pipe = None;
        }
    }
    &[]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_quoted_for_a_shell() {
        for word in ["", "a", "a b", "it's", "$(x)", "a\nb", "-x=1,2", "\u{202e}", "`"] {
            let shell = Command::new("bash").arg("-c").arg(format!("printf %s {}", quoted(OsStr::new(word)))).output();
            assert_eq!(shell.expect("a shell").stdout, word.as_bytes(), "{word:?}");
        }
        assert_eq!(quoted(OsStr::from_bytes(b"a\xff")), r"$'a\xff'");
    }

    #[test]
    fn the_last_message_is_shown() {
        let mut messages = Messages { file: tempfile::tempfile().expect("a file"), left: 20, end: Vec::new() };
        messages.take(b"hwvmm: one\nhwvmm: two\x1b\n  its second line\n").expect("written");
        assert_eq!(messages.last(), "two\\x1b");
        assert_eq!(messages.file.metadata().expect("known").len(), 20);
    }
}
