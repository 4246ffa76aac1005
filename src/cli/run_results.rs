//! The results of `hwvmm run` as text, on stderr or in files.

use super::output::print_stderr;
use super::result_file::ResultFile;
use crate::config::StatsFormat;
use crate::escape::{escape_json, escape_text};
use crate::exit::EndReason;
use crate::measure::RunRecord;
use crate::profile::render::{Format, Style, render};
use crate::profile::{self, Profile, RunStats, RunSymbols};
use hwvmm_devices::path_text::PathText as _;
use std::error::Error;
use std::fmt::Write as _;
use std::io::{self, IsTerminal};

/// One line: why and where.
pub(super) fn describe(record: &RunRecord, end: &EndReason) -> String {
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
pub(super) fn stats_text(format: StatsFormat, stats: &RunStats) -> Result<String, serde_json::Error> {
    Ok(match format {
        StatsFormat::Text => format!("{stats}\n"),
        StatsFormat::Json => format!("{}\n", escape_json(&serde_json::to_string(stats)?)),
    })
}

/// Writes the text of the statistics.
pub(super) fn write_stats(text: &Result<String, serde_json::Error>, file: &ResultFile) -> Result<(), Box<dyn Error>> {
    let text = text.as_ref().map_err(|error| format!("cannot write the statistics: {error}"))?;
    file.write(text).map_err(|error| format!("cannot write the statistics to {}: {error}", file.path().shown()).into())
}

/// Writes the profile as JSON.
pub(super) fn write_profile(profile: &Profile, file: &ResultFile) -> Result<(), Box<dyn Error>> {
    let text = render(profile, Format::Json, Style::default())?;
    file.write(&text).map_err(|error| format!("cannot write {}: {error}", file.path().shown()).into())
}

/// Prints the last exits of each vCPU: some on a terminal, all with -v or into a file.
pub(super) fn show_flight_recorder(record: &RunRecord, symbols: &RunSymbols) {
    let all = !io::stderr().is_terminal() || log::max_level() >= log::LevelFilter::Info;
    let extent = if all { profile::Extent::All } else { profile::Extent::LastLines };
    print_stderr(&escape_text(&profile::flight_recorder(record, symbols.get(), extent)));
}
