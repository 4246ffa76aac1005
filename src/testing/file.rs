//! The file of a suite: TOML with `[defaults]`, `[[kernel]]` and `[[test]]`. The options of `hwvmm run` are keys of all three; what
//! a test has replaces what its kernel has, and that replaces the defaults. A file of vmtest's has `[[target]]` instead.

use super::patterns::OopsKind;
use super::problem::{self, PROBLEM_BYTES, Problem};
use super::vmtest;
use crate::bounded_read::{self, ReadError};
use crate::config::{RunOptions, parse_duration};
use crate::escape::escape;
use hwvmm_devices::path_text::PathText as _;
use serde::Deserialize;
use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::time::Duration;
use thiserror::Error;
use toml::{Table, Value};

/// The largest file, in bytes: 10,000 tests of 800 bytes.
const MAX_BYTES: u64 = 8 << 20;
/// Bytes of a name at most.
const MAX_NAME_BYTES: usize = 200;
/// Tries of a test at most.
const MAX_RETRIES: u32 = 100;

/// Keys of a test that are no options of `hwvmm run`.
const OF_TESTS: &[&str] =
    &["name", "kernel", "run", "template", "silence", "retries", "baseline", "status", "ktap", "fail-on", "matrix"];
/// Keys of the defaults that are no options of `hwvmm run`.
const OF_DEFAULTS: &[&str] = &["kernel", "template", "silence", "retries", "baseline", "status", "ktap", "fail-on"];
/// Keys of a kernel that are no options of `hwvmm run`.
const OF_KERNELS: &[&str] = &["name", "path"];
/// Keys of a matrix.
const OF_MATRIX: &[&str] = &["kernel", "cpus", "memory", "mmu", "transport", "tune", "root", "cmdline", "append"];
/// Options of `hwvmm run` that no table has, and why.
const TAKEN: &[(&str, &str)] = &[
    ("kernel", BY_COMMAND),
    ("from", "a test boots a kernel, and a snapshot is none"),
    ("template", "it is a key of [[test]] and of [defaults]"),
    ("kernel-from", "a disk image with a kernel is the path of a [[kernel]]"),
    ("stats", BY_COMMAND),
    ("stats-out", BY_COMMAND),
    ("profile-out", BY_COMMAND),
    ("api", BY_COMMAND),
    ("status-file", BY_COMMAND),
    ("kernel-log", BY_COMMAND),
    ("tty", BY_COMMAND),
];
const BY_COMMAND: &str = "it is set by the test command itself";
/// Tables of the file.
const TABLES: &[&str] = &["defaults", "kernel", "test"];
/// The tables of a file of vmtest's.
const TARGETS: &str = "target";

/// A file of a suite cannot be used.
#[derive(Debug, Error)]
pub enum SuiteError {
    /// The file cannot be read.
    #[error("cannot read the suite {}; `hwvmm test --init` writes a sample", .0.shown())]
    Read(PathBuf, #[source] ReadError),
    /// The file is not TOML.
    #[error("{}", .0.shown())]
    Toml(PathBuf, #[source] toml::de::Error),
    /// Something in it is wrong.
    #[error("{}: {place}: {}", .path.shown(), escape(&.problem.to_string(), PROBLEM_BYTES))]
    Content {
        /// The suite's file.
        path: PathBuf,
        /// The table in it that is wrong.
        place: String,
        /// What is wrong with it.
        problem: Box<Problem>,
    },
}

/// What tells how a test is run and judged, apart from the options of its run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// How long the guest may print nothing.
    pub silence: Option<Duration>,
    /// How often it is tried again when it fails.
    pub retries: u32,
    /// File of the counts of exits that it is held to.
    pub baseline: Option<PathBuf>,
    /// The exit status of `hwvmm run` with which it passes.
    pub status: u8,
    /// Whether sub-tests are read from its console.
    pub ktap: KtapUse,
    /// The complaints of the kernel that fail it.
    pub fail_on: Vec<OopsKind>,
    /// Where its guest starts, if it runs a command.
    pub start: Start,
}

/// Where the guest of a test starts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Start {
    /// The kernel boots, as in each run.
    #[default]
    Boot,
    /// It goes on from a guest that has booted once, for all tests with the same kernel and options.
    Template,
}

