//! The control socket as users meet it: `hwvmm run --api`, `hwvmm ctl`, `hwvmm top`. The guest is a tiny multiboot program.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test may fail where it stands")]

mod guests;
mod harness;

use harness::{Outcome, Test, folder, hwvmm, text};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ExitCode, Output, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// A machine that runs until it is stopped.
struct Machine {
    child: Child,
    socket: PathBuf,
}

impl Machine {
    /// Starts a machine, and waits until it answers.
    fn start(name: &str, guest: &[u8], options: &[&str]) -> Self {
        let kernel = folder().join(format!("{name}.elf"));
        fs::write(&kernel, guests::multiboot(guest)).expect("written");
        let socket = folder().join(format!("{name}.sock"));
        let mut child = hwvmm()
            .args(["run", "-m", "16M", "--timeout", "60s", "--api"])
            .arg(&socket)
            .args(options)
            .arg(&kernel)
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("started");
        let deadline = Instant::now() + Duration::from_secs(20);
        while ctl_at(&socket, &["status"]).status.code() != Some(0) {
            if Instant::now() > deadline || child.try_wait().expect("its state").is_some() {
                let _ = child.kill();
                panic!("no answer: {}", text(&child.wait_with_output().expect("ended").stderr));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Self { child, socket }
    }

    fn ctl(&self, request: &[&str]) -> Output {
        ctl_at(&self.socket, request)
    }

    /// The response, which must be JSON on stdout, with exit status 0.
    fn answer(&self, request: &[&str]) -> serde_json::Value {
        let out = self.ctl(request);
        assert_eq!(out.status.code(), Some(0), "{}", text(&out.stderr));
        serde_json::from_slice(&out.stdout).expect("JSON")
    }

    fn end(self) -> Output {
        self.child.wait_with_output().expect("ended")
    }
}

fn ctl_at(socket: &Path, request: &[&str]) -> Output {
    hwvmm().arg("ctl").arg(socket).args(request).output().expect("started")
}

/// Returns why a tiny guest does not run on this host, if it does not.
fn cannot_run() -> Option<String> {
    let kernel = folder().join("probe.elf");
    fs::write(&kernel, guests::multiboot(guests::power_off())).expect("written");
    let out = hwvmm().args(["run", "--timeout", "10s", "-m", "16M"]).arg(kernel).output().expect("started");
    (out.status.code() != Some(0)).then(|| text(&out.stderr))
}

fn with_machine(name: &str, options: &[&str], test: impl FnOnce(Machine)) -> Outcome {
    with_guest(name, guests::spin(), options, test)
}

fn with_guest(name: &str, guest: &[u8], options: &[&str], test: impl FnOnce(Machine)) -> Outcome {
    static PROBE: OnceLock<Option<String>> = OnceLock::new();
    match PROBE.get_or_init(cannot_run) {
        Some(why) => Outcome::Skipped(why.clone()),
        None => {
            test(Machine::start(name, guest, options));
            Outcome::Passed
        }
    }
}

fn stop_is_0() -> Outcome {
    with_machine("stop", &[], |machine| {
        let mode = fs::metadata(&machine.socket).expect("there").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert_eq!(machine.answer(&["stop"])["response"], "stopping");
        let socket = machine.socket.clone();
        let out = machine.end();
        let errors = text(&out.stderr);
        assert_eq!(out.status.code(), Some(0), "{errors}");
        assert!(errors.contains("stopped through the control socket"), "{errors}");
        assert!(
            !errors.contains("userspace exits of vCPU 0"),
            "no flight recorder after an end that was meant: {errors}"
        );
        assert!(!socket.exists());
    })
}

fn stop_before_the_expected_is_38() -> Outcome {
    with_machine("unseen", &["--expect", "never"], |machine| {
        machine.answer(&["stop"]);
        assert_eq!(machine.end().status.code(), Some(38));
    })
}

fn responses() -> Outcome {
    with_machine("responses", &["--balloon", "-m", "32M"], |machine| {
        let deadline = Instant::now() + Duration::from_secs(20);
        while machine.answer(&["status"])["state"] != "running" {
            assert!(Instant::now() < deadline);
        }
        let balloon = machine.answer(&["balloon", "4M"]);
        assert_eq!((&balloon["response"], balloon["target_bytes"].as_u64()), (&"balloon".into(), Some(4 << 20)));
        assert_eq!(machine.answer(&["balloon", "100"])["target_bytes"], 4096, "whole pages");
        let out = machine.ctl(&["balloon", "4T"]);
        assert!(out.status.code() == Some(1) && text(&out.stderr).contains("the most for this guest"), "{out:?}");
        let exits = machine.answer(&["exits"]);
        let vcpus = exits["vcpus"].as_array().expect("vCPUs");
        assert_eq!((&exits["response"], vcpus.len()), (&"exits".into(), 1));
        assert!(vcpus[0]["userspace_exits"]["by_reason"].is_object(), "{exits}");
        machine.answer(&["stop"]);
        machine.end();
    })
}

/// Exits to user space of all vCPUs so far.
fn userspace_exits(machine: &Machine) -> u64 {
    let exits = machine.answer(&["exits"]);
    let vcpus = exits["vcpus"].as_array().expect("vCPUs");
    vcpus.iter().map(|vcpu| vcpu["userspace_exits"]["total"].as_u64().expect("a count")).sum()
}

/// Processor time of a process and of its children so far, in clock ticks.
fn cpu_ticks(process: u32) -> u64 {
    let stat = fs::read_to_string(format!("/proc/{process}/stat")).expect("it runs");
    // Behind the name, which is in parentheses: utime and stime are the fields 14 and 15 (proc(5)).
    let fields: Vec<_> = stat.rsplit_once(')').expect("a name").1.split_whitespace().collect();
    let own: u64 = fields[11..13].iter().map(|field| field.parse::<u64>().expect("a number")).sum();
    let children = fs::read_to_string(format!("/proc/{process}/task/{process}/children")).unwrap_or_default();
    own + children.split_whitespace().map(|child| cpu_ticks(child.parse().expect("a process"))).sum::<u64>()
}

fn a_paused_machine_rests() -> Outcome {
    with_guest("pause", guests::poll(), &["-c", "2"], |machine| {
        while userspace_exits(&machine) < 100 {}
        assert_eq!(machine.answer(&["status"])["state"], "running");
        assert_eq!(machine.answer(&["pause"])["response"], "paused");
        assert_eq!(machine.answer(&["status"])["state"], "paused");
        let (exits, ticks) = (userspace_exits(&machine), cpu_ticks(machine.child.id()));
        std::thread::sleep(Duration::from_millis(1300));
        assert_eq!(machine.answer(&["pause"])["response"], "paused", "once more");
        assert_eq!(userspace_exits(&machine), exits, "a paused machine makes no exits");
        let used = cpu_ticks(machine.child.id()) - ticks;
        assert!(used <= 5, "{used} ticks of 10 ms in 1.3 s");
        assert_eq!(machine.answer(&["resume"])["response"], "running");
        assert_eq!(machine.answer(&["status"])["state"], "running");
        while userspace_exits(&machine) < exits + 100 {}
        machine.answer(&["resume"]);
        // A paused machine can be stopped.
        machine.answer(&["pause"]);
        machine.answer(&["stop"]);
        assert_eq!(machine.end().status.code(), Some(0));
    })
}

fn refusals() -> Outcome {
    with_machine("refusals", &[], |machine| {
        let out = machine.ctl(&["balloon", "4M"]);
        assert_eq!((out.status.code(), text(&out.stdout).as_str()), (Some(1), ""));
        assert_eq!(text(&out.stderr), "hwvmm: this machine has no balloon: start it with --balloon\n");
        for wrong in [&["halt"][..], &["balloon"], &["balloon", "much"], &["stop", "now"]] {
            let out = machine.ctl(wrong);
            assert_eq!(out.status.code(), Some(2), "{wrong:?}: {}", text(&out.stderr));
        }
        // A refused request changes nothing.
        assert_eq!(machine.answer(&["status"])["response"], "status");
        machine.answer(&["stop"]);
        machine.end();
    })
}

fn no_machine() -> Outcome {
    let missing = folder().join("missing");
    let out = ctl_at(&missing, &["status"]);
    let errors = text(&out.stderr);
    assert_eq!((out.status.code(), text(&out.stdout).as_str()), (Some(1), ""));
    assert!(errors.contains("no machine answers at") && errors.contains("No such file"), "{errors}");
    Outcome::Passed
}

const TESTS: &[Test] = &[
    ("stop_is_0", stop_is_0),
    ("stop_before_the_expected_is_38", stop_before_the_expected_is_38),
    ("requests_are_answered", responses),
    ("a_paused_machine_rests", a_paused_machine_rests),
    ("refusals_are_errors", refusals),
    ("a_machine_that_is_not_there", no_machine),
];

fn main() -> ExitCode {
    harness::run("control", TESTS)
}
