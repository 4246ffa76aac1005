//! `hwvmm clone`: many runs from one snapshot at once.

use super::output::{fail, print_all, print_json, say};
use crate::config::parse_duration;
use crate::escape::escape;
use crate::exit::Signal;
use crate::exit::end::status;
use crate::snapshot::Opened;
use crate::supervise::{self, CloneOutput, ClonePlan, CloneResult, clone_options, run_clones};
use hwvmm_devices::path_text::PathText as _;
use serde::Serialize;
use std::cell::RefCell;
use std::error::Error;
use std::ffi::OsString;
use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

/// The most clones: each has two processes and some twenty open files.
const MAX_CLONES: u32 = 1000;
/// Bytes of a line of a guest that are printed.
const LINE_BYTES: usize = 4096;

#[derive(clap::Args)]
#[command(about = "Run many clones of a snapshot at once")]
pub(super) struct Args {
    /// Folder of the snapshot
    dir: PathBuf,

    /// How many
    #[arg(short = 'n', long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=i64::from(MAX_CLONES)))]
    count: u32,

    /// End a clone after this time with status 124
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = parse_duration)]
    timeout: Duration,

    /// Write the console of each clone to a file N.log in this new folder, and print none
    #[arg(short, long, value_name = "DIR")]
    output: Option<PathBuf>,

    /// Print the summary as one line of JSON; lines of consoles are not printed
    #[arg(long)]
    json: bool,

    /// Options of `hwvmm run` for each clone, such as --expect REGEX
    #[arg(last = true, value_name = "OPTIONS")]
    options: Vec<OsString>,
}

/// The summary.
#[derive(Serialize)]
struct Summary {
    /// Of the format.
    version: u32,
    /// Milliseconds until the last clone had ended.
    elapsed_ms: u64,
    clones: Vec<CloneResult>,
}

pub(super) fn run(args: &Args) -> ExitCode {
    match try_run(args) {
        Ok(code) => code,
        Err(error) => {
            fail(error.as_ref());
            ExitCode::from(status::ERROR)
        }
    }
}

fn try_run(args: &Args) -> Result<ExitCode, Box<dyn Error>> {
    // What is wrong with it is said once.
    let has_virtio_console = Opened::new(&args.dir)?.description().virtio_console;
    let files = args.output.as_deref().map(|folder| Consoles::new(folder, args.count)).transpose()?;
    let interrupted = Arc::new(AtomicBool::new(false));
    for signal in supervise::with_default_action([Signal::INT, Signal::TERM, Signal::HUP, Signal::QUIT]) {
        signal_hook::flag::register(signal.number().into(), Arc::clone(&interrupted))?;
    }
    let options = clone_options(args.dir.as_os_str(), has_virtio_console, args.timeout, &args.options);
    let start = Instant::now();
    let results = run_clones(&ClonePlan {
        count: args.count,
        options: &options,
        timeout: args.timeout,
        interrupted: &interrupted,
        on_output: &|clone, output| match (output, &files) {
            (CloneOutput::Console(line), Some(files)) => files.write(clone, line),
            (CloneOutput::Console(line), None) if !args.json => {
                let text = escape(&String::from_utf8_lossy(line), LINE_BYTES);
                print_all(format!("[{clone}] {text}\n").as_bytes());
            }
            (CloneOutput::Console(_), None) => {}
            (CloneOutput::Message(line), _) => {
                say(&format!("[{clone}] {}", escape(&String::from_utf8_lossy(line), LINE_BYTES)));
            }
        },
    })?;
    let elapsed_ms = u64::try_from(start.elapsed().as_millis()).unwrap_or(u64::MAX);
    let failed = results.iter().any(|result| result.status != status::OK);
    if let Some(error) = files.and_then(|files| files.failed.into_inner()) {
        return Err(error.into());
    }
    let summary = Summary { version: 1, elapsed_ms, clones: results };
    let printed = if args.json { print_json(&summary) } else { print_all(text(&summary).as_bytes()) };
    Ok(if failed { ExitCode::from(status::FAILURE) } else { printed })
}

/// The summary as a table.
fn text(summary: &Summary) -> String {
    let mut text = String::from("clone  status  first line   own memory    guest's  userspace exits   VM exits  end\n");
    let with = |value: Option<u64>, unit: &str| value.map_or_else(|| "-".into(), |value| format!("{value}{unit}"));
    for clone in &summary.clones {
        // Writing to a String cannot fail.
        let _ = writeln!(
            text,
            "{:>5}  {:>6}  {:>10}  {:>11}  {:>9}  {:>15}  {:>9}  {}",
            clone.clone,
            clone.status,
            with(clone.first_line_ms, " ms"),
            with(clone.own_kib, " KiB"),
            with(clone.guest_own_kib, " KiB"),
            with(clone.userspace_exits, ""),
            with(clone.vm_exits, ""),
            escape(clone.end.as_deref().unwrap_or("not known"), LINE_BYTES)
        );
    }
    let good = summary.clones.iter().filter(|clone| clone.status == status::OK).count();
    let _ = writeln!(text, "{good} of {} clones ended well, {} ms in all", summary.clones.len(), summary.elapsed_ms);
    text
}

/// The files of the consoles.
struct Consoles {
    files: Vec<File>,
    /// The first error.
    failed: RefCell<Option<String>>,
}

impl Consoles {
    /// Makes the folder, with an empty file for each clone. Only this user can read them.
    fn new(folder: &Path, count: u32) -> Result<Self, Box<dyn Error>> {
        let failed = |error: io::Error| format!("cannot make the folder {}: {error}", folder.shown());
        fs::DirBuilder::new().mode(0o700).create(folder).map_err(failed)?;
        let open = |number: u32| {
            File::options().write(true).create_new(true).mode(0o600).open(folder.join(format!("{number}.log")))
        };
        let files: io::Result<_> = (0..count).map(open).collect();
        Ok(Self { files: files.map_err(failed)?, failed: RefCell::new(None) })
    }

    fn write(&self, clone: u32, line: &[u8]) {
        let Some(mut file) = usize::try_from(clone).ok().and_then(|clone| self.files.get(clone)) else { return };
        if let Err(error) = file.write_all(&[line, b"\n"].concat()) {
            self.failed.borrow_mut().get_or_insert_with(|| format!("cannot write {clone}.log: {error}"));
        }
    }
}
