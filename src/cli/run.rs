//! `hwvmm run`.

use super::output::{fail, say};
use super::report;
use crate::boot;
use crate::config::{Budget, OnReboot, RunConfig, RunOptions, StatsFormat, read_file};
use crate::console::{Announcements, RawTerminal, fresh_line};
use crate::exit::EndReason;
use crate::exit::end::status;
use crate::kvm::System;
use crate::machine::{self, Machine, Setup};
use crate::measure::RunRecord;
use crate::probe::{ANY_KVM, Host, check_linux};
use crate::profile::budget::check;
use crate::profile::render::{Format, Style, render};
use crate::profile::{self, Profile, RunStats};
use std::error::Error;
use std::fmt::Write as _;
use std::io::{self, IsTerminal, Write as _};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Options of `hwvmm run`.
#[derive(clap::Args)]
pub(super) struct Args {
    /// Read options from a TOML file; the command line overrides them
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,

    #[command(flatten)]
    options: RunOptions,
}

pub(super) fn run(args: Args) -> ExitCode {
    match try_run(args) {
        Ok(status) => ExitCode::from(status),
        Err(error) => fail(error.as_ref()),
    }
}

fn try_run(args: Args) -> Result<u8, Box<dyn Error>> {
    if args.options.asks_for_levers() {
        io::stdout().write_all(crate::tune::help().as_bytes())?;
        return Ok(status::OK);
    }
    let config = match configuration(args) {
        Ok(config) => config,
        Err(error) => {
            fail(error.as_ref());
            return Ok(status::USAGE);
        }
    };
    let expect = config.expect.as_ref().map(|pattern| pattern.0.clone());
    let budget = report::budget(config.budget.as_ref(), config.budget_from.as_deref(), config.slack)?;
    let host = Host::at(Path::new("/"));
    super::mmu::check(config.mmu, &host)?;
    let system = System::open(&config.kvm)?;
    let any_kvm = std::env::var_os(ANY_KVM).is_some_and(|value| value == "1");
    if !any_kvm && !host.has_hardware_kvm() && boot::is_linux(&config.kernel) {
        check_linux(&system, &host)?;
    }
    let expects = expect.is_some();
    let terminal = uses_stdin(&config) && io::stdin().is_terminal();
    let quiet = !io::stderr().is_terminal();
    let progress = move |what: &str| {
        if quiet {
            log::info!("{what}");
        } else {
            say(what);
        }
    };
    let mut setup =
        Setup { config: &config, expect, announcements: Announcements::default(), terminal, progress: &progress };
    let (record, stats) = start_until_done(&mut setup, &system)?;
    let end = if expects { record.end.reason.clone().without_the_expected() } else { record.end.reason.clone() };
    if !end.is_clean() {
        show_flight_recorder(&config, &record);
    }
    // After the flight recorder: this is the line that must stay on the screen.
    say(&describe(&record, &end));
    let starts = stats.as_ref().map_or(1, |stats| stats.starts);
    if let Some(mut stats) = stats {
        (stats.end, stats.status) = (end.to_string(), end.status());
        show(&config, &stats)?;
    }
    if config.profile.is_none() {
        return Ok(end.status());
    }
    let mut profile = Profile::new(&config, &record);
    profile.costs = super::bench::saved_costs();
    (profile.end, profile.status, profile.starts) = (end.to_string(), end.status(), starts);
    let within = show_profile(&config, &profile, &budget)?;
    Ok(if within || end.status() != status::OK { end.status() } else { status::OVER_BUDGET })
}

/// Reads the options of the command line and of the file, and checks them.
fn configuration(args: Args) -> Result<RunConfig, Box<dyn Error>> {
    let file = args.config.as_deref().map(read_file).transpose()?.unwrap_or_default();
    let config = args.options.or(file).into_config()?;
    if let Some(budget) = &config.budget {
        report::check_reasons(budget)?;
    }
    Ok(config)
}

/// Prints the last exits of each vCPU: some on a terminal, all with -v or into a file.
fn show_flight_recorder(config: &RunConfig, record: &RunRecord) {
    let symbols = profile::symbols_of(config, record, &mut Vec::new());
    let all = !io::stderr().is_terminal() || log::max_level() >= log::LevelFilter::Info;
    let extent = if all { profile::Extent::All } else { profile::Extent::LastLines };
    let text = profile::flight_recorder(record, symbols.as_ref(), extent);
    let _ = write!(io::stderr(), "{}{text}", fresh_line());
}

/// Prints and writes the profile. Returns true if it is within the budget.
fn show_profile(config: &RunConfig, profile: &Profile, budget: &Budget) -> Result<bool, Box<dyn Error>> {
    let style = Style { colour: io::stderr().is_terminal(), ..Style::default() };
    eprint!("{}", render(profile, Format::Text, style)?);
    if let Some(path) = &config.profile_out {
        report::write(path, &render(profile, Format::Json, style)?)?;
    }
    Ok(report::show_checks(&check(budget, profile)))
}

fn uses_stdin(config: &RunConfig) -> bool {
    let targets = config.serial.iter().flatten().chain(&config.console);
    targets.into_iter().any(|target| *target == crate::config::ConsoleTarget::Stdio)
}

/// Starts the guest, and again as often as it resets itself, where that is wanted.
fn start_until_done(setup: &mut Setup<'_>, system: &System) -> Result<(RunRecord, Option<RunStats>), Box<dyn Error>> {
    let mut stats: Option<RunStats> = None;
    let deadline = setup.config.timeout.map(|timeout| std::time::Instant::now() + timeout);
    let mut config = setup.config.clone();
    loop {
        setup.announcements = Announcements::default();
        // What is left of the time, over all starts.
        config.timeout = deadline.map(|at| at.saturating_duration_since(std::time::Instant::now()));
        let record = {
            let this = Setup {
                config: &config,
                expect: setup.expect.clone(),
                announcements: setup.announcements.clone(),
                terminal: setup.terminal,
                progress: setup.progress,
            };
            let machine = Machine::new(&this, system)?;
            let _raw = if setup.terminal { RawTerminal::enter() } else { None };
            machine::run(machine, &this)?
        };
        if setup.config.stats.is_some() || setup.config.profile.is_some() {
            let new = RunStats::new(&record);
            match &mut stats {
                Some(sum) => sum.add_start(new),
                none => *none = Some(new),
            }
        }
        let restart = setup.config.on_reboot == OnReboot::Restart && record.end.reason == EndReason::Reset;
        if !restart {
            return Ok((with_whole_timeout(record, setup.config), stats));
        }
        log::info!("the guest reset itself: it is started again");
    }
}

/// The end by timeout is reported with the whole time of `--timeout`, not with what the last start had left of it.
fn with_whole_timeout(mut record: RunRecord, config: &RunConfig) -> RunRecord {
    if let (EndReason::TimedOut(after), Some(timeout)) = (&mut record.end.reason, config.timeout) {
        *after = timeout;
    }
    record
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

fn show(config: &RunConfig, stats: &RunStats) -> Result<(), Box<dyn Error>> {
    let text = match config.stats {
        None => return Ok(()),
        Some(StatsFormat::Text) => format!("{stats}\n"),
        Some(StatsFormat::Json) => format!("{}\n", serde_json::to_string(stats)?),
    };
    match &config.stats_out {
        Some(path) => std::fs::write(path, text)
            .map_err(|error| format!("cannot write the statistics to {}: {error}", path.display()).into()),
        None => Ok(io::stderr().write_all(text.as_bytes())?),
    }
}
