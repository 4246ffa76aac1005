//! Suites of boot tests (`hwvmm test`): files, matrix, verdicts, reports, shards.
//!
//! A test is a run of its own: a process `hwvmm run` with a folder of its own. What a run ended with is read from its statistics; the
//! guest's log can only make its own test fail.

mod attempt;
mod baseline;
mod case;
mod expand;
mod file;
mod folder;
mod host;
mod kernel_log;
mod ktap;
mod log;
mod merge;
mod options;
mod outcome;
mod patterns;
mod problem;
mod record;
mod report;
mod schedule;
mod select;
mod shard;
mod stats;
mod template;
mod templates;
mod verdict;
mod vmtest;

pub use baseline::{Baseline, BaselineError, Counts};
pub use case::Case;
pub use expand::{ExpandError, MAX_TESTS, expand};
pub use file::{SuiteError, SuiteFile};
pub use folder::{FolderError, ResultFolder};
pub use ktap::{Ktap, KtapReport, MAX_SUBTESTS, Subtest, SubtestResult};
pub use merge::{MergeError, Merged, merge};
pub use patterns::{OOPSES, Oops, OopsKind};
pub use problem::Problem;
pub use record::{Attempt, Header, RanOn, TemplateRun, TestResult, Totals};
pub use report::{
    Annotations, Colour, annotation, html, junit, ktap, ktap_lines, line, step_summary, summary, template_line,
};
pub use schedule::{Done, FailFast, Interrupted, Jobs, Plan, UpdateBaseline, baseline_path, run};
pub use select::{Selection, SelectionError};
pub use shard::{Shard, ShardError, bazel_status_file};
pub use stats::ExitCounts;
pub use template::Template;
pub use verdict::{Meaning, Verdict};

/// A suite with one of each kind of key, for `hwvmm test --init`.
pub const SAMPLE: &str = include_str!("sample.toml");
/// The file that is read where none is named.
pub const DEFAULT_FILE: &str = "hwvmm-test.toml";
