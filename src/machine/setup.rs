//! What a machine is made and run with.

use super::files::Files;
use crate::boot::image::Listed;
use crate::config::RunConfig;
use crate::console::{Announcements, UnreadInput};
use crate::exit::RunEnd;
use crate::measure::FlightRecorders;
use crate::probe::Mmu;
use crate::sandbox::Sandbox;
use crate::snapshot::{self, WorkingSet};
use hwvmm_arch::boot::BootMethod;
use hwvmm_devices::virtio::vsock::Connector;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Instant;

/// The kind of stdin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stdin {
    /// A terminal in raw mode.
    Terminal,
    /// A pipe, a file, or nothing.
    Bytes,
}

/// A start of the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Start {
    /// The first. Files of consoles begin anew.
    First,
    /// One after a reset by the guest (`--on-reboot restart`). Files of consoles go on.
    Again {
        /// What the guest before it had not read.
        unread: UnreadInput,
    },
}

/// A step of a machine, as it happens.
pub enum Event<'a> {
    /// Something that takes long begins: what, for the user.
    Progress(&'a str),
    /// The kernel is that of an entry in the menu of an image's boot loader.
    Entry(&'a Listed),
    /// The machine is complete, and its guest is about to run.
    Started {
        /// How the kernel was loaded and how it is entered.
        boot: BootMethod,
        /// CPU time of this process so far, in nanoseconds.
        startup_cpu_ns: u64,
        /// When that is, in nanoseconds of CLOCK_MONOTONIC.
        started_at_ns: u64,
    },
    /// The guest's pages that it has used since it went on from a snapshot (`--record-working-set`).
    WorkingSet(WorkingSet),
    /// The run has ended. Its threads have yet to be stopped, and its record is yet to be made.
    Ended(&'a RunEnd),
}

/// What a machine is made and run with.
pub struct Setup<'a> {
    /// The configuration of the machine.
    pub config: &'a RunConfig,
    /// How the host translates guest addresses.
    pub mmu: Mmu,
    /// The files that the guest is loaded from.
    pub files: &'a Files,
    /// The pattern of `--expect`, or that of `--snapshot-at`.
    pub expect: Option<regex::bytes::Regex>,
    /// Where the kernel's log goes whose console is on [`crate::config::ConsoleTarget::Log`].
    pub kernel_log: Option<BorrowedFd<'a>>,
    /// What the guest's kernel has announced on its consoles.
    pub announcements: Announcements,
    /// When a console must have had output at the latest.
    pub output_deadline: Option<Instant>,
    /// The kind of stdin.
    pub stdin: Stdin,
    /// Which start of the guest it is.
    pub start: &'a Start,
    /// Where the machine is saved: when that is requested ([`super::StopRequest::Save`]), or at the moment of `--snapshot-at`.
    pub save_to: Option<&'a snapshot::Files>,
    /// A SOCK_SEQPACKET socket on which requests to end the run arrive: one [`super::StopRequest`] in JSON each.
    pub requests: Option<BorrowedFd<'a>>,
    /// Where the flight recorders are kept.
    pub flight_recorders: &'a FlightRecorders,
    /// Asks another process for connections to sockets of the host; a vsock device with Unix sockets needs it.
    pub connector: Option<Arc<Connector>>,
    /// What the machine's process is confined to, once everything is open and before the guest runs.
    pub sandbox: Arc<Sandbox>,
    /// Called at each step.
    pub on_event: &'a dyn Fn(Event<'_>),
}
