//! Tests that cannot run on every host.

use std::io::Write as _;

/// Says on stderr that the test of this thread, or a part of it, does not run here, and why. The test harness shows what a test prints
/// only where the test fails, but does not see what is written to stderr itself.
pub(crate) fn skipped(why: &str) {
    let thread = std::thread::current();
    let _ = writeln!(std::io::stderr(), "\nskipped: {}: {why}", thread.name().unwrap_or("a test"));
}
