//! Bad input: it is refused with a message that names the cause, and nothing is run.

use crate::guests;
use crate::harness::{Outcome, Test};
use crate::{file, folder, hwvmm, run, text, when_it_runs};
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

/// Runs a command that must fail with `status`, print nothing on stdout, and have each of `words` in its message.
fn refused(arguments: &[&str], status: i32, words: &[&str]) -> Outcome {
    let out = hwvmm().args(arguments).output().expect("started");
    let errors = text(&out.stderr);
    assert_eq!(out.status.code(), Some(status), "{errors}");
    assert!(out.stdout.is_empty());
    for word in words {
        assert!(errors.contains(word), "{word:?} is not in: {errors}");
    }
    assert!(!errors.contains("panicked at"), "{errors}");
    Outcome::Passed
}

/// As [`refused`] with status 42, for what is found out after KVM was opened.
fn refused_with_kvm(arguments: &[&str], words: &[&str]) -> Outcome {
    if !Path::new("/dev/kvm").exists() {
        return Outcome::Skipped("no /dev/kvm".into());
    }
    refused(arguments, 42, words)
}

/// Runs a file that is not a usable kernel; see [`refused`].
fn refused_kernel(name: &str, content: &[u8], options: &[&str], words: &[&str]) -> Outcome {
    if !Path::new("/dev/kvm").exists() {
        return Outcome::Skipped("no /dev/kvm".into());
    }
    let path = file(name, content);
    let mut arguments = vec!["run", path.to_str().expect("UTF-8")];
    arguments.extend(options);
    refused(&arguments, 42, words)
}

/// A guest that can write to a folder must not choose what hwvmm opens, connects to or removes there.
fn paths_in_a_writable_share_are_refused() -> Outcome {
    let shared = folder().join("writable-share");
    fs::create_dir_all(&shared).expect("made");
    let link = folder().join("link-to-share");
    let _ = fs::remove_file(&link);
    std::os::unix::fs::symlink(&shared, &link).expect("linked");
    let share = format!("tag=a,path={}", shared.display());
    let inside = link.join("x").display().to_string();
    let (uds, serial) = (format!("cid=3,uds={inside}"), format!("1=file:{inside}"));
    for options in [
        ["--vsock", &uds, ""],
        ["--api", &inside, ""],
        ["--serial", &serial, "--on-reboot=restart"],
        ["--disk", &inside, "--on-reboot=restart"],
    ] {
        let mut arguments = vec!["run", "--share", &share];
        arguments.extend(options.iter().filter(|option| !option.is_empty()));
        arguments.push("kernel");
        refused(&arguments, 2, &[options[0], &inside, "--share tag=a", "outside of the share", "readonly=on"]);
    }
    // These files are opened before the guest runs.
    when_it_runs(|| {
        for (share, option, value) in [(&share, "--serial", &serial), (&share, "--stats-out", &inside)] {
            let out = run("of-share", guests::power_off(), &["--share", share, option, value]);
            assert_eq!(out.status.code(), Some(0), "{}", text(&out.stderr));
            fs::remove_file(shared.join("x")).expect("it was written");
        }
    })
}

/// A KVM that emulates instructions may run the tiny guests of these tests, and hangs in a Linux kernel.
fn linux_is_refused_where_kvm_cannot_run_it() -> Outcome {
    if !Path::new("/dev/kvm").exists() {
        return Outcome::Skipped("no /dev/kvm".into());
    }
    if ["kvm_amd", "kvm_intel"].iter().any(|module| Path::new("/sys/module").join(module).exists()) {
        return Outcome::Skipped("this host's KVM uses the processor's virtualization extensions".into());
    }
    if hwvmm().args(["doctor", "--json"]).output().expect("started").status.success() {
        return Outcome::Skipped("this host's KVM can run Linux".into());
    }
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/corpus/kernel_file");
    for kernel in ["bzimage-gzip", "vmlinux-pvh"] {
        let start = Instant::now();
        let path = corpus.join(kernel);
        let arguments = ["run", "--timeout", "60s", path.to_str().expect("UTF-8")];
        refused(&arguments, 42, &["cannot run Linux", "vCPU failed at", "hwvmm doctor", "scripts/lab"]);
        assert!(start.elapsed() < Duration::from_secs(10), "said at once");
        let out =
            hwvmm().env("HWVMM_ANY_KVM", "1").args(["run", "--timeout", "1s"]).arg(&path).output().expect("started");
        let errors = String::from_utf8_lossy(&out.stderr).into_owned();
        assert!(!errors.contains("cannot run Linux"), "{errors}");
    }
    Outcome::Passed
}

