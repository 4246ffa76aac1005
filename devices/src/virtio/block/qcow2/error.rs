//! Errors of qcow2 images.

use super::super::lock::{LockConflict, LockError, lock_remedy};
use std::fmt;
use std::io;
use thiserror::Error;

/// A table of a qcow2 image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Table {
    /// Where the L2 tables are.
    L1,
    /// Where the clusters of the disk are.
    L2,
    /// Where the refcount blocks are.
    Refcount,
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::L1 => "L1 table",
            Self::L2 => "L2 table",
            Self::Refcount => "refcount table",
        })
    }
}

/// A qcow2 image is damaged, or needs what is not supported.
#[derive(Debug, Error)]
pub enum Qcow2Error {
    /// A part of the file cannot be read.
    #[error("cannot read {bytes} bytes at {at:#x}")]
    Read {
        /// Offset in the file, in bytes.
        at: u64,
        /// Number of bytes that were to be read.
        bytes: usize,
        /// The error of the read.
        source: io::Error,
    },
    /// The image cannot be opened once more for its check, read-only.
    #[error("cannot open it again for reading; is /proc mounted?")]
    Reopen(#[source] io::Error),
    /// A field of the header has a value that it cannot have.
    #[error("{field} in its header is {value:#x}: it must be {rule}")]
    Field {
        /// The name of the field in QEMU's specification (docs/interop/qcow2.txt).
        field: &'static str,
        /// The value of the field in the image.
        value: u64,
        /// What it must be.
        rule: &'static str,
    },
    /// The image is encrypted.
    #[error("it is encrypted (crypt_method {0}): `qemu-img convert` makes an image that is not")]
    Encrypted(u32),
    /// An incompatible feature is set.
    #[error("it has the incompatible feature '{}' (bit {}){}", .0.name(), .0.0, .0.remedy())]
    Feature(FeatureBit),
    /// The header names a file that this image would need, and that is not given on the command line.
    #[error("it keeps its data in another file, {}: data-file=PATH says which file that is", named(.0.as_deref()))]
    DataFileNotGiven(Option<String>),
    /// A data file is given for an image without one.
    #[error("it keeps its data itself: leave out data-file")]
    NoDataFile,
    /// An entry of a table has a value that it cannot have.
    #[error("entry {index} of the {table} is {entry:#x}: {rule}; {CHECK}")]
    Entry {
        /// The table that the entry belongs to.
        table: Table,
        /// Index of the entry; for an L2 table, counted from the start of the disk.
        index: u64,
        /// The value of the entry.
        entry: u64,
        /// What it must be.
        rule: &'static str,
    },
    /// Metadata is used for something else too.
    #[error("the cluster at {at:#x} has metadata, and the {table} uses it once more; {CHECK}")]
    Overlap {
        /// Offset of the cluster in the file, in bytes.
        at: u64,
        /// The table that has the second use.
        table: Table,
    },
    /// The reference count of a cluster does not fit its uses.
    #[error("the cluster at {at:#x} has a reference count of {refcount} and {uses} uses; {CHECK}")]
    Refcount {
        /// Offset of the cluster in the file, in bytes.
        at: u64,
        /// The reference count of the cluster, from a refcount block.
        refcount: u64,
        /// How often the tables refer to it.
        uses: u16,
    },
    /// A cluster that the tables call unshared is shared.
    #[error(
        "the cluster at {at:#x} has a reference count of {refcount}, and its table entry says that it is 1 (bit 63); {CHECK}"
    )]
    Copied {
        /// Offset of the cluster in the file, in bytes.
        at: u64,
        /// The reference count of the cluster, from a refcount block.
        refcount: u64,
    },
    /// The image is larger than this program reads.
    #[error("{what} of {value} is more than {limit}, the limit of this program")]
    TooLarge {
        /// What is too large.
        what: &'static str,
        /// The value of the image, in the unit that `what` names.
        value: u64,
        /// The most that is read.
        limit: u64,
    },
    /// An image whose format was detected counts references to clusters behind the end of its file.
    #[error("the cluster at {at:#x} has a reference count of {refcount} and is behind the end of the file; {CHECK}")]
    BehindEnd {
        /// Offset of the cluster in the file, in bytes.
        at: u64,
        /// The reference count of the cluster, from a refcount block.
        refcount: u64,
    },
    /// imago cannot use the image.
    #[error("imago cannot use it")]
    Imago(#[source] io::Error),
    /// The check of header and tables in another process has found an error: its text.
    #[error("{0}")]
    Found(String),
    /// The process that checks header and tables did not end as it should.
    #[error("the process that reads its header and tables failed")]
    Process(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The process that checks header and tables has sent something else than an answer.
    #[error("the process that reads its header and tables sent no answer that can be read")]
    Answer,
}

/// A file that an image names cannot be used.
#[derive(Debug, Error)]
pub enum NamedFileError {
    /// The name begins with a protocol.
    #[error("names with a protocol are not supported: `qemu-img rebase -u -b PATH -F FORMAT IMAGE` gives it a path")]
    Protocol,
    /// It cannot be opened.
    #[error("it cannot be opened")]
    Open(#[source] io::Error),
    /// It is a folder, a device, a FIFO or a socket.
    #[error("it is not a regular file, and is not opened")]
    Kind,
    /// Another process has locked it.
    #[error("it is in use: {0} (`fuser -v FILE` shows who has it open)")]
    Locked(LockConflict),
    /// The host cannot lock it.
    #[error("it cannot be locked{}", lock_remedy(.0))]
    Lock(#[source] io::Error),
    /// The image, or one of its backing files, is that file.
    #[error("the chain of images has this file already")]
    Loop,
    /// The chain is too long.
    #[error(
        "an image has at most {limit} backing files: `qemu-img commit` or `qemu-img rebase` makes the chain shorter"
    )]
    TooDeep {
        /// The most backing files.
        limit: usize,
    },
    /// The header does not state the format of the backing file.
    #[error(
        "the header does not state its format, which is not guessed: `qemu-img rebase -u -b PATH -F FORMAT IMAGE` states it"
    )]
    NoFormat,
    /// The header states a format that is not supported.
    #[error("its format '{}' is not supported (raw, qcow2)", .0.escape_debug())]
    Format(String),
    /// It is a damaged qcow2 image.
    #[error("it is a qcow2 image that cannot be used")]
    Qcow2(#[source] Qcow2Error),
}

