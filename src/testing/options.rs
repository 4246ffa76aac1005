//! Options of `hwvmm run` as a suite has them: tables of TOML.

use super::problem::{self, Problem};
use crate::config::{RunOptions, toml_escaped};
use std::path::Path;
use toml::{Table, Value};

/// The time-out of a test that has none.
pub(super) const TIMEOUT: &str = "5m";

/// Whose stdout that of a run is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StdoutOf {
    /// The guest's console has it.
    Console,
    /// A command that the guest runs has it. The kernel's log goes to a file.
    Command,
}

/// The options of a run, where the kernel of a command logs what it complains of, up to warnings, and not its other messages: each byte is
/// an exit.
pub(super) fn with_log_level(mut options: Table, stdout: StdoutOf) -> Table {
    if stdout == StdoutOf::Command && !has_log_level(&options) {
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
fn has_log_level(options: &Table) -> bool {
    const WORDS: [&str; 4] = ["loglevel=", "ignore_loglevel", "quiet", "debug"];
    let texts = ["append", "cmdline"].map(|key| options.get(key).map(ToString::to_string).unwrap_or_default());
    texts.iter().any(|text| WORDS.iter().any(|word| text.contains(word)))
}

/// A path as the value of an option: as text, or with escapes where it is not UTF-8.
pub(super) fn path_value(path: &Path) -> Value {
    match path.to_str() {
        Some(text) => Value::String(text.to_owned()),
        None => {
            let escaped = toml_escaped(path.as_os_str());
            Value::Table(Table::from_iter([("escaped".to_owned(), Value::String(escaped))]))
        }
    }
}

/// The options of `hwvmm run` that a table has.
///
/// # Errors
/// [`Problem::Value`]
pub(super) fn run_options(table: &Table) -> Result<RunOptions, Problem> {
    problem::read(table.clone())
}
