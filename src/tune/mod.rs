//! Levers: what makes a guest exit less, each a switch with a name (`--tune`). This room is plain data: which levers there
//! are, and what was asked for. What a host can do of it, the machine finds out when it uses a lever; what each is worth
//! is measured by scripts/ablation (README.md beside this file, and [`measured`]).

mod table;

pub use table::{Group, Lever};

use std::fmt::Write as _;
use thiserror::Error;

/// What is asked of a lever.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Choice {
    /// Its default.
    #[default]
    Auto,
    /// Use it; a warning where this host cannot.
    On,
    /// Leave it.
    Off,
    /// Use it for so many microseconds (levers that are times).
    Micros(u32),
}

/// A list of levers that cannot be read.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum TuneError {
    /// No `=`.
    #[error("'{0}' is not name=on, name=off or name=auto; `--tune help` lists the names")]
    NoValue(String),
    /// No such lever.
    #[error("there is no lever '{0}'; `--tune help` lists them")]
    Unknown(String),
    /// Not a value that this lever takes.
    #[error("{name} is on, off or auto{}, not '{value}'", if *.micros { ", or a number of microseconds up to 100000" } else { "" })]
    Value {
        /// The lever.
        name: String,
        /// What was given.
        value: String,
        /// Whether it is a time.
        micros: bool,
    },
}

/// The longest time that a lever can be set to, in microseconds.
const MAX_MICROS: u32 = 100_000;

/// What was asked of all levers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tune {
    choices: [Choice; Lever::COUNT],
}

impl Default for Tune {
    fn default() -> Self {
        Self { choices: [Choice::Auto; Lever::COUNT] }
    }
}

impl Tune {
    /// Reads `name=on|off|auto|US,...` on top of what is there; `all` is every lever (`all=on`: those whose default is
    /// on).
    ///
    /// # Errors
    /// [`TuneError`].
    pub fn set(&mut self, text: &str) -> Result<(), TuneError> {
        for item in text.split(',').filter(|item| !item.is_empty()) {
            let (name, value) = item.split_once('=').ok_or_else(|| TuneError::NoValue(item.to_owned()))?;
            if name == "all" {
                let choice = parse(name, value, false)?;
                for lever in Lever::ALL {
                    if choice != Choice::On || lever.is_default_on() {
                        self.choices[lever.index()] = choice;
                    }
                }
                continue;
            }
            let lever = Lever::by_name(name).ok_or_else(|| TuneError::Unknown(name.to_owned()))?;
            self.choices[lever.index()] = parse(name, value, lever.is_time())?;
        }
        Ok(())
    }

    /// What was asked of `lever`.
    #[must_use]
    pub fn choice(&self, lever: Lever) -> Choice {
        self.choices[lever.index()]
    }

    /// Whether `lever` is to be used, where this host can.
    #[must_use]
    pub fn wants(&self, lever: Lever) -> bool {
        match self.choice(lever) {
            Choice::Auto => lever.is_default_on(),
            Choice::On | Choice::Micros(_) => true,
            Choice::Off => false,
        }
    }

    /// Says that this host cannot do `lever`: one line, loud only where the lever was asked for by name.
    pub fn cannot(&self, lever: Lever, why: &str) {
        let level = if self.choice(lever) == Choice::On { log::Level::Warn } else { log::Level::Info };
        log::log!(level, "lever {}: {why}; {}", lever.name(), lever.without());
    }

    /// The levers that differ from their defaults, for a profile's header; empty where none does.
    #[must_use]
    pub fn describe(&self) -> String {
        let mut text = String::new();
        for lever in Lever::ALL {
            let value = match self.choice(lever) {
                Choice::Auto => continue,
                Choice::On => "on".to_owned(),
                Choice::Off => "off".to_owned(),
                Choice::Micros(micros) => micros.to_string(),
            };
            // Writing to a String cannot fail.
            let _ = write!(text, "{}{}={value}", if text.is_empty() { "" } else { "," }, lever.name());
        }
        text
    }
}

