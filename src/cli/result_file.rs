//! Files for the results of a run: opened before the guest runs, written after it. In the meantime a guest that can write to their folder
//! (a shared one) may have put a symbolic link to another file of the host in their place.

use crate::sandbox::keep_from_machine;
use hwvmm_devices::path_text::PathText as _;
use rustix::fs::{Access, access, fstat};
use std::cell::Cell;
use std::error::Error;
use std::fs::{File, Metadata};
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

/// A file that is written once, at the end. One that was made for a result and has none is removed.
pub(super) struct ResultFile {
    path: PathBuf,
    place: Place,
    /// It did not exist before, and nothing is in it.
    is_new: Cell<bool>,
}

enum Place {
    /// A regular file. What is in it stays until the result is there.
    Open(File),
    /// A pipe or a device, by device and inode: opening it can wait, or be seen by its reader. Also a file that is this process' stdout
    /// or stderr (/dev/stdout): the guest's output in it stays.
    Later((u64, u64)),
}

fn identity(metadata: &Metadata) -> (u64, u64) {
    (metadata.dev(), metadata.ino())
}

impl ResultFile {
    /// Opens or makes the file at `path`. A run may take hours, and its results would have no place where that is not possible.
    ///
    /// # Errors
    /// Where the file can be neither written nor made.
    pub(super) fn open(path: &Path) -> Result<Self, Box<dyn Error>> {
        let failed = |error: io::Error| format!("cannot write {}: {error}", path.shown());
        let mut is_new = false;
        let place = match std::fs::metadata(path) {
            Ok(found) if found.is_dir() => Err(io::ErrorKind::IsADirectory.into()),
            Ok(found) if !found.is_file() || is_stream(&found) => {
                access(path, Access::WRITE_OK).map(|()| Place::Later(identity(&found))).map_err(io::Error::from)
            }
            Ok(_) => File::options().write(true).open(path).map(Place::Open),
            Err(_) => {
                is_new = true;
                File::options().write(true).create_new(true).open(path).map(Place::Open)
            }
        };
        let place = place.map_err(failed)?;
        if let Place::Open(file) = &place {
            keep_from_machine(file.as_fd());
        }
        Ok(Self { path: path.to_owned(), place, is_new: Cell::new(is_new) })
    }

    /// Writes `text`, in place of what was in the file.
    ///
    /// # Errors
    /// Where it cannot be written; `InvalidInput` where the pipe or the device was replaced meanwhile.
    pub(super) fn write(&self, text: &str) -> io::Result<()> {
        self.is_new.set(false);
        match &self.place {
            Place::Open(file) => {
                file.set_len(0)?;
                file.write_all_at(text.as_bytes(), 0)
            }
            Place::Later(before) => {
                let mut file = File::options().append(true).open(&self.path)?;
                if identity(&file.metadata()?) != *before {
                    return Err(io::Error::new(io::ErrorKind::InvalidInput, "another file has taken its place"));
                }
                file.write_all(text.as_bytes())
            }
        }
    }

    /// Returns true if writing can wait for a reader.
    pub(super) fn can_wait(&self) -> bool {
        matches!(self.place, Place::Later(_))
    }

    /// The path, for messages.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for ResultFile {
    fn drop(&mut self) {
        let Place::Open(file) = &self.place else { return };
        let same = |found: Metadata| file.metadata().is_ok_and(|own| identity(&own) == identity(&found));
        if self.is_new.get() && std::fs::symlink_metadata(&self.path).is_ok_and(same) {
            // A file without a result is no harm.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// Returns true if the file is this process' stdout or stderr.
fn is_stream(found: &Metadata) -> bool {
    let is = |stream: &dyn AsFd| fstat(stream.as_fd()).is_ok_and(|own| (own.st_dev, own.st_ino) == identity(found));
    is(&io::stdout()) || is(&io::stderr())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn a_link_that_was_put_in_its_place_is_not_followed() {
        let folder = tempfile::tempdir().expect("a folder");
        let (path, other) = (folder.path().join("result"), folder.path().join("other"));
        std::fs::write(&other, "of the user").expect("written");
        for before in [None, Some("an older and longer result")] {
            let _ = std::fs::remove_file(&path);
            before.iter().for_each(|text| std::fs::write(&path, text).expect("written"));
            let result = ResultFile::open(&path).expect("opened");
            assert_eq!(std::fs::read_to_string(&path).expect("there"), before.unwrap_or(""), "until there is a result");
            let moved = folder.path().join("moved");
            std::fs::rename(&path, &moved).expect("moved");
            symlink(&other, &path).expect("linked");
            result.write("new").expect("written");
            assert_eq!(std::fs::read_to_string(&other).expect("there"), "of the user");
            assert_eq!(std::fs::read_to_string(&moved).expect("there"), "new");
        }
    }

    #[test]
    fn a_file_that_was_made_for_a_result_and_has_none_is_removed() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("result");
        drop(ResultFile::open(&path).expect("made"));
        assert!(!path.exists());
        std::fs::write(&path, "").expect("written");
        drop(ResultFile::open(&path).expect("opened"));
        assert!(path.exists(), "it was there before");
        std::fs::remove_file(&path).expect("removed");
        let result = ResultFile::open(&path).expect("made");
        result.write("").expect("written");
        drop(result);
        assert!(path.exists(), "it has a result");
    }

    #[test]
    fn a_pipe_that_was_replaced_is_refused() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("pipe");
        symlink("/dev/null", &path).expect("linked");
        let result = ResultFile::open(&path).expect("a device");
        result.write("new").expect("written");
        std::fs::remove_file(&path).expect("removed");
        std::fs::write(&path, "of the user").expect("written");
        assert!(result.write("new").is_err());
        assert_eq!(std::fs::read_to_string(&path).expect("there"), "of the user");
        assert!(ResultFile::open(folder.path()).is_err(), "a folder");
        assert!(ResultFile::open(&folder.path().join("none/result")).is_err());
    }
}
