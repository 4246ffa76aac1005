//! Disk images: commands in guests whose kernel is in one, and the seed of cloud-init.

use super::fat::fat;
use super::harness::{Outcome, Test};
use super::{file, folder, guests, hwvmm, kernel, text, when_it_runs};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

const ENTRY: (&str, &[u8]) = ("/loader/entries/a.conf", b"title A\nlinux /linux\noptions quiet\n");
const MODULES: &str = "/lib/modules/9.9.9-x";

/// Makes a disk that is one FAT file system with these files.
fn image(name: &str, files: &[(&str, &[u8])]) -> PathBuf {
    file(name, &fat(2 << 20, files))
}

/// A kernel as those of Linux, which says its release.
fn linux(code: &[u8]) -> Vec<u8> {
    [&guests::pvh(code)[..], b"\0Linux version 9.9.9-x (tests)\0"].concat()
}

fn run(image: &Path, options: &[&str]) -> Output {
    hwvmm()
        // These guests run where Linux does not.
        .env("HWVMM_ANY_KVM", "1")
        .args(["run", "-m", "32M", "--timeout", "20s", "--root", "none"])
        .args(options)
        .arg(image)
        .args(["--", "a-command"])
        .output()
        .expect("started")
}

fn a_command_runs_on_the_kernel_of_an_image() -> Outcome {
    when_it_runs(|| {
        let image = image("exited.img", &[ENTRY, ("/linux", &guests::multiboot(guests::command_exited()))]);
        let before = fs::read(&image).expect("read");
        for options in [&[][..], &["--entry", "a"], &["--modules", "/nowhere"]] {
            let out = run(&image, options);
            let errors = text(&out.stderr);
            // A multiboot kernel does not say its release.
            let status = if options.contains(&"--modules") { 42 } else { 34 };
            assert_eq!(out.status.code(), Some(status), "{options:?}: {errors}");
        }
        assert!(fs::read(&image).expect("read") == before, "the image is read-only");
        // What was started is said with -v (and on a terminal), and is in the status file.
        let status = folder().join("entry.status");
        let out = run(&image, &["-v", "--status-file", status.to_str().expect("UTF-8")]);
        let errors = text(&out.stderr);
        assert!(errors.contains("exited.img: the kernel of entry 0 (A)"), "{errors}");
        let status: serde_json::Value = serde_json::from_slice(&fs::read(&status).expect("written")).expect("JSON");
        assert_eq!(status["entry"], serde_json::json!({ "number": "0", "title": "A" }), "{status}");
        let out = run(&image, &["--entry", "b"]);
        assert!(out.status.code() == Some(42) && text(&out.stderr).contains("there are: 0 (A)"), "{out:?}");
    })
}

/// An image whose guest was killed. A guest that cannot write it mounts it as it is.
fn a_root_that_was_not_unmounted_is_said() -> Outcome {
    let path = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default());
    let (root, image) = (folder().join("dirty-root"), folder().join("dirty.img"));
    for name in ["etc", "bin"] {
        fs::create_dir_all(root.join(name)).expect("made");
    }
    fs::File::create(&image).and_then(|file| file.set_len(8 << 20)).expect("made");
    let tool = |name: &str, arguments: &[&str]| {
        let out = Command::new(name).env("PATH", &path).args(arguments).arg(&image).output();
        out.is_ok_and(|out| out.status.success())
    };
    let made = tool("mke2fs", &["-q", "-F", "-t", "ext4", "-d", root.to_str().expect("UTF-8")]);
    if !made {
        return Outcome::Skipped("mke2fs or debugfs is missing (apt install e2fsprogs)".into());
    }
    when_it_runs(|| {
        let run = || {
            let mut hwvmm = hwvmm();
            hwvmm.args(["run", "-m", "32M", "--timeout", "20s", "--root"]).arg(&image);
            let out =
                hwvmm.arg(kernel("dirty-root", guests::command_exited())).args(["--", "x"]).output().expect("started");
            assert_eq!(out.status.code(), Some(34), "{out:?}");
            text(&out.stderr)
        };
        assert_eq!(run(), "");
        assert!(tool("debugfs", &["-w", "-R", "feature needs_recovery"]), "debugfs");
        let errors = run();
        assert!(errors.contains("dirty.img") && errors.contains("its journal is not replayed"), "{errors}");
    })
}

