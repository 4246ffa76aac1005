//! The signals that end a run, as something to wait for.

use crate::exit::Signal;
use signal_hook::consts::SIGXFSZ;
use signal_hook::flag::{register, register_conditional_default};
use signal_hook::iterator::backend::SignalDelivery;
use signal_hook::iterator::exfiltrator::SignalOnly;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

/// Catches those of the signals that end a run ([`Signal::all`]) whose action was the default one when hwvmm started: nohup(1) ignores
/// SIGHUP, a shell without job control SIGINT and SIGQUIT for a command in the background, and a library that was loaded for
/// profiling may have a handler for SIGPROF. Once dropped, SIGHUP, SIGINT, SIGQUIT and SIGTERM end the process, as without hwvmm's
/// doing, and the others do nothing: the results are being written then.
pub struct Signals {
    caught: Vec<Signal>,
    /// `None` in the child process.
    delivery: Option<SignalDelivery<UnixStream, SignalOnly>>,
}

/// Returns a set of signals in the text of /proc/self/status (Linux Documentation/filesystems/proc.rst): signal N is bit N - 1.
fn set(status: &str, name: &str) -> u64 {
    let mask = status.lines().find_map(|line| line.strip_prefix(name));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0)
}

/// Returns those of `signals` whose action is the default one: nothing catches them, and nothing has set them to be ignored. nohup(1)
/// ignores SIGHUP, and a shell without job control SIGINT and SIGQUIT for a command in the background.
#[must_use]
pub fn with_default_action(signals: impl IntoIterator<Item = Signal>) -> Vec<Signal> {
    // Without /proc all are returned, as where none is ignored.
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let others = set(&status, "SigIgn:") | set(&status, "SigCgt:");
    signals.into_iter().filter(|signal| others >> (signal.number() - 1) & 1 == 0).collect()
}

impl Signals {
    /// Starts to catch the signals.
    ///
    /// # Errors
    /// Returns the error of sigaction(2) or socketpair(2).
    pub fn catch() -> io::Result<Self> {
        let caught = with_default_action(Signal::all());
        let (receiver, sender) = UnixStream::pair()?;
        let numbers = caught.iter().map(|signal| i32::from(signal.number()));
        let delivery = SignalDelivery::with_pipe(receiver, sender, SignalOnly, numbers)?;
        // A handler that does nothing: a write beyond RLIMIT_FSIZE fails, in the machine's process too.
        register(SIGXFSZ, Arc::default())?;
        Ok(Self { caught, delivery: Some(delivery) })
    }

    /// A file descriptor that is readable once a signal has come.
    pub(super) fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.delivery.as_ref().map(|delivery| delivery.get_read().as_fd())
    }

    /// Takes a signal that has come, without waiting.
    pub(super) fn take(&mut self) -> Option<Signal> {
        let number = self.delivery.as_mut()?.pending().next()?;
        self.caught.iter().copied().find(|signal| i32::from(signal.number()) == number)
    }

    /// Ignores the signals from now on, in a child process: its parent takes them, and says what they mean. Closes the child's
    /// copies of the sockets: what it did to them would be done to the parent's.
    pub(super) fn leave_to_parent(&mut self) {
        // signal-hook's handlers stay, with nothing to do.
        self.delivery = None;
    }
}

impl Drop for Signals {
    /// From now on a signal ends the process at once, or does nothing: nothing looks at the sockets any more.
    fn drop(&mut self) {
        if self.delivery.is_none() {
            return;
        }
        let always = Arc::new(AtomicBool::new(true));
        for signal in self.caught.iter().filter(|signal| signal.is_request()) {
            if let Err(error) = register_conditional_default(signal.number().into(), Arc::clone(&always)) {
                log::debug!("{signal} is ignored from now on: {error}");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sets_of_signals_are_read_from_the_status() {
        let status = "Name:\thwvmm\nSigBlk:\t0000000000000000\nSigIgn:\t0000000000001007\nSigCgt:\t0000000100000000\n";
        assert_eq!((set(status, "SigIgn:"), set(status, "SigCgt:")), (0x1007, 1 << 32));
        assert_eq!(set("SigIgn: zz", "SigIgn:"), 0);
    }
}
