//! The subcommand `hwvmm bench`: measures what exits cost on this host.

use super::output::{fail, print_json, print_text, say};
use super::report;
use crate::bounded_read;
use crate::config::cache_folder;
use crate::error::chain;
use crate::kvm::System;
use crate::probe::{Cost, costs};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::error::Error;
use std::fmt::Write as _;
use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;

#[derive(clap::Args)]
pub(super) struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(clap::Subcommand)]
enum What {
    /// Measure the cost of one exit of each kind
    #[command(
        after_help = "The costs are kept in ~/.cache/hwvmm/exit-costs.json, and profiles of this host then show what \
                            their exits cost.\n\nExample: hwvmm bench exits --json\n\nExit status: 0; 1 for a failure; 2 for a wrong option."
    )]
    Exits(Exits),
    /// Measure the cost and the exits of single operations of a bare guest (nanobenchmarks)
    #[command(
        after_help = "Examples:\n  hwvmm bench nano\n  hwvmm bench nano --json > npt.json\n  hwvmm bench nano --compare \
                            native.json shadow.json npt.json\n  hwvmm bench nano --image nano.elf && qemu-system-x86_64 -kernel \
                            nano.elf -nographic -device isa-debug-exit | tee native.txt\n  hwvmm bench nano --parse native.txt \
                            --label native --json > native.json\n\nSeven of the operations are those of Adams and Agesen's \"A Comparison of Software \
                            and Hardware Techniques for x86 Virtualization\" (ASPLOS 2006).\n\nExit status: 0; 1 for a failure; 2 for a wrong option."
    )]
    Nano(super::nano::Args),
}

#[derive(clap::Args)]
struct Exits {
    /// Print one JSON object on one line
    #[arg(long)]
    json: bool,

    /// Do not keep the costs
    #[arg(long)]
    no_save: bool,

    /// KVM's device
    #[arg(long, default_value = "/dev/kvm", value_name = "PATH")]
    kvm: PathBuf,
}

/// The largest file of costs, in bytes. It has two numbers for each kind of exit.
const MAX_SAVED_BYTES: u64 = 1 << 16;

/// Where the costs are kept.
fn saved() -> Option<PathBuf> {
    cache_folder().map(|folder| folder.join("exit-costs.json"))
}

fn host() -> String {
    rustix::system::uname().release().to_string_lossy().into_owned()
}

/// The costs that an earlier `hwvmm bench exits` found on this host's kernel; empty where there are none.
pub(super) fn saved_costs() -> BTreeMap<String, f64> {
    let read = || {
        let value: Value = serde_json::from_slice(&bounded_read::read(&saved()?, MAX_SAVED_BYTES).ok()?).ok()?;
        let same = value.get("host_kernel")?.as_str()? == host();
        let costs = value.get("ns")?.as_object()?;
        let cost =
            |(name, ns): (&String, &Value)| Some((name.clone(), ns.as_f64().filter(|ns| (0.0..1e12).contains(ns))?));
        same.then(|| costs.iter().filter_map(cost).collect())
    };
    read().unwrap_or_default()
}

pub(super) fn run(args: &Args) -> ExitCode {
    let exits = match &args.what {
        What::Exits(exits) => exits,
        What::Nano(nano) => return super::nano::run(nano),
    };
    match bench(exits) {
        Ok(code) => code,
        Err(error) => fail(error.as_ref()),
    }
}

fn to_json(costs: &[Cost]) -> Value {
    let measured = costs.iter().filter_map(|cost| Some((cost.kind.name().to_owned(), cost.result.as_ref().ok()?)));
    let (mut ns, mut cycles) = (Map::new(), Map::new());
    for (name, price) in measured {
        ns.insert(name.clone(), json!((price.ns * 10.0).round() / 10.0));
        cycles.insert(name, json!(price.cycles.round()));
    }
    let failed: Map<String, Value> = costs
        .iter()
        .filter_map(|cost| Some((cost.kind.name().to_owned(), chain(cost.result.as_ref().err()?).into())))
        .collect();
    json!({"host_kernel": host(), "ns": ns, "cycles": cycles, "failed": failed})
}

fn to_text(costs: &[Cost]) -> String {
    let mut text = format!("{:<46} {:>12} {:>12}\n", "one exit on this host", "ns", "cycles");
    for cost in costs {
        let _ = match &cost.result {
            Ok(price) => writeln!(text, "{:<46} {:>12.0} {:>12.0}", cost.kind.what(), price.ns, price.cycles),
            Err(error) => writeln!(text, "{:<46} not measured: {}", cost.kind.what(), chain(error)),
        };
    }
    text
}

fn bench(args: &Exits) -> Result<ExitCode, Box<dyn Error>> {
    let system = System::open(&args.kvm)?;
    let talks = std::io::stderr().is_terminal();
    let costs = costs(&system, |kind| {
        if talks {
            say(&format!("measuring: {}", kind.what()));
        }
    });
    let value = to_json(&costs);
    if !args.no_save
        && let Some(path) = saved()
    {
        if let Some(folder) = path.parent() {
            crate::boot::cache::make_folder(folder)?;
        }
        report::write(&path, &format!("{value}\n"))?;
    }
    let printed = if args.json { print_json(&value) } else { print_text(&to_text(&costs)) };
    // A host where nothing can be measured has no answer to give.
    if costs.iter().all(|cost| cost.result.is_err()) {
        return Err("no kind of exit could be measured here; `hwvmm doctor` says why".into());
    }
    Ok(printed)
}
