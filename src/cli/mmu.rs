//! `hwvmm mmu`: nested or shadow paging on this host.

use super::output::{fail, print_json, print_text, say};
use crate::config::MmuChoice;
use crate::escape::{GUEST_BYTES, escape};
use crate::probe::{Host, Mmu, MmuChange, MmuState, command_for};
use serde_json::json;
use std::fmt::Write as _;
use std::path::Path;
use std::process::ExitCode;
use thiserror::Error;

#[derive(clap::Args)]
pub(super) struct Args {
    #[command(subcommand)]
    what: Option<What>,

    /// One JSON object on one line
    #[arg(long)]
    json: bool,
}

#[derive(clap::Subcommand)]
enum What {
    /// Load KVM's module again, with the other MMU (as root, and only while no virtual machine runs)
    Set {
        /// Nested paging (npt, or ept) or shadow paging
        #[arg(value_name = "npt|shadow")]
        mmu: Paging,
    },
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum Paging {
    #[value(alias = "ept")]
    Npt,
    Shadow,
}

impl From<Paging> for Mmu {
    fn from(paging: Paging) -> Self {
        match paging {
            Paging::Npt => Self::Nested,
            Paging::Shadow => Self::Shadow,
        }
    }
}

/// Returns the MMU that a choice asks for; `None` where any will do.
fn wanted(choice: MmuChoice) -> Option<Mmu> {
    match choice {
        MmuChoice::Auto => None,
        MmuChoice::Nested => Some(Mmu::Nested),
        MmuChoice::Shadow => Some(Mmu::Shadow),
    }
}

/// KVM does not use the MMU that `--mmu` asks for.
#[derive(Debug, Error, PartialEq, Eq)]
pub(super) enum MmuMismatch {
    /// The module can be loaded with the other one.
    #[error(
        "this host's {module} uses {}, and --mmu {option} asks for {}: `hwvmm mmu set {option}` as root changes that for all \
         machines of this host (it does {command})", .has.name(), .wanted.name()
    )]
    Changeable {
        /// Name of the module.
        module: &'static str,
        /// The MMU that it uses.
        has: Mmu,
        /// The MMU that is asked for.
        wanted: Mmu,
        /// The argument of `--mmu` and of `hwvmm mmu set`.
        option: &'static str,
        /// The shell command that loads the module with the other MMU.
        command: String,
    },
    /// The module has one MMU only, or is not known.
    #[error(
        "this host's KVM{} uses {}, and cannot do {}, which --mmu {option} asks for",
        .module.map(|name| format!(" ({name})")).unwrap_or_default(), .has.name(), .wanted.name()
    )]
    Fixed {
        /// Name of the module, where it is known.
        module: Option<&'static str>,
        /// The MMU that it uses.
        has: Mmu,
        /// The MMU that is asked for.
        wanted: Mmu,
        /// The argument of `--mmu`.
        option: &'static str,
    },
}

/// Checks that KVM uses the MMU that `choice` asks for.
///
/// # Errors
/// [`MmuMismatch`], with the command that changes it.
pub(super) fn check(choice: MmuChoice, host: &Host) -> Result<(), MmuMismatch> {
    let (has, module) = (host.mmu(), host.vendor_module());
    let Some(wanted) = wanted(choice).filter(|wanted| *wanted != has) else {
        log::info!("MMU: {}{}", has.name(), module.map(|name| format!(" ({name})")).unwrap_or_default());
        return Ok(());
    };
    let option = if wanted == Mmu::Nested { "npt" } else { "shadow" };
    Err(match module.and_then(|module| Some((module, command_for(module, wanted)?))) {
        Some((module, command)) => MmuMismatch::Changeable { module, has, wanted, option, command },
        None => MmuMismatch::Fixed { module, has, wanted, option },
    })
}

pub(super) fn run(args: &Args) -> ExitCode {
    let host = Host::at(Path::new("/"));
    if let Some(What::Set { mmu }) = &args.what {
        match host.set_mmu((*mmu).into()) {
            Ok(MmuChange::Loaded) => {
                say(&format!("{} was loaded again", host.vendor_module().unwrap_or("the module")));
            }
            Ok(MmuChange::None) => say("KVM uses that MMU already: nothing was changed"),
            Err(error) => return fail(&error),
        }
    }
    let state = host.mmu_state();
    if args.json { print_json(&to_json(&state)) } else { print_text(&to_text(&state)) }
}

fn to_json(state: &MmuState) -> serde_json::Value {
    let parameters: serde_json::Map<_, _> =
        state.parameters.iter().map(|(name, value)| (name.clone(), json!(value))).collect();
    let holders: Vec<_> = state.holders.iter().map(|holder| json!({"pid": holder.pid, "name": holder.name})).collect();
    json!({
        "module": state.module,
        "mmu": match state.mmu { Mmu::Nested => "nested", Mmu::Shadow => "shadow", Mmu::Unknown => "unknown" },
        "parameters": parameters,
        "references": state.references,
        "holders": holders,
    })
}

fn to_text(state: &MmuState) -> String {
    let mut text = format!("{:<34} {}\n", "module", state.module.unwrap_or("none"));
    let _ = writeln!(text, "{:<34} {}", "MMU", state.mmu.name());
    for (name, value) in &state.parameters {
        let _ = writeln!(text, "{name:<34} {value}");
    }
    let references = state.references.map_or_else(|| "built in, or unknown".to_owned(), |count| count.to_string());
    let _ = writeln!(text, "{:<34} {references}", "references to the module");
    for holder in &state.holders {
        // A process chooses its name: a line feed in it must not begin a line of this table.
        let _ = writeln!(text, "{:<34} {} ({})", "used by", escape(&holder.name, GUEST_BYTES), holder.pid);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::probe::Holder;

    #[test]
    fn the_name_of_a_process_is_one_line_without_escape_sequences() {
        let holder = Holder { pid: 7, name: "\x1b]0;x\x07\nmodule\u{9b}2J".into() };
        let state =
            MmuState { module: None, mmu: Mmu::Unknown, parameters: vec![], references: None, holders: vec![holder] };
        let text = to_text(&state);
        assert_eq!(text.lines().count(), 4, "{text}");
        assert!(text.ends_with("\\x1b]0;x\\x07\\nmodule\\u{9b}2J (7)\n"), "{text}");
    }

    #[test]
    fn the_other_mmu_is_an_error_with_the_command_that_changes_it() {
        let root = tempfile::tempdir().expect("a temporary folder");
        let folder = root.path().join("sys/module/kvm_amd/parameters");
        std::fs::create_dir_all(&folder).expect("made");
        std::fs::write(folder.join("npt"), "1\n").expect("written");
        let host = Host::at(root.path());
        assert_eq!(check(MmuChoice::Auto, &host), Ok(()));
        assert_eq!(check(MmuChoice::Nested, &host), Ok(()));
        let words = check(MmuChoice::Shadow, &host).expect_err("the other one").to_string();
        assert!(words.contains("hwvmm mmu set shadow") && words.contains("modprobe kvm_amd npt=0"), "{words}");
        let nothing = Host::at(Path::new("/nonexistent"));
        assert!(check(MmuChoice::Nested, &nothing).is_err());
    }
}
