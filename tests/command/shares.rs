//! What an earlier guest has left in a folder that is shared with it decides nothing on the host.

use super::harness::{Outcome, Test};
use super::{file, folder, fs, guests, hwvmm, kernel, text, when_it_runs};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::PathBuf;
use std::process::Output;

const SECRET: &[u8] = b"of the user";

/// A new folder for a share.
fn share(name: &str) -> PathBuf {
    let share = folder().join(name);
    let _ = fs::remove_dir_all(&share);
    fs::create_dir_all(&share).expect("made");
    share
}

/// The output of a run with the writable share, which ends before the guest starts: there is no such kernel.
fn run(share: &std::path::Path, options: &[&str]) -> Output {
    let share = format!("tag=h,path={}", share.display());
    hwvmm().args(["run", "/nowhere", "--share", &share]).args(options).output().expect("started")
}

fn a_link_that_an_earlier_guest_has_left_is_not_followed() -> Outcome {
    let (share, of_user) = (share("links"), file("links.other", SECRET));
    let link = share.join("link");
    symlink(&of_user, &link).expect("linked");
    let link = link.to_str().expect("UTF-8");
    for (option, value) in [
        ("--serial", format!("1=file:{link}")),
        ("--console", format!("virtio=file:{link}")),
        ("--stats-out", link.to_owned()),
        ("--profile-out", link.to_owned()),
        ("--initrd", link.to_owned()),
        ("--module", link.to_owned()),
        ("--disk", link.to_owned()),
        ("--disk", format!("{link},format=raw")),
        ("--budget-from", link.to_owned()),
        ("--symbols", link.to_owned()),
    ] {
        let out = run(&share, &[option, &value]);
        let errors = text(&out.stderr);
        assert_eq!(out.status.code(), Some(2), "{option}: {errors}");
        assert!(errors.contains("it leads through a symbolic link"), "{option}: {errors}");
        assert_eq!(fs::read(&of_user).expect("there"), SECRET, "{option}");
    }
    // A file that is no link is not in the way.
    let plain = format!("1=file:{}", share.join("plain").display());
    assert_eq!(run(&share, &["--serial", &plain]).status.code(), Some(42), "the kernel is missing");
    Outcome::Passed
}

fn files_that_decide_are_not_in_a_writable_share() -> Outcome {
    let share = share("deciding");
    let config = share.join("run.toml");
    fs::write(&config, "memory = '64M'\n").expect("written");
    let passt = share.join("passt");
    let ran = share.join("ran");
    fs::write(&passt, format!("#!/bin/sh\ntouch {}\n", ran.display())).expect("written");
    fs::set_permissions(&passt, fs::Permissions::from_mode(0o755)).expect("changed");
    let disk = format!("{},format=qcow2", share.join("disk.qcow2").display());
    let config = config.to_str().expect("UTF-8");
    for options in [["--config", config], ["--disk", &disk]] {
        let out = run(&share, &options);
        let errors = text(&out.stderr);
        assert_eq!(out.status.code(), Some(2), "{options:?}: {errors}");
        assert!(errors.contains("a guest can have written it"), "{options:?}: {errors}");
    }
    let kernel = kernel("passt", guests::power_off());
    let shared = format!("tag=h,path={}", share.display());
    let mut command = hwvmm();
    command.args(["run", "-m", "64M", "--net", "user", "--share", &shared]).arg(kernel).env("PATH", &share);
    let out = command.output().expect("started");
    let errors = text(&out.stderr);
    assert_eq!(out.status.code(), Some(2), "{errors}");
    assert!(errors.contains("hwvmm executes it on the host") && !ran.exists(), "{errors}");
    Outcome::Passed
}

fn a_kernel_cache_in_a_writable_share_is_not_used() -> Outcome {
    let share = share("cache");
    let cache = share.join("kernels");
    let out = run(&share, &["--kernel-cache", cache.to_str().expect("UTF-8")]);
    let errors = text(&out.stderr);
    assert_eq!(out.status.code(), Some(42), "{errors}");
    assert!(errors.contains("unpacked kernels are not kept") && errors.contains("writable --share"), "{errors}");
    Outcome::Passed
}

/// A qcow2 image of 1 MiB whose header names a raw backing file.
fn overlay(backing: &str) -> Vec<u8> {
    let mut bytes = vec![0_u8; 4 * 4096];
    bytes[..8].copy_from_slice(b"QFI\xfb\0\0\0\x03");
    let numbers: [(usize, u64, usize); 13] = [
        (8, 512, 8),
        (16, backing.len() as u64, 4),
        (20, 12, 4),
        (24, 1 << 20, 8),
        (36, 1, 4),
        (40, 3 * 4096, 8),
        (48, 4096, 8),
        (56, 1, 4),
        (96, 4, 4),
        (100, 104, 4),
        (4096, 2 * 4096, 8),
        (2 * 4096, 0x0001_0001_0001_0001, 8),
        // The extension with the format of the backing file.
        (104, 0xe279_2aca_0000_0003, 8),
    ];
    for (at, value, width) in numbers {
        bytes[at..at + width].copy_from_slice(&value.to_be_bytes()[8 - width..]);
    }
    bytes[112..115].copy_from_slice(b"raw");
    bytes[512..512 + backing.len()].copy_from_slice(backing.as_bytes());
    bytes
}

fn a_backing_file_is_not_in_a_writable_share() -> Outcome {
    when_it_runs(|| {
        let share = share("backing");
        let base = share.join("base.img");
        fs::write(&base, vec![0; 1 << 20]).expect("written");
        let disk = file("overlay.qcow2", &overlay(base.to_str().expect("UTF-8")));
        let (disk, kernel) = (format!("{},format=qcow2", disk.display()), kernel("overlay", guests::power_off()));
        for (read_only, status) in [("", 42), (",readonly=on", 0)] {
            let share = format!("tag=h,path={}{read_only}", share.display());
            let mut command = hwvmm();
            command.args(["run", "-m", "64M", "--timeout", "20s", "--share", &share, "--disk", &disk]).arg(&kernel);
            let out = command.output().expect("started");
            let errors = text(&out.stderr);
            assert_eq!(out.status.code(), Some(status), "{errors}");
            assert_eq!(errors.contains("backing file") && errors.contains("writable"), status == 42, "{errors}");
        }
    })
}

pub(super) const TESTS: &[Test] = &[
    ("a_link_that_an_earlier_guest_has_left_is_not_followed", a_link_that_an_earlier_guest_has_left_is_not_followed),
    ("files_that_decide_are_not_in_a_writable_share", files_that_decide_are_not_in_a_writable_share),
    ("a_kernel_cache_in_a_writable_share_is_not_used", a_kernel_cache_in_a_writable_share_is_not_used),
    ("a_backing_file_is_not_in_a_writable_share", a_backing_file_is_not_in_a_writable_share),
];
