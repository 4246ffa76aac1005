//! Unix sockets that hwvmm listens on or connects to.

use crate::path_text::PathText as _;
use rustix::fs::{AtFlags, CWD, FileType, FlockOperation, Mode, OFlags, Stat, fchmod, flock, fstat, openat, statat};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect, listen, socket_with};
use rustix::process::geteuid;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Connections that wait to be accepted.
const BACKLOG: i32 = 128;
/// Only this user (and root) can connect.
const PRIVATE: Mode = Mode::RUSR.union(Mode::WUSR);

/// A listening socket at a path, in non-blocking mode. Dropping it removes the path.
pub struct Listener {
    listener: UnixListener,
    path: PathBuf,
    /// Device and inode of the file at `path`.
    file: (u64, u64),
}

/// How long to wait for another process that makes or removes a socket in the same folder.
const LOCK_TIMEOUT: Duration = Duration::from_secs(1);
/// The same where others can write to the folder: longer than a bind and a listen take.
const SHARED_LOCK_TIMEOUT: Duration = Duration::from_millis(100);
const LOCK_POLL: Duration = Duration::from_millis(5);

/// Locks the folder of `path` against other processes of hwvmm until the returned file is closed. Between bind and listen, a
/// socket refuses connections as a dead one does: without the lock another process would remove it. `None` if it cannot be locked.
/// Anyone who may read a folder may lock it: in one that others can write to, such as /tmp, it is waited for a moment only.
fn lock_folder(path: &Path) -> Option<OwnedFd> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let folder = openat(CWD, folder, flags, Mode::empty()).ok()?;
    let status = fstat(&folder).ok()?;
    let shared =
        status.st_uid != geteuid().as_raw() || Mode::from_raw_mode(status.st_mode).intersects(Mode::WGRP | Mode::WOTH);
    let deadline = Instant::now() + if shared { SHARED_LOCK_TIMEOUT } else { LOCK_TIMEOUT };
    while let Err(error) = flock(&folder, FlockOperation::NonBlockingLockExclusive) {
        if !matches!(error, Errno::WOULDBLOCK | Errno::INTR) || Instant::now() >= deadline {
            return None;
        }
        std::thread::sleep(LOCK_POLL);
    }
    Some(folder)
}

impl Listener {
    /// Listens at `path`, with mode 0600: only the user that runs hwvmm (and root) can connect. A socket at `path` that
    /// refuses connections, left behind by a run that was killed, is replaced.
    ///
    /// # Errors
    /// Returns the error of the failed system call: `AddrInUse` where `path` exists and is not such a socket; `PermissionDenied`
    /// where others could connect all the same, on a file system that ignores modes or in a folder where they replaced the file.
    pub fn new(path: &Path) -> io::Result<Self> {
        let _lock = lock_folder(path);
        if is_dead(path) {
            std::fs::remove_file(path)?;
        }
        let socket = new_socket()?;
        // Before bind, which takes the file's mode from the socket's (Linux, unix_bind_bsd): there is no moment in which others
        // can connect, and the umask, which all threads share, stays as it is.
        fchmod(&socket, PRIVATE)?;
        bind(&socket, &SocketAddrUnix::new(path)?)?;
        let file = statat(CWD, path, AtFlags::SYMLINK_NOFOLLOW)?;
        let own = (file.st_dev, file.st_ino);
        let bound = Self { listener: UnixListener::from(socket), path: path.to_owned(), file: own };
        // No process can connect before it listens.
        check_private(&file)?;
        listen(&bound.listener, BACKLOG)?;
        Ok(bound)
    }

    /// Returns the listening socket.
    #[must_use]
    pub fn socket(&self) -> &UnixListener {
        &self.listener
    }

    /// Returns the path of the socket.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns text to append to the message of an error of [`Listener::new`]: what to do about it, or nothing.
    #[must_use]
    pub fn remedy(error: &io::Error) -> &'static str {
        match error.kind() {
            io::ErrorKind::AddrInUse => ": the file exists; remove it if no other run uses it",
            _ => "",
        }
    }
}

