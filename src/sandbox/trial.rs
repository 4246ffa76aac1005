//! Steps that cannot be taken back are tried first in a process of their own.

use super::fork::{ForkError, fork};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::WaitStatus;
use std::borrow::Cow;
use std::fs::File;
use std::io::{self, Read, Write};
use std::time::{Duration, Instant};
use thiserror::Error;

/// The time for a trial. None of its steps waits for anything but the kernel.
const DEADLINE: Duration = Duration::from_secs(5);
/// Bytes of what is read of the step that failed.
const STEP_BYTES: u64 = 200;

/// The process cannot have a view of the file system of its own.
#[derive(Debug, Error)]
pub enum ViewError {
    /// The host's kernel refuses a step.
    #[error("cannot {what}")]
    Step {
        /// The step, as it follows "cannot" in the message.
        what: Cow<'static, str>,
        /// The error of the system call.
        source: io::Error,
    },
    /// The steps cannot be tried.
    #[error(transparent)]
    Fork(#[from] ForkError),
    /// The process that tries them is gone, or has not ended in time (5 s).
    #[error("cannot try to have a mount namespace: {0}")]
    Trial(&'static str),
}

/// For `map_err`: an error of the step `what`.
pub(super) fn failed<E: Into<io::Error>>(what: &'static str) -> impl FnOnce(E) -> ViewError {
    move |error| ViewError::Step { what: what.into(), source: error.into() }
}

/// Calls `steps` in a child process, and returns what it returns there. Nothing that it does is left, but for files that it has written.
/// Not for a process with threads.
///
/// # Errors
/// [`ViewError`].
pub(super) fn in_child(steps: impl FnOnce() -> Result<(), ViewError>) -> Result<(), ViewError> {
    let (ours, theirs) = pipe_with(PipeFlags::CLOEXEC).map_err(failed("make a pipe"))?;
    let mut child = fork(|| match steps() {
        Ok(()) => 0,
        Err(error) => {
            // The pipe holds it all, so this does not wait.
            let _ = File::from(theirs).write_all(&message(&error));
            1
        }
    })?;
    // The writing end belongs to the closure, and so to `fork`, which has dropped it.
    let deadline = Instant::now() + DEADLINE;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        match poll(&mut [PollFd::new(&child, PollFlags::IN)], Timespec::try_from(left).ok().as_ref()) {
            Ok(0) => return Err(ViewError::Trial("it does not end")),
            Ok(_) => break,
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(failed("wait for a process")(error)),
        }
    }
    match child.wait().map_err(failed("wait for a process"))? {
        status if status.exit_status() == Some(0) => Ok(()),
        status => Err(failure(status, File::from(ours))),
    }
}

/// The error number (32 bits) and the step.
fn message(error: &ViewError) -> Vec<u8> {
    let (number, what) = match error {
        ViewError::Step { what, source } => (source.raw_os_error().unwrap_or(libc::EIO), what.to_string()),
        ViewError::Fork(_) | ViewError::Trial(_) => (libc::EAGAIN, error.to_string()),
    };
    [number.to_le_bytes().as_slice(), what.as_bytes()].concat()
}

/// Why the child has ended with `status`.
fn failure(status: WaitStatus, pipe: File) -> ViewError {
    let mut bytes = Vec::new();
    // Where it cannot be read, it is as where the child has written nothing.
    let _ = pipe.take(STEP_BYTES).read_to_end(&mut bytes);
    match bytes.split_first_chunk() {
        Some((number, what)) => ViewError::Step {
            what: String::from_utf8_lossy(what).into_owned().into(),
            source: io::Error::from_raw_os_error(i32::from_le_bytes(*number)),
        },
        None if status.signaled() => ViewError::Trial("a signal has ended it"),
        None => ViewError::Trial("it has panicked"),
    }
}