fn a_host_without_proc_gets_the_remedy() -> Outcome {
    let script = "mount -t tmpfs none /proc || exit 77; exec \"$@\"";
    let mut command = Command::new("unshare");
    command.args(["-rm", "sh", "-c", script, "sh"]).arg(hwvmm().get_program()).args(["run", "/nowhere"]);
    let Ok(out) = command.output() else { return Outcome::Skipped("unshare(1) is missing".into()) };
    let errors = text(&out.stderr);
    if out.status.code() != Some(42) {
        assert!(!errors.contains("hwvmm"), "{} {errors}", out.status);
        return Outcome::Skipped("no mount namespace can be made".into());
    }
    assert!(errors.contains("hwvmm needs /proc: mount -t proc proc /proc"), "{errors}");
    Outcome::Passed
}

pub(crate) const TESTS: &[Test] = &[
    ("a_host_without_proc_gets_the_remedy", a_host_without_proc_gets_the_remedy),
    ("linux_is_refused_where_kvm_cannot_run_it", linux_is_refused_where_kvm_cannot_run_it),
    ("paths_in_a_writable_share_are_refused", paths_in_a_writable_share_are_refused),
    ("a_missing_kvm_device_is_refused", || {
        refused(&["run", "--kvm", "/no/such/kvm", "k"], 42, &["/no/such/kvm", "modprobe"])
    }),
    ("a_device_other_than_kvm_is_refused", || refused(&["run", "--kvm", "/dev/null", "k"], 42, &["/dev/null"])),
    ("a_run_without_a_kernel_is_refused", || refused(&["run"], 2, &["no kernel given"])),
    ("a_missing_kernel_is_refused", || {
        refused_with_kvm(&["run", "/no/such/kernel"], &["/no/such/kernel", "check the path"])
    }),
    ("a_directory_as_kernel_is_refused", || refused_with_kvm(&["run", "/tmp"], &["/tmp is not a regular file"])),
    ("a_fifo_as_kernel_is_refused", || {
        let path = folder().join("fifo");
        assert!(Command::new("mkfifo").arg(&path).status().expect("mkfifo").success());
        refused_with_kvm(&["run", path.to_str().expect("UTF-8")], &["is not a regular file"])
    }),
    ("an_empty_kernel_is_refused", || refused_kernel("empty", b"", &[], &["it is empty"])),
    ("a_text_as_kernel_is_refused", || refused_kernel("text", b"#!/bin/sh\n", &[], &["not a kernel"])),
    ("a_compressed_file_as_kernel_is_refused", || {
        refused_kernel("gz", b"\x1f\x8b\x08\0\0\0\0\0", &[], &["gzip", "unpack it first"])
    }),
    ("a_truncated_elf_is_refused", || {
        refused_kernel("cut.elf", &guests::multiboot(guests::halt())[..70], &[], &["truncated"])
    }),
    ("an_initrd_larger_than_memory_is_refused", || {
        let initrd = folder().join("large");
        fs::File::create(&initrd).and_then(|file| file.set_len(64 << 20)).expect("sparse");
        let options = ["-m", "16M", "-i", initrd.to_str().expect("UTF-8")];
        refused_kernel("small.elf", &guests::multiboot(guests::halt()), &options, &["67108864 bytes", "-m"])
    }),
    ("1_mib_of_memory_is_refused", || refused(&["run", "-m", "1M", "k"], 2, &["'1M' for '--memory", "16M to 4T"])),
    ("0_vcpus_are_refused", || refused(&["run", "-c", "0", "k"], 2, &["'0' for '--cpus", "1 to 254"])),
    ("100000_vcpus_are_refused", || refused(&["run", "-c", "100000", "k"], 2, &["1 to 254"])),
    ("a_command_line_that_is_too_long_is_refused", || {
        let long = "x".repeat(70_000);
        refused_kernel("long.elf", &guests::multiboot(guests::halt()), &["-p", &long], &["70", "there is room for"])
    }),
    ("an_unknown_key_is_refused", || {
        refused(&["run", "-m", "1G,huge=on", "k"], 2, &["'huge'", "hugepages=thp|off|2M|1G"])
    }),
    ("an_unknown_key_in_a_file_is_refused", || {
        let path = file("bad.toml", b"kernel = 'k'\ncolour = 1\n");
        refused(&["run", "--config", path.to_str().expect("UTF-8")], 2, &["colour", "cmdline", "bad.toml"])
    }),
    ("a_bad_pattern_is_refused", || {
        refused(&["run", "--expect", "(", "k"], 2, &["'(' for '--expect", "regular expression"])
    }),
    ("a_bad_budget_is_refused", || {
        refused(&["run", "--budget", "pio=x", "k"], 2, &["--budget", "pio=x", "not a whole number"])
    }),
    ("a_budget_of_an_unknown_reason_is_refused", || {
        refused(&["run", "--budget", "userspace.colour=1", "k"], 2, &["'userspace.colour'", "userspace.REASON"])
    }),
    ("a_bad_slack_is_refused", || refused(&["run", "--slack", "much", "k"], 2, &["--slack", "'much'", "percentage"])),
    ("an_unknown_flag_is_refused", || refused(&["run", "--colour", "k"], 2, &["--colour"])),
];
