//! How a block device is made.

/// What a write does when the host's file system is full.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum WhenFull {
    /// The guest gets an I/O error (QEMU: `werror=report`).
    #[default]
    Report,
    /// The request waits until there is space again.
    Stop,
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
