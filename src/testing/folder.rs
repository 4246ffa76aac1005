//! The folder of a run of a suite: made anew, for its user alone, with a folder for each try of each test.

use hwvmm_devices::path_text::PathText as _;
use std::fs::{self, DirBuilder, File, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use thiserror::Error;

/// The folder with one folder a run, where none is named.
const DEFAULT: &str = "hwvmm-results";
/// Runs that are kept in it at most: then the user has to look at them, or to name a folder.
const MAX_RUNS: u32 = 100_000;
/// Bytes of a test's name in the name of its folder.
const NAME_BYTES: usize = 80;

/// The folder cannot be used.
#[derive(Debug, Error)]
pub enum FolderError {
    /// It cannot be made.
    #[error("cannot make the folder {}; --output names another one", .0.shown())]
    Make(PathBuf, #[source] io::Error),
    /// The path is taken, or others can write to it.
    #[error("{} is {what}: --output needs a folder that does not exist, or that is empty and that only you can write to", .path.shown())]
    NotFree {
        /// The path that `--output` named.
        path: PathBuf,
        /// What the path is, for the message.
        what: &'static str,
    },
    /// A file in it cannot be written.
    #[error("cannot write {}", .0.shown())]
    Write(PathBuf, #[source] io::Error),
}

impl FolderError {
    /// Returns true if the path that was named cannot be the folder: another try would end the same. A full disk is none of these.
    #[must_use]
    pub fn is_usage(&self) -> bool {
        use io::ErrorKind as Kind;
        match self {
            Self::NotFree { .. } => true,
            Self::Make(_, error) => matches!(
                error.kind(),
                Kind::NotFound
                    | Kind::PermissionDenied
                    | Kind::NotADirectory
                    | Kind::AlreadyExists
                    | Kind::ReadOnlyFilesystem
                    | Kind::InvalidFilename
                    | Kind::InvalidInput
            ),
            Self::Write(..) => false,
        }
    }
}

/// The folder of a run of a suite.
#[derive(Clone, Debug)]
pub struct ResultFolder {
    path: PathBuf,
}

impl ResultFolder {
    /// Makes the folder at `path`, or a new one below `DEFAULT` in the current folder.
    ///
    /// # Errors
    /// [`FolderError`].
    pub fn create(path: Option<&Path>) -> Result<Self, FolderError> {
        let path = match path {
            Some(path) => named(path)?,
            None => numbered(Path::new(DEFAULT))?,
        };
        let path = path.canonicalize().map_err(|error| FolderError::Make(path, error))?;
        Ok(Self { path })
    }

    /// Its path, from the root folder.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Makes the folder of one try, from 1, of the test with this place in the list.
    ///
    /// # Errors
    /// [`FolderError::Make`]
    pub(super) fn of_try(&self, place: usize, name: &str, number: u32) -> Result<PathBuf, FolderError> {
        let test = self.path.join(folder_name(place, name));
        if number == 1 {
            make(&test)?;
        }
        let path = test.join(format!("try-{number}"));
        make(&path)?;
        Ok(path)
    }

    /// Makes the folder of a template, which has this number, from 1.
    ///
    /// # Errors
    /// [`FolderError::Make`]
    pub(super) fn of_template(&self, number: usize) -> Result<PathBuf, FolderError> {
        let path = self.path.join(format!("template-{number}"));
        make(&path)?;
        Ok(path)
    }

    /// Writes a new file.
    ///
    /// # Errors
    /// [`FolderError::Write`]
    pub fn write(&self, name: &str, text: &str) -> Result<PathBuf, FolderError> {
        let path = self.path.join(name);
        write_new(&path, text)?;
        Ok(path)
    }
}

/// Makes a file that does not exist yet, for its user alone.
///
/// # Errors
/// Where it exists or cannot be made.
pub(super) fn new_file(path: &Path) -> Result<File, FolderError> {
    let file = File::options().write(true).create_new(true).mode(0o600).open(path);
    file.map_err(|error| FolderError::Write(path.to_owned(), error))
}

/// Makes a file with this text.
///
/// # Errors
/// As [`new_file`].
pub(super) fn write_new(path: &Path, text: &str) -> Result<(), FolderError> {
    let written = new_file(path)?.write_all(text.as_bytes());
    written.map_err(|error| FolderError::Write(path.to_owned(), error))
}

/// Makes a file with this text that its user can execute.
///
/// # Errors
/// As [`new_file`].
pub(super) fn write_new_script(path: &Path, text: &str) -> Result<(), FolderError> {
    let mut file = new_file(path)?;
    let written = file.write_all(text.as_bytes()).and_then(|()| file.set_permissions(Permissions::from_mode(0o700)));
    written.map_err(|error| FolderError::Write(path.to_owned(), error))
}

/// mkdir(2) follows no symbolic link, and fails where there is anything.
fn make(path: &Path) -> Result<(), FolderError> {
    let made = DirBuilder::new().mode(0o700).create(path);
    made.map_err(|error| FolderError::Make(path.to_owned(), error))
}

fn named(path: &Path) -> Result<PathBuf, FolderError> {
    match make(path) {
        Err(FolderError::Make(_, error)) if error.kind() == io::ErrorKind::AlreadyExists => {}
        made => return made.map(|()| path.to_owned()),
    }
    owned_folder(path)?;
    let failed = |error| FolderError::Make(path.to_owned(), error);
    match fs::read_dir(path).map_err(failed)?.next() {
        None => Ok(path.to_owned()),
        Some(_) => Err(FolderError::NotFree { path: path.to_owned(), what: "not empty" }),
    }
}

/// Checks that `path` is a folder in which no other user can make files.
fn owned_folder(path: &Path) -> Result<(), FolderError> {
    let not = |what| Err(FolderError::NotFree { path: path.to_owned(), what });
    let found = fs::symlink_metadata(path).map_err(|error| FolderError::Make(path.to_owned(), error))?;
    if !found.is_dir() {
        not("no folder")
    } else if found.uid() != rustix::process::geteuid().as_raw() {
        not("another user's")
    } else if found.mode() & 0o022 != 0 {
        not("writable by other users")
    } else {
        Ok(())
    }
}

fn numbered(base: &Path) -> Result<PathBuf, FolderError> {
    match make(base) {
        Err(FolderError::Make(_, error)) if error.kind() == io::ErrorKind::AlreadyExists => owned_folder(base)?,
        made => made?,
    }
    let names = fs::read_dir(base).map_err(|error| FolderError::Make(base.to_owned(), error))?;
    let number = |entry: fs::DirEntry| entry.file_name().to_str()?.parse::<u32>().ok();
    let mut next =
        names.flatten().filter_map(number).filter(|number| *number < MAX_RUNS).max().map_or(1, |last| last + 1);
    loop {
        let path = base.join(next.to_string());
        match make(&path) {
            Err(FolderError::Make(_, error)) if error.kind() == io::ErrorKind::AlreadyExists && next < MAX_RUNS => {
                next += 1;
            }
            made => return made.map(|()| path),
        }
    }
}

/// The name of a test's folder. The number keeps it apart from all others.
fn folder_name(place: usize, name: &str) -> String {
    let plain = |c: char| if c.is_ascii_alphanumeric() || "._=+-".contains(c) { c } else { '_' };
    let name: String = name.chars().map(plain).take(NAME_BYTES).collect();
    format!("{:05}-{name}", place + 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::os::unix::fs::{PermissionsExt, symlink};

    #[test]
    fn only_a_folder_of_ones_own_is_used() {
        let folder = tempfile::tempdir().expect("a folder");
        let at = |name: &str| folder.path().join(name);
        let made = ResultFolder::create(Some(&at("new"))).expect("made");
        assert_eq!(fs::metadata(made.path()).expect("there").mode() & 0o777, 0o700);
        ResultFolder::create(Some(&at("new"))).expect("an empty one is used");
        made.write("file", "text").expect("written");
        assert!(made.write("file", "text").is_err(), "a file is not replaced");
        symlink(at("new"), at("link")).expect("linked");
        fs::create_dir(at("open")).expect("made");
        fs::set_permissions(at("open"), fs::Permissions::from_mode(0o777)).expect("set");
        fs::write(at("file"), "").expect("written");
        for (name, words) in
            [("new", "not empty"), ("link", "no folder"), ("open", "writable by other"), ("file", "no folder")]
        {
            let error = ResultFolder::create(Some(&at(name))).expect_err("refused").to_string();
            assert!(error.contains(words), "{error}");
        }
        assert!(ResultFolder::create(Some(&at("none/deeper"))).is_err());
    }

    #[test]
    fn each_run_has_a_number() {
        let folder = tempfile::tempdir().expect("a folder");
        let base = folder.path().join("results");
        assert!(numbered(&base).expect("made").ends_with("results/1"));
        fs::create_dir(base.join("7")).expect("made");
        fs::write(base.join("notes"), "").expect("written");
        symlink("/nowhere", base.join("8")).expect("linked");
        assert!(numbered(&base).expect("made").ends_with("results/9"));
        let results = ResultFolder { path: base };
        assert!(results.of_try(3, "a/../b", 1).expect("made").ends_with("00004-a_.._b/try-1"));
        assert!(results.of_try(3, "a/../b", 2).is_ok());
        assert!(results.of_try(3, "a/../b", 2).is_err());
    }

    proptest! {
        #[test]
        fn folders_of_tests_are_apart_and_plain(one in ".*", other in ".*", place in 0_usize..100_000) {
            let name = folder_name(place, &one);
            prop_assert!(name.len() <= NAME_BYTES + 20 && !name.contains(['/', '\0']) && name.is_ascii());
            prop_assert_ne!(name, folder_name(place + 1, &other));
        }
    }
}
