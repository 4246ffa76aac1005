//! The results of a suite as plain data: what `results.jsonl` has, one object a line, and what reports are made from.

use super::ktap::KtapReport;
use super::stats::ExitCounts;
use super::verdict::{Meaning, Verdict};
use crate::escape::{escape, escape_json};
use crate::exit::end::status;
use crate::probe::Host;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;

/// What the file says it is.
pub(super) const FORMAT: &str = "hwvmm-test";
/// The version of the format.
pub(super) const VERSION: u32 = 1;
/// Bytes of a text at most, where it comes from a file.
const TEXT_BYTES: usize = 4096;
/// Bytes of a text about a host.
const HOST_BYTES: usize = 100;

/// Hosts that a report names at most.
pub(super) const MAX_HOSTS: usize = 100;

/// What tests ran on.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct RanOn {
    /// The version of hwvmm.
    pub hwvmm: String,
    /// The vendor module of the host's KVM; `None` where there is none that hwvmm knows.
    pub kvm: Option<String>,
    /// How it translates guest addresses.
    pub mmu: String,
    /// True if the host is a virtual machine itself: each exit costs more there.
    pub nested: bool,
}

impl RanOn {
    /// This hwvmm, on `host`.
    #[must_use]
    pub fn new(host: &Host) -> Self {
        Self {
            hwvmm: env!("CARGO_PKG_VERSION").to_owned(),
            kvm: host.vendor_module().map(str::to_owned),
            mmu: host.mmu().name().to_owned(),
            nested: host.is_virtual(),
        }
    }

    /// With texts that are escaped and bounded, as a file's may be anything.
    pub(super) fn escaped(self) -> Self {
        let clean = |text: String| escape(&text, HOST_BYTES);
        Self { hwvmm: clean(self.hwvmm), kvm: self.kvm.map(clean), mmu: clean(self.mmu), nested: self.nested }
    }
}

impl fmt::Display for RanOn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let module = self.kvm.as_deref().unwrap_or("an unknown KVM");
        let host = if self.nested { "in a virtual machine" } else { "on bare metal" };
        write!(f, "hwvmm {}, {module}, {}, {host}", self.hwvmm, self.mmu)
    }
}

/// The first line of `results.jsonl`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Header {
    /// The name of the format: always `FORMAT`.
    pub format: String,
    /// The version of the format: always `VERSION`.
    pub version: u32,
    /// The number of the shard, from 1.
    pub shard: u32,
    /// The number of shards.
    pub shards: u32,
    /// The number of tests in the shard. There are fewer results where the suite was ended before.
    pub tests: usize,
    /// What they ran on: one host, and in a report of many shards those of all, each kind once.
    #[serde(default)]
    pub ran_on: Vec<RanOn>,
}

/// One try of a test.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attempt {
    /// What it came to.
    pub verdict: Verdict,
    /// The reason for the verdict.
    pub message: String,
    /// The duration in milliseconds of host time.
    pub duration_ms: u64,
    /// The folder with what it left: `console.log`, `hwvmm.log`, `stats.json`, `run.toml`, `again.sh`.
    pub artifacts: String,
}

/// The result of a test. All texts are without control characters.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TestResult {
    /// The test's name, unique in the suite.
    pub name: String,
    /// What it came to.
    pub verdict: Verdict,
    /// The reason for the verdict.
    pub message: String,
    /// The sum of the durations of all tries, in milliseconds.
    pub duration_ms: u64,
    /// The exits of the last try.
    pub exits: Option<ExitCounts>,
    /// The tries, in the order in which they were run.
    pub attempts: Vec<Attempt>,
    /// Sub-tests of the last try.
    pub ktap: Option<KtapReport>,
    /// The end of the console of the last try that was not good.
    #[serde(default)]
    pub log_end: Vec<String>,
    /// The line for a shell that runs the last try again.
    pub again: String,
}

/// The boot of a template, for reports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TemplateRun {
    /// Its folder, with what it left.
    pub artifacts: String,
    /// The duration in milliseconds of host time.
    pub duration_ms: u64,
    /// The exits of the boot, where it has left statistics.
    pub exits: Option<ExitCounts>,
}

/// A line of `results.jsonl`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "kebab-case")]
pub(super) enum Line {
    /// The header, which is the first line.
    Header(Header),
    /// The result of a test: every line but the first.
    Result(Box<TestResult>),
}

impl Header {
    /// The header of these tests.
    #[must_use]
    pub fn new(shard: super::Shard, tests: usize, ran_on: Vec<RanOn>) -> Self {
        Self { format: FORMAT.into(), version: VERSION, shard: shard.index(), shards: shard.total(), tests, ran_on }
    }

    /// As a line of JSON.
    ///
    /// # Errors
    /// None that this type can have.
    pub fn json(&self) -> Result<String, serde_json::Error> {
        json(&Line::Header(self.clone()))
    }
}

impl TestResult {
    /// As a line of JSON.
    ///
    /// # Errors
    /// None that this type can have.
    pub fn json(&self) -> Result<String, serde_json::Error> {
        json(&Line::Result(Box::new(self.clone())))
    }

