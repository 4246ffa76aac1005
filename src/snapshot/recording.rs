//! The file `working-set` of a snapshot's folder, written by a run.

use super::description::Description;
use super::folder::{FolderError, Opened, open_folder};
use super::working_set::{PAGE, PageUse, WorkingSet, WorkingSetError};
use crate::error::chain;
use hwvmm_devices::path_text::PathText as _;
use rustix::fs::{AtFlags, Mode, OFlags, RenameFlags, fstat, openat, renameat, renameat_with, unlinkat};
use rustix::io::Errno;
use rustix::process::geteuid;
use rustix::rand::{GetRandomFlags, getrandom};
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use thiserror::Error;

/// The largest memory in bytes of which a run looks for used pages without being asked to: /proc/self/pagemap has 8 bytes for each page, and
/// the look must not take as long as a run that hangs (2 s).
const MAX_UNASKED: u64 = 64 << 30;
/// A working set that nobody asked for has at most this part of memory written.
const UNASKED_PART: u64 = 8;

/// The pages that a run has used cannot be kept.
#[derive(Debug, Error)]
pub enum RecordError {
    /// They are not those of a machine of the snapshot.
    #[error("the machine's process tells no working set of this snapshot")]
    Set(#[source] WorkingSetError),
    /// Nobody asked for it, and all later runs would have as much memory of their own.
    #[error("the working set is not kept: the guest has written {} KiB, more than a part in {UNASKED_PART} of its memory", .0 >> 10)]
    TooMuch(u64),
    /// The file cannot be written.
    #[error("cannot write the working set of the snapshot {}", .0.shown())]
    Write(PathBuf, #[source] io::Error),
}

/// A snapshot's folder to which a run writes which pages it has used.
pub struct RecordingFolder {
    path: PathBuf,
    folder: OwnedFd,
    memory_bytes: u64,
    existing: Existing,
}

/// What becomes of a file that is there already.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Existing {
    /// It is replaced: the user asks for a new one.
    Replaced,
    /// It stays: of several first runs at the same time the first that ends is the one that counts.
    Stays,
}

impl RecordingFolder {
    /// Opens the folder at `path` of a snapshot with `description`.
    ///
    /// # Errors
    /// [`FolderError`].
    pub fn new(path: &Path, description: &Description) -> Result<Self, FolderError> {
        let memory_bytes = description.memory_bytes;
        Ok(Self { path: path.to_owned(), folder: open_folder(path)?, memory_bytes, existing: Existing::Replaced })
    }

    /// Opens the folder at `path` of `snapshot` for the first run from a template, which writes the pages down without being asked to.
    /// `None` where the snapshot is no template, has a working set, a very large memory, or is another user's; and where the process cannot know the pages.
    #[must_use]
    pub fn for_first_run(path: &Path, snapshot: &Opened) -> Option<Self> {
        let description = snapshot.description();
        let wanted =
            description.agent.is_some() && !snapshot.has_working_set() && description.memory_bytes <= MAX_UNASKED;
        if !wanted || File::open("/proc/self/pagemap").is_err() {
            return None;
        }
        let folder = Self::new(path, description).ok()?;
        let own = fstat(&folder.folder).is_ok_and(|stat| stat.st_uid == geteuid().as_raw());
        own.then_some(Self { existing: Existing::Stays, ..folder })
    }

    /// Writes `set` as [`RecordingFolder::keep`] does. An error is logged: the run itself does not need the file.
    pub fn keep_or_log(&self, set: &WorkingSet) {
        let Err(error) = self.keep(set) else { return };
        match self.existing {
            Existing::Replaced => log::warn!("{}", chain(&error)),
            // Nobody asked for it.
            Existing::Stays => log::info!("{}", chain(&error)),
        }
    }

    /// Writes `set` to a file of another name, and renames it to `working-set`: other runs find the old one or the new one, whole.
    ///
    /// # Errors
    /// [`RecordError`].
    pub fn keep(&self, set: &WorkingSet) -> Result<(), RecordError> {
        let bytes = set.check(self.memory_bytes).and_then(|()| set.encode()).map_err(RecordError::Set)?;
        let written = set.pages(PageUse::Written).saturating_mul(PAGE);
        if self.existing == Existing::Stays && written > self.memory_bytes / UNASKED_PART {
            return Err(RecordError::TooMuch(written));
        }
        let failed = |error: io::Error| RecordError::Write(self.path.clone(), error);
        let mut random = [0; 8];
        getrandom(&mut random, GetRandomFlags::empty()).map_err(|error| failed(error.into()))?;
        let name = format!("working-set.partial-{:016x}", u64::from_ne_bytes(random));
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = openat(&self.folder, &name, flags, Mode::from(0o600)).map_err(|error| failed(error.into()))?;
        let mut file = File::from(file);
        let written = file.write_all(&bytes).and_then(|()| file.sync_all()).and_then(|()| Ok(self.rename(&name)?));
        written.map_err(|error| {
            let _ = unlinkat(&self.folder, &name, AtFlags::empty());
            failed(error)
        })
    }

