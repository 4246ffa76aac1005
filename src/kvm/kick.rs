//! Kicks: they make a vCPU thread return from KVM_RUN.
//!
//! A kick is a real-time signal. Its handler sets `immediate_exit` in the thread's own `kvm_run` (KVM API 5), so that a
//! kick that comes just before KVM_RUN is not lost: KVM_RUN then returns at once.

use std::cell::Cell;
use std::io;
use std::ptr;
use std::sync::OnceLock;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

thread_local! {
    /// Points to `kvm_run.immediate_exit` of the vCPU that this thread runs, or is null.
    static IMMEDIATE_EXIT: Cell<*mut u8> = const { Cell::new(ptr::null_mut()) };
}

fn signal() -> i32 {
    libc::SIGRTMIN()
}

extern "C" fn on_kick(_signal: i32) {
    let flag = IMMEDIATE_EXIT.get();
    if !flag.is_null() {
        // SAFETY: the pointer is into the mapped kvm_run of the vCPU that this very thread runs, set by `Kickable::new`
        // and cleared before the vCPU can go away (`Drop`). Volatile, because KVM reads it from the kernel; a signal
        // handler may do only this store.
        unsafe { flag.write_volatile(1) };
    }
}

/// Installs the signal handler for the process, once. It is installed without SA_RESTART, so that a kick also interrupts other
/// blocking system calls of the thread.
///
/// # Errors
/// Where sigaction(2) fails.
pub fn install() -> io::Result<()> {
    static INSTALLED: OnceLock<i32> = OnceLock::new();
    let errno = *INSTALLED.get_or_init(|| {
        // SAFETY: a zeroed sigaction is a valid one: no flags, empty mask.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        action.sa_sigaction = on_kick as extern "C" fn(i32) as usize;
        // SAFETY: `action` is valid and the handler only stores to a thread-local's target, which is async-signal-safe.
        let result = unsafe { libc::sigaction(signal(), &raw const action, ptr::null_mut()) };
        if result == 0 { 0 } else { io::Error::last_os_error().raw_os_error().unwrap_or(libc::EINVAL) }
    });
    if errno == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(errno)) }
}

/// Makes the calling thread the one that runs a vCPU, for as long as the value lives.
pub(super) struct Kickable(());

impl Kickable {
    /// `immediate_exit` points into the vCPU's kvm_run, which must outlive the value.
    pub(super) fn new(immediate_exit: *mut u8) -> Self {
        IMMEDIATE_EXIT.set(immediate_exit);
        Self(())
    }
}

impl Drop for Kickable {
    fn drop(&mut self) {
        IMMEDIATE_EXIT.set(ptr::null_mut());
    }
}

/// A thread that can be kicked.
#[derive(Clone, Copy, Debug)]
pub struct KickTarget {
    process: i32,
    thread: i32,
}

impl KickTarget {
    /// Returns the calling thread as a target for kicks.
    #[must_use]
    pub fn current() -> Self {
        // SAFETY: neither call takes arguments or can fail.
        let (process, thread) = unsafe { (libc::getpid(), libc::gettid()) };
        Self { process, thread }
    }

    /// Sends the kick. If the thread has ended, tgkill(2) fails with ESRCH, which is ignored.
    pub fn kick(self) {
        // SAFETY: tgkill takes three numbers; the handler is installed, and a wrong number only makes it fail.
        unsafe { libc::syscall(libc::SYS_tgkill, self.process, self.thread, signal()) };
    }
}

/// Runs `body` on a new thread, which is kicked whenever another `kick_after` has passed. Returns `None` where the thread
/// cannot be made, or panics.
pub fn guarded<T: Send>(kick_after: Duration, body: impl FnOnce() -> T + Send) -> Option<T> {
    install().ok()?;
    std::thread::scope(|scope| {
        let (started, start) = channel();
        let (finished, result) = channel();
        scope.spawn(move || {
            let _ = started.send(KickTarget::current());
            let _ = finished.send(body());
        });
        let target = start.recv().ok()?;
        loop {
            match result.recv_timeout(kick_after) {
                Ok(result) => return Some(result),
                Err(RecvTimeoutError::Timeout) => target.kick(),
                Err(RecvTimeoutError::Disconnected) => return None,
            }
        }
    })
}
