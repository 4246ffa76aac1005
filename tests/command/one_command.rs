//! Guests that run one command: the ports that say how it ended, the file that does so, and options that are refused. The agent needs
//! Linux; these guests are programs that write to its ports.

use crate::guests;
use crate::harness::{Outcome, Test};
use crate::{folder, hwvmm, kernel, text, when_it_runs, when_it_runs_or};
use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};

struct Run {
    out: Output,
    errors: String,
    /// What is in the file of `--status-file`.
    status: serde_json::Value,
}

fn run(name: &str, code: &[u8], options: &[&str]) -> Run {
    let file = folder().join(format!("{name}.status"));
    let _ = fs::remove_file(&file);
    let out = hwvmm()
        .args(["run", "-m", "32M", "--timeout", "20s", "--root", "none", "--status-file"])
        .arg(&file)
        .args(options)
        .arg(kernel(name, code))
        .args(["--", "a-command"])
        .output()
        .expect("started");
    let errors = text(&out.stderr);
    let status = fs::read(&file).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok()).unwrap_or_default();
    Run { out, errors, status }
}

fn a_command_ends_with_its_status() -> Outcome {
    when_it_runs(|| {
        let run = run("exited", guests::command_exited(), &[]);
        assert_eq!(run.out.status.code(), Some(34), "{}", run.errors);
        assert_eq!(
            (text(&run.out.stdout), run.errors),
            (String::new(), String::new()),
            "the streams are the command's"
        );
        let expected = serde_json::json!({
            "version": 1, "end": "command", "status": 34, "command": { "exited": 34 },
            "message": "the command exited with status 34",
        });
        assert_eq!(run.status, expected);
    })
}

fn a_signal_is_128_and_its_number() -> Outcome {
    when_it_runs(|| {
        let run = run("signaled", guests::command_signaled(), &[]);
        assert_eq!(run.out.status.code(), Some(137), "{}", run.errors);
        assert_eq!(run.status["command"], serde_json::json!({ "signaled": 9 }));
    })
}

fn an_agent_that_fails_is_41_with_the_end_of_the_log() -> Outcome {
    when_it_runs(|| {
        let run = run("failed", guests::command_failed(), &[]);
        assert_eq!(run.out.status.code(), Some(41), "{}", run.errors);
        for words in ["The kernel's log ends with:\nhello\n", "the guest could not run the command"] {
            assert!(run.errors.contains(words), "{words:?}: {}", run.errors);
        }
        assert!(run.out.stdout.is_empty());
        assert_eq!(run.status["end"], "no-command");
        assert!(run.status["command"].is_null());
    })
}

fn a_guest_that_powers_off_has_no_status() -> Outcome {
    when_it_runs(|| {
        let run = run("powered-off", guests::power_off(), &[]);
        assert_eq!(run.out.status.code(), Some(41), "{}", run.errors);
        assert!(run.errors.contains("the guest powered off, and the command's status is not known"), "{}", run.errors);
        assert_eq!(run.status["end"], "no-command-status");
    })
}

fn what_is_no_end_at_the_ports_ends_nothing() -> Outcome {
    when_it_runs(|| {
        let run = run("no-ends", guests::command_no_ends(), &[]);
        assert_eq!(run.status["end"], "no-command-status", "{}", run.errors);
    })
}

fn the_ports_are_there_for_a_command_alone() -> Outcome {
    when_it_runs(|| {
        let path = kernel("no-command", guests::command_exited());
        let out = hwvmm().args(["run", "-m", "16M", "--timeout", "1s"]).arg(path).output().expect("started");
        assert_eq!(out.status.code(), Some(124), "{}", text(&out.stderr));
        assert_eq!(text(&out.stdout), "hello\n");
    })
}

fn the_log_of_a_guest_has_no_escape_sequences() -> Outcome {
    when_it_runs(|| {
        let log = folder().join("escapes.log");
        for verbose in [&["-v"][..], &["--kernel-log", log.to_str().expect("UTF-8")]] {
            let run = run("log-escapes", guests::panic_with_escapes(), verbose);
            assert_eq!(run.out.status.code(), Some(34), "{}", run.errors);
            assert!(run.errors.contains(r"Kernel panic - not syncing: \x1b]0;owned\x07\x1b[2J"), "{}", run.errors);
            assert!(!run.errors.chars().any(|c| c.is_control() && c != '\n'), "{:?}", run.errors);
        }
        assert!(fs::read(&log).expect("written").starts_with(b"Kernel panic - not syncing: \x1b]0;"), "as it is");
    })
}

