//! Tests of profiles and reports from the command line: `hwvmm run --profile`, `hwvmm report`, `hwvmm top`. The guests are tiny multiboot
//! programs.

#![allow(clippy::unwrap_used, reason = "a test may fail where it stands")]

mod guests;
mod harness;

use harness::{Outcome, Test, folder, text};
use std::fs;
use std::io::Write as _;
use std::path::PathBuf;
use std::process::{Command, ExitCode, Output, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

fn hwvmm(arguments: &[&str]) -> Output {
    command(arguments).output().expect("started")
}

fn command(arguments: &[&str]) -> Command {
    let path = std::env::var_os("HWVMM_BIN").unwrap_or_else(|| env!("CARGO_BIN_EXE_hwvmm").into());
    let mut command = Command::new(path);
    command.args(arguments).stdin(Stdio::null()).env("HOME", folder()).env_remove("XDG_CACHE_HOME");
    command
}

fn file(name: &str, content: &[u8]) -> String {
    let path = folder().join(name);
    fs::write(&path, content).expect("written");
    path.display().to_string()
}

/// Coalesced writes to the UART make no exits, and these tests count exits.
const COALESCED_IO_OFF: &str = "--tune=coalesced-io=off";

/// The profile of a guest that says "hello" on its UART and powers off; made once. Fails where this host's KVM cannot run it.
fn profile() -> Result<&'static str, String> {
    static MADE: OnceLock<Result<String, String>> = OnceLock::new();
    let make = || {
        let kernel = file("hello.elf", &guests::multiboot(guests::power_off()));
        let out: PathBuf = folder().join("hello.json");
        let out = out.display().to_string();
        let run = hwvmm(&["run", "-m", "16M", COALESCED_IO_OFF, "--timeout", "20s", "--profile-out", &out, &kernel]);
        if run.status.code() != Some(0) {
            return Err(text(&run.stderr));
        }
        let errors = text(&run.stderr);
        assert!(errors.contains("userspace exits: ") && errors.contains("UART 1 0x3f8 write"), "{errors}");
        Ok(out)
    };
    MADE.get_or_init(make).as_deref().map_err(Clone::clone)
}

fn with_profile(test: impl FnOnce(&str)) -> Outcome {
    match profile() {
        Ok(path) => {
            test(path);
            Outcome::Passed
        }
        Err(why) => Outcome::Skipped(why),
    }
}

fn counts_agree() -> Outcome {
    with_profile(|path| {
        let json: serde_json::Value = serde_json::from_slice(&fs::read(path).unwrap()).expect("JSON");
        let exits = &json["userspace_exits"];
        let causes = exits["causes"].as_array().expect("causes");
        let sum: u64 = causes.iter().map(|cause| cause["count"].as_u64().unwrap()).sum();
        assert!(sum > 0 && exits["total"] == sum, "{exits}");
        let line: u64 =
            exits["timeline"]["counts"].as_array().unwrap().iter().map(|step| step[2].as_u64().unwrap()).sum();
        assert_eq!(line, sum, "the time line has them all");
        // The same guest with --stats has the same exits.
        let kernel = file("hello2.elf", &guests::multiboot(guests::power_off()));
        let stats = folder().join("stats.json").display().to_string();
        for more in [&[][..], &["--profile=user"]] {
            let arguments =
                [&["run", "-m", "16M", COALESCED_IO_OFF, "--timeout", "20s", "--stats-out", &stats, &kernel][..], more]
                    .concat();
            hwvmm(&arguments);
            let stats: serde_json::Value = serde_json::from_slice(&fs::read(&stats).unwrap()).expect("JSON");
            let exits = &stats["userspace_exits"];
            assert_eq!(exits["total"], sum);
            assert!(exits["by_reason"]["pio_out"]["handler_ns"].as_u64().is_some_and(|ns| ns > 0), "{exits}");
        }
    })
}

fn every_form() -> Outcome {
    with_profile(|path| {
        for (form, words) in [
            ("text", "userspace exits: "),
            ("json", "\"format\":\"hwvmm-profile\""),
            ("csv", "userspace,pio_out,pio,port,0x3f8,1,write,UART 1,"),
            ("folded", "userspace exits;pio_out;UART 1 0x3f8 write;"),
            ("svg", "<svg"),
            ("html", "<!doctype html>"),
            ("chrome-trace", "\"traceEvents\""),
            ("prometheus", "hwvmm_exits_total{sort=\"userspace\",reason=\"pio_out\"}"),
        ] {
            let out = hwvmm(&["report", path, "--format", form]);
            // With a trace of VM exits, the flame graph shows those.
            let there =
                text(&out.stdout).contains(words) || (form == "folded" && text(&out.stdout).contains("VM exits;"));
            assert!(out.status.success() && there, "{form}: {} {}", text(&out.stdout), text(&out.stderr));
        }
        let page = folder().join("page.html").display().to_string();
        assert!(hwvmm(&["report", path, "-f", "html", "-o", &page]).status.success());
        assert!(fs::read_to_string(page).unwrap().ends_with("</html>\n"));
    })
}

