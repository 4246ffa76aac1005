//! Guests that attack hwvmm through its devices, against the command itself: the run ends as it should, and the host's files stay
//! as they are.

use crate::harness::{Outcome, Test};
use crate::{file, guests, run, text, when_it_runs};
use std::fs;
use std::path::Path;

/// Runs a guest that reports a number by isa-debug-exit. The status is twice the number, plus one.
fn reports(name: &str, code: &'static [u8], options: &[&str], number: i32) -> Outcome {
    when_it_runs(|| {
        let all = [&["--debug-exit", "--transport", "mmio"], options].concat();
        let out = run(name, code, &all);
        assert_eq!(out.status.code(), Some(number * 2 + 1), "{}", text(&out.stderr));
        assert!(!text(&out.stderr).contains("panicked"), "{}", text(&out.stderr));
    })
}

/// DEVICE_NEEDS_RESET (64) in the status that the guest has shifted right by 2 bits; the other bits are those of a driver.
const NEEDS_RESET: i32 = (64 | 15) >> 2;

fn a_disk(path: &Path) -> String {
    path.to_str().expect("UTF-8").to_owned()
}

fn a_raw_disk_does_not_become_an_image() -> Outcome {
    // VIRTIO_BLK_S_IOERR.
    let refused = 10 + 1;
    let disk = file("hostile.img", &[0; 1 << 16]);
    let outcome = reports("qcow2", guests::raw_disk_becomes_qcow2(), &["--disk", &a_disk(&disk)], refused);
    assert!(fs::read(&disk).expect("there").iter().all(|byte| *byte == 0), "the disk is not written");
    outcome
}

fn a_disk_that_is_said_to_be_raw_takes_anything() -> Outcome {
    let disk = file("hostile2.img", &[0; 1 << 16]);
    let option = format!("{},format=raw", a_disk(&disk));
    when_it_runs(|| {
        let _ = reports("qcow2-raw", guests::raw_disk_becomes_qcow2(), &["--disk", &option], 10);
        assert_eq!(fs::read(&disk).expect("there")[..5], *b"QFI\xfb\0");
    })
}

pub(super) const TESTS: &[Test] = &[
    ("a_ring_over_its_own_index_is_refused", || {
        reports("ring", guests::ring_over_its_index(), &["--rng"], NEEDS_RESET)
    }),
    ("a_ring_over_its_own_index_can_be_reset", || {
        reports("ring2", guests::ring_over_its_index_and_reset(), &["--rng"], 10)
    }),
    ("a_chain_longer_than_its_queue_is_refused", || {
        reports("chain", guests::chain_longer_than_its_queue(), &["--rng"], NEEDS_RESET)
    }),
    ("a_raw_disk_does_not_become_an_image", a_raw_disk_does_not_become_an_image),
    ("a_disk_that_is_said_to_be_raw_takes_anything", a_disk_that_is_said_to_be_raw_takes_anything),
];
