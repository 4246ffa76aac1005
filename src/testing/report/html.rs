//! A page of a whole run: one file without scripts and without anything from elsewhere. All text is escaped, and the page's policy
//! allows nothing but its own style.

use super::super::record::{Attempt, RanOn, TestResult, Totals};
use super::super::stats::ExitCounts;
use super::super::verdict::{Meaning, Verdict};
use crate::escape::escape_html as escaped;
use std::fmt::Write as _;
use std::path::Path;

/// Bytes of logs on a page at most: a browser shows 10,000 tests, but not all their logs.
const LOG_BYTES: usize = 4 << 20;
/// Tries of a test that are listed.
const TRIES: usize = 20;
/// Sub-tests of a test that failed and are listed.
const SUBTESTS: usize = 50;

const HEAD: &str = "<!DOCTYPE html>
<html lang=\"en\"><head><meta charset=\"utf-8\">
<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">
<meta name=\"viewport\" content=\"width=device-width\"><title>hwvmm test</title>
<style>
:root { color-scheme: light dark; --good: light-dark(#17692f, #6fcf8b); --bad: light-dark(#b3261e, #ff8a80);
  --unknown: light-dark(#8a5300, #ffc46b); --line: light-dark(#ddd, #444); --quiet: light-dark(#666, #aaa); }
body { font: 15px/1.4 system-ui, sans-serif; margin: 1.5rem auto; max-width: 75rem; padding: 0 1rem; }
h1 { font-size: 1.3rem; margin: 0 0 .6rem; }
form { display: flex; flex-wrap: wrap; gap: .4rem; margin-bottom: 1rem; }
label { border: 1px solid var(--line); border-radius: 1rem; padding: .1rem .7rem; cursor: pointer; }
label:has(:checked) { outline: 2px solid currentColor; }
label:has(:focus-visible) { outline: 3px solid currentColor; }
label input { position: absolute; opacity: 0; width: 0; }
table { border-collapse: collapse; table-layout: fixed; width: 100%; }
th { text-align: left; color: var(--quiet); font-weight: normal; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid var(--line); vertical-align: top; overflow-wrap: anywhere; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
th:nth-child(1) { width: 8rem; } th:nth-child(2), th:nth-child(3) { width: 5rem; }
.good { --mark: var(--good); } .bad { --mark: var(--bad); } .unknown { --mark: var(--unknown); }
tbody tr:first-child td:first-child, label.good, label.bad, label.unknown { color: var(--mark); font-weight: 600; }
pre { white-space: pre-wrap; margin: .3rem 0; padding: .5rem; overflow-x: auto; border-left: 3px solid var(--mark); background: light-dark(#f6f6f6, #1d1d1d);
  font: 12px/1.35 ui-monospace, monospace; }
p { margin: .2rem 0; } code { font: 13px ui-monospace, monospace; } .quiet { color: var(--quiet); }
";

/// A path as a relative reference (RFC 3986, section 4.2).
fn reference(path: &str) -> String {
    path.bytes().fold("./".to_owned(), |mut out, byte| {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' | b'/' => out.push(byte.into()),
            byte => drop(write!(out, "%{byte:02X}")),
        }
        out
    })
}

fn class(meaning: Meaning) -> &'static str {
    match meaning {
        Meaning::Good => "good",
        Meaning::Bad => "bad",
        Meaning::Unknown => "unknown",
    }
}

fn seconds(milliseconds: u64) -> String {
    format!("{}.{:02} s", milliseconds / 1000, milliseconds % 1000 / 10)
}

/// The reasons of exits, the most frequent first.
fn reasons(exits: &ExitCounts) -> String {
    let mut reasons: Vec<_> = exits.by_reason.iter().collect();
    reasons.sort_by_key(|(_, count)| std::cmp::Reverse(**count));
    let text: Vec<_> = reasons.iter().take(12).map(|(reason, count)| format!("{count} {reason}")).collect();
    text.join(", ")
}

/// A page that is being written.
struct Page<'a> {
    out: String,
    /// The folder that the page is in.
    folder: &'a Path,
    /// Bytes of logs that the page still takes.
    log_bytes: usize,
}

impl Page<'_> {
    fn add(&mut self, html: &str) {
        self.out.push_str(html);
    }

    /// What the tests came to: each a choice of what is shown.
    fn choices(&mut self, totals: &Totals) {
        let bad = totals.each().filter(|(verdict, _)| verdict.meaning() != Meaning::Good);
        let bad: usize = bad.map(|(_, count)| count).sum();
        let all = totals.results();
        let _ = write!(
            self.out,
            "<form><label><input type=\"radio\" name=\"v\" id=\"all\" checked>{all} all</label>\
             <label><input type=\"radio\" name=\"v\" id=\"not-good\">{bad} not good</label>"
        );
        for (verdict, count) in totals.each() {
            let (name, class) = (verdict.name(), class(verdict.meaning()));
            let _ = write!(
                self.out,
                "<label class=\"{class}\"><input type=\"radio\" name=\"v\" id=\"v-{name}\">{count} {name}</label>"
            );
        }
        self.add("</form>\n");
        if totals.not_run > 0 {
            let _ = writeln!(self.out, "<p class=\"unknown\">{} tests were not run.</p>", totals.not_run);
        }
    }

    /// Folders of a run that was merged lie elsewhere: they are named, and not linked.
    fn artifacts(&mut self, attempt: &Attempt) {
        let path = &attempt.artifacts;
        let within = Path::new(path).strip_prefix(self.folder).ok().and_then(Path::to_str);
        match within.filter(|within| !within.contains("..")) {
            Some(within) => {
                let _ = write!(self.out, "<a href=\"{}\">{}</a>", escaped(&reference(within)), escaped(within));
            }
            None => self.add(&escaped(path)),
        }
    }

    fn log(&mut self, lines: &[String]) {
        let text = escaped(&lines.join("\n"));
        if text.len() > self.log_bytes {
            self.add("<p class=\"quiet\">Its log is left out, since this page has too many: see its folder.</p>");
        } else if !text.is_empty() {
            self.log_bytes -= text.len();
            let _ = write!(self.out, "<pre>{text}</pre>");
        }
    }

    fn subtests(&mut self, result: &TestResult) {
        let Some(report) = result.ktap.as_ref().filter(|report| !report.is_empty()) else { return };
        let _ = write!(
            self.out,
            "<p>sub-tests: {} passed, {} failed, {} skipped</p>",
            report.passed, report.failed, report.skipped
        );
        let failed = report.subtests.iter().filter(|subtest| subtest.result == super::super::SubtestResult::Fail);
        for subtest in failed.take(SUBTESTS) {
            let _ = write!(self.out, "<p>failed: {} {}</p>", escaped(&subtest.name), escaped(&subtest.note));
        }
    }

    /// What is known of a test that is not good, or was tried again.
    fn details(&mut self, result: &TestResult) {
        self.add("<tr><td colspan=\"4\">");
        for attempt in result.attempts.iter().take(TRIES) {
            let (verdict, time) = (attempt.verdict.name(), seconds(attempt.duration_ms));
            let _ = write!(self.out, "<p>{verdict} after {time}: {} ", escaped(&attempt.message));
            self.artifacts(attempt);
            self.add("</p>");
        }
        if let Some(exits) = result.exits.as_ref().filter(|exits| !exits.by_reason.is_empty()) {
            let _ = write!(self.out, "<p>exits: {}</p>", escaped(&reasons(exits)));
        }
        self.subtests(result);
        self.log(&result.log_end);
        if !result.again.is_empty() {
            let _ = write!(self.out, "<p>again: <code>{}</code></p>", escaped(&result.again));
        }
        self.add("</td></tr>");
    }

    fn test(&mut self, result: &TestResult) {
        let (name, meaning) = (result.verdict.name(), result.verdict.meaning());
        let (count, title) = result.exits.as_ref().map_or_else(Default::default, |exits| {
            (exits.userspace.to_string(), format!(" title=\"{}\"", escaped(&reasons(exits))))
        });
        let message = if result.message.is_empty() { String::new() } else { format!(": {}", escaped(&result.message)) };
        let _ = write!(
            self.out,
            "<tbody class=\"{} v-{name}\"><tr><td>{name}</td><td class=\"number\">{}</td>\
             <td class=\"number\"{title}>{count}</td><td>{}{message}</td></tr>",
            class(meaning),
            seconds(result.duration_ms),
            escaped(&result.name),
        );
        if meaning != Meaning::Good || result.verdict == Verdict::Flaky {
            self.details(result);
        }
        self.add("</tbody>\n");
    }
}

/// The page of `results`, to be put into `folder`.
#[must_use]
pub fn html(results: &[TestResult], totals: &Totals, folder: &Path, ran_on: &[RanOn]) -> String {
    let mut page = Page { out: HEAD.to_owned(), folder, log_bytes: LOG_BYTES };
    page.add("body:has(#not-good:checked) tbody.good { display: none; }\n");
    for (verdict, _) in totals.each() {
        let name = verdict.name();
        let _ = writeln!(page.out, "body:has(#v-{name}:checked) tbody:not(.v-{name}) {{ display: none; }}");
    }
    page.add("</style></head><body>\n<h1>hwvmm test</h1>\n");
    for ran_on in ran_on {
        let _ = writeln!(page.out, "<p class=\"quiet\">ran on: {}</p>", escaped(&ran_on.to_string()));
    }
    page.choices(totals);
    page.add("<table><thead><tr><th>verdict</th><th class=\"number\">time</th><th class=\"number\">exits</th><th>test</th></tr></thead>\n");
    results.iter().for_each(|result| page.test(result));
    page.add("</table></body></html>\n");
    page.out
}

#[cfg(test)]
mod tests {
    use super::super::super::record::tests::sample;
    use super::*;

    fn page(results: &[TestResult]) -> String {
        let ran_on = RanOn { hwvmm: "1".into(), kvm: Some("<b>kvm".into()), mmu: "nested paging".into(), nested: true };
        html(results, &Totals::new(results, 0), Path::new("/r/1"), &[ran_on])
    }

    #[test]
    fn every_verdict_is_on_the_page_and_can_be_chosen() {
        let results: Vec<_> = Verdict::ALL.iter().map(|verdict| sample(verdict.name(), *verdict)).collect();
        let page = page(&results);
        for verdict in Verdict::ALL {
            let name = verdict.name();
            assert!(page.contains(&format!("id=\"v-{name}\">1 {name}</label>")), "{name}");
            assert!(page.contains(&format!("body:has(#v-{name}:checked) tbody:not(.v-{name})")), "{name}");
        }
        assert!(page.contains("ran on: hwvmm 1, &lt;b&gt;kvm, nested paging, in a virtual machine"), "{page}");
        assert!(page.contains("8 not good") && page.contains("<pre>final line</pre>"), "{page}");
        assert!(page.contains("again: <code>hwvmm run</code>") && page.contains("title=\"7 pio_out\""), "{page}");
    }

    #[test]
    fn no_text_of_a_guest_is_markup() {
        let mut result = sample("<script>alert(1)</script>", Verdict::Fail);
        result.log_end = vec!["</pre><img src=x onerror=alert(1)>\u{1b}[2J".into()];
        result.message = "\" onmouseover=\"x".into();
        result.again = "<b>".into();
        let page = page(&[result]);
        assert!(!page.contains("<script") && !page.contains("<img") && !page.contains("<b>"), "{page}");
        assert!(!page.contains("\" onmouseover") && !page.contains('\u{1b}'), "{page}");
    }

    #[test]
    fn folders_of_the_run_are_linked_and_no_others() {
        let mut result = sample("a", Verdict::Fail);
        result.attempts[0].artifacts = "/r/1/00001-a b/try-1".into();
        assert!(page(std::slice::from_ref(&result)).contains("<a href=\"./00001-a%20b/try-1\">"));
        for other in ["/elsewhere/a", "javascript:alert(1)", "/r/1/../2"] {
            result.attempts[0].artifacts = other.into();
            assert!(!page(std::slice::from_ref(&result)).contains("<a "), "{other}");
        }
    }

    #[test]
    fn a_page_of_many_tests_is_bounded() {
        let mut result = sample("a", Verdict::Fail);
        result.log_end = vec!["x".repeat(100 << 10)];
        let page = page(&vec![result; 1000]);
        assert!(page.len() < LOG_BYTES + (1 << 20), "{}", page.len());
        assert!(page.contains("Its log is left out"));
    }
}
