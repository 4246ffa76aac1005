//! The archive format of an initramfs: newc (Documentation/driver-api/early-userspace/buffer-format.rst). The same entries
//! always make the same bytes: no times, no owners, inode numbers in a row.

use hwvmm_devices::path_text::PathText as _;
use std::collections::BTreeSet;
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};
use thiserror::Error;

/// Types of inodes (inode(7)).
const FOLDER: u32 = 0o040_000;
const FILE: u32 = 0o100_000;
const LINK: u32 = 0o120_000;
const CHARACTERS: u32 = 0o020_000;
/// The name of the last entry.
const TRAILER: &[u8] = b"TRAILER!!!";
/// The longest name that Linux unpacks, with its NUL (`PATH_MAX`).
const NAME_BYTES: usize = 4096;

/// Why an entry cannot be in an archive.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum CpioError {
    /// The path leads out of the root, or is not absolute, or is the root itself.
    #[error("{} is not an absolute path of a guest without \"..\"", .0.shown())]
    Path(PathBuf),
    /// The path is too long.
    #[error("a path has {0} bytes, and Linux takes {NAME_BYTES}")]
    Name(usize),
    /// The file's size does not fit into the 32 bits that the format has.
    #[error("{} has {bytes} bytes, and an initramfs takes files below 4 GiB", .path.shown())]
    Size {
        /// The path in the guest.
        path: PathBuf,
        /// The size in bytes.
        bytes: usize,
    },
}

/// A character device's number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceNumber {
    /// The major number, which selects the driver.
    pub major: u32,
    /// The minor number, which selects a device of that driver.
    pub minor: u32,
}

/// An archive that is being written.
#[derive(Debug, Default)]
pub struct Archive {
    bytes: Vec<u8>,
    inode: u32,
    folders: BTreeSet<PathBuf>,
}

/// Returns the path without its root and with neither `.` nor repeated slashes.
fn relative(path: &Path) -> Result<PathBuf, CpioError> {
    let wrong = || CpioError::Path(path.to_owned());
    let mut components = path.components();
    if components.next() != Some(Component::RootDir) {
        return Err(wrong());
    }
    let mut out = PathBuf::new();
    for component in components {
        let Component::Normal(name) = component else { return Err(wrong()) };
        if name.as_bytes().contains(&0) {
            return Err(wrong());
        }
        out.push(name);
    }
    let bytes = out.as_os_str().len();
    match bytes {
        0 => Err(wrong()),
        _ if bytes >= NAME_BYTES => Err(CpioError::Name(bytes)),
        _ => Ok(out),
    }
}

impl Archive {
    fn pad(&mut self) {
        let padded = self.bytes.len().next_multiple_of(4);
        self.bytes.resize(padded, 0);
    }

    fn entry(&mut self, name: &[u8], mode: u32, device: DeviceNumber, data: &[u8]) -> Result<(), CpioError> {
        let size = u32::try_from(data.len()).map_err(|_| CpioError::Size {
            path: PathBuf::from(std::ffi::OsStr::from_bytes(name)),
            bytes: data.len(),
        })?;
        let name_bytes = u32::try_from(name.len() + 1).map_err(|_| CpioError::Name(name.len()))?;
        self.inode += 1;
        let links = if mode & FOLDER == FOLDER { 2 } else { 1 };
        // ino, mode, uid, gid, nlink, mtime, filesize, devmajor, devminor, rdevmajor, rdevminor, namesize, check.
        let fields = [self.inode, mode, 0, 0, links, 0, size, 0, 0, device.major, device.minor, name_bytes, 0];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08X}").as_bytes());
        }
        self.bytes.extend_from_slice(name);
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(data);
        self.pad();
        Ok(())
    }

    fn add(&mut self, path: &Path, mode: u32, device: DeviceNumber, data: &[u8]) -> Result<(), CpioError> {
        let path = relative(path)?;
        if let Some(parent) = path.parent() {
            self.folders_down_to(parent)?;
        }
        self.entry(path.as_os_str().as_bytes(), mode, device, data)
    }

    /// Adds the folders on the way to `path`, which has no root, where they are not there yet.
    fn folders_down_to(&mut self, path: &Path) -> Result<(), CpioError> {
        let mut folder = PathBuf::new();
        for part in path {
            folder.push(part);
            if self.folders.insert(folder.clone()) {
                self.entry(folder.as_os_str().as_bytes(), FOLDER | 0o755, NO_DEVICE, &[])?;
            }
        }
        Ok(())
    }

    /// Adds a folder, and those above it.
    ///
    /// # Errors
    /// [`CpioError`].
    pub fn folder(&mut self, path: &Path) -> Result<(), CpioError> {
        let path = relative(path)?;
        self.folders_down_to(&path)
    }

    /// Adds a regular file with the given permission bits, and the folders above it.
    ///
    /// # Errors
    /// [`CpioError`].
    pub fn file(&mut self, path: &Path, permissions: u32, data: &[u8]) -> Result<(), CpioError> {
        self.add(path, FILE | (permissions & 0o7777), NO_DEVICE, data)
    }

    /// Adds a symbolic link to `target`, and the folders above it.
    ///
    /// # Errors
    /// [`CpioError`].
    pub fn link(&mut self, path: &Path, target: &Path) -> Result<(), CpioError> {
        self.add(path, LINK | 0o777, NO_DEVICE, target.as_os_str().as_bytes())
    }

    /// Adds a character device, and the folders above it.
    ///
    /// # Errors
    /// [`CpioError`].
    pub fn device(&mut self, path: &Path, permissions: u32, number: DeviceNumber) -> Result<(), CpioError> {
        self.add(path, CHARACTERS | (permissions & 0o7777), number, &[])
    }

    /// The size so far, in bytes.
    #[must_use]
    pub fn size(&self) -> usize {
        self.bytes.len()
    }

    /// Ends the archive, and returns its bytes.
    ///
    /// # Errors
    /// [`CpioError`].
    pub fn finish(mut self) -> Result<Vec<u8>, CpioError> {
        self.entry(TRAILER, 0, NO_DEVICE, &[])?;
        Ok(self.bytes)
    }
}

