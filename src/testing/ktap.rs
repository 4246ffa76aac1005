//! Reads KTAP, TAP and the output of kselftest from a guest's console (Linux, Documentation/dev-tools/ktap.rst): lines between all
//! others, with the prefix of printk or without it, nested by indentation or, as kselftest does, by `# `.
//!
//! The guest is hostile: what is kept is bounded. Its results count for its own test only.

use crate::escape::escape;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, HashMap};

/// Sub-tests that are kept by name; the others are counted.
pub const MAX_SUBTESTS: usize = 10_000;
/// Bytes of the name of a sub-test, with those of the sub-tests that it is in.
const NAME_BYTES: usize = 300;
/// Columns of indentation that are told apart.
const MAX_COLUMN: usize = 40;

/// What a sub-test came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SubtestResult {
    /// The sub-test passed: `ok`.
    Pass,
    /// The sub-test failed: `not ok`.
    Fail,
    /// `# SKIP`, or one that is known to fail: `# TODO`, `# XFAIL`.
    Skip,
}

/// The result of a sub-test, from its line in KTAP.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Subtest {
    /// Its name, with those of the sub-tests that it is in: `net/tcp/connect`. No two have the same.
    pub name: String,
    /// What it came to.
    pub result: SubtestResult,
    /// What stands behind `#`.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub note: String,
}

/// What a console has said in KTAP.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct KtapReport {
    /// The sub-tests, without those that only sum up others.
    pub subtests: Vec<Subtest>,
    /// The number of sub-tests that passed.
    pub passed: u64,
    /// The number of sub-tests that failed.
    pub failed: u64,
    /// The number of sub-tests that were skipped.
    pub skipped: u64,
    /// The first thing that is wrong with the whole: sub-tests that are missing, `Bail out!`.
    pub problem: Option<String>,
    /// Why the whole was skipped: a plan of no tests, `1..0 # SKIP`.
    pub skip: Option<String>,
}

impl KtapReport {
    /// Returns true if there was no KTAP at all.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.passed == 0 && self.failed == 0 && self.skipped == 0 && self.problem.is_none() && self.skip.is_none()
    }
}

/// The results at one indentation, below one parent.
#[derive(Default)]
struct Group {
    /// The plan, `1..N`, where there was one.
    planned: Option<u64>,
    /// How many results came.
    seen: u64,
}

/// What ends a group.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Closing {
    /// The result of the test that they are sub-tests of: it says that they have ended.
    Parent,
    /// The end of the console, or another group in its place. Only a plan says that none is missing.
    Other,
}

struct Found {
    column: usize,
    subtest: Subtest,
}

/// The parser: takes lines, one after the other.
#[derive(Default)]
pub struct Ktap {
    found: Vec<Found>,
    /// By indentation.
    groups: BTreeMap<usize, Group>,
    report: KtapReport,
}

