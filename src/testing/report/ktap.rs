//! KTAP, version 1 (Linux, Documentation/dev-tools/ktap.rst).

use super::super::ktap::SubtestResult;
use super::super::record::TestResult;
use super::super::verdict::{Meaning, Verdict};
use std::fmt::Write as _;

/// The report of `results`.
#[must_use]
pub fn ktap(results: &[TestResult]) -> String {
    let mut out = format!("KTAP version 1\n1..{}\n", results.len());
    for (index, result) in results.iter().enumerate() {
        out += &ktap_lines(result, index + 1);
    }
    out
}

/// The lines of one result, which is the `number`-th.
#[must_use]
pub fn ktap_lines(result: &TestResult, number: usize) -> String {
    let mut out = String::new();
    if let Some(report) = result.ktap.as_ref().filter(|report| !report.subtests.is_empty()) {
        // Writing to a String cannot fail.
        let _ = writeln!(out, "  KTAP version 1\n  1..{}", report.subtests.len());
        for (index, subtest) in report.subtests.iter().enumerate() {
            let word = if subtest.result == SubtestResult::Fail { "not ok" } else { "ok" };
            let skip = if subtest.result == SubtestResult::Skip { " # SKIP" } else { "" };
            let _ = writeln!(out, "  {word} {} {}{skip}", index + 1, plain(&subtest.name));
        }
    }
    let word = if result.verdict.meaning() == Meaning::Good { "ok" } else { "not ok" };
    let _ = write!(out, "{word} {number} {}", plain(&result.name));
    let _ = match result.verdict {
        Verdict::Pass => writeln!(out),
        Verdict::Skip => writeln!(out, " # SKIP {}", plain(&result.message)),
        verdict => writeln!(out, " # {verdict}: {}", plain(&result.message)),
    };
    out
}

/// Text in which `#` begins nothing. A backslash is escaped too: one of a guest's before `#` would undo that of ours.
fn plain(text: &str) -> String {
    text.replace('\\', r"\\").replace('#', r"\#")
}

#[cfg(test)]
mod tests {
    use super::super::super::ktap::{Ktap, KtapReport, Subtest};
    use super::super::super::record::tests::sample;
    use super::*;

    #[test]
    fn no_name_of_a_guest_is_a_directive() {
        let text = ktap(&[sample(r"a \# SKIP", Verdict::Fail)]);
        assert!(text.ends_with("not ok 1 a \\\\\\# SKIP # fail: why\n"), "{text}");
    }

    #[test]
    fn what_is_written_is_read() {
        let mut results = [
            sample("a # SKIP", Verdict::Pass),
            sample("b", Verdict::Panic),
            sample("c", Verdict::Skip),
            sample("d", Verdict::Flaky),
        ];
        let of = |name: &str, result| Subtest { name: name.into(), result, note: String::new() };
        let subtests = vec![of("x", SubtestResult::Pass), of("y", SubtestResult::Fail)];
        results[1].ktap = Some(KtapReport { subtests, ..KtapReport::default() });
        let text = ktap(&results);
        assert!(
            text.starts_with("KTAP version 1\n1..4\nok 1 a \\# SKIP\n  KTAP version 1\n  1..2\n  ok 1 x\n"),
            "{text}"
        );
        assert!(text.ends_with("not ok 2 b # panic: why\nok 3 c # SKIP why\nok 4 d # flaky: why\n"), "{text}");
        let mut parser = Ktap::default();
        text.lines().for_each(|line| parser.line(line.as_bytes()));
        let report = parser.finish();
        assert_eq!((report.passed, report.failed, report.skipped, report.problem), (3, 1, 1, None));
    }
}
