//! One try of a test: a process `hwvmm run`, watched until it has ended.

use super::case::Case;
use super::file::KtapUse;
use super::folder::{FolderError, new_file, write_new, write_new_script};
use super::kernel_log::{KernelLog, Taken};
use super::log::{Findings, Log, Panic, Source};
use super::options::StdoutOf;
use super::outcome::{Facts, ProcessEnd, Stop};
use super::problem::Problem;
use super::stats::Stats;
use super::template::Template;
use crate::escape::escape;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
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
const OVERRUN: Duration = Duration::from_secs(30);
/// How long a run may take to end that was asked to. It ends a machine's process that hangs after 20 s.
const GRACE: Duration = Duration::from_secs(25);
/// How often the user's wish to end the suite, and what the run writes to the kernel's log, are looked for.
const LOOK: Duration = Duration::from_millis(20);
/// The longest that a panic may go unnoticed behind its last line.
const PANIC_KNOWN: Duration = Duration::from_millis(100);
const _: () = assert!(PANIC_QUIET.as_millis() + LOOK.as_millis() <= PANIC_KNOWN.as_millis());
/// Bytes that are read at once.
const READ_BYTES: usize = 64 << 10;
/// Bytes of hwvmm's messages that are kept.
const MESSAGES_BYTES: usize = 4 << 20;
/// Bytes of its last message that reports show.
const SAID_BYTES: usize = 400;

/// The kernels and images of a suite were told apart when it was read: what has come to the path of a kernel since then is no image, which
/// would be a disk that the guest writes.
const KERNEL: &str = "--kernel-is-no-image";

