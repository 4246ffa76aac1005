//! The pages that a run from a snapshot uses are written down, and ready in the next one.

use super::harness::{Outcome, text};
use super::numbers::{numbers, snapshot};
use super::{Machine, error_of, names, with_kvm};
use hwvmm::snapshot::{PageUse, WorkingSet};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

const MEMORY: u64 = 32 << 20;

/// Runs from the snapshot, which goes on behind the number `last`. Returns the KiB of guest memory that it took, and what it said.
fn goes_on(name: &str, snapshot: &Path, last: u32, options: &[&str]) -> (u64, String) {
    let mut all = vec!["--stats=json"];
    all.extend(options);
    let machine = Machine::start(name, &[Path::new("--from"), snapshot], &all);
    machine.wait_for_lines(3);
    let numbers = numbers(&text(&machine.output()));
    assert!((last + 1..=last + 2).contains(&numbers[0]) && numbers[1] == numbers[0] + 1, "{last}, then {numbers:?}");
    let errors = machine.stop();
    let json = errors.lines().find(|line| line.starts_with('{')).expect("statistics");
    let stats: serde_json::Value = serde_json::from_str(json).expect("JSON");
    (stats["memory"]["guest_kib"].as_u64().expect("a number"), errors)
}

pub(crate) fn the_pages_of_a_run_are_ready_in_the_next() -> Outcome {
    with_kvm(|| {
        let (snapshot, last) = snapshot("touch");
        goes_on("touch-without", &snapshot, last, &[]);
        assert_eq!(names(&snapshot), ["machine.json", "memory", "state"], "nothing is written unless it is wanted");
        goes_on("touch-record", &snapshot, last, &["--record-working-set"]);
        assert_eq!(names(&snapshot), ["machine.json", "memory", "state", "working-set"]);
        let file = snapshot.join("working-set");
        assert_eq!(fs::metadata(&file).expect("there").permissions().mode() & 0o777, 0o600);
        let recorded = fs::read(&file).expect("readable");
        let set = WorkingSet::decode(&recorded, MEMORY).expect("whole");
        // 256 pages and a stack; 1024 pages, the program, and neighbours of what was read.
        let (written, read) = (set.pages(PageUse::Written), set.pages(PageUse::Read));
        println!("pages written {written}, read {read}, ranges {}", set.ranges.len());
        assert!((256..264).contains(&written) && (1024..1100).contains(&read), "{set:?}");
        let (_, said) = goes_on("touch-with", &snapshot, last, &["-v"]);
        assert!(!said.contains("working-set is not used"), "{said}");
        let huge_pages_off = goes_on("touch-small", &snapshot, last, &["--tune", "huge-pages=off"]);
        let off = goes_on("touch-off", &snapshot, last, &["--tune", "working-set=off"]);
        println!("KiB of guest memory: {} of small pages, {} without", huge_pages_off.0, off.0);
        // The same pages as the guest uses.
        assert!(huge_pages_off.0.abs_diff(off.0) <= 64);
        // The next one that is written down is as long: it is not one of what was ready.
        goes_on("touch-again", &snapshot, last, &["--record-working-set=1h"]);
        let again = WorkingSet::decode(&fs::read(&file).expect("readable"), MEMORY).expect("whole");
        assert_eq!((again.pages(PageUse::Written), again.pages(PageUse::Read)), (written, read));
    })
}

pub(crate) fn a_working_set_that_cannot_be_used_is_not() -> Outcome {
    with_kvm(|| {
        let (snapshot, last) = snapshot("hostile-set");
        goes_on("hostile-set-record", &snapshot, last, &["--record-working-set=1ms"]);
        let file = snapshot.join("working-set");
        let whole = fs::read(&file).expect("readable");
        let changed = {
            let mut bytes = whole.clone();
            *bytes.last_mut().expect("not empty") ^= 1;
            bytes
        };
        for bytes in [&changed[..], &whole[..9], b"", &[b'x'; 1 << 20]] {
            fs::write(&file, bytes).expect("written");
            let (_, said) = goes_on("hostile-set-run", &snapshot, last, &[]);
            assert!(said.contains("working-set is not used"), "{said}");
        }
        fs::write(&file, &whole).expect("written");
        fs::set_permissions(&file, fs::Permissions::from_mode(0o622)).expect("set");
        let (status, said) = error_of(&snapshot, &[]);
        assert!(status == Some(42) && said.contains("not safe to use: working-set"), "{status:?} {said}");
        fs::remove_file(&file).expect("removed");
        std::os::unix::fs::symlink("/dev/zero", &file).expect("linked");
        let (status, said) = error_of(&snapshot, &[]);
        assert!(status == Some(42) && said.contains("working-set"), "{status:?} {said}");
        let (status, said) = error_of(&snapshot, &["-m", "32M", "--record-working-set"]);
        assert!(status == Some(2) && said.contains("--memory"), "{status:?} {said}");
    })
}
