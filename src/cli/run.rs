//! `hwvmm run`.

use crate::config::{OnReboot, RunConfig, RunOptions, StatsFormat, read_file};
use crate::exit::End;
use crate::kvm::System;
use crate::machine::console::{RawTerminal, Seen};
use crate::machine::{self, Finish, Machine, Setup};
use crate::profile::RunStats;
use std::error::Error;
use std::fmt::Write as _;
use std::io::{self, IsTerminal, Write as _};
use std::path::PathBuf;
use std::process::ExitCode;

/// Options.
#[derive(clap::Args)]
pub(super) struct Args {
    /// Read options from a TOML file; what is given here as well wins
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,

    #[command(flatten)]
    options: RunOptions,
}

pub(super) fn run(args: Args) -> ExitCode {
    match try_run(args) {
        Ok(end) => ExitCode::from(end.status()),
        Err(error) => super::fail(error.as_ref()),
    }
}

fn try_run(args: Args) -> Result<End, Box<dyn Error>> {
    let file = args.config.as_deref().map(read_file).transpose()?.unwrap_or_default();
    let config = args.options.or(file).into_config()?;
    let expect = config.expect.as_deref().map(compile).transpose()?;
    let system = System::open(&config.kvm)?;
    let expects = expect.is_some();
    let terminal = uses_stdin(&config) && io::stdin().is_terminal();
    let quiet = !io::stderr().is_terminal();
    let progress = move |what: &str| {
        if quiet {
            log::info!("{what}");
        } else {
            eprintln!("hwvmm: {what}");
        }
    };
    let mut setup = Setup { config: &config, expect, seen: Seen::default(), terminal, progress: &progress };
    let (finish, stats) = start_until_done(&mut setup, &system)?;
    let end = if expects { finish.ended.end.clone().without_the_expected() } else { finish.ended.end.clone() };
    eprintln!("{}", describe(&finish, &end));
    if let Some(mut stats) = stats {
        (stats.end, stats.status) = (end.to_string(), end.status());
        show(&config, &stats)?;
    }
    Ok(end)
}

fn compile(pattern: &str) -> Result<regex::bytes::Regex, crate::config::ConfigError> {
    regex::bytes::Regex::new(pattern).map_err(|error| crate::config::ConfigError::Expect(error.to_string()))
}

fn uses_stdin(config: &RunConfig) -> bool {
    let targets = config.serial.iter().flatten().chain(&config.console);
    targets.into_iter().any(|target| *target == crate::config::ConsoleTarget::Stdio)
}

/// Starts the guest, and again as often as it resets itself, where that is wanted.
fn start_until_done(setup: &mut Setup<'_>, system: &System) -> Result<(Finish, Option<RunStats>), Box<dyn Error>> {
    let mut stats: Option<RunStats> = None;
    let deadline = setup.config.timeout.map(|timeout| std::time::Instant::now() + timeout);
    let mut config = setup.config.clone();
    loop {
        setup.seen = Seen::default();
        // What is left of the time, over all starts.
        config.timeout = deadline.map(|at| at.saturating_duration_since(std::time::Instant::now()));
        let finish = {
            let this = Setup {
                config: &config,
                expect: setup.expect.clone(),
                seen: setup.seen.clone(),
                terminal: setup.terminal,
                progress: setup.progress,
            };
            let machine = Machine::new(&this, system)?;
            let _raw = if setup.terminal { RawTerminal::enter() } else { None };
            machine::run(machine, &this)?
        };
        if setup.config.stats.is_some() {
            let new = RunStats::new(&finish);
            match &mut stats {
                Some(sum) => sum.add_start(new),
                none => *none = Some(new),
            }
        }
        let restart = setup.config.on_reboot == OnReboot::Restart && finish.ended.end == End::Reset;
        if !restart {
            return Ok((with_whole_timeout(finish, setup.config), stats));
        }
        log::info!("the guest reset itself: it is started again");
    }
}

/// A timeout is told with the time that was given, not with what the last start had left of it.
fn with_whole_timeout(mut finish: Finish, config: &RunConfig) -> Finish {
    if let (End::TimedOut(after), Some(timeout)) = (&mut finish.ended.end, config.timeout) {
        *after = timeout;
    }
    finish
}

/// One line: why and where. After an unclean end also the last exits.
fn describe(finish: &Finish, end: &End) -> String {
    let mut text = format!("hwvmm: {end}");
    let rip = |index: usize| finish.vcpus.get(index).and_then(|vcpu| vcpu.rip);
    let at = finish.ended.vcpu.unwrap_or(0);
    // Writing to a String cannot fail.
    let _ = match (finish.ended.vcpu, rip(at)) {
        (Some(index), Some(rip)) => write!(text, " (vCPU {index}, rip {rip:#x})"),
        (None, Some(rip)) => write!(text, " (vCPU 0 at rip {rip:#x})"),
        _ => Ok(()),
    };
    if end.is_clean() {
        return text;
    }
    let shown: Vec<_> = match finish.ended.vcpu {
        Some(index) => finish.vcpus.iter().enumerate().filter(|(i, _)| *i == index).collect(),
        None => finish.vcpus.iter().enumerate().take(4).collect(),
    };
    for (index, vcpu) in shown {
        let exits: Vec<_> = vcpu.recent.iter().collect();
        let _ = write!(text, "\nhwvmm: the last {} userspace exits of vCPU {index}, oldest first:", exits.len());
        for exit in exits {
            let _ = write!(text, "\nhwvmm:   {exit}");
        }
    }
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
