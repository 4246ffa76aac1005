//! The file of `--status-file`: how a run ended, so that a command's exit status is not taken for one of hwvmm's own.

use crate::escape::escape_json;
use crate::exit::{CommandEnd, EndReason};
use crate::measure::MenuEntry;
use serde::Serialize;

/// The version of the format.
const VERSION: u32 = 1;

/// The contents of the file: one JSON object on one line.
#[derive(Debug, Serialize)]
pub(super) struct StatusRecord {
    version: u32,
    /// The name of the end ([`EndReason::name`]).
    end: &'static str,
    /// The exit status of hwvmm.
    status: u8,
    /// How the command ended; null where it has not, or is not known to have.
    command: Option<CommandEnd>,
    /// The entry of a boot loader's menu whose kernel ran; left out where the kernel was in a file of its own.
    #[serde(skip_serializing_if = "Option::is_none")]
    entry: Option<MenuEntry>,
    /// The end in words, which may change.
    message: String,
}

impl StatusRecord {
    /// The record of a run of this `entry` that ended with `end`, and in which hwvmm exits with `status`.
    pub(super) fn new(end: &EndReason, status: u8, entry: Option<MenuEntry>) -> Self {
        let command = match end {
            EndReason::Command(command) => Some(*command),
            _ => None,
        };
        Self { version: VERSION, end: end.kind().name(), status, command, entry, message: end.to_string() }
    }

    /// The text of the file.
    pub(super) fn text(&self) -> Result<String, serde_json::Error> {
        Ok(format!("{}\n", escape_json(&serde_json::to_string(self)?)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_record_tells_a_command_from_hwvmm() {
        let text = |end: &EndReason| StatusRecord::new(end, end.status(), None).text().expect("JSON");
        assert_eq!(
            text(&EndReason::Command(CommandEnd::Exited(34))),
            "{\"version\":1,\"end\":\"command\",\"status\":34,\"command\":{\"exited\":34},\"message\":\"the command exited with \
             status 34\"}\n"
        );
        assert!(text(&EndReason::Command(CommandEnd::Signaled(9))).contains("\"command\":{\"signaled\":9}"));
        let panic = text(&EndReason::Panicked(Some("\u{1b}[2J\u{202e}".into())));
        assert!(panic.contains("\"end\":\"panic\",\"status\":34,\"command\":null"), "{panic}");
        assert!(!panic.contains(['\u{1b}', '\u{202e}']), "{panic}");
        let entry = MenuEntry { number: "1>0".into(), title: "a\u{1b}[2J".into() };
        let entry = StatusRecord::new(&EndReason::PowerOff, 0, Some(entry)).text().expect("JSON");
        assert!(entry.contains("\"command\":null,\"entry\":{\"number\":\"1>0\",\"title\":\"a"), "{entry}");
        assert!(!entry.contains('\u{1b}'), "{entry}");
    }
}
