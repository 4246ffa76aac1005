//! Suites that are ended from outside, and limits of their process.

use super::harness::{Outcome, Test, hwvmm, text};
use super::{ENVIRONMENT, Suite, suite, when_it_runs};
use std::fs;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

pub(super) const TESTS: &[Test] = &[
    ("a_suite_that_is_ended_ends_its_guests", a_suite_that_is_ended_ends_its_guests),
    ("a_run_whose_suite_is_gone_does_not_start", a_run_whose_suite_is_gone_does_not_start),
    ("an_image_in_the_place_of_a_kernel_is_none", an_image_in_the_place_of_a_kernel_is_none),
    ("a_suite_under_nohup_is_not_ended_by_sighup", a_suite_under_nohup_is_not_ended_by_sighup),
    ("a_file_that_may_not_grow_is_an_error", a_file_that_may_not_grow_is_an_error),
    ("a_terminal_shows_what_runs", a_terminal_shows_what_runs),
    ("results_say_what_they_ran_on", results_say_what_they_ran_on),
];

fn a_suite_that_is_ended_ends_its_guests() -> Outcome {
    use rustix::process::Signal;
    when_it_runs(|| {
        for signal in [Signal::TERM, Signal::QUIT] {
            end_a_suite(signal, Some(130), "true");
        }
        // Nothing of the suite is left to end them.
        end_a_suite(Signal::KILL, None, "true");
        end_a_suite(Signal::KILL, None, "trap '' TERM");
    })
}

/// The processes that have `text` in their command line.
fn processes_with(part: &str) -> Vec<String> {
    let folders = fs::read_dir("/proc").unwrap().filter_map(Result::ok);
    let lines = folders.filter_map(|folder| fs::read(folder.path().join("cmdline")).ok());
    lines.map(|line| text(&line).replace('\0', " ")).filter(|line| line.contains(part)).collect()
}

/// Starts `hwvmm test` with `arguments` by a shell that runs `before` first.
fn start_by_shell(suite: &Suite, before: &str, arguments: &str) -> Child {
    let program = suite.command(&[]).get_program().to_owned();
    let mut sh = Command::new("env");
    sh.args(["--default-signal", "sh"]);
    // In the background of a shell, SIGINT and SIGQUIT are ignored, which hwvmm would leave so, and which a shell cannot undo.
    sh.arg("-c").arg(format!("{before}; exec \"$0\" test {arguments}")).arg(program).current_dir(suite.path());
    ENVIRONMENT.iter().for_each(|name| _ = sh.env_remove(name));
    sh.stdin(Stdio::null()).stdout(Stdio::null()).spawn().unwrap()
}

/// Ends a suite of guests that run on, and sees them end. It is started by a shell that runs `before` first.
fn end_a_suite(signal: rustix::process::Signal, status: Option<i32>, before: &str) {
    let suite = suite(&[("spin/a", ""), ("spin/b", ""), ("spin/c", "")]);
    let folder = suite.path().to_str().unwrap().to_owned();
    let mut child = start_by_shell(&suite, before, "-o results -j 2");
    let log = suite.path().join("results/00001-a/try-1/console.log");
    let deadline = Instant::now() + Duration::from_secs(10);
    while fs::metadata(&log).map_or(0, |found| found.len()) == 0 && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(5));
    }
    assert!(!processes_with(&folder).is_empty(), "its guests run");
    rustix::process::kill_process(rustix::process::Pid::from_child(&child), signal).unwrap();
    let start = Instant::now();
    assert_eq!(child.wait().unwrap().code(), status);
    while !processes_with(&folder).is_empty() && start.elapsed() < Duration::from_secs(15) {
        std::thread::sleep(Duration::from_millis(5));
    }
    assert!(start.elapsed() < Duration::from_secs(15), "{signal:?}: {:?}", processes_with(&folder));
    assert!(suite.results("results").is_empty(), "no test has a result that it did not come to");
}

/// The suite was killed before its run could ask for a signal at that.
fn a_run_whose_suite_is_gone_does_not_start() -> Outcome {
    let out = hwvmm().args(["run", "--end-with-parent", "1", "kernel"]).output().unwrap();
    assert_eq!(out.status.code(), Some(42));
    assert!(
        text(&out.stderr).contains("--end-with-parent 1: this process has another parent"),
        "{}",
        text(&out.stderr)
    );
    Outcome::Passed
}

/// A kernel that was missing when the suite was read: what comes to its path is no image, which would be a disk that the guest can write.
fn an_image_in_the_place_of_a_kernel_is_none() -> Outcome {
    let folder = tempfile::tempdir().unwrap();
    let mut image = vec![0; 1 << 20];
    image[510..512].copy_from_slice(&[0x55, 0xaa]);
    fs::write(folder.path().join("kernel"), image).unwrap();
    let run = |options: &[&str]| {
        let out = hwvmm().arg("run").args(options).arg("kernel").current_dir(folder.path()).output().unwrap();
        text(&out.stderr)
    };
    let (by_user, by_suite) = (run(&[]), run(&["--kernel-is-no-image"]));
    assert!(by_user.contains("no boot loader's configuration"), "{by_user}");
    assert!(!by_suite.contains("boot loader") && by_suite.contains("kernel"), "{by_suite}");
    Outcome::Passed
}