    /// With all texts as those of this process are: without control characters, and bounded.
    pub(super) fn escaped(mut self) -> Self {
        let clean = |text: &mut String| *text = escape(text, TEXT_BYTES);
        [&mut self.name, &mut self.message, &mut self.again].into_iter().for_each(clean);
        self.log_end.iter_mut().for_each(clean);
        for attempt in &mut self.attempts {
            clean(&mut attempt.message);
            clean(&mut attempt.artifacts);
        }
        if let Some(report) = &mut self.ktap {
            report.subtests.iter_mut().for_each(|subtest| {
                clean(&mut subtest.name);
                clean(&mut subtest.note);
            });
            report.problem.iter_mut().chain(&mut report.skip).for_each(clean);
        }
        if let Some(exits) = &mut self.exits {
            let reasons = std::mem::take(&mut exits.by_reason);
            exits.by_reason = reasons.into_iter().map(|(reason, count)| (escape(&reason, TEXT_BYTES), count)).collect();
        }
        self
    }
}

fn json(line: &Line) -> Result<String, serde_json::Error> {
    Ok(escape_json(&serde_json::to_string(line)?) + "\n")
}

/// How many tests came to what.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    counts: BTreeMap<Verdict, usize>,
    /// Tests that have no result, as the suite was ended before.
    pub not_run: usize,
}

impl Totals {
    /// Of these results, and of tests that have none.
    #[must_use]
    pub fn new<'a>(results: impl IntoIterator<Item = &'a TestResult>, not_run: usize) -> Self {
        let mut totals = Self { counts: BTreeMap::new(), not_run };
        results.into_iter().for_each(|result| *totals.counts.entry(result.verdict).or_default() += 1);
        totals
    }

    /// How many came to this.
    #[must_use]
    pub fn of(&self, verdict: Verdict) -> usize {
        self.counts.get(&verdict).copied().unwrap_or(0)
    }

    /// How many results there are.
    #[must_use]
    pub fn results(&self) -> usize {
        self.counts.values().sum()
    }

    /// Returns the number of results by verdict, for the verdicts that occurred.
    pub fn each(&self) -> impl Iterator<Item = (Verdict, usize)> {
        self.counts.iter().map(|(verdict, count)| (*verdict, *count))
    }

    /// The exit status: 0 where all is good, 1 where a test is not, and that of a failure of hwvmm where only the infrastructure failed.
    #[must_use]
    pub fn status(&self) -> u8 {
        let any = |meaning| self.counts.keys().any(|verdict| verdict.meaning() == meaning);
        if any(Meaning::Bad) {
            status::FAILURE
        } else if any(Meaning::Unknown) || self.not_run > 0 {
            status::ERROR
        } else {
            status::OK
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(in crate::testing) fn sample(name: &str, verdict: Verdict) -> TestResult {
        let attempt = Attempt { verdict, message: "why".into(), duration_ms: 1500, artifacts: "/a".into() };
        TestResult {
            name: name.into(),
            verdict,
            message: if verdict == Verdict::Pass { String::new() } else { "why".into() },
            duration_ms: 1500,
            exits: Some(ExitCounts {
                userspace: 7,
                by_reason: BTreeMap::from([("pio_out".into(), 7)]),
                vm_exits: None,
            }),
            attempts: vec![attempt],
            ktap: None,
            log_end: vec!["final line".into()],
            again: "hwvmm run".into(),
        }
    }

    #[test]
    fn the_status_tells_failures_from_infrastructure() {
        let status = |verdicts: &[Verdict], not_run| {
            let results: Vec<_> = verdicts.iter().map(|verdict| sample("a", *verdict)).collect();
            Totals::new(&results, not_run).status()
        };
        use Verdict::{Fail, Flaky, Infrastructure, Pass, Skip};
        assert_eq!(status(&[Pass, Flaky, Skip], 0), 0);
        assert_eq!(status(&[], 0), 0, "an empty shard");
        assert_eq!(status(&[Pass, Fail, Infrastructure], 0), 1);
        assert_eq!(status(&[Pass, Infrastructure], 0), 42);
        assert_eq!(status(&[Pass], 1), 42);
    }

    #[test]
    fn what_tests_ran_on_is_said() {
        let ran_on =
            RanOn { hwvmm: "1.2.3".into(), kvm: Some("kvm_amd".into()), mmu: "nested paging".into(), nested: true };
        assert_eq!(ran_on.to_string(), "hwvmm 1.2.3, kvm_amd, nested paging, in a virtual machine");
        let header = Header::new(crate::testing::Shard::ALL, 1, vec![ran_on.clone()]).json().expect("JSON");
        assert!(header.contains("\"kvm\":\"kvm_amd\""), "{header}");
        let hostile = RanOn { mmu: "\u{1b}[2J".repeat(1000), ..ran_on }.escaped();
        assert!(!hostile.mmu.contains('\u{1b}') && hostile.mmu.len() < 200, "{hostile}");
        // As those before it had none.
        let old = "{\"type\":\"header\",\"format\":\"hwvmm-test\",\"version\":1,\"shard\":1,\"shards\":1,\"tests\":0}";
        assert!(matches!(serde_json::from_str(old), Ok(Line::Header(Header { ran_on, .. })) if ran_on.is_empty()));
    }

    #[test]
    fn a_line_is_read_as_it_was_written() {
        let result = sample("a\u{202e}", Verdict::TripleFault);
        let json = result.json().expect("JSON");
        assert!(json.ends_with("}\n") && json.contains("\"verdict\":\"triple-fault\"") && !json.contains('\u{202e}'));
        let Line::Result(read) = serde_json::from_str(&json).expect("a line") else { panic!("a result") };
        assert_eq!(*read, result);
        assert_eq!(read.escaped().name, "a\\u{202e}");
    }
}
