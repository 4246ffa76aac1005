//! A child process that is a copy of this one (fork(2)).

use rustix::process::{Pid, PidfdFlags, WaitOptions, WaitStatus, pidfd_open, waitpid};
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use thiserror::Error;

/// The exit status of a child whose code panicked, as of a Rust program that panics.
pub const PANICKED: u8 = 101;

/// No child process can be had.
#[derive(Debug, Error)]
pub enum ForkError {
    /// This process has threads, whose locks a copy would keep for ever.
    #[error("cannot start a process: hwvmm has {0} threads already; this is a bug in hwvmm")]
    Threads(usize),
    /// The list of this process's threads cannot be read.
    #[error("cannot start a process: cannot list /proc/self/task: {0}; hwvmm needs /proc: mount -t proc proc /proc")]
    Tasks(io::Error),
    /// fork(2) or pidfd_open(2) (Linux 5.3) failed.
    #[error("cannot start a process; see `ulimit -u` and the limits of the cgroup")]
    Fork(#[source] io::Error),
}

/// A child process. Dropping it kills it, if it runs still.
pub struct Child {
    pid: Pid,
    pidfd: OwnedFd,
    status: Option<WaitStatus>,
}

/// Forks. The child calls `work`, and exits with the status that it returns, or with [`PANICKED`].
///
/// # Errors
/// [`ForkError`]. No child exists then.
pub fn fork(work: impl FnOnce() -> u8) -> Result<Child, ForkError> {
    let threads = std::fs::read_dir("/proc/self/task").map_err(ForkError::Tasks)?.count();
    if threads != 1 {
        return Err(ForkError::Threads(threads));
    }
    // SAFETY: this process has one thread, this one (counted above, and only this thread could start another since). So no lock
    // is held by a thread that the child lacks, and the child may do whatever the parent may.
    unsafe { copy(work) }
}

/// Forks in a test, whose process has the thread of the test harness too.
///
/// # Errors
/// [`ForkError`].
#[cfg(test)]
pub(super) fn fork_in_test(work: impl FnOnce() -> u8) -> Result<Child, ForkError> {
    // SAFETY: a case runs alone in its process, and the harness waits for its end: it holds no lock.
    unsafe { copy(work) }
}

/// # Safety
/// No other thread holds a lock that `work` needs.
unsafe fn copy(work: impl FnOnce() -> u8) -> Result<Child, ForkError> {
    // What is buffered would be printed by both.
    let _ = io::stdout().flush();
    // SAFETY: fork(2) copies the calling thread alone. The caller promises that no other one holds a lock that the child needs; the
    // child never returns into the caller's frames.
    match unsafe { libc::fork() } {
        -1 => Err(ForkError::Fork(io::Error::last_os_error())),
        0 => {
            // A panic must not unwind into what the parent was doing.
            let status = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work)).unwrap_or(PANICKED);
            std::process::exit(status.into())
        }
        pid => {
            let pid = Pid::from_raw(pid).ok_or_else(|| ForkError::Fork(io::ErrorKind::InvalidData.into()))?;
            match pidfd_open(pid, PidfdFlags::empty()) {
                Ok(pidfd) => Ok(Child { pid, pidfd, status: None }),
                Err(error) => {
                    let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
                    let _ = waitpid(Some(pid), WaitOptions::empty());
                    Err(ForkError::Fork(error.into()))
                }
            }
        }
    }
}

impl Child {
    /// Kills the child (SIGKILL), if it runs still.
    pub fn kill(&self) {
        if self.status.is_none()
            && let Err(error) = rustix::process::pidfd_send_signal(&self.pidfd, rustix::process::Signal::KILL)
        {
            log::error!("cannot kill the process {}: {error}", self.pid);
        }
    }

    /// Waits for the end of the child, and returns how it ended.
    ///
    /// # Errors
    /// Returns the error of waitpid(2).
    pub fn wait(&mut self) -> io::Result<WaitStatus> {
        loop {
            if let Some(status) = self.status {
                return Ok(status);
            }
            match waitpid(Some(self.pid), WaitOptions::empty()) {
                Ok(found) => self.status = found.map(|(_, status)| status),
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

impl AsFd for Child {
    /// The pidfd: readable once the child has ended.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        if self.status.is_none() {
            self.kill();
            let _ = self.wait();
        }
    }
}
