//! Verdicts: a suite with every one is held to its expected results.

use super::harness::{Outcome, Test, text};
use super::{ENVIRONMENT, Suite, binary, suite, when_it_runs};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// Every verdict but infrastructure, which has tests of its own: kernel/name, keys, verdict, part of the message.
const EVERY: &[(&str, &str, &str, &str)] = &[
    ("off/boots", "", "pass", ""),
    ("off/expected", "expect = 'hello'", "pass", ""),
    ("debug/debug-exit", "debug-exit = true\nstatus = 77", "pass", ""),
    ("reset/reset-is-wanted", "status = 32", "pass", ""),
    ("ktap-pass/sub-tests", "ktap = true", "pass", ""),
    ("oops/oops-allowed", "fail-on = ['kasan']", "pass", ""),
    (
        "off/expected-other",
        "expect = 'good bye'",
        "fail",
        "status 38: the guest powered off, and --expect was not seen",
    ),
    ("reset/reset", "", "fail", "status 32: the guest reset itself"),
    ("halt/halted", "", "fail", "status 35"),
    ("debug/debug-exit-other", "debug-exit = true", "fail", "status 77"),
    ("ktap-fail/sub-test-fails", "ktap = true", "fail", "1 of 3 sub-tests failed: suite/second"),
    ("ktap-then-reset/ok-lines-of-a-guest-that-resets", "ktap = true", "fail", "status 32"),
    ("off/no-ktap", "ktap = true", "fail", "its console has no KTAP"),
    ("ktap-skip/skipped", "ktap = true", "skip", "no such device"),
    ("panic/panic", "", "panic", "the guest panicked: "),
    ("panic-stays/panic-without-an-end", "", "panic", "the guest panicked: no init found"),
    ("pvpanic/pvpanic", "", "panic", "the guest panicked"),
    ("oops/oops", "", "oops", "bug: BUG: kernel NULL pointer dereference, address: 0000000000000008 (and 1 more)"),
    ("spin/hang", "silence = '500ms'", "hang", "no output for 0.5 s"),
    ("spin/time-out", "timeout = '500ms'", "time-out", "timed out after 0.5 s"),
    ("mute/boot-time-out", "boot-timeout = '500ms'", "time-out", "the guest had not booted after 0.5 s"),
    ("spin/booted-in-time", "boot-timeout = '500ms'\ntimeout = '1s'", "time-out", "timed out after 1 s"),
    (
        "spin/command-boot-time-out",
        "run = 'x'\nroot = 'none'\nmemory = '32M'\nboot-timeout = '500ms'",
        "time-out",
        "the guest had not booted after 0.5 s",
    ),
    ("triple/triple-fault", "", "triple-fault", "triple fault"),
    ("off/over-budget", "budget = 'userspace=0'\nprofile = 'user'", "over-budget", "more exits than its budget allows"),
    ("command-ok/command", "run = 'x'\nroot = 'none'\nmemory = '32M'", "pass", ""),
    (
        "command_exited/command-fails",
        "run = 'x'\nroot = 'none'\nmemory = '32M'",
        "fail",
        "status 34: the command exited",
    ),
    ("command_exited/command-34", "run = ['x', 'y']\nroot = 'none'\nmemory = '32M'\nstatus = 34", "pass", ""),
    ("command_signaled/command-killed", "run = 'x'\nroot = 'none'\nmemory = '32M'", "fail", "signal 9"),
    ("command-skip/command-skips", "run = 'x'\nroot = 'none'\nmemory = '32M'", "skip", "status 4"),
    ("command-oops/command-with-an-oops", "run = 'x'\nroot = 'none'\nmemory = '32M'", "oops", "bug: BUG: "),
    ("panic/command-with-a-panic", "run = 'x'\nroot = 'none'\nmemory = '32M'", "panic", "panicked: "),
    ("panic-stays/command-with-a-panic-without-an-end", "run = 'x'\nroot = 'none'\nmemory = '32M'", "panic", "no init"),
    ("spin/command-hangs", "run = 'x'\nroot = 'none'\nmemory = '32M'\nsilence = '500ms'", "hang", "no output"),
    ("off/no-status", "run = 'x'\nroot = 'none'\nmemory = '32M'", "fail", "status is not known"),
    ("off/within-budget", "budget = 'userspace=100'\nprofile = 'user'", "pass", ""),
];

