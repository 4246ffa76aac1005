//! Any output of a guest as KTAP: the sub-tests are bounded, and have names of their own.
#![no_main]

use hwvmm::testing::{Ktap, MAX_SUBTESTS};
use libfuzzer_sys::fuzz_target;
use std::collections::BTreeSet;

fuzz_target!(|data: &[u8]| {
    let mut ktap = Ktap::default();
    data.split(|byte| *byte == b'\n').for_each(|line| ktap.line(line));
    let report = ktap.finish();
    assert!(report.subtests.len() <= MAX_SUBTESTS);
    let names: BTreeSet<&str> = report.subtests.iter().map(|subtest| subtest.name.as_str()).collect();
    assert_eq!(names.len(), report.subtests.len(), "names are unique");
    assert!(names.iter().all(|name| !name.chars().any(char::is_control)));
});
