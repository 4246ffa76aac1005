//! The folder of a snapshot: made by `hwvmm ctl` under another name, and renamed once it is whole; opened by `hwvmm run --from`.

use super::description::Description;
use super::format::{FormatError, MAX_STATE_BYTES, STATE_VERSION, State, decode};
use super::working_set::{MAX_WORKING_SET_BYTES, WorkingSet};
use hwvmm_arch::layout::ram_banks;
use hwvmm_devices::path_text::PathText as _;
use rustix::fs::{CWD, FileType, Mode, OFlags, RenameFlags, fcntl_getfl, fstat, openat, renameat_with};
use rustix::rand::{GetRandomFlags, getrandom};
use std::fs::{self, DirBuilder, File};
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use thiserror::Error;

const DESCRIPTION: &str = "machine.json";
const STATE: &str = "state";
const MEMORY: &str = "memory";
pub(super) const WORKING_SET: &str = "working-set";
/// In the order in which they are passed to the machine.
const NAMES: [&str; 3] = [DESCRIPTION, STATE, MEMORY];

/// The longest `machine.json` in bytes.
pub const MAX_DESCRIPTION_BYTES: u64 = 64 << 10;
/// Group and others may write.
const WRITABLE_BY_OTHERS: u32 = 0o022;

/// A snapshot cannot be made or used.
#[derive(Debug, Error)]
pub enum FolderError {
    /// There is something of that name.
    #[error("{} exists: name a folder that does not", .0.shown())]
    Exists(PathBuf),
    /// It cannot be made, or given its name.
    #[error("cannot make the snapshot {}", .0.shown())]
    Make(PathBuf, #[source] io::Error),
    /// It cannot be opened or read.
    #[error("cannot read the snapshot {}: {name}", path.shown())]
    Open {
        /// The folder of the snapshot.
        path: PathBuf,
        /// The name of a file in it; `.` is the folder.
        name: &'static str,
        /// What open(2) or read(2) failed with.
        source: io::Error,
    },
    /// Another user owns a file or can write to it: it could be changed or cut off while the guest runs.
    #[error(
        "the snapshot {} is not safe to use: {name} must be a regular file (. a folder) of this user, which no other user can \
         write to", path.shown()
    )]
    Unsafe {
        /// The folder of the snapshot.
        path: PathBuf,
        /// The name of a file in it; `.` is the folder.
        name: &'static str,
    },
    /// `machine.json` is none.
    #[error("the snapshot {} cannot be used: its machine.json is not of this version's format", .0.shown())]
    Description(PathBuf, #[source] serde_json::Error),
    /// `machine.json` is longer than one is, or describes no machine.
    #[error("the snapshot {} cannot be used: machine.json: {what}", path.shown())]
    Machine {
        /// The folder of the snapshot.
        path: PathBuf,
        /// What is wrong.
        what: &'static str,
    },
    /// The state cannot be used.
    #[error("the snapshot {} cannot be used", .0.shown())]
    State(PathBuf, #[source] FormatError),
    /// The file of the memory has another length.
    #[error("the snapshot {} cannot be used: its memory has {found} bytes, and its machine {expected}", path.shown())]
    Memory {
        /// The folder of the snapshot.
        path: PathBuf,
        /// The length of the file.
        found: u64,
        /// The size of the machine's memory.
        expected: u64,
    },
}

/// The open files of a snapshot that is being made.
pub struct Files {
    /// `machine.json`.
    pub description: File,
    /// `state`.
    pub state: File,
    /// `memory`.
    pub memory: File,
}

impl Files {
    /// Returns the same open files once more.
    ///
    /// # Errors
    /// Returns the error of fcntl(2).
    pub fn try_clone(&self) -> io::Result<Self> {
        let Self { description, state, memory } = self;
        Ok(Self { description: description.try_clone()?, state: state.try_clone()?, memory: memory.try_clone()? })
    }
}

/// A snapshot that is being made. It is removed when it is dropped.
pub struct Draft {
    target: PathBuf,
    partial: PathBuf,
    files: Vec<File>,
}

impl Draft {
    /// Makes the folder beside `target`, with empty files in it. Only this user can reach them.
    ///
    /// # Errors
    /// [`FolderError::Exists`], [`FolderError::Make`].
    pub fn new(target: &Path) -> Result<Self, FolderError> {
        let failed = |error: io::Error| FolderError::Make(target.to_owned(), error);
        if target.symlink_metadata().is_ok() {
            return Err(FolderError::Exists(target.to_owned()));
        }
        let mut random = [0; 8];
        getrandom(&mut random, GetRandomFlags::empty()).map_err(|error| failed(error.into()))?;
        let mut name = target.file_name().ok_or_else(|| failed(io::ErrorKind::InvalidInput.into()))?.to_owned();
        name.push(format!(".partial-{:016x}", u64::from_ne_bytes(random)));
        let partial = target.with_file_name(name);
        DirBuilder::new().mode(0o700).create(&partial).map_err(failed)?;
        let mut draft = Self { target: target.to_owned(), partial, files: Vec::new() };
        for name in NAMES {
            let mut options = File::options();
            let file = options.write(true).create_new(true).mode(0o600).open(draft.partial.join(name));
            draft.files.push(file.map_err(failed)?);
        }
        Ok(draft)
    }

    /// The files, in the order of [`check_targets`].
    #[must_use]
    pub fn files(&self) -> Vec<BorrowedFd<'_>> {
        self.files.iter().map(AsFd::as_fd).collect()
    }

    /// The files, for a machine that is a part of this program.
    ///
    /// # Errors
    /// [`FolderError::Make`].
    pub fn targets(&self) -> Result<Files, FolderError> {
        let failed = |error: io::Error| FolderError::Make(self.target.clone(), error);
        let files = self.files.iter().map(File::try_clone).collect::<io::Result<Vec<_>>>().map_err(failed)?;
        let files = <[File; 3]>::try_from(files).map_err(|_| failed(io::ErrorKind::NotFound.into()))?;
        let [description, state, memory] = files;
        Ok(Files { description, state, memory })
    }

    /// Gives the folder its name, once its files are on the disk.
    ///
    /// # Errors
    /// [`FolderError::Exists`], [`FolderError::Make`].
    pub fn keep(self) -> Result<(), FolderError> {
        let failed = |error: io::Error| FolderError::Make(self.target.clone(), error);
        self.files.iter().try_for_each(File::sync_all).map_err(failed)?;
        File::open(&self.partial).and_then(|folder| folder.sync_all()).map_err(failed)?;
        match renameat_with(CWD, &self.partial, CWD, &self.target, RenameFlags::NOREPLACE) {
            // The name, too, is on the disk before the snapshot is said to be made.
            Ok(()) => {
                let parent = self.target.parent().filter(|parent| !parent.as_os_str().is_empty());
                File::open(parent.unwrap_or(Path::new("."))).and_then(|folder| folder.sync_all()).map_err(failed)
            }
            Err(rustix::io::Errno::EXIST) => Err(FolderError::Exists(self.target.clone())),
            // The file system cannot (renameat2(2)). A folder with files in it is not replaced by rename(2) either.
            Err(rustix::io::Errno::INVAL) => fs::rename(&self.partial, &self.target).map_err(failed),
            Err(error) => Err(failed(error.into())),
        }
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        // Once it has its name there is nothing of the old one.
        for name in NAMES {
            let _ = fs::remove_file(self.partial.join(name));
        }
        let _ = fs::remove_dir(&self.partial);
    }
}

