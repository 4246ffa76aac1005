//! One test, with its kernel and its place in the matrix: what is run, and what it needs of the host.

use super::file::Settings;
use super::problem::{self, Problem};
use crate::config::{MmuChoice, RunConfig, RunOptions, Slack};
use std::path::PathBuf;
use std::time::Duration;
use toml::{Table, Value};

/// The time-out of a test that has none.
pub(super) const TIMEOUT: &str = "5m";

/// One run of a suite.
#[derive(Clone, Debug)]
pub struct Case {
    /// Its name, which no other one has: `boot[debian,cpus=2]`.
    pub name: String,
    /// The folder that the paths in `options` are relative to.
    pub folder: PathBuf,
    /// The options of `hwvmm run`, with the kernel, or the image that has it.
    pub options: Table,
    /// How it is run and judged.
    pub settings: Settings,
    /// The host's resources that the run takes, and its limits.
    pub needs: Needs,
}

/// What a run needs, and when it ends at the latest.
#[derive(Clone, Debug)]
pub struct Needs {
    /// Guest memory in bytes.
    pub memory_bytes: u64,
    /// The number of vCPUs.
    pub vcpus: u64,
    /// The MMU that KVM must use for it.
    pub mmu: MmuChoice,
    /// By how much the counts of its baseline may be exceeded.
    pub slack: Slack,
    /// The time-out of the run.
    pub timeout: Duration,
    /// Whose stdout the run's is.
    pub stdout: StdoutOf,
}

/// Whose stdout that of a run is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StdoutOf {
    /// The guest's console has it.
    Console,
    /// A command that the guest runs has it. The kernel's log goes to a file.
    Command,
}

impl Case {
    /// The options as the run gets them. The kernel of a command logs what it complains of, up to warnings, and not its other messages:
    /// each byte is an exit.
    pub(super) fn options_of_run(&self) -> Table {
        let mut options = self.options.clone();
        if self.needs.stdout == StdoutOf::Command && !self.has_log_level() {
            let mut words = vec![Value::String("loglevel=5".into())];
            match options.remove("append") {
                None => {}
                Some(Value::Array(given)) => words.extend(given),
                Some(one) => words.push(one),
            }
            options.insert("append".into(), Value::Array(words));
        }
        options
    }

    /// Returns true if the options say which of the kernel's messages its console gets.
    fn has_log_level(&self) -> bool {
        const WORDS: [&str; 4] = ["loglevel=", "ignore_loglevel", "quiet", "debug"];
        let texts = ["append", "cmdline"].map(|key| self.options.get(key).map(ToString::to_string).unwrap_or_default());
        texts.iter().any(|text| WORDS.iter().any(|word| text.contains(word)))
    }
}

/// The options of `hwvmm run` that a table has.
///
/// # Errors
/// [`Problem::Value`]
pub(super) fn run_options(table: &Table) -> Result<RunOptions, Problem> {
    problem::read(table.clone())
}

impl Needs {
    /// What a run with these options needs.
    ///
    /// # Errors
    /// [`Problem::Value`] and [`Problem::Options`]
    pub(super) fn of(options: &Table) -> Result<Self, Problem> {
        Ok(Self::of_config(&run_options(options)?.into_config().map_err(Problem::Options)?))
    }

    fn of_config(config: &RunConfig) -> Self {
        Self {
            memory_bytes: config.memory.bytes,
            vcpus: config.cpus.count().into(),
            mmu: config.mmu,
            slack: config.slack,
            timeout: config.timeout.unwrap_or(Duration::from_secs(300)),
            stdout: if config.has_command() { StdoutOf::Command } else { StdoutOf::Console },
        }
    }
}
