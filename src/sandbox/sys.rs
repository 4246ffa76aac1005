//! The system calls that no crate has in the form needed here.

use rustix::mount::MountAttrFlags;
use rustix::thread::UnshareFlags;
use seccompiler::sock_filter;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

/// What happens at a system call that a filter does not permit.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Listener {
    /// What the filter says.
    None,
    /// The process that holds the file descriptor is asked (SECCOMP_RET_USER_NOTIF).
    Wanted,
}

/// Installs a filter for the calling thread, which must have no_new_privs. Returns the listener, where one is wanted.
///
/// seccompiler's own call cannot pass flags. SPEC_ALLOW keeps kernels before 5.16 from turning off speculation in threads with
/// a filter: the guest's speculation is KVM's to control, and hwvmm runs no foreign code by itself.
///
/// # Errors
/// Where the kernel has no seccomp, or does not take the filter.
pub(super) fn install(program: &[sock_filter], listener: Listener) -> io::Result<Option<OwnedFd>> {
    let len = u16::try_from(program.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    let program = libc::sock_fprog { len, filter: program.as_ptr().cast_mut().cast() };
    let mut flags = libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW;
    if listener == Listener::Wanted {
        flags |= libc::SECCOMP_FILTER_FLAG_NEW_LISTENER;
    }
    // SAFETY: `program` points to `len` instructions, which live for the call; the kernel copies and checks them.
    let result = unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, flags, &raw const program) };
    match i32::try_from(result) {
        // SAFETY: with NEW_LISTENER the result is a new file descriptor, which is owned here only.
        Ok(fd) if fd >= 0 && listener == Listener::Wanted => Ok(Some(unsafe { OwnedFd::from_raw_fd(fd) })),
        Ok(fd) if fd >= 0 => Ok(None),
        _ => Err(io::Error::last_os_error()),
    }
}

/// A system call that waits for a listener's answer.
#[derive(Clone, Copy)]
pub(super) struct Asked {
    id: u64,
    /// The number of the system call.
    pub(super) number: i32,
    pub(super) args: [u64; 6],
}