/// Returns an error if `file` is not a socket of this user that no other user can connect to.
fn check_private(file: &Stat) -> io::Result<()> {
    let mode = Mode::from_raw_mode(file.st_mode);
    let socket = FileType::from_raw_mode(file.st_mode) == FileType::Socket;
    if socket && file.st_uid == geteuid().as_raw() && mode == PRIVATE {
        return Ok(());
    }
    let what = format!("others could connect to it (user {}, mode {:04o})", file.st_uid, mode.as_raw_mode());
    Err(io::Error::new(io::ErrorKind::PermissionDenied, what))
}

fn new_socket() -> io::Result<OwnedFd> {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    Ok(socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?)
}

/// Connects to a Unix socket without blocking. The returned stream is non-blocking, too.
///
/// # Errors
/// Returns the error of socket(2) or connect(2): `WouldBlock` where the listener's backlog is full.
pub fn connect_nonblocking(path: &Path) -> io::Result<UnixStream> {
    let socket = new_socket()?;
    connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(UnixStream::from(socket))
}

/// Removes the socket at `path` if it refuses connections: its process is gone. Nothing else is removed.
///
/// # Errors
/// Returns the error of unlink(2).
pub fn remove_dead(path: &Path) -> io::Result<()> {
    let _lock = lock_folder(path);
    if is_dead(path) { std::fs::remove_file(path) } else { Ok(()) }
}

/// Returns true if `path` is a socket that refuses connections.
fn is_dead(path: &Path) -> bool {
    let socket = std::fs::symlink_metadata(path).is_ok_and(|metadata| metadata.file_type().is_socket());
    let refused = |error: io::Error| error.kind() == io::ErrorKind::ConnectionRefused;
    socket && connect_nonblocking(path).is_err_and(refused)
}

/// Set where another process removes the paths of listeners.
static LEAVE_PATHS: AtomicBool = AtomicBool::new(false);

/// From here on a [`Listener`] that is dropped leaves its path to the parent process, which removes it (see [`remove_dead`]): this
/// process may remove nothing.
pub fn leave_paths_to_parent() {
    LEAVE_PATHS.store(true, Ordering::Relaxed);
}

impl Drop for Listener {
    fn drop(&mut self) {
        if LEAVE_PATHS.load(Ordering::Relaxed) {
            return;
        }
        // The path may be another run's by now.
        let is_own = |file: Stat| (file.st_dev, file.st_ino) == self.file;
        if !statat(CWD, &self.path, AtFlags::SYMLINK_NOFOLLOW).is_ok_and(is_own) {
            return;
        }
        if let Err(error) = std::fs::remove_file(&self.path) {
            log::debug!("cannot remove the socket {}: {error}", self.path.shown());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(path: &Path) -> io::Result<()> {
        check_private(&statat(CWD, path, AtFlags::SYMLINK_NOFOLLOW)?)
    }

    #[test]
    fn dead_sockets_are_replaced_and_live_ones_and_files_are_not() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("socket");
        drop(UnixListener::bind(&path).expect("bound"));
        let live = Listener::new(&path).expect("replaced");
        let again = Listener::new(&path).err().expect("in use");
        assert_eq!(again.kind(), io::ErrorKind::AddrInUse);
        drop(live);
        assert!(!path.exists());
        std::fs::write(&path, "a file").expect("written");
        assert!(Listener::new(&path).is_err());
        assert_eq!(std::fs::read(&path).expect("still there"), b"a file");
    }

    #[test]
    fn a_listener_removes_no_socket_of_another() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("socket");
        let first = Listener::new(&path).expect("listening");
        std::fs::rename(&path, folder.path().join("moved")).expect("moved away");
        let _second = Listener::new(&path).expect("listening");
        drop(first);
        connect_nonblocking(&path).expect("the second is there");
    }

