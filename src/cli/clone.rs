//! `hwvmm clone`: many runs from one snapshot at once.

use super::output::{fail, print_all, print_json, say};
use crate::config::{RunConfig, RunOptions, parse_duration};
use crate::escape::escape;
use crate::exit::Signal;
use crate::exit::end::status;
use crate::machine::configure;
use crate::snapshot::Opened;
use crate::supervise::{self, CloneOutput, ClonePlan, CloneResult, clone_arguments, run_clones};
use clap::Parser;
use hwvmm_devices::path_text::PathText as _;
use rustix::fs::{CWD, Mode, OFlags, openat};
use serde::Serialize;
use std::cell::RefCell;
use std::error::Error;
use std::ffi::OsString;
use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::num::NonZero;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// The most clones: each has two processes and some twenty open files.
const MAX_CLONES: u32 = 1000;
/// Memory that a clone takes at most besides its guest's, in bytes.
const VMM_BYTES: u64 = 64 << 20;
/// Bytes of a line of a guest that are printed.
const LINE_BYTES: usize = 4096;
/// Options of `hwvmm run` that are not for clones: what they start from, what `hwvmm clone` has itself or reads, and what one alone can do.
const NOT_FOR_CLONES: [&str; 11] = [
    "from",
    "kernel",
    "kernel-from",
    "config",
    "template",
    "snapshot-at",
    "record-working-set",
    "timeout",
    "stats",
    "stats-out",
    "tty",
];

pub(super) const AFTER_HELP: &str = "\
Examples:
  hwvmm run vmlinuz --template booted
  hwvmm clone booted -n 20 -- sh -c 'echo hi'
  hwvmm clone booted -n 1000 -j 50 --json -- true
  hwvmm clone snapshot -n 20 --with 'expect=^done$' --with 'disk=copy-{n}.img'

Clones share the memory that they do not write, and have no huge pages of their own (--with tune=huge-pages=on). Lines of their outputs have
[N], the number of the clone, before them. The summary comes last on stdout; --json prints it alone, as one line, with for each clone: status
and end, microseconds from the start of its process until its guest was about to run, until its first line and until its end, own memory in
KiB, exits to user space and VM exits.

Ctrl-C ends all clones in order, a second one at once. They also end when hwvmm clone is killed.

Exit status:
  0    all clones ended with 0
  1    one did not: its status is in the summary, and has the meaning that it has for hwvmm run
  2    wrong option
  42   hwvmm failed, as where the host has no memory for a clone
  128 and the number of a signal that ended it";

#[derive(clap::Args)]
pub(super) struct Args {
    /// Folder of the snapshot
    dir: PathBuf,

    /// How many, up to 1000 [default: as many as there are processors]
    #[arg(short = 'n', long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=i64::from(MAX_CLONES)))]
    count: Option<u32>,

    /// Clones that run at once at most [default: all]. There are fewer where the host has less than 32 MiB of memory for each, or than
    /// one has taken before
    #[arg(short, long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=i64::from(MAX_CLONES)))]
    jobs: Option<u32>,

    /// End a clone after this time with status 124
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = parse_duration)]
    timeout: Duration,

    /// Write the outputs of each clone to files N.out and N.err in this new folder, and print none
    #[arg(short, long, value_name = "DIR")]
    output: Option<PathBuf>,

    /// Print the summary as one line of JSON, and no outputs on stdout
    #[arg(long)]
    json: bool,

    /// An option of `hwvmm run` for each clone, with its long name, such as expect=REGEX; {n} in it is the number of the clone (can be
    /// given again)
    #[arg(long, value_name = "OPTION[=VALUE]")]
    with: Vec<String>,

    /// What each clone runs, where the snapshot is a template (`hwvmm run KERNEL --template DIR`)
    #[arg(last = true, value_name = "COMMAND")]
    command: Vec<OsString>,
}

/// What `--json` prints: all clones, and how long they took.
#[derive(Serialize)]
struct Summary {
    /// The version of this format.
    version: u32,
    /// Milliseconds until the last clone had ended.
    elapsed_ms: u64,
    /// How many were not started, as a signal came first.
    not_started: u32,
    clones: Vec<CloneResult>,
}

/// The arguments of a clone, read as `hwvmm run` does.
#[derive(clap::Parser)]
struct RunArguments {
    #[command(flatten)]
    options: RunOptions,
}

pub(super) fn run(args: &Args) -> ExitCode {
    let opened = match Opened::new(&args.dir) {
        Ok(opened) => opened,
        Err(error) => {
            fail(&error);
            return ExitCode::from(status::ERROR);
        }
    };
    let prepared = match prepare(args, &opened) {
        Ok(prepared) => prepared,
        Err(error) => {
            fail(error.as_ref());
            return ExitCode::from(status::USAGE);
        }
    };
    match try_run(args, prepared) {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            fail(error.as_ref());
            ExitCode::from(status::ERROR)
        }
    }
}

