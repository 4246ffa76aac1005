//! JUnit XML, in the form that nextest writes: retries as reruns, sub-tests as test cases whose class is the test.

use super::super::ktap::SubtestResult;
use super::super::record::{Attempt, TestResult};
use super::super::verdict::{Meaning, Verdict};
use quick_junit::{
    NonSuccessKind, Property, Report, SerializeError, TestCase, TestCaseStatus, TestRerun, TestSuite, XmlString,
};
use std::time::Duration;

/// The report of `results`.
///
/// # Errors
/// None that these results can have.
pub fn junit(results: &[TestResult]) -> Result<String, SerializeError> {
    let mut report = Report::new("hwvmm");
    let mut suite = TestSuite::new("hwvmm test");
    let total = results.iter().fold(0_u64, |sum, result| sum.saturating_add(result.duration_ms));
    report.set_time(Duration::from_millis(total));
    suite.set_time(Duration::from_millis(total));
    for result in results {
        suite.add_test_case(case(result));
        for subtest in result.ktap.iter().flat_map(|report| &report.subtests) {
            let mut status = match subtest.result {
                SubtestResult::Pass => TestCaseStatus::success(),
                SubtestResult::Fail => TestCaseStatus::non_success(NonSuccessKind::Failure),
                SubtestResult::Skip => TestCaseStatus::skipped(),
            };
            if subtest.result != SubtestResult::Pass && !subtest.note.is_empty() {
                status.set_message(xml(&subtest.note));
            }
            let mut case = TestCase::new(xml(&subtest.name), status);
            case.set_classname(xml(&result.name));
            suite.add_test_case(case);
        }
    }
    report.add_test_suite(suite);
    report.to_string()
}

/// Text with U+FFFD in place of characters that XML 1.0 does not have (section 2.2). quick-junit leaves out control characters only.
fn xml(text: &str) -> XmlString {
    let valid =
        |c: char| matches!(c, '\t' | '\n' | '\r' | '\u{20}'..='\u{d7ff}' | '\u{e000}'..='\u{fffd}' | '\u{10000}'..);
    XmlString::new(text.chars().map(|c| if valid(c) { c } else { char::REPLACEMENT_CHARACTER }).collect::<String>())
}

fn kind(verdict: Verdict) -> NonSuccessKind {
    match verdict.meaning() {
        Meaning::Unknown => NonSuccessKind::Error,
        Meaning::Good | Meaning::Bad => NonSuccessKind::Failure,
    }
}

fn rerun(attempt: &Attempt) -> TestRerun {
    let mut rerun = TestRerun::new(kind(attempt.verdict));
    rerun.set_time(Duration::from_millis(attempt.duration_ms));
    rerun.set_type(attempt.verdict.name()).set_message(xml(&attempt.message));
    rerun
}

fn case(result: &TestResult) -> TestCase {
    let mut status = match (result.verdict, result.verdict.meaning()) {
        (Verdict::Skip, _) => TestCaseStatus::skipped(),
        (_, Meaning::Good) => TestCaseStatus::success(),
        (verdict, Meaning::Bad | Meaning::Unknown) => {
            let mut status = TestCaseStatus::non_success(kind(verdict));
            status.set_type(verdict.name());
            let log = result.log_end.join("\n");
            status.set_description(xml(&format!("{}\n{log}\n{}", result.message, result.again)));
            status
        }
    };
    // The last of them is the test case itself.
    for attempt in result.attempts.iter().rev().skip(1).rev() {
        status.add_rerun(rerun(attempt));
    }
    if result.verdict.meaning() != Meaning::Good || result.verdict == Verdict::Skip {
        status.set_message(xml(&result.message));
    }
    let mut case = TestCase::new(xml(&result.name), status);
    case.set_classname("hwvmm").set_time(Duration::from_millis(result.duration_ms));
    if let Some(exits) = &result.exits {
        case.add_property(Property::new("userspace-exits", exits.userspace.to_string()));
        if let Some(count) = exits.vm_exits {
            case.add_property(Property::new("vm-exits", count.to_string()));
        }
    }
    case
}

#[cfg(test)]
mod tests {
    use super::super::super::ktap::{KtapReport, Subtest};
    use super::super::super::record::tests::sample;
    use super::*;

    #[test]
    fn every_verdict_is_in_the_report() {
        let mut results: Vec<_> = Verdict::ALL.iter().map(|verdict| sample(verdict.name(), *verdict)).collect();
        let first =
            Attempt { verdict: Verdict::Hang, message: "silent".into(), duration_ms: 1, artifacts: String::new() };
        results[1].attempts.insert(0, first);
        let xml = junit(&results).expect("XML");
        assert!(xml.contains("tests=\"11\" skipped=\"1\" failures=\"7\" errors=\"1\""), "{xml}");
        assert!(xml.contains("<flakyFailure "), "{xml}");
        assert!(xml.contains("message=\"silent\" type=\"hang\"") && xml.contains("<skipped "), "{xml}");
        assert!(xml.contains("<error message=\"why\" type=\"infrastructure\">"), "{xml}");
        assert!(xml.contains("name=\"userspace-exits\" value=\"7\""), "{xml}");
    }

    #[test]
    fn no_text_of_a_guest_breaks_the_xml() {
        let mut result = sample("a\u{1}<\"&>]]>\u{fffe}", Verdict::Fail);
        result.log_end = vec!["</failure><testcase name=\"fake\"/>\x1b[2J\u{0}]]>".into()];
        let subtest = Subtest { name: "s\u{8}<".into(), result: SubtestResult::Fail, note: "n\u{b}".into() };
        result.ktap = Some(KtapReport { subtests: vec![subtest], failed: 1, ..KtapReport::default() });
        let xml = junit(&[result]).expect("XML");
        assert_eq!(xml.matches("<testcase ").count(), 2, "{xml}");
        let valid =
            |c: char| matches!(c, '\t' | '\n' | '\r' | '\u{20}'..='\u{d7ff}' | '\u{e000}'..='\u{fffd}' | '\u{10000}'..);
        assert!(xml.chars().all(valid), "{xml:?}");
    }
}
