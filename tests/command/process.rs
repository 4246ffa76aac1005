//! The machine runs in a process of its own: what becomes of a run when that process crashes or does not end.

use super::harness::{Outcome, Test};
use super::{folder, guests, hwvmm, kernel, terminate, text, when_it_runs};
use rustix::process::{Pid, Signal, kill_process};
use std::fs;
use std::io::Read;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// A guest that has printed "hello", and spins.
pub(crate) struct Spinning {
    pub(crate) parent: Child,
    pub(crate) machine: Pid,
}

/// The only child process of `parent`.
pub(crate) fn child_of(parent: &Child) -> Pid {
    let path = format!("/proc/{0}/task/{0}/children", parent.id());
    let children = fs::read_to_string(path).expect("the parent runs");
    let pids: Vec<i32> = children.split_whitespace().map(|pid| pid.parse().expect("a process ID")).collect();
    assert_eq!(pids.len(), 1, "{children}");
    Pid::from_raw(pids[0]).expect("a process ID")
}

/// Starts a guest, and waits until it has printed "hello".
pub(crate) fn spin(name: &str, options: &[&str]) -> Spinning {
    // A test under nohup, or in the background of a shell, has signals ignored, which hwvmm would leave so.
    let mut parent = Command::new("env")
        .arg("--default-signal")
        .arg(hwvmm().get_program())
        .args(["run", "-m", "16M", "--tune", "coalesced-io=off"])
        .args(options)
        .arg(kernel(name, guests::spin()))
        .env("HOME", folder())
        .env_remove("XDG_CACHE_HOME")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("started");
    parent.stdout.as_mut().expect("stdout").read_exact(&mut [0; 6]).expect("hello");
    let machine = child_of(&parent);
    Spinning { parent, machine }
}

fn a_crash_of_the_machine_is_40_and_shows_the_last_exits() -> Outcome {
    when_it_runs(|| {
        for (signal, name) in [(Signal::ABORT, "SIGABRT"), (Signal::SYS, "SIGSYS"), (Signal::KILL, "SIGKILL")] {
            let socket = folder().join(format!("crash-{name}.sock"));
            let guest = spin("crash", &["--timeout", "20s", "--stats", "--api", socket.to_str().expect("UTF-8")]);
            assert!(socket.exists());
            kill_process(guest.machine, signal).expect("sent");
            let out = guest.parent.wait_with_output().expect("ended");
            let errors = text(&out.stderr);
            assert_eq!(out.status.code(), Some(40), "{errors}");
            assert!(errors.contains(&format!(", {name})")), "{errors}");
            assert!(errors.contains("pio_out        0x3f8 size 1 data 0x68"), "{errors}");
            assert!(errors.contains("userspace exits:"), "statistics of what is known: {errors}");
            assert!(!socket.exists(), "the control socket is removed");
        }
    })
}

fn a_machine_that_does_not_end_is_killed() -> Outcome {
    when_it_runs(|| {
        let guest = spin("stuck", &["--timeout", "1s"]);
        let start = Instant::now();
        kill_process(guest.machine, Signal::STOP).expect("sent");
        let out = guest.parent.wait_with_output().expect("ended");
        let errors = text(&out.stderr);
        assert_eq!(out.status.code(), Some(124), "{errors}");
        assert!(errors.contains("killed: it did not end within 2 s"), "{errors}");
        assert!(errors.contains("pio_out        0x3f8 size 1 data 0x68"), "{errors}");
        assert!(start.elapsed() < Duration::from_secs(10), "{:?}", start.elapsed());
    })
}

/// The sockets that a process has open, but for its standard streams.
fn sockets(pid: u32) -> Vec<String> {
    let files = fs::read_dir(format!("/proc/{pid}/fd")).expect("the process runs");
    let named = files.flatten().filter(|file| !matches!(file.file_name().to_str(), Some("0" | "1" | "2")));
    let links = named.filter_map(|file| Some(fs::read_link(file.path()).ok()?.to_string_lossy().into_owned()));
    links.filter(|link| link.starts_with("socket:")).collect()
}

/// What one process does to a shared socket (its mode, its data) is done to the other's, too.
fn both_processes_share_no_socket() -> Outcome {
    when_it_runs(|| {
        let vsock = format!("cid=3,uds={}", folder().join("sockets-vsock").display());
        let guest = spin("sockets", &["--timeout", "20s", "--vsock", &vsock]);
        let machine = u32::try_from(guest.machine.as_raw_nonzero().get()).expect("a process ID");
        let (parent, child) = (sockets(guest.parent.id()), sockets(machine));
        assert!(parent.len() >= 5 && child.len() >= 4, "{parent:?} {child:?}");
        assert!(!child.iter().any(|socket| parent.contains(socket)), "{parent:?} {child:?}");
        terminate(&guest.parent);
        assert_eq!(guest.parent.wait_with_output().expect("ended").status.code(), Some(128 + 15));
    })
}

