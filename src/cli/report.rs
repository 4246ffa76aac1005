//! `hwvmm report`.

use crate::exit::end::status;
use crate::profile::Profile;
use crate::profile::budget::{Budget, Check};
use crate::profile::render::{Format, Style, diff, render};
use std::error::Error;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// How much more than in --budget-from there may be where nothing is said.
pub(super) const SLACK: &str = "2%";

/// Options.
#[derive(clap::Args)]
pub(super) struct Args {
    /// A profile that `hwvmm run --profile-out` wrote
    profile: PathBuf,

    /// A second one: what changed from the first to it
    other: Option<PathBuf>,

    /// The form; of two profiles text or json
    #[arg(short, long, default_value = "text", value_name = "FORM")]
    format: Format,

    /// Write to this file, not to stdout
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,

    /// Rows of a table
    #[arg(long, default_value_t = 25, value_name = "N")]
    rows: usize,

    /// At most so many exits, as in `hwvmm run --budget`: else status 39
    #[arg(long, value_name = "LIMITS")]
    budget: Option<String>,

    /// At most as many exits of each kind as in this profile, but for the host's interrupts
    #[arg(long, value_name = "FILE")]
    budget_from: Option<PathBuf>,

    /// How much more than in --budget-from there may be
    #[arg(long, default_value = SLACK, value_name = "PERCENT")]
    slack: String,
}

/// The limits of --budget and --budget-from together.
pub(super) fn budget(text: Option<&str>, from: Option<&Path>, slack: &str) -> Result<Budget, Box<dyn Error>> {
    let mut budget = Budget::default();
    if let Some(text) = text {
        budget.extend(Budget::parse(text)?);
    }
    if let Some(path) = from {
        budget.extend(Budget::from_profile(&Profile::read(path)?, slack)?);
    }
    Ok(budget)
}

/// Prints what became of each limit; whether all were held.
pub(super) fn show_checks(checks: &[Check]) -> bool {
    for check in checks {
        eprintln!("hwvmm: {check}");
    }
    checks.iter().all(Check::is_held)
}

pub(super) fn run(args: &Args) -> ExitCode {
    match report(args) {
        Ok(code) => code,
        Err(error) => super::fail(error.as_ref()),
    }
}

fn report(args: &Args) -> Result<ExitCode, Box<dyn Error>> {
    let profile = Profile::read(&args.profile)?;
    let colour = args.output.is_none() && std::io::stdout().is_terminal();
    let style = Style { colour, rows: args.rows };
    let text = match &args.other {
        None => render(&profile, args.format, style)?,
        Some(other) => {
            let difference = diff(&profile, &Profile::read(other)?);
            match args.format {
                Format::Text => difference.text(style),
                Format::Json => serde_json::to_string(&difference)? + "\n",
                _ => return Err("the difference of two profiles is text or json (--format)".into()),
            }
        }
    };
    let budget = budget(args.budget.as_deref(), args.budget_from.as_deref(), &args.slack)?;
    match &args.output {
        Some(path) => write(path, &text)?,
        None => {
            let printed = super::print_all(text.as_bytes());
            if printed != ExitCode::SUCCESS {
                return Ok(printed);
            }
        }
    }
    // Of two profiles, the second is the news.
    let judged = match &args.other {
        Some(other) => Profile::read(other)?,
        None => profile,
    };
    let held = show_checks(&budget.check(&judged));
    Ok(ExitCode::from(if held { status::OK } else { status::OVER_BUDGET }))
}

/// Writes a file, or says why not.
pub(super) fn write(path: &Path, text: &str) -> Result<(), Box<dyn Error>> {
    std::fs::write(path, text).map_err(|error| format!("cannot write {}: {error}", path.display()).into())
}