/// What is to be done, checked.
struct Prepared {
    /// The options that all clones have.
    common: Vec<OsString>,
    count: u32,
    /// The most memory that a clone takes, in bytes.
    most_bytes: u64,
    files: Option<Outputs>,
}

fn prepare(args: &Args, opened: &Opened) -> Result<Prepared, Box<dyn Error>> {
    let common = check(args, opened)?;
    let processors = || std::thread::available_parallelism().ok().and_then(|count| u32::try_from(count.get()).ok());
    let count = args.count.unwrap_or_else(|| processors().unwrap_or(1).min(MAX_CLONES));
    let files = args.output.as_deref().map(|folder| Outputs::new(folder, count)).transpose()?;
    let most_bytes = opened.description().memory_bytes.saturating_add(VMM_BYTES);
    Ok(Prepared { common, count, most_bytes, files })
}

/// Checks the options with those of the first clone: what is wrong with them is said once. Returns the options that all clones have.
fn check(args: &Args, opened: &Opened) -> Result<Vec<OsString>, Box<dyn Error>> {
    for option in &args.with {
        let name = option.split('=').next().unwrap_or_default();
        if NOT_FOR_CLONES.contains(&name) {
            return Err(
                format!("--with {}: clones do not have this option: leave it out", escape(name, LINE_BYTES)).into()
            );
        }
        if !RunOptions::keys().iter().any(|key| key == name) {
            let name = escape(name, LINE_BYTES);
            return Err(format!("--with {name}: hwvmm run has no option of this name: see hwvmm run --help").into());
        }
    }
    let mut common: Vec<OsString> = vec!["--from".into(), args.dir.clone().into()];
    common.push(format!("--timeout={}ms", args.timeout.as_millis()).into());
    // A working set in huge pages has fewer exits and takes memory of its own: 2 MiB for each page that is written in another 2 MiB.
    common.push("--tune=huge-pages=off".into());
    // What a guest without a command prints there is the clone's output.
    let has_console = args.with.iter().any(|option| option.starts_with("console="));
    if opened.description().virtio_console && args.command.is_empty() && !has_console {
        common.extend(["--console".into(), "virtio".into()]);
    }
    let arguments = clone_arguments(&common, &args.with, &args.command, 0);
    let parsed = RunArguments::try_parse_from(std::iter::once("hwvmm run".into()).chain(arguments))?;
    let mut config: RunConfig = parsed.options.into_config()?;
    configure(&mut config, opened.description())?;
    Ok(common)
}

fn try_run(args: &Args, prepared: Prepared) -> Result<u8, Box<dyn Error>> {
    let Prepared { common, count, most_bytes, files } = prepared;
    let interrupted = catch_signals()?;
    let start = Instant::now();
    let clones = run_clones(&ClonePlan {
        count,
        at_once: args.jobs.unwrap_or(count),
        most_bytes,
        arguments: &|number| clone_arguments(&common, &args.with, &args.command, number),
        timeout: args.timeout,
        interrupted: &interrupted,
        on_output: &|clone, output| match (&files, output) {
            (Some(files), output) => files.write(clone, &output),
            (None, CloneOutput::Line(line)) if !args.json => {
                print_all(format!("{}\n", labelled(clone, line)).as_bytes());
            }
            (None, CloneOutput::Line(_)) => {}
            (None, CloneOutput::Error(line)) => say(&labelled(clone, line)),
        },
    })?;
    let elapsed_ms = u64::try_from(start.elapsed().as_millis()).unwrap_or(u64::MAX);
    if let Some(error) = files.and_then(|files| files.failed.into_inner()) {
        return Err(error.into());
    }
    let not_started = count - u32::try_from(clones.len()).unwrap_or(count).min(count);
    let is_good = not_started == 0 && clones.iter().all(|clone| clone.status == status::OK);
    let summary = Summary { version: 1, elapsed_ms, not_started, clones };
    let printed = if args.json { print_json(&summary) } else { print_all(text(&summary).as_bytes()) };
    let signal = interrupted.load(Ordering::Relaxed);
    Ok(match u8::try_from(signal) {
        Ok(signal) if signal != 0 => 128_u8.saturating_add(signal),
        _ if !is_good => status::FAILURE,
        _ if printed != ExitCode::SUCCESS => status::ERROR,
        _ => status::OK,
    })
}

