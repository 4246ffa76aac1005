//! The command `hwvmm test`: a suite with every verdict, on this host's KVM, is held to its expected results; so are reports, shards and
//! baselines. The guests are tiny multiboot programs.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test may fail where it stands")]

#[path = "harness/fat.rs"]
mod fat;
#[path = "suites/full_disk.rs"]
mod full_disk;
mod guests;
mod harness;
#[path = "suites/images.rs"]
mod images;
#[path = "suites/processes.rs"]
mod processes;
#[path = "suites/verdicts.rs"]
mod verdicts;

use harness::{Outcome, Test, text};
use serde_json::Value;
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::path::Path;
use std::process::{Command, ExitCode, Output, Stdio};
use std::sync::OnceLock;

/// Variables of engines that start shards, and of GitHub: the tests set their own.
const ENVIRONMENT: &[&str] = &[
    "TEST_SHARD_INDEX",
    "TEST_TOTAL_SHARDS",
    "TEST_SHARD_STATUS_FILE",
    "CI_NODE_INDEX",
    "CI_NODE_TOTAL",
    "BUILDKITE_PARALLEL_JOB",
    "SLURM_ARRAY_TASK_ID",
    "JOB_COMPLETION_INDEX",
    "GITHUB_ACTIONS",
    "GITHUB_STEP_SUMMARY",
    "XDG_CACHE_HOME",
];

fn binary() -> OsString {
    std::env::var_os("HWVMM_BIN").unwrap_or_else(|| env!("CARGO_BIN_EXE_hwvmm").into())
}

/// A folder with the kernels, and with the suites of this test.
struct Suite {
    folder: tempfile::TempDir,
}

impl Suite {
    fn new(text: &str) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        for (name, code) in [
            ("off", guests::power_off()),
            ("reset", guests::reset()),
            ("triple", guests::triple_fault()),
            ("spin", guests::spin()),
            ("mute", guests::spin_protected()),
            ("halt", guests::halt()),
            ("debug", guests::debug_exit()),
            ("pvpanic", guests::pvpanic()),
            ("panic", guests::panic_with_escapes()),
            ("panic-stays", guests::panic_that_stays()),
            ("oops", guests::oops()),
            ("ktap-pass", guests::ktap_pass()),
            ("ktap-fail", guests::ktap_fail()),
            ("ktap-skip", guests::ktap_skip()),
            ("ktap-then-reset", guests::ktap_then_reset()),
            ("hostile", guests::hostile_log()),
            ("once", guests::fails_once()),
            ("command-ok", guests::command_ok()),
            ("command-skip", guests::command_skip()),
            ("command-oops", guests::command_oops()),
            ("command_exited", guests::command_exited()),
            ("command_signaled", guests::command_signaled()),
        ] {
            fs::write(folder.path().join(name), guests::multiboot(code)).expect("written");
        }
        fs::write(folder.path().join("hwvmm-test.toml"), text).expect("written");
        Self { folder }
    }

    fn path(&self) -> &Path {
        self.folder.path()
    }

    fn command(&self, arguments: &[&str]) -> Command {
        self.started_by(Command::new(binary()), arguments)
    }

    /// As [`Suite::command`]. A test under nohup, or in the background of a shell, has signals ignored, which hwvmm would leave so.
    fn command_with_signals(&self, arguments: &[&str]) -> Command {
        let mut env = Command::new("env");
        env.arg("--default-signal").arg(binary());
        self.started_by(env, arguments)
    }

    fn started_by(&self, mut command: Command, arguments: &[&str]) -> Command {
        command.arg("test").args(arguments).current_dir(self.path()).stdin(Stdio::null());
        ENVIRONMENT.iter().for_each(|name| _ = command.env_remove(name));
        command.env("HOME", self.path());
        command
    }

    fn test(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().expect("started")
    }

    /// The results in a folder, by the name of the test.
    fn results(&self, folder: &str) -> BTreeMap<String, Value> {
        let text = fs::read_to_string(self.path().join(folder).join("results.jsonl")).expect("results");
        let lines = text.lines().map(|line| serde_json::from_str::<Value>(line).expect("JSON"));
        lines
            .filter(|line| line["type"] == "result")
            .map(|line| (line["name"].as_str().expect("a name").to_owned(), line))
            .collect()
    }
}

const HEAD: &str = "[defaults]\nmemory = '16M'\ntimeout = '20s'\nsilence = '10s'\n";

