//! Many runs from one snapshot at once (`hwvmm clone`).

use super::harness::{Outcome, folder, hwvmm, text};
use super::numbers::{digits, number, snapshot};
use super::{names, wait, with_kvm};
use rustix::process::{Pid, Signal, kill_process};
use std::fs;
use std::path::PathBuf;
use std::process::{Output, Stdio};

fn clone(snapshot: &PathBuf, options: &[&str]) -> Output {
    hwvmm().arg("clone").arg(snapshot).args(options).output().expect("started")
}

/// Ends a run with its first whole number.
const UNTIL_A_NUMBER: [&str; 2] = ["--with", "expect=^[0-?]{8}$"];

/// The summary that `--json` prints.
fn summary(out: &Output) -> serde_json::Value {
    serde_json::from_slice(&out.stdout)
        .unwrap_or_else(|error| panic!("{error}: {} {}", text(&out.stdout), text(&out.stderr)))
}

pub(crate) fn twenty_clones_go_on_at_once() -> Outcome {
    with_kvm(|| {
        let (snapshot, last) = snapshot("clones");
        let memory = fs::read(snapshot.join("memory")).expect("readable");
        let outputs = folder().join("outputs");
        let folder = outputs.to_str().expect("UTF-8");
        // The second whole number: a round of the guest's is whole by then, wherever it was saved.
        let until = format!("expect=^{}$", digits(last + 2).replace('?', "\\?"));
        let out = clone(&snapshot, &["-n", "20", "--json", "--output", folder, "--with", &until]);
        assert_eq!(out.status.code(), Some(0), "{}", text(&out.stderr));
        let summary = summary(&out);
        let clones = summary["clones"].as_array().expect("clones");
        assert_eq!((clones.len(), names(&outputs).len(), &summary["not_started"]), (20, 40, &0.into()));
        println!("20 clones in {} ms", summary["elapsed_ms"]);
        for (index, clone) in clones.iter().enumerate() {
            let figure = |name: &str| clone[name].as_u64().unwrap_or_else(|| panic!("{name}: {clone}"));
            let (runs, line, ended) = (figure("first_instruction_us"), figure("first_line_us"), figure("ended_us"));
            let (own, of_guest) = (figure("own_kib"), figure("guest_own_kib"));
            println!(
                "clone {index}: runs after {runs} us, first line {line} us, own memory {own} KiB, the guest's {of_guest} KiB"
            );
            assert_eq!((figure("clone"), figure("status"), &clone["end_kind"]), (index as u64, 0, &"seen".into()));
            assert!(0 < runs && runs < line && line <= ended, "{clone}");
            // 256 pages, a stack, and a bit more: not the 4 MiB that it reads.
            assert!((1024..1400).contains(&of_guest), "{clone}");
            assert!(figure("userspace_exits") > 0, "{clone}");
            // Not known before Linux 5.14.
            assert!(clone["vm_exits"].as_u64() != Some(0), "{clone}");
            assert!(own > of_guest && own < 10 << 10, "{clone}");
            let console = fs::read_to_string(outputs.join(format!("{index}.out"))).expect("readable");
            let first = console.lines().find(|line| line.len() == 8).expect("a whole number");
            assert!((last + 1..=last + 2).contains(&number(first)), "after {last}: {console}");
        }
        assert!(fs::read(snapshot.join("memory")).expect("readable") == memory, "memory was not changed");
    })
}

pub(crate) fn clones_say_how_they_ended() -> Outcome {
    with_kvm(|| {
        let (snapshot, last) = snapshot("clones-ends");
        // One after the other.
        let out = clone(&snapshot, &[&["-n", "2", "-j", "1"], &UNTIL_A_NUMBER[..]].concat());
        assert_eq!(out.status.code(), Some(0), "{}", text(&out.stderr));
        let said = text(&out.stdout);
        let line = |clone: u32| {
            let start = format!("[{clone}] ");
            said.lines().filter_map(|line| line.strip_prefix(&start)).find(|line| line.len() == 8).map(number)
        };
        assert!((0..2).all(|clone| line(clone).is_some_and(|number| number > last)), "{said}");
        assert!(said.contains("2 of 2 clones ended with status 0"), "{said}");
        let begun = |clone: u32| said.find(&format!("[{clone}] ")).expect("a line");
        assert!(!said[begun(1)..].contains("\n[0] "), "{said}");
        // They run until their time is over.
        let out = clone(&snapshot, &["-n", "2", "--timeout", "300ms", "--json"]);
        assert_eq!(out.status.code(), Some(1), "{}", text(&out.stderr));
        let late = summary(&out);
        assert!(late["clones"].as_array().expect("clones").iter().all(|clone| clone["status"] == 124), "{late}");
        // Each has files of its own.
        let file = folder().join("clone-{n}.json");
        let with = format!("status-file={}", file.display());
        let out = clone(&snapshot, &[&["-n", "2", "--with", &with], &UNTIL_A_NUMBER[..]].concat());
        assert_eq!(out.status.code(), Some(0), "{}", text(&out.stderr));
        for number in ["0", "1"] {
            let name = file.display().to_string().replace("{n}", number);
            assert!(fs::read_to_string(name).expect("written").contains("\"end\":\"seen\""));
        }
    })
}

