//! One test, with its kernel and its place in the matrix: what is run, and what it needs of the host.

use super::file::Settings;
use super::options::{StdoutOf, run_options, with_log_level};
use super::problem::Problem;
use super::template::Template;
use crate::config::{MmuChoice, RunConfig, Slack};
use std::path::PathBuf;
use std::time::Duration;
use toml::Table;

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
    /// The guest that it goes on from; `None` where it boots.
    pub template: Option<Template>,
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

impl Case {
    /// The options as the run gets them.
    pub(super) fn options_of_run(&self) -> Table {
        with_log_level(self.options.clone(), self.needs.stdout)
    }
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
