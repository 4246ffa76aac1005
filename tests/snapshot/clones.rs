//! Many runs from one snapshot at once (`hwvmm clone`).

use super::harness::{Outcome, folder, hwvmm, text};
use super::{Machine, guests, names, wait, with_kvm};
use std::fs;
use std::path::PathBuf;
use std::process::{Output, Stdio};

/// A snapshot of a guest that counts, and the last number that it printed.
fn snapshot(name: &str) -> (PathBuf, u32) {
    let machine = Machine::boot(name, guests::touch(), &["-m", "32M"]);
    let snapshot = folder().join(name);
    machine.answer(&["pause"]);
    machine.snapshot(&snapshot);
    let output = text(&machine.output());
    machine.stop();
    let mut whole = output.split_inclusive('\n').filter(|line| line.ends_with('\n') && line.len() == 9);
    (snapshot, number(whole.next_back().expect("numbers").trim()))
}

fn number(line: &str) -> u32 {
    line.bytes().fold(0, |number, digit| number << 4 | u32::from(digit - b'0'))
}

fn clone(snapshot: &PathBuf, options: &[&str]) -> Output {
    hwvmm().arg("clone").arg(snapshot).args(options).output().expect("started")
}

/// Ends a run with its first whole number.
const UNTIL_A_NUMBER: [&str; 3] = ["--", "--expect", "^[0-?]{8}$"];

pub(crate) fn twenty_clones_go_on_at_once() -> Outcome {
    with_kvm(|| {
        let (snapshot, last) = snapshot("clones");
        let memory = fs::read(snapshot.join("memory")).expect("readable");
        let consoles = folder().join("consoles");
        let folder = consoles.to_str().expect("UTF-8");
        let out = clone(&snapshot, &[&["-n", "20", "--json", "--output", folder], &UNTIL_A_NUMBER[..]].concat());
        assert_eq!(out.status.code(), Some(0), "{}", text(&out.stderr));
        let summary: serde_json::Value = serde_json::from_slice(&out.stdout).expect("JSON");
        let clones = summary["clones"].as_array().expect("clones");
        assert_eq!((clones.len(), names(&consoles).len()), (20, 20));
        println!("20 clones in {} ms", summary["elapsed_ms"]);
        for (index, clone) in clones.iter().enumerate() {
            let figure = |name: &str| clone[name].as_u64().unwrap_or_else(|| panic!("{name}: {clone}"));
            println!(
                "clone {index}: first line {} ms, own memory {} KiB, the guest's {} KiB",
                figure("first_line_ms"),
                figure("own_kib"),
                figure("guest_own_kib")
            );
            assert_eq!((figure("clone"), figure("status")), (index as u64, 0));
            assert!(clone["end"].as_str().expect("an end").starts_with("seen: "), "{clone}");
            // 256 pages, a stack, and a bit more: not the 4 MiB that it reads.
            assert!((1024..1400).contains(&figure("guest_own_kib")), "{clone}");
            assert!(figure("userspace_exits") > 0 && figure("own_kib") > figure("guest_own_kib"), "{clone}");
            let console = fs::read_to_string(consoles.join(format!("{index}.log"))).expect("readable");
            let first = console.lines().find(|line| line.len() == 8).expect("a whole number");
            assert!((last + 1..=last + 2).contains(&number(first)), "after {last}: {console}");
        }
        assert!(fs::read(snapshot.join("memory")).expect("readable") == memory, "memory was not changed");
    })
}

pub(crate) fn clones_say_how_they_ended() -> Outcome {
    with_kvm(|| {
        let (snapshot, last) = snapshot("clones-ends");
        let out = clone(&snapshot, &[&["-n", "2"], &UNTIL_A_NUMBER[..]].concat());
        assert_eq!(out.status.code(), Some(0), "{}", text(&out.stderr));
        let said = text(&out.stdout);
        let line = |clone: u32| {
            let start = format!("[{clone}] ");
            said.lines().filter_map(|line| line.strip_prefix(&start)).find(|line| line.len() == 8).map(number)
        };
        assert!((0..2).all(|clone| line(clone).is_some_and(|number| number > last)), "{said}");
        assert!(said.contains("2 of 2 clones ended well"), "{said}");
        // They run until their time is over.
        let out = clone(&snapshot, &["-n", "2", "--timeout", "300ms", "--json"]);
        assert_eq!(out.status.code(), Some(1), "{}", text(&out.stderr));
        let summary: serde_json::Value = serde_json::from_slice(&out.stdout).expect("JSON");
        assert!(summary["clones"].as_array().expect("clones").iter().all(|clone| clone["status"] == 124), "{summary}");
        for (options, status, words) in [
            (&["-n", "0"][..], 2, "1..=1000"),
            (&["-n", "1001"], 2, "1..=1000"),
            (&["--timeout", "x"], 2, "not a time"),
            (&["--output", "/dev/null"], 42, "cannot make the folder"),
        ] {
            let out = clone(&snapshot, options);
            assert!(out.status.code() == Some(status) && text(&out.stderr).contains(words), "{}", text(&out.stderr));
        }
        let out = clone(&folder().join("none"), &[]);
        assert!(out.status.code() == Some(42) && text(&out.stderr).contains("cannot read"), "{}", text(&out.stderr));
    })
}

/// The process IDs of runs from the snapshot.
fn runs_of(snapshot: &str) -> usize {
    let processes = fs::read_dir("/proc").expect("/proc").flatten();
    let commands = processes.filter_map(|process| fs::read(process.path().join("cmdline")).ok());
    commands.filter(|command| text(command).contains(&format!("--from\0{snapshot}\0"))).count()
}

pub(crate) fn clones_end_with_their_parent() -> Outcome {
    with_kvm(|| {
        let (snapshot, _) = snapshot("clones-parent");
        let path = snapshot.to_str().expect("UTF-8");
        for signal in ["-TERM", "-KILL"] {
            let mut parent = hwvmm()
                .args(["clone", path, "-n", "3", "--json"])
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()
                .expect("started");
            // Each has a process for its machine.
            wait("six processes", || runs_of(path) == 6);
            let id = parent.id().to_string();
            assert!(std::process::Command::new("kill").args([signal, &id]).status().expect("started").success());
            parent.wait().expect("ended");
            wait("no process", || runs_of(path) == 0);
        }
    })
}
