//! The machine's process.

use super::channel::Sender;
use super::message::{Message, of_record};
use super::plan::Plan;
use super::writable_shares::check_backing_files;
use crate::boot::KernelFile;
use crate::boot::image::Listed;
use crate::config::{RunConfig, SandboxMode};
use crate::console::{self, Announcements, line_state};
use crate::error::chain;
use crate::kvm::System;
use crate::logging::{self, RelaySender};
use crate::machine::{self, Disks, Event, Files, FromImage, Machine, Ran, Setup, Start};
use crate::measure::{FlightRecorders, MAX_PROFILE_BYTES, MenuEntry};
use crate::sandbox::{Mode, Sandbox};
use crate::snapshot::Opened;
use hwvmm_devices::path_text::PathText as _;
use hwvmm_devices::virtio::vsock::Connector;
use rustix::process::{Pid, Signal, getppid, set_parent_process_death_signal};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use std::error::Error;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Instant;

/// Open files that a machine of any size is content with.
const OPEN_FILES: u64 = 16_384;

/// What the child has from its parent.
pub(super) struct Inherited<'a> {
    /// What is to be run.
    pub(super) plan: &'a Plan<'a>,
    /// Which start of the guest it is.
    pub(super) start: &'a Start,
    /// Process ID of the parent.
    pub(super) parent: Pid,
    /// CPU time that the parent had used, in nanoseconds.
    pub(super) parent_cpu_ns: u64,
    /// When the guest must have booted at the latest.
    pub(super) boot_deadline: Option<Instant>,
    /// Where the last exits are kept.
    pub(super) flight_recorders: &'a FlightRecorders,
    /// Where the sandbox writes what it has refused.
    pub(super) refusals: BorrowedFd<'a>,
    /// Asks the parent for connections to sockets of the host.
    pub(super) connector: Option<Arc<Connector>>,
    /// Where the kernel's log goes, if the guest runs a command.
    pub(super) kernel_log: Option<BorrowedFd<'a>>,
}

/// The exit status of a child that has sent its messages.
const SENT: u8 = 0;
/// The exit status of a child whose parent takes no messages.
const NOT_SENT: u8 = 1;

/// Makes the machine, runs it, and sends what it leaves; its messages go to `relay`. Returns the exit status of this process.
pub(super) fn work(inherited: &Inherited<'_>, socket: OwnedFd, relay: RelaySender) -> u8 {
    // What Rust's runtime and the C library write to stderr before they abort goes to the parent, too, and does not block. Where
    // this fails, it goes to stderr itself.
    let _ = rustix::stdio::dup2_stderr(&relay);
    let _flush = logging::init(log::max_level(), logging::Sink::Relay(relay));
    console::leave_terminal_to_parent();
    // A parent that is gone before this call sends no signal.
    let dies_with_parent = set_parent_process_death_signal(Some(Signal::KILL));
    if getppid() != Some(inherited.parent) {
        return NOT_SENT;
    }
    let sender = Sender::new(socket);
    if let Err(error) = dies_with_parent {
        log::warn!("the machine's process will not end if hwvmm is killed (PR_SET_PDEATHSIG): {error}");
    }
    let sent = match run_machine(inherited, &sender) {
        Ok(Ran { record, unread }) => [Message::Unread(unread)]
            .into_iter()
            .chain(of_record(record))
            .chain([Message::Complete(line_state())])
            .try_for_each(|message| sender.send(&message)),
        Err(error) if machine::is_fault_of_kernel(error.as_ref()) => {
            sender.send(&Message::Unbootable(chain(error.as_ref())))
        }
        Err(error) => sender.send(&Message::Failed(chain(error.as_ref()))),
    };
    match sent {
        Ok(()) => SENT,
        Err(error) => {
            log::debug!("the parent process takes no messages: {error}");
            NOT_SENT
        }
    }
}

/// Raises the soft limit of open files as far as the hard limit allows, up to [`OPEN_FILES`]. Each vCPU has up to 14: its own,
/// its statistics, and the trace of its VM exits. What fails is said by who needs more files.
fn raise_file_limit() {
    let before = getrlimit(Resource::Nofile);
    let most = before.maximum.map_or(OPEN_FILES, |maximum| maximum.min(OPEN_FILES));
    if before.current.is_some_and(|current| current < most) {
        let _ = setrlimit(Resource::Nofile, Rlimit { current: Some(most), ..before });
    }
}

/// Has /dev/null in place of stdin and stdout: they are the command's, and the parent moves their bytes.
fn leave_streams_to_parent() -> io::Result<()> {
    let null = File::options().read(true).write(true).open("/dev/null")?;
    rustix::stdio::dup2_stdin(&null)?;
    rustix::stdio::dup2_stdout(&null)?;
    Ok(())
}

