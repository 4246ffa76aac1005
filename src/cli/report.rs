//! The subcommand `hwvmm report`: renders and compares profiles.

use super::output::{fail, print_all, say};
use crate::config::{Budget, BudgetError, Slack};
use crate::escape::escape_json;
use crate::exit::ExitReason;
use crate::exit::end::status;
use crate::profile::Profile;
use crate::profile::budget::{Check, check, from_profile};
use crate::profile::render::{Format, Style, diff, render};
use hwvmm_devices::path_text::PathText as _;
use std::error::Error;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

#[derive(clap::Args)]
pub(super) struct Args {
    /// A profile that `hwvmm run --profile-out` wrote
    profile: PathBuf,

    /// A second profile: print the changes from the first to this one
    other: Option<PathBuf>,

    /// Format of the output; text or json for two profiles
    #[arg(short, long, default_value = "text", value_name = "FORMAT")]
    format: Format,

    /// Write to this file instead of stdout
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,

    /// Largest number of rows of a table
    #[arg(long, default_value_t = 25, value_name = "N")]
    rows: usize,

    /// Largest numbers of exits: NAME=COUNT,... or a file with such lines, as for `hwvmm run --budget`; more end with
    /// status 39
    #[arg(long, value_name = "LIMITS", value_parser = parse_budget)]
    budget: Option<Budget>,

    /// Take the counts of this profile as limits for each kind of exit, except for those that come with time: the host's
    /// interrupts, the guest's timer, and windows for its interrupts
    #[arg(long, value_name = "FILE")]
    budget_from: Option<PathBuf>,

    /// By how much the counts of --budget-from may be exceeded
    #[arg(long, default_value = "2%", value_name = "PERCENT", value_parser = Slack::parse)]
    slack: Slack,
}

fn parse_budget(text: &str) -> Result<Budget, BudgetError> {
    let budget = Budget::parse(text)?;
    check_reasons(&budget)?;
    Ok(budget)
}

/// Returns an error if `budget` names a userspace exit reason that does not exist.
pub(super) fn check_reasons(budget: &Budget) -> Result<(), BudgetError> {
    budget.check_reasons(|name| ExitReason::ALL.iter().any(|reason| reason.name() == name))
}

/// Returns the limits of --budget and --budget-from together.
pub(super) fn budget(given: Option<&Budget>, from: Option<&Path>, slack: Slack) -> Result<Budget, Box<dyn Error>> {
    let mut budget = given.cloned().unwrap_or_default();
    if let Some(path) = from {
        budget.limits.extend(from_profile(&Profile::read(path)?, slack).limits);
    }
    Ok(budget)
}

/// Prints each check. Returns true if all limits were held.
pub(super) fn show_checks(checks: &[Check]) -> bool {
    for check in checks {
        say(&check.to_string());
    }
    checks.iter().all(Check::is_held)
}

pub(super) fn run(args: &Args) -> ExitCode {
    match report(args) {
        Ok(code) => code,
        Err(error) => fail(error.as_ref()),
    }
}

fn report(args: &Args) -> Result<ExitCode, Box<dyn Error>> {
    let profile = Profile::read(&args.profile)?;
    let colour = args.output.is_none() && std::io::stdout().is_terminal();
    let style = Style { colour, rows: args.rows };
    // Read once: the file may be a pipe, or change.
    let other = args.other.as_deref().map(Profile::read).transpose()?;
    let text = match &other {
        None => render(&profile, args.format, style)?,
        Some(other) => {
            let difference = diff(&profile, other);
            match args.format {
                Format::Text => difference.text(style),
                Format::Json => escape_json(&serde_json::to_string(&difference)?) + "\n",
                _ => return Err("the difference of two profiles is text or json (--format)".into()),
            }
        }
    };
    let budget = budget(args.budget.as_ref(), args.budget_from.as_deref(), args.slack)?;
    match &args.output {
        Some(path) => write(path, &text)?,
        None => {
            let printed = print_all(text.as_bytes());
            if printed != ExitCode::SUCCESS {
                return Ok(printed);
            }
        }
    }
    // Of two profiles, the second is the news.
    let held = show_checks(&check(&budget, other.as_ref().unwrap_or(&profile)));
    Ok(ExitCode::from(if held { status::OK } else { status::OVER_BUDGET }))
}

/// Writes a file, or says why not.
pub(super) fn write(path: &Path, text: &str) -> Result<(), Box<dyn Error>> {
    std::fs::write(path, text).map_err(|error| format!("cannot write {}: {error}", path.shown()).into())
}