fn two_profiles() -> Outcome {
    with_profile(|path| {
        let out = hwvmm(&["report", path, path]);
        assert!(out.status.success() && text(&out.stdout).contains("no cause changed"), "{}", text(&out.stdout));
        let changed = fs::read_to_string(path).unwrap().replace("UART 1", "UART 9");
        let changed = file("changed.json", changed.as_bytes());
        let out = hwvmm(&["report", path, &changed, "--format", "json"]);
        let json: serde_json::Value = serde_json::from_slice(&out.stdout).expect("JSON");
        assert!(json["changes"].as_array().is_some_and(|changes| !changes.is_empty()), "{json}");
        // A pipe can be read once only.
        let mut child = command(&["report", path, "/dev/stdin"]).stdin(Stdio::piped()).spawn().expect("started");
        child.stdin.take().unwrap().write_all(&fs::read(&changed).unwrap()).expect("written");
        assert!(child.wait().expect("ended").success());
        let out = hwvmm(&["report", path, &changed, "--format", "svg"]);
        assert_eq!(out.status.code(), Some(1));
        assert!(text(&out.stderr).contains("text or json"));
    })
}

fn budgets() -> Outcome {
    with_profile(|path| {
        let status = |arguments: &[&str]| {
            let out = hwvmm(&[&["report", path], arguments].concat());
            (out.status.code(), text(&out.stderr))
        };
        let (code, errors) = status(&["--budget", "userspace=0,port.0x3f8=1000"]);
        assert_eq!(code, Some(39), "{errors}");
        assert!(
            errors.contains("budget userspace: ") && errors.contains("too many") && errors.contains("UART 1 0x3f8"),
            "{errors}"
        );
        assert_eq!(status(&["--budget", "userspace=100000"]).0, Some(0));
        assert_eq!(status(&["--budget-from", path, "--slack", "0%"]).0, Some(0));
        for (budget, words) in
            [("colour=1", "known are: total"), ("userspace=x", "whole number"), ("/none", "cannot read the budget")]
        {
            let (code, errors) = status(&["--budget", budget]);
            assert!(code == Some(2) && errors.contains(words), "{errors}");
        }
        let kernel = file("budget.elf", &guests::multiboot(guests::power_off()));
        let out =
            hwvmm(&["run", "-m", "16M", COALESCED_IO_OFF, "--timeout", "20s", "--budget", "userspace=1", &kernel]);
        assert_eq!(out.status.code(), Some(39), "{}", text(&out.stderr));
    })
}

/// Each file is refused with one line that says what is wrong.
fn bad_files() -> Outcome {
    let none = folder().join("none.json").display().to_string();
    let future = file("future.json", b"{\"format\":\"hwvmm-profile\",\"version\":99,\"hwvmm\":\"9.9\"}");
    let other = file("other.json", b"{\"traceEvents\":[]}");
    let binary = file("binary.json", &[0xff; 1000]);
    let deep = file("deep.json", "[".repeat(100_000).as_bytes());
    for (path, words) in [
        (none.as_str(), "cannot read the profile"),
        (future.as_str(), "version 99"),
        (other.as_str(), "not an hwvmm profile"),
        (binary.as_str(), "not an hwvmm profile"),
        (deep.as_str(), "not an hwvmm profile"),
        (folder().to_str().unwrap(), "it is a folder"),
        ("/dev/zero", "it has more than"),
    ] {
        let out = hwvmm(&["report", path]);
        let errors = text(&out.stderr);
        assert!(
            out.status.code() == Some(1) && errors.contains(words) && errors.lines().count() == 1,
            "{path}: {errors}"
        );
        assert!(!errors.contains("panicked"), "{errors}");
    }
    Outcome::Passed
}

fn damaged_profiles() -> Outcome {
    with_profile(|path| {
        let whole = fs::read(path).unwrap();
        // Each proper prefix of a JSON object is damaged, the one without the last brace too. The newline behind it is not part of it.
        let document = whole.trim_ascii_end();
        let step = (document.len() / 40).max(1);
        for cut in (0..document.len()).step_by(step).chain([1, document.len() - 1]) {
            let damaged = file("cut.json", &document[..cut]);
            let out = hwvmm(&["report", &damaged]);
            assert!(
                out.status.code() == Some(1) && !text(&out.stderr).contains("panicked"),
                "cut at {cut} of {}: {}",
                document.len(),
                text(&out.stderr)
            );
        }
        let out = hwvmm(&["report", &file("whole.json", document)]);
        assert!(out.status.success(), "without its last newline: {}", text(&out.stderr));
        let wrong = text(&whole).replacen("\"total\":", "\"total\":1", 1);
        let out = hwvmm(&["report", &file("wrong.json", wrong.as_bytes())]);
        assert!(out.status.code() == Some(1) && text(&out.stderr).contains("is damaged"), "{}", text(&out.stderr));
    })
}