/// A shell that is left has sent SIGHUP: nohup(1) has it ignored.
fn a_suite_under_nohup_is_not_ended_by_sighup() -> Outcome {
    when_it_runs(|| {
        let suite = suite(&[("spin", "silence = '500ms'")]);
        let mut child = start_by_shell(&suite, "trap '' HUP", "-o results");
        let log = suite.path().join("results/00001-spin/try-1/console.log");
        while fs::metadata(&log).map_or(0, |found| found.len()) == 0 && child.try_wait().unwrap().is_none() {
            std::thread::sleep(Duration::from_millis(5));
        }
        rustix::process::kill_process(rustix::process::Pid::from_child(&child), rustix::process::Signal::HUP).unwrap();
        assert_eq!(child.wait().unwrap().code(), Some(1));
        assert_eq!(suite.results("results")["spin"]["verdict"], "hang");
    })
}

/// A write beyond RLIMIT_FSIZE is an error that is said, no death by SIGXFSZ.
fn a_file_that_may_not_grow_is_an_error() -> Outcome {
    when_it_runs(|| {
        let suite = suite(&[("off", ""), ("reset", "")]);
        let program = suite.command(&[]).get_program().to_owned();
        let mut sh = Command::new("bash");
        sh.args(["-c", "ulimit -f 1; exec \"$0\" test -o results"]).arg(program).current_dir(suite.path());
        ENVIRONMENT.iter().for_each(|name| _ = sh.env_remove(name));
        let out = sh.stdin(Stdio::null()).output().unwrap();
        assert_eq!(out.status.code(), Some(42), "{:?} {}", out.status, text(&out.stderr));
        assert!(text(&out.stderr).contains("File too large"), "{}", text(&out.stderr));
        assert!(text(&out.stdout).contains("results: "), "the summary is printed: {}", text(&out.stdout));
    })
}

fn a_terminal_shows_what_runs() -> Outcome {
    use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
    when_it_runs(|| {
        let suite = suite(&[("off", ""), ("spin", "silence = '300ms'")]);
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        grantpt(&master).and_then(|()| unlockpt(&master)).unwrap();
        let name = ptsname(&master, Vec::new()).unwrap().into_string().unwrap();
        let slave = fs::File::options().read(true).write(true).open(name).unwrap();
        let mut child = suite.command(&["-j", "1", "-o", "results"]).stdout(slave).spawn().unwrap();
        let (mut said, mut bytes) = (Vec::new(), [0; 4096]);
        // EIO once its other side is closed.
        while let Ok(count @ 1..) = rustix::io::read(&master, &mut bytes) {
            said.extend(&bytes[..count]);
        }
        assert_eq!(child.wait().unwrap().code(), Some(1));
        let said = text(&said);
        for line in ["0/2, 1 running: off", "1/2", "1/2, 1 running: spin", "2/2"] {
            assert!(said.contains(&format!("\r\x1b[K{line}")), "{line}: {said:?}");
        }
        assert!(
            said.contains("\r\x1b[K\x1b[") && said.contains("results: "),
            "results are lines of their own: {said:?}"
        );
        // What is no terminal gets none of it.
        assert!(!text(&suite.test(&["--filter", "off"]).stdout).contains('\r'));
    })
}

/// Counts of exits mean little without it.
fn results_say_what_they_ran_on() -> Outcome {
    when_it_runs(|| {
        let suite = suite(&[("off", "profile = 'user'")]);
        let out = suite.test(&["-o", "results", "--baseline", "b.json", "--update-baseline"]);
        let said = text(&out.stdout);
        let ran_on = said.lines().find_map(|line| line.strip_prefix("ran on: ")).unwrap_or_else(|| panic!("{said}"));
        assert!(ran_on.starts_with(concat!("hwvmm ", env!("CARGO_PKG_VERSION"), ", ")), "{ran_on}");
        assert!(["nested paging", "shadow paging", "unknown"].iter().any(|mmu| ran_on.contains(mmu)), "{ran_on}");
        let read = |path: &str| fs::read_to_string(suite.path().join(path)).unwrap();
        let results = read("results/results.jsonl");
        let header: serde_json::Value = serde_json::from_str(results.lines().next().unwrap()).unwrap();
        let baseline: serde_json::Value = serde_json::from_str(&read("b.json")).unwrap();
        assert_eq!(header["ran_on"][0], baseline["made_on"], "{header} {baseline}");
        assert!(header["ran_on"][0]["nested"].is_boolean() && header["ran_on"][0].get("kvm").is_some(), "{header}");
        assert!(read("results/index.html").contains(&format!("ran on: {ran_on}")));
        suite.test(&["merge", "results", "-o", "all"]);
        assert_eq!(read("all/results.jsonl").lines().next(), results.lines().next());
    })
}
