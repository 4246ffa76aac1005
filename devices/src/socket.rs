//! Unix sockets that hwvmm listens on or connects to.

use rustix::fs::{Mode, fchmod};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect, listen, socket_with};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

/// Connections that wait to be accepted.
const BACKLOG: i32 = 128;

/// A listening socket at a path, in non-blocking mode. Dropping it removes the path.
pub struct Listener {
    listener: UnixListener,
    path: PathBuf,
}

impl Listener {
    /// Listens at `path`, with mode 0600: only the user that runs hwvmm (and root) can connect. A socket at `path` that
    /// refuses connections, left behind by a run that was killed, is replaced.
    ///
    /// # Errors
    /// Returns the error of the failed system call: `AddrInUse` where `path` exists and is not such a socket.
    pub fn new(path: &Path) -> io::Result<Self> {
        if is_dead(path) {
            std::fs::remove_file(path)?;
        }
        let socket = new_socket()?;
        // Before bind, which takes the file's mode from the socket's: there is no moment in which others can connect.
        fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
        bind(&socket, &SocketAddrUnix::new(path)?)?;
        listen(&socket, BACKLOG)?;
        Ok(Self { listener: UnixListener::from(socket), path: path.to_owned() })
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

/// Returns true if `path` is a socket that refuses connections.
fn is_dead(path: &Path) -> bool {
    let socket = std::fs::symlink_metadata(path).is_ok_and(|metadata| metadata.file_type().is_socket());
    let refused = |error: io::Error| error.kind() == io::ErrorKind::ConnectionRefused;
    socket && connect_nonblocking(path).is_err_and(refused)
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_file(&self.path) {
            log::debug!("cannot remove the socket {}: {error}", self.path.display());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
    fn only_the_owner_can_connect() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("socket");
        let _listener = Listener::new(&path).expect("listening");
        let mode = std::fs::symlink_metadata(&path).expect("there").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        connect_nonblocking(&path).expect("the owner can");
    }
}
