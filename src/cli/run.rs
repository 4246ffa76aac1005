//! `hwvmm run`.

use super::output::{fail, say};
use super::report;
use super::run_results::{ResultFiles, Results, Within};
use super::status_file::StatusRecord;
use crate::boot::initramfs::TerminalSize;
use crate::config::{Moment, OnReboot, Pattern, Requirement, RunConfig, RunOptions, read_file};
use crate::console::{RawTerminal, StreamFlags, discard_input, terminal_size};
use crate::error::chain;
use crate::exit::end::status;
use crate::exit::{EndReason, RunEnd};
use crate::logging::is_verbose;
use crate::machine::{Ran, Start, Stdin, configure, detect_disk_formats, is_disk_image, late_command};
use crate::measure::{MenuEntry, RunRecord};
use crate::probe::{ANY_KVM, Host, check_linux};
use crate::profile::RunStats;
use crate::sandbox::keep_from_machine;
use crate::snapshot::{Draft, FolderError, Opened, RecordingFolder};
use crate::supervise::{self, Echo, KernelLogTarget, Plan, Signals, SuperviseError, Supervised};
use crate::tune::Lever;
use hwvmm_devices::path_text::PathText as _;
use std::error::Error;
use std::io::{self, IsTerminal, Write as _};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// For how long the first run from a template writes down which pages it uses.
const FIRST_RUN: Duration = Duration::from_secs(10);

#[derive(clap::Args)]
#[command(about = "Boot a guest")]
pub(super) struct Args {
    /// Read options from a TOML file; the command line overrides them
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,

    /// Ends the run, as SIGTERM does, when the process with this ID is gone, which must be its parent: `hwvmm test` gives its own.
    #[arg(long, hide = true, value_name = "PID")]
    end_with_parent: Option<i32>,

    /// The path of the kernel is that of a kernel, even where a disk image has come there: `hwvmm test` has looked before, and gives an image as
    /// one, with a disk that cannot be written.
    #[arg(long, hide = true)]
    kernel_is_no_image: bool,

    #[command(flatten)]
    options: RunOptions,
}

pub(super) fn run(args: Args) -> ExitCode {
    if let Some(Err(error)) = args.end_with_parent.map(supervise::end_with_parent) {
        fail(&error);
        return ExitCode::from(status::ERROR);
    }
    match try_run(args) {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            fail(error.as_ref());
            ExitCode::from(status::ERROR)
        }
    }
}

fn try_run(args: Args) -> Result<u8, Box<dyn Error>> {
    if args.options.asks_for_levers() {
        io::stdout().write_all(crate::tune::help().as_bytes())?;
        return Ok(status::OK);
    }
    let file = args.config.clone();
    let mut config = match configuration(args) {
        Ok(config) => config,
        Err(error) => {
            fail(error.as_ref());
            return Ok(status::USAGE);
        }
    };
    if let Err(error) = supervise::check_writable_shares(&config, file.as_deref()) {
        fail(&error);
        return Ok(status::USAGE);
    }
    let terminal = match terminal(&config) {
        Ok(terminal) => terminal,
        Err(problem) => {
            say(problem);
            return Ok(status::USAGE);
        }
    };
    leave_out_shared_cache(&mut config);
    let files = match ResultFiles::open(&config) {
        Ok(files) => files,
        Err(error) => {
            fail(error.as_ref());
            return Ok(status::USAGE);
        }
    };
    let result = run_guest(config, terminal, &files);
    let Some(file) = &files.status else { return result.map(|ended| ended.status) };
    let record = match &result {
        Ok(ended) => StatusRecord::new(&ended.end, ended.status, ended.entry.clone()),
        Err(error) => StatusRecord::new(&EndReason::Failed(chain(error.as_ref())), status::ERROR, None),
    };
    let written = record.text().map_err(io::Error::from).and_then(|text| file.write(&text));
    let Err(error) = written else { return result.map(|ended| ended.status) };
    let error: Box<dyn Error> = format!("cannot write {}: {error}", file.path().shown()).into();
    match result {
        Ok(ended) if ended.status != status::OK => {
            fail(error.as_ref());
            Ok(ended.status)
        }
        Ok(_) => Err(error),
        Err(first) => {
            fail(error.as_ref());
            Err(first)
        }
    }
}

/// How a run has ended.
struct Ended {
    end: EndReason,
    /// The exit status of hwvmm.
    status: u8,
    /// The entry of an image's menu that ran.
    entry: Option<MenuEntry>,
}

