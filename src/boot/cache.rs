//! A cache of unpacked kernels and initrds on disk: unpacking takes about a second, reading an unpacked file a few
//! milliseconds.
//!
//! Nothing in it is used that another user can have put there: the folder and its files belong to this user, others cannot
//! write them, and the name of a file says what it was unpacked from ([`Identity`]).

mod identity;

pub use identity::Identity;

use super::error::FileRole;
use hwvmm_devices::path_text::PathText as _;
use identity::WRITABLE_BY_OTHERS;
use rustix::fs::{AtFlags, CWD, Dir, Mode, OFlags, fstat, openat, renameat, statat, unlinkat};
use rustix::rand::{GetRandomFlags, getrandom};
use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::{Once, OnceLock};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use thiserror::Error;

/// The version of names and contents. Files of other versions are not found, and are removed as the least recently used ones.
const VERSION: u32 = 2;
/// The number of files that are kept. The least recently used one is removed first.
const KEPT: usize = 32;
/// The disk space of all files that are kept, in bytes.
const KEPT_BYTES: u64 = 1 << 30;
/// The largest disk space of a file that is kept, in bytes.
const FILE_BYTES: u64 = 256 << 20;
/// A temporary file of this age was left by a run that was killed: unpacking takes seconds.
const STALE: Duration = Duration::from_secs(600);
const UNPACKED: &str = ".unpacked";
const TEMPORARY: &str = ".unpacked-tmp";
/// `st_blocks` counts blocks of this many bytes (stat(2)).
const STAT_BLOCK: u64 = 512;

/// Why the folder of the cache is not used.
#[derive(Debug, Error)]
enum FolderError {
    #[error("{} cannot be opened", .0.shown())]
    Open(PathBuf, #[source] io::Error),
    #[error("{} belongs to user {owner}, not to user {user}: name another one with --kernel-cache", .path.shown())]
    Owner { path: PathBuf, owner: u32, user: u32 },
    #[error(
        "others can write to {} (mode {mode:04o}), and could have kernels booted that are not yours: chmod go-w it, or \
         name another one with --kernel-cache", .path.shown()
    )]
    Writable { path: PathBuf, mode: u32 },
}

/// A cache of unpacked files in a directory.
pub struct Cache {
    path: PathBuf,
    /// The opened directory; `None` if it is not used.
    folder: OnceLock<Option<OwnedFd>>,
}

/// A file of the cache that has no name yet. It is removed when it is dropped.
pub struct Draft<'a> {
    file: File,
    folder: &'a OwnedFd,
    temporary: Option<String>,
}

fn user() -> u32 {
    rustix::process::geteuid().as_raw()
}

/// Makes the folder of the cache, and those above it, for this user alone: one that others can write to is not used.
///
/// # Errors
/// Returns the error of mkdir(2).
pub fn make_folder(path: &Path) -> io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(path)
}

fn open_folder(path: &Path) -> Result<OwnedFd, FolderError> {
    let failed = |error| FolderError::Open(path.to_owned(), error);
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let opened = match openat(CWD, path, flags, Mode::empty()) {
        Err(rustix::io::Errno::NOENT) => {
            make_folder(path).map_err(failed)?;
            openat(CWD, path, flags, Mode::empty())
        }
        opened => opened,
    };
    let folder = opened.map_err(|error| failed(error.into()))?;
    let metadata = fstat(&folder).map_err(|error| failed(error.into()))?;
    if metadata.st_uid != user() {
        return Err(FolderError::Owner { path: path.to_owned(), owner: metadata.st_uid, user: user() });
    }
    if metadata.st_mode & WRITABLE_BY_OTHERS != 0 {
        return Err(FolderError::Writable { path: path.to_owned(), mode: metadata.st_mode & 0o7777 });
    }
    Ok(folder)
}

/// The name of the file that was unpacked from what `identity` names.
fn name(role: FileRole, identity: &Identity) -> String {
    format!("{VERSION}-{role}-{identity}{UNPACKED}")
}

impl Cache {
    /// A cache in the directory `folder`, which is created when it is first used. A directory that belongs to another user, that
    /// others can write to, or that is a symbolic link is not used; a message says so once.
    #[must_use]
    pub fn new(folder: &Path) -> Self {
        Self { path: folder.to_owned(), folder: OnceLock::new() }
    }

    fn folder(&self) -> Option<&OwnedFd> {
        static SAID: Once = Once::new();
        let open = || match open_folder(&self.path) {
            Ok(folder) => Some(folder),
            Err(FolderError::Open(path, error)) => {
                log::info!("unpacked kernels are not kept: {} cannot be opened: {error}", path.shown());
                None
            }
            Err(error) => {
                SAID.call_once(|| log::warn!("unpacked kernels are not kept: {error}"));
                None
            }
        };
        self.folder.get_or_init(open).as_ref()
    }