/// The module of [`guests::fails_once`], with which it fails.
fn failing_module(suite: &Suite) -> PathBuf {
    let path = suite.path().join("module");
    fs::write(&path, [0; 4096]).expect("written");
    path
}

fn every_verdict_is_as_expected() -> Outcome {
    when_it_runs(|| {
        let tests: Vec<(&str, &str)> = EVERY.iter().map(|(name, keys, ..)| (*name, *keys)).collect();
        let suite = suite(&tests);
        let out = suite.test(&["-o", "results", "-j", "4"]);
        assert_eq!(out.status.code(), Some(1), "{}", text(&out.stderr));
        let (said, results) = (text(&out.stdout), suite.results("results"));
        for (name, _, verdict, message) in EVERY {
            let name = name.split_once('/').unwrap().1;
            let result = &results[name];
            assert_eq!(result["verdict"], *verdict, "{name}: {result}");
            assert!(result["message"].as_str().unwrap().contains(message), "{name}: {result}");
            let of_test = |line: &&str| {
                let rest = line.split_once(&format!("  {name}")).map(|(_, rest)| rest);
                rest.is_some_and(|rest| rest.is_empty() || rest.starts_with(':') || rest.starts_with(" ["))
            };
            let line = said.lines().find(of_test).unwrap_or_else(|| panic!("{name}: {said}"));
            assert!(line.starts_with(verdict), "{line}");
            let folder = Path::new(result["attempts"][0]["artifacts"].as_str().unwrap());
            for file in ["console.log", "hwvmm.log", "stats.json", "run.toml", "again.sh"] {
                let mode = fs::metadata(folder.join(file)).unwrap_or_else(|error| panic!("{name}: {file}: {error}"));
                assert_eq!(mode.permissions().mode() & 0o077 & !0o44, 0, "{file}");
            }
            assert_eq!(fs::metadata(folder).unwrap().permissions().mode() & 0o777, 0o700);
        }
        assert_eq!(results.len(), EVERY.len());
        assert!(
            said.contains(
                "9 pass, 2 skip, 10 fail, 5 panic, 2 oops, 2 hang, 4 time-out, 1 triple-fault, 1 over-budget"
            ),
            "{said}"
        );
        assert!(said.contains("    | hello\n"), "the end of the log is shown: {said}");
        // What the guest has printed is in the file as it was.
        let folder = results["panic"]["attempts"][0]["artifacts"].as_str().unwrap();
        assert!(fs::read(Path::new(folder).join("console.log")).unwrap().contains(&0x1b));
        assert!(!said.contains('\x1b'), "{said:?}");
    })
}

fn a_test_that_passes_on_a_retry_is_flaky() -> Outcome {
    when_it_runs(|| {
        let suite = suite(&[("once", "retries = 50\nmodule = ['module']\nbudget = 'userspace=100'\nprofile = 'user'")]);
        let state = failing_module(&suite);
        // The guest fails while its module begins with a 0. The file is changed once the first try has ended.
        let mut child = suite.command(&["-o", "results"]).stdout(Stdio::piped()).spawn().expect("started");
        let first = suite.path().join("results/00001-once/try-1/stats.json");
        let deadline = Instant::now() + Duration::from_secs(20);
        while fs::metadata(&first).map_or(0, |found| found.len()) == 0 && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(2));
        }
        fs::write(&state, [1; 4096]).expect("written");
        assert_eq!(child.wait().expect("ended").code(), Some(0));
        let result = &suite.results("results")["once"];
        assert_eq!(result["verdict"], "flaky", "{result}");
        let tries = result["attempts"].as_array().unwrap();
        assert!(tries.len() >= 2 && tries[0]["verdict"] == "fail", "{result}");
        let xml = fs::read_to_string(suite.path().join("results/junit.xml")).unwrap();
        assert!(xml.contains("<flakyFailure ") && xml.contains("failures=\"0\""), "{xml}");
    })
}

/// The broken kernel of a pull request: another try would end the same.
fn a_file_that_is_no_kernel_is_no_fault_of_the_host() -> Outcome {
    when_it_runs(|| {
        let suite = suite(&[("text", ""), ("text/command", "run = 'x'\nroot = 'none'"), ("gone", "")]);
        fs::write(suite.path().join("text"), "no kernel at all").unwrap();
        let out = suite.test(&["-o", "results"]);
        assert_eq!(out.status.code(), Some(1), "{}{}", text(&out.stdout), text(&out.stderr));
        let results = suite.results("results");
        for name in ["text", "command"] {
            assert_eq!(results[name]["verdict"], "fail", "{}", results[name]);
            let message = results[name]["message"].as_str().unwrap();
            assert!(message.contains("text is not a kernel that hwvmm can boot"), "{message}");
        }
        assert_eq!(results["gone"]["verdict"], "infrastructure", "{}", results["gone"]);
    })
}

