//! The results of `hwvmm run`: on stderr, and in files.

use super::output::{print_stderr, say};
use super::report;
use super::result_file::ResultFile;
use crate::config::{Budget, RunConfig, StatsFormat};
use crate::escape::{escape_json, escape_text};
use crate::exit::{EndKind, EndReason};
use crate::logging::is_verbose;
use crate::measure::RunRecord;
use crate::profile::budget::check;
use crate::profile::render::{Format, Style, render};
use crate::profile::{self, Profile, RunStats, RunSymbols};
use crate::sandbox::keep_from_machine;
use hwvmm_devices::path_text::PathText as _;
use std::cell::OnceCell;
use std::error::Error;
use std::fmt::Write as _;
use std::fs::File;
use std::io::{self, IsTerminal};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// Whether a run kept to its budget.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Within {
    Yes,
    No,
}

/// The files that a run writes at its end.
pub(super) struct ResultFiles {
    stats: Option<ResultFile>,
    profile: Option<ResultFile>,
    pub(super) status: Option<ResultFile>,
    /// Written while the guest runs.
    pub(super) kernel_log: Option<File>,
}

impl ResultFiles {
    pub(super) fn open(config: &RunConfig) -> Result<Self, Box<dyn Error>> {
        let open = |path: &Option<PathBuf>| path.as_deref().map(ResultFile::open).transpose();
        Ok(Self {
            stats: open(&config.stats_out)?,
            profile: open(&config.profile_out)?,
            status: open(&config.status_file)?,
            kernel_log: config.kernel_log.as_deref().map(open_kernel_log).transpose()?,
        })
    }
}

/// Opens the file for the kernel's log, and empties it. It must take all that is written at once: the parent process does not wait.
fn open_kernel_log(path: &Path) -> Result<File, Box<dyn Error>> {
    let failed = |error: io::Error| format!("--kernel-log {}: cannot write it: {error}", path.shown());
    let options = || File::options().append(true).create(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).clone();
    let file = options().open(path).map_err(failed)?;
    let kind = file.metadata().map_err(failed)?.file_type();
    if kind.is_file() {
        file.set_len(0).map_err(failed)?;
    } else if !kind.is_char_device() {
        return Err(format!("--kernel-log {}: it is neither a file nor a character device", path.shown()).into());
    }
    keep_from_machine(file.as_fd());
    Ok(file)
}

/// What is known after a run.
pub(super) struct Results<'a> {
    pub(super) config: &'a RunConfig,
    pub(super) files: &'a ResultFiles,
    /// Of the last start.
    pub(super) record: &'a RunRecord,
    /// The end as the exit status has it.
    pub(super) end: &'a EndReason,
    pub(super) budget: &'a Budget,
    /// The last lines of the kernel's log.
    pub(super) kernel_log: &'a [String],
}