    /// The unpacked file for what `identity` names, if it is in the cache.
    #[must_use]
    pub fn find(&self, role: FileRole, identity: &Identity) -> Option<File> {
        // O_NONBLOCK: opening a FIFO waits for its writer.
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = File::from(openat(self.folder()?, name(role, identity), flags, Mode::empty()).ok()?);
        let metadata = file.metadata().ok()?;
        let ours = metadata.uid() == user() && metadata.mode() & WRITABLE_BY_OTHERS == 0;
        // An empty file was left by a crash.
        (ours && metadata.is_file() && metadata.len() > 0).then_some(file)
    }

    /// Creates an empty file for the cache, under a random name that is never found.
    ///
    /// # Errors
    /// Where the directory is not used, or cannot be written.
    pub fn draft(&self) -> io::Result<Draft<'_>> {
        let folder = self.folder().ok_or(io::ErrorKind::NotFound)?;
        let mut random = [0; 8];
        getrandom(&mut random, GetRandomFlags::empty())?;
        let temporary = format!("{:016x}{TEMPORARY}", u64::from_ne_bytes(random));
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = File::from(openat(folder, &temporary, flags, Mode::RUSR | Mode::WUSR)?);
        Ok(Draft { file, folder, temporary: Some(temporary) })
    }
}

impl Draft<'_> {
    /// The file, which is to be filled.
    #[must_use]
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Returns the file without keeping it.
    ///
    /// # Errors
    /// Where the file has no second handle: no descriptor is left.
    pub fn discard(self) -> io::Result<File> {
        self.file.try_clone()
    }

    /// Keeps the file, as the one that was unpacked from what `identity` names. One that takes more than 256 MiB of disk space
    /// is not kept. Then removes the least recently used files, as the bounds of the cache ask for.
    ///
    /// # Errors
    /// Where the file cannot be renamed.
    pub fn keep(mut self, role: FileRole, identity: &Identity) -> io::Result<File> {
        let file = self.file.try_clone()?;
        let bytes = file.metadata()?.blocks() * STAT_BLOCK;
        if bytes > FILE_BYTES {
            log::info!("the unpacked {role} is not kept: it takes {bytes} bytes, and the cache takes {FILE_BYTES}");
            return Ok(file);
        }
        let name = name(role, identity);
        if let Some(temporary) = &self.temporary {
            renameat(self.folder, temporary, self.folder, &name)?;
            self.temporary = None;
        }
        prune(self.folder, &name, SystemTime::now());
        Ok(file)
    }
}

impl Drop for Draft<'_> {
    fn drop(&mut self) {
        if let Some(temporary) = &self.temporary {
            remove(self.folder, temporary);
        }
    }
}

fn remove(folder: &OwnedFd, name: &str) {
    if let Err(error) = unlinkat(folder, name, AtFlags::empty()) {
        log::debug!("{name} stays in the cache: {error}");
    }
}

struct Entry {
    /// The time of the last access, in seconds and nanoseconds.
    used: (i64, u64),
    name: String,
    bytes: u64,
}

/// Removes temporary files that were left behind, and the least recently used files beyond [`KEPT`] and [`KEPT_BYTES`]; `newest`
/// is never removed. A file that cannot be removed stays.
fn prune(folder: &OwnedFd, newest: &str, now: SystemTime) {
    let Ok(entries) = Dir::read_from(folder) else { return };
    let now = now.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let (mut files, mut kept, mut bytes) = (Vec::new(), 1, 0);
    for entry in entries.flatten() {
        let Ok(name) = entry.file_name().to_str() else { continue };
        let (unpacked, temporary) = (name.ends_with(UNPACKED), name.ends_with(TEMPORARY));
        if !unpacked && !temporary {
            continue;
        }
        let Ok(metadata) = statat(folder, name, AtFlags::SYMLINK_NOFOLLOW) else { continue };
        let space = u64::try_from(metadata.st_blocks).unwrap_or(0) * STAT_BLOCK;
        let age = now.saturating_sub(u64::try_from(metadata.st_mtime).unwrap_or(0));
        if name == newest {
            bytes += space;
        } else if unpacked {
            let used = (metadata.st_atime, metadata.st_atime_nsec);
            files.push(Entry { used, name: name.to_owned(), bytes: space });
        } else if age > STALE.as_secs() {
            remove(folder, name);
        }
    }
    files.sort_by_key(|file| std::cmp::Reverse(file.used));
    for file in files {
        kept += 1;
        bytes += file.bytes;
        if kept > KEPT || bytes > KEPT_BYTES {
            remove(folder, &file.name);
        }
    }
}

#[cfg(test)]
mod tests;