fn a_full_disk() -> Outcome {
    with_profile(|path| {
        for arguments in [&["report", path, "-o", "/dev/full"][..], &["report", path, "-f", "html", "-o", "/none/page"]]
        {
            let out = hwvmm(arguments);
            assert!(
                out.status.code() == Some(1) && text(&out.stderr).contains("cannot write"),
                "{}",
                text(&out.stderr)
            );
        }
        let kernel = file("full.elf", &guests::multiboot(guests::power_off()));
        let out =
            hwvmm(&["run", "-m", "16M", COALESCED_IO_OFF, "--timeout", "20s", "--profile-out", "/dev/full", &kernel]);
        assert!(out.status.code() == Some(42) && text(&out.stderr).contains("No space left"), "{}", text(&out.stderr));
    })
}

fn a_running_machine() -> Outcome {
    with_profile(|_| {
        let kernel = file("spin.elf", &guests::multiboot(guests::spin()));
        let socket = folder().join("vm.sock").display().to_string();
        // In the background of a shell, SIGQUIT is ignored, which hwvmm would leave so.
        let run = command(&["run", "-m", "16M", COALESCED_IO_OFF, "--timeout", "30s", "--api", &socket, &kernel]);
        let mut vm = Command::new("env")
            .arg("--default-signal")
            .arg(run.get_program())
            .args(run.get_args())
            .env("HOME", folder())
            .env_remove("XDG_CACHE_HOME")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("started");
        let deadline = Instant::now() + Duration::from_secs(10);
        let mut seen = String::new();
        while Instant::now() < deadline && !seen.contains("interrupted") {
            let out = hwvmm(&["top", "--once", "--interval", "0.2", &socket]);
            seen = text(&out.stdout) + &text(&out.stderr);
            std::thread::sleep(Duration::from_millis(50));
        }
        assert!(seen.contains("exits a second: VM exits ") && seen.contains("interrupted"), "{seen}");
        // The key for the flight recorder shows it with times.
        rustix_kill(vm.id());
        let errors = {
            let mut errors = String::new();
            std::io::Read::read_to_string(&mut vm.stderr.take().unwrap(), &mut errors).unwrap();
            errors
        };
        assert_eq!(vm.wait().unwrap().code(), Some(131), "{errors}");
        assert!(errors.contains("the last ") && errors.contains("interrupted"), "{errors}");
        let (last, reason) = (errors.find("the last "), errors.find("ended by SIGQUIT"));
        assert!(last.is_some() && last < reason, "the reason comes last: {errors}");
        let out = hwvmm(&["top", "--once", &socket]);
        assert!(
            out.status.code() == Some(1) && text(&out.stderr).contains("no machine answers"),
            "{}",
            text(&out.stderr)
        );
    })
}

fn rustix_kill(pid: u32) {
    let pid = rustix::process::Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::QUIT).expect("killed");
}

fn costs() -> Outcome {
    with_profile(|_| {
        let out = hwvmm(&["bench", "exits", "--json"]);
        let json: serde_json::Value = serde_json::from_slice(&out.stdout).expect("JSON");
        let ns = json["ns"].as_object().expect("figures");
        assert!(
            ns["userspace_pio"].as_f64() > ns["cpuid"].as_f64(),
            "a way to hwvmm costs more than one to the kernel: {json}"
        );
        // The next profile uses the saved costs.
        let kernel = file("costs.elf", &guests::multiboot(guests::power_off()));
        let path = folder().join("costs.json").display().to_string();
        hwvmm(&["run", "-m", "16M", COALESCED_IO_OFF, "--timeout", "20s", "--profile-out", &path, &kernel]);
        let profile: serde_json::Value = serde_json::from_slice(&fs::read(path).unwrap()).expect("JSON");
        assert_eq!(profile["costs"]["cpuid"], ns["cpuid"]);
    })
}

const TESTS: &[Test] = &[
    ("a_profile_has_every_exit_once", counts_agree),
    ("a_report_is_rendered_in_every_format", every_form),
    ("two_profiles_are_compared", two_profiles),
    ("budgets_have_their_own_status", budgets),
    ("files_that_are_no_profiles_are_refused", bad_files),
    ("damaged_profiles_are_refused", damaged_profiles),
    ("a_full_disk_is_reported", a_full_disk),
    ("a_running_machine_can_be_watched", a_running_machine),
    ("exit_costs_are_measured_and_saved", costs),
];

fn main() -> ExitCode {
    harness::run("report", TESTS)
}
