//! The signals that end a run, as something to wait for.

use crate::exit::Signal;
use rustix::io::Errno;
use rustix::net::{RecvFlags, recv};
use signal_hook::SigId;
use signal_hook::flag::register_conditional_default;
use signal_hook::low_level::{pipe, unregister};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

struct Caught {
    signal: Signal,
    receiver: UnixStream,
    id: SigId,
}

/// Catches those of SIGHUP, SIGINT, SIGQUIT and SIGTERM that were not ignored when hwvmm started: nohup(1) ignores SIGHUP, and a
/// shell without job control SIGINT and SIGQUIT for a command in the background. Once dropped, they end the process, as without hwvmm's
/// doing.
pub struct Signals(Vec<Caught>);

/// Returns the ignored signals in the text of /proc/self/status (Linux Documentation/filesystems/proc.rst, `SigIgn`): signal N is
/// bit N - 1.
fn ignored(status: &str) -> u64 {
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0)
}

impl Signals {
    /// Starts to catch the signals.
    ///
    /// # Errors
    /// Returns the error of sigaction(2) or socketpair(2).
    pub fn catch() -> io::Result<Self> {
        let mut caught = Vec::new();
        // Without /proc all are caught, as where none is ignored.
        let ignored = ignored(&std::fs::read_to_string("/proc/self/status").unwrap_or_default());
        let is_ignored = |signal: &Signal| ignored >> (signal.number() - 1) & 1 == 1;
        for signal in Signal::ALL.into_iter().filter(|signal| !is_ignored(signal)) {
            let (receiver, sender) = UnixStream::pair()?;
            receiver.set_nonblocking(true)?;
            let id = pipe::register(signal.number().into(), sender)?;
            caught.push(Caught { signal, receiver, id });
        }
        Ok(Self(caught))
    }

    /// File descriptors of which one is readable once a signal has come.
    pub(super) fn fds(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.0.iter().map(|caught| caught.receiver.as_fd())
    }

    /// Takes a signal that has come, without waiting.
    pub(super) fn take(&self) -> Option<Signal> {
        // DONTWAIT: whether the socket blocks is not for this process alone to say where a copy of it was left to another.
        let came = |caught: &&Caught| match recv(&caught.receiver, &mut [0; 16][..], RecvFlags::DONTWAIT) {
            Ok((bytes, _)) => bytes > 0,
            Err(Errno::AGAIN | Errno::INTR) => false,
            Err(error) => {
                log::error!("{}: {error}", caught.signal.name());
                false
            }
        };
        self.0.iter().find(came).map(|caught| caught.signal)
    }

    /// Ignores the signals from now on, in a child process: its parent takes them, and says what they mean. Closes the child's
    /// copies of the sockets: what it did to them would be done to the parent's.
    pub(super) fn leave_to_parent(&mut self) {
        for caught in self.0.drain(..) {
            // signal-hook's handler stays, with nothing to do.
            unregister(caught.id);
        }
    }
}

impl Drop for Signals {
    /// From now on a signal ends the process at once: nothing looks at the sockets any more.
    fn drop(&mut self) {
        let always = Arc::new(AtomicBool::new(true));
        for Caught { signal, id, .. } in self.0.drain(..) {
            if let Err(error) = register_conditional_default(signal.number().into(), Arc::clone(&always)) {
                log::debug!("{} is ignored from now on: {error}", signal.name());
            }
            unregister(id);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ignored_signals_are_read_from_the_status() {
        let status = "Name:\thwvmm\nSigBlk:\t0000000000000000\nSigIgn:\t0000000000001007\nSigCgt:\t0000000000000000\n";
        assert_eq!(ignored(status), 0x1007);
        assert_eq!(ignored("SigIgn: zz"), 0);
    }
}
