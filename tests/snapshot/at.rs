//! Runs that save their machine by themselves (`--snapshot-at`).

use super::harness::{Outcome, folder, hwvmm, text};
use super::numbers::number as number_of;
use super::{Machine, guests, names, with_kvm};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Output;

/// Runs `guest`, which is to save itself to the folder that is returned, at `moment`.
fn save(name: &str, guest: &[u8], moment: &str, options: &[&str]) -> (PathBuf, Output, Vec<u8>) {
    let [kernel, snapshot, console] = ["elf", "snap", "out"].map(|end| folder().join(format!("{name}.{end}")));
    fs::write(&kernel, guests::multiboot(guest)).expect("written");
    let out = hwvmm()
        .args(["run", "--timeout", "30s", "-m", "32M", "--snapshot-at"])
        .arg(format!("{moment},dir={}", snapshot.display()))
        .arg(format!("--serial=1=file:{}", console.display()))
        .args(options)
        .arg(kernel)
        .output()
        .expect("started");
    let output = fs::read(console).unwrap_or_default();
    (snapshot, out, output)
}

/// Half snapshots that these tests have left.
fn partial() -> Vec<String> {
    names(folder()).into_iter().filter(|name| name.starts_with("at-") && name.contains(".partial-")).collect()
}

/// Both outputs together are one sequence of numbers.
fn check_goes_on(name: &str, snapshot: &Path, before: &[u8]) {
    let machine = Machine::start(name, &[Path::new("--from"), snapshot], &[]);
    machine.wait_for_lines(4);
    let both = text(&[before, &machine.output()].concat());
    machine.stop();
    let lines: Vec<&str> = both.lines().skip(1).collect();
    for (number, line) in (1_u32..).zip(&lines[..lines.len() - 1]) {
        assert_eq!((line.len(), number_of(line)), (8, number), "{both}");
    }
}

pub(crate) fn a_run_saves_itself_at_a_mark_or_a_line() -> Outcome {
    with_kvm(|| {
        for (name, moment) in [("at-mark", "mark=5"), ("at-line", "expect=^0000000[5-9]$")] {
            let (snapshot, out, before) = save(name, guests::touch(), moment, &[]);
            assert_eq!(out.status.code(), Some(0), "{}", text(&out.stderr));
            assert!(text(&out.stderr).contains("the guest was saved"), "{}", text(&out.stderr));
            assert_eq!(names(&snapshot), ["machine.json", "memory", "state"]);
            let lines = text(&before).lines().count();
            assert!((5..10_000).contains(&lines), "{lines} lines until the snapshot");
            check_goes_on(&format!("{name}-restored"), &snapshot, &before);
        }
        assert_eq!(partial(), Vec::<String>::new());
    })
}

pub(crate) fn a_run_that_cannot_save_itself_says_why() -> Outcome {
    with_kvm(|| {
        let shared = folder().join("at-shared");
        fs::create_dir(&shared).expect("made");
        let share = format!("tag=s,path={}", shared.display());
        let (snapshot, out, _) = save("at-end", guests::power_off(), "mark=5", &[]);
        assert_eq!(out.status.code(), Some(38), "{}", text(&out.stderr));
        assert!(text(&out.stderr).contains("powered off, and was not saved"), "{}", text(&out.stderr));
        assert!(!snapshot.exists());
        let (snapshot, out, _) = save("at-share", guests::touch(), "mark=5", &["--share", &share]);
        assert_eq!(out.status.code(), Some(42), "{}", text(&out.stderr));
        assert!(text(&out.stderr).contains("--share"), "{}", text(&out.stderr));
        assert!(!snapshot.exists());
        fs::create_dir(&snapshot).expect("made");
        let (_, out, _) = save("at-share", guests::touch(), "mark=5", &[]);
        assert_eq!(out.status.code(), Some(42), "{}", text(&out.stderr));
        assert!(text(&out.stderr).contains("exists: name a folder that does not"), "{}", text(&out.stderr));
        let (_, out, _) = save("at-expect", guests::touch(), "mark=5", &["--expect", "x"]);
        assert_eq!(out.status.code(), Some(2), "{}", text(&out.stderr));
        assert_eq!(partial(), Vec::<String>::new());
    })
}
