//! What the agent in a guest is for, as the options say.

use super::command::AgentTask;
use super::options::RunOptions;

impl RunOptions {
    /// What the agent is for. A command and a template exclude each other.
    pub(super) fn task(&self) -> AgentTask {
        match (self.command.is_empty(), &self.template) {
            (_, Some(_)) => AgentTask::Template,
            (true, None) => AgentTask::None,
            (false, None) => AgentTask::Command,
        }
    }
}