fn the_machine_has_neither_stdin_nor_stdout() -> Outcome {
    when_it_runs(|| {
        let mut parent = hwvmm()
            .args(["run", "-m", "32M", "--timeout", "20s", "--root", "none"])
            .arg(kernel("no-streams", guests::spin()))
            .args(["--", "a-command"])
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .stderr(std::process::Stdio::piped())
            .spawn()
            .expect("started");
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(15);
        let children = format!("/proc/{0}/task/{0}/children", parent.id());
        let is_null = |pid: &str, fd: u32| {
            fs::read_link(format!("/proc/{pid}/fd/{fd}")).is_ok_and(|link| link.to_string_lossy() == "/dev/null")
        };
        let mut found = false;
        while !found && std::time::Instant::now() < deadline {
            let child = fs::read_to_string(&children).unwrap_or_default().trim().to_owned();
            found = !child.is_empty() && is_null(&child, 0) && is_null(&child, 1);
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
        parent.kill().expect("killed");
        let _ = parent.wait();
        assert!(found, "the machine's process has the command's streams");
    })
}

/// The group that may use KVM here, and the user who is in it and has nothing else.
const KVM_GROUP: u32 = 60_004;
const NOBODY: &str = "65534";

/// Without a network, a terminal, stdin and a home, from a folder that cannot be written; two at once.
fn a_user_in_group_kvm_runs_a_command() -> Outcome {
    if !rustix::process::geteuid().is_root() {
        return Outcome::Skipped("it needs root, who can become another user".into());
    }
    when_it_runs_or(|| {
        let folder = tempfile::tempdir().expect("a folder");
        let path = |name: &str| folder.path().join(name);
        let device = fs::metadata("/dev/kvm").expect("there").rdev();
        let (kind, mode) = (rustix::fs::FileType::CharacterDevice, rustix::fs::Mode::from_raw_mode(0o660));
        rustix::fs::mknodat(rustix::fs::CWD, path("kvm"), kind, mode, device).expect("made");
        std::os::unix::fs::chown(path("kvm"), Some(0), Some(KVM_GROUP)).expect("root may");
        fs::create_dir(path("fixed")).expect("made");
        fs::copy(hwvmm().get_program(), path("hwvmm")).expect("copied");
        fs::copy(kernel("unprivileged", guests::command_exited()), path("kernel")).expect("copied");
        for (name, mode) in [("", 0o755), ("kvm", 0o660), ("fixed", 0o755)] {
            fs::set_permissions(path(name), Permissions::from_mode(mode)).expect("changed");
        }
        let start = |groups: &str, what: &[&str]| {
            let script = "mount -t tmpfs -o ro,mode=755 none fixed && cd fixed || exit 77
                 group=$1 && shift && exec <&- && exec setpriv --reuid $0 --regid $0 $group setsid --wait \"$@\"";
            let mut unshare = Command::new("unshare");
            unshare.args(["--mount", "--net", "sh", "-c", script, NOBODY, groups]).args(what);
            unshare.current_dir(folder.path()).env("HOME", "/nonexistent");
            unshare.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()
        };
        let group = format!("--groups={KVM_GROUP}");
        let end = |child: io::Result<Child>| child.and_then(Child::wait_with_output);
        match end(start(
            &group,
            &["sh", "-c", "! touch made 2>/dev/null && [ ! -e /proc/self/fd/0 ] && [ $(id -u) = 65534 ]"],
        )) {
            Ok(out) if out.status.success() => {}
            out => return Outcome::Skipped(format!("such a user cannot be made: {out:?}")),
        }
        let (program, device, kernel) = (path("hwvmm"), path("kvm"), path("kernel"));
        let [program, device, kernel] = [&program, &device, &kernel].map(|path| path.to_str().expect("UTF-8"));
        let options = ["run", "--sandbox=on", "-m", "32M", "--timeout", "20s", "--root", "none", "--kvm", device];
        let hwvmm = [&[program][..], &options, &[kernel, "--", "a-command"]].concat();
        let both = [start(&group, &hwvmm), start(&group, &hwvmm)];
        for out in both.map(end) {
            let out = out.expect("started");
            assert_eq!(out.status.code(), Some(34), "{out:?}");
            assert!(out.stdout.is_empty() && out.stderr.is_empty(), "{out:?}");
        }
        let other = end(start("--clear-groups", &hwvmm)).expect("started");
        assert!(other.status.code() == Some(42) && text(&other.stderr).contains("kvm"), "{other:?}");
        Outcome::Passed
    })
}

fn a_run_that_does_not_start_has_a_status_file() -> Outcome {
    let file = folder().join("not-started.status");
    let out = hwvmm()
        .args(["run", "--status-file"])
        .arg(&file)
        .args(["/nonexistent/vmlinuz", "--", "true"])
        .output()
        .expect("started");
    assert_eq!(out.status.code(), Some(42), "{}", text(&out.stderr));
    let status: serde_json::Value = serde_json::from_slice(&fs::read(&file).expect("written")).expect("JSON");
    assert_eq!((&status["end"], &status["status"]), (&"failed".into(), &42.into()));
    assert!(status["command"].is_null() && status["message"].is_string());
    Outcome::Passed
}

fn options_that_do_not_fit_are_refused() -> Outcome {
    let tests: [(&[&str], i32, &str); 15] = [
        (&["--template", "t", "--env", "A=1", "k"], 2, "--env cannot be given with --template"),
        (&["--template", "t", "--rw", "/tmp", "k"], 2, "--rw cannot be given with --template"),
        (&["--template", "t", "k", "--", "true"], 2, "cannot be used with"),
        (&["--template", "t", "--from", "s"], 2, "--template cannot be given with --from"),
        (&["--from", "s", "--rw", "/tmp", "--", "true"], 2, "--rw cannot be given with --from"),
        (&["--from", "s", "--put", "a:/b", "--", "true"], 2, "--put cannot be given with --from"),
        (&["--from", "s", "--env", "A=1"], 2, "-- COMMAND"),
        (&["--rw", "/tmp", "k"], 2, "-- COMMAND"),
        (&["-i", "initrd", "k", "--", "true"], 2, "--initrd cannot be given with a COMMAND"),
        (&["--on-reboot=restart", "k", "--", "true"], 2, "runs once"),
        (&["--serial", "1=stdio", "k", "--", "true"], 2, "stdin and stdout are the command's"),
        (&["--put", "a", "k", "--", "true"], 2, "SRC:DST"),
        (&["--user", "1:2:3", "k", "--", "true"], 2, "UID"),
        (&["--require", "luck", "k", "--", "true"], 2, "hardware"),
        (&["-t", "k", "--", "true"], 2, "stdin is no terminal"),
    ];
    for (options, status, words) in tests {
        let out = hwvmm().arg("run").args(options).output().expect("started");
        let errors = text(&out.stderr);
        assert_eq!(out.status.code(), Some(status), "{options:?}: {errors}");
        assert!(errors.contains(words), "{options:?}: {errors}");
    }
    Outcome::Passed
}

/// What this host has is told by the kernel's list of modules, and not by hwvmm's.
fn hardware_is_required() -> Outcome {
    when_it_runs(|| {
        let has_hardware = ["kvm_amd", "kvm_intel"].iter().any(|module| Path::new("/sys/module").join(module).exists());
        let path = kernel("require-hardware", guests::power_off());
        let run = |options: &[&str]| {
            let out = hwvmm().args(["run", "-m", "16M", "--timeout", "10s"]).args(options).arg(&path).output();
            let out = out.expect("started");
            (out.status.code(), text(&out.stdout), text(&out.stderr))
        };
        let (status, said, errors) = run(&["--require", "hardware"]);
        if has_hardware {
            assert_eq!((status, said.as_str()), (Some(0), "hello\n"), "{errors}");
        } else {
            assert_eq!((status, said.as_str()), (Some(42), ""), "the guest ran: {errors}");
            assert!(errors.contains("--require hardware: this host has "), "{errors}");
        }
        assert_eq!(run(&[]).0, Some(0), "it runs without the option");
    })
}

pub(super) const TESTS: &[Test] = &[
    ("a_command_ends_with_its_status", a_command_ends_with_its_status),
    ("a_signal_is_128_and_its_number", a_signal_is_128_and_its_number),
    ("an_agent_that_fails_is_41_with_the_end_of_the_log", an_agent_that_fails_is_41_with_the_end_of_the_log),
    ("a_guest_that_powers_off_has_no_status", a_guest_that_powers_off_has_no_status),
    ("what_is_no_end_at_the_ports_ends_nothing", what_is_no_end_at_the_ports_ends_nothing),
    ("the_ports_are_there_for_a_command_alone", the_ports_are_there_for_a_command_alone),
    ("the_log_of_a_guest_has_no_escape_sequences", the_log_of_a_guest_has_no_escape_sequences),
    ("the_machine_has_neither_stdin_nor_stdout", the_machine_has_neither_stdin_nor_stdout),
    ("a_user_in_group_kvm_runs_a_command", a_user_in_group_kvm_runs_a_command),
    ("a_run_that_does_not_start_has_a_status_file", a_run_that_does_not_start_has_a_status_file),
    ("hardware_is_required", hardware_is_required),
    ("options_that_do_not_fit_are_refused", options_that_do_not_fit_are_refused),
];
