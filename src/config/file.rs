//! Files of options (`--config`).

use super::RunOptions;
use std::io;
use std::path::{Path, PathBuf};
use thiserror::Error;

/// A file of options that cannot be used.
#[derive(Debug, Error)]
pub enum FileError {
    /// The file cannot be read.
    #[error("cannot read the configuration {}", .0.display())]
    Read(PathBuf, #[source] io::Error),
    /// The file is not TOML, or has an option or a value that does not exist.
    #[error("{}", .0.display())]
    Content(PathBuf, #[source] toml::de::Error),
}

/// Reads the options in a TOML file. Keys are the long names of the options.
///
/// # Errors
/// Returns an error if the file cannot be read, is not TOML, or has keys or values that do not exist.
pub fn read(path: &Path) -> Result<RunOptions, FileError> {
    let text = std::fs::read_to_string(path).map_err(|error| FileError::Read(path.to_owned(), error))?;
    toml::from_str(&text).map_err(|error| FileError::Content(path.to_owned(), error))
}
