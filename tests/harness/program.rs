//! The program under test, and a folder for a test run.

#![allow(dead_code, reason = "each test uses a part")]

use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::OnceLock;

/// `hwvmm`, or the program that HWVMM_BIN names, with a home of its own.
pub(crate) fn hwvmm() -> Command {
    let path = std::env::var_os("HWVMM_BIN").unwrap_or_else(|| env!("CARGO_BIN_EXE_hwvmm").into());
    let mut command = Command::new(path);
    command.stdin(Stdio::null()).env("HOME", folder()).env_remove("XDG_CACHE_HOME");
    command
}

/// A folder for this test run.
pub(crate) fn folder() -> &'static Path {
    static FOLDER: OnceLock<tempfile::TempDir> = OnceLock::new();
    FOLDER.get_or_init(|| tempfile::tempdir().expect("a temporary folder")).path()
}

/// What a program has printed.
pub(crate) fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}
