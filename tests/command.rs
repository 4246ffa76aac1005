//! Tests of the command `hwvmm`: how runs end, exit statuses, input and output, bad input. The guests are tiny multiboot
//! programs, so that these tests run wherever KVM runs flat 32-bit code.

#![allow(clippy::unwrap_used, reason = "a test may fail where it stands")]

#[path = "command/confined.rs"]
mod confined;
#[path = "command/expect.rs"]
mod expect;
#[path = "harness/fat.rs"]
mod fat;
mod guests;
mod harness;
#[path = "command/hostile.rs"]
mod hostile;
#[path = "command/images.rs"]
mod images;
#[path = "command/inherited.rs"]
mod inherited;
#[path = "command/input.rs"]
mod input;
#[path = "command/messages.rs"]
mod messages;
#[path = "command/one_command.rs"]
mod one_command;
#[path = "command/output.rs"]
mod output;
#[path = "command/parser.rs"]
mod parser;
#[path = "command/paths.rs"]
mod paths;
#[path = "command/process.rs"]
mod process;
#[path = "command/refused.rs"]
mod refused;
#[path = "command/restart.rs"]
mod restart;
#[path = "command/results.rs"]
mod results;
#[path = "command/shares.rs"]
mod shares;

use harness::{Outcome, Test, folder, hwvmm, text};
use std::collections::BTreeSet;
use std::fs;
use std::io::{Read, Write};
use std::path::PathBuf;
use std::process::{Child, Command, ExitCode, Output, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

fn file(name: &str, content: &[u8]) -> PathBuf {
    let path = folder().join(name);
    fs::write(&path, content).expect("written");
    path
}

fn kernel(name: &str, code: &[u8]) -> PathBuf {
    file(&format!("{name}.elf"), &guests::multiboot(code))
}

/// Runs a tiny guest once, to find out if this host's KVM can. The error is what hwvmm printed.
fn can_run() -> Result<(), String> {
    static PROBE: OnceLock<Result<(), String>> = OnceLock::new();
    PROBE
        .get_or_init(|| {
            let path = kernel("probe", guests::power_off());
            let out = hwvmm().args(["run", "--timeout", "10s", "-m", "16M"]).arg(path).output().expect("started");
            if out.status.code() == Some(0) { Ok(()) } else { Err(text(&out.stderr)) }
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

fn run(name: &str, code: &[u8], options: &[&str]) -> Output {
    let path = kernel(name, code);
    hwvmm().args(["run", "-m", "16M", "--timeout", "20s"]).args(options).arg(path).output().expect("started")
}

/// Runs a guest with `options`, and checks the exit status and that stderr contains `words`.
fn ends(name: &str, code: &'static [u8], options: &[&str], status: i32, words: &str) -> Outcome {
    when_it_runs(|| {
        let out = run(name, code, options);
        let errors = text(&out.stderr);
        assert_eq!(out.status.code(), Some(status), "{errors}");
        assert!(errors.contains(words), "{errors}");
        let unclean = matches!(status, 33..=37 | 124);
        assert_eq!(errors.contains("userspace exits of vCPU 0"), unclean, "{errors}");
    })
}

fn statistics_count_every_exit() -> Outcome {
    when_it_runs(|| {
        let stats = folder().join("stats.json");
        let path = stats.to_str().expect("UTF-8");
        // Coalesced writes are no exits of their own: both together make the count.
        let out = run("hello", guests::power_off(), &["--stats-out", path]);
        assert_eq!(text(&out.stdout), "hello\n");
        let json: serde_json::Value = serde_json::from_slice(&fs::read(&stats).expect("written")).expect("JSON");
        let (exits, coalesced) = (json["userspace_exits"]["total"].as_u64(), json["coalesced_writes"].as_u64());
        assert_eq!(exits.zip(coalesced).map(|(exits, coalesced)| exits + coalesced), Some(7), "{json}");
        let out = run("hello", guests::power_off(), &["--stats-out", path, "--tune", "coalesced-io=off"]);
        assert_eq!(text(&out.stdout), "hello\n");
        let json: serde_json::Value = serde_json::from_slice(&fs::read(&stats).expect("written")).expect("JSON");
        let exits = &json["userspace_exits"];
        assert_eq!((json["schema"].as_u64(), json["status"].as_u64()), (Some(1), Some(0)));
        assert_eq!(exits["total"], 7, "six characters and the end: {json}");
        assert_eq!(exits["by_reason"]["pio_out"]["count"], 7);
        assert_eq!(exits["by_device"][0]["device"], "UART 1");
        assert_eq!(exits["by_device"][0]["writes"], 6);
    })
}

fn a_multiboot_kernel_gets_command_line_and_modules() -> Outcome {
    when_it_runs(|| {
        let module = file("module.txt", b"from-the-module\0");
        let out =
            run("show", guests::show_boot(), &["-p", "a=1", "--append", "b", "--module", module.to_str().unwrap()]);
        let said = text(&out.stdout);
        assert!(said.ends_with("show.elf a=1 b from-the-module\n"), "{said}");
        let out = run("show", guests::show_boot(), &["--append", "b c", "--module", module.to_str().unwrap()]);
        assert!(text(&out.stdout).ends_with("show.elf b c from-the-module\n"), "no parameters of Linux'");
        let out = run("show", guests::show_boot(), &["-p", "", "-i", module.to_str().unwrap()]);
        assert!(text(&out.stdout).ends_with("show.elf from-the-module\n"));
    })
}

/// A guest that reads every port and every 64 KiB of memory finds the machine's devices and no others.
fn unmapped_addresses_read_as_all_ones() -> Outcome {
    when_it_runs(|| {
        let answers = |extra: &[&str]| {
            let out = run("reach", guests::reach(), &[&["-m", "32M", "--tune", "coalesced-io=off"], extra].concat());
            assert_eq!(out.status.code(), Some(32), "{}", text(&out.stderr));
            // The first register of the local APIC is reserved; its value depends on KVM.
            let said = text(&out.stdout);
            said.split_whitespace().map(str::to_owned).filter(|at| at != "FEE00000").collect::<BTreeSet<_>>()
        };
        let range = |ports: std::ops::RangeInclusive<u32>| ports.map(|port| format!("{port:08X}"));
        // PICs in KVM, keyboard controller, POST code, UART, pvpanic, ACPI, I/O APIC in KVM.
        let single = [0x20, 0x21, 0x60, 0x64, 0x80, 0xa0, 0xa1, 0x4d0, 0x4d1, 0x505, 0xfec0_0000];
        let mut there: BTreeSet<String> = single.into_iter().flat_map(|at| range(at..=at)).collect();
        there.extend(range(0x3f8..=0x3ff).chain(range(0x600..=0x602)));
        assert_eq!(answers(&[]), there);
        for ports in [0xe0..=0xeb, 0xf4..=0xf7, 0x510..=0x511, 0x2000..=0x2017, 0xff00_0000..=0xff00_0000] {
            there.extend(range(ports));
        }
        assert_eq!(answers(&["--testdev", "--debug-exit"]), there);
    })
}

fn memory_beyond_the_hole_is_in_the_memory_map() -> Outcome {
    when_it_runs(|| {
        let map = |memory| text(&run("map", guests::memory_map(), &["-m", memory]).stdout);
        assert_eq!(map("16M"), "1212\n");
        assert_eq!(map("5G"), "12121\n");
    })
}

fn device_errors_name_the_cause() -> Outcome {
    when_it_runs(|| {
        let folder = tempfile::tempdir().expect("a folder");
        let odd = folder.path().join("odd");
        fs::write(&odd, [0; 1000]).expect("written");
        let (odd, none) = (odd.display().to_string(), folder.path().join("none").display().to_string());
        for (option, value, words) in [
            ("--disk", none.clone(), "(check the path; `truncate -s 1G FILE` makes an empty disk): No such file"),
            ("--disk", folder.path().display().to_string(), "(a disk is a file or a block device): Is a directory"),
            ("--disk", format!("{},readonly=on", folder.path().display()), "neither a file nor a block device"),
            ("--disk", odd.clone(), "truncate"),
            ("--disk", "/dev/null".into(), "neither a file nor a block device"),
            ("--disk", format!("{odd},format=qcow2"), "qcow2 image"),
            ("--disk", format!("{odd},cache=none"), "the keys are"),
            ("--share", format!("tag=x,path={none}"), "cannot share"),
            ("--share", format!("tag=x,path={odd}"), "not a directory"),
            ("--vsock", "cid=2,uds=/tmp/x".into(), "cid: '2' is not a whole number from 3"),
            ("--vsock", format!("cid=3,uds={none}/deeper"), "cannot listen"),
            ("--net", "tap=a/b".into(), "a/b"),
            ("--net", "bridge".into(), "tap=NAME"),
            ("--console", "vga".into(), "not a console"),
            ("--api", format!("{none}/deeper"), "control socket"),
        ] {
            let out = run("devices", guests::power_off(), &[option, &value]);
            let said = text(&out.stderr);
            assert!(!out.status.success() && said.contains(words), "{option} {value}: {said}");
        }
    })
}

fn a_disk_has_at_most_one_writer() -> Outcome {
    when_it_runs(|| {
        let folder = tempfile::tempdir().expect("a folder");
        let disk = folder.path().join("disk");
        fs::write(&disk, [0; 4096]).expect("written");
        let disk = disk.to_str().expect("UTF-8");
        let out = run("disks", guests::power_off(), &["--disk", disk, "--disk", disk]);
        assert!(text(&out.stderr).contains("is in use: another process writes to it"), "{}", text(&out.stderr));
        let shared = format!("{disk},readonly=on");
        let out = run("disks", guests::power_off(), &["--disk", &shared, "--disk", &shared]);
        assert!(out.status.success(), "{}", text(&out.stderr));
    })
}

fn messages_start_on_a_fresh_line() -> Outcome {
    when_it_runs(|| {
        let path = kernel("prompt", guests::prompt());
        let command = "exec \"$0\" run -m 16M --timeout 20s --expect 'login: ' \"$1\"";
        let sh = |redirection: &str| {
            let mut sh = Command::new("sh");
            sh.args(["-c", &format!("{command} {redirection}")]).arg(hwvmm().get_program()).arg(&path);
            sh.stdin(Stdio::null()).env("HOME", folder()).output().expect("started")
        };
        let out = sh("2>&1");
        assert_eq!(out.status.code(), Some(0));
        assert!(text(&out.stdout).starts_with("login: \nhwvmm: seen: login: "), "{}", text(&out.stdout));
        // With stdout and stderr apart, each has only its own bytes.
        let out = sh("");
        assert_eq!(text(&out.stdout), "login: ");
        assert!(text(&out.stderr).starts_with("hwvmm: seen: login: "), "{}", text(&out.stderr));
    })
}

fn spawn(code: &[u8], options: &[&str]) -> Child {
    start(code, options, Stdio::null())
}

/// Starts a guest with an hwvmm whose stdout and stderr are pipes.
fn start(code: &[u8], options: &[&str], stdin: Stdio) -> Child {
    // Each machine has a kernel file of its own, so that none reads a file that is being written for the next.
    static NUMBER: AtomicUsize = AtomicUsize::new(0);
    let path = kernel(&format!("spawned{}", NUMBER.fetch_add(1, Ordering::Relaxed)), code);
    hwvmm()
        .args(["run", "-m", "16M", "--timeout", "30s"])
        .args(options)
        .arg(path)
        .stdin(stdin)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("started")
}

/// Runs a guest that gets `input` on its stdin.
fn run_with_input(code: &[u8], options: &[&str], input: Vec<u8>) -> Output {
    let mut child = start(code, options, Stdio::piped());
    let mut stdin = child.stdin.take().expect("stdin");
    let writer = std::thread::spawn(move || stdin.write_all(&input));
    let out = child.wait_with_output().expect("ended");
    writer.join().expect("no panic").expect("all was taken");
    out
}

fn a_slow_reader_gets_every_byte() -> Outcome {
    when_it_runs(|| {
        let mut child = spawn(guests::flood(), &[]);
        std::thread::sleep(Duration::from_millis(500));
        let mut said = Vec::new();
        child.stdout.take().expect("stdout").read_to_end(&mut said).expect("read");
        assert_eq!(child.wait().expect("ended").code(), Some(0));
        assert_eq!(said.len(), 200_000);
        assert!(said.chunks(50).all(|line| line == b"0123456789012345678901234567890123456789012345678\n"));
    })
}

fn the_timeout_ends_a_run_whose_output_is_not_read() -> Outcome {
    when_it_runs(|| {
        let start = Instant::now();
        let mut child = spawn(guests::flood(), &["--timeout", "1s"]);
        let unread = child.stdout.take();
        assert_eq!(child.wait().expect("ended").code(), Some(124));
        assert!(start.elapsed() < Duration::from_secs(10));
        drop(unread);
    })
}

fn a_full_disk_is_reported() -> Outcome {
    when_it_runs(|| {
        let path = kernel("full", guests::spin());
        let full = fs::File::options().write(true).open("/dev/full").expect("/dev/full");
        let out = hwvmm().args(["run", "-m", "16M", "--timeout", "20s"]).arg(path).stdout(full).output().expect("ran");
        assert_eq!(out.status.code(), Some(42), "{}", text(&out.stderr));
        assert!(text(&out.stderr).contains("No space left"), "{}", text(&out.stderr));
        let out = run("full2", guests::power_off(), &["--stats-out", "/dev/full"]);
        assert_eq!(out.status.code(), Some(42));
        assert!(text(&out.stderr).contains("cannot write the statistics"));
        // The profile and the budget are not lost with the statistics.
        let folder = tempfile::tempdir().expect("a temporary folder");
        let profile = folder.path().join("profile.json");
        let more = ["--stats-out", "/dev/full", "--budget", "userspace=0", "--profile-out"];
        let out = run("full3", guests::power_off(), &[&more[..], &[profile.to_str().expect("UTF-8")]].concat());
        assert_eq!(out.status.code(), Some(42), "{}", text(&out.stderr));
        assert!(text(&out.stderr).contains("budget userspace: "), "{}", text(&out.stderr));
        assert!(fs::read_to_string(profile).expect("written").contains("hwvmm-profile"));
        // What cannot be written is said before the guest runs.
        for option in ["--stats-out", "--profile-out"] {
            let out = run("nowhere", guests::power_off(), &[option, "/no/such/folder/file"]);
            assert_eq!(out.status.code(), Some(2), "{}", text(&out.stderr));
            assert!(out.stdout.is_empty() && text(&out.stderr).contains("cannot write /no/such/folder/file"));
        }
    })
}

/// Sends SIGTERM to the process.
fn terminate(child: &Child) {
    let pid = rustix::process::Pid::from_child(child);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).expect("SIGTERM sent");
}

fn sigterm_ends_the_run_and_prints_statistics() -> Outcome {
    when_it_runs(|| {
        let mut child = spawn(guests::spin(), &["--stats"]);
        let mut first = [0; 6];
        child.stdout.as_mut().expect("stdout").read_exact(&mut first).expect("hello");
        terminate(&child);
        let out = child.wait_with_output().expect("ended");
        assert_eq!(out.status.code(), Some(128 + 15), "{}", text(&out.stderr));
        assert!(text(&out.stderr).contains("ended by SIGTERM") && text(&out.stderr).contains("userspace exits:"));
    })
}

fn a_closed_stdin_is_accepted() -> Outcome {
    when_it_runs(|| {
        let path = kernel("closed", guests::power_off());
        let line =
            format!("exec '{}' run -m 16M --timeout 20s '{}' <&-", hwvmm().get_program().display(), path.display());
        let out = Command::new("sh").args(["-c", &line]).output().expect("sh");
        assert_eq!((out.status.code(), text(&out.stdout).as_str()), (Some(0), "hello\n"), "{}", text(&out.stderr));
    })
}

fn flags_override_the_configuration_file() -> Outcome {
    when_it_runs(|| {
        let path = kernel("toml", guests::debug_exit());
        let disk = file("toml.img", &[0; 512]);
        let disk = disk.display();
        let toml = format!(
            "kernel = '{}'\nmemory = '16M'\ncpus = 1\ndebug-exit = true\ntimeout = '20s'\n[[disk]]\npath = '{disk}'\nreadonly = true\n",
            path.display()
        );
        let config = file("vm.toml", toml.as_bytes());
        let status = |extra: &[&str]| {
            hwvmm().args(["run", "--config"]).arg(&config).args(extra).output().expect("started").status.code()
        };
        assert_eq!(status(&[]), Some(77));
        assert_eq!(status(&["--debug-exit=false", "--timeout", "1s"]), Some(124), "flags win");
    })
}

/// The terminal is in raw mode while the guest runs, and as before afterwards, when Ctrl-A x or SIGTERM ends the run.
fn terminal_settings_are_restored() -> Outcome {
    use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
    use rustix::termios::{LocalModes, tcgetattr};
    when_it_runs(|| {
        for by_key in [true, false] {
            let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).expect("a terminal");
            grantpt(&master).and_then(|()| unlockpt(&master)).expect("unlocked");
            let name = ptsname(&master, Vec::new()).expect("its name").into_string().expect("UTF-8");
            let slave = fs::File::options().read(true).write(true).open(name).expect("its other side");
            let before = tcgetattr(&slave).expect("a terminal");
            assert!(before.local_modes.contains(LocalModes::ICANON | LocalModes::ECHO));
            let mut child = hwvmm()
                .args(["run", "-m", "16M", "--timeout", "30s"])
                .arg(kernel("terminal", guests::spin()))
                .stdin(slave.try_clone().expect("cloned"))
                .stdout(Stdio::piped())
                .stderr(Stdio::piped())
                .spawn()
                .expect("started");
            child.stdout.as_mut().expect("stdout").read_exact(&mut [0; 6]).expect("hello");
            let during = tcgetattr(&slave).expect("a terminal");
            assert!(!during.local_modes.intersects(LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG));
            if by_key {
                rustix::io::write(&master, b"\x01x").expect("typed");
            } else {
                terminate(&child);
            }
            let out = child.wait_with_output().expect("ended");
            let status = if by_key { 130 } else { 143 };
            assert_eq!(out.status.code(), Some(status), "{}", text(&out.stderr));
            let after = tcgetattr(&slave).expect("a terminal");
            assert_eq!(after.local_modes, before.local_modes);
            assert_eq!((after.input_modes, after.output_modes), (before.input_modes, before.output_modes));
        }
    })
}

fn a_machine_has_64_vcpus() -> Outcome {
    when_it_runs(|| {
        let out = run("many", guests::power_off(), &["-c", "64,sockets=2,cores=16,threads=2", "--stats"]);
        assert_eq!(out.status.code(), Some(0), "{}", text(&out.stderr));
        assert_eq!(text(&out.stdout), "hello\n");
        let out = run("many", guests::halt(), &["-c", "64"]);
        assert_eq!(out.status.code(), Some(35), "halted, though 63 never started: {}", text(&out.stderr));
    })
}

fn two_machines_run_at_once() -> Outcome {
    when_it_runs(|| {
        let mut children = [spawn(guests::power_off(), &[]), spawn(guests::power_off(), &[])];
        for child in &mut children {
            assert_eq!(child.wait().expect("ended").code(), Some(0));
        }
    })
}

fn help_completions_and_manual_pages_are_printed() -> Outcome {
    let said = |arguments: &[&str]| {
        let out = hwvmm().args(arguments).output().expect("started");
        assert!(out.status.success(), "{arguments:?}: {}", text(&out.stderr));
        text(&out.stdout)
    };
    let help = said(&["run", "--help"]);
    assert!(help.contains("Examples:") && help.contains("Exit status:") && help.contains("panic=-1"));
    for shell in ["bash", "zsh", "fish"] {
        assert!(said(&["completions", shell]).contains("kernel-cache"), "{shell}");
    }
    assert!(said(&["man", "run"]).contains(".TH hwvmm-run"));
    Outcome::Passed
}

fn doctor_reports_the_same_in_json_and_status() -> Outcome {
    let out = hwvmm().args(["doctor", "--json"]).output().expect("started");
    let json: serde_json::Value = serde_json::from_slice(&out.stdout).expect("JSON");
    assert_eq!(json["can_run_linux"].as_bool(), Some(out.status.code() == Some(0)));
    let out = hwvmm().args(["doctor", "--kvm", "/no/such/kvm"]).output().expect("started");
    assert_eq!(out.status.code(), Some(1));
    assert!(text(&out.stdout).contains("fix:"));
    Outcome::Passed
}

const TESTS: &[Test] = &[
    ("power_off_is_0", || ends("off", guests::power_off(), &[], 0, "powered off (vCPU 0, rip 0x")),
    ("reset_is_32", || ends("reset", guests::reset(), &[], 32, "reset itself")),
    ("reset_by_keyboard_controller_is_32", || ends("i8042", guests::reset_i8042(), &[], 32, "reset itself")),
    ("triple_fault_is_33", || ends("triple", guests::triple_fault(), &[], 33, "triple fault")),
    ("pvpanic_is_34", || ends("pvpanic", guests::pvpanic(), &[], 34, "panicked")),
    ("halt_for_good_is_35", || ends("halt", guests::halt(), &[], 35, "interrupts off")),
    ("an_expired_watchdog_is_36", || ends("dog", guests::expired_watchdog(), &["--watchdog"], 36, "watchdog ran out")),
    ("timeout_is_124", || ends("spin", guests::spin(), &["--timeout", "500ms"], 124, "timed out after 0.5 s")),
    ("debug_exit_chooses_the_status", || ends("debug", guests::debug_exit(), &["--debug-exit"], 77, "status 77")),
    ("statistics_count_every_exit", statistics_count_every_exit),
    ("a_multiboot_kernel_gets_command_line_and_modules", a_multiboot_kernel_gets_command_line_and_modules),
    ("unmapped_addresses_read_as_all_ones", unmapped_addresses_read_as_all_ones),
    ("memory_beyond_the_hole_is_in_the_memory_map", memory_beyond_the_hole_is_in_the_memory_map),
    ("device_errors_name_the_cause", device_errors_name_the_cause),
    ("a_disk_has_at_most_one_writer", a_disk_has_at_most_one_writer),
    ("messages_start_on_a_fresh_line", messages_start_on_a_fresh_line),
    ("a_slow_reader_gets_every_byte", a_slow_reader_gets_every_byte),
    ("the_timeout_ends_a_run_whose_output_is_not_read", the_timeout_ends_a_run_whose_output_is_not_read),
    ("a_full_disk_is_reported", a_full_disk_is_reported),
    ("sigterm_ends_the_run_and_prints_statistics", sigterm_ends_the_run_and_prints_statistics),
    ("a_closed_stdin_is_accepted", a_closed_stdin_is_accepted),
    ("flags_override_the_configuration_file", flags_override_the_configuration_file),
    ("terminal_settings_are_restored", terminal_settings_are_restored),
    ("a_machine_has_64_vcpus", a_machine_has_64_vcpus),
    ("two_machines_run_at_once", two_machines_run_at_once),
    ("help_completions_and_manual_pages_are_printed", help_completions_and_manual_pages_are_printed),
    ("doctor_reports_the_same_in_json_and_status", doctor_reports_the_same_in_json_and_status),
];

fn main() -> ExitCode {
    let all = [
        TESTS,
        confined::TESTS,
        expect::TESTS,
        hostile::TESTS,
        images::TESTS,
        inherited::TESTS,
        input::TESTS,
        one_command::TESTS,
        output::TESTS,
        parser::TESTS,
        paths::TESTS,
        process::TESTS,
        refused::TESTS,
        restart::TESTS,
        results::TESTS,
        shares::TESTS,
        messages::TESTS,
    ];
    harness::run("command", &all.concat())
}
