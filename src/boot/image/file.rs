//! Reading a file of an image: why it fails, and copying in pieces.

use ext4_view::Ext4Error;
use std::error::Error;
use std::io::{self, Write};
use thiserror::Error;

/// Bytes that are copied at once.
const PIECE: usize = 64 << 10;
/// The longest path in bytes (PATH_MAX).
pub(super) const PATH_BYTES: usize = 4096;

/// Why a file of an image cannot be read.
#[derive(Debug, Error)]
pub(super) enum FileError {
    /// There is no such file.
    #[error("there is no such file")]
    NotFound,
    /// It is a folder, or another thing that is no file.
    #[error("it is no regular file")]
    Kind,
    /// It is larger than such a file may be.
    #[error("it has {bytes} bytes, and hwvmm reads at most {limit}")]
    TooLarge {
        /// The size that the file system gives.
        bytes: u64,
        /// The largest size that is read.
        limit: u64,
    },
    /// The file system is damaged, or has a feature that the reader does not know.
    #[error("the file system cannot be read: {0}")]
    Read(String),
    /// The file that it is copied to cannot be written.
    #[error("it cannot be copied: {0}")]
    Write(io::Error),
}

fn damaged(error: &dyn Error) -> FileError {
    let mut text = error.to_string();
    if let Some(source) = error.source() {
        text = format!("{text}: {source}");
    }
    FileError::Read(text)
}

impl From<Ext4Error> for FileError {
    fn from(error: Ext4Error) -> Self {
        match error {
            Ext4Error::NotFound => Self::NotFound,
            Ext4Error::IsADirectory | Ext4Error::IsASpecialFile | Ext4Error::NotADirectory => Self::Kind,
            error => damaged(&error),
        }
    }
}

impl From<io::Error> for FileError {
    fn from(error: io::Error) -> Self {
        if error.kind() == io::ErrorKind::NotFound { Self::NotFound } else { damaged(&error) }
    }
}

/// Copies until there is no more.
pub(super) fn copy_pieces(
    limit: u64,
    out: &mut dyn Write,
    mut read: impl FnMut(&mut [u8]) -> Result<usize, FileError>,
) -> Result<u64, FileError> {
    let (mut piece, mut done) = (vec![0; PIECE], 0_u64);
    loop {
        let count = read(&mut piece)?;
        if count == 0 {
            return Ok(done);
        }
        done += count as u64;
        if done > limit {
            return Err(FileError::TooLarge { bytes: done, limit });
        }
        out.write_all(piece.get(..count).unwrap_or_default()).map_err(FileError::Write)?;
    }
}