/// A suite of one kernel a test, which has its name.
fn suite(tests: &[(&str, &str)]) -> Suite {
    let mut all = HEAD.to_owned();
    let mut kernels: Vec<&str> = Vec::new();
    for (name, keys) in tests {
        let (kernel, test) = name.split_once('/').unwrap_or((name, name));
        if !kernels.contains(&kernel) {
            all += &format!("[[kernel]]\nname = '{kernel}'\npath = '{kernel}'\n");
            kernels.push(kernel);
        }
        all += &format!("[[test]]\nname = '{test}'\nkernel = '{kernel}'\n{keys}\n");
    }
    Suite::new(&all)
}

fn can_run() -> Result<(), String> {
    static PROBE: OnceLock<Result<(), String>> = OnceLock::new();
    PROBE
        .get_or_init(|| {
            let out = suite(&[("off", "")]).test(&["-o", "probe"]);
            if out.status.code() == Some(0) { Ok(()) } else { Err(text(&out.stdout) + &text(&out.stderr)) }
        })
        .clone()
}

fn when_it_runs(test: impl FnOnce()) -> Outcome {
    when_it_runs_or(|| {
        test();
        Outcome::Passed
    })
}

/// As [`when_it_runs`], for a test that needs more than KVM.
fn when_it_runs_or(test: impl FnOnce() -> Outcome) -> Outcome {
    can_run().map_or_else(Outcome::Skipped, |()| test())
}

fn results_need_a_folder_of_their_own() -> Outcome {
    when_it_runs(|| {
        let suite = suite(&[("off", "")]);
        fs::write(suite.path().join("file"), "").unwrap();
        for (output, words) in [("file", "is no folder"), (".", "not empty"), ("none/deeper", "cannot make the folder")]
        {
            let out = suite.test(&["-o", output]);
            // Another try would end the same: a scheduler must not make one, as it does for 42.
            assert_eq!(out.status.code(), Some(2), "{}", text(&out.stderr));
            assert!(text(&out.stderr).contains(words), "{}", text(&out.stderr));
        }
    })
}

fn a_hostile_log_stays_in_its_test() -> Outcome {
    when_it_runs(|| {
        let suite = suite(&[("hostile", "status = 32\nktap = true"), ("off", "")]);
        let summary = suite.path().join("summary.md");
        let out = suite
            .command(&["-o", "results", "-j", "1"])
            .envs([("GITHUB_ACTIONS", "true"), ("GITHUB_STEP_SUMMARY", summary.to_str().unwrap())])
            .output()
            .unwrap();
        assert_eq!(out.status.code(), Some(1));
        let said = text(&out.stdout);
        let commands: Vec<&str> = said.lines().filter(|line| line.trim_start().starts_with("::")).collect();
        assert_eq!(commands.len(), 1, "{said}");
        assert!(commands[0].starts_with("::error title=fail%3A hostile::"), "{said}");
        assert!(!said.contains('\x1b') && !said.contains("##["), "{said:?}");
        assert_eq!(said.lines().filter(|line| line.starts_with("pass")).count(), 1, "{said}");
        let results = suite.results("results");
        assert_eq!(
            (results["hostile"]["verdict"].as_str(), results["off"]["verdict"].as_str()),
            (Some("fail"), Some("pass"))
        );
        let xml = fs::read_to_string(suite.path().join("results/junit.xml")).unwrap();
        assert!(!xml.contains('\x1b') && !xml.contains("<testcase name=\"fake\""), "{xml}");
        let ktap = fs::read_to_string(suite.path().join("results/results.ktap")).unwrap();
        assert!(ktap.contains("\nnot ok 1 hostile # fail: ") && ktap.ends_with("\nok 2 off\n"), "{ktap}");
        let summary = fs::read_to_string(summary).unwrap();
        assert!(summary.contains("| fail | hostile |") && !summary.contains("<b>"), "{summary}");
    })
}

