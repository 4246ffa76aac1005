//! Tests whose guests do not boot (`template = true`): a guest with their kernel and options boots once, is saved when its agent waits for
//! a command (`hwvmm run --template`), and each test goes on from there (`hwvmm run --from`).

use super::options::{StdoutOf, TIMEOUT, path_value, run_options, with_log_level};
use super::problem::Problem;
use std::path::Path;
use toml::{Table, Value};

/// Options of a test's own run, in which tests with one template may differ.
const OF_RUN: &[&str] =
    &["command", "env", "workdir", "user", "timeout", "expect", "profile", "budget", "budget-from", "slack", "symbols"];
/// Options of both the boot and the runs.
const OF_BOTH: &[&str] =
    &["root", "console", "serial", "boot-timeout", "sandbox", "kvm", "mmu", "require", "tune", "trap-msrs"];
/// Options of devices that each run would need for itself.
const REFUSED: &[&str] = &["rw", "share", "net", "vsock", "disk", "seed", "kernel-from", "entry"];
/// A path that stands for that of the snapshot where options are checked.
const SOME_PATH: &str = "template";

/// The guest that a test goes on from.
#[derive(Clone, Debug, PartialEq)]
pub struct Template {
    /// The options of the boot. Tests that have the same, and the same folder, share it.
    pub(super) boot: Table,
    /// The options of the test's run.
    run: Table,
}

impl Template {
    /// Divides the options of a test that runs a command.
    ///
    /// # Errors
    /// [`Problem`] where they are not for a guest that goes on from a template.
    pub(super) fn of(options: &Table) -> Result<Self, Problem> {
        if let Some(key) = REFUSED.iter().find(|key| options.contains_key(**key)) {
            return Err(Problem::Contradiction(key, "cannot be given with `template`: each test would need its own"));
        }
        let (mut boot, mut run) = (Table::new(), Table::new());
        for (key, value) in with_log_level(options.clone(), StdoutOf::Command) {
            let (of_run, of_both) = (OF_RUN.contains(&key.as_str()), OF_BOTH.contains(&key.as_str()));
            if !of_run {
                boot.insert(key.clone(), value.clone());
            }
            if of_run || of_both {
                run.insert(key, value);
            }
        }
        boot.insert("timeout".into(), Value::String(TIMEOUT.into()));
        let template = Self { boot, run };
        for options in [template.options_of_boot(Path::new(SOME_PATH)), template.options_of_run(Path::new(SOME_PATH))] {
            run_options(&options)?.into_config().map_err(Problem::Options)?;
        }
        Ok(template)
    }

    /// The options of the boot, which saves the guest at `snapshot`.
    pub(super) fn options_of_boot(&self, snapshot: &Path) -> Table {
        with_path(&self.boot, "template", snapshot)
    }

    /// The options of the test's run from `snapshot`.
    pub(super) fn options_of_run(&self, snapshot: &Path) -> Table {
        with_path(&self.run, "from", snapshot)
    }
}

fn with_path(options: &Table, key: &str, path: &Path) -> Table {
    let mut options = options.clone();
    options.insert(key.into(), path_value(path));
    options
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(text: &str) -> Result<Template, Problem> {
        Template::of(&text.parse().expect("TOML"))
    }

    #[test]
    fn what_tests_may_differ_in_is_not_of_the_boot() {
        let common = "kernel = 'k'\nmemory = '256M'\nroot = '/srv'\n";
        let one = of(&format!("{common}command = ['a']\ntimeout = '5s'\nenv = ['A=1']")).expect("a template");
        let two =
            of(&format!("{common}command = ['b']\nuser = '5'\nworkdir = '/'\nprofile = 'user'")).expect("a template");
        assert_eq!(one.boot, two.boot);
        assert_eq!(one.boot.get("timeout").and_then(Value::as_str), Some(TIMEOUT), "the boot has its own time-out");
        assert_ne!(
            one.boot,
            of("kernel = 'k'\nmemory = '512M'\nroot = '/srv'\ncommand = ['a']").expect("a template").boot
        );
        let run = two.options_of_run(Path::new("/s"));
        let keys: Vec<&str> = run.keys().map(String::as_str).collect();
        assert_eq!(keys, ["command", "from", "profile", "root", "user", "workdir"]);
    }

    #[test]
    fn what_cannot_be_saved_is_refused() {
        let refused = |text: &str| of(text).expect_err("refused").to_string();
        assert!(refused("kernel = 'k'\ncommand = ['a']\nrw = ['/srv']").contains("rw cannot be given with `template`"));
        assert!(refused("kernel-from = 'k'\ncommand = ['a']").contains("kernel-from"));
        let initrd = refused("kernel = 'k'\ncommand = ['a']\ninitrd = 'i'");
        assert!(initrd.contains("--initrd"), "{initrd}");
    }
}
