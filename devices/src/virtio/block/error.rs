//! Errors of opening a disk image.

use super::lock::{LockConflict, lock_remedy};
use super::magic::ForeignFormat;
use super::qcow2::{NamedFileError, Qcow2Error};
use super::request::SECTOR_BYTES;
use crate::path_text::PathText as _;
use std::fmt;
use std::io;
use std::path::PathBuf;
use thiserror::Error;

/// What a file is to the image whose header names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileRole {
    /// It has what the image does not have.
    Backing,
    /// It has the image's data.
    Data,
}

impl fmt::Display for FileRole {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Backing => "backing file",
            Self::Data => "data file",
        })
    }
}

/// An image cannot be opened.
#[derive(Debug, Error)]
pub enum ImageError {
    /// The file cannot be opened.
    #[error("cannot open the disk {} for {}{}", .path.shown(), if *.read_only { "reading" } else { "reading and writing" }, open_remedy(.source, *.read_only))]
    Open {
        /// Path of the image.
        path: PathBuf,
        /// The image was opened for reading only.
        read_only: bool,
        /// The error of the system call.
        source: io::Error,
    },
    /// The path is neither a file nor a block device.
    #[error("the disk {} is neither a file nor a block device", .0.shown())]
    Kind(PathBuf),
    /// Another process has locked the image.
    #[error("the disk {} is in use: {conflict} (`fuser -v FILE` shows who has it open)", .path.shown())]
    Locked {
        /// Path of the image.
        path: PathBuf,
        /// What the other process excludes.
        conflict: LockConflict,
    },
    /// The host cannot lock the image.
    #[error("cannot lock the disk {}{}", .path.shown(), lock_remedy(.source))]
    Lock {
        /// Path of the image.
        path: PathBuf,
        /// The error of fcntl(2) or flock(2).
        source: io::Error,
    },
    /// The size is not a multiple of the sector size.
    #[error("the disk {} has {bytes} bytes, which is not a multiple of {SECTOR_BYTES}: `truncate -s %512 FILE` extends it to one", .path.shown())]
    Size {
        /// Path of the image.
        path: PathBuf,
        /// Size of the file in bytes.
        bytes: u64,
    },
    /// The qcow2 image is damaged or not supported.
    #[error("the qcow2 image {} cannot be used", .path.shown())]
    Qcow2 {
        /// Path of the image.
        path: PathBuf,
        /// What is wrong with it.
        source: Qcow2Error,
    },
    /// The header of a qcow2 image whose format was detected names another file.
    #[error("the disk {} begins as a qcow2 image with the {role} '{name}'. The format was detected, and a guest can have written this header to a raw disk: the file is not opened. format=raw keeps the disk raw; an image that you made needs format=qcow2", .path.shown())]
    NamesFile {
        /// Path of the image.
        path: PathBuf,
        /// What the named file is to the image.
        role: FileRole,
        /// The name in the header.
        name: String,
    },
    /// A file that the image needs cannot be used.
    #[error("the qcow2 image {} needs the {role} '{name}'", .image.shown())]
    NamedFile {
        /// Path of the image.
        image: PathBuf,
        /// What the file is to the image.
        role: FileRole,
        /// Its name in the header, or on the command line.
        name: String,
        /// Why it cannot be used.
        source: NamedFileError,
    },
    /// The first or the last sector cannot be read.
    #[error("cannot read the first and the last sector of the disk {}, which tell its format", .path.shown())]
    Detect {
        /// Path of the image.
        path: PathBuf,
        /// The error of the read.
        source: io::Error,
    },
    /// The image has the magic number of a format that this program does not know.
    #[error("the disk {} is a {format} image, which is not supported: `qemu-img convert -O qcow2 FILE NEW` converts it; if its first or last sector, which says so, is the disk's own content, say format=raw", .path.shown())]
    Foreign {
        /// Path of the image.
        path: PathBuf,
        /// The format that the image's first or last sector names.
        format: ForeignFormat,
    },
    /// Type or size of the file cannot be read.
    #[error("cannot get type and size of the disk {}", .path.shown())]
    Stat {
        /// Path of the image.
        path: PathBuf,
        /// The error of the system call.
        source: io::Error,
    },
}

/// Returns advice on a disk that cannot be opened, to append to a message; empty where there is none.
fn open_remedy(error: &io::Error, read_only: bool) -> &'static str {
    match error.kind() {
        io::ErrorKind::NotFound => " (check the path; `truncate -s 1G FILE` makes an empty disk)",
        io::ErrorKind::PermissionDenied if read_only => " (check its permissions)",
        io::ErrorKind::PermissionDenied => " (check its permissions; set readonly=on if you can only read it)",
        io::ErrorKind::ReadOnlyFilesystem => " (it can only be read: set readonly=on)",
        io::ErrorKind::IsADirectory => " (a disk is a file or a block device)",
        _ => "",
    }
}
