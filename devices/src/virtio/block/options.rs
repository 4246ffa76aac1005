//! How a block device is made.

use std::path::PathBuf;

/// What a write does when the host's file system is full.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum WhenFull {
    /// The guest gets an I/O error (QEMU: `werror=report`).
    #[default]
    Report,
    /// The request waits until there is space again.
    Stop,
}

/// What is done with a disk that may have been written since a snapshot was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum WhenChanged {
    /// It is refused.
    #[default]
    Refuse,
    /// It is taken: the user knows that it has what it had.
    Accept,
}

/// When written data must be on stable storage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Durability {
    /// When a flush completes: write-back.
    OnFlush,
    /// When the write completes: write-through.
    EachWrite,
}

/// How requests access a raw image.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum IoEngine {
    /// Asynchronously by io_uring, where the host has it; otherwise as [`IoEngine::Sync`].
    #[default]
    Async,
    /// By blocking system calls on the queue's thread.
    Sync,
}

/// How the device is made.
#[derive(Clone, Debug)]
pub struct BlockOptions {
    /// Number of queues, 1 to 64.
    pub queues: u16,
    /// The serial number, of which the guest sees the first 20 bytes (virtio 1.3 §5.2.6.1).
    pub serial: String,
    /// What a write does when the host's file system is full.
    pub when_full: WhenFull,
    /// How requests access a raw image.
    pub io_engine: IoEngine,
}

/// The format of an image.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Format {
    /// Detected when the image is opened. [`ImageOptions::detect`] gives the result, with which the image can be opened again
    /// after a guest has written to it.
    #[default]
    Auto,
    /// The bytes of the file are the bytes of the disk.
    Raw,
    /// As [`Format::Raw`], by detection. The guest cannot write the magic number of another format to the disk.
    DetectedRaw,
    /// qcow2, with backing files.
    Qcow2,
    /// qcow2, by detection. As a guest can have written the header to a raw image, no other file is opened for it.
    DetectedQcow2,
}

/// How an image is opened.
#[derive(Clone, Debug)]
pub struct ImageOptions {
    /// Path of the file or block device.
    pub path: PathBuf,
    /// Format of the image.
    pub format: Format,
    /// Open the image for reading only; the guest sees a read-only disk.
    pub read_only: bool,
    /// Bypass the host's page cache (`O_DIRECT`).
    pub direct: bool,
    /// Path of the data file of a qcow2 image that has one; the name in its header is not used.
    pub data_file: Option<PathBuf>,
}
