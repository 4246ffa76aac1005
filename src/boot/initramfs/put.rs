//! Files of the host that the initramfs has (`--put`).

use super::cpio::Archive;
use super::error::InitramfsError;
use crate::bounded_read::{OpenError, ReadError, open_regular, path_of};
use std::fs;
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

/// The most bytes of all files together: they are memory of the guest, twice while it unpacks them.
const MAX_BYTES: usize = 1 << 30;
/// The most files, folders and links.
const MAX_FILES: usize = 65_536;
/// Paths of the guest that are hwvmm's own.
const RESERVED: [&str; 4] = ["/init", "/hwvmm", "/dev", "/proc"];

/// A file or a folder of the host, and where it is in the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Put {
    /// The file or folder on the host.
    pub source: PathBuf,
    /// An absolute path of the guest.
    pub target: PathBuf,
}

/// Adds them all, folders with what is in them.
pub(super) fn all(archive: &mut Archive, put: &[Put]) -> Result<(), InitramfsError> {
    let mut files = 0;
    // Folders wait in a list: a deep tree does not fill the stack.
    for one in put {
        let mut waiting = vec![one.clone()];
        // The path that the user gives may be a link; links in a folder stay links, and no file is outside of it.
        let mut home: Option<PathBuf> = None;
        while let Some(next) = waiting.pop() {
            files += 1;
            waiting.extend(add(archive, &next, home.as_deref())?);
            if files + waiting.len() > MAX_FILES {
                return Err(InitramfsError::TooMany(MAX_FILES));
            }
            if home.is_none() {
                let resolved = one.source.canonicalize();
                home = Some(
                    resolved.map_err(|error| InitramfsError::Put { path: one.source.clone(), source: error.into() })?,
                );
            }
        }
    }
    Ok(())
}

/// Adds one entry, and returns those that are in it. `home` is the folder that it comes from, links resolved; `None` for the one that the
/// user has named.
fn add(archive: &mut Archive, put: &Put, home: Option<&Path>) -> Result<Vec<Put>, InitramfsError> {
    let (source, target) = (&put.source, &put.target);
    let failed = |error: ReadError| InitramfsError::Put { path: source.clone(), source: error };
    if RESERVED.iter().any(|reserved| target.starts_with(reserved)) {
        return Err(InitramfsError::Reserved(target.clone()));
    }
    let metadata = if home.is_none() { fs::metadata(source) } else { fs::symlink_metadata(source) }
        .map_err(|error| failed(error.into()))?;
    let kind = metadata.file_type();
    if kind.is_dir() {
        if target != Path::new("/") {
            archive.folder(target)?;
        }
        let mut names = fs::read_dir(source)
            .and_then(|entries| {
                entries.take(MAX_FILES + 1).map(|entry| Ok(entry?.file_name())).collect::<Result<Vec<_>, _>>()
            })
            .map_err(|error| failed(error.into()))?;
        names.sort_unstable();
        return Ok(names
            .into_iter()
            .rev()
            .map(|name| Put { source: source.join(&name), target: target.join(&name) })
            .collect());
    }
    if kind.is_symlink() {
        let to = fs::read_link(source).map_err(|error| failed(error.into()))?;
        archive.link(target, &to)?;
    } else if kind.is_file() {
        let left = MAX_BYTES.saturating_sub(archive.size()) as u64;
        let file = open_regular(source).map_err(|error| match error {
            OpenError::Kind => InitramfsError::Special(source.clone()),
            OpenError::Io(error) => failed(error.into()),
        })?;
        // Another user who can write to the folder could have any file of the host put into the guest.
        if let Some(home) = home
            && !path_of(&file).map_err(|error| failed(error.into()))?.starts_with(home)
        {
            return Err(InitramfsError::Outside(source.clone()));
        }
        let mut bytes = Vec::new();
        file.take(left + 1).read_to_end(&mut bytes).map_err(|error| failed(error.into()))?;
        if bytes.len() as u64 > left {
            return Err(InitramfsError::TooMuch { what: "--put: the files have", max_bytes: MAX_BYTES });
        }
        archive.file(target, metadata.permissions().mode(), &bytes)?;
    } else {
        return Err(InitramfsError::Special(source.clone()));
    }
    Ok(Vec::new())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A folder was a folder when its names were read.
    #[test]
    fn a_link_that_takes_the_place_of_a_folder_leads_nowhere() {
        let (folder, other) = (tempfile::tempdir().expect("a folder"), tempfile::tempdir().expect("a folder"));
        fs::write(other.path().join("secret"), "secret").expect("written");
        std::os::unix::fs::symlink(other.path(), folder.path().join("d")).expect("linked");
        let home = folder.path().canonicalize().expect("there");
        let one = Put { source: folder.path().join("d/secret"), target: "/d/secret".into() };
        let added = add(&mut Archive::default(), &one, Some(&home));
        assert!(matches!(added, Err(InitramfsError::Outside(_))), "{added:?}");
        let own = Put { source: other.path().join("secret"), target: "/d/secret".into() };
        let home = other.path().canonicalize().expect("there");
        assert!(add(&mut Archive::default(), &own, Some(&home)).is_ok());
    }

    fn put(source: &Path, target: &str) -> Result<Vec<u8>, InitramfsError> {
        let mut archive = Archive::default();
        all(&mut archive, &[Put { source: source.to_owned(), target: target.into() }])?;
        Ok(archive.finish()?)
    }

    #[test]
    fn folders_come_with_what_is_in_them() {
        let folder = tempfile::tempdir().expect("a folder");
        fs::create_dir(folder.path().join("d")).expect("made");
        fs::write(folder.path().join("d/file"), b"contents").expect("written");
        std::os::unix::fs::symlink("file", folder.path().join("d/link")).expect("linked");
        let bytes = put(folder.path(), "/opt/x").expect("bytes");
        let has = |text: &[u8]| memchr::memmem::find(&bytes, text).is_some();
        assert!(has(b"opt/x/d/file\0") && has(b"contents") && has(b"opt/x/d/link\0"));
    }

    #[test]
    fn what_cannot_be_put_is_refused() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        for target in ["/init", "/hwvmm/instructions", "/dev/x"] {
            assert!(matches!(put(file.path(), target), Err(InitramfsError::Reserved(_))), "{target}");
        }
        assert!(matches!(put(file.path(), "/a/../init"), Err(InitramfsError::Cpio(_))));
        assert!(matches!(put(Path::new("/dev/zero"), "/a"), Err(InitramfsError::Special(_))));
        assert!(matches!(put(Path::new("/nothere"), "/a"), Err(InitramfsError::Put { .. })));
    }
}