fn what_hwvmm_cannot_do_is_infrastructure() -> Outcome {
    when_it_runs(|| {
        let suite = suite(&[
            ("off/no-initrd", "initrd = 'none'\nretries = 1"),
            ("off/no-kvm", "kvm = '/dev/null'"),
            ("off/too-large", "memory = '4T'"),
            ("off/killed-share", "share = ['tag=h,path=none']"),
            ("off/good", ""),
        ]);
        let out = suite.test(&["-o", "results"]);
        assert_eq!(out.status.code(), Some(42), "{}{}", text(&out.stdout), text(&out.stderr));
        let results = suite.results("results");
        for (name, words) in [
            ("no-initrd", "hwvmm failed with status 42: "),
            ("no-kvm", "hwvmm failed with status 42: "),
            ("too-large", "it needs 4194352 MiB of memory, and this host has "),
            ("killed-share", "hwvmm failed with status 42: "),
        ] {
            let result = &results[name];
            assert_eq!(result["verdict"], "infrastructure", "{result}");
            assert!(result["message"].as_str().unwrap().contains(words), "{result}");
        }
        assert_eq!(results["no-initrd"]["attempts"].as_array().unwrap().len(), 2, "it is tried again");
        assert_eq!(results["good"]["verdict"], "pass");
        let xml = fs::read_to_string(suite.path().join("results/junit.xml")).unwrap();
        assert!(xml.contains("errors=\"4\"") && xml.contains("failures=\"0\""), "{xml}");
        // A failure of a test comes before those of the infrastructure.
        let suite = self::suite(&[("off/no-initrd", "initrd = 'none'"), ("reset", "")]);
        assert_eq!(suite.test(&[]).status.code(), Some(1));
    })
}

/// hwvmm waits for the last line of Linux' panics; a kernel that prints none is ended soon after it has said that it panics.
fn a_panic_is_known_at_once() -> Outcome {
    when_it_runs(|| {
        let suite = suite(&[("panic-stays", "")]);
        let start = Instant::now();
        let out = suite.command_with_signals(&["-o", "results"]).output().unwrap();
        assert_eq!(out.status.code(), Some(1));
        assert!(start.elapsed() < Duration::from_secs(4), "{:?}, of 10 s of silence", start.elapsed());
        let result = &suite.results("results")["panic-stays"];
        let folder = Path::new(result["attempts"][0]["artifacts"].as_str().unwrap()).to_owned();
        let log = fs::read_to_string(folder.join("hwvmm.log")).unwrap();
        assert!(log.contains("userspace exits of vCPU 0"), "the last exits are kept: {log}");
    })
}

/// A shell without job control starts commands in the background with SIGINT and SIGQUIT ignored.
fn a_suite_in_the_background_finds_what_hangs() -> Outcome {
    when_it_runs(|| {
        let suite = suite(&[("spin", "silence = '300ms'")]);
        let start = Instant::now();
        let mut sh = Command::new("sh");
        sh.args(["-c", "trap '' INT QUIT; exec \"$0\" test -o results"]).arg(binary()).current_dir(suite.path());
        ENVIRONMENT.iter().for_each(|name| _ = sh.env_remove(name));
        assert_eq!(sh.stdin(Stdio::null()).output().unwrap().status.code(), Some(1));
        assert!(start.elapsed() < Duration::from_secs(8), "{:?}", start.elapsed());
        assert_eq!(suite.results("results")["spin"]["verdict"], "hang");
    })
}

pub(super) const TESTS: &[Test] = &[
    ("a_file_that_is_no_kernel_is_no_fault_of_the_host", a_file_that_is_no_kernel_is_no_fault_of_the_host),
    ("every_verdict_is_as_expected", every_verdict_is_as_expected),
    ("a_test_that_passes_on_a_retry_is_flaky", a_test_that_passes_on_a_retry_is_flaky),
    ("what_hwvmm_cannot_do_is_infrastructure", what_hwvmm_cannot_do_is_infrastructure),
    ("a_panic_is_known_at_once", a_panic_is_known_at_once),
    ("a_suite_in_the_background_finds_what_hangs", a_suite_in_the_background_finds_what_hangs),
];
