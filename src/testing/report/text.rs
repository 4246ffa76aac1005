//! Lines for people.

use super::super::record::{TemplateRun, TestResult, Totals};
use super::super::verdict::{Meaning, Verdict};
use std::fmt::Write as _;

/// Lines of a log's end that are shown.
const LOG_LINES: usize = 10;

/// Whether verdicts have colours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Colour {
    /// Verdicts are coloured by escape sequences of a terminal.
    Yes,
    /// The text has no escape sequences.
    No,
}

fn painted(text: &str, meaning: Meaning, colour: Colour) -> String {
    let code = match meaning {
        Meaning::Good => "32",
        Meaning::Bad => "31",
        Meaning::Unknown => "33",
    };
    match colour {
        Colour::Yes => format!("\x1b[{code}m{text}\x1b[0m"),
        Colour::No => text.to_owned(),
    }
}

/// One line a test; of one that is not good also the end of its log, and how to run it again.
#[must_use]
pub fn line(result: &TestResult, colour: Colour) -> String {
    let TestResult { name, verdict, message, duration_ms, exits, .. } = result;
    let meaning = verdict.meaning();
    let shown = painted(&format!("{verdict:14}"), meaning, colour);
    let (seconds, hundredths) = (duration_ms / 1000, duration_ms % 1000 / 10);
    let exits = exits.as_ref().map_or_else(String::new, |exits| format!("{} exits", exits.userspace));
    let mut out = format!("{shown} {seconds:4}.{hundredths:02} s {exits:>14}  {name}");
    if !message.is_empty() {
        // Writing to a String cannot fail.
        let _ = write!(out, ": {message}");
    }
    if let Some(report) = result.ktap.as_ref().filter(|report| !report.is_empty()) {
        let _ = write!(out, " [{} passed, {} failed, {} skipped]", report.passed, report.failed, report.skipped);
    }
    out.push('\n');
    if meaning == Meaning::Good && *verdict != Verdict::Flaky {
        return out;
    }
    let hidden = result.log_end.len().saturating_sub(LOG_LINES);
    for text in result.log_end.iter().skip(hidden) {
        let _ = writeln!(out, "    | {text}");
    }
    if let Some(attempt) = result.attempts.last().filter(|attempt| !attempt.artifacts.is_empty()) {
        let _ = writeln!(out, "    see {}", attempt.artifacts);
        let _ = writeln!(out, "    again: {}", result.again);
    }
    out
}

/// A line for the boot of a template.
#[must_use]
pub fn template_line(run: &TemplateRun) -> String {
    let (seconds, hundredths) = (run.duration_ms / 1000, run.duration_ms % 1000 / 10);
    let exits = run.exits.as_ref().map_or_else(String::new, |exits| format!("{} exits", exits.userspace));
    format!("{:14} {seconds:4}.{hundredths:02} s {exits:>14}  {}\n", "template", run.artifacts)
}

/// The last line: how many tests came to what.
#[must_use]
pub fn summary(totals: &Totals, colour: Colour) -> String {
    let mut parts: Vec<String> = totals
        .each()
        .map(|(verdict, count)| painted(&format!("{count} {verdict}"), verdict.meaning(), colour))
        .collect();
    if totals.not_run > 0 {
        parts.push(painted(&format!("{} not run", totals.not_run), Meaning::Unknown, colour));
    }
    if parts.is_empty() {
        parts.push("no tests in this shard".into());
    }
    parts.join(", ") + "\n"
}

#[cfg(test)]
mod tests {
    use super::super::super::record::tests::sample;
    use super::*;

    #[test]
    fn a_failure_is_shown_with_its_log_and_how_to_run_it_again() {
        assert_eq!(line(&sample("a", Verdict::Pass), Colour::No), "pass              1.50 s        7 exits  a\n");
        assert_eq!(
            line(&sample("a[b]", Verdict::TripleFault), Colour::No),
            "triple-fault      1.50 s        7 exits  a[b]: why\n    | final line\n    see /a\n    again: hwvmm run\n"
        );
        assert!(line(&sample("a", Verdict::Fail), Colour::Yes).starts_with("\x1b[31mfail          \x1b[0m "));
        assert!(line(&sample("a", Verdict::Flaky), Colour::No).contains("again: "), "it is not hidden");
    }

    #[test]
    fn the_boot_of_a_template_is_shown_with_its_exits() {
        let run = TemplateRun { artifacts: "/r/template-1".into(), duration_ms: 4720, exits: None };
        assert_eq!(template_line(&run), "template          4.72 s                 /r/template-1\n");
    }

    #[test]
    fn the_summary_counts_all() {
        let results = [sample("a", Verdict::Pass), sample("b", Verdict::Pass), sample("c", Verdict::Hang)];
        assert_eq!(summary(&Totals::new(&results, 2), Colour::No), "2 pass, 1 hang, 2 not run\n");
        assert_eq!(summary(&Totals::new(&[], 0), Colour::No), "no tests in this shard\n");
    }
}