/// Checks the files that a client has passed: three regular ones, empty, different, and open for writing. Returns `None` for others.
#[must_use]
pub fn check_targets(files: Vec<OwnedFd>) -> Option<Files> {
    let mut seen = Vec::new();
    for file in &files {
        let stat = fstat(file).ok()?;
        let flags = fcntl_getfl(file).ok()?;
        let writable = matches!(flags & OFlags::RWMODE, OFlags::WRONLY | OFlags::RDWR);
        let place = (stat.st_dev, stat.st_ino);
        let usable = FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile && stat.st_size == 0;
        // What is appended goes to the end, whatever the offset.
        if !usable || !writable || flags.contains(OFlags::APPEND) || seen.contains(&place) {
            return None;
        }
        seen.push(place);
    }
    let [description, state, memory] = <[OwnedFd; 3]>::try_from(files).ok()?.map(File::from);
    Some(Files { description, state, memory })
}

/// A snapshot that is open for a run.
pub struct Opened {
    path: PathBuf,
    description: Description,
    state: File,
    memory: File,
    /// `None` where there is none.
    working_set: Option<File>,
}

/// Reads `machine.json`.
///
/// # Errors
/// The error of the parser.
pub fn parse_description(bytes: &[u8]) -> Result<Description, serde_json::Error> {
    serde_json::from_slice(bytes)
}

