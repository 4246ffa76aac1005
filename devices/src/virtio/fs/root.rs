//! Opens a shared directory, once: what its path names later is not used.

use super::thread::unshare_file_system_attributes;
use crate::virtio::worker_thread::STACK_BYTES;
use fuse_backend_rs::passthrough::{CachePolicy, Config, PassthroughFs};
use rustix::fs::{CWD, Mode, OFlags, openat};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::Duration;
use thiserror::Error;

/// Opens `directory`.
///
/// # Errors
/// Returns the host's error; ENOTDIR where it is not a directory.
pub(super) fn open(directory: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    Ok(openat(CWD, directory, flags, Mode::empty())?)
}

/// The file system of a shared directory cannot be made.
#[derive(Debug, Error)]
pub(super) enum ImportError {
    /// The host refuses access, or it is not a directory.
    #[error(transparent)]
    Host(#[from] io::Error),
    /// The thread that opens the directory panicked.
    #[error("the thread that opens the directory panicked")]
    Panicked,
}

/// Returns the open directory `root` as a passthrough file system.
///
/// # Errors
/// Returns the host's error, ENOTDIR where it is not a directory; or that the thread panicked.
pub(super) fn import(root: BorrowedFd<'_>) -> Result<PassthroughFs, ImportError> {
    let config = Config {
        // By its file descriptor. A path can name something else by now, and need not be UTF-8.
        root_dir: format!("/proc/self/fd/{}/.", root.as_raw_fd()),
        // The root is opened here and never again, and `guard.rs` checks the names.
        do_import: false,
        // Otherwise each inode that was ever looked up leaves an entry.
        use_host_ino: true,
        // The guest sees changes on the host after one second.
        attr_timeout: Duration::from_secs(1),
        entry_timeout: Duration::from_secs(1),
        cache_policy: CachePolicy::Auto,
        ..Config::default()
    };
    let fs = PassthroughFs::new(config)?;
    // This clears the umask, which must not be that of the whole process.
    std::thread::scope(|scope| {
        let import = || unshare_file_system_attributes().and_then(|()| fs.import());
        let thread =
            std::thread::Builder::new().name("fs-open".into()).stack_size(STACK_BYTES).spawn_scoped(scope, import)?;
        Ok(thread.join().map_err(|_| ImportError::Panicked)??)
    })
    .map(|()| fs)
}
