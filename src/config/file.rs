//! Files of options (`--config`).

use super::RunOptions;
use crate::bounded_read::{self, ReadError};
use hwvmm_devices::path_text::PathText as _;
use std::path::{Path, PathBuf};
use thiserror::Error;

/// The largest file of options, in bytes.
const MAX_BYTES: u64 = 1 << 20;

/// A file of options that cannot be used.
#[derive(Debug, Error)]
pub enum FileError {
    /// The file cannot be read.
    #[error("cannot read the configuration {}", .0.shown())]
    Read(PathBuf, #[source] ReadError),
    /// The file is larger than any file of options: perhaps a device, or a disk image.
    #[error("the configuration {} has more than {MAX_BYTES} bytes", .0.shown())]
    TooLarge(PathBuf),
    /// The file is not TOML, or has an option or a value that does not exist.
    #[error("{}", .0.shown())]
    Content(PathBuf, #[source] toml::de::Error),
}

/// Reads the options in a TOML file. Keys are the long names of the options.
///
/// # Errors
/// Returns an error if the file cannot be read, is not TOML, or has keys or values that do not exist.
pub fn read(path: &Path) -> Result<RunOptions, FileError> {
    let text = bounded_read::read_text(path, MAX_BYTES).map_err(|error| match error {
        ReadError::TooLarge { .. } => FileError::TooLarge(path.to_owned()),
        error => FileError::Read(path.to_owned(), error),
    })?;
    parse(path, &text)
}

/// The options in `text`, the content of the file at `path`, which is for messages only.
///
/// # Errors
/// Returns an error if the text is too long, is not TOML, or has keys or values that do not exist.
pub fn parse(path: &Path, text: &str) -> Result<RunOptions, FileError> {
    if text.len() as u64 > MAX_BYTES {
        return Err(FileError::TooLarge(path.to_owned()));
    }
    toml::from_str(text).map_err(|error| FileError::Content(path.to_owned(), error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_without_end_is_refused() {
        let error = read(Path::new("/dev/zero")).expect_err("refused").to_string();
        assert!(error.contains("/dev/zero has more than 1048576 bytes"), "{error}");
    }
}