impl From<LockError> for NamedFileError {
    fn from(error: LockError) -> Self {
        match error {
            LockError::Conflict(conflict) => Self::Locked(conflict),
            LockError::Host(source) => Self::Lock(source),
        }
    }
}

/// Advice on damaged tables.
const CHECK: &str = "`qemu-img check -r all FILE` repairs it if it can be repaired";

/// Returns a name of the header as text that does nothing to a terminal.
fn named(name: Option<&str>) -> String {
    name.map_or_else(|| "which it does not name".into(), |name| format!("'{}'", name.escape_debug()))
}

/// The number of a bit of `incompatible_features`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FeatureBit(pub u32);

impl FeatureBit {
    fn name(self) -> &'static str {
        match self.0 {
            0 => "dirty",
            1 => "corrupt",
            2 => "external data file",
            3 => "compression type",
            4 => "extended L2 entries",
            _ => "unknown",
        }
    }

    fn remedy(self) -> &'static str {
        match self.0 {
            0 | 1 => ": `qemu-img check -r all FILE` repairs it",
            3 => {
                ": clusters compressed by zstd are not supported; \
                 `qemu-img convert -c -O qcow2 -o compression_type=zlib FILE NEW` makes an image without them"
            }
            _ => ", which is not supported: `qemu-img convert -O qcow2 FILE NEW` makes an image without it",
        }
    }
}