    /// Gives the file `name` its name, or removes it where another one stays.
    fn rename(&self, name: &str) -> Result<(), Errno> {
        let target = super::folder::WORKING_SET;
        if self.existing == Existing::Replaced {
            return renameat(&self.folder, name, &self.folder, target);
        }
        match renameat_with(&self.folder, name, &self.folder, target, RenameFlags::NOREPLACE) {
            Err(Errno::EXIST) => unlinkat(&self.folder, name, AtFlags::empty()),
            // The file system cannot (renameat2(2)): the last one counts.
            Err(Errno::INVAL) => renameat(&self.folder, name, &self.folder, target),
            renamed => renamed,
        }
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
    use crate::snapshot::{AgentDescription, Draft, PageRange, RootKind, STATE_VERSION};
    use std::fs;

    #[test]
    fn a_working_set_is_replaced_as_a_whole() {
        let folder = tempfile::tempdir().expect("a folder");
        let target = RecordingFolder {
            path: folder.path().to_owned(),
            folder: open_folder(folder.path()).expect("opened"),
            memory_bytes: 1 << 20,
            existing: Existing::Replaced,
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
        let first = RecordingFolder { existing: Existing::Stays, ..target };
        first.keep(&set(100)).expect("nothing to do");
        assert_eq!(kept(), set(200), "that of the run which ended first");
        assert_eq!(fs::read_dir(folder.path()).expect("a folder").count(), 1, "nothing else is left");
        fs::remove_file(folder.path().join("working-set")).expect("removed");
        first.keep(&set(100)).expect("written");
        assert_eq!(kept(), set(100));
    }

    /// A snapshot's folder in `parent`, without memory: only `machine.json` says something.
    fn snapshot(parent: &Path, name: &str, agent: bool, memory_bytes: u64) -> PathBuf {
        let path = parent.join(name);
        let mut description = Description { state_version: STATE_VERSION, ..Description::of_tests() };
        description.memory_bytes = memory_bytes;
        description.agent = agent.then_some(AgentDescription { root: RootKind::Host });
        Draft::new(&path).expect("made").keep().expect("renamed");
        fs::write(path.join("machine.json"), serde_json::to_vec(&description).expect("JSON")).expect("written");
        let memory = fs::File::options().write(true).open(path.join("memory")).expect("open");
        memory.set_len(memory_bytes).expect("sparse");
        path
    }

    #[test]
    fn only_the_first_run_from_a_template_writes_them_down_unasked() {
        let parent = tempfile::tempdir().expect("a folder");
        let of = |path: &Path| RecordingFolder::for_first_run(path, &Opened::new(path).expect("a snapshot"));
        assert!(of(&snapshot(parent.path(), "no-template", false, 16 << 20)).is_none());
        assert!(of(&snapshot(parent.path(), "large", true, (64 << 30) + (1 << 20))).is_none());
        let template = snapshot(parent.path(), "template", true, 16 << 20);
        let (first, second) = (of(&template).expect("the first"), of(&template).expect("at the same time"));
        let set = |pages| WorkingSet::new(16 << 20, vec![PageRange { first: 0, pages, usage: PageUse::Written }]);
        let too_much = second.keep(&set(513));
        assert!(matches!(too_much, Err(RecordError::TooMuch(bytes)) if bytes == 513 * PAGE), "an eighth of 16 MiB");
        second.keep(&set(2)).expect("written");
        first.keep(&set(1)).expect("left out");
        let opened = Opened::new(&template).expect("a snapshot");
        assert_eq!(opened.working_set(), Some(set(2)), "that of the run that ended first");
        assert!(of(&template).is_none());
        let asked = RecordingFolder::new(&template, opened.description()).expect("opened");
        asked.keep(&set(3)).expect("replaced");
        assert_eq!(Opened::new(&template).expect("a snapshot").working_set(), Some(set(3)));
    }
}
