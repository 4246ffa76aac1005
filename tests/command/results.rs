//! What is known of a run is written, whatever ends it.

use super::harness::{Outcome, Test};
use super::process::spin;
use super::{file, folder, fs, guests, hwvmm, kernel, run, terminate, text, when_it_runs};
use rustix::fs::{CWD, Mode, mkfifoat};
use rustix::process::{Pid, Signal, kill_process};
use std::io::{BufRead, BufReader, Read};
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// A guest that can write to the folder of a result may put a symbolic link there; this one is put there by the test.
fn a_link_in_place_of_a_result_is_not_followed() -> Outcome {
    when_it_runs(|| {
        let (result, other) = (folder().join("planted.json"), file("planted.other", b"of the user"));
        let path = result.to_str().expect("UTF-8");
        let spinning = spin("planted", &["--timeout", "20s", "--stats-out", path]);
        let open = fs::read_dir(format!("/proc/{}/fd", spinning.machine.as_raw_pid())).expect("it runs").flatten();
        let open: Vec<_> = open.filter_map(|entry| fs::read_link(entry.path()).ok()).collect();
        assert!(!open.contains(&result), "open in the machine's process: {open:?}");
        fs::remove_file(&result).expect("it is made at the start");
        std::os::unix::fs::symlink(&other, &result).expect("linked");
        terminate(&spinning.parent);
        let out = spinning.parent.wait_with_output().expect("ended");
        assert_eq!(out.status.code(), Some(128 + 15), "{}", text(&out.stderr));
        assert_eq!(fs::read(&other).expect("there"), b"of the user");
    })
}

fn a_guest_does_not_choose_which_socket_it_is_connected_to() -> Outcome {
    let share = folder().join("writable");
    fs::create_dir_all(&share).expect("made");
    let uds = format!("cid=3,uds={}/v", share.display());
    for (read_only, status) in [("", 2), (",readonly", 42)] {
        let share = format!("tag=h,path={}{read_only}", share.display());
        let out = hwvmm().args(["run", "/nowhere", "--share", &share, "--vsock", &uds]).output().expect("started");
        let errors = text(&out.stderr);
        assert_eq!(out.status.code(), Some(status), "{errors}");
        assert_eq!(errors.contains("--vsock uds="), status == 2, "{errors}");
    }
    Outcome::Passed
}

/// A file that cannot be written is a failure of hwvmm where the guest had none, and does not replace a guest's status.
fn a_full_disk_does_not_change_the_status_of_a_guest_that_failed() -> Outcome {
    when_it_runs(|| {
        for option in ["--stats-out", "--profile-out"] {
            for (name, guest, status) in
                [("full", guests::power_off(), 42), ("full33", guests::triple_fault_protected(), 33)]
            {
                let out = run(name, guest, &[option, "/dev/full"]);
                let errors = text(&out.stderr);
                assert_eq!(out.status.code(), Some(status), "{errors}");
                assert!(errors.contains("/dev/full") && errors.contains("No space left"), "{errors}");
            }
        }
    })
}

fn a_start_that_fails_keeps_the_sums_of_those_before() -> Outcome {
    when_it_runs(|| {
        let (path, stats) = (kernel("vanishes", guests::reset()), folder().join("vanishes.json"));
        let mut child = hwvmm()
            .args(["run", "-m", "16M", "--timeout", "20s", "--on-reboot=restart", "--stats-out"])
            .args([&stats, &path])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("started");
        child.stdout.as_mut().expect("piped").read_exact(&mut [0; 6]).expect("hello");
        fs::remove_file(&path).expect("removed");
        let out = child.wait_with_output().expect("ended");
        let errors = text(&out.stderr);
        assert_eq!(out.status.code(), Some(42), "{errors}");
        assert!(errors.contains("the guest could not be started again: cannot read the kernel"), "{errors}");
        let json: serde_json::Value = serde_json::from_slice(&fs::read(&stats).expect("written")).expect("JSON");
        assert!(json["starts"].as_u64().expect("a number") >= 1 && json["status"] == 42, "{json}");
    })
}