/// Whether sub-tests are read from the console of a test.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum KtapUse {
    /// The console is not searched for sub-tests.
    #[default]
    Ignored,
    /// Sub-tests are read; the test fails where there are none.
    Required,
}

/// The keys of a table that are no options, as given.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
struct Given {
    silence: Option<String>,
    retries: Option<u32>,
    baseline: Option<PathBuf>,
    status: Option<u8>,
    template: Option<bool>,
    ktap: Option<bool>,
    fail_on: Option<Vec<OopsKind>>,
}

/// A `[[kernel]]` table of a suite: the kernels that a pattern of paths matches.
#[derive(Clone, Debug, PartialEq)]
pub struct KernelEntry {
    /// The name that tests choose it by.
    pub name: String,
    /// The path of a kernel, or of a disk image with one, which may have `*`, `?` and `[...]`.
    pub path: String,
    /// Options of runs with it.
    pub options: Table,
}

/// A `[[test]]`, with the defaults.
#[derive(Clone, Debug, PartialEq)]
pub struct TestEntry {
    /// The name in reports, to which kernel and matrix values are added.
    pub name: String,
    /// Names of its kernels, which may have `*`; `None`: all of them.
    pub kernels: Option<Vec<String>>,
    /// How it is run and judged.
    pub settings: Settings,
    /// The options of the defaults.
    pub defaults: Table,
    /// The options of the test itself.
    pub options: Table,
    /// What varies: a key and its values, in the order of the file.
    pub matrix: Vec<(String, Vec<Value>)>,
}

/// A suite as its file has it.
#[derive(Clone, Debug, PartialEq)]
pub struct SuiteFile {
    /// The path of the file, for messages.
    pub path: PathBuf,
    /// The `[[kernel]]` tables, in the order of the file.
    pub kernels: Vec<KernelEntry>,
    /// The `[[test]]` tables, in the order of the file.
    pub tests: Vec<TestEntry>,
    /// What of a file of vmtest's has no meaning here.
    pub notes: Vec<String>,
}

impl SuiteFile {
    /// Reads the file at `path`.
    ///
    /// # Errors
    /// [`SuiteError`].
    pub fn read(path: &Path) -> Result<Self, SuiteError> {
        let text =
            bounded_read::read_text(path, MAX_BYTES).map_err(|error| SuiteError::Read(path.to_owned(), error))?;
        Self::parse(path, &text)
    }

    /// Reads `text`, the content of the file at `path`, which is for messages only.
    ///
    /// # Errors
    /// [`SuiteError`].
    pub fn parse(path: &Path, text: &str) -> Result<Self, SuiteError> {
        let fail = |place: &str, problem: Problem| SuiteError::Content {
            path: path.to_owned(),
            place: escape(place, MAX_NAME_BYTES + 20),
            problem: Box::new(problem),
        };
        let mut file: Table = toml::from_str(text).map_err(|error| SuiteError::Toml(path.to_owned(), error))?;
        let notes = if file.contains_key(TARGETS) {
            from_vmtest(&mut file).map_err(|problem| fail("the file", problem))?
        } else {
            Vec::new()
        };
        if let Some(key) = file.keys().find(|key| !TABLES.contains(&key.as_str())) {
            return Err(fail("the file", unknown(key, TABLES.iter().map(ToString::to_string))));
        }
        let defaults = match file.remove("defaults") {
            None => Table::new(),
            Some(Value::Table(table)) => table,
            Some(_) => return Err(fail("[defaults]", kind("it", "a table", None))),
        };
        let options: Vec<String> = RunOptions::keys();
        let known = Known { options: &options };
        let defaults = known.split(defaults, OF_DEFAULTS).map_err(|problem| fail("[defaults]", problem))?;
        let (mut kernels, mut kernel_names) = (Vec::new(), HashSet::new());
        for table in tables(&mut file, "kernel").map_err(|problem| fail("[[kernel]]", problem))? {
            let place = place("kernel", &table, kernels.len());
            let kernel = kernel(&known, table).map_err(|problem| fail(&place, problem))?;
            if !kernel_names.insert(kernel.name.clone()) {
                return Err(fail(&place, Problem::TwoKernels));
            }
            kernels.push(kernel);
        }
        let mut tests = Vec::new();
        for table in tables(&mut file, "test").map_err(|problem| fail("[[test]]", problem))? {
            let place = place("test", &table, tests.len());
            tests.push(test(&known, &defaults, table).map_err(|problem| fail(&place, problem))?);
        }
        if tests.is_empty() {
            return Err(fail("the file", Problem::NoTables { place: "it has", table: "test" }));
        }
        Ok(Self { path: path.to_owned(), kernels, tests, notes })
    }