impl Opened {
    /// Opens the files in the folder at `path`, and reads its `machine.json`.
    ///
    /// # Errors
    /// [`FolderError`].
    pub fn new(path: &Path) -> Result<Self, FolderError> {
        let open = |folder: BorrowedFd<'_>, name: &'static str| {
            let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
            let file = openat(folder, name, flags, Mode::empty());
            let file = file.map_err(|error| FolderError::Open { path: path.to_owned(), name, source: error.into() })?;
            check_owner(path, name, &file, FileType::RegularFile)?;
            Ok(File::from(file))
        };
        let folder = open_folder(path)?;
        let description = read_description(path, open(folder.as_fd(), DESCRIPTION)?)?;
        let [state, memory] = [open(folder.as_fd(), STATE)?, open(folder.as_fd(), MEMORY)?];
        let expected = ram_banks(description.memory_bytes).iter().map(|bank| bank.bytes).sum();
        let found = memory
            .metadata()
            .map_err(|source| FolderError::Open { path: path.to_owned(), name: MEMORY, source })?
            .len();
        if found != expected {
            return Err(FolderError::Memory { path: path.to_owned(), found, expected });
        }
        let working_set = match open(folder.as_fd(), WORKING_SET) {
            Err(FolderError::Open { source, .. }) if source.kind() == io::ErrorKind::NotFound => None,
            opened => Some(opened?),
        };
        Ok(Self { path: path.to_owned(), description, state, memory, working_set })
    }

    /// What the machine is.
    #[must_use]
    pub fn description(&self) -> &Description {
        &self.description
    }

    /// The guest's memory.
    #[must_use]
    pub fn memory(&self) -> &File {
        &self.memory
    }

    /// Whether a run before has written down which pages it used.
    #[must_use]
    pub fn has_working_set(&self) -> bool {
        self.working_set.is_some()
    }

    /// Reads the pages that a run before has used. `None` where none has written them down, or where they cannot be used, which is logged:
    /// a run needs them not.
    #[must_use]
    pub fn working_set(&self) -> Option<WorkingSet> {
        let mut bytes = Vec::new();
        let limit = MAX_WORKING_SET_BYTES as u64 + 1;
        if let Err(error) = self.working_set.as_ref()?.take(limit).read_to_end(&mut bytes) {
            log::warn!("the snapshot {}: {WORKING_SET} is not used: {error}", self.path.shown());
            return None;
        }
        WorkingSet::decode(&bytes, self.description.memory_bytes)
            .inspect_err(|error| {
                log::warn!(
                    "the snapshot {}: {WORKING_SET} is not used: {error}; --record-working-set makes another one",
                    self.path.shown()
                );
            })
            .ok()
    }

    /// Reads the state.
    ///
    /// # Errors
    /// [`FolderError::State`], [`FolderError::Open`], [`FolderError::Machine`].
    pub fn state(&self) -> Result<State, FolderError> {
        let mut bytes = Vec::new();
        let limit = MAX_STATE_BYTES as u64 + 1;
        (&self.state).take(limit).read_to_end(&mut bytes).map_err(|source| FolderError::Open {
            path: self.path.clone(),
            name: STATE,
            source,
        })?;
        let state = decode(&bytes).map_err(|error| FolderError::State(self.path.clone(), error))?;
        if state.description != self.description {
            return Err(FolderError::Machine {
                path: self.path.clone(),
                what: "it is of another machine than the state",
            });
        }
        Ok(state)
    }
}

/// Opens the folder of a snapshot.
///
/// # Errors
/// [`FolderError::Open`], [`FolderError::Unsafe`].
pub(super) fn open_folder(path: &Path) -> Result<OwnedFd, FolderError> {
    let failed =
        |error: rustix::io::Errno| FolderError::Open { path: path.to_owned(), name: ".", source: error.into() };
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let folder = openat(CWD, path, flags, Mode::empty()).map_err(failed)?;
    check_owner(path, ".", &folder, FileType::Directory)?;
    Ok(folder)
}

/// Checks that only this user, or root, can have changed the file, and can do so.
fn check_owner(path: &Path, name: &'static str, file: &OwnedFd, kind: FileType) -> Result<(), FolderError> {
    let stat = fstat(file).map_err(|error| FolderError::Open { path: path.to_owned(), name, source: error.into() })?;
    let owner = stat.st_uid == 0 || stat.st_uid == rustix::process::geteuid().as_raw();
    if FileType::from_raw_mode(stat.st_mode) != kind || !owner || stat.st_mode & WRITABLE_BY_OTHERS != 0 {
        return Err(FolderError::Unsafe { path: path.to_owned(), name });
    }
    Ok(())
}

