//! Baselines: the exits that each test made when all was well, and how many more it may make.

use super::folder::FolderError;
use super::record::RanOn;
use crate::bounded_read::{self, ReadError};
use crate::config::{Budget, BudgetError, Slack};
use crate::escape::escape;
use crate::profile::Profile;
use crate::profile::budget::{check, from_profile};
use hwvmm_devices::path_text::PathText as _;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use thiserror::Error;

/// The largest file, in bytes.
const MAX_BYTES: u64 = 64 << 20;
/// What the file says it is.
const FORMAT: &str = "hwvmm-baseline";
/// The version of the format.
const VERSION: u32 = 1;

/// A baseline cannot be used.
#[derive(Debug, Error)]
pub enum BaselineError {
    /// The file cannot be read.
    #[error("cannot read the baseline {}; --update-baseline makes it", .0.shown())]
    Read(PathBuf, #[source] ReadError),
    /// The file is none.
    #[error("{} is no baseline of hwvmm: {why}", .path.shown())]
    Not {
        /// The file that is refused.
        path: PathBuf,
        /// Why it is none.
        why: String,
    },
    /// Another version of the format.
    #[error("{} is a baseline of version {found}, and this hwvmm reads version {VERSION}: make it again with --update-baseline", .path.shown())]
    Version {
        /// The file that is refused.
        path: PathBuf,
        /// The version that the file has.
        found: u64,
    },
    /// The file cannot be written.
    #[error("cannot write the baseline {}", .0.shown())]
    Write(PathBuf, #[source] io::Error),
    /// The folder's file cannot be written.
    #[error(transparent)]
    Folder(#[from] FolderError),
}

/// Counts that are no limits.
#[derive(Debug, Error)]
enum CountsError {
    /// A name that could not be in a list.
    #[error("'{0}' is no name of a count")]
    Name(String),
    /// A name that is that of no counter.
    #[error(transparent)]
    Budget(#[from] BudgetError),
}

/// The counts of one test: those that do not depend on how long the guest ran, by the names that `--budget` has for them.
pub type Counts = BTreeMap<String, u64>;

/// The counts of tests, by name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Baseline {
    format: String,
    version: u32,
    /// What the run that wrote the file was on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    made_on: Option<RanOn>,
    tests: BTreeMap<String, Counts>,
}

/// How a run compares with its baseline.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Comparison {
    /// All counts are within their limits.
    Held,
    /// The baseline does not have the test.
    Unknown,
    /// Counts are beyond their limits: one line each.
    Exceeded(Vec<String>),
    /// The run does not have counts that the baseline has.
    NotMeasured(String),
}

impl Default for Baseline {
    fn default() -> Self {
        Self { format: FORMAT.to_owned(), version: VERSION, made_on: None, tests: BTreeMap::new() }
    }
}

/// Reads the version alone: the rest of another version may be anything.
#[derive(Deserialize)]
struct Head {
    format: String,
    version: u64,
}

impl Baseline {
    /// Reads the file at `path`.
    ///
    /// # Errors
    /// [`BaselineError`].
    pub fn read(path: &Path) -> Result<Self, BaselineError> {
        let bytes = bounded_read::read(path, MAX_BYTES).map_err(|error| BaselineError::Read(path.to_owned(), error))?;
        Self::parse(path, &bytes)
    }

    fn parse(path: &Path, bytes: &[u8]) -> Result<Self, BaselineError> {
        let not = |why: String| BaselineError::Not { path: path.to_owned(), why: escape(&why, 300) };
        let head: Head = serde_json::from_slice(bytes).map_err(|error| not(error.to_string()))?;
        if head.format != FORMAT {
            return Err(not(format!("its format is '{}'", head.format)));
        }
        if head.version != u64::from(VERSION) {
            return Err(BaselineError::Version { path: path.to_owned(), found: head.version });
        }
        let mut baseline: Self = serde_json::from_slice(bytes).map_err(|error| not(error.to_string()))?;
        baseline.made_on = baseline.made_on.map(RanOn::escaped);
        for (test, counts) in &baseline.tests {
            budget(counts, None).map_err(|error| not(format!("test '{test}': {error}")))?;
        }
        Ok(baseline)
    }

    /// Sets the counts of a test.
    pub fn set(&mut self, test: &str, counts: Counts) {
        self.tests.insert(test.to_owned(), counts);
    }

    /// Sets what the counts were made on.
    pub fn made_on(&mut self, ran_on: RanOn) {
        self.made_on = Some(ran_on);
    }

    /// Writes the file at `path`, in place of what was there: whole, or not at all.
    ///
    /// # Errors
    /// [`BaselineError::Write`]
    pub fn write(&self, path: &Path) -> Result<(), BaselineError> {
        let failed = |error| BaselineError::Write(path.to_owned(), error);
        let text = serde_json::to_string_pretty(self).map_err(|error| failed(error.into()))? + "\n";
        let mut name = path.file_name().unwrap_or_default().to_owned();
        name.push(format!(".{}.new", std::process::id()));
        let new = path.with_file_name(name);
        let write = || {
            let mut file = File::options().write(true).create_new(true).mode(0o644).open(&new)?;
            file.write_all(text.as_bytes())?;
            file.sync_all()?;
            fs::rename(&new, path)
        };
        write().map_err(|error| {
            // What there is of it is of no use.
            let _ = fs::remove_file(&new);
            failed(error)
        })
    }

    /// Compares a run of `test` on `ran_on` with its counts.
    pub(super) fn compare(&self, test: &str, profile: &Profile, slack: Slack, ran_on: &RanOn) -> Comparison {
        let Some(counts) = self.tests.get(test) else { return Comparison::Unknown };
        // The counts were checked when the file was read.
        let Ok(budget) = budget(counts, Some(slack)) else { return Comparison::Unknown };
        let checks = check(&budget, profile);
        if let Some(missing) = checks.iter().find(|check| check.count.is_none()) {
            let why = profile.missing.first().map_or_else(String::new, |why| format!(": {}", escape(why, 300)));
            return Comparison::NotMeasured(format!("the baseline has {}, which was not measured{why}", missing.name));
        }
        let mut exceeded: Vec<String> =
            checks.iter().filter(|check| !check.is_held()).map(|check| escape(&check.to_string(), 300)).collect();
        if exceeded.is_empty() {
            return Comparison::Held;
        }
        // Another MMU, or another module, makes other exits.
        exceeded.extend(
            self.made_on.iter().filter(|made| *made != ran_on).map(|made| format!("its baseline was made on {made}")),
        );
        Comparison::Exceeded(exceeded)
    }
}

/// The counts of a profile that a baseline keeps: those of `--budget-from`.
pub(super) fn counts(profile: &Profile) -> Counts {
    let limits = from_profile(profile, Slack::default()).limits;
    limits.into_iter().map(|limit| (limit.counter.to_string(), limit.max_exits)).collect()
}

fn budget(counts: &Counts, slack: Option<Slack>) -> Result<Budget, CountsError> {
    let plain = |name: &str| name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte));
    // A name with a slash would be taken for the path of a file.
    if let Some(name) = counts.keys().find(|name| !plain(name)) {
        return Err(CountsError::Name(name.clone()));
    }
    let list: Vec<String> = counts.iter().map(|(name, count)| format!("{name}={count}")).collect();
    let mut budget = Budget::parse(&list.join(","))?;
    for limit in &mut budget.limits {
        limit.max_exits = slack.map_or(limit.max_exits, |slack| slack.limit(limit.max_exits));
    }
    Ok(budget)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::profile::data::tests::sample;

