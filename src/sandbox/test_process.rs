//! Cases of tests that need a process of their own: this test binary again, with the case in its environment.

use super::{Mode, Sandbox};
use std::os::fd::AsFd;
use std::path::Path;
use std::process::{Command, Output};

/// The environment variables with the case and its folder.
pub(super) const CASE: &str = "HWVMM_SANDBOX_CASE";
pub(super) const FOLDER: &str = "HWVMM_SANDBOX_FOLDER";

/// Runs `case` in a process of its own, with a folder.
pub(super) fn run(case: &str, folder: &Path) -> Output {
    Command::new(std::env::current_exe().expect("a path"))
        .args(["--exact", "sandbox::tests::case", "--nocapture", "--test-threads=1"])
        .env(CASE, case)
        .env(FOLDER, folder)
        .env_remove("RUST_BACKTRACE")
        .output()
        .expect("started")
}

/// A sandbox whose reports go to stderr.
pub(super) fn sandbox(mode: Mode) -> Sandbox {
    let reports = std::io::stderr().as_fd().try_clone_to_owned().expect("a copy");
    Sandbox::new(mode, reports).expect("a sandbox")
}
