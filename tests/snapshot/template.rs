//! Templates, as far as guests without an agent can try them: a guest that never gets ready, and commands for guests that wait for none.

use super::{Machine, error_of, folder, guests, hwvmm, text, with_kvm};
use crate::harness::Outcome;
use std::fs;

/// What is left of a template that was not made: names in the tests' folder that begin with its name.
fn left_of(name: &str) -> Vec<String> {
    let names = fs::read_dir(folder()).unwrap().map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned());
    names.filter(|found| found.starts_with(name)).collect()
}

/// Runs `guest` for a template with this name, and returns the status and what was said.
fn template(name: &str, guest: &[u8], options: &[&str]) -> (Option<i32>, String) {
    let kernel = folder().join("for-template.elf");
    fs::write(&kernel, guests::multiboot(guest)).unwrap();
    let out = hwvmm()
        .args(["run", "-m", "32M", "--timeout", "20s", "--root", "none", "--template"])
        .arg(folder().join(name))
        .args(options)
        .arg(&kernel)
        .output()
        .unwrap();
    assert!(out.stdout.is_empty(), "{}", text(&out.stdout));
    (out.status.code(), text(&out.stderr))
}

pub(super) fn a_guest_that_does_not_get_ready_makes_no_template() -> Outcome {
    with_kvm(|| {
        let (status, errors) = template("template-late", guests::count(), &["--boot-timeout", "500ms"]);
        assert!(status == Some(124) && errors.contains("had not booted"), "{status:?} {errors}");
        let (status, errors) = template("template-timeout", guests::count(), &["--timeout=500ms"]);
        assert!(status == Some(124) && errors.contains("timed out"), "{status:?} {errors}");
        assert!(left_of("template-").is_empty(), "{:?}", left_of("template-"));
        let there = folder().join("template-there");
        fs::create_dir(&there).unwrap();
        let (status, errors) = template("template-there", guests::count(), &[]);
        assert!(status == Some(42) && errors.contains("template-there exists"), "{status:?} {errors}");
        assert_eq!(left_of("template-"), ["template-there"]);
        fs::remove_dir(&there).unwrap();
    })
}

pub(super) fn commands_are_for_guests_that_wait_for_one() -> Outcome {
    with_kvm(|| {
        let machine = Machine::boot("no-agent", guests::count(), &["-m", "16M"]);
        let snapshot = folder().join("no-agent");
        machine.snapshot(&snapshot);
        machine.stop();
        let command = |options: &[&str]| {
            let out =
                hwvmm().args(["run", "--from"]).arg(&snapshot).args(options).args(["--", "true"]).output().unwrap();
            (out.status.code(), text(&out.stderr))
        };
        let (status, errors) = command(&[]);
        assert!(status == Some(42) && errors.contains("hwvmm run KERNEL --template DIR"), "{status:?} {errors}");
        // As machine.json says it of a template.
        let json = snapshot.join("machine.json");
        let changed = |root: &str| {
            let mut description: serde_json::Value = serde_json::from_slice(&fs::read(&json).unwrap()).unwrap();
            description["agent"] = serde_json::json!({ "root": root });
            fs::write(&json, description.to_string()).unwrap();
        };
        for (root, words) in [("folder", "--root DIR"), ("none", "--root none"), ("image", "--root IMAGE")] {
            changed(root);
            let (status, errors) = command(&[]);
            assert!(status == Some(42) && errors.contains(words), "{status:?} {errors}");
        }
        changed("host");
        let (status, errors) = command(&["--root", "none"]);
        assert!(status == Some(42) && errors.contains("leave --root out"), "{status:?} {errors}");
        let (status, errors) = error_of(&snapshot, &[]);
        assert!(status == Some(42) && errors.contains("hwvmm run --from DIR -- COMMAND"), "{status:?} {errors}");
    })
}