    /// The folder that paths in the file are relative to.
    #[must_use]
    pub fn folder(&self) -> &Path {
        self.path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."))
    }
}

/// Replaces the tables of a file of vmtest's by those of a suite. Returns what has no meaning here.
fn from_vmtest(file: &mut Table) -> Result<Vec<String>, Problem> {
    if let Some(other) = TABLES.iter().find(|table| file.contains_key(**table)) {
        return Err(Problem::TwoFormats { targets: TARGETS, other });
    }
    let converted = vmtest::convert(tables(file, TARGETS)?, &vmtest::variables())?;
    let list = |tables: Vec<Table>| Value::Array(tables.into_iter().map(Value::Table).collect());
    file.insert("kernel".into(), list(converted.kernels));
    file.insert("test".into(), list(converted.tests));
    Ok(converted.notes)
}

/// A table's own keys, and its options of `hwvmm run`.
#[derive(Clone, Default)]
struct Split {
    own: Table,
    options: Table,
}

struct Known<'a> {
    options: &'a [String],
}

impl Known<'_> {
    fn split(&self, table: Table, own: &[&str]) -> Result<Split, Problem> {
        let mut split = Split::default();
        for (key, value) in table {
            if own.contains(&key.as_str()) {
                split.own.insert(key, value);
            } else if let Some((_, why)) = TAKEN.iter().find(|(taken, _)| *taken == key) {
                return Err(Problem::Taken { key, why });
            } else if self.options.contains(&key) {
                split.options.insert(key, value);
            } else {
                let options = self.options.iter().filter(|option| TAKEN.iter().all(|(taken, _)| taken != option));
                return Err(unknown(&key, own.iter().map(ToString::to_string).chain(options.cloned())));
            }
        }
        Ok(split)
    }
}

fn unknown(key: &str, known: impl Iterator<Item = String>) -> Problem {
    Problem::UnknownKey { key: key.to_owned(), known: known.collect() }
}

fn kind(key: &str, wanted: &'static str, found: Option<Value>) -> Problem {
    Problem::Kind { key: key.to_owned(), wanted, found }
}

fn place(kind: &str, table: &Table, index: usize) -> String {
    match table.get("name").and_then(Value::as_str) {
        Some(name) => format!("{kind} '{name}'"),
        None => format!("{kind} {}", index + 1),
    }
}

fn tables(file: &mut Table, key: &str) -> Result<Vec<Table>, Problem> {
    let wrong = || kind(key, "a list of tables", None);
    match file.remove(key) {
        None => Ok(Vec::new()),
        Some(Value::Array(values)) => values
            .into_iter()
            .map(|value| match value {
                Value::Table(table) => Ok(table),
                _ => Err(wrong()),
            })
            .collect(),
        Some(_) => Err(wrong()),
    }
}

fn text(table: &mut Table, key: &'static str) -> Result<String, Problem> {
    match table.remove(key) {
        Some(Value::String(text)) if !text.is_empty() => Ok(text),
        Some(other) => Err(kind(key, "a text that is not empty", Some(other))),
        None => Err(Problem::Missing(key)),
    }
}

fn name(table: &mut Table) -> Result<String, Problem> {
    let name = text(table, "name")?;
    if name.len() > MAX_NAME_BYTES {
        return Err(Problem::LongName { bytes: name.len(), max: MAX_NAME_BYTES });
    }
    if name.chars().any(char::is_control) {
        return Err(Problem::ControlCharacters);
    }
    Ok(name)
}

fn kernel(known: &Known<'_>, table: Table) -> Result<KernelEntry, Problem> {
    let Split { mut own, options } = known.split(table, OF_KERNELS)?;
    Ok(KernelEntry { name: name(&mut own)?, path: text(&mut own, "path")?, options })
}

