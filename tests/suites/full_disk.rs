//! Results on a file system that is full, or becomes so: nothing that cannot be kept has passed.

use super::harness::{Outcome, text};
use super::{Suite, guests, suite, when_it_runs};
use serde_json::Value;
use std::fs;
use std::os::unix::process::CommandExt;
use std::process::{Command, Output};

/// Runs the suite with its results on a tmpfs of `bytes`, in a mount namespace of its own. On stdout is what hwvmm printed, and behind it
/// the results that it could write.
fn on_tmpfs(suite: &Suite, bytes: &str) -> Output {
    let hwvmm = suite.command(&["-o", "full/results"]);
    let mut unshare = Command::new("unshare");
    unshare.args(["--mount", "--map-root-user", "sh", "-c"]).arg(format!(
        "mount -t tmpfs -o size={bytes} none full || exit 99
         \"$@\"
         status=$?
         cat full/results/results.jsonl
         exit $status"
    ));
    unshare.arg("sh").arg(hwvmm.get_program()).args(hwvmm.get_args()).current_dir(suite.path());
    for (name, value) in hwvmm.get_envs() {
        match value {
            Some(value) => unshare.env(name, value),
            None => unshare.env_remove(name),
        };
    }
    fs::create_dir(suite.path().join("full")).unwrap();
    unshare.process_group(0).stdin(std::process::Stdio::null()).output().unwrap()
}

/// The verdict of the only test, where it could be written.
fn verdict(out: &Output) -> Option<Value> {
    let text = text(&out.stdout);
    let lines = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    lines.into_iter().find(|line| line["type"] == "result").map(|line| line["verdict"].clone())
}

fn can_mount() -> Result<(), String> {
    let mut unshare = Command::new("unshare");
    unshare.args(["--mount", "--map-root-user", "mount", "-t", "tmpfs", "none", "/mnt"]);
    match unshare.output() {
        Ok(out) if out.status.success() => Ok(()),
        Ok(out) => Err(format!("no tmpfs can be mounted: {}", text(&out.stderr).trim_end())),
        Err(error) => Err(format!("no unshare(1): {error}")),
    }
}

pub(super) fn no_space_for_results_is_no_success() -> Outcome {
    if let Err(why) = can_mount() {
        return Outcome::Skipped(why);
    }
    when_it_runs(|| {
        for (bytes, guest, kept, words) in [
            // The try's own files: the first takes the only page.
            ("4k", "off", None, "No space left on device"),
            // The guest passes, and the reports do not fit.
            ("24k", "off", Some("pass"), "cannot write"),
            // The console is 200,000 bytes.
            ("100k", "flood", Some("infrastructure"), "No space left on device"),
        ] {
            let suite = suite(&[(guest, "")]);
            fs::write(suite.path().join("flood"), guests::multiboot(guests::flood())).unwrap();
            let out = on_tmpfs(&suite, bytes);
            let said = text(&out.stdout) + &text(&out.stderr);
            assert_eq!(out.status.code(), Some(42), "{bytes}: {said}");
            assert!(said.contains(words), "{bytes}: {said}");
            if let Some(kept) = kept {
                assert_eq!(verdict(&out), Some(kept.into()), "{bytes}: {said}");
            }
        }
        let suite = suite(&[("flood", "")]);
        fs::write(suite.path().join("flood"), guests::multiboot(guests::flood())).unwrap();
        let out = on_tmpfs(&suite, "4m");
        assert_eq!((out.status.code(), verdict(&out)), (Some(0), Some("pass".into())), "there is room");
    })
}
