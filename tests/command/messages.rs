//! What hwvmm says on stderr: a guest cannot make it too much, cannot put escape sequences into it, and a stderr that takes
//! nothing does not change how a run ends.

use crate::harness::{Outcome, Test};
use crate::{folder, guests, hwvmm, kernel, text, when_it_runs};
use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// `hwvmm run` of a guest whose every step is a warning, for a second. It needs a PCI device.
fn flood(name: &str) -> Command {
    let mut command = hwvmm();
    command.args(["run", "-m", "16M", "--timeout", "1s", "--transport", "pci", "--rng"]);
    command.arg(kernel(name, guests::bar_flood())).stdout(Stdio::null());
    command
}

fn json(path: &Path) -> serde_json::Value {
    serde_json::from_slice(&fs::read(path).expect("written")).expect("JSON")
}

fn a_stderr_without_a_reader_changes_nothing() -> Outcome {
    when_it_runs(|| {
        let profile = folder().join("no-reader.json");
        let options: [&[&str]; 3] =
            [&[], &["--stats"], &["--profile", "--stats", "--profile-out", profile.to_str().expect("UTF-8")]];
        for options in options {
            let (reader, writer) = std::io::pipe().expect("a pipe");
            drop(reader);
            let status = flood("no-reader").args(options).stderr(writer).status().expect("started");
            assert_eq!(status.code(), Some(124), "{options:?}");
            let full = fs::File::options().write(true).open("/dev/full").expect("/dev/full");
            let status = flood("full").args(options).stderr(full).status().expect("started");
            assert_eq!(status.code(), Some(124), "full: {options:?}");
        }
        assert_eq!(json(&profile)["status"], 124);
    })
}

fn a_panic_has_no_escape_sequences_and_no_control_characters() -> Outcome {
    when_it_runs(|| {
        let (stats, profile) = (folder().join("escapes.stats"), folder().join("escapes.json"));
        let out = hwvmm()
            .args(["run", "-m", "16M", "--timeout", "20s", "--profile", "--stats-out"])
            .arg(&stats)
            .arg("--profile-out")
            .arg(&profile)
            .arg(kernel("escapes", guests::panic_with_escapes()))
            .output()
            .expect("started");
        let said = text(&out.stderr);
        assert_eq!(out.status.code(), Some(34), "{said}");
        let words = r"the guest panicked: \x08x";
        assert!(said.contains(words), "{said:?}");
        assert!(!said.chars().any(|c| c.is_control() && c != '\n'), "{said:?}");
        assert_eq!(json(&stats)["end"], words);
        assert_eq!(json(&profile)["end"], words);
    })
}

fn a_flood_of_warnings_is_limited_and_counted() -> Outcome {
    when_it_runs(|| {
        let path = folder().join("flood.err");
        let file = fs::File::create(&path).expect("created");
        assert_eq!(flood("limited").stderr(file).status().expect("started").code(), Some(124));
        let said = fs::read_to_string(&path).expect("UTF-8");
        assert!(said.len() < 64 << 10, "{} bytes", said.len());
        assert_eq!(said.matches("warning: PCI: the guest moves a BAR").count(), 10, "{said}");
        let more = said.lines().find(|line| line.contains(" more like this: PCI: the guest moves a BAR"));
        let count = more.and_then(|line| line.split_whitespace().nth(2)?.parse::<u32>().ok());
        assert!(count > Some(10), "{said}");
        assert!(said.contains("timed out after 1 s"), "{said}");
    })
}

/// Each start of a guest has a process, and a limiter, of its own.
fn a_flood_of_warnings_is_limited_over_restarts() -> Outcome {
    when_it_runs(|| {
        let path = folder().join("restarts.err");
        let file = fs::File::create(&path).expect("created");
        let status = hwvmm()
            .args(["run", "-m", "16M", "--timeout", "5s", "--transport", "pci", "--rng", "--on-reboot", "restart"])
            .arg(kernel("restarts", guests::bar_flood_and_reset()))
            .stdout(Stdio::null())
            .stderr(file)
            .status()
            .expect("started");
        let said = fs::read_to_string(&path).expect("UTF-8");
        assert_eq!(status.code(), Some(124), "{said}");
        let lines = said.matches("warning: PCI: the guest moves a BAR").count();
        assert!((10..=60).contains(&lines), "{lines} lines");
    })
}

/// Stderr is a pipe that is full from the start and that is not read.
fn a_stderr_that_is_not_read_changes_nothing() -> Outcome {
    when_it_runs(|| {
        let profile = folder().join("unread.json");
        let options: [&[&str]; 2] =
            [&[], &["--profile", "--stats", "-vv", "--profile-out", profile.to_str().expect("UTF-8")]];
        for options in options {
            let (reader, mut writer) = std::io::pipe().expect("a pipe");
            let bytes = rustix::pipe::fcntl_getpipe_size(&writer).expect("a size");
            writer.write_all(&vec![b'x'; bytes]).expect("room");
            let start = Instant::now();
            let mut child = flood("unread").args(options).stderr(writer).spawn().expect("started");
            let status = loop {
                match child.try_wait().expect("a child") {
                    Some(status) => break status,
                    None if start.elapsed() < Duration::from_secs(10) => std::thread::sleep(Duration::from_millis(20)),
                    None => {
                        child.kill().expect("killed");
                        break child.wait().expect("ended");
                    }
                }
            };
            assert_eq!(status.code(), Some(124), "{options:?}");
            drop(reader);
        }
        assert_eq!(json(&profile)["status"], 124);
    })
}

pub(crate) const TESTS: &[Test] = &[
    ("a_flood_of_warnings_is_limited_over_restarts", a_flood_of_warnings_is_limited_over_restarts),
    ("a_flood_of_warnings_is_limited_and_counted", a_flood_of_warnings_is_limited_and_counted),
    ("a_stderr_that_is_not_read_changes_nothing", a_stderr_that_is_not_read_changes_nothing),
    ("a_stderr_without_a_reader_changes_nothing", a_stderr_without_a_reader_changes_nothing),
    (
        "a_panic_has_no_escape_sequences_and_no_control_characters",
        a_panic_has_no_escape_sequences_and_no_control_characters,
    ),
];