fn an_image_without_the_modules_of_its_kernel_is_named() -> Outcome {
    when_it_runs(|| {
        let image = image("no-modules.img", &[ENTRY, ("/linux", &linux(guests::command_failed()))]);
        let out = run(&image, &[]);
        let errors = text(&out.stderr);
        assert_eq!(out.status.code(), Some(41), "{errors}");
        for words in ["no modules of kernel 9.9.9-x", "no-modules.img", "no partitions, but FAT", "--modules DIR"] {
            assert!(errors.contains(words), "{words}: {errors}");
        }
        let out = run(&image, &["--modules", "/nowhere"]);
        let errors = text(&out.stderr);
        assert!(out.status.code() == Some(42) && errors.contains("no modules of kernel 9.9.9-x there"), "{errors}");
    })
}

fn modules_are_taken_out_of_the_image() -> Outcome {
    when_it_runs(|| {
        let kernel = linux(guests::command_exited());
        let at = |name: &str| format!("{MODULES}/{name}");
        let of = |name: &str, dependencies: &str| {
            let modules = [at("modules.dep"), at("a.ko"), at("virtio_pci.ko"), at("vmw_vsock_virtio_transport.ko")];
            let [dep, a, pci, vsock] = &modules;
            let files: [(&str, &[u8]); 6] = [
                ENTRY,
                ("/linux", &kernel),
                (dep, dependencies.as_bytes()),
                (a, b"\x7fELF a"),
                (pci, b"\x7fELF pci"),
                (vsock, b"\x7fELF vsock"),
            ];
            image(name, &files)
        };
        let lines = "virtio_pci.ko: a.ko\na.ko:\n";
        let all = of("modules.img", &format!("{lines}vmw_vsock_virtio_transport.ko:\n"));
        let out = run(&all, &["-v"]);
        let errors = text(&out.stderr);
        assert_eq!(out.status.code(), Some(34), "{errors}");
        let from = format!("modules: 3 from {}:{MODULES}", all.display());
        assert!(errors.contains(&from), "{from}: {errors}");
        for (name, lines, words) in [
            ("no-driver.img", lines.to_owned(), "CONFIG_VIRTIO_VSOCKETS"),
            ("no-file.img", format!("{lines}b/vmw_vsock_virtio_transport.ko:\n"), "no such file"),
            ("outside.img", format!("{lines}../vmw_vsock_virtio_transport.ko:\n"), "not in its folder"),
        ] {
            let out = run(&of(name, &lines), &[]);
            let errors = text(&out.stderr);
            assert_eq!(out.status.code(), Some(42), "{name}: {errors}");
            assert!(errors.contains(words) && errors.contains(MODULES), "{name}: {errors}");
        }
    })
}

fn a_seed_is_read_before_the_guest_runs() -> Outcome {
    when_it_runs(|| {
        let seed = folder().join("seed");
        fs::create_dir(&seed).expect("made");
        let ends = |options: &[&str], status: i32, words: &str| {
            let began = Instant::now();
            let mut hwvmm = hwvmm();
            hwvmm.args(["run", "-m", "16M", "--timeout", "20s", "--seed"]).arg(&seed).args(options);
            let out = hwvmm.arg(kernel("seed", guests::power_off())).output().expect("started");
            let errors = text(&out.stderr);
            assert!(out.status.code() == Some(status) && errors.contains(words), "{status} {words}: {errors}");
            assert!(began.elapsed() < Duration::from_secs(15), "nothing is waited for");
        };
        ends(&[], 42, "it has no file user-data, which cloud-init needs");
        fs::write(seed.join("user-data"), "#cloud-config\n").expect("written");
        for options in [&["-v"][..], &["-v", "--transport", "mmio"], &["-v", "--on-reboot", "restart"]] {
            ends(options, 0, "--seed: user-data has 14 bytes");
        }
        rustix::fs::mkfifoat(rustix::fs::CWD, seed.join("vendor-data"), rustix::fs::Mode::RUSR).expect("a FIFO");
        ends(&[], 42, "vendor-data is not a regular file");
    })
}

pub(super) const TESTS: &[Test] = &[
    ("a_seed_is_read_before_the_guest_runs", a_seed_is_read_before_the_guest_runs),
    ("a_command_runs_on_the_kernel_of_an_image", a_command_runs_on_the_kernel_of_an_image),
    ("a_root_that_was_not_unmounted_is_said", a_root_that_was_not_unmounted_is_said),
    ("an_image_without_the_modules_of_its_kernel_is_named", an_image_without_the_modules_of_its_kernel_is_named),
    ("modules_are_taken_out_of_the_image", modules_are_taken_out_of_the_image),
];
