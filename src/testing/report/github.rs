//! GitHub Actions: annotations, and the summary of a step
//! (docs.github.com, "Workflow commands for GitHub Actions").

use super::super::record::{TestResult, Totals};
use super::super::verdict::{Meaning, Verdict};
use super::text::{Colour, summary};
use std::fmt::Write as _;

/// Rows of a summary, which GitHub takes up to 1 MiB of.
const MAX_ROWS: usize = 500;
/// Annotations that are printed: GitHub shows ten of each kind in a step.
const MAX_ANNOTATIONS: usize = 50;

/// Whether annotations are printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Annotations {
    /// Annotations are printed.
    Yes,
    /// Annotations are not printed.
    No,
}

impl Annotations {
    /// Printed where GitHub runs this process.
    #[must_use]
    pub fn of_environment() -> Self {
        if std::env::var_os("GITHUB_ACTIONS").is_some_and(|value| value == "true") { Self::Yes } else { Self::No }
    }

    /// A text for stdout in which no line is a workflow command: GitHub takes those from lines that begin with `::`, and, in their
    /// old form, from `##[` in any place.
    #[must_use]
    pub fn disarm(self, text: String) -> String {
        match self {
            Self::No => text,
            Self::Yes => {
                let text = text.replace("##[", "# #[");
                let line =
                    |line: &str| if line.trim_start().starts_with("::") { format!(".{line}") } else { line.to_owned() };
                text.split_inclusive('\n').map(line).collect()
            }
        }
    }
}

fn data(text: &str) -> String {
    text.replace('%', "%25").replace('\r', "%0D").replace('\n', "%0A").replace("##[", "# #[")
}

fn property(text: &str) -> String {
    data(text).replace(':', "%3A").replace(',', "%2C")
}

/// The annotation of the `number`-th result that has one, from 1; an empty text where it has none.
#[must_use]
pub fn annotation(result: &TestResult, number: usize) -> String {
    let command = match (result.verdict, result.verdict.meaning()) {
        _ if number > MAX_ANNOTATIONS => return String::new(),
        (Verdict::Flaky, _) => "warning",
        (_, Meaning::Good) => return String::new(),
        (_, Meaning::Bad | Meaning::Unknown) => "error",
    };
    let title = property(&format!("{}: {}", result.verdict, result.name));
    let log = result.log_end.join("\n");
    format!("::{command} title={title}::{}\n", data(&format!("{}\n{log}", result.message)))
}

/// The summary of a step, in Markdown.
#[must_use]
pub fn step_summary(results: &[TestResult], totals: &Totals) -> String {
    let mut out = format!("### hwvmm test\n\n{}\n", cell(summary(totals, Colour::No).trim_end()));
    out += "\n| Verdict | Test | Time | Userspace exits | Message |\n|---|---|---|---|---|\n";
    let mut sorted: Vec<&TestResult> = results.iter().collect();
    sorted.sort_by_key(|result| std::cmp::Reverse(result.verdict));
    for result in sorted.iter().take(MAX_ROWS) {
        let exits = result.exits.as_ref().map_or_else(String::new, |exits| exits.userspace.to_string());
        // Writing to a String cannot fail.
        let _ = writeln!(
            out,
            "| {} | {} | {} ms | {exits} | {} |",
            result.verdict,
            cell(&result.name),
            result.duration_ms,
            cell(&result.message)
        );
    }
    if let Some(more) = sorted.len().checked_sub(MAX_ROWS).filter(|more| *more > 0) {
        let _ = writeln!(out, "\n{more} more tests are not shown.");
    }
    out
}

/// Text without a meaning in Markdown and HTML.
fn cell(text: &str) -> String {
    text.chars().fold(String::with_capacity(text.len()), |mut out, c| {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '@' => out.push_str("&#64;"),
            '\\' | '`' | '*' | '_' | '{' | '}' | '[' | ']' | '(' | ')' | '#' | '!' | '|' | '~' => {
                out.push('\\');
                out.push(c);
            }
            c if c.is_control() => out.push(' '),
            c => out.push(c),
        }
        out
    })
}

#[cfg(test)]
mod tests {
    use super::super::super::record::tests::sample;
    use super::*;

    #[test]
    fn annotations_are_one_command_each() {
        let mut result = sample("a,b:c", Verdict::Hang);
        result.message = "50%\n::error::fake ##[error]fake".into();
        assert_eq!(
            annotation(&result, 1),
            "::error title=hang%3A a%2Cb%3Ac::50%25%0A::error::fake # #[error]fake%0Afinal line\n"
        );
        assert_eq!(annotation(&sample("a", Verdict::Pass), 1), "");
        assert!(annotation(&sample("a", Verdict::Flaky), 1).starts_with("::warning "));
        assert_eq!(annotation(&result, MAX_ANNOTATIONS + 1), "");
    }

    #[test]
    fn no_line_of_a_guest_is_a_command() {
        let text = "    | ::add-mask::x\n  ::set-env name=a::b\n::error::x\n##[error]y\n";
        let out = Annotations::Yes.disarm(text.to_owned());
        assert!(!out.lines().any(|line| line.trim().starts_with("::") || line.contains("##[")), "{out}");
        assert_eq!(Annotations::No.disarm(text.to_owned()), text);
    }

    #[test]
    fn the_summary_has_no_markup_of_a_guest() {
        let mut result = sample("a|b", Verdict::Fail);
        result.message = "<img src=x> [x](y) `z` | @all".into();
        let results = [sample("good", Verdict::Pass), result];
        let text = step_summary(&results, &Totals::new(&results, 0));
        let row = text.lines().find(|line| line.starts_with("| fail")).expect("a row");
        assert!(
            row.contains("a\\|b")
                && row.contains("&lt;img")
                && row.contains("\\[x\\]\\(y\\)")
                && row.contains("&#64;all")
        );
        assert!(text.find("| fail").expect("there") < text.find("| pass").expect("there"), "failures first");
        let many: Vec<_> = (0..600).map(|_| sample("a", Verdict::Pass)).collect();
        assert!(step_summary(&many, &Totals::new(&many, 0)).ends_with("100 more tests are not shown.\n"));
    }
}