fn parse(name: &str, value: &str, micros: bool) -> Result<Choice, TuneError> {
    let error = || TuneError::Value { name: name.to_owned(), value: value.to_owned(), micros };
    Ok(match value {
        "auto" => Choice::Auto,
        "on" => Choice::On,
        "off" => Choice::Off,
        number if micros => {
            Choice::Micros(number.parse().ok().filter(|us| (1..=MAX_MICROS).contains(us)).ok_or_else(error)?)
        }
        _ => return Err(error()),
    })
}

/// What scripts/ablation measured of each lever: `name,VM exits more without it,userspace exits more without it`, behind
/// a line that says when and on what.
const MEASURED: &str = include_str!("measured.csv");

/// What the boot of scripts/ablation makes more, without `lever`: VM exits other than host interrupts and timer writes,
/// and userspace exits. `None` where it was not measured.
#[must_use]
pub fn measured(lever: Lever) -> Option<(i64, i64)> {
    let line = MEASURED.lines().find_map(|line| line.strip_prefix(lever.name())?.strip_prefix(','))?;
    let (vm, userspace) = line.split_once(',')?;
    Some((vm.trim().parse().ok()?, userspace.trim().parse().ok()?))
}

/// When and on what the levers were measured.
#[must_use]
pub fn measured_on() -> &'static str {
    MEASURED.lines().next().and_then(|line| line.strip_prefix("# ")).unwrap_or("not measured yet")
}

/// All levers, for `--tune help`.
#[must_use]
pub fn help() -> String {
    let mut text = String::from("Levers (--tune NAME=on|off|auto,...; all=off is the naive VMM):\n");
    let mut group = None;
    for lever in Lever::ALL {
        if group.replace(lever.group()) != Some(lever.group()) {
            let _ = writeln!(text, "\n{}:", lever.group().title());
        }
        let default = if lever.is_default_on() { "on" } else { "off" };
        let effect = match measured(lever) {
            Some((vm, userspace)) => format!("; without it {vm:+} VM exits, {userspace:+} userspace exits"),
            None => String::new(),
        };
        let _ = writeln!(text, "  {:<18} [{default}{effect}]", lever.name());
        let _ = writeln!(text, "      {}.\n      Else: {}.", lever.what(), lever.without());
    }
    let _ = writeln!(text, "\nMeasured with scripts/ablation: {}.", measured_on());
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_found() {
        for lever in Lever::ALL {
            assert_eq!(Lever::by_name(lever.name()), Some(lever), "{}", lever.name());
            assert!(lever.name() != "all" && lever.name() != "help");
            assert!(help().contains(lever.name()));
        }
    }

    #[test]
    fn later_words_win_and_all_leaves_what_is_off_by_default() {
        let mut tune = Tune::default();
        assert!(tune.wants(Lever::UartCount) && !tune.wants(Lever::DisableHlt));
        tune.set("all=off,halt-poll=30").expect("valid");
        assert!(!tune.wants(Lever::UartCount));
        assert_eq!(tune.choice(Lever::HaltPoll), Choice::Micros(30));
        tune.set("all=on").expect("valid");
        assert!(tune.wants(Lever::UartCount) && !tune.wants(Lever::DisableHlt));
        tune.set("all=auto,disable-hlt=on").expect("valid");
        assert_eq!(tune.describe(), "disable-hlt=on");
    }

    #[test]
    fn errors_name_what_is_wrong() {
        let error = |text: &str| Tune::default().set(text).expect_err("an error").to_string();
        assert!(error("pci-probing").contains("--tune help"));
        assert!(error("no-pic=on").contains("'no-pic'"));
        assert!(error("pci-probing=30").contains("'30'"));
        assert!(error("halt-poll=0").contains("microseconds"));
        assert!(error("halt-poll=100001").contains("100000"));
    }
}