pub(crate) fn what_clones_cannot_have_is_said_once() -> Outcome {
    with_kvm(|| {
        let (snapshot, _) = snapshot("clones-options");
        for (options, status, words) in [
            (&["-n", "0"][..], 2, "1..=1000"),
            (&["-n", "1001"], 2, "1..=1000"),
            (&["-j", "0"], 2, "1..=1000"),
            (&["--timeout", "x"], 2, "not a time"),
            (&["--output", "/dev/null"], 2, "cannot make the folder"),
            (&["--with", "stats"], 2, "clones do not have this option"),
            (&["--with", "snapshot-at=mark=1,dir=x"], 2, "clones do not have this option"),
            (&["--with", "colour=red"], 2, "no option of this name"),
            (&["--with", "expect=("], 2, "expect"),
            (&["--with", "memory=1G"], 2, "--memory"),
            (&["--with", "net=user"], 2, "network cards"),
            (&["--", "true"], 2, "no guest that waits for a command"),
        ] {
            let out = clone(&snapshot, &[&["-n", "3"][..usize::from(options[0] != "-n") * 2], options].concat());
            let said = text(&out.stderr);
            assert!(out.status.code() == Some(status) && said.contains(words), "{options:?}: {said}");
            assert_eq!(said.matches(words).count(), 1, "{said}");
        }
        let out = clone(&folder().join("none"), &[]);
        assert!(out.status.code() == Some(42) && text(&out.stderr).contains("cannot read"), "{}", text(&out.stderr));
    })
}

/// How many processes run from the snapshot.
fn runs_of(snapshot: &str) -> usize {
    let processes = fs::read_dir("/proc").expect("/proc").flatten();
    let commands = processes.filter_map(|process| fs::read(process.path().join("cmdline")).ok());
    commands.filter(|command| text(command).contains(&format!("--from\0{snapshot}\0"))).count()
}

pub(crate) fn clones_end_with_their_parent() -> Outcome {
    with_kvm(|| {
        let (snapshot, _) = snapshot("clones-parent");
        let path = snapshot.to_str().expect("UTF-8");
        for (signal, status) in [(Signal::INT, Some(130)), (Signal::TERM, Some(143)), (Signal::KILL, None)] {
            // In the background of a shell, SIGINT is ignored, which hwvmm would leave so.
            let parent = std::process::Command::new("env")
                .arg("--default-signal")
                .arg(hwvmm().get_program())
                .env("HOME", folder())
                .env_remove("XDG_CACHE_HOME")
                .args(["clone", path, "-n", "4", "-j", "3", "--json"])
                .stdout(Stdio::piped())
                .stderr(Stdio::null())
                .spawn()
                .expect("started");
            // Each has a process for its machine.
            wait("six processes", || runs_of(path) == 6);
            kill_process(Pid::from_child(&parent), signal).expect("sent");
            let out = parent.wait_with_output().expect("ended");
            assert_eq!(out.status.code(), status);
            wait("no process", || runs_of(path) == 0);
            let Some(status) = status else { continue };
            let summary = summary(&out);
            assert_eq!(
                (summary["not_started"].as_u64(), summary["clones"].as_array().map(Vec::len)),
                (Some(1), Some(3))
            );
            for clone in summary["clones"].as_array().expect("clones") {
                // Their own end is in order: SIGTERM, whatever this one got.
                assert_eq!(
                    (&clone["status"], &clone["end_kind"]),
                    (&143.into(), &"signal".into()),
                    "{status}: {clone}"
                );
            }
        }
    })
}
