//! A folder that a guest can write to, and the paths that lead into it.

use super::mounts::{Mounts, Place};
use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, PROC_SUPER_MAGIC, fstat, fstatfs, openat, readlinkat, statat};
use rustix::io::Errno;
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path};

/// Symbolic links that are followed in a path, as in Linux.
const MAX_LINKS: usize = 40;
/// Folders between a folder and the root that are looked at.
const MAX_DEPTH: usize = 4096;

/// What there is of a tree on the way along a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Found {
    /// No name is looked up in it.
    Outside,
    /// Folders and a regular file, or a name that does not exist.
    Plain,
    /// A symbolic link.
    Link,
    /// A file that is neither a folder nor a regular file.
    Special,
}

/// A folder that a guest can write to, with all that is below it.
pub(super) struct Tree {
    /// Device and inode.
    file: (u64, u64),
    /// The folder, and what is mounted below it.
    places: Vec<Place>,
}

fn open_folder(at: impl AsFd, name: &Path) -> rustix::io::Result<OwnedFd> {
    openat(at, name, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
}

fn file(folder: &OwnedFd) -> rustix::io::Result<(u64, u64)> {
    fstat(folder).map(|stat| (stat.st_dev, stat.st_ino))
}

impl Tree {
    /// The folder at `path`; `None` where it cannot be opened.
    pub(super) fn of(path: &Path, mounts: &Mounts) -> Option<Self> {
        let folder = open_folder(CWD, path).ok()?;
        let shown = std::fs::read_link(format!("/proc/thread-self/fd/{}", folder.as_raw_fd())).ok();
        let below = shown.iter().flat_map(|shown| mounts.below(shown));
        Some(Self { file: file(&folder).ok()?, places: mounts.place(&folder).into_iter().chain(below).collect() })
    }

    /// Returns true if the folder is in this tree.
    fn has(&self, folder: &OwnedFd, mounts: &Mounts) -> bool {
        self.is_above(folder).unwrap_or(false)
            || mounts.place(folder).is_some_and(|place| self.places.iter().any(|tree| tree.has(&place)))
    }

    /// Returns true if a parent of the folder, or the folder itself, is this one.
    fn is_above(&self, folder: &OwnedFd) -> rustix::io::Result<bool> {
        let mut now = file(folder)?;
        let mut parent = folder.try_clone().map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))?;
        for _ in 0..MAX_DEPTH {
            if now == self.file {
                return Ok(true);
            }
            parent = open_folder(&parent, Path::new(".."))?;
            let above = file(&parent)?;
            if above == now {
                break;
            }
            now = above;
        }
        Ok(false)
    }

    /// Looks at the names that `path` leads through. Where it cannot be followed to its end, as where a file does not exist yet, the names
    /// so far count.
    pub(super) fn find(&self, path: &Path, mounts: &Mounts) -> Found {
        let mut found = Found::Outside;
        // An error is left to the code that opens the file.
        let _ = self.walk(path, mounts, &mut found);
        found
    }

    fn walk(&self, path: &Path, mounts: &Mounts, found: &mut Found) -> io::Result<()> {
        let mut left = names_of(path);
        let mut links = 0;
        let mut folder = open_folder(CWD, Path::new("."))?;
        while let Some(name) = left.pop() {
            if name == "/" {
                folder = open_folder(CWD, Path::new("/"))?;
                continue;
            }
            // The guest cannot move the root of the share, so it does not choose what is above.
            let above_root = name == ".." && file(&folder)? == self.file;
            let is_inside = !above_root && self.has(&folder, mounts);
            if is_inside && *found == Found::Outside {
                *found = Found::Plain;
            }
            let kind = FileType::from_raw_mode(statat(&folder, &name, AtFlags::SYMLINK_NOFOLLOW)?.st_mode);
            match kind {
                FileType::Symlink if is_inside => {
                    *found = Found::Link;
                    return Ok(());
                }
                FileType::Symlink if fstatfs(&folder)?.f_type == PROC_SUPER_MAGIC => {
                    // It may be an open file (/proc/self/fd), for which no name is looked up.
                    folder = open_folder(&folder, Path::new(&name))?;
                }
                FileType::Symlink => {
                    links += 1;
                    if links > MAX_LINKS {
                        return Err(Errno::LOOP.into());
                    }
                    let target = readlinkat(&folder, &name, Vec::new())?;
                    left.extend(names_of(Path::new(OsStr::from_bytes(target.as_bytes()))));
                }
                FileType::Directory => folder = open_folder(&folder, Path::new(&name))?,
                kind => {
                    if is_inside && kind != FileType::RegularFile {
                        *found = Found::Special;
                    }
                    return Ok(());
                }
            }
        }
        Ok(())
    }
}

/// The names in a path, the first one last.
fn names_of(path: &Path) -> Vec<OsString> {
    let names = path.components().filter(|component| *component != Component::CurDir);
    names.map(|component| component.as_os_str().to_owned()).rev().collect()
}
