//! Snapshots of machines with disks and other virtio devices.

use super::{Machine, check_sequence, error_of, folder, guests, with_kvm};
use crate::harness::Outcome;
use std::fs::{self, File};
use std::io::Read as _;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

const SECTORS: u64 = 1024;
/// The machine's other devices come behind the disk.
const DEVICES: [&str; 6] = ["-m", "16M", "--transport", "mmio", "--rng", "--console=virtio=null"];

/// What the disk's options are: a raw or a qcow2 image at `path`.
fn disk(path: &Path, options: &str) -> String {
    format!("--disk={}{options}", path.display())
}

fn empty(name: &str) -> PathBuf {
    let path = folder().join(name);
    File::create(&path).unwrap().set_len(SECTORS * 512).unwrap();
    path
}

/// Copies as `cp -p` does.
fn copy_with_times(from: &Path, to: &Path) {
    fs::copy(from, to).unwrap();
    let modified = fs::metadata(from).unwrap().modified().unwrap();
    File::options().write(true).open(to).unwrap().set_modified(modified).unwrap();
}

/// The first round that the guest has not printed as a whole line.
fn rounds(output: &[u8]) -> u32 {
    let lines = output.iter().filter(|byte| **byte == b'\n').count();
    u32::try_from(lines).unwrap().saturating_sub(1)
}

/// Checks that the sectors of the disk at `path` are those of the `done` rounds that were printed, and of one more that may have been
/// under way.
fn check_disk(path: &Path, done: u32) {
    let file = File::open(path).unwrap();
    let number = |sector: u64| {
        let mut words = [0; 8];
        file.read_exact_at(&mut words, sector * 512).unwrap();
        let [a, b, c, d, e, f, g, h] = words;
        (u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, g, h]))
    };
    let per_turn = u32::try_from(SECTORS / 4).unwrap();
    for round in done.saturating_sub(per_turn - 1)..done {
        for part in 0..4 {
            let sector = u64::from(round * 4 + part) % SECTORS;
            assert_eq!(number(sector), (round, part), "sector {sector} after {done} rounds");
        }
    }
}

/// Rounds of a machine that writes to its disk without a pause: each run goes on where the one before it was saved, with a copy of the
/// disk as it was then, as the machine itself goes on to write.
pub(super) fn a_disk_loses_nothing_and_writes_nothing_twice() -> Outcome {
    with_kvm(|| {
        for engine in ["", ",io=plain"] {
            let name = format!("disk{}", engine.len());
            let mut path = empty(&format!("{name}.img"));
            let given = disk(&path, engine);
            let options: Vec<&str> = DEVICES.into_iter().chain([given.as_str()]).collect();
            let mut machine = Machine::boot(&name, guests::write_sectors(), &options);
            let mut before = Vec::new();
            for round in 0..8 {
                let snapshot = folder().join(format!("{name}-{round}"));
                machine.snapshot(&snapshot);
                // It goes on after the snapshot. Paused, it has written what it says it has.
                let lines = rounds(&machine.output());
                super::wait("more output", || rounds(&machine.output()) > lines + 3);
                machine.answer(&["pause"]);
                let all = [&before[..], &machine.output()].concat();
                check_sequence(&[&all]);
                check_disk(&path, rounds(&all));
                let last = folder().join(format!("{name}-{round}-paused"));
                machine.snapshot(&last);
                let copy = folder().join(format!("{name}-{round}.img"));
                copy_with_times(&path, &copy);
                machine.stop();
                let given = disk(&copy, engine);
                let restored = format!("{name}-{round}-on");
                machine = Machine::start(&restored, &[Path::new("--from"), &last], &[&given]);
                machine.wait_for_lines(30);
                before = all;
                let together = [&before[..], &machine.output()].concat();
                check_sequence(&[&together]);
                path = copy;
                let description = fs::read_to_string(last.join("machine.json")).unwrap();
                assert!(description.contains("\"disks\"") && description.contains("\"raw\""), "{description}");
                fs::remove_dir_all(&snapshot).unwrap();
                fs::remove_dir_all(&last).unwrap();
            }
            machine.answer(&["pause"]);
            let all = [&before[..], &machine.output()].concat();
            check_sequence(&[&all]);
            check_disk(&path, rounds(&all));
            machine.stop();
        }
    })
}

