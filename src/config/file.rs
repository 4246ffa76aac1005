//! `--config` files.

use super::RunOptions;
use std::io;
use std::path::{Path, PathBuf};
use thiserror::Error;

/// A file that cannot be used.
#[derive(Debug, Error)]
pub enum FileError {
    /// It cannot be read.
    #[error("cannot read the configuration {}", .0.display())]
    Read(PathBuf, #[source] io::Error),
    /// It is not right.
    #[error("{path}: {what}", path = .0.display(), what = .1)]
    Content(PathBuf, String),
}

/// Reads the options in a TOML file.
///
/// # Errors
/// Where the file cannot be read, is no TOML, or has keys that do not exist.
pub fn read(path: &Path) -> Result<RunOptions, FileError> {
    let text = std::fs::read_to_string(path).map_err(|error| FileError::Read(path.to_owned(), error))?;
    toml::from_str(&text).map_err(|error| FileError::Content(path.to_owned(), error.to_string().trim_end().to_owned()))
}
