//! Reading the files that a guest is made of.

use super::error::{FileRole, KernelError};
use crate::bounded_read::{OpenError, open_regular};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// Opens the regular file at `path`.
///
/// # Errors
/// [`KernelError::Read`], and [`KernelError::NotFile`] for a directory, a device or a FIFO.
pub(crate) fn open(role: FileRole, path: &Path) -> Result<File, KernelError> {
    open_regular(path).map_err(|error| match error {
        OpenError::Io(source) => KernelError::Read { role, path: path.to_owned(), source },
        OpenError::Kind => KernelError::NotFile { role, path: path.to_owned() },
    })
}

/// Reads the start of `file` into `buffer`. Returns the number of bytes, which is less than the buffer's size only where
/// the file is shorter.
pub(super) fn read_start(file: &File, buffer: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match file.read_at(&mut buffer[filled..], filled as u64)? {
            0 => break,
            count => filled += count,
        }
    }
    Ok(filled)
}