fn test(known: &Known<'_>, defaults: &Split, table: Table) -> Result<TestEntry, Problem> {
    let Split { mut own, mut options } = known.split(table, OF_TESTS)?;
    let run = own.remove("run").map(command).transpose()?;
    if run.and_then(|run| options.insert("command".into(), run)).is_some() {
        return Err(Problem::Both("run", "command"));
    }
    if own.get("template").and_then(Value::as_bool) == Some(true) && !options.contains_key("command") {
        return Err(Problem::Contradiction("template", "is for tests with `run`"));
    }
    let name = name(&mut own)?;
    let matrix = match own.remove("matrix") {
        None => Vec::new(),
        Some(Value::Table(table)) => matrix(table)?,
        Some(other) => return Err(kind("matrix", "a table, [test.matrix]", Some(other))),
    };
    let mut joined = defaults.own.clone();
    joined.extend(own);
    let kernels = joined.remove("kernel").map(|value| words(value, "kernel")).transpose()?;
    Ok(TestEntry { name, kernels, settings: settings(joined)?, defaults: defaults.options.clone(), options, matrix })
}

/// The command that `run` is: a line for the guest's shell, or a list of words.
fn command(run: Value) -> Result<Value, Problem> {
    match run {
        Value::String(line) if !line.is_empty() => {
            Ok(Value::Array(["/bin/sh", "-c", &line].map(|word| Value::String(word.to_owned())).to_vec()))
        }
        Value::Array(words) if !words.is_empty() => Ok(Value::Array(words)),
        other => Err(kind("run", "a line for the guest's shell, or a list of words", Some(other))),
    }
}

fn words(value: Value, key: &str) -> Result<Vec<String>, Problem> {
    let values = match value {
        Value::Array(values) => values,
        one => vec![one],
    };
    let word = |value| match value {
        Value::String(text) => Ok(text),
        other => Err(kind(key, "a name or a list of names", Some(other))),
    };
    values.into_iter().map(word).collect()
}

fn settings(own: Table) -> Result<Settings, Problem> {
    let given: Given = problem::read(own)?;
    let retries = given.retries.unwrap_or(0);
    if retries > MAX_RETRIES {
        return Err(Problem::TooLarge { key: "retries", value: retries, max: MAX_RETRIES });
    }
    let silence = match given.silence.as_deref() {
        None => Some(Duration::from_secs(60)),
        Some("off") => None,
        Some(text) => Some(parse_duration(text).map_err(|error| Problem::Time { key: "silence", error })?),
    };
    Ok(Settings {
        silence,
        retries,
        baseline: given.baseline,
        status: given.status.unwrap_or(0),
        ktap: if given.ktap == Some(true) { KtapUse::Required } else { KtapUse::Ignored },
        fail_on: given.fail_on.unwrap_or_else(|| OopsKind::ALL.to_vec()),
        start: if given.template == Some(true) { Start::Template } else { Start::Boot },
    })
}