/// A test could not be run at all.
#[derive(Debug, Error)]
pub(super) enum AttemptError {
    #[error(transparent)]
    Folder(#[from] FolderError),
    #[error("the options cannot be written as TOML")]
    Toml(#[from] toml::ser::Error),
    #[error("the options of the template are not valid: {0}")]
    Options(#[from] Problem),
    #[error("cannot {0}")]
    Io(&'static str, #[source] io::Error),
}

/// Whether a run is profiled, for its baseline.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Profiled {
    Yes,
    No,
}

/// Where the guest of a try starts.
#[derive(Clone, Copy, Debug)]
pub(super) enum Launch<'a> {
    /// With the options of the test, which boot it.
    Boot,
    /// From the snapshot of a template in this folder.
    From(&'a Template, &'a Path),
}

/// The files of a try.
pub(super) struct Files {
    folder: PathBuf,
    profiled: Profiled,
}

impl Files {
    pub(super) fn new(folder: PathBuf, profiled: Profiled) -> Self {
        Self { folder, profiled }
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

    /// The console, or the kernel's log where a command has stdout.
    fn console(&self) -> PathBuf {
        self.folder.join("console.log")
    }

    /// The options of a run that boots.
    fn options(&self) -> PathBuf {
        self.folder.join("run.toml")
    }

    /// The options of a run from a template, which is gone after the suite: it is run again by a boot.
    fn options_from_template(&self) -> PathBuf {
        self.folder.join("from-template.toml")
    }

    /// Writes what [`Files::again`] needs: the options, and that line as a script.
    ///
    /// # Errors
    /// Where the files cannot be written.
    pub(super) fn write_again(&self, case: &Case) -> Result<(), AttemptError> {
        write_new(&self.options(), &toml::to_string(&case.options_of_run())?)?;
        let script = format!("#!/usr/bin/env bash\n{}\n", self.again(case));
        Ok(write_new_script(&self.folder.join("again.sh"), &script)?)
    }

    /// The line for a shell that runs it again, with the kernel's log in a file and a profile where it has had these.
    pub(super) fn again(&self, case: &Case) -> String {
        let folder = case.folder.canonicalize().unwrap_or_else(|_| case.folder.clone());
        let (options, log) = (self.options(), self.folder.join("again.log"));
        let mut words = vec![OsStr::new("run"), OsStr::new(KERNEL), OsStr::new("--config"), options.as_os_str()];
        if case.needs.stdout == StdoutOf::Command {
            words.extend([OsStr::new("--kernel-log"), log.as_os_str()]);
        }
        if self.profiled == Profiled::Yes && !case.options.contains_key("profile") {
            words.push(OsStr::new("--profile"));
        }
        let words: Vec<String> = words.into_iter().map(quoted).collect();
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

/// Runs a test once, after [`Files::write_again`]. What it leaves is in `files`.
///
/// # Errors
/// Where the process cannot be started or watched.
pub(super) fn attempt(
    case: &Case,
    files: &Files,
    launch: Launch<'_>,
    interrupted: &AtomicBool,
) -> Result<Facts, AttemptError> {
    let options = match launch {
        Launch::Boot => files.options(),
        Launch::From(template, snapshot) => {
            let path = files.options_from_template();
            write_new(&path, &toml::to_string(&template.options_of_run(snapshot))?)?;
            path
        }
    };
    let console = new_file(&files.console())?;
    let (log, kernel_log) = match case.needs.stdout {
        StdoutOf::Console => (Log::new(Source::Console, Some(console), case.settings.ktap), None),
        StdoutOf::Command => {
            // The run writes it, and it is read here as it grows.
            let read = File::open(files.console()).map_err(|error| AttemptError::Io("open the kernel's log", error))?;
            let output = new_file(&files.folder.join("stdout.log"))?;
            let kernel_log = KernelLog::new(read, Log::new(Source::KernelLog, None, KtapUse::Ignored));
            (Log::new(Source::Command, Some(output), case.settings.ktap), Some(kernel_log))
        }
    };
    let messages = Messages { file: new_file(&files.folder.join("hwvmm.log"))?, left: MESSAGES_BYTES, end: Vec::new() };
    let mut child = command(case, files, &options).spawn().map_err(|error| AttemptError::Io("start hwvmm", error))?;
    let watched = Watch::new(&mut child, case, Logs { log, kernel_log, messages }, files.stats())
        .and_then(|watch| watch.until_the_end(interrupted));
    if watched.is_err() {
        // It must not go on alone; where it has ended already, there is nothing to kill.
        let _ = child.kill();
        let _ = child.wait();
    }
    let AttemptEnd { status, stop, findings, said } = watched?;
    let end = match (status.code(), status.signal()) {
        (Some(code), _) => ProcessEnd::Exited(u8::try_from(code).unwrap_or(u8::MAX)),
        (None, signal) => ProcessEnd::Killed(signal.unwrap_or_default()),
    };
    Ok(Facts { end, stop, stats: Stats::read(&files.stats()), findings, said })
}

fn command(case: &Case, files: &Files, options: &Path) -> Command {
    // This very program, also where its file has been replaced meanwhile.
    let mut command = Command::new("/proc/self/exe");
    command.arg0("hwvmm").args(["run", KERNEL]).arg("--config").arg(options);
    // Where this process is killed, its guests do not go on.
    command.arg("--end-with-parent").arg(std::process::id().to_string());
    command.arg("--stats=json").arg("--stats-out").arg(files.stats());
    if case.needs.stdout == StdoutOf::Command {
        command.arg("--kernel-log").arg(files.console());
    }
    if files.profiled == Profiled::Yes {
        command.arg("--profile-out").arg(files.profile());
    }
    // A group of its own: Ctrl-C is for the suite, which ends its runs in order.
    command.current_dir(&case.folder).process_group(0);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
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

/// What is kept of the output of a run.
struct Logs {
    /// What was found in the stdout of the run.
    log: Log,
    /// Where stdout is a command's.
    kernel_log: Option<KernelLog>,
    messages: Messages,
}

/// A run that has ended.
struct AttemptEnd {
    status: ExitStatus,
    stop: Option<Stop>,
    findings: Findings,
    said: String,
}

struct Watch<'a> {
    child: &'a mut Child,
    pidfd: OwnedFd,
    case: &'a Case,
    logs: Logs,
    /// `None` once its other end is closed.
    stdout: Option<File>,
    stderr: Option<File>,
    started: Instant,
    last_output: Instant,
    stop: Option<Stop>,
    kill_at: Option<Instant>,
    /// The file of its statistics.
    stats: PathBuf,
}

impl Logs {
    /// What the kernel has said of a panic.
    fn panic(&self) -> Panic {
        self.kernel_log.as_ref().map_or_else(|| self.log.panic(), KernelLog::panic)
    }
}

impl<'a> Watch<'a> {
    fn new(child: &'a mut Child, case: &'a Case, logs: Logs, stats: PathBuf) -> Result<Self, AttemptError> {
        let failed = |error: Errno| AttemptError::Io("watch hwvmm", error.into());
        let pidfd = pidfd_open(Pid::from_child(child), PidfdFlags::empty()).map_err(failed)?;
        let stdout = child.stdout.take().map(|pipe| File::from(OwnedFd::from(pipe)));
        let stderr = child.stderr.take().map(|pipe| File::from(OwnedFd::from(pipe)));
        for pipe in stdout.iter().chain(&stderr) {
            rustix::io::ioctl_fionbio(pipe, true).map_err(failed)?;
        }
        let now = Instant::now();
        let (stop, kill_at) = (None, None);
        Ok(Self { child, pidfd, case, logs, stdout, stderr, started: now, last_output: now, stop, kill_at, stats })
    }

    fn until_the_end(mut self, interrupted: &AtomicBool) -> Result<AttemptEnd, AttemptError> {
        let failed = |error| AttemptError::Io("wait for hwvmm", error);
        let status = loop {
            self.wait().map_err(failed)?;
            self.read();
            if let Some(status) = self.child.try_wait().map_err(failed)? {
                break status;
            }
            self.look(interrupted);
        };
        // What it has written is in the pipes. A process that it has left may hold them open: that one is not waited for.
        while self.read() {}
        let Self { logs: Logs { log, kernel_log, messages }, mut stop, .. } = self;
        let said = messages.last();
        let kernel = kernel_log.map(KernelLog::finish).transpose();
        let findings = match log.finish().and_then(|findings| Ok((findings, kernel?))) {
            Ok((findings, Some(kernel))) => findings.with_kernel_log(kernel),
            Ok((findings, None)) => findings,
            Err(error) => {
                stop.get_or_insert(Stop::Output(error.to_string()));
                Findings::default()
            }
        };
        Ok(AttemptEnd { status, stop, findings, said })
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
        self.started.checked_add(self.case.needs.timeout)?.checked_add(OVERRUN)
    }

    fn panic_at(&self) -> Option<Instant> {
        (self.logs.panic() == Panic::Begun).then(|| self.last_output + PANIC_QUIET)
    }

    /// Returns true once the run has written its statistics. It still prints what it knows, and a signal would only kill it.
    fn has_ended(&self) -> bool {
        self.stats.metadata().is_ok_and(|found| found.len() > 0)
    }

    /// When something is to be done.
    fn due(&self) -> Option<Instant> {
        match self.stop {
            Some(_) => self.kill_at,
            None if self.has_ended() => self.late_at(),
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
        if self.has_ended() {
            if is_due(self.late_at()) {
                self.end(Stop::Late);
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

    /// Asks the run to end. SIGQUIT has it print its last exits. Where it ignores that, as in the background of a shell, it takes the
    /// SIGTERM that follows; where it does not, its end has begun by then.
    fn end(&mut self, why: Stop) {
        let signals = if why == Stop::Interrupted { &[Signal::TERM][..] } else { &[Signal::QUIT, Signal::TERM] };
        for signal in signals {
            // Not by its number, which is another process' once it has been waited for.
            if let Err(error) = pidfd_send_signal(&self.pidfd, *signal) {
                log::debug!("a run cannot be ended: {error}");
            }
        }
        self.stop = Some(why);
        self.kill_at = Some(Instant::now() + GRACE);
    }

    /// Reads once from each pipe, and what there is of the kernel's log. Returns true if there was something.
    fn read(&mut self) -> bool {
        let mut bytes = vec![0; READ_BYTES];
        let output = read_some(&mut self.stdout, &mut bytes);
        let mut has_output = !output.is_empty();
        let mut written = self.logs.log.take(output);
        let messages = read_some(&mut self.stderr, &mut bytes);
        let has_messages = !messages.is_empty();
        written = written.and(self.logs.messages.take(messages));
        match self.logs.kernel_log.as_mut().map(KernelLog::read) {
            // A command's stderr is among the messages.
            Some(Ok(Taken::Some)) => has_output = true,
            Some(Ok(Taken::Nothing)) => has_output |= has_messages,
            Some(Ok(Taken::TooMuch)) => self.lose(Stop::LogTooLong),
            Some(Err(error)) => written = written.and(Err(error)),
            None => {}
        }
        if let Err(error) = written {
            self.lose(Stop::Output(error.to_string()));
        }
        if has_output {
            self.last_output = Instant::now();
        }
        has_output || has_messages
    }

    /// Output cannot be kept: the run is ended, once.
    fn lose(&mut self, why: Stop) {
        if !matches!(self.stop, Some(Stop::Output(_) | Stop::LogTooLong)) {
            self.end(why);
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
