//! What the parent hands to the machine's process.

use super::kernel_log::KernelLogTarget;
use crate::boot::KernelFile;
use crate::boot::initramfs::TerminalSize;
use crate::config::RunConfig;
use crate::kvm::System;
use crate::machine::Stdin;
use crate::probe::Mmu;
use crate::snapshot::{self, Opened, RecordingFolder};
use std::error::Error;
use std::time::Instant;

/// A check of the host's KVM for the kernel.
pub type Check<'a> = dyn Fn(&System, &KernelFile) -> Result<(), Box<dyn Error>> + 'a;

/// What a machine's process is to do.
pub struct Plan<'a> {
    /// The configuration of the machine.
    pub config: &'a RunConfig,
    /// How the host translates guest addresses.
    pub mmu: Mmu,
    /// The snapshot that the guest goes on from, in place of a kernel.
    pub snapshot: Option<&'a Opened>,
    /// The message with the command, for a guest that waits for it; empty for others.
    pub late_command: Vec<u8>,
    /// Where the guest is saved: when it is ready for a command (`--template`), or at the moment of `--snapshot-at`.
    pub save_to: Option<snapshot::Files>,
    /// Where the pages of memory are written down that the guest uses.
    pub recording: Option<&'a RecordingFolder>,
    /// The pattern of `--expect`, or that of `--snapshot-at`.
    pub expect: Option<regex::bytes::Regex>,
    /// The kind of stdin.
    pub stdin: Stdin,
    /// The size of the user's terminal, where the guest's command gets one.
    pub terminal: Option<TerminalSize>,
    /// Where the kernel's log goes, if the guest runs a command.
    pub kernel_log: KernelLogTarget<'a>,
    /// When the run ends at the latest.
    pub deadline: Option<Instant>,
    /// Called in the machine's process before the machine is made: an error ends the run.
    pub check: &'a Check<'a>,
    /// Called with a message before anything that takes long.
    pub progress: &'a dyn Fn(&str),
}