/// Notes the first signal that would end this process; a second one does, and its clones end with it.
fn catch_signals() -> io::Result<Arc<AtomicUsize>> {
    let (came, first) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
    for signal in supervise::with_default_action([Signal::INT, Signal::TERM, Signal::HUP, Signal::QUIT]) {
        let number = i32::from(signal.number());
        // In this order: the first signal finds nothing set.
        signal_hook::flag::register_conditional_default(number, Arc::clone(&came))?;
        signal_hook::flag::register(number, Arc::clone(&came))?;
        signal_hook::flag::register_usize(number, Arc::clone(&first), signal.number().into())?;
    }
    // A handler that does nothing: a write beyond RLIMIT_FSIZE fails with EFBIG.
    signal_hook::flag::register(signal_hook::consts::SIGXFSZ, Arc::default())?;
    Ok(first)
}

/// A line of a clone as it is printed, without its end.
fn labelled(clone: u32, line: &[u8]) -> String {
    let line = line.strip_suffix(b"\n").unwrap_or(line);
    let line = line.strip_suffix(b"\r").unwrap_or(line);
    format!("[{clone}] {}", escape(&String::from_utf8_lossy(line), LINE_BYTES))
}

/// The summary as a table.
fn text(summary: &Summary) -> String {
    let mut text = String::from(
        "clone  status  guest runs  first line      ended   own memory    guest's  userspace exits   VM exits  end\n",
    );
    let with = |value: Option<u64>, unit: &str| value.map_or_else(|| "-".into(), |value| format!("{value}{unit}"));
    let time =
        |value: Option<u64>| value.map_or_else(|| "-".into(), |us| format!("{}.{} ms", us / 1000, us % 1000 / 100));
    for clone in &summary.clones {
        // Writing to a String cannot fail.
        let _ = writeln!(
            text,
            "{:>5}  {:>6}  {:>10}  {:>10}  {:>9}  {:>11}  {:>9}  {:>15}  {:>9}  {}",
            clone.clone,
            clone.status,
            time(clone.first_instruction_us),
            time(clone.first_line_us),
            time(Some(clone.ended_us)),
            with(clone.own_kib, " KiB"),
            with(clone.guest_own_kib, " KiB"),
            with(clone.userspace_exits, ""),
            with(clone.vm_exits, ""),
            escape(clone.end.as_deref().unwrap_or("not known"), LINE_BYTES)
        );
    }
    let good = summary.clones.iter().filter(|clone| clone.status == status::OK).count();
    let _ =
        write!(text, "{good} of {} clones ended with status 0, {} ms in all", summary.clones.len(), summary.elapsed_ms);
    let most = summary.clones.iter().filter_map(|clone| clone.own_kib).max();
    let _ = most.map_or(Ok(()), |kib| write!(text, ", own memory {kib} KiB at most"));
    let _ = match NonZero::new(summary.not_started) {
        Some(number) => writeln!(text, "; {number} more were not started"),
        None => writeln!(text),
    };
    text
}

/// The files of the outputs.
struct Outputs {
    folder: OwnedFd,
    /// The first error.
    failed: RefCell<Option<String>>,
}

impl Outputs {
    /// Makes the folder, with two empty files for each clone. Only this user can read them.
    fn new(path: &Path, count: u32) -> Result<Self, Box<dyn Error>> {
        let failed = |error: io::Error| format!("cannot make the folder {}: {error}", path.shown());
        fs::DirBuilder::new().mode(0o700).create(path).map_err(failed)?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let folder = openat(CWD, path, flags, Mode::empty()).map_err(|error| failed(error.into()))?;
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let names = (0..count).flat_map(|number| [format!("{number}.out"), format!("{number}.err")]);
        for name in names {
            openat(&folder, &name, flags, Mode::from(0o600)).map_err(|error| failed(error.into()))?;
        }
        Ok(Self { folder, failed: RefCell::new(None) })
    }

    /// Writes a line. No file stays open: thousands would be more than a process may have.
    fn write(&self, clone: u32, output: &CloneOutput<'_>) {
        let (name, line) = match output {
            CloneOutput::Line(line) => (format!("{clone}.out"), line),
            CloneOutput::Error(line) => (format!("{clone}.err"), line),
        };
        if let Err(error) = self.open(&name).and_then(|mut file| file.write_all(line)) {
            self.failed.borrow_mut().get_or_insert_with(|| format!("cannot write an output of clone {clone}: {error}"));
        }
    }

    /// Opens a file again. The folder may be in a share that another guest writes.
    fn open(&self, name: &str) -> io::Result<File> {
        let flags = OFlags::WRONLY | OFlags::APPEND | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = File::from(openat(&self.folder, name, flags, Mode::empty())?);
        let found = file.metadata()?;
        if found.is_file() && found.nlink() == 1 {
            Ok(file)
        } else {
            Err(io::Error::other(format!("{name} is no longer the file that was made")))
        }
    }
}
