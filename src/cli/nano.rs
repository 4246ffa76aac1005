//! The subcommand `hwvmm bench nano`: runs and compares the nanobenchmarks.

use super::output::{fail, print_json, print_text};
use crate::bounded_read;
use crate::kvm::System;
use crate::nano::{Column, Form, OPERATIONS, Paging, compare, elf, measure, parse};
use crate::probe::{Host, Mmu};
use hwvmm_devices::path_text::PathText as _;
use std::error::Error;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// The largest column, or output of the guest with what firmware and boot loader print before it, in bytes.
const MAX_FILE_BYTES: u64 = 1 << 20;

#[derive(clap::Args)]
pub(super) struct Args {
    /// Print one JSON object on one line, a column for --compare
    #[arg(long)]
    json: bool,

    /// Title of the column [default: hwvmm and the MMU]
    #[arg(long, value_name = "NAME")]
    label: Option<String>,

    /// Commit that is measured, for the JSON
    #[arg(long, value_name = "HASH")]
    commit: Option<String>,

    /// Read the output of the guest on a bare machine or under another VMM instead of running it
    #[arg(long, value_name = "FILE", conflicts_with = "compare")]
    parse: Option<PathBuf>,

    /// Write the guest to FILE as a multiboot kernel instead of running it
    #[arg(long, value_name = "FILE", conflicts_with_all = ["compare", "parse"])]
    image: Option<PathBuf>,

    /// Print columns side by side, with ratios to the first
    #[arg(long, value_name = "FILE", num_args = 1..)]
    compare: Vec<PathBuf>,

    /// Format of --compare
    #[arg(long, value_enum, default_value = "text", value_name = "FORMAT")]
    form: OutputForm,

    /// KVM's device
    #[arg(long, default_value = "/dev/kvm", value_name = "PATH")]
    kvm: PathBuf,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum OutputForm {
    /// Table for a terminal
    Text,
    /// Table for a document
    Markdown,
    /// Bar chart
    Svg,
}

/// What is known of this host, for a column.
fn column(args: &Args, label: &str, mmu: Paging) -> Column {
    let host = Host::at(Path::new("/"));
    Column {
        label: args.label.clone().unwrap_or_else(|| label.to_owned()),
        hwvmm: env!("CARGO_PKG_VERSION").into(),
        kernel: host.kernel(),
        cpu: host.cpu(),
        mmu,
        commit: args.commit.clone(),
        results: std::collections::BTreeMap::new(),
    }
}

pub(super) fn run(args: &Args) -> ExitCode {
    match bench(args) {
        Ok(code) => code,
        Err(error) => fail(error.as_ref()),
    }
}

fn bench(args: &Args) -> Result<ExitCode, Box<dyn Error>> {
    if let Some(path) = &args.image {
        std::fs::write(path, elf()).map_err(|error| format!("cannot write {}: {error}", path.shown()))?;
        return Ok(ExitCode::SUCCESS);
    }
    if !args.compare.is_empty() {
        let columns: Vec<Column> = args.compare.iter().map(|path| read(path)).collect::<Result<_, _>>()?;
        let form = match args.form {
            OutputForm::Text => Form::Text,
            OutputForm::Markdown => Form::Markdown,
            OutputForm::Svg => Form::Svg,
        };
        return Ok(print_text(&compare(&columns, form)));
    }
    let column = if let Some(path) = &args.parse {
        let bytes = read_file(path)?;
        let results = parse(&String::from_utf8_lossy(&bytes))?;
        Column { results, ..column(args, "elsewhere", Paging::None) }
    } else {
        let (paging, label) = match Host::at(Path::new("/")).mmu() {
            Mmu::Nested => (Paging::Nested, "hwvmm, nested"),
            Mmu::Shadow => (Paging::Shadow, "hwvmm, shadow"),
            Mmu::Unknown => (Paging::Unknown, "hwvmm"),
        };
        let system = System::open(&args.kvm)?;
        measure(&system, column(args, label, paging))?
    };
    Ok(if args.json { print_json(&column) } else { print_text(&to_text(&column)) })
}

fn read_file(path: &Path) -> Result<Vec<u8>, Box<dyn Error>> {
    bounded_read::read(path, MAX_FILE_BYTES).map_err(|error| format!("cannot read {}: {error}", path.shown()).into())
}

fn read(path: &Path) -> Result<Column, Box<dyn Error>> {
    let column = serde_json::from_slice(&read_file(path)?);
    column.map_err(|error| format!("{} is not a column of `hwvmm bench nano --json`: {error}", path.shown()).into())
}

fn to_text(column: &Column) -> String {
    let mut text = format!("{}: Linux {}, {}\n", column.label, column.kernel, column.cpu);
    let _ = writeln!(text, "{:<12} {:>10} {:>8} {:>8}  {:<56} which", "operation", "cycles", "±", "exits", "what");
    for operation in &OPERATIONS {
        let Some(measured) = column.results.get(operation.name) else {
            let _ =
                writeln!(text, "{:<12} {:>10} {:>8} {:>8}  {}: not here", operation.name, "-", "", "", operation.what);
            continue;
        };
        let exits = measured.exits.map_or("-".into(), |exits| format!("{exits:.2}"));
        let mut by: Vec<(&String, &f64)> = measured.by.iter().collect();
        by.sort_by(|a, b| b.1.total_cmp(a.1));
        let by: Vec<String> = by.iter().take(3).map(|(name, each)| format!("{name} {each:.2}")).collect();
        let spread = format!("{:.1} %", measured.spread * 100.0);
        let _ = writeln!(
            text,
            "{:<12} {:>10.1} {spread:>8} {exits:>8}  {:<56} {}",
            operation.name,
            measured.cycles,
            operation.what,
            by.join(", ")
        );
    }
    text
}
