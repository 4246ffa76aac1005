//! What the clones of a snapshot are to do.

use std::ffi::OsString;
use std::sync::atomic::AtomicUsize;
use std::time::Duration;

/// What [`run_clones`](super::run_clones) is to do.
pub struct ClonePlan<'a> {
    /// The number of clones.
    pub count: u32,
    /// How many of them run at once at most. There are fewer where the host has no memory, process or file for more.
    pub at_once: u32,
    /// The most memory that one takes, in bytes.
    pub most_bytes: u64,
    /// The arguments of `hwvmm run` for the clone with this number, from 0.
    pub arguments: &'a dyn Fn(u32) -> Vec<OsString>,
    /// How long each may run. It is to end by itself; this process waits a bit longer, and kills it then.
    pub timeout: Duration,
    /// Not 0 when all are to end.
    pub interrupted: &'a AtomicUsize,
    /// Takes the output of a clone, as it comes.
    pub on_output: &'a dyn Fn(u32, CloneOutput<'_>),
}

/// A line of a clone with its end, or a part of one that is longer than 64 KiB.
pub enum CloneOutput<'a> {
    /// Of stdout: the guest's console, or its command's.
    Line(&'a [u8]),
    /// Of stderr: messages of hwvmm, and the command's.
    Error(&'a [u8]),
}