    #[test]
    fn of_many_that_start_at_once_the_first_is_kept() {
        let folder = tempfile::tempdir().expect("a folder");
        for round in 0..200 {
            let path = folder.path().join(round.to_string());
            drop(UnixListener::bind(&path).expect("a dead one"));
            let started = std::sync::Barrier::new(4);
            let start = || {
                started.wait();
                Listener::new(&path)
            };
            let listeners: Vec<_> = std::thread::scope(|scope| {
                let threads: Vec<_> = (0..4).map(|_| scope.spawn(start)).collect();
                threads.into_iter().filter_map(|thread| thread.join().expect("no panic").ok()).collect()
            });
            assert_eq!(listeners.len(), 1, "round {round}");
            connect_nonblocking(&path).expect("it can be reached");
        }
    }

    #[test]
    fn a_lock_of_another_holds_up_nothing_in_a_folder_for_all() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("socket");
        let waited = |mode| {
            std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(mode)).expect("changed");
            let other = std::fs::File::open(folder.path()).expect("opened");
            flock(&other, FlockOperation::NonBlockingLockExclusive).expect("locked");
            let start = Instant::now();
            drop(Listener::new(&path).expect("listening"));
            start.elapsed()
        };
        // The shortest of three: this thread can be interrupted for long.
        let shortest = (0..3).map(|_| waited(0o1777)).min().expect("three");
        assert!(shortest < LOCK_TIMEOUT, "{shortest:?}");
        assert!(waited(0o755) >= LOCK_TIMEOUT);
    }

    /// Runs in a thread with a umask of 0: a file that it creates is open to all.
    fn without_umask<T: Send>(run: impl FnOnce() -> T + Send) -> T {
        let thread = || {
            #[allow(deprecated, reason = "unshare_unsafe is unsafe for flags that are not used here")]
            rustix::thread::unshare(rustix::thread::UnshareFlags::FS).expect("a thread has its own umask");
            rustix::process::umask(Mode::empty());
            run()
        };
        std::thread::scope(|scope| scope.spawn(thread).join().expect("no panic"))
    }

    #[test]
    fn only_the_owner_can_connect_at_any_moment() {
        use std::os::unix::fs::PermissionsExt;
        use std::sync::atomic::{AtomicBool, Ordering};
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("socket");
        let mode = || Some(std::fs::symlink_metadata(&path).ok()?.permissions().mode() & 0o7777);
        let done = AtomicBool::new(false);
        let listen = || {
            let _listener = Listener::new(&path)?;
            connect_nonblocking(&path)?;
            Ok::<_, io::Error>(mode())
        };
        let (results, modes) = std::thread::scope(|scope| {
            let watch = || {
                let mut modes = std::collections::BTreeSet::new();
                while !done.load(Ordering::Relaxed) {
                    modes.extend(mode());
                }
                modes
            };
            let watcher = scope.spawn(watch);
            let results: Vec<_> = (0..200).map(|_| without_umask(listen)).collect();
            done.store(true, Ordering::Relaxed);
            (results, watcher.join().expect("no panic"))
        });
        for result in results {
            assert_eq!(result.expect("the owner can listen and connect"), Some(0o600));
        }
        assert!(modes.into_iter().all(|mode| mode == 0o600), "another mode was seen");
    }

    #[test]
    fn a_socket_that_others_could_connect_to_is_refused() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("socket");
        let _listener = UnixListener::bind(&path).expect("bound");
        for mode in [0o666, 0o660, 0o606, 0o700, 0o640] {
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).expect("changed");
            let error = check(&path).expect_err("refused");
            assert!(error.to_string().contains(&format!("mode {mode:04o}")), "{error}");
        }
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).expect("changed");
        check(&path).expect("private");
        let link = folder.path().join("link");
        std::os::unix::fs::symlink(&path, &link).expect("linked");
        assert!(check(&link).is_err(), "a symbolic link");
    }
}
