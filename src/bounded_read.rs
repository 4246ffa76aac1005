//! Files that a user names, read into memory with a limit: a device or a pipe without an end takes no more than that.

use rustix::fs::OFlags;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use thiserror::Error;

/// A file could not be read whole.
#[derive(Debug, Error)]
pub enum ReadError {
    /// It cannot be opened or read.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// It has more bytes than a file of its kind can have.
    #[error("it has more than {max_bytes} bytes")]
    TooLarge {
        /// The limit in bytes.
        max_bytes: u64,
    },
}

/// A file that must be a regular one cannot be opened.
#[derive(Debug, Error)]
pub enum OpenError {
    /// It cannot be opened.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// It is a folder, a FIFO, a socket or a device.
    #[error("it is not a regular file")]
    Kind,
}

/// Opens the regular file at `path` for reading. The type is looked at first: opening a FIFO waits for its writer, and opening a device
/// can do anything. O_NONBLOCK keeps the open from waiting where the file is replaced meanwhile.
///
/// # Errors
/// [`OpenError`].
pub fn open_regular(path: &Path) -> Result<File, OpenError> {
    if !std::fs::metadata(path)?.is_file() {
        return Err(OpenError::Kind);
    }
    let flags = OFlags::NONBLOCK | OFlags::NOCTTY;
    let flags = i32::try_from(flags.bits()).unwrap_or(0);
    let file = File::options().read(true).custom_flags(flags).open(path)?;
    if file.metadata()?.is_file() { Ok(file) } else { Err(OpenError::Kind) }
}

/// The path of an open file, links resolved: what was opened, whatever has taken the place of a part of the path since.
///
/// # Errors
/// Where there is no /proc.
pub fn path_of(file: &File) -> io::Result<PathBuf> {
    std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()))
}

/// Reads the file at `path`, which may have `max_bytes` bytes. The size that the file system tells is not asked for: it
/// is 0 for devices, pipes and files of /proc.
///
/// # Errors
/// [`ReadError`].
pub fn read(path: &Path, max_bytes: u64) -> Result<Vec<u8>, ReadError> {
    let mut bytes = Vec::new();
    File::open(path)?.take(max_bytes.saturating_add(1)).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > max_bytes {
        return Err(ReadError::TooLarge { max_bytes });
    }
    Ok(bytes)
}

/// Reads the UTF-8 text in the file at `path`, which may have `max_bytes` bytes.
///
/// # Errors
/// [`ReadError`]; text that is not UTF-8 is [`io::ErrorKind::InvalidData`].
pub fn read_text(path: &Path, max_bytes: u64) -> Result<String, ReadError> {
    let bytes = read(path, max_bytes)?;
    String::from_utf8(bytes).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error).into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_without_an_end_is_refused() {
        let error = read(Path::new("/dev/zero"), 1 << 16).expect_err("refused");
        assert_eq!(error.to_string(), "it has more than 65536 bytes");
    }

    #[test]
    fn what_is_no_regular_file_is_not_waited_for() {
        let folder = tempfile::tempdir().expect("a folder");
        let fifo = folder.path().join("fifo");
        rustix::fs::mkfifoat(rustix::fs::CWD, &fifo, rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR).expect("made");
        for path in [&*fifo, folder.path(), Path::new("/dev/null")] {
            assert!(matches!(open_regular(path), Err(OpenError::Kind)), "{}", path.display());
        }
        assert!(matches!(open_regular(&folder.path().join("none")), Err(OpenError::Io(_))));
        let file = folder.path().join("file");
        std::fs::write(&file, "text").expect("written");
        assert_eq!(io::read_to_string(open_regular(&file).expect("opened")).expect("read"), "text");
    }

    #[test]
    fn the_limit_is_the_largest_size() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        std::fs::write(file.path(), b"abc\xff").expect("written");
        assert_eq!(read(file.path(), 4).expect("read"), b"abc\xff");
        assert!(matches!(read(file.path(), 3), Err(ReadError::TooLarge { max_bytes: 3 })));
        assert!(matches!(read_text(file.path(), 4), Err(ReadError::Io(_))));
    }
}
