//! A test runner that can skip with a reason: what a host's KVM cannot run is neither passed nor failed. Its last line
//! is `N passed, N failed, N skipped`. With HWVMM_REQUIRE_KVM=1 (in the lab) nothing may be skipped.

mod program;

#[allow(unused_imports, reason = "each test uses a part")]
pub(crate) use program::{folder, hwvmm, text};

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;

/// The result of a test that did not panic.
pub(crate) enum Outcome {
    Passed,
    /// The test could not run here, for this reason.
    Skipped(String),
}

pub(crate) type Test = (&'static str, fn() -> Outcome);

/// Runs the tests whose names contain one of the command line's words (all, without words).
pub(crate) fn run(suite: &str, tests: &[Test]) -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).filter(|word| !word.starts_with('-')).collect();
    if std::env::args().any(|word| word == "--list") {
        for (name, _) in tests {
            println!("{name}: test");
        }
        return ExitCode::SUCCESS;
    }
    let required = std::env::var_os("HWVMM_REQUIRE_KVM").is_some_and(|value| value == "1");
    let (mut passed, mut failed, mut skipped) = (0, 0, 0);
    for (name, test) in tests {
        if !words.is_empty() && !words.iter().any(|word| name.contains(word.as_str())) {
            continue;
        }
        match catch_unwind(AssertUnwindSafe(test)) {
            Ok(Outcome::Passed) => {
                passed += 1;
                println!("{suite}: ok      {name}");
            }
            Ok(Outcome::Skipped(reason)) if !required => {
                skipped += 1;
                println!("{suite}: skipped {name}: {reason}");
            }
            Ok(Outcome::Skipped(reason)) => {
                failed += 1;
                println!("{suite}: FAILED  {name}: may not be skipped here: {reason}");
            }
            Err(_) => {
                failed += 1;
                println!("{suite}: FAILED  {name}");
            }
        }
    }
    println!("{passed} passed, {failed} failed, {skipped} skipped");
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
