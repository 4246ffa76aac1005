//! Any text as a file of a suite: it is read or refused, and makes a bounded number of runs.
#![no_main]

use hwvmm::testing::{MAX_TESTS, SuiteFile, expand};
use libfuzzer_sys::fuzz_target;
use std::path::Path;

fuzz_target!(|data: &[u8]| {
    let Ok(text) = std::str::from_utf8(data) else { return };
    match SuiteFile::parse(Path::new("/nowhere/suite.toml"), text) {
        Ok(suite) => {
            if let Ok(cases) = expand(&[suite], |path| path.extension().is_some_and(|name| name == "qcow2")) {
                assert!(cases.len() <= MAX_TESTS);
            }
        }
        Err(error) => assert!(!error.to_string().chars().any(|c| c.is_control() && c != '\n')),
    }
});