/// The shell gets its terminal back as it was, without what was typed for the guest, whatever the machine's process did to it.
fn a_crash_leaves_the_terminal_as_it_was() -> Outcome {
    use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
    use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
    use rustix::termios::{LocalModes, tcgetattr};
    when_it_runs(|| {
        for signal in [Signal::KILL, Signal::TERM] {
            let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).expect("a terminal");
            grantpt(&master).and_then(|()| unlockpt(&master)).expect("unlocked");
            let name = ptsname(&master, Vec::new()).expect("its name").into_string().expect("UTF-8");
            let terminal = fs::File::options().read(true).write(true).open(name).expect("its other side");
            let before = fcntl_getfl(&terminal).expect("flags");
            let mut parent = hwvmm()
                .args(["run", "-m", "16M", "--timeout", "30s"])
                .arg(kernel("tty", guests::spin()))
                .stdin(terminal.try_clone().expect("cloned"))
                .stdout(Stdio::piped())
                .stderr(Stdio::piped())
                .spawn()
                .expect("started");
            parent.stdout.as_mut().expect("stdout").read_exact(&mut [0; 6]).expect("hello");
            let machine = child_of(&parent);
            assert!(!tcgetattr(&terminal).expect("a terminal").local_modes.contains(LocalModes::ICANON));
            // As the machine's process could: the flags are those of the open file, which all share.
            fcntl_setfl(&terminal, before | OFlags::NONBLOCK).expect("set");
            if signal == Signal::KILL {
                kill_process(machine, Signal::STOP).expect("sent");
                rustix::io::write(&master, b"rm -rf /tmp/x\n").expect("typed");
                kill_process(machine, signal).expect("sent");
            } else {
                terminate(&parent);
            }
            let out = parent.wait_with_output().expect("ended");
            let status = if signal == Signal::KILL { 40 } else { 128 + 15 };
            assert_eq!(out.status.code(), Some(status), "{}", text(&out.stderr));
            assert!(
                tcgetattr(&terminal).expect("a terminal").local_modes.contains(LocalModes::ICANON | LocalModes::ECHO)
            );
            assert_eq!(fcntl_getfl(&terminal).expect("flags"), before, "{signal:?}");
            fcntl_setfl(&terminal, before | OFlags::NONBLOCK).expect("set");
            let typed = rustix::io::read(&terminal, &mut [0; 64]);
            assert_eq!(typed, Err(rustix::io::Errno::AGAIN), "{signal:?}: what was typed is gone");
        }
    })
}

fn a_signal_ends_a_machine_that_does_not_listen() -> Outcome {
    when_it_runs(|| {
        let guest = spin("deaf", &["--timeout", "60s"]);
        kill_process(guest.machine, Signal::STOP).expect("sent");
        terminate(&guest.parent);
        let out = guest.parent.wait_with_output().expect("ended");
        assert_eq!(out.status.code(), Some(128 + 15), "{}", text(&out.stderr));
    })
}

fn the_machine_does_not_outlive_its_parent() -> Outcome {
    when_it_runs(|| {
        let mut guest = spin("orphan", &["--timeout", "60s"]);
        guest.parent.kill().expect("killed");
        guest.parent.wait().expect("ended");
        let state = format!("/proc/{}/stat", guest.machine.as_raw_nonzero());
        let gone = || fs::read_to_string(&state).map_or(true, |stat| stat.contains(") Z "));
        let deadline = Instant::now() + Duration::from_secs(5);
        while !gone() {
            assert!(Instant::now() < deadline, "the machine's process runs on");
            std::thread::sleep(Duration::from_millis(10));
        }
    })
}

fn a_signal_that_was_ignored_at_the_start_stays_ignored() -> Outcome {
    when_it_runs(|| {
        let hwvmm = hwvmm();
        let line = format!(
            "trap '' TERM; exec '{}' run -m 16M --timeout 2s '{}'",
            hwvmm.get_program().display(),
            kernel("ignored", guests::spin()).display()
        );
        let mut shell = Command::new("sh");
        shell.args(["-c", &line]).env("HOME", folder()).stdin(Stdio::null());
        let mut parent = shell.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("started");
        parent.stdout.as_mut().expect("stdout").read_exact(&mut [0; 6]).expect("hello");
        terminate(&parent);
        let out = parent.wait_with_output().expect("ended");
        assert_eq!(out.status.code(), Some(124), "{}", text(&out.stderr));
    })
}

pub(super) const TESTS: &[Test] = &[
    ("a_crash_of_the_machine_is_40_and_shows_the_last_exits", a_crash_of_the_machine_is_40_and_shows_the_last_exits),
    ("a_machine_that_does_not_end_is_killed", a_machine_that_does_not_end_is_killed),
    ("both_processes_share_no_socket", both_processes_share_no_socket),
    ("a_crash_leaves_the_terminal_as_it_was", a_crash_leaves_the_terminal_as_it_was),
    ("a_signal_ends_a_machine_that_does_not_listen", a_signal_ends_a_machine_that_does_not_listen),
    ("a_signal_that_was_ignored_at_the_start_stays_ignored", a_signal_that_was_ignored_at_the_start_stays_ignored),
    ("the_machine_does_not_outlive_its_parent", the_machine_does_not_outlive_its_parent),
];