fn matrix(table: Table) -> Result<Vec<(String, Vec<Value>)>, Problem> {
    table
        .into_iter()
        .map(|(key, values)| match values {
            _ if !OF_MATRIX.contains(&key.as_str()) => {
                Err(unknown(&format!("matrix.{key}"), OF_MATRIX.iter().map(ToString::to_string)))
            }
            Value::Array(values) if !values.is_empty() => Ok((key, values)),
            other => Err(kind(&format!("matrix.{key}"), "a list with one value or more", Some(other))),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parse(text: &str) -> Result<SuiteFile, SuiteError> {
        SuiteFile::parse(Path::new("suite.toml"), text)
    }

    #[test]
    fn what_a_test_has_replaces_the_defaults() {
        let suite = parse(
            "[defaults]\nmemory = '64M'\nretries = 2\nsilence = '5s'\n[[kernel]]\nname = 'k'\npath = 'vmlinuz'\ninitrd = 'i'\n\
             [[test]]\nname = 'a'\nexpect = 'login: '\nretries = 0\nfail-on = ['bug', 'kasan']\n[test.matrix]\ncpus = [1, 2]\n\
             [[test]]\nname = 'b'\nkernel = 'k'\nsilence = 'off'\nstatus = 1\nktap = true",
        )
        .expect("a suite");
        let [a, b] = &suite.tests[..] else { panic!("two tests") };
        assert_eq!((a.settings.retries, a.settings.silence), (0, Some(Duration::from_secs(5))));
        assert_eq!(a.settings.fail_on, [OopsKind::Bug, OopsKind::Kasan]);
        assert_eq!(a.matrix, [("cpus".to_owned(), vec![Value::Integer(1), Value::Integer(2)])]);
        assert!(a.defaults.contains_key("memory") && a.options.contains_key("expect") && a.kernels.is_none());
        assert_eq!((b.settings.retries, b.settings.silence, b.settings.status), (2, None, 1));
        assert_eq!((b.settings.ktap, b.kernels.as_deref()), (KtapUse::Required, Some(&["k".to_owned()][..])));
        assert_eq!(b.settings.fail_on, OopsKind::ALL, "all of them by default");
        assert!(suite.kernels[0].options.contains_key("initrd"));
    }

    #[test]
    fn errors_name_the_place_and_what_is_known() {
        for (text, words) in [
            ("", "it has no [[test]]"),
            ("x = 1", "unknown key 'x'; the keys are: defaults, kernel, test"),
            ("[[test]]\nname = 'a'\ncolour = 1", "test 'a': unknown key 'colour'; the keys are: name, kernel, run"),
            ("[[test]]\nname = 'a'\ncolour = 1", "memory, cpus, mmu"),
            ("[[test]]\nname = 'a'\nrun = 1", "run must be a line"),
            ("[[test]]\nname = 'a'\nrun = []", "run must be a line"),
            ("[[test]]\nname = 'a'\nrun = 'x'\ncommand = ['x']", "give one of them"),
            ("[defaults]\nrun = 'x'", "[defaults]: unknown key 'run'"),
            ("[[test]]\nname = 'a'\nstats-out = 'x'", "'stats-out' cannot be given: it is set by the test command"),
            ("[[test]]\nname = 'a'\nkernel-from = 'x'", "is the path of a [[kernel]]"),
            ("[[test]]\nname = 'a'\nfrom = 'x'", "'from' cannot be given: a test boots a kernel"),
            (
                "[[kernel]]\nname = 'k'\npath = 'a'\n[[kernel]]\nname = 'k'\npath = 'b'",
                "kernel 'k': two [[kernel]] have this name",
            ),
            ("[[test]]\nname = 'a'\ntemplate = true", "template is for tests with `run`"),
            ("[[kernel]]\nname = 'a'\ntemplate = 'x'", "it is a key of [[test]] and of [defaults]"),
            ("[[test]]\nname = 'a'\nretries = -1", "expected u32 in `retries`"),
            ("[[test]]\nname = 'a'\nstatus = 300", "in `status`"),
            ("[[test]]\nname = 'a'\nktap = 'x'", "in `ktap`"),
            ("[[test]]\n[[test]]", "test 1: name is missing"),
            ("[[test]]\nname = ''", "not empty"),
            ("[[test]]\nname = \"a\\nb\"", "control characters"),
            ("[[test]]\nname = 'a'\nretries = 101", "at most 100"),
            ("[[test]]\nname = 'a'\nretries = 'x'", "invalid type"),
            ("[[test]]\nname = 'a'\nfail-on = ['smoke']", "unknown variant `smoke`"),
            ("[[test]]\nname = 'a'\nfail-on = ['smoke']", "in `fail-on`"),
            ("[[test]]\nname = 'a'\nsilence = '0'", "silence: "),
            ("[[test]]\nname = 'a'\nkernel = 1", "a name or a list of names"),
            (
                "[[test]]\nname = 'a'\n[test.matrix]\ndisk = ['x']",
                "unknown key 'matrix.disk'; the keys are: kernel, cpus",
            ),
            ("[[test]]\nname = 'a'\n[test.matrix]\ncpus = []", "one value or more"),
            ("[[kernel]]\nname = 'a'", "kernel 'a': path is missing"),
            ("[defaults]\nname = 'x'", "[defaults]: unknown key 'name'"),
            ("test = 1", "must be a list of tables"),
            ("[[test]", "suite.toml"),
        ] {
            let error = parse(text).expect_err("refused").to_string();
            assert!(error.contains(words), "{text}: {error}");
        }
        let endless = SuiteFile::read(Path::new("/dev/zero")).expect_err("refused");
        assert!(crate::error::chain(&endless).contains("more than"), "{endless}");
    }

    proptest! {
        #[test]
        fn no_text_panics(text in "(\\[\\[?(test|kernel|defaults|test.matrix)\\]\\]?\n|(name|path|cpus|x|kernel) = (1|'a'|\\[1\\]|\\['a'\\])\n)*") {
            let _ = parse(&text);
        }
    }
}
