//! Why an initramfs cannot be made.

use super::cpio::CpioError;
use super::modules::ModulesError;
use crate::bounded_read::ReadError;
use hwvmm_devices::path_text::PathText as _;
use std::ffi::OsString;
use std::io;
use std::path::PathBuf;
use thiserror::Error;

/// Why an initramfs cannot be made.
#[derive(Debug, Error)]
pub enum InitramfsError {
    /// The kernel cannot be read.
    #[error("cannot read the release of the kernel {}", .path.shown())]
    Release {
        /// The kernel file on the host.
        path: PathBuf,
        /// The error of the read.
        source: io::Error,
    },
    /// `--modules` is given, and the kernel does not say its release.
    #[error("the kernel {} does not say its release, which names the folder of its modules: leave out --modules", .0.shown())]
    NoRelease(PathBuf),
    /// The modules cannot be had.
    #[error(transparent)]
    Modules(#[from] ModulesError),
    /// A path or a file does not fit into the archive.
    #[error(transparent)]
    Cpio(#[from] CpioError),
    /// A file to put cannot be read.
    #[error("--put: cannot read {}", .path.shown())]
    Put {
        /// The file on the host.
        path: PathBuf,
        /// The error of the read.
        source: ReadError,
    },
    /// A file to put is where hwvmm has its own.
    #[error("--put: {} is hwvmm's own in the guest: choose another path", .0.shown())]
    Reserved(PathBuf),
    /// A file to put is a device, a FIFO or a socket.
    #[error("--put: {} is not a file, a folder or a symbolic link", .0.shown())]
    Special(PathBuf),
    /// A folder to put was changed while it was read.
    #[error("--put: {} is outside of its folder: a link has taken the place of a part of its path", .0.shown())]
    Outside(PathBuf),
    /// A part of the command has a NUL.
    #[error("{0:?} has a NUL character, which neither arguments nor paths can have")]
    Nul(OsString),
    /// There is more than an initramfs may have.
    #[error("{what} more than {max_bytes} bytes")]
    TooMuch {
        /// What is too large, with its verb, as the message begins.
        what: &'static str,
        /// The most that is allowed, in bytes.
        max_bytes: usize,
    },
    /// A folder to put has too many files.
    #[error("--put: more than {0} files")]
    TooMany(usize),
}
