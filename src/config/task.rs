//! What the agent in a guest is for, and when the machine is saved, by the options of the run.

use super::command::AgentTask;
use super::error::ConfigError;
use super::options::RunOptions;
use super::snapshot_at::SnapshotAt;

impl RunOptions {
    /// When the machine is saved. The run ends then, and waits for nothing else.
    pub(super) fn saving(&self) -> Result<Option<SnapshotAt>, ConfigError> {
        match &self.snapshot_at {
            Some(_) if self.expect.is_some() => Err(ConfigError::NotWithSnapshotAt("--expect")),
            Some(_) if self.template.is_some() => Err(ConfigError::NotWithSnapshotAt("--template")),
            given => Ok(given.clone()),
        }
    }

    /// What the agent is for. A command and a template exclude each other.
    pub(super) fn task(&self) -> AgentTask {
        match (self.command.is_empty(), &self.template) {
            (_, Some(_)) => AgentTask::Template,
            (true, None) => AgentTask::None,
            (false, None) => AgentTask::Command,
        }
    }
}
