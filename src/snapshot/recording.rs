//! The file `working-set` of a snapshot's folder, written by a run.

use super::description::Description;
use super::folder::{FolderError, open_folder};
use super::working_set::{WorkingSet, WorkingSetError};
use hwvmm_devices::path_text::PathText as _;
use rustix::fs::{AtFlags, Mode, OFlags, openat, renameat, unlinkat};
use rustix::rand::{GetRandomFlags, getrandom};
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use thiserror::Error;

/// The pages that a run has used cannot be kept.
#[derive(Debug, Error)]
pub enum RecordError {
    /// They are not those of a machine of the snapshot.
    #[error("the machine's process tells no working set of this snapshot")]
    Set(#[source] WorkingSetError),
    /// The file cannot be written.
    #[error("cannot write the working set of the snapshot {}", .0.shown())]
    Write(PathBuf, #[source] io::Error),
}

/// A snapshot's folder to which a run writes which pages it has used.
pub struct RecordingFolder {
    path: PathBuf,
    folder: OwnedFd,
    memory_bytes: u64,
}

impl RecordingFolder {
    /// Opens the folder at `path` of a snapshot with `description`.
    ///
    /// # Errors
    /// [`FolderError`].
    pub fn new(path: &Path, description: &Description) -> Result<Self, FolderError> {
        let memory_bytes = description.memory_bytes;
        Ok(Self { path: path.to_owned(), folder: open_folder(path)?, memory_bytes })
    }

    /// Writes `set` to a file of another name, and renames it to `working-set`: other runs find the old one or the new one, whole.
    ///
    /// # Errors
    /// [`RecordError`].
    pub fn keep(&self, set: &WorkingSet) -> Result<(), RecordError> {
        let bytes = set.check(self.memory_bytes).and_then(|()| set.encode()).map_err(RecordError::Set)?;
        let failed = |error: io::Error| RecordError::Write(self.path.clone(), error);
        let mut random = [0; 8];
        getrandom(&mut random, GetRandomFlags::empty()).map_err(|error| failed(error.into()))?;
        let name = format!("working-set.partial-{:016x}", u64::from_ne_bytes(random));
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = openat(&self.folder, &name, flags, Mode::from(0o600)).map_err(|error| failed(error.into()))?;
        let mut file = File::from(file);
        let written = file
            .write_all(&bytes)
            .and_then(|()| file.sync_all())
            .and_then(|()| Ok(renameat(&self.folder, &name, &self.folder, super::folder::WORKING_SET)?));
        written.map_err(|error| {
            let _ = unlinkat(&self.folder, &name, AtFlags::empty());
            failed(error)
        })
    }
}

impl AsFd for RecordingFolder {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.folder.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::snapshot::{PageRange, PageUse};
    use std::fs;

    #[test]
    fn a_working_set_is_replaced_as_a_whole() {
        let folder = tempfile::tempdir().expect("a folder");
        let target = RecordingFolder {
            path: folder.path().to_owned(),
            folder: open_folder(folder.path()).expect("opened"),
            memory_bytes: 1 << 20,
        };
        let set = |first| WorkingSet::new(1 << 20, vec![PageRange { first, pages: 1, usage: PageUse::Read }]);
        let kept = || {
            let bytes = fs::read(folder.path().join("working-set")).expect("there");
            WorkingSet::decode(&bytes, 1 << 20).expect("whole")
        };
        for first in [5, 200] {
            target.keep(&set(first)).expect("written");
            assert_eq!(kept(), set(first));
        }
        assert!(matches!(target.keep(&set(256)), Err(RecordError::Set(_))), "beyond the memory");
        assert_eq!(kept(), set(200));
        assert_eq!(fs::read_dir(folder.path()).expect("a folder").count(), 1, "nothing else is left");
    }
}