/// Runs the guest, and prints and writes what is known of it.
fn run_guest(
    mut config: RunConfig,
    terminal: Option<TerminalSize>,
    files: &ResultFiles,
) -> Result<Ended, Box<dyn Error>> {
    detect_disk_formats(&mut config)?;
    let snapshot = config.from.as_deref().map(Opened::new).transpose()?;
    if let Some(snapshot) = &snapshot {
        configure(&mut config, snapshot.description())?;
    }
    let late_command =
        if snapshot.is_some() && config.has_command() { late_command(&config, terminal)? } else { Vec::new() };
    let draft = config.saved_to().map(Draft::new).transpose()?;
    let recording = recording(&mut config, snapshot.as_ref())?;
    let budget = report::budget(config.budget.as_ref(), config.budget_from.as_deref(), config.slack)?;
    let host = Host::at(Path::new("/"));
    super::mmu::check(config.mmu, &host)?;
    if config.require == Some(Requirement::Hardware) && !host.has_hardware_kvm() {
        return Err(no_hardware(&host).into());
    }
    let any_kvm = std::env::var_os(ANY_KVM).is_some_and(|value| value == "1");
    let may_not_run_linux = !any_kvm && !host.has_hardware_kvm();
    let quiet = !io::stderr().is_terminal();
    let plan = Plan {
        config: &config,
        mmu: host.mmu(),
        snapshot: snapshot.as_ref(),
        late_command,
        save_to: draft.as_ref().map(Draft::targets).transpose()?,
        recording: recording.as_ref(),
        expect: expected(&config).map(|pattern| pattern.0.clone()),
        stdin: if terminal.is_some() || uses_stdin(&config) && io::stdin().is_terminal() {
            Stdin::Terminal
        } else {
            Stdin::Bytes
        },
        terminal,
        kernel_log: KernelLogTarget {
            file: files.kernel_log.as_ref(),
            echo: if is_verbose() { Echo::On } else { Echo::Off },
        },
        // No deadline where the clock does not reach it.
        deadline: config.timeout.and_then(|timeout| Instant::now().checked_add(timeout)),
        check: &|system, kernel| {
            if may_not_run_linux && kernel.is_linux() { check_linux(system, &host).map_err(Into::into) } else { Ok(()) }
        },
        progress: &|what| if quiet { log::info!("{what}") } else { say(what) },
    };
    let Done { record, stats, kernel_log } = start_until_done(&plan)?;
    crate::logging::report_suppressed();
    let end = ended(&config, &record);
    if let Some(draft) = draft.filter(|_| end == EndReason::Saved) {
        draft.keep()?;
    }
    let results =
        Results { config: &config, files, record: &record, end: &end, budget: &budget, kernel_log: &kernel_log };
    let (within, failed) = results.show(stats);
    let status = exit_status(&end, within, failed)?;
    Ok(Ended { end, status, entry: record.entry })
}

/// The exit status of hwvmm. The guest's own comes first; `failed` counts only where that is 0.
fn exit_status(end: &EndReason, within: Within, failed: Option<Box<dyn Error>>) -> Result<u8, Box<dyn Error>> {
    match (end.status(), failed) {
        (status::OK, Some(error)) => Err(error),
        (status, Some(error)) => {
            fail(error.as_ref());
            Ok(status)
        }
        (status::OK, None) if within == Within::No => Ok(status::OVER_BUDGET),
        (status, None) => Ok(status),
    }
}

/// The pattern that a line of a console is to match.
fn expected(config: &RunConfig) -> Option<&Pattern> {
    match config.snapshot_at.as_ref().map(|at| &at.moment) {
        Some(Moment::Line(pattern)) => Some(pattern),
        Some(Moment::Mark(_)) | None => config.expect.as_ref(),
    }
}

/// The end of a run as its exit status has it: one that was to bring something, and ended without it, is not a good one.
fn ended(config: &RunConfig, record: &RunRecord) -> EndReason {
    let reason = record.end.reason.clone();
    match (&config.snapshot_at, &config.expect) {
        (Some(_), _) => reason.without_the_snapshot(),
        (None, Some(_)) => reason.without_the_expected(),
        (None, None) => reason,
    }
}

/// The folder in which the pages are written down that the guest uses: where that is wanted, and in the first run from a template.
fn recording(config: &mut RunConfig, snapshot: Option<&Opened>) -> Result<Option<RecordingFolder>, FolderError> {
    let (Some(path), Some(snapshot)) = (&config.from, snapshot) else { return Ok(None) };
    let folder = if config.record_working_set.is_some() {
        Some(RecordingFolder::new(path, snapshot.description())?)
    } else if config.tune.wants(Lever::WorkingSet) {
        RecordingFolder::for_first_run(path, snapshot)
    } else {
        None
    };
    if let Some(folder) = &folder {
        keep_from_machine(folder.as_fd());
        config.record_working_set.get_or_insert(FIRST_RUN);
    }
    Ok(folder)
}

