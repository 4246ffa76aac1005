//! What is wrong in a file of a suite.

use crate::config::{ConfigError, ValueError};
use crate::escape::escape;
use serde::de::DeserializeOwned;
use std::fmt;
use thiserror::Error;
use toml::{Table, Value};

/// Bytes of a key or a value in a message.
const SHOWN_BYTES: usize = 100;

/// Bytes of a problem in a message.
pub(super) const PROBLEM_BYTES: usize = 2000;

/// What is wrong with a table of a suite, or of a file of vmtest's. Messages have line ends as spaces: they are shown on one line.
#[derive(Debug, Error)]
pub enum Problem {
    /// A key that is none.
    #[error("unknown key '{}'; the keys are: {}", escape(.key, SHOWN_BYTES), .known.join(", "))]
    UnknownKey {
        /// The key that the table has.
        key: String,
        /// The keys that there are.
        known: Vec<String>,
    },
    /// An option of `hwvmm run` that no test can have.
    #[error("'{key}' cannot be given: {why}")]
    Taken {
        /// The long name of the option.
        key: String,
        /// Why it cannot.
        why: &'static str,
    },
    /// A key without which the table means nothing.
    #[error("{0} is missing")]
    Missing(&'static str),
    /// A value of another kind.
    #[error("{key} must be {wanted}{}", not(.found.as_ref()))]
    Kind {
        /// The key whose value it is.
        key: String,
        /// What it must be, with its article.
        wanted: &'static str,
        /// The value that was given; `None` where the message does not show it.
        found: Option<Value>,
    },
    /// A value that its key cannot have.
    #[error("{}", one_line(.0))]
    Value(toml::de::Error),
    /// A number beyond its limit.
    #[error("{key} = {value}; at most {max} are allowed")]
    TooLarge {
        /// The key of the number.
        key: &'static str,
        /// The number that was given.
        value: u32,
        /// The largest value.
        max: u32,
    },
    /// A name that is too long.
    #[error("its name has {bytes} bytes; {max} are allowed")]
    LongName {
        /// Its length in bytes.
        bytes: usize,
        /// The largest length.
        max: usize,
    },
    /// A name with characters that are no text.
    #[error("its name has control characters")]
    ControlCharacters,
    /// Two keys of which one must be given.
    #[error("{0} and {1}: give one of them")]
    Both(&'static str, &'static str),
    /// A key that has no meaning beside another one.
    #[error("{0} {1}")]
    Contradiction(&'static str, &'static str),
    /// Tables of hwvmm's and of vmtest's in one file.
    #[error("it has [[{targets}]] and [[{other}]]: use the one or the other in a file")]
    TwoFormats {
        /// The table of vmtest's.
        targets: &'static str,
        /// The other table.
        other: &'static str,
    },
    /// No table of this kind.
    #[error("{place} no [[{table}]]")]
    NoTables {
        /// What has none, with its verb.
        place: &'static str,
        /// The name of the tables.
        table: &'static str,
    },
    /// Two kernels of one name.
    #[error("two [[kernel]] have this name; give one of them another name")]
    TwoKernels,
    /// Kernels of a name that there is not.
    #[error("there is no kernel '{}'; the kernels are: {}", escape(.name, SHOWN_BYTES), .known.join(", "))]
    NoKernel {
        /// The name that the test asks for.
        name: String,
        /// The names that there are.
        known: Vec<String>,
    },
    /// More kernels than a suite may have.
    #[error("more than {0} kernels")]
    TooManyKernels(usize),
    /// A pattern that is none.
    #[error("{key}: {error}")]
    Pattern {
        /// The key that has it.
        key: String,
        /// What is wrong with it.
        error: glob::PatternError,
    },
    /// A folder of a pattern cannot be read.
    #[error("path: {0}")]
    Glob(glob::GlobError),
    /// A pattern that matches nothing.
    #[error("no file matches '{0}'")]
    NoMatch(String),
    /// A path that TOML cannot have.
    #[error("{0} is not UTF-8")]
    NotUtf8(&'static str),
    /// A target for another processor.
    #[error("arch = '{}': guests are x86_64", escape(.0, SHOWN_BYTES))]
    Arch(String),
    /// A target of vmtest's.
    #[error("{place}: {problem}")]
    Target {
        /// Its name or number.
        place: String,
        /// What is wrong with it.
        problem: Box<Problem>,
    },
    /// Options that contradict each other, or a value that cannot be.
    #[error("{}", one_line(&crate::error::chain(.0)))]
    Options(ConfigError),
    /// A time that is none.
    #[error("{key}: {error}; or \"off\"")]
    Time {
        /// The key that has it.
        key: &'static str,
        /// What is wrong with it.
        error: ValueError,
    },
}

/// `, not VALUE`.
fn not(found: Option<&Value>) -> String {
    found.map_or_else(String::new, |value| format!(", not {}", escape(&value.to_string(), SHOWN_BYTES)))
}

/// The lines of a message of TOML's or of a regular expression's: what is wrong, and the key.
fn one_line(error: &dyn fmt::Display) -> String {
    error.to_string().lines().map(str::trim).filter(|line| !line.is_empty()).collect::<Vec<_>>().join(" ")
}

/// Reads a table. Unlike the message of [`toml::de::Error`], that of the problem names the key.
///
/// # Errors
/// [`Problem::Value`]
pub(super) fn read<T: DeserializeOwned>(table: Table) -> Result<T, Problem> {
    Value::Table(table).try_into().map_err(Problem::Value)
}