fn the_line_to_run_it_again_does() -> Outcome {
    when_it_runs(|| {
        let suite =
            suite(&[("reset", ""), ("command-oops", "run = 'x'\nroot = 'none'\nmemory = '32M'\nappend = ['a=b']")]);
        suite.test(&["-o", "results", "--baseline", "b.json", "--update-baseline"]);
        let results = suite.results("results");
        let again = results["reset"]["again"].as_str().unwrap();
        let bin = suite.path().join("bin");
        fs::create_dir(&bin).unwrap();
        std::os::unix::fs::symlink(binary(), bin.join("hwvmm")).unwrap();
        let path = &format!("{}:{}", bin.display(), std::env::var("PATH").unwrap_or_default());
        let out = Command::new("sh").args(["-c", again]).env("PATH", path).output().unwrap();
        assert_eq!((out.status.code(), &out.stdout[..]), (Some(32), &b"hello\n"[..]), "{}", text(&out.stderr));
        assert!(text(&out.stderr).contains("exits"), "it is profiled, as the run was: {}", text(&out.stderr));
        // All that the run had is in its file of options, and in the script.
        let folder = Path::new(results["command-oops"]["attempts"][0]["artifacts"].as_str().unwrap());
        let options: toml::Table = toml::from_str(&fs::read_to_string(folder.join("run.toml")).unwrap()).unwrap();
        assert_eq!(options["append"].to_string(), "[\"loglevel=5\", \"a=b\"]");
        Command::new(folder.join("again.sh")).env("PATH", path).output().expect("it is a script");
        let (log, again) = (fs::read(folder.join("console.log")).unwrap(), fs::read(folder.join("again.log")).unwrap());
        assert_eq!(text(&again), text(&log), "the kernel complains of the same");
        assert!(text(&log).contains("BUG: "), "{}", text(&log));
        // An image has come to the path of the kernel: it is none in the test, and so no disk that a guest can write.
        let mut image = vec![0; 1 << 20];
        image[510..512].copy_from_slice(&[0x55, 0xaa]);
        fs::write(suite.path().join("reset"), image).unwrap();
        let line = results["reset"]["again"].as_str().unwrap();
        let out = Command::new("sh").args(["-c", line]).env("PATH", path).output().unwrap();
        let said = text(&out.stderr);
        assert!(said.contains("kernel") && !said.contains("boot loader"), "{said}");
    })
}

fn baselines_are_written_and_held() -> Outcome {
    when_it_runs(|| {
        let suite = suite(&[("off", "profile = 'user'"), ("reset/other", "profile = 'user'\nstatus = 32")]);
        let out = suite.test(&["--baseline", "b.json"]);
        assert_eq!(out.status.code(), Some(2), "there is none");
        assert!(text(&out.stderr).contains("--update-baseline makes it"), "{}", text(&out.stderr));
        let update = ["--baseline", "b.json", "--update-baseline"];
        let out = suite.test(&update);
        assert_eq!(out.status.code(), Some(0), "{}{}", text(&out.stdout), text(&out.stderr));
        let path = suite.path().join("b.json");
        let mut baseline: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        assert_eq!(baseline["tests"].as_object().unwrap().len(), 2, "{baseline}");
        assert!(baseline["tests"]["off"].get("intr").is_none(), "the host's interrupts are no cause: {baseline}");
        assert_eq!(suite.test(&["--baseline", "b.json"]).status.code(), Some(0));
        let count = baseline["tests"]["off"]["userspace"].as_u64().unwrap();
        assert!(count >= 1, "{baseline}");
        baseline["tests"]["off"]["userspace"] = (count - 1).into();
        fs::write(&path, baseline.to_string()).unwrap();
        let out = suite.test(&["--baseline", "b.json", "-o", "results"]);
        assert_eq!(out.status.code(), Some(1), "{}", text(&out.stdout));
        let result = &suite.results("results")["off"];
        assert_eq!(result["verdict"], "over-budget", "{result}");
        assert!(result["message"].as_str().unwrap().contains("1 too many"), "{result}");
        // Only the tests that were run are changed.
        assert_eq!(
            suite.test(&["--filter", "off", "--baseline", "b.json", "--update-baseline"]).status.code(),
            Some(0)
        );
        let again: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        assert_eq!(again["tests"]["off"]["userspace"], count);
        assert!(again["tests"].get("other").is_some());
        fs::write(&path, "{\"format\":\"hwvmm-baseline\",\"version\":9}").unwrap();
        let out = suite.test(&["--baseline", "b.json"]);
        assert_eq!(out.status.code(), Some(2));
        assert!(text(&out.stderr).contains("of version 9"), "{}", text(&out.stderr));
    })
}