    fn slack(text: &str) -> Slack {
        Slack::parse(text).expect("a percentage")
    }

    fn host(mmu: &str) -> RanOn {
        RanOn { hwvmm: "1".into(), kvm: None, mmu: mmu.into(), nested: false }
    }

    #[test]
    fn growth_beyond_the_slack_is_found() {
        let mut baseline = Baseline::default();
        baseline.set("boot", counts(&sample()));
        assert_eq!(baseline.compare("boot", &sample(), slack("0"), &host("npt")), Comparison::Held);
        assert_eq!(baseline.compare("other", &sample(), slack("0"), &host("npt")), Comparison::Unknown);
        let mut today = sample();
        today.userspace_exits.causes[0].count += 7;
        assert_eq!(baseline.compare("boot", &today, slack("3%"), &host("npt")), Comparison::Held);
        let Comparison::Exceeded(lines) = baseline.compare("boot", &today, slack("2%"), &host("npt")) else {
            panic!("held")
        };
        assert!(lines[0].contains("budget userspace: 307 of 306, 1 too many"), "{lines:?}");
        baseline.made_on(host("npt"));
        let Comparison::Exceeded(lines) = baseline.compare("boot", &today, slack("2%"), &host("npt")) else {
            panic!("held")
        };
        assert!(!lines.concat().contains("made on"), "{lines:?}");
        let Comparison::Exceeded(lines) = baseline.compare("boot", &today, slack("2%"), &host("shadow")) else {
            panic!("held")
        };
        assert!(lines.concat().contains("its baseline was made on hwvmm 1, an unknown KVM, npt"), "{lines:?}");
        today.vm_exits = None;
        assert!(matches!(baseline.compare("boot", &today, slack("3%"), &host("npt")), Comparison::NotMeasured(_)));
    }

    #[test]
    fn a_baseline_is_written_and_read() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("baseline.json");
        let mut baseline = Baseline::default();
        baseline.set("boot", counts(&sample()));
        baseline.write(&path).expect("written");
        baseline.write(&path).expect("written again");
        assert_eq!(Baseline::read(&path).expect("read"), baseline);
        assert_eq!(fs::read_dir(folder.path()).expect("a folder").count(), 1, "nothing else is left");
        assert!(baseline.write(Path::new("/nowhere/file")).is_err());
    }

    #[test]
    fn what_is_no_baseline_is_refused() {
        for (text, words) in [
            ("", "is no baseline"),
            ("{\"format\":\"x\",\"version\":1}", "its format is 'x'"),
            (
                "{\"format\":\"hwvmm-baseline\",\"version\":2,\"other\":[]}",
                "of version 2, and this hwvmm reads version 1",
            ),
            (
                "{\"format\":\"hwvmm-baseline\",\"version\":1,\"tests\":{\"a\":{\"/etc/passwd\":1}}}",
                "no name of a count",
            ),
            ("{\"format\":\"hwvmm-baseline\",\"version\":1,\"tests\":{\"a\":{\"colour\":1}}}", "test 'a'"),
            ("{\"format\":\"hwvmm-baseline\",\"version\":1,\"tests\":{},\"x\":1}", "unknown field"),
        ] {
            let error = Baseline::parse(Path::new("b.json"), text.as_bytes()).expect_err("refused").to_string();
            assert!(error.contains(words), "{error}");
        }
        assert!(matches!(Baseline::read(Path::new("/dev/zero")), Err(BaselineError::Read(..))));
    }
}