fn no_hardware(host: &Host) -> String {
    let what = host.vendor_module().map_or_else(
        || "has no KVM that hwvmm knows".to_owned(),
        |module| format!("has the KVM {module}, which emulates the guest's instructions"),
    );
    format!("--require hardware: this host {what}")
}

/// The size of the terminal that the guest's command gets; `None` where it gets none.
fn terminal(config: &RunConfig) -> Result<Option<TerminalSize>, &'static str> {
    if !config.tty {
        return Ok(None);
    }
    if !io::stdin().is_terminal() {
        return Err("--tty: stdin is no terminal: leave the option out");
    }
    let (columns, rows) = terminal_size();
    Ok(Some(TerminalSize { rows, columns }))
}

/// Does without the kernel cache where a guest can have put files there: they would be booted in place of the user's kernels.
fn leave_out_shared_cache(config: &mut RunConfig) {
    if let Some(folder) = config.kernel_cache.take() {
        if supervise::is_in_writable_share(config, &folder) {
            log::warn!(
                "unpacked kernels are not kept: {} is in the folder of a writable --share; name another one with --kernel-cache",
                folder.shown()
            );
        } else {
            config.kernel_cache = Some(folder);
        }
    }
}

/// Reads the options of the command line and of the file, and checks them.
fn configuration(args: Args) -> Result<RunConfig, Box<dyn Error>> {
    let file = args.config.as_deref().map(read_file).transpose()?.unwrap_or_default();
    let mut options = args.options.or(file);
    options.find_images(|path| !args.kernel_is_no_image && is_disk_image(path));
    let mut config = options.into_config()?;
    // What -v prints is the kernel's whole log.
    if is_verbose() && config.has_agent() && config.kernel_log.is_none() {
        config.append.insert(0, "loglevel=7".into());
    }
    if let Some(budget) = &config.budget {
        report::check_reasons(budget)?;
    }
    Ok(config)
}

fn uses_stdin(config: &RunConfig) -> bool {
    let targets = config.serial.iter().flatten().chain(&config.console);
    targets.into_iter().any(|target| *target == crate::config::ConsoleTarget::Stdio)
}

/// What is left of all starts of a guest.
struct Done {
    /// Of the last start.
    record: RunRecord,
    /// The statistics of all starts of the guest, added up.
    stats: Option<RunStats>,
    /// The last lines of the kernel's log.
    kernel_log: Vec<String>,
}

/// Starts the guest, and again as often as it resets itself, where that is wanted.
fn start_until_done(plan: &Plan<'_>) -> Result<Done, Box<dyn Error>> {
    let config = plan.config;
    let mut signals = Signals::catch().map_err(|error| format!("cannot catch signals: {error}"))?;
    let mut stats: Option<RunStats> = None;
    let mut start = Start::First;
    let mut last: Option<RunRecord> = None;
    let _flags = StreamFlags::save();
    // Over all starts: what is typed between two of them is for the guest.
    let _raw = if plan.stdin == Stdin::Terminal { RawTerminal::enter() } else { None };
    loop {
        let Supervised { ran: Ran { record, unread }, kernel_log } =
            match (supervise::run(plan, &start, &mut signals), last.take()) {
                (Ok(ran), _) => ran,
                // What is known of the starts before is not lost.
                (Err(error), Some(last)) => {
                    let reason = EndReason::Failed(format!("the guest could not be started again: {}", chain(&error)));
                    discard_input();
                    // Its registers and last exits are those of an end that was none.
                    let mut record = RunRecord { end: RunEnd { reason, vcpu: None }, ..last };
                    for vcpu in &mut record.vcpus {
                        (vcpu.rip, vcpu.flight_recorder) = (None, Vec::new());
                    }
                    return Ok(Done { record, stats, kernel_log: Vec::new() });
                }
                // An end of its own: whoever reads the statistics must not take it for a fault of hwvmm's or of the host's.
                (Err(SuperviseError::Unbootable(why)), None) => {
                    let record = RunRecord::ended(RunEnd { reason: EndReason::Unbootable(why), vcpu: None });
                    let stats = config.stats_out.is_some().then(|| RunStats::new(&record));
                    return Ok(Done { record, stats, kernel_log: Vec::new() });
                }
                (Err(error), None) => return Err(error.into()),
            };
        if config.stats.is_some() || config.profile.is_some() {
            let new = RunStats::new(&record);
            match &mut stats {
                Some(sum) => sum.add_start(new),
                none => *none = Some(new),
            }
        }
        let restart = config.on_reboot == OnReboot::Restart && record.end.reason == EndReason::Reset;
        if !restart {
            if matches!(record.end.reason, EndReason::Crashed(_) | EndReason::Failed(_)) {
                discard_input();
            }
            return Ok(Done { record, stats, kernel_log });
        }
        log::info!("the guest reset itself: it is started again");
        last = Some(record);
        start = Start::Again { unread };
    }
}
