//! The machine's process in its sandbox.

use super::guests;
use super::harness::{Outcome, Test};
use super::process::spin;
use super::when_it_runs;
use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// The value of a line of a thread's status (proc(5)).
fn value(status: &str, name: &str) -> String {
    let line = status.lines().find(|line| line.split(':').next() == Some(name));
    line.and_then(|line| line.split_once(':')).map(|(_, value)| value.trim().to_owned()).unwrap_or_default()
}

/// The threads of a spinning guest: their names and statuses, when each has all of `expected` in its status. After 10 s they are
/// returned as they are: a thread that was just started may have to wait for a processor before it is confined.
fn threads(name: &str, options: &[&str], expected: &[(&str, &str)]) -> Vec<(String, String)> {
    let guest = spin(name, options);
    let tasks = PathBuf::from(format!("/proc/{}/task", guest.machine.as_raw_pid()));
    // Threads that are to stay as they are get the time to change.
    std::thread::sleep(Duration::from_millis(200));
    let deadline = Instant::now() + Duration::from_secs(10);
    let statuses = loop {
        let tasks = fs::read_dir(&tasks).expect("the machine runs").flatten();
        // A thread that ends meanwhile has no status.
        let statuses = tasks.filter_map(|task| fs::read_to_string(task.path().join("status")).ok());
        let statuses: Vec<_> = statuses.map(|status| (value(&status, "Name"), status)).collect();
        let is_expected = |status: &str| expected.iter().all(|(name, expected)| value(status, name) == *expected);
        if statuses.iter().all(|(_, status)| is_expected(status)) || Instant::now() >= deadline {
            break statuses;
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    super::terminate(&guest.parent);
    guest.parent.wait_with_output().expect("ended");
    assert!(!statuses.is_empty());
    statuses
}

fn every_thread_is_confined() -> Outcome {
    when_it_runs(|| {
        let none = "0000000000000000";
        let expected = [
            ("NoNewPrivs", "1"),
            ("Seccomp", "2"),
            ("CapEff", none),
            ("CapPrm", none),
            ("CapInh", none),
            ("CapAmb", none),
        ];
        let threads = threads(
            "confined",
            &["-c", "2", "--stats", "--console", "virtio=null", "--serial", "1=stdio", "--rng", "--balloon"],
            &expected,
        );
        assert!(threads.len() >= 3, "{threads:?}");
        for (name, status) in threads {
            assert_eq!(
                expected.map(|(name, _)| (name, value(&status, name))),
                expected.map(|(name, expected)| (name, expected.to_owned())),
                "{name}"
            );
        }
    })
}

/// The address space that the process of a spinning guest may take beyond what it has, in MiB.
fn growth_mib(name: &str, options: &[&str]) -> u64 {
    let guest = spin(name, options);
    let file = |name: &str| {
        fs::read_to_string(format!("/proc/{}/{name}", guest.machine.as_raw_pid())).expect("the machine runs")
    };
    // It is set when everything is open, before the guest runs.
    let limit = || {
        let limits = file("limits");
        let limit = limits.lines().find_map(|line| line.strip_prefix("Max address space")).expect("a limit");
        limit.split_whitespace().next().and_then(|word| word.parse::<u64>().ok())
    };
    let deadline = Instant::now() + Duration::from_secs(10);
    let limit = loop {
        if let Some(limit) = limit() {
            break limit;
        }
        assert!(Instant::now() < deadline, "it is not limited");
        std::thread::sleep(Duration::from_millis(5));
    };
    let has: u64 = value(&file("status"), "VmSize").trim_end_matches(" kB").parse().expect("a number");
    super::terminate(&guest.parent);
    guest.parent.wait_with_output().expect("ended");
    (limit >> 20).saturating_sub(has >> 10)
}

fn profiles_have_memory_for_each_vcpu() -> Outcome {
    when_it_runs(|| {
        let plain = growth_mib("growth", &["-c", "4"]);
        assert!((400..=512).contains(&plain), "{plain} MiB");
        let profiled = growth_mib("growth", &["-c", "4", "--profile=user"]);
        assert!((plain + 400..=plain + 600).contains(&profiled), "{plain} MiB, then {profiled} MiB");
    })
}

fn without_the_sandbox_no_thread_is_confined() -> Outcome {
    when_it_runs(|| {
        for (name, status) in threads("unconfined", &["--sandbox=off"], &[("Seccomp", "0")]) {
            assert_eq!(value(&status, "Seccomp"), "0", "{name}");
        }
    })
}

/// Faults that hwvmm injects into itself: not in release builds.
#[cfg(any(debug_assertions, feature = "fault-injection"))]
mod faults {
    use super::super::{folder, hwvmm, kernel, text};
    use super::{Outcome, guests, when_it_runs};
    use std::fs::{self, File, Permissions};
    use std::os::unix::fs::{MetadataExt, PermissionsExt};
    use std::os::unix::process::CommandExt;
    use std::process::{Command, Output, Stdio};
    use std::time::{Duration, UNIX_EPOCH};

    fn run_with(fault: &str, options: &[&str]) -> Output {
        hwvmm()
            .args(["run", "-m", "16M", "--timeout", "1s"])
            .args(options)
            .arg(kernel("fault", guests::spin()))
            .env("HWVMM_FAULT", fault)
            .output()
            .expect("started")
    }

    pub(super) fn a_fault_ends_the_run_and_is_named() -> Outcome {
        when_it_runs(|| {
            for (fault, said) in [
                ("Vcpu:exec", "its thread vcpu0 called execve (59), which its sandbox does not permit"),
                ("Vcpu:open", "its thread vcpu0 called openat (257), which its sandbox does not permit"),
                ("Main:open", "its thread main called openat (257), which its sandbox does not permit"),
                ("Drain:exec", "its thread drain called execve (59), which its sandbox does not permit"),
            ] {
                let out = run_with(fault, &[]);
                let errors = text(&out.stderr);
                assert_eq!(out.status.code(), Some(40), "{fault}: {errors}");
                assert!(errors.contains(said), "{fault}: {errors}");
            }
            let share = format!("tag=a,path={}", folder().display());
            let errors = text(&run_with("Fs:open", &["--share", &share]).stderr);
            assert!(errors.contains("called openat (257), which its sandbox does not permit"), "{errors}");
        })
    }

    /// A file outside of a share, with its folder: all may change it.
    struct Outside {
        folder: tempfile::TempDir,
        file: std::path::PathBuf,
    }

    impl Outside {
        fn new() -> Self {
            let folder = tempfile::tempdir().expect("a folder");
            let (file, shared) = (folder.path().join("outside"), folder.path().join("shared"));
            fs::create_dir(&shared).expect("made");
            fs::write(&file, "text").expect("written");
            for path in [folder.path(), &shared] {
                fs::set_permissions(path, Permissions::from_mode(0o755)).expect("changed");
            }
            fs::set_permissions(&file, Permissions::from_mode(0o644)).expect("changed");
            let old = UNIX_EPOCH + Duration::from_secs(1_000_000);
            File::options().write(true).open(&file).and_then(|file| file.set_modified(old)).expect("changed");
            Self { folder, file }
        }

        /// The options of a run that shares the folder beside the file.
        fn share(&self) -> [String; 2] {
            ["--share".into(), format!("tag=a,path={}", self.folder.path().join("shared").display())]
        }

        fn fault(&self) -> String {
            format!("Fs:touch={}", self.file.display())
        }

        fn is_unchanged(&self) -> bool {
            let now = fs::metadata(&self.file).expect("there");
            now.mode() & 0o7777 == 0o644 && now.mtime() == 1_000_000
        }
    }

    pub(super) fn the_thread_of_a_share_changes_no_file_outside() -> Outcome {
        when_it_runs(|| {
            let outside = Outside::new();
            let [option, share] = outside.share();
            let errors = text(&run_with(&outside.fault(), &[&option, &share, "--sandbox=off"]).stderr);
            assert!(!outside.is_unchanged(), "the fault works: {errors}");
            let outside = Outside::new();
            let [option, share] = outside.share();
            let errors = text(&run_with(&outside.fault(), &[&option, &share]).stderr);
            assert!(errors.contains("touch: 0 calls were carried out"), "{errors}");
            assert!(outside.is_unchanged(), "{errors}");
        })
    }

    const NOBODY: u32 = 65534;

    /// What a user without rights runs: a copy of hwvmm, a kernel, and a device file of KVM that the user may open.
    struct User {
        outside: Outside,
    }

    impl User {
        fn new() -> Self {
            let user = Self { outside: Outside::new() };
            let path = |name: &str| user.path(name);
            let device = fs::metadata("/dev/kvm").expect("there").rdev();
            let (kind, mode) = (rustix::fs::FileType::CharacterDevice, rustix::fs::Mode::from_raw_mode(0o666));
            rustix::fs::mknodat(rustix::fs::CWD, path("kvm"), kind, mode, device).expect("made");
            fs::set_permissions(path("kvm"), Permissions::from_mode(0o666)).expect("changed");
            fs::copy(hwvmm().get_program(), path("hwvmm")).expect("copied");
            fs::copy(kernel("fault", guests::spin()), path("kernel")).expect("copied");
            fs::create_dir(path("home")).expect("made");
            for name in ["outside", "shared", "home"] {
                std::os::unix::fs::chown(path(name), Some(NOBODY), Some(NOBODY)).expect("root may");
            }
            user
        }

        fn path(&self, name: &str) -> std::path::PathBuf {
            self.outside.folder.path().join(name)
        }

        /// Has `command`, which runs a program as the user, run hwvmm. Returns what hwvmm prints on stderr.
        fn run(&self, mut command: Command, fault: &str, options: &[&str]) -> String {
            command.arg(self.path("hwvmm")).args(["run", "-m", "16M", "--timeout", "1s", "--kvm"]);
            command.arg(self.path("kvm")).args(self.outside.share()).args(options).arg(self.path("kernel"));
            command.stdin(Stdio::null()).env("HOME", self.path("home")).env("HWVMM_FAULT", fault);
            text(&command.output().expect("started").stderr)
        }
    }

    /// Calls `test` where this is root, who can become another user, and where such a user can do something.
    fn as_root(test: impl FnOnce()) -> Outcome {
        use rustix::fs::{AtFlags, CWD, StatxAttributes, StatxFlags, statx};
        let root = statx(CWD, "/", AtFlags::empty(), StatxFlags::MODE).expect("there");
        if !rustix::process::geteuid().is_root() {
            Outcome::Skipped("it needs root".into())
        } else if root.stx_mode & 0o001 == 0 {
            Outcome::Skipped("users other than root cannot enter /".into())
        } else if !root.stx_attributes.contains(StatxAttributes::MOUNT_ROOT) {
            Outcome::Skipped("this is a chroot, in which the kernel makes no user namespace".into())
        } else {
            when_it_runs(test)
        }
    }

    /// As a user without rights, in a user namespace.
    pub(super) fn the_thread_of_a_share_of_a_user_changes_no_file_outside() -> Outcome {
        as_root(|| {
            let user = User::new();
            let run = |fault: &str, options: &[&str]| {
                let mut env = Command::new("env");
                env.uid(NOBODY).gid(NOBODY);
                user.run(env, fault, options)
            };
            let errors = run("", &["--vsock", &format!("cid=3,uds={}", user.path("home/vsock").display())]);
            assert!(errors.contains("timed out after 1 s") && !errors.contains("sandbox"), "it runs: {errors}");
            let errors = run(&user.outside.fault(), &[]);
            assert!(errors.contains("touch: 0 calls were carried out"), "{errors}");
            assert!(user.outside.is_unchanged(), "{errors}");
            let errors = run(&user.outside.fault(), &["--sandbox=off"]);
            assert!(!user.outside.is_unchanged(), "the fault works: {errors}");
        })
    }

    /// On a host where a user can make a user namespace, but not map itself to it: here /proc cannot be written to.
    pub(super) fn a_user_namespace_of_no_use_is_said() -> Outcome {
        as_root(|| {
            let user = User::new();
            let mut command = Command::new("unshare");
            command.args(["--mount", "--propagation", "unchanged", "sh", "-c"]).arg(
                "mount --make-rprivate /proc && mount --bind /proc /proc && mount -o remount,bind,ro /proc &&
                 exec setpriv --reuid 65534 --regid 65534 --clear-groups \"$@\"",
            );
            command.arg("sh");
            let errors = user.run(command, "", &[]);
            assert!(errors.contains("timed out after 1 s"), "it runs: {errors}");
            let said = "chmod, chown and touch can reach files outside of the shared folders: cannot map the user";
            assert_eq!(errors.matches(said).count(), 1, "{errors}");
        })
    }

    /// A backtrace opens files: it must not turn a panic into a refused system call.
    pub(super) fn a_panic_stays_a_panic_with_backtraces_on() -> Outcome {
        when_it_runs(|| {
            for role in ["Vcpu", "Main"] {
                let out = hwvmm()
                    .args(["run", "-m", "16M", "--timeout", "5s"])
                    .arg(kernel("fault", guests::spin()))
                    .env("HWVMM_FAULT", format!("{role}:panic"))
                    .env("RUST_BACKTRACE", "1")
                    .output()
                    .expect("started");
                let errors = text(&out.stderr);
                assert!(errors.contains("HWVMM_FAULT: a panic") && errors.contains("panicked"), "{role}: {errors}");
                assert!(!errors.contains("sandbox does not permit"), "{role}: {errors}");
                assert!(matches!(out.status.code(), Some(40 | 42)), "{role}: {out:?}");
            }
        })
    }

    /// Nor a failed allocation.
    pub(super) fn a_failed_allocation_is_an_abort_with_backtraces_on() -> Outcome {
        when_it_runs(|| {
            for value in ["1", "full"] {
                let out = hwvmm()
                    .args(["run", "-m", "16M", "--timeout", "5s"])
                    .arg(kernel("fault", guests::spin()))
                    .env("HWVMM_FAULT", "Main:alloc")
                    .env("RUST_BACKTRACE", value)
                    .output()
                    .expect("started");
                let errors = text(&out.stderr);
                assert_eq!(out.status.code(), Some(40), "{errors}");
                assert!(errors.contains("memory allocation of") && errors.contains("SIGABRT"), "{errors}");
            }
        })
    }

    pub(super) fn log_says_what_would_have_been_refused() -> Outcome {
        when_it_runs(|| {
            let out = run_with("Vcpu:open", &["--sandbox=log"]);
            let errors = text(&out.stderr);
            assert_eq!(out.status.code(), Some(124), "{errors}");
            assert!(
                errors.contains("sandbox: thread vcpu0 called openat (257): --sandbox=on refuses that"),
                "{errors}"
            );
            assert!(errors.contains("HWVMM_FAULT: open: Ok"), "{errors}");
            assert_eq!(errors.matches("--sandbox=on refuses").count(), 1, "nothing else is refused: {errors}");
        })
    }

    pub(super) fn without_the_sandbox_the_fault_is_possible() -> Outcome {
        when_it_runs(|| {
            let out = run_with("Vcpu:open", &["--sandbox=off"]);
            let errors = text(&out.stderr);
            assert_eq!(out.status.code(), Some(124), "{errors}");
            assert!(errors.contains("HWVMM_FAULT: open: Ok"), "{errors}");
        })
    }
}

pub(crate) const TESTS: &[Test] = &[
    ("every_thread_is_confined", every_thread_is_confined),
    ("profiles_have_memory_for_each_vcpu", profiles_have_memory_for_each_vcpu),
    ("without_the_sandbox_no_thread_is_confined", without_the_sandbox_no_thread_is_confined),
    #[cfg(any(debug_assertions, feature = "fault-injection"))]
    ("a_fault_ends_the_run_and_is_named", faults::a_fault_ends_the_run_and_is_named),
    #[cfg(any(debug_assertions, feature = "fault-injection"))]
    ("the_thread_of_a_share_changes_no_file_outside", faults::the_thread_of_a_share_changes_no_file_outside),
    #[cfg(any(debug_assertions, feature = "fault-injection"))]
    (
        "the_thread_of_a_share_of_a_user_changes_no_file_outside",
        faults::the_thread_of_a_share_of_a_user_changes_no_file_outside,
    ),
    #[cfg(any(debug_assertions, feature = "fault-injection"))]
    ("a_user_namespace_of_no_use_is_said", faults::a_user_namespace_of_no_use_is_said),
    #[cfg(any(debug_assertions, feature = "fault-injection"))]
    ("a_panic_stays_a_panic_with_backtraces_on", faults::a_panic_stays_a_panic_with_backtraces_on),
    #[cfg(any(debug_assertions, feature = "fault-injection"))]
    ("a_failed_allocation_is_an_abort_with_backtraces_on", faults::a_failed_allocation_is_an_abort_with_backtraces_on),
    #[cfg(any(debug_assertions, feature = "fault-injection"))]
    ("log_says_what_would_have_been_refused", faults::log_says_what_would_have_been_refused),
    #[cfg(any(debug_assertions, feature = "fault-injection"))]
    ("without_the_sandbox_the_fault_is_possible", faults::without_the_sandbox_the_fault_is_possible),
];