impl Results<'_> {
    /// Prints and writes all of it; `stats` are of all starts. A file that cannot be written is no reason to lose what else is known: the
    /// first such error is returned.
    pub(super) fn show(&self, stats: Option<RunStats>) -> (Within, Option<Box<dyn Error>>) {
        let Self { config, record, end, .. } = self;
        let starts = stats.as_ref().map_or(1, |stats| stats.starts);
        let of_end = |stats| RunStats { end: end.to_string(), end_kind: end.kind(), status: end.status(), ..stats };
        let stats = stats.map(of_end);
        let stats =
            stats.as_ref().and_then(|stats| Some((stats_text(config.stats?, stats), self.files.stats.as_ref())));
        let mut failed: Option<Box<dyn Error>> = None;
        // Before anything that can take long: symbols, a stderr that is not read, a FIFO without a reader.
        if let Some((text, Some(file))) = &stats
            && !file.can_wait()
        {
            failed = write_stats(text, file).err();
        }
        let symbols = OnceCell::new();
        let symbols = || symbols.get_or_init(|| RunSymbols::load(config, record));
        // A guest that never ran has none.
        let profile = config.profile.filter(|_| end.kind() != EndKind::Unbootable).map(|_| {
            let mut profile = Profile::new(config, record, symbols());
            profile.costs = super::bench::saved_costs();
            (profile.end, profile.status, profile.starts) = (end.to_string(), end.status(), starts);
            profile
        });
        if let (Some(profile), Some(file)) = (&profile, &self.files.profile)
            && !file.can_wait()
        {
            failed = failed.or(write_profile(profile, file).err());
        }
        self.show_kernel_log();
        if !end.is_clean() {
            show_flight_recorder(record, symbols());
        }
        // After the flight recorder: this is the line that must stay on the screen.
        if !matches!(end, EndReason::Command(_)) || is_verbose() {
            say(&describe(record, end));
        }
        match &stats {
            Some((Ok(text), None)) => print_stderr(&escape_text(text)),
            Some((text, Some(file))) if file.can_wait() => failed = failed.or(write_stats(text, file).err()),
            _ => {}
        }
        let Some(profile) = profile else { return (Within::Yes, failed) };
        let style = Style { colour: io::stderr().is_terminal(), ..Style::default() };
        match render(&profile, Format::Text, style) {
            Ok(text) => print_stderr(&text),
            Err(error) => failed = failed.or(Some(error.into())),
        }
        if let Some(file) = self.files.profile.as_ref().filter(|file| file.can_wait()) {
            failed = failed.or(write_profile(&profile, file).err());
        }
        let within = if report::show_checks(&check(self.budget, &profile)) { Within::Yes } else { Within::No };
        (within, failed)
    }

    /// Prints the last lines of the kernel's log where they may explain an end, and were not printed before.
    fn show_kernel_log(&self) {
        let wanted = match self.end {
            EndReason::Command(_)
            | EndReason::DebugExit(_)
            | EndReason::Seen(_)
            | EndReason::Quit
            | EndReason::Stopped
            | EndReason::Saved
            | EndReason::Unbootable(_)
            | EndReason::Signal(_) => false,
            EndReason::PowerOff
            | EndReason::SystemHalted
            | EndReason::Reset
            | EndReason::TripleFault
            | EndReason::Panicked(_)
            | EndReason::Halted
            | EndReason::NoCommand(_)
            | EndReason::NoCommandStatus(_)
            | EndReason::Watchdog
            | EndReason::Kvm(_)
            | EndReason::NotSeen(_)
            | EndReason::NotSaved(_)
            | EndReason::TimedOut(_)
            | EndReason::NotBooted(_)
            | EndReason::Failed(_)
            | EndReason::Crashed(_) => true,
        };
        if wanted && !is_verbose() && !self.kernel_log.is_empty() {
            print_stderr(&format!("The kernel's log ends with:\n{}\n", self.kernel_log.join("\n")));
        }
    }
}

/// One line: why and where.
fn describe(record: &RunRecord, end: &EndReason) -> String {
    let mut text = end.to_string();
    let rip = |index: usize| record.vcpus.get(index).and_then(|vcpu| vcpu.rip);
    let at = record.end.vcpu.unwrap_or(0);
    // Writing to a String cannot fail.
    let _ = match (record.end.vcpu, rip(at)) {
        (Some(index), Some(rip)) => write!(text, " (vCPU {index}, rip {rip:#x})"),
        (None, Some(rip)) => write!(text, " (vCPU 0 at rip {rip:#x})"),
        _ => Ok(()),
    };
    text
}

/// The statistics in the format that was asked for.
fn stats_text(format: StatsFormat, stats: &RunStats) -> Result<String, serde_json::Error> {
    Ok(match format {
        StatsFormat::Text => format!("{stats}\n"),
        StatsFormat::Json => format!("{}\n", escape_json(&serde_json::to_string(stats)?)),
    })
}

/// Writes the text of the statistics.
fn write_stats(text: &Result<String, serde_json::Error>, file: &ResultFile) -> Result<(), Box<dyn Error>> {
    let text = text.as_ref().map_err(|error| format!("cannot write the statistics: {error}"))?;
    file.write(text).map_err(|error| format!("cannot write the statistics to {}: {error}", file.path().shown()).into())
}

/// Writes the profile as JSON.
fn write_profile(profile: &Profile, file: &ResultFile) -> Result<(), Box<dyn Error>> {
    let text = render(profile, Format::Json, Style::default())?;
    file.write(&text).map_err(|error| format!("cannot write {}: {error}", file.path().shown()).into())
}

/// Prints the last exits of each vCPU: some on a terminal, all with -v or into a file.
fn show_flight_recorder(record: &RunRecord, symbols: &RunSymbols) {
    let all = !io::stderr().is_terminal() || is_verbose();
    let extent = if all { profile::Extent::All } else { profile::Extent::LastLines };
    print_stderr(&escape_text(&profile::flight_recorder(record, symbols.get(), extent)));
}