/// Takes the next system call that waits for an answer.
///
/// # Errors
/// ENOENT where its thread has gone.
pub(super) fn receive(listener: BorrowedFd<'_>) -> io::Result<Asked> {
    // SAFETY: all bytes zero is a valid value of the structure, and what the ioctl demands.
    let mut asked: libc::seccomp_notif = unsafe { std::mem::zeroed() };
    // SAFETY: the ioctl writes one seccomp_notif, which lives for the call.
    if unsafe { libc::ioctl(listener.as_raw_fd(), libc::SECCOMP_IOCTL_NOTIF_RECV, &raw mut asked) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(Asked { id: asked.id, number: asked.data.nr, args: asked.data.args })
}

/// Lets a system call that waits for an answer go on.
///
/// # Errors
/// ENOENT where its thread has gone.
pub(super) fn permit(listener: BorrowedFd<'_>, asked: Asked) -> io::Result<()> {
    let flags = u32::try_from(libc::SECCOMP_USER_NOTIF_FLAG_CONTINUE).unwrap_or(1);
    let mut answer = libc::seccomp_notif_resp { id: asked.id, val: 0, error: 0, flags };
    // SAFETY: the ioctl reads one seccomp_notif_resp, which lives for the call.
    if unsafe { libc::ioctl(listener.as_raw_fd(), libc::SECCOMP_IOCTL_NOTIF_SEND, &raw mut answer) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// The version of Landlock's ABI that the kernel has (landlock_create_ruleset(2)).
///
/// # Errors
/// ENOSYS or EOPNOTSUPP where the kernel has no Landlock, or it is not enabled (`lsm=` on the kernel's command line).
pub(super) fn landlock_abi() -> io::Result<u32> {
    const VERSION: u32 = 1;
    // SAFETY: with this flag the call takes no attributes and returns a number.
    let result =
        unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, std::ptr::null::<libc::c_void>(), 0_usize, VERSION) };
    u32::try_from(result).map_err(|_| io::Error::last_os_error())
}

/// Gives the calling thread namespaces of its own (unshare(2)).
///
/// # Errors
/// Returns the error of unshare(2).
#[allow(deprecated, reason = "unshare_unsafe is unsafe for CLONE_FILES, which is not used here")]
pub(super) fn unshare(flags: UnshareFlags) -> io::Result<()> {
    Ok(rustix::thread::unshare(flags)?)
}

/// Sets attributes of a mount and of all mounts below it (mount_setattr(2), Linux 5.12).
///
/// # Errors
/// Returns the error of mount_setattr(2).
pub(super) fn set_mount_attributes(mount: BorrowedFd<'_>, attributes: MountAttrFlags) -> io::Result<()> {
    let flags = libc::AT_EMPTY_PATH | libc::AT_RECURSIVE;
    let change = libc::mount_attr { attr_set: attributes.bits().into(), attr_clr: 0, propagation: 0, userns_fd: 0 };
    let (size, path) = (size_of_val(&change), c"".as_ptr());
    // SAFETY: the path and the structure, whose size is passed, live for the call, which reads them.
    let result =
        unsafe { libc::syscall(libc::SYS_mount_setattr, mount.as_raw_fd(), path, flags, &raw const change, size) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Has all threads of glibc's allocator share one heap. With more it opens files at its own time: to count the processors when a
/// thread needs the ninth heap, and /proc/sys/vm/overcommit_memory before it shrinks one. Threads have caches of their own
/// for small blocks; device threads and vCPUs allocate little else while the guest runs.
#[cfg(target_env = "gnu")]
pub(super) fn limit_heaps() {
    const HEAPS: i32 = 1;
    // SAFETY: takes two numbers; a value that glibc does not like is ignored.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, HEAPS) };
}

/// Other C libraries have no heaps to limit.
#[cfg(not(target_env = "gnu"))]
pub(super) fn limit_heaps() {}

/// Has a panic or a failed allocation of this process print no backtrace: it reads files. To be called while the process has one
/// thread.
pub(super) fn no_backtrace() {
    // SAFETY: the environment is changed and read by one thread only; see the contract above.
    unsafe { std::env::remove_var("RUST_BACKTRACE") };
}

/// The most file descriptors that are closed one by one.
const MAX_CLOSED: u32 = 1 << 16;

/// Closes the file descriptors from `first` to `last`, both included. The caller is a process that does not use what they were.
pub(super) fn close_range(first: u32, last: u32) {
    // SAFETY: takes numbers only; see the contract above.
    if unsafe { libc::syscall(libc::SYS_close_range, first, last, 0_u32) } == 0 {
        return;
    }
    // Before Linux 5.9.
    for fd in (first..=last).take(MAX_CLOSED as usize) {
        // SAFETY: as above.
        unsafe { libc::close(fd.cast_signed()) };
    }
}

/// Has no program that this process starts inherit the file descriptor `fd`.
///
/// # Errors
/// EBADF where it is not open.
pub(super) fn set_close_on_exec(fd: RawFd) -> io::Result<()> {
    // SAFETY: takes numbers only, and changes nothing of a file but what execve(2) does with its descriptor.
    if unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) } == -1 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Gives a signal its default action again.
///
/// # Errors
/// EINVAL where there is no such signal.
pub(super) fn restore_default(signal: i32) -> io::Result<()> {
    // SAFETY: no handler is installed, and what a replaced one would have done is left undone.
    if unsafe { libc::signal(signal, libc::SIG_DFL) } == libc::SIG_ERR {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Makes a system call by its number, as hostile code would. Further arguments are 0.
#[cfg(any(debug_assertions, feature = "fault-injection"))]
pub(super) fn call(number: i64, arguments: [usize; 4]) -> io::Result<i64> {
    let [a, b, c, d] = arguments;
    // SAFETY: the callers pass numbers and pointers to what lives for the call.
    let result = unsafe { libc::syscall(number, a, b, c, d, 0, 0) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}