/// The profile goes to a FIFO without a reader. By then the run is over, and nothing catches signals any more.
fn a_signal_after_the_run_ends_hwvmm() -> Outcome {
    when_it_runs(|| {
        let fifo = folder().join("profile.fifo");
        mkfifoat(CWD, &fifo, Mode::RUSR | Mode::WUSR).expect("made");
        let mut child = hwvmm()
            .args(["run", "-m", "16M", "--timeout", "20s", "--profile-out"])
            .args([&fifo, &kernel("late-signal", guests::power_off())])
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("started");
        let lines = BufReader::new(child.stderr.take().expect("piped")).lines();
        let ended = lines.map_while(Result::ok).find(|line| line.contains("the guest powered off"));
        assert!(ended.is_some(), "it did not end");
        let deadline = Instant::now() + Duration::from_secs(10);
        let status = loop {
            kill_process(Pid::from_child(&child), Signal::TERM).expect("sent");
            std::thread::sleep(Duration::from_millis(50));
            if let Some(status) = child.try_wait().expect("known") {
                break status;
            }
            if Instant::now() > deadline {
                child.kill().expect("killed");
            }
        };
        assert_eq!(status.signal(), Some(15), "{status}");
    })
}

/// All that end a process by default, but for those that are hwvmm's own faults, SIGKILL, SIGXCPU and the C library's own.
fn every_signal_that_ends_a_process_leaves_results() -> Outcome {
    when_it_runs(|| {
        let real_time = [34, 35, 50, 64].map(|number| (number, format!("real-time signal {number}")));
        let named = [
            (libc::SIGHUP, "SIGHUP"),
            (libc::SIGINT, "SIGINT"),
            (libc::SIGQUIT, "SIGQUIT"),
            (libc::SIGUSR1, "SIGUSR1"),
            (libc::SIGUSR2, "SIGUSR2"),
            (libc::SIGALRM, "SIGALRM"),
            (libc::SIGTERM, "SIGTERM"),
            (libc::SIGSTKFLT, "SIGSTKFLT"),
            (libc::SIGVTALRM, "SIGVTALRM"),
            (libc::SIGPROF, "SIGPROF"),
            (libc::SIGIO, "SIGIO"),
            (libc::SIGPWR, "SIGPWR"),
        ];
        let named = named.map(|(number, name)| (number, name.to_owned()));
        let stats = folder().join("signal.json");
        for (number, name) in named.into_iter().chain(real_time) {
            let guest = spin("signal", &["--timeout", "20s", "--stats-out", stats.to_str().expect("UTF-8")]);
            // The shell's own kill: a minimal system has no other, and rustix has no real-time signals.
            let kill = format!("kill -{number} {}", guest.parent.id());
            assert!(Command::new("sh").args(["-c", &kill]).status().expect("a shell").success());
            let out = guest.parent.wait_with_output().expect("ended");
            let errors = text(&out.stderr);
            assert_eq!(out.status.code(), Some(128 + number), "{name}: {errors}");
            assert!(errors.contains(&format!("ended by {name}")), "{name}: {errors}");
            let json: serde_json::Value = serde_json::from_slice(&fs::read(&stats).expect("written")).expect("JSON");
            assert!(json["status"] == 128 + number, "{name}: {json}");
            fs::remove_file(&stats).expect("removed");
        }
    })
}

/// RLIMIT_FSIZE: a write beyond it fails, and SIGXFSZ does not end hwvmm.
fn a_file_that_would_be_too_long_is_an_error() -> Outcome {
    when_it_runs(|| {
        let (stats, kernel) = (folder().join("long.json"), kernel("long", guests::power_off()));
        let out = Command::new("sh")
            .args(["-c", "ulimit -f 0; exec \"$@\"", "sh"])
            .arg(hwvmm().get_program())
            .args(["run", "-m", "16M", "--timeout", "20s", "--stats-out"])
            .args([&stats, &kernel])
            .env("HOME", folder())
            .stdin(Stdio::null())
            .output()
            .expect("started");
        let errors = text(&out.stderr);
        assert_eq!(out.status.code(), Some(42), "{} {errors}", out.status);
        assert!(errors.contains("the guest powered off") && errors.contains("File too large"), "{errors}");
    })
}

pub(super) const TESTS: &[Test] = &[
    ("every_signal_that_ends_a_process_leaves_results", every_signal_that_ends_a_process_leaves_results),
    ("a_file_that_would_be_too_long_is_an_error", a_file_that_would_be_too_long_is_an_error),
    (
        "a_full_disk_does_not_change_the_status_of_a_guest_that_failed",
        a_full_disk_does_not_change_the_status_of_a_guest_that_failed,
    ),
    ("a_start_that_fails_keeps_the_sums_of_those_before", a_start_that_fails_keeps_the_sums_of_those_before),
    ("a_link_in_place_of_a_result_is_not_followed", a_link_in_place_of_a_result_is_not_followed),
    (
        "a_guest_does_not_choose_which_socket_it_is_connected_to",
        a_guest_does_not_choose_which_socket_it_is_connected_to,
    ),
    ("a_signal_after_the_run_ends_hwvmm", a_signal_after_the_run_ends_hwvmm),
];
