//! Names the thread and the system call when a filter ends the process.
//!
//! A filter answers with SECCOMP_RET_TRAP: the system call is not carried out, and the kernel sends SIGSYS to the thread. The
//! handler writes one record to a pipe and then makes another refused call. SIGSYS is blocked in its handler, and a signal that
//! the kernel forces on a thread that blocks it has its default action: it ends the whole process. Nothing that hostile code
//! can do in between makes the call happen: a thread that blocks or ignores SIGSYS is ended by the kernel at once, and no
//! filter permits sigaction of SIGSYS. Only the name is best effort. SECCOMP_RET_KILL_PROCESS would end the process without
//! one.

use std::cell::Cell;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicI32, Ordering};

/// The length of a thread's name in a record, in bytes; zeroes fill what is left.
pub(super) const NAME_BYTES: usize = 16;
/// The length of a record in bytes: the name, the number of the system call (32 bits, then 32 of zeroes), its second argument.
const RECORD_BYTES: usize = NAME_BYTES + 16;
/// The si_code of a signal that a filter has sent; others can be sent by kill(2).
const SYS_SECCOMP: i32 = 1;
/// A number that no system call has.
const NO_SYSTEM_CALL: i64 = 0xfff;

static REPORTS: AtomicI32 = AtomicI32::new(-1);

thread_local! {
    /// The name of the calling thread.
    static NAME: Cell<[u8; NAME_BYTES]> = const { Cell::new([0; NAME_BYTES]) };
}

/// A system call that was refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refused {
    /// The name of the thread that made the call, as given when the thread entered the sandbox.
    pub thread: String,
    /// The number of the system call.
    pub number: u32,
    /// Its second argument, which tells ioctls and fcntls apart.
    pub argument: u64,
}

impl Refused {
    /// Reads the record that the handler wrote, from the other end of the pipe. `None` where there is none.
    pub fn read(mut reports: impl Read) -> Option<Self> {
        let mut record = [0; RECORD_BYTES];
        reports.read_exact(&mut record).ok()?;
        let (name, rest) = record.split_at(NAME_BYTES);
        let number = u32::from_le_bytes(rest[..4].try_into().ok()?);
        let argument = u64::from_le_bytes(rest[8..].try_into().ok()?);
        // Hostile code may have written the record.
        let thread = name.iter().take_while(|byte| byte.is_ascii_graphic()).map(|byte| char::from(*byte)).collect();
        Some(Self { thread, number, argument })
    }

    /// The name of the system call with its number, and of ioctl and fcntl the request.
    #[must_use]
    pub fn call(&self) -> String {
        let Self { number, argument, .. } = self;
        match syscalls::Sysno::new(*number as usize) {
            Some(name @ (syscalls::Sysno::ioctl | syscalls::Sysno::fcntl)) => format!("{name} {argument:#x}"),
            Some(name) => format!("{name} ({number})"),
            None => format!("system call {number}"),
        }
    }
}

impl std::fmt::Display for Refused {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "its thread {} called {}, which its sandbox does not permit", self.thread, self.call())
    }
}

extern "C" fn on_refusal(_signal: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    let mut record = [0_u8; RECORD_BYTES];
    record[..NAME_BYTES].copy_from_slice(&NAME.get());
    // SAFETY: the kernel gives a handler with SA_SIGINFO a valid siginfo_t and ucontext_t. For SIGSYS of a filter, si_syscall is
    // the int at byte 24 (sigaction(2), include/uapi/asm-generic/siginfo.h); siginfo_t has 128 bytes.
    let (cause, number, argument) = unsafe {
        let number = info.cast::<u8>().add(24).cast::<u32>().read_unaligned();
        let registers = &(*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs;
        ((*info).si_code, number, registers[libc::REG_RSI as usize])
    };
    record[NAME_BYTES..NAME_BYTES + 4].copy_from_slice(&number.to_le_bytes());
    record[NAME_BYTES + 8..].copy_from_slice(&argument.to_le_bytes());
    // SAFETY: write(2) of a local array, and calls without pointers to anything but a local, zeroed set; async-signal-safe. The pipe does
    // not block.
    unsafe {
        if cause == SYS_SECCOMP {
            libc::write(REPORTS.load(Ordering::Relaxed), record.as_ptr().cast(), RECORD_BYTES);
        }
        libc::syscall(NO_SYSTEM_CALL);
        // Only where the thread has no filter yet, and SIGSYS was sent by kill(2): its default action.
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigaddset(&raw mut set, libc::SIGSYS);
        libc::signal(libc::SIGSYS, libc::SIG_DFL);
        libc::raise(libc::SIGSYS);
        libc::sigprocmask(libc::SIG_UNBLOCK, &raw const set, std::ptr::null_mut());
        libc::_exit(128 + libc::SIGSYS);
    }
}

/// Installs the handler. Records go to `reports`, a pipe that does not block.
///
/// # Errors
/// Where sigaction(2) fails.
pub(super) fn install(reports: OwnedFd) -> io::Result<()> {
    // Kept open until the process ends: the handler needs it.
    let reports = std::mem::ManuallyDrop::new(reports);
    REPORTS.store(reports.as_raw_fd(), Ordering::Relaxed);
    // SAFETY: a zeroed sigaction is a valid one: no flags, empty mask.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = on_refusal as extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void) as usize;
    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
    // SAFETY: `action` is valid, and the handler makes async-signal-safe calls only.
    match unsafe { libc::sigaction(libc::SIGSYS, &raw const action, std::ptr::null_mut()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Sets the name of the calling thread in records; its first 16 bytes.
pub(super) fn set_name(name: &str) {
    let mut bytes = [0; NAME_BYTES];
    bytes.iter_mut().zip(name.bytes()).for_each(|(to, from)| *to = from);
    NAME.set(bytes);
}
