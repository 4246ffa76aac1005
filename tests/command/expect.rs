//! `--expect`: lines are matched whole.

use super::harness::{Outcome, Test};
use super::{ends, guests, run, text, when_it_runs};

/// Runs the guest with `pattern`, its output in pieces of one byte and in larger ones, and returns the exit statuses.
fn statuses(code: &'static [u8], pattern: &str) -> [Option<i32>; 2] {
    ["coalesced-io=off", "coalesced-io=on"].map(|lever| {
        let out = run("expect", code, &["--expect", pattern, "--tune", lever]);
        let said = text(&out.stderr);
        assert!(said.contains("seen: ") || said.contains("--expect was not seen"), "{said}");
        out.status.code()
    })
}

fn a_pattern_speaks_of_whole_lines() -> Outcome {
    when_it_runs(|| {
        for (pattern, status) in [
            ("fail=1$", 38),
            (r"fail=1\b", 38),
            ("^23", 38),
            ("fail=123$", 0),
            ("^tests: fail=123$", 0),
            ("^all done$", 0),
            ("^$", 38),
        ] {
            assert_eq!(statuses(guests::three_lines(), pattern), [Some(status); 2], "{pattern}");
        }
    })
}

fn a_prompt_is_seen_after_a_moment_without_output() -> Outcome {
    when_it_runs(|| {
        assert_eq!(statuses(guests::prompt(), "^login: $"), [Some(0); 2]);
    })
}

fn the_last_line_needs_no_end() -> Outcome {
    when_it_runs(|| {
        assert_eq!(statuses(guests::three_lines(), "^good bye$"), [Some(0); 2]);
    })
}

pub(super) const TESTS: &[Test] = &[
    ("expect_seen_is_0", || ends("seen", guests::spin(), &["--expect", "^he.lo"], 0, "seen: hello")),
    ("expect_not_seen_is_38", || ends("unseen", guests::power_off(), &["--expect", "bye"], 38, "not seen")),
    ("expect_does_not_hide_a_triple_fault", || {
        ends("fault2", guests::triple_fault(), &["--expect", "bye"], 33, "triple fault")
    }),
    ("a_pattern_speaks_of_whole_lines", a_pattern_speaks_of_whole_lines),
    ("a_prompt_is_seen_after_a_moment_without_output", a_prompt_is_seen_after_a_moment_without_output),
    ("the_last_line_needs_no_end", the_last_line_needs_no_end),
];
