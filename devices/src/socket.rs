//! Unix sockets that hwvmm listens on.

use std::io;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

/// A socket at a path, which goes when this goes. It never waits.
pub struct Listener {
    listener: UnixListener,
    path: PathBuf,
}

impl Listener {
    /// Listens at `path`. A socket there that nobody answers on, left behind by a run that was killed, is replaced.
    ///
    /// # Errors
    /// The system's.
    pub fn new(path: &Path) -> io::Result<Self> {
        if is_dead(path) {
            std::fs::remove_file(path)?;
        }
        let listener = UnixListener::bind(path)?;
        listener.set_nonblocking(true)?;
        Ok(Self { listener, path: path.to_owned() })
    }

    /// The socket.
    #[must_use]
    pub fn socket(&self) -> &UnixListener {
        &self.listener
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What mends an error of [`Listener::new`].
    #[must_use]
    pub fn remedy(error: &io::Error) -> &'static str {
        match error.kind() {
            io::ErrorKind::AddrInUse => ": it exists; is another run using it? else remove it",
            _ => "",
        }
    }
}

/// Connects to a Unix socket without waiting: a program whose queue of callers is full refuses, instead of holding us up
/// until it looks. The stream does not wait either.
///
/// # Errors
/// The system's; `WouldBlock` for a full queue.
pub fn connect_now(path: &Path) -> io::Result<UnixStream> {
    use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(UnixStream::from(socket))
}

fn is_dead(path: &Path) -> bool {
    let socket = std::fs::symlink_metadata(path).is_ok_and(|metadata| metadata.file_type().is_socket());
    let refused = |error: io::Error| error.kind() == io::ErrorKind::ConnectionRefused;
    socket && connect_now(path).is_err_and(refused)
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_file(&self.path) {
            log::debug!("{}: {error}", self.path.display());
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
}