fn shards_run_all_tests_and_merge() -> Outcome {
    when_it_runs(|| {
        let suite = suite(&[("off/a", ""), ("off/b", ""), ("off/c", ""), ("reset/d", ""), ("off/e", "")]);
        let first = suite.test(&["--shard", "1/3", "-o", "s1"]);
        let second =
            suite.command(&["-o", "s2"]).envs([("CI_NODE_INDEX", "2"), ("CI_NODE_TOTAL", "3")]).output().unwrap();
        let status = suite.path().join("bazel");
        let third = suite
            .command(&["-o", "s3"])
            .envs([("TEST_SHARD_INDEX", "2"), ("TEST_TOTAL_SHARDS", "3")])
            .env("TEST_SHARD_STATUS_FILE", &status)
            .output()
            .unwrap();
        assert_eq!([&first, &second, &third].map(|out| out.status.code()), [Some(1), Some(0), Some(0)]);
        assert!(status.exists());
        assert_eq!(["s1", "s2", "s3"].map(|folder| suite.results(folder).len()), [2, 2, 1]);
        let out = suite.test(&["merge", "s1", "s2", "s3", "-o", "all"]);
        assert_eq!(out.status.code(), Some(1), "{}", text(&out.stderr));
        assert!(text(&out.stdout).contains("4 pass, 1 fail"), "{}", text(&out.stdout));
        assert_eq!(suite.results("all").len(), 5);
        let out = suite.test(&["merge", "s1", "s2", "s3", "-o", "as-json", "--format", "json"]);
        assert_eq!(text(&out.stdout).lines().filter(|line| serde_json::from_str::<Value>(line).is_ok()).count(), 6);
        let out = suite.test(&["merge", "s2", "s3"]);
        assert_eq!(out.status.code(), Some(42), "a shard is missing");
        assert!(text(&out.stderr).contains("there is no folder of: 1"), "{}", text(&out.stderr));
        assert_eq!(suite.test(&["merge", "none"]).status.code(), Some(2));
        let kubernetes = suite.command(&[]).env("JOB_COMPLETION_INDEX", "0").output().unwrap();
        assert_eq!(kubernetes.status.code(), Some(2));
        assert!(text(&kubernetes.stderr).contains("HWVMM_SHARD_TOTAL is not set"));
    })
}

fn tests_are_listed_filtered_and_stopped() -> Outcome {
    let suite =
        suite(&[("off/a", "[test.matrix]\ncpus = [1, 2]\ntune = ['', 'all=off']"), ("reset/b", ""), ("off/c", "")]);
    let list = |arguments: &[&str]| text(&suite.test(&[&["--list"], arguments].concat()).stdout);
    assert_eq!(list(&[]), "a[cpus=1,tune=]\na[cpus=1,tune=all=off]\na[cpus=2,tune=]\na[cpus=2,tune=all=off]\nb\nc\n");
    assert_eq!(list(&["--filter", "cpus=2", "-f", "b"]), "a[cpus=2,tune=]\na[cpus=2,tune=all=off]\nb\n");
    assert_eq!(list(&["--regex", "^[bc]$", "--shard", "2/2"]), "c\n");
    assert!(!suite.path().join("hwvmm-results").exists(), "nothing was run");
    // 1 says that a test is bad.
    for arguments in [&["--list"][..], &["--init", "new.toml"]] {
        let full = fs::File::options().write(true).open("/dev/full").unwrap();
        assert_eq!(suite.command(arguments).stdout(full).status().unwrap().code(), Some(42), "{arguments:?}");
    }
    for (arguments, words) in [
        (&["--list", "--format", "json"][..], "'--list' cannot be used with '--format <FORMAT>'"),
        (&["--list", "-o", "x"], "cannot be used with"),
        (&["--init", "--fail-fast"], "cannot be used with"),
        (&["--init", "--shard", "1/2"], "cannot be used with"),
        (&["--init", "a", "b"], "--init writes one file"),
        (&["--init", "hwvmm-test.toml"], "cannot write hwvmm-test.toml: File exists (os error 17): name another FILE"),
    ] {
        let out = suite.test(arguments);
        assert_eq!(out.status.code(), Some(2), "{arguments:?}");
        assert!(text(&out.stderr).contains(words), "{arguments:?}: {}", text(&out.stderr));
    }
    let out = suite.test(&["--filter", "none"]);
    assert_eq!(out.status.code(), Some(2));
    assert!(text(&out.stderr).contains("no test is chosen by --filter 'none'"), "{}", text(&out.stderr));
    when_it_runs(|| {
        let out = suite.test(&["--fail-fast", "-j", "1", "--regex", "^[bc]$", "-o", "results"]);
        assert_eq!(out.status.code(), Some(1));
        assert!(text(&out.stdout).contains("1 fail, 1 not run"), "{}", text(&out.stdout));
        assert_eq!(suite.test(&["--filter", "a["]).status.code(), Some(0), "the matrix runs");
        let json = suite.test(&["--filter", "c", "--regex", "^c$", "--format", "json"]);
        assert_eq!(text(&json.stdout).lines().filter(|line| serde_json::from_str::<Value>(line).is_ok()).count(), 2);
        let ktap = suite.test(&["--regex", "^[bc]$", "--format", "ktap", "-j", "1"]);
        let said = text(&ktap.stdout);
        assert_eq!(said, "KTAP version 1\n1..2\nnot ok 1 b # fail: status 32: the guest reset itself\nok 2 c\n");
    })
}

