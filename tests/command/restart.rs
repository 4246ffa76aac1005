//! `--on-reboot restart`: files and input go on from one start of the guest to the next.

use super::harness::{Outcome, Test};
use super::{ends, file, folder, fs, guests, run, run_with_input, spawn, text, when_it_runs};
use std::io::Read;

fn restart_counts_every_start() -> Outcome {
    when_it_runs(|| {
        let stats = folder().join("restart.json");
        let options = ["--on-reboot=restart", "--timeout", "2s", "--stats-out", stats.to_str().expect("UTF-8")];
        let out = run("restart", guests::reset(), &options);
        assert_eq!(out.status.code(), Some(124), "{}", text(&out.stderr));
        let starts = text(&out.stdout).matches("hello\n").count() as u64;
        let json: serde_json::Value = serde_json::from_slice(&fs::read(&stats).expect("written")).expect("JSON");
        assert!(starts >= 2, "{starts}");
        assert!(json["starts"].as_u64().expect("a number") >= starts);
    })
}

/// The format of a disk is detected before the first start only: between two starts the disk can have got another header.
fn a_restart_keeps_the_format_of_a_disk() -> Outcome {
    when_it_runs(|| {
        let disk = file("restart.img", &[0; 4096]);
        let options = ["--on-reboot=restart", "--timeout", "2s", "--disk", disk.to_str().expect("UTF-8")];
        let mut child = spawn(guests::reset(), &options);
        let mut first = [0; 6];
        child.stdout.as_mut().expect("piped").read_exact(&mut first).expect("hello");
        fs::write(&disk, [&b"QFI\xfb\0\0\0\x03"[..], &[0; 4088]].concat()).expect("written");
        let out = child.wait_with_output().expect("ended");
        assert_eq!(out.status.code(), Some(124), "{}", text(&out.stderr));
        assert!(text(&out.stdout).matches("hello\n").count() >= 2);
    })
}

fn a_console_file_has_the_output_of_all_starts() -> Outcome {
    when_it_runs(|| {
        let (log, stats) = (file("starts.log", b"of another run\n"), folder().join("starts.json"));
        let serial = format!("1=file:{}", log.display());
        let mut options = vec!["--on-reboot=restart", "--timeout", "2s", "--serial", &serial];
        options.extend(["--stats-out", stats.to_str().expect("UTF-8")]);
        let out = run("starts", guests::reset(), &options);
        assert_eq!(out.status.code(), Some(124), "{}", text(&out.stderr));
        let json: serde_json::Value = serde_json::from_slice(&fs::read(&stats).expect("written")).expect("JSON");
        let starts = json["starts"].as_u64().expect("a number");
        let said = fs::read_to_string(&log).expect("written");
        let seen = said.matches("hello\n").count() as u64;
        // The last start may have been ended before it wrote.
        assert!(starts >= 3 && seen + 1 >= starts, "{starts} starts, {seen} in the log");
        assert!(said.starts_with("hello\n"), "{said}");
    })
}

fn two_consoles_can_have_one_file() -> Outcome {
    when_it_runs(|| {
        let log = file("shared.log", b"");
        let (first, second) = (format!("1=file:{}", log.display()), format!("2=file:{}", log.display()));
        let out = run("shared", guests::power_off(), &["--serial", &first, "--serial", &second]);
        assert_eq!(out.status.code(), Some(0), "{}", text(&out.stderr));
        assert_eq!(fs::read_to_string(&log).expect("written"), "hello\n");
    })
}

/// All input is there at once. The guest reads a part of it, resets itself, and the next start reads on.
fn input_that_a_guest_has_not_read_is_for_the_next() -> Outcome {
    when_it_runs(|| {
        let line = "the quick brown fox ".repeat(20);
        let sent = format!("{line}!{line}!!{line}.");
        let out = run_with_input(guests::echo_and_reset(), &["--on-reboot=restart"], sent.clone().into_bytes());
        assert_eq!(text(&out.stdout), sent, "{}", text(&out.stderr));
        assert_eq!(out.status.code(), Some(0));
    })
}

pub(super) const TESTS: &[Test] = &[
    ("a_reset_after_a_panic_message_is_34", || {
        ends("panic", guests::panic_line(), &["--on-reboot=restart"], 34, "panicked: out of luck")
    }),
    ("restart_counts_every_start", restart_counts_every_start),
    ("a_restart_keeps_the_format_of_a_disk", a_restart_keeps_the_format_of_a_disk),
    ("a_console_file_has_the_output_of_all_starts", a_console_file_has_the_output_of_all_starts),
    ("two_consoles_can_have_one_file", two_consoles_can_have_one_file),
    ("input_that_a_guest_has_not_read_is_for_the_next", input_that_a_guest_has_not_read_is_for_the_next),
];