/// What a line says.
enum Said<'a> {
    Version,
    Plan { planned: u64, note: &'a str },
    Result { ok: bool, name: &'a str, note: &'a str },
    BailOut(&'a str),
}

impl Ktap {
    /// Takes a line without its end.
    pub fn line(&mut self, line: &[u8]) {
        let line = without_timestamp(line);
        // A longer one has no name that anyone would read.
        let line = String::from_utf8_lossy(&line[..line.len().min(4096)]);
        let (column, text) = indentation(&line);
        match parse(text) {
            Some(Said::Version) => self.close_groups(column, Closing::Other),
            Some(Said::Plan { planned, note }) => self.plan(column, planned, note),
            Some(Said::Result { ok, name, note }) => self.result(column, ok, name, note),
            Some(Said::BailOut(why)) => self.problem(&format!("bailed out: {why}")),
            None => {}
        }
    }

    /// The end of the console: what there was.
    #[must_use]
    pub fn finish(mut self) -> KtapReport {
        self.close_groups(0, Closing::Other);
        let mut names: HashMap<String, u64> = HashMap::new();
        for Found { mut subtest, .. } in self.found {
            if names.contains_key(&subtest.name) {
                let base = subtest.name.clone();
                let mut number = names.get(&base).copied().unwrap_or(1);
                while names.contains_key(&subtest.name) {
                    number += 1;
                    subtest.name = format!("{base} ({number})");
                }
                names.insert(base, number);
            }
            names.insert(subtest.name.clone(), 1);
            self.report.subtests.push(subtest);
        }
        self.report
    }

    fn problem(&mut self, text: &str) {
        self.report.problem.get_or_insert_with(|| escape(text, NAME_BYTES));
    }

    /// A plan stands before its results, or, as TAP has it, behind all of them.
    fn plan(&mut self, column: usize, planned: u64, note: &str) {
        let is_last = |group: &Group| group.planned.is_none() && group.seen == planned;
        if self.groups.get(&column).is_some_and(is_last) {
            self.groups.remove(&column);
            return self.close_groups(column, Closing::Other);
        }
        self.close_groups(column, Closing::Other);
        if planned == 0 {
            if column == 0 {
                let why = note.get(4..).unwrap_or_default().trim();
                self.report.skip.get_or_insert_with(|| escape(why, NAME_BYTES));
            }
        } else {
            self.groups.insert(column, Group { planned: Some(planned), seen: 0 });
        }
    }

    /// Ends the groups of this indentation and of deeper ones, and checks that all of their tests have been.
    fn close_groups(&mut self, column: usize, closing: Closing) {
        for (_, Group { planned, seen }) in self.groups.split_off(&column) {
            match planned {
                Some(planned) if seen != planned => {
                    self.problem(&format!("{planned} sub-tests were planned, and {seen} reported"));
                }
                None if closing == Closing::Other => {
                    self.problem(&format!(
                        "{seen} sub-tests were reported without a plan (1..N): others may be missing"
                    ));
                }
                Some(_) | None => {}
            }
        }
    }

    fn result(&mut self, column: usize, ok: bool, name: &str, note: &str) {
        self.close_groups(column + 1, Closing::Parent);
        self.groups.entry(column).or_default().seen += 1;
        let word = note.split(|c: char| !c.is_ascii_alphabetic()).next().unwrap_or_default().to_ascii_uppercase();
        let result = match (ok, word.as_str()) {
            (_, "SKIP" | "TODO" | "XFAIL") => SubtestResult::Skip,
            (true, _) => SubtestResult::Pass,
            (false, _) => SubtestResult::Fail,
        };
        let name = escape(name, NAME_BYTES);
        let first_child = self.found.iter().rposition(|found| found.column <= column).map_or(0, |place| place + 1);
        let mut failed_within = false;
        let children = self.found.get_mut(first_child..).unwrap_or_default();
        let has_children = !children.is_empty();
        for child in children {
            child.column = column;
            child.subtest.name = escape(&format!("{name}/{}", child.subtest.name), NAME_BYTES);
            failed_within |= child.subtest.result == SubtestResult::Fail;
        }
        // What only sums up its sub-tests is none.
        if has_children && (result != SubtestResult::Fail || failed_within) {
            return;
        }
        let count = match result {
            SubtestResult::Pass => &mut self.report.passed,
            SubtestResult::Fail => &mut self.report.failed,
            SubtestResult::Skip => &mut self.report.skipped,
        };
        *count += 1;
        if self.found.len() < MAX_SUBTESTS {
            let subtest = Subtest { name, result, note: escape(note, NAME_BYTES) };
            self.found.push(Found { column, subtest });
        }
    }
}

/// Removes the prefixes of printk, `<3>`, `[    1.234567] ` and `[    T1] `, but not the indentation behind them.
fn without_timestamp(mut line: &[u8]) -> &[u8] {
    if let [b'<', level, b'>', rest @ ..] = line
        && level.is_ascii_digit()
    {
        line = rest;
    }
    for _ in 0..2 {
        let [b'[', rest @ ..] = line else { return line };
        let Some(end) = rest.iter().take(24).position(|byte| *byte == b']') else { return line };
        let inner = rest[..end].trim_ascii_start();
        let is_time = inner.contains(&b'.') && inner.iter().all(|byte| byte.is_ascii_digit() || *byte == b'.');
        let is_caller =
            matches!(inner, [b'T' | b'C', digits @ ..] if !digits.is_empty() && digits.iter().all(u8::is_ascii_digit));
        if !is_time && !is_caller {
            return line;
        }
        let behind = &rest[end + 1..];
        line = behind.strip_prefix(b" ").unwrap_or(behind);
    }
    line
}

/// Splits off the indentation: spaces, and `# ` of kselftest. Returns its width.
fn indentation(line: &str) -> (usize, &str) {
    let mut text = line.trim_end();
    let mut column = 0;
    loop {
        let trimmed = text.trim_start_matches(' ');
        column += text.len() - trimmed.len();
        match trimmed.strip_prefix("# ") {
            Some(rest) => (column, text) = (column + 2, rest),
            None => return (column.min(MAX_COLUMN), trimmed),
        }
    }
}

/// The name of a sub-test that has neither a name nor a number.
const UNNAMED: &str = "unnamed";

fn parse(text: &str) -> Option<Said<'_>> {
    if text.starts_with("KTAP version ") || text.starts_with("TAP version ") {
        return Some(Said::Version);
    }
    if let Some(rest) = text.strip_prefix("1..") {
        let digits = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
        let (number, note) = rest.split_at(digits);
        let note = note.trim();
        let note = if note.is_empty() { "" } else { note.strip_prefix('#')?.trim() };
        return Some(Said::Plan { planned: number.parse().ok()?, note });
    }
    if let Some(why) = text.strip_prefix("Bail out!") {
        return Some(Said::BailOut(why.trim()));
    }
    let (ok, rest) = match text.strip_prefix("not ok ") {
        Some(rest) => (false, rest),
        None => (true, text.strip_prefix("ok ")?),
    };
    let digits = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
    let (number, rest) = rest.split_at(digits);
    // A number may be missing in TAP.
    let begins = if number.is_empty() { rest.starts_with("- ") } else { rest.is_empty() || rest.starts_with(' ') };
    if !begins {
        return None;
    }
    let rest = rest.trim_start();
    let rest = rest.strip_prefix("- ").unwrap_or(rest);
    // `\#` belongs to the name.
    let hash = rest.match_indices('#').map(|(place, _)| place).find(|place| !rest[..*place].ends_with('\\'));
    let (name, note) = hash.map_or((rest, ""), |place| (&rest[..place], rest[place + 1..].trim()));
    let name = [name.trim(), number, UNNAMED].into_iter().find(|name| !name.is_empty()).unwrap_or(UNNAMED);
    Some(Said::Result { ok, name, note })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn report(text: &str) -> KtapReport {
        let mut ktap = Ktap::default();
        text.lines().for_each(|line| ktap.line(line.as_bytes()));
        ktap.finish()
    }

    fn names(report: &KtapReport) -> Vec<(&str, SubtestResult)> {
        report.subtests.iter().map(|subtest| (subtest.name.as_str(), subtest.result)).collect()
    }

    use SubtestResult::{Fail, Pass, Skip};

    #[test]
    fn kunit_is_read_from_the_kernels_log() {
        let report = report(
            "[    0.100000] KTAP version 1\n[    0.100001] 1..2\n[    0.2][    T1]     KTAP version 1\n\
             [    0.2]     # Subtest: list\n[    0.2]     1..3\n[    0.2]     ok 1 add\n[    0.2]     # del: EXPECTATION FAILED at lib/x.c:3\n\
             [    0.2]     not ok 2 del\n[    0.2]     ok 3 walk # SKIP no memory\n[    0.2] # list: pass:1 fail:1 skip:1 total:3\n\
             [    0.2] not ok 1 list\n<6>[    0.2] ok 2 empty",
        );
        assert_eq!(names(&report), [("list/add", Pass), ("list/del", Fail), ("list/walk", Skip), ("empty", Pass)]);
        assert_eq!((report.passed, report.failed, report.skipped, &report.problem), (2, 1, 1, &None));
        assert_eq!(report.subtests[2].note, "SKIP no memory");
    }

    #[test]
    fn kselftest_is_read() {
        let report = report(
            "TAP version 13\n1..2\n# timeout set to 45\n# selftests: net: a.sh\n# TAP version 13\n# 1..2\n# ok 1 one\n# ok 2 - two\n\
             # # Totals: pass:2\nok 1 selftests: net: a.sh\n# selftests: net: b.sh\nnot ok 2 selftests: net: b.sh # TIMEOUT 45 seconds",
        );
        assert_eq!(
            names(&report),
            [("selftests: net: a.sh/one", Pass), ("selftests: net: a.sh/two", Pass), ("selftests: net: b.sh", Fail)]
        );
        assert_eq!(report.problem, None);
    }

    #[test]
    fn names_are_unique() {
        let report = report("ok 1 a\nok 2 a\nok 3 a (2)\nok 4 a\nok 5");
        let names: Vec<_> = names(&report).into_iter().map(|(name, _)| name).collect();
        assert_eq!(names, ["a", "a (2)", "a (2) (2)", "a (3)", "5"]);
    }

    #[test]
    fn what_is_missing_is_a_problem() {
        assert_eq!(report("1..3\nok 1 a").problem.expect("one"), "3 sub-tests were planned, and 1 reported");
        assert_eq!(
            report("1..1\n    1..2\n    ok 1 x\nok 1 a").problem.expect("one"),
            "2 sub-tests were planned, and 1 reported"
        );
        assert_eq!(report("1..1\nBail out! no\x1b disk").problem.expect("one"), "bailed out: no\\x1b disk");
        assert_eq!(report("1..0 # SKIP not built in").skip.expect("skipped"), "not built in");
        let unplanned = "2 sub-tests were reported without a plan (1..N): others may be missing";
        for text in
            ["ok 1 a\nok 2 b", "KTAP version 1\nok 1 a\nok 2 b\nKTAP version 1\n1..1\nok 1 a", "    ok 1 a\n    ok 2 b"]
        {
            assert_eq!(report(text).problem.as_deref(), Some(unplanned), "{text}");
        }
        assert_eq!(
            report("ok 1 a\n1..2").problem.as_deref(),
            Some("1 sub-tests were reported without a plan (1..N): others may be missing")
        );
        for whole in [
            "ok 1 a\nok 2 b\n1..2",
            "1..1\n  ok 1 x\nok 1 a",
            "TAP version 13\n1..1\nok 1 a\nTAP version 13\nok 1 a\n1..1",
        ] {
            assert_eq!(report(whole).problem, None, "{whole}");
        }
        assert_eq!(
            names(&report("1..2\nok - #\nok 2 - # SKIP x")),
            [("unnamed", SubtestResult::Pass), ("2", SubtestResult::Skip)]
        );
        assert!(report("Linux version 6.1\nok then\nokay 1\nnot ok\nok 1x\n1..x\n1..3 tests").is_empty());
    }

    #[test]
    fn results_without_numbers_count() {
        let report = report("1..2\nok - a\nnot ok - b # x");
        assert_eq!((names(&report), &report.problem), (vec![("a", Pass), ("b", Fail)], &None));
    }

    #[test]
    fn a_parent_that_fails_alone_is_a_failure() {
        let report = report("    ok 1 a\nnot ok 1 suite");
        assert_eq!(names(&report), [("suite/a", Pass), ("suite", Fail)]);
    }

    #[test]
    fn what_is_kept_is_bounded() {
        let text: String = (0..MAX_SUBTESTS + 10)
            .map(|n| format!("{}not ok {n} {}\n", " ".repeat(n % 90), "x".repeat(5000)))
            .collect();
        let report = report(&text);
        assert!(report.subtests.len() <= MAX_SUBTESTS);
        assert!(report.subtests.iter().all(|subtest| subtest.name.len() < 2 * NAME_BYTES));
        assert!(report.failed > 0);
    }

    proptest! {
        #[test]
        fn all_names_are_unique_and_plain(lines in proptest::collection::vec(
            "( {0,4}|# |\\[ +1\\.2\\] )(not )?(ok|1\\.\\.|Bail out!) ?[0-3]? ?(-|a|b/|#| |\\\\|SKIP|\x1b)*|\\PC*", 0..60)) {
            let report = report(&lines.join("\n"));
            let mut names: Vec<_> = report.subtests.iter().map(|subtest| &subtest.name).collect();
            prop_assert!(names.iter().all(|name| !name.is_empty() && !name.chars().any(char::is_control)));
            let count = names.len();
            names.sort();
            names.dedup();
            prop_assert_eq!(names.len(), count);
            prop_assert_eq!(report.passed + report.failed + report.skipped, count as u64);
        }
    }
}
