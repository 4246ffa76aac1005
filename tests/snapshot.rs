//! Snapshots as users meet them: `hwvmm ctl SOCKET snapshot DIR` and `hwvmm run --from DIR`. The guests are tiny multiboot programs.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test may fail where it stands")]

#[path = "snapshot/at.rs"]
mod at;
#[path = "snapshot/clones.rs"]
mod clones;
#[path = "snapshot/disks.rs"]
mod disks;
mod guests;
mod harness;
#[path = "snapshot/numbers.rs"]
mod numbers;
#[path = "snapshot/sockets.rs"]
mod sockets;
#[path = "snapshot/template.rs"]
mod template;
#[path = "snapshot/working_set.rs"]
mod working_set;

use harness::{Outcome, Test, folder, hwvmm, text};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Output, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(30);

/// Waits until `done`.
fn wait(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < PATIENCE, "not within {PATIENCE:?}: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A machine that runs until it is stopped.
struct Machine {
    child: Child,
    socket: PathBuf,
    console: PathBuf,
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Machine {
    /// Runs `source` (a kernel, or `--from` and a folder) with the console in a file.
    fn start(name: &str, source: &[&Path], options: &[&str]) -> Self {
        let [socket, console] = ["sock", "out"].map(|end| folder().join(format!("{name}.{end}")));
        let child = hwvmm()
            .args(["run", "--timeout", "60s", "--api"])
            .arg(&socket)
            .arg(format!("--serial=1=file:{}", console.display()))
            .args(options)
            .args(source)
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("started");
        Self { child, socket, console }
    }

    fn boot(name: &str, guest: &[u8], options: &[&str]) -> Self {
        let kernel = folder().join(format!("{name}.elf"));
        fs::write(&kernel, guests::multiboot(guest)).expect("written");
        let machine = Self::start(name, &[&kernel], options);
        machine.wait_for_lines(20);
        machine
    }

    fn restore(name: &str, snapshot: &Path) -> Self {
        Self::start(name, &[Path::new("--from"), snapshot], &[])
    }

    fn output(&self) -> Vec<u8> {
        fs::read(&self.console).unwrap_or_default()
    }

    fn wait_for_lines(&self, count: usize) {
        let lines = || self.output().iter().filter(|byte| **byte == b'\n').count();
        wait("lines of output", || lines() >= count);
    }

    fn ctl(&self, request: &[&str]) -> Output {
        hwvmm().arg("ctl").arg(&self.socket).args(request).output().expect("started")
    }

    /// The response, which must be JSON on stdout, with exit status 0.
    fn answer(&self, request: &[&str]) -> serde_json::Value {
        let out = self.ctl(request);
        assert_eq!(out.status.code(), Some(0), "{}", text(&out.stderr));
        serde_json::from_slice(&out.stdout).expect("JSON")
    }

    /// The message on stderr of a request that is refused.
    fn refusal(&self, request: &[&str]) -> String {
        let out = self.ctl(request);
        assert_eq!(out.status.code(), Some(1), "{}", text(&out.stdout));
        text(&out.stderr)
    }

    fn snapshot(&self, folder: &Path) -> serde_json::Value {
        self.answer(&["snapshot", folder.to_str().expect("UTF-8")])
    }

    /// Ends it, and returns what it wrote to stderr.
    fn stop(mut self) -> String {
        wait("an answer", || {
            self.ctl(&["status"]).status.success() || self.child.try_wait().expect("a state").is_some()
        });
        self.ctl(&["stop"]);
        let mut errors = String::new();
        std::io::Read::read_to_string(&mut self.child.stderr.take().expect("piped"), &mut errors).expect("UTF-8");
        assert_eq!(self.child.wait().expect("ended").code(), Some(0), "{errors}");
        errors
    }
}

/// Returns why a tiny guest does not run on this host, if it does not.
fn cannot_run() -> Option<String> {
    static PROBE: OnceLock<Option<String>> = OnceLock::new();
    let probe = || {
        let kernel = folder().join("probe.elf");
        fs::write(&kernel, guests::multiboot(guests::power_off())).expect("written");
        let out = hwvmm().args(["run", "--timeout", "10s", "-m", "16M"]).arg(kernel).output().expect("started");
        (out.status.code() != Some(0)).then(|| text(&out.stderr))
    };
    PROBE.get_or_init(probe).clone()
}

fn with_kvm(test: impl FnOnce()) -> Outcome {
    match cannot_run() {
        Some(why) => Outcome::Skipped(why),
        None => {
            test();
            Outcome::Passed
        }
    }
}

/// What the guest `count` prints, without an end.
fn counted() -> impl Iterator<Item = u8> {
    let line = |number: u32| {
        let digits = (0..8).rev().map(move |digit| b'0' + u8::try_from(number >> (4 * digit) & 15).expect("small"));
        digits.chain([b'\n'])
    };
    b"hello\n".iter().copied().chain((0..).flat_map(line))
}

/// Checks that `parts` are one sequence of numbers.
fn check_sequence(parts: &[&[u8]]) {
    let all = parts.concat();
    let wrong = all.iter().copied().zip(counted()).position(|(is, should)| is != should);
    let near = |at: usize| text(&all[at.saturating_sub(30)..all.len().min(at + 30)]);
    assert_eq!(wrong, None, "near {:?}", wrong.map(near));
}

fn names(of: &Path) -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(of)
        .expect("a folder")
        .map(|entry| entry.expect("one").file_name().into_string().expect("UTF-8"))
        .collect();
    names.sort();
    names
}

/// Snapshots again and again: each run goes on where the one before it was saved.
fn rounds(name: &str, options: &[&str], count: usize) {
    let mut machine = Machine::boot(name, guests::count(), options);
    let mut before = Vec::new();
    for round in 0..count {
        let snapshot = folder().join(format!("{name}-{round}"));
        machine.answer(&["pause"]);
        machine.snapshot(&snapshot);
        assert_eq!(machine.answer(&["status"])["state"], "paused", "it was paused before");
        before.extend(machine.output());
        machine.answer(&["stop"]);
        machine = Machine::restore(&format!("{name}-{round}"), &snapshot);
        machine.wait_for_lines(5);
        check_sequence(&[&before, &machine.output()]);
        fs::remove_dir_all(&snapshot).expect("removed");
        machine.wait_for_lines(10);
    }
    machine.stop();
}

fn a_restored_guest_goes_on_with_the_next_number() -> Outcome {
    with_kvm(|| {
        let machine = Machine::boot("next", guests::count(), &["-m", "16M"]);
        let snapshot = folder().join("next");
        let response = machine.snapshot(&snapshot);
        assert_eq!((&response["response"], response["memory_bytes"].as_u64()), (&"snapshot".into(), Some(16 << 20)));
        assert!(response["written_bytes"].as_u64().expect("a number") < 1 << 20, "{response}");
        assert_eq!(machine.answer(&["status"])["state"], "running", "it goes on");
        let lines = machine.output().len();
        wait("output after the snapshot", || machine.output().len() > lines + 100);
        check_sequence(&[&machine.output()]);
        assert_eq!(names(&snapshot), ["machine.json", "memory", "state"]);
        let mode = |path: &Path| fs::metadata(path).expect("there").permissions().mode() & 0o777;
        assert_eq!(
            (mode(&snapshot), mode(&snapshot.join("memory")), mode(&snapshot.join("state"))),
            (0o700, 0o600, 0o600)
        );
        let description: serde_json::Value =
            serde_json::from_slice(&fs::read(snapshot.join("machine.json")).expect("readable")).expect("JSON");
        assert_eq!(
            (description["memory_bytes"].as_u64(), &description["uarts"]),
            (Some(16 << 20), &serde_json::json!([1]))
        );
        assert!(!description["cpu_vendor"].as_str().expect("a text").is_empty());
        let memory = fs::read(snapshot.join("memory")).expect("readable");
        // Clones run at the same time, and leave the snapshot as it is. The machine is gone.
        let old = machine.output();
        machine.stop();
        let clones: Vec<_> = (0..3).map(|clone| Machine::restore(&format!("next-clone{clone}"), &snapshot)).collect();
        for clone in &clones {
            clone.wait_for_lines(20);
            let new = clone.output();
            let start = (0..old.len()).find(|at| {
                let tail = &old[*at..];
                tail.iter().zip(&new).all(|(one, other)| one == other) && tail.len().min(new.len()) > 60
            });
            let start = start.expect("the clone goes on somewhere in the machine's own output");
            check_sequence(&[&old[..start], &new]);
        }
        clones.into_iter().for_each(|clone| drop(clone.stop()));
        assert!(fs::read(snapshot.join("memory")).expect("readable") == memory, "memory was not changed");
    })
}

fn twenty_rounds() -> Outcome {
    with_kvm(|| rounds("rounds", &["-m", "16M"], 20))
}

fn two_vcpus() -> Outcome {
    with_kvm(|| rounds("two", &["-m", "32M", "-c", "2"], 3))
}

/// A run and each of its clones have a generation identifier of their own, by which their kernels know to seed their random numbers anew.
fn each_run_has_a_generation_identifier_of_its_own() -> Outcome {
    with_kvm(|| {
        let machine = Machine::boot("generation", guests::generation(), &["-m", "16M"]);
        let last = |machine: &Machine| {
            let output = text(&machine.output());
            let line = output.lines().rev().find(|line| line.len() == 32).expect("a whole line").to_owned();
            assert!(line.bytes().any(|byte| byte != b'0'), "{output}");
            line
        };
        let snapshot = folder().join("generation");
        machine.snapshot(&snapshot);
        let mut all = vec![last(&machine)];
        for clone in 0..3 {
            let clone = Machine::restore(&format!("generation-{clone}"), &snapshot);
            clone.wait_for_lines(5);
            all.push(last(&clone));
            clone.stop();
        }
        machine.stop();
        all.sort();
        all.dedup();
        assert_eq!(all.len(), 4, "{all:?}");
    })
}

fn what_has_no_state_is_refused() -> Outcome {
    with_kvm(|| {
        // Not the test's own folder: hwvmm refuses a control socket in a folder that the guest can write to.
        let shared = folder().join("shared");
        fs::create_dir(&shared).unwrap();
        let share = format!("tag=s,path={}", shared.display());
        let options = ["-m", "32M", "--rng", "--balloon", "--share", &share];
        let machine = Machine::boot("devices", guests::count(), &options);
        let error = machine.refusal(&["snapshot", folder().join("devices").to_str().unwrap()]);
        assert!(error.contains("--share") && !error.contains("--rng"), "{error}");
        assert!(names(folder()).iter().all(|name| !name.starts_with("devices.partial") && name != "devices"));
        machine.stop();
    })
}

fn a_folder_that_exists_is_refused() -> Outcome {
    with_kvm(|| {
        let machine = Machine::boot("exists", guests::count(), &["-m", "16M"]);
        let error = machine.refusal(&["snapshot", folder().to_str().unwrap()]);
        assert!(error.contains("exists: name a folder that does not"), "{error}");
        machine.stop();
    })
}

/// A client that is killed leaves a folder that is no snapshot; the guest goes on, and the next snapshot is whole.
fn a_killed_client_leaves_no_half_snapshot() -> Outcome {
    with_kvm(|| {
        let machine = Machine::boot("killed", guests::count(), &["-m", "1G"]);
        for round in 0..5_u64 {
            let target = folder().join(format!("killed-{round}"));
            let mut client = hwvmm()
                .arg("ctl")
                .arg(&machine.socket)
                .arg("snapshot")
                .arg(&target)
                .stdout(Stdio::null())
                .spawn()
                .unwrap();
            std::thread::sleep(Duration::from_millis(1 + 15 * round));
            client.kill().unwrap();
            client.wait().unwrap();
            if target.exists() {
                Machine::restore(&format!("killed-{round}"), &target).stop();
            }
        }
        let target = folder().join("killed-whole");
        wait("a snapshot", || machine.ctl(&["snapshot", target.to_str().unwrap()]).status.success());
        Machine::restore("killed-whole", &target).stop();
        check_sequence(&[&machine.output()]);
        machine.stop();
    })
}

/// The file system is full: the half snapshot is removed, and the guest goes on.
fn a_full_disk_is_an_error_and_the_guest_goes_on() -> Outcome {
    let small = folder().join("small");
    fs::create_dir(&small).unwrap();
    let mount = Command::new("mount").args(["-t", "tmpfs", "-o", "size=16k", "small"]).arg(&small).output();
    if !mount.is_ok_and(|out| out.status.success()) {
        return Outcome::Skipped("no file system can be mounted here".into());
    }
    let outcome = with_kvm(|| {
        let machine = Machine::boot("full", guests::count(), &["-m", "16M"]);
        let error = machine.refusal(&["snapshot", small.join("full").to_str().unwrap()]);
        assert!(error.contains("cannot write the file") && error.contains("No space left"), "{error}");
        assert!(names(&small).is_empty(), "{:?}", names(&small));
        let before = machine.output().len();
        wait("output after it", || machine.output().len() > before + 100);
        check_sequence(&[&machine.output()]);
        machine.stop();
    });
    let _ = Command::new("umount").arg(&small).status();
    outcome
}

/// The error of a run from a snapshot.
fn error_of(snapshot: &Path, options: &[&str]) -> (Option<i32>, String) {
    let out = hwvmm().args(["run", "--timeout", "20s"]).args(options).arg("--from").arg(snapshot).output().unwrap();
    (out.status.code(), text(&out.stderr))
}

fn hostile_snapshots_are_refused() -> Outcome {
    with_kvm(|| {
        let machine = Machine::boot("hostile", guests::count(), &["-m", "16M"]);
        let snapshot = folder().join("hostile");
        machine.snapshot(&snapshot);
        machine.stop();
        let expect = |words: &[&str]| {
            let (status, error) = error_of(&snapshot, &[]);
            assert!(status == Some(42) && words.iter().all(|word| error.contains(word)), "{status:?} {error}");
        };
        let [description, state, memory] = ["machine.json", "state", "memory"].map(|name| snapshot.join(name));
        let whole = [&description, &state, &memory].map(|path| fs::read(path).unwrap());
        fs::write(&memory, &whole[2][4096..]).unwrap();
        expect(&["its memory has", "16777216"]);
        fs::write(&memory, &whole[2]).unwrap();
        let mut changed = whole[1].clone();
        *changed.last_mut().unwrap() ^= 1;
        fs::write(&state, &changed).unwrap();
        expect(&["checksum"]);
        fs::write(&state, &whole[1][..100]).unwrap();
        expect(&["it is not whole"]);
        fs::write(&state, "").unwrap();
        expect(&["it is no state of hwvmm"]);
        fs::write(&state, &whole[1]).unwrap();
        let json = text(&whole[0]);
        fs::write(&description, json.replace("\"watchdog\": false", "\"watchdog\": true")).unwrap();
        expect(&["machine.json: it is of another machine than the state"]);
        fs::write(&description, json.replace("\"state_version\": ", "\"state_version\": 9")).unwrap();
        expect(&["version 9", "reads version"]);
        fs::write(&description, json.replace(": 16777216", ": 18446744073709547520")).unwrap();
        expect(&["its size of memory is none"]);
        fs::write(&description, "x".repeat(100_000)).unwrap();
        expect(&["too long"]);
        fs::write(&description, &whole[0]).unwrap();
        fs::set_permissions(&memory, fs::Permissions::from_mode(0o622)).unwrap();
        expect(&["not safe to use: memory"]);
        fs::set_permissions(&memory, fs::Permissions::from_mode(0o600)).unwrap();
        fs::remove_file(&state).unwrap();
        std::os::unix::fs::symlink("/dev/zero", &state).unwrap();
        expect(&["cannot read the snapshot", "state"]);
        fs::remove_file(&state).unwrap();
        assert!(Command::new("mkfifo").args(["-m", "600"]).arg(&state).status().unwrap().success());
        expect(&["not safe to use: state"]);
        fs::remove_file(&state).unwrap();
        fs::write(&state, &whole[1]).unwrap();
        for (options, word) in
            [(["-m", "32M"], "--memory (-m)"), (["-c", "2"], "--cpus (-c)"), (["--rng", "--stats"], "--rng")]
        {
            let (status, error) = error_of(&snapshot, &options);
            assert!(status == Some(2) && error.contains(word) && error.contains("--from"), "{status:?} {error}");
        }
        // Whole again.
        Machine::restore("hostile-whole", &snapshot).stop();
    })
}

/// Restoring takes no copy of the memory: 256 MiB within 10 ms of processor time, from the start of hwvmm to the guest's first
/// instruction.
fn a_restore_is_quick() -> Outcome {
    with_kvm(|| {
        let machine = Machine::boot("quick", guests::count(), &["-m", "256M"]);
        let snapshot = folder().join("quick");
        machine.snapshot(&snapshot);
        machine.stop();
        let times = (0..5).map(|round| {
            let machine =
                Machine::start(&format!("quick-{round}"), &[Path::new("--from"), &snapshot], &["--stats=json"]);
            machine.wait_for_lines(2);
            let errors = machine.stop();
            let json = errors.lines().find(|line| line.starts_with('{')).expect("statistics");
            let stats: serde_json::Value = serde_json::from_str(json).expect("JSON");
            stats["startup_cpu_ns"].as_u64().expect("a time")
        });
        let least = times.min().expect("five");
        println!("restore to the first instruction: {:.2} ms of processor time", least as f64 / 1e6);
        // A build without optimization takes some more.
        let limit = if cfg!(debug_assertions) { 60_000_000 } else { 10_000_000 };
        assert!(least <= limit, "{least} ns");
    })
}

const TESTS: &[Test] = &[
    ("a_restored_guest_goes_on_with_the_next_number", a_restored_guest_goes_on_with_the_next_number),
    ("twenty_rounds", twenty_rounds),
    ("two_vcpus", two_vcpus),
    ("each_run_has_a_generation_identifier_of_its_own", each_run_has_a_generation_identifier_of_its_own),
    ("a_disk_loses_nothing_and_writes_nothing_twice", disks::a_disk_loses_nothing_and_writes_nothing_twice),
    ("disks_that_do_not_fit_are_refused", disks::disks_that_do_not_fit_are_refused),
    ("a_guest_that_does_not_get_ready_makes_no_template", template::a_guest_that_does_not_get_ready_makes_no_template),
    ("commands_are_for_guests_that_wait_for_one", template::commands_are_for_guests_that_wait_for_one),
    ("sockets_are_connected_anew", sockets::sockets_are_connected_anew),
    ("shares_are_given_again", sockets::shares_are_given_again),
    ("what_has_no_state_is_refused", what_has_no_state_is_refused),
    ("a_folder_that_exists_is_refused", a_folder_that_exists_is_refused),
    ("a_killed_client_leaves_no_half_snapshot", a_killed_client_leaves_no_half_snapshot),
    ("a_full_disk_is_an_error_and_the_guest_goes_on", a_full_disk_is_an_error_and_the_guest_goes_on),
    ("hostile_snapshots_are_refused", hostile_snapshots_are_refused),
    ("a_restore_is_quick", a_restore_is_quick),
    ("a_run_saves_itself_at_a_mark_or_a_line", at::a_run_saves_itself_at_a_mark_or_a_line),
    ("a_run_that_cannot_save_itself_says_why", at::a_run_that_cannot_save_itself_says_why),
    ("twenty_clones_go_on_at_once", clones::twenty_clones_go_on_at_once),
    ("clones_say_how_they_ended", clones::clones_say_how_they_ended),
    ("what_clones_cannot_have_is_said_once", clones::what_clones_cannot_have_is_said_once),
    ("clones_end_with_their_parent", clones::clones_end_with_their_parent),
    ("the_pages_of_a_run_are_ready_in_the_next", working_set::the_pages_of_a_run_are_ready_in_the_next),
    ("a_working_set_that_cannot_be_used_is_not", working_set::a_working_set_that_cannot_be_used_is_not),
];

fn main() -> ExitCode {
    harness::run("snapshot", TESTS)
}