fn a_sample_is_written_and_can_be_used() -> Outcome {
    let suite = suite(&[("off", "")]);
    let out = suite.test(&["--init"]);
    assert_eq!(out.status.code(), Some(2), "what is there stays");
    let out = suite.test(&["--init", "sample.toml"]);
    assert_eq!(out.status.code(), Some(0), "{}", text(&out.stderr));
    // Its kernels are those of a host; here a tiny guest stands for them, which says what Linux would.
    let path = suite.path().join("sample.toml");
    let sample = fs::read_to_string(&path).unwrap();
    assert!(sample.contains("path = \"/boot/vmlinuz-*\"") && sample.contains("expect = \"Unable"));
    let sample =
        sample.replace("/boot/vmlinuz-*", "of*").replace("Unable to mount root fs|No working init found", "hello");
    fs::write(&path, sample.replace("budget = ", "profile = \"user\"\nbudget = ")).unwrap();
    when_it_runs(|| {
        let out = suite.test(&["sample.toml"]);
        assert_eq!(out.status.code(), Some(0), "{}{}", text(&out.stdout), text(&out.stderr));
        assert!(text(&out.stdout).contains("3 pass"), "{}", text(&out.stdout));
    })
}

fn bad_suites_are_refused_with_status_2() -> Outcome {
    let suite = suite(&[("off", "")]);
    for (content, words) in [
        ("[[test]]\nname = 'a'\ncolour = 1", "unknown key 'colour'; the keys are: name, kernel"),
        ("[[test]]\nname = 'a'\nrun = 1", "run must be a line"),
        ("[[kernel]]\nname = 'k'\npath = 'no*'\n[[test]]\nname = 'a'", "no file matches 'no*'"),
        ("x", "bad.toml"),
    ] {
        fs::write(suite.path().join("bad.toml"), content).unwrap();
        let out = suite.test(&["bad.toml"]);
        assert_eq!(out.status.code(), Some(2), "{}", text(&out.stderr));
        assert!(text(&out.stderr).contains(words), "{}", text(&out.stderr));
    }
    let tests: String = (0..10_000).map(|n| format!("[[test]]\nname = 't{n}'\n")).collect();
    let many = format!("[[kernel]]\nname = 'k'\npath = 'off'\n{tests}");
    fs::write(suite.path().join("many.toml"), &many).unwrap();
    assert_eq!(text(&suite.test(&["many.toml", "--list"]).stdout).lines().count(), 10_000);
    fs::write(suite.path().join("many.toml"), many + "[[test]]\nname = 'more'\n").unwrap();
    let out = suite.test(&["many.toml", "--list"]);
    assert_eq!(out.status.code(), Some(2));
    assert!(text(&out.stderr).contains("more than 10000 tests"), "{}", text(&out.stderr));
    assert_eq!(suite.test(&["none.toml"]).status.code(), Some(2));
    Outcome::Passed
}

const TESTS: &[Test] = &[
    ("results_need_a_folder_of_their_own", results_need_a_folder_of_their_own),
    ("a_hostile_log_stays_in_its_test", a_hostile_log_stays_in_its_test),
    ("the_line_to_run_it_again_does", the_line_to_run_it_again_does),
    ("baselines_are_written_and_held", baselines_are_written_and_held),
    ("shards_run_all_tests_and_merge", shards_run_all_tests_and_merge),
    ("tests_are_listed_filtered_and_stopped", tests_are_listed_filtered_and_stopped),
    ("no_space_for_results_is_no_success", full_disk::no_space_for_results_is_no_success),
    ("a_sample_is_written_and_can_be_used", a_sample_is_written_and_can_be_used),
    ("bad_suites_are_refused_with_status_2", bad_suites_are_refused_with_status_2),
];

fn main() -> ExitCode {
    harness::run("suites", &[TESTS, images::TESTS, processes::TESTS, verdicts::TESTS].concat())
}