const NO_DEVICE: DeviceNumber = DeviceNumber { major: 0, minor: 0 };

#[cfg(test)]
mod tests {
    use super::*;
    use std::ffi::OsStr;

    fn archive() -> Vec<u8> {
        let mut archive = Archive::default();
        archive.device(Path::new("/dev/console"), 0o600, DeviceNumber { major: 5, minor: 1 }).expect("added");
        archive.file(Path::new("/a/b/c"), 0o755, b"12345").expect("added");
        archive.file(Path::new("/a//b/./d"), 0o644, b"").expect("added");
        archive.link(Path::new("/a/l"), Path::new("b/c")).expect("added");
        archive.finish().expect("bytes")
    }

    /// The names, modes and data, read by the format's definition.
    fn read(mut bytes: &[u8]) -> Vec<(String, u32, Vec<u8>)> {
        let mut entries = Vec::new();
        loop {
            assert_eq!(&bytes[..6], b"070701");
            let field = |i: usize| {
                let text = std::str::from_utf8(&bytes[6 + 8 * i..14 + 8 * i]).expect("text");
                u32::from_str_radix(text, 16).expect("a number")
            };
            let (mode, size, name_size) = (field(1), field(6) as usize, field(11) as usize);
            let name = String::from_utf8(bytes[110..110 + name_size - 1].to_vec()).expect("a name");
            assert_eq!(bytes[110 + name_size - 1], 0);
            let start = (110 + name_size).next_multiple_of(4);
            let data = bytes[start..start + size].to_vec();
            bytes = &bytes[(start + size).next_multiple_of(4)..];
            if name == "TRAILER!!!" {
                assert!(bytes.is_empty());
                return entries;
            }
            entries.push((name, mode, data));
        }
    }

    #[test]
    fn entries_are_as_they_were_given() {
        let entries = read(&archive());
        let names: Vec<_> = entries.iter().map(|(name, ..)| name.as_str()).collect();
        assert_eq!(names, ["dev", "dev/console", "a", "a/b", "a/b/c", "a/b/d", "a/l"]);
        let modes: Vec<_> = entries.iter().map(|(_, mode, _)| *mode).collect();
        assert_eq!(modes, [0o40755, 0o20600, 0o40755, 0o40755, 0o100_755, 0o100_644, 0o120_777]);
        assert_eq!(entries[4].2, b"12345");
        assert_eq!(entries[6].2, b"b/c");
        assert_eq!(archive(), archive(), "the same entries make the same bytes");
    }

    #[test]
    fn paths_that_lead_out_are_refused() {
        for path in ["a", "/", "/a/../b", "", "../a", "/a\0b"] {
            let error = Archive::default().file(Path::new(path), 0o644, b"").expect_err("refused");
            assert_eq!(error, CpioError::Path(path.into()));
        }
        let active = CpioError::Path(Path::new(OsStr::from_bytes(b"a\n\x1b[1m\xff")).into()).to_string();
        assert_eq!(active, r#"a\n\u{1b}[1m\xff is not an absolute path of a guest without "..""#, "on one line");
        let long = format!("/{}", "a".repeat(5000));
        assert_eq!(Archive::default().folder(Path::new(&long)), Err(CpioError::Name(5000)));
    }
}