fn run_machine(inherited: &Inherited<'_>, sender: &Sender) -> Result<Ran, Box<dyn Error>> {
    raise_file_limit();
    if inherited.plan.config.has_agent() {
        leave_streams_to_parent()?;
    }
    let Inherited {
        plan, start, parent_cpu_ns, flight_recorders, refusals, connector, kernel_log, boot_deadline, ..
    } = inherited;
    let system = System::open(&plan.config.kvm)?;
    let on_event = |event: Event<'_>| {
        let message = match event {
            Event::Progress(what) => Message::Progress(what.to_owned()),
            Event::Entry(Listed { number, title }) => {
                Message::Entry(MenuEntry { number: number.clone(), title: title.clone() })
            }
            Event::Started { boot, startup_cpu_ns, started_at_ns } => {
                let startup_cpu_ns = startup_cpu_ns.saturating_add(*parent_cpu_ns);
                Message::Started { boot, startup_cpu_ns, started_at_ns }
            }
            Event::WorkingSet(set) => Message::WorkingSet(set),
            Event::Ended(end) => Message::Ended(end.clone()),
        };
        if let Err(error) = sender.send(&message) {
            log::debug!("the parent process takes no messages: {error}");
        }
    };
    let source = Source::open(plan, &on_event)?;
    let config = plan.config;
    let progress = |what: &str| on_event(Event::Progress(what));
    let (files, disks) = match source {
        Source::Snapshot(snapshot) => (Files::of_snapshot(config, snapshot)?, disks(config)?),
        Source::File(kernel) => {
            (plan.check)(&system, &kernel)?;
            let disks = disks(config)?;
            let parts = disks.parts(config, &kernel)?;
            (Files::open(config, kernel, &parts, plan.terminal, &progress)?, disks)
        }
        Source::Image(FromImage { kernel, .. }, disks) if config.has_agent() => {
            (plan.check)(&system, &kernel)?;
            let parts = disks.parts(config, &kernel)?;
            (Files::open(config, kernel, &parts, plan.terminal, &progress)?, disks)
        }
        Source::Image(image, disks) => {
            (plan.check)(&system, &image.kernel)?;
            (Files::of_image(config, image, &progress)?, disks)
        }
    };
    let setup = Setup {
        config,
        mmu: plan.mmu,
        files: &files,
        expect: plan.expect.clone(),
        kernel_log: *kernel_log,
        announcements: Announcements::default(),
        output_deadline: boot_deadline.filter(|_| !plan.config.has_agent()),
        stdin: plan.stdin,
        start,
        save_to: plan.save_to.as_ref(),
        requests: Some(sender.as_fd()),
        flight_recorders,
        connector: connector.clone(),
        sandbox: Arc::new(sandbox(plan.config, *refusals)?),
        on_event: &on_event,
    };
    let machine = Machine::new(&setup, &system, disks)?;
    Ok(machine::run(machine, &setup)?)
}

/// What the guest starts from.
enum Source<'a> {
    /// A snapshot.
    Snapshot(&'a Opened),
    /// A kernel in a file of its own.
    File(KernelFile),
    /// A kernel in the image of one of the disks, which are open then.
    Image(FromImage, Disks),
}

impl<'a> Source<'a> {
    fn open(plan: &Plan<'a>, on_event: &dyn Fn(Event<'_>)) -> Result<Self, Box<dyn Error>> {
        if let Some(snapshot) = plan.snapshot {
            return Ok(Self::Snapshot(snapshot));
        }
        let config = plan.config;
        if let Some(path) = &config.kernel_from {
            let disks = disks(config)?;
            if let Some(image) = disks.kernel(config)? {
                on_event(Event::Entry(&image.entry));
                let what = format!("{}: the kernel of entry {}", path.shown(), machine::entry_text(&image.entry));
                on_event(Event::Progress(&what));
                return Ok(Self::Image(image, disks));
            }
        }
        Ok(Self::File(KernelFile::open(&config.kernel)?))
    }
}

fn disks(config: &RunConfig) -> Result<Disks, Box<dyn Error>> {
    let disks = Disks::open(config)?;
    check_backing_files(config, &disks)?;
    Ok(disks)
}

/// Prepares the sandbox of this process, which has one thread.
fn sandbox(config: &RunConfig, refusals: BorrowedFd<'_>) -> Result<Sandbox, Box<dyn Error>> {
    let mode = match config.sandbox {
        SandboxMode::On => Mode::On,
        SandboxMode::Log => Mode::Log,
        SandboxMode::Off => Mode::Off,
    };
    let profiles = if config.profile.is_some() { config.cpus.count().into() } else { 0 };
    let sandbox = Sandbox::new(mode, refusals.try_clone_to_owned()?)?
        .with_own_view()
        .with_growth(MAX_PROFILE_BYTES.saturating_mul(profiles));
    if sandbox.refuses() {
        hwvmm_devices::socket::leave_paths_to_parent();
        logging::leave_out_backtraces();
    }
    Ok(sandbox)
}