fn read_description(path: &Path, file: File) -> Result<Description, FolderError> {
    let mut bytes = Vec::new();
    file.take(MAX_DESCRIPTION_BYTES + 1).read_to_end(&mut bytes).map_err(|source| FolderError::Open {
        path: path.to_owned(),
        name: DESCRIPTION,
        source,
    })?;
    let machine = |what| FolderError::Machine { path: path.to_owned(), what };
    if bytes.len() as u64 > MAX_DESCRIPTION_BYTES {
        return Err(machine("it is too long"));
    }
    // Before the rest: another version may have other fields.
    #[derive(serde::Deserialize)]
    struct OnlyVersion {
        state_version: u32,
    }
    match serde_json::from_slice(&bytes) {
        Ok(OnlyVersion { state_version: found }) if found != STATE_VERSION => {
            return Err(FolderError::State(path.to_owned(), FormatError::Version { found }));
        }
        _ => {}
    }
    let description = parse_description(&bytes).map_err(|error| FolderError::Description(path.to_owned(), error))?;
    description.fault().map_or(Ok(description), |what| Err(machine(what)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn names(folder: &Path) -> Vec<String> {
        let mut names: Vec<_> = fs::read_dir(folder)
            .expect("a folder")
            .map(|entry| entry.expect("one").file_name().into_string().expect("UTF-8"))
            .collect();
        names.sort();
        names
    }

    #[test]
    fn a_draft_gets_its_name_at_the_end_or_is_gone() {
        let folder = tempfile::tempdir().expect("a folder");
        let target = folder.path().join("snap");
        drop(Draft::new(&target).expect("made"));
        assert!(names(folder.path()).is_empty());
        let draft = Draft::new(&target).expect("made");
        assert_eq!(names(folder.path()).len(), 1);
        assert!(names(folder.path())[0].starts_with("snap.partial-"));
        let mode = |path: &Path| fs::metadata(path).expect("there").permissions().mode() & 0o777;
        assert_eq!(mode(&draft.partial), 0o700);
        draft.keep().expect("renamed");
        assert_eq!(names(folder.path()), ["snap"]);
        assert_eq!(names(&target), [DESCRIPTION, MEMORY, STATE]);
        assert_eq!(mode(&target.join(MEMORY)), 0o600);
        assert!(matches!(Draft::new(&target), Err(FolderError::Exists(_))));
        // One that comes first.
        let late = Draft::new(&folder.path().join("late")).expect("made");
        fs::create_dir(folder.path().join("late")).expect("made");
        assert!(matches!(late.keep(), Err(FolderError::Exists(_))));
        assert_eq!(names(folder.path()), ["late", "snap"]);
    }

    #[test]
    fn only_empty_files_that_can_be_written_are_targets() {
        let folder = tempfile::tempdir().expect("a folder");
        let draft = Draft::new(&folder.path().join("snap")).expect("made");
        let owned = || -> Vec<OwnedFd> {
            draft.files().iter().map(|file| file.try_clone_to_owned().expect("a descriptor")).collect()
        };
        assert!(check_targets(owned()).is_some());
        assert!(check_targets(owned().into_iter().take(2).collect()).is_none(), "two");
        let mut twice = owned();
        twice[2] = owned().remove(0);
        assert!(check_targets(twice).is_none(), "one of them twice");
        let with = |file: File| {
            let mut files = owned();
            files[1] = file.into();
            check_targets(files).is_none()
        };
        assert!(with(File::open(draft.partial.join(STATE)).expect("open")), "for reading");
        assert!(with(File::options().append(true).open(draft.partial.join(STATE)).expect("open")), "for appending");
        assert!(with(File::options().write(true).open("/dev/null").expect("open")), "a device");
        fs::write(draft.partial.join(STATE), "x").expect("written");
        assert!(check_targets(owned()).is_none(), "not empty");
    }

    #[test]
    fn folders_and_files_that_others_can_change_are_refused() {
        let folder = tempfile::tempdir().expect("a folder");
        let target = folder.path().join("snap");
        Draft::new(&target).expect("made").keep().expect("renamed");
        let error = || Opened::new(&target).err().expect("refused").to_string();
        assert!(error().contains("machine.json is not of this version's format"), "{}", error());
        fs::write(target.join(DESCRIPTION), "{\"state_version\":99,\"new\":1}").expect("written");
        let text = crate::error::chain(&Opened::new(&target).err().expect("refused"));
        assert!(
            text.contains("version 99") && text.contains(&format!("reads version {}", crate::snapshot::STATE_VERSION)),
            "{text}"
        );
        let set = |path: &Path, mode| fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("set");
        set(&target.join(DESCRIPTION), 0o620);
        assert!(error().contains("not safe to use: machine.json"), "{}", error());
        set(&target.join(DESCRIPTION), 0o600);
        set(&target, 0o702);
        assert!(error().contains("not safe to use: ."), "{}", error());
        set(&target, 0o700);
        fs::remove_file(target.join(DESCRIPTION)).expect("removed");
        std::os::unix::fs::symlink("/etc/passwd", target.join(DESCRIPTION)).expect("linked");
        assert!(error().contains("cannot read the snapshot"), "{}", error());
        let missing = Opened::new(&folder.path().join("none")).err().expect("refused").to_string();
        assert!(missing.contains("none"), "{missing}");
    }
}