pub(super) fn disks_that_do_not_fit_are_refused() -> Outcome {
    with_kvm(|| {
        let (path, other) = (empty("fit.img"), empty("fit-other.img"));
        let given = disk(&path, ",serial=abc");
        let options: Vec<&str> = DEVICES.into_iter().chain([given.as_str()]).collect();
        let machine = Machine::boot("fit", guests::write_sectors(), &options);
        // One that goes on writes to its disk: later, no copy is as it was.
        let early = folder().join("fit-early");
        let said = machine.ctl(&["snapshot", early.to_str().unwrap()]);
        assert!(said.status.success() && super::text(&said.stderr).contains("cp -p"), "{said:?}");
        let lines = rounds(&machine.output());
        super::wait("more output", || rounds(&machine.output()) > lines + 3);
        machine.answer(&["pause"]);
        let snapshot = folder().join("fit");
        let said = machine.ctl(&["snapshot", snapshot.to_str().unwrap()]);
        assert!(said.status.success() && said.stderr.is_empty(), "{said:?}");
        let late = folder().join("fit-late.img");
        copy_with_times(&path, &late);
        machine.stop();
        for image in [&path, &late] {
            let (status, error) = error_of(&early, &[&disk(image, "")]);
            assert!(status == Some(42) && error.contains("changed=accept"), "{status:?} {error}");
        }
        let refused = |options: &[&str], words: &[&str]| {
            let (status, error) = error_of(&snapshot, options);
            assert!(status == Some(42) && words.iter().all(|word| error.contains(word)), "{status:?} {error}");
        };
        refused(&[], &["the snapshot has 1 disks (disk0: ", "fit.img), and 0 were given", "--disk"]);
        let with = disk(&path, "");
        refused(&[&with, &with], &["and 2 were given"]);
        refused(&[&disk(&folder().join("fit-none.img"), "")], &["fit-none.img"]);
        refused(&[&disk(&path, ",readonly=on")], &["disk0 has another readonly"]);
        refused(&[&disk(&path, ",serial=abd")], &["disk0 has another serial"]);
        refused(&[&disk(&path, ",queues=2")], &["disk0 has another queues"]);
        File::options().write(true).open(&other).unwrap().set_len(SECTORS * 1024).unwrap();
        refused(&[&disk(&other, "")], &["state of disk0", "524288 bytes", "1048576"]);
        fs::write(&other, "QFI\u{fb}").unwrap();
        refused(&[&disk(&other, "")], &["fit-other.img"]);
        // As it was: it goes on, and has written then.
        let machine = Machine::start("fit-again", &[Path::new("--from"), &snapshot], &[&with]);
        machine.wait_for_lines(10);
        machine.stop();
        refused(&[&with], &["state of disk0", "changed since", "changed=accept"]);
        fs::copy(&late, &other).unwrap();
        refused(&[&disk(&other, "")], &["state of disk0", "changed since", "cp -p"]);
        let machine =
            Machine::start("fit-accepted", &[Path::new("--from"), &snapshot], &[&disk(&other, ",changed=accept")]);
        machine.wait_for_lines(10);
        machine.stop();
        let mut start = [0; 4];
        File::open(&path).unwrap().read_exact(&mut start).unwrap();
        let qemu_img = Command::new("qemu-img").arg("--version").output();
        if qemu_img.is_ok_and(|out| out.status.success()) {
            qcow2(&folder().join("fit.qcow2"));
        }
    })
}

/// A qcow2 image: what imago keeps in memory is in the file when the snapshot is made.
fn qcow2(path: &Path) {
    let made = Command::new("qemu-img").args(["create", "-q", "-f", "qcow2"]).arg(path).arg("512k").status();
    assert!(made.unwrap().success());
    let given = disk(path, "");
    let options: Vec<&str> = DEVICES.into_iter().chain([given.as_str()]).collect();
    let machine = Machine::boot("qcow2", guests::write_sectors(), &options);
    let snapshot = folder().join("qcow2");
    machine.answer(&["pause"]);
    machine.snapshot(&snapshot);
    let copy = folder().join("qcow2-copy.qcow2");
    copy_with_times(path, &copy);
    let before = machine.output();
    machine.stop();
    // What the end of the machine writes to its image is nothing.
    let machine = Machine::start("qcow2-same", &[Path::new("--from"), &snapshot], &[&given]);
    machine.wait_for_lines(10);
    machine.stop();
    let raw = folder().join("qcow2.raw");
    let convert = || Command::new("qemu-img").args(["convert", "-O", "raw"]).arg(&copy).arg(&raw).status().unwrap();
    assert!(convert().success());
    check_disk(&raw, rounds(&before));
    let machine = Machine::start("qcow2-on", &[Path::new("--from"), &snapshot], &[&disk(&copy, "")]);
    machine.wait_for_lines(10);
    machine.answer(&["pause"]);
    let all = [&before[..], &machine.output()].concat();
    check_sequence(&[&all]);
    machine.stop();
    assert!(convert().success());
    check_disk(&raw, rounds(&all));
}
