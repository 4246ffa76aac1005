//! Levers: measures against VM exits, each a switch with a name (`--tune`). This module is plain data: the table of levers, and
//! the settings. The machine finds out what the host supports when it uses a lever. scripts/ablation measures what each lever
//! saves (README.md beside this file, and [`measured`]).

mod table;

pub use table::{Group, Lever, ValueKind};

use std::fmt::Write as _;
use thiserror::Error;

/// The setting of a lever.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Choice {
    /// The lever is used if it is on by default and this host supports it ([`Lever::is_default_on`]).
    #[default]
    Auto,
    /// The lever is used; a warning is logged where this host does not support it.
    On,
    /// The lever is not used.
    Off,
    /// The lever is used where it gains time. Only levers that are judged while the guest runs have this setting.
    Gain,
    /// The lever is used for this many microseconds. Only levers that are times have this setting.
    Micros(u32),
}

/// Why a list of levers is invalid.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum TuneError {
    /// An item has no `=`.
    #[error("'{0}' is not name=on, name=off or name=auto; `--tune help` lists the names")]
    NoValue(String),
    /// There is no lever with this name.
    #[error("there is no lever '{0}'; `--tune help` lists them")]
    Unknown(String),
    /// The lever does not have this setting.
    #[error("{name} is on, off or auto{}, not '{value}'", .kind.more())]
    Value {
        /// The name of the lever.
        name: String,
        /// The value that was given.
        value: String,
        /// The values that the lever takes.
        kind: ValueKind,
    },
}

/// The longest time that a lever can be set to, in microseconds.
const MAX_MICROS: u32 = 100_000;

/// The settings of all levers.
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
    /// Applies a list `name=on|off|auto|gain|US,...` to the settings. The name `all` means every lever; `all=on` those whose default
    /// is on for every guest.
    ///
    /// # Errors
    /// [`TuneError`].
    pub fn set(&mut self, text: &str) -> Result<(), TuneError> {
        for item in text.split(',').filter(|item| !item.is_empty()) {
            let (name, value) = item.split_once('=').ok_or_else(|| TuneError::NoValue(item.to_owned()))?;
            if name == "all" {
                let choice = parse(name, value, ValueKind::Switch)?;
                for lever in Lever::ALL {
                    if choice != Choice::On || lever.is_default_on() && lever.value_kind() != ValueKind::Gain {
                        self.choices[lever.index()] = choice;
                    }
                }
                continue;
            }
            let lever = Lever::by_name(name).ok_or_else(|| TuneError::Unknown(name.to_owned()))?;
            self.choices[lever.index()] = parse(name, value, lever.value_kind())?;
        }
        Ok(())
    }

    /// The setting of `lever`.
    #[must_use]
    pub fn choice(&self, lever: Lever) -> Choice {
        self.choices[lever.index()]
    }

    /// Returns true if `lever` is to be used, where this host supports it.
    #[must_use]
    pub fn wants(&self, lever: Lever) -> bool {
        match self.choice(lever) {
            Choice::Auto => lever.is_default_on(),
            Choice::On | Choice::Gain | Choice::Micros(_) => true,
            Choice::Off => false,
        }
    }

    /// Logs that this host does not support `lever`: a warning where the lever was set to `on`, otherwise an information.
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
                Choice::Gain => "gain".to_owned(),
                Choice::Micros(micros) => micros.to_string(),
            };
            // Writing to a String cannot fail.
            let _ = write!(text, "{}{}={value}", if text.is_empty() { "" } else { "," }, lever.name());
        }
        text
    }
}

fn parse(name: &str, value: &str, kind: ValueKind) -> Result<Choice, TuneError> {
    let error = || TuneError::Value { name: name.to_owned(), value: value.to_owned(), kind };
    Ok(match value {
        "auto" => Choice::Auto,
        "on" => Choice::On,
        "off" => Choice::Off,
        "gain" if kind == ValueKind::Gain => Choice::Gain,
        number if kind == ValueKind::Time => {
            Choice::Micros(number.parse().ok().filter(|us| (1..=MAX_MICROS).contains(us)).ok_or_else(error)?)
        }
        _ => return Err(error()),
    })
}

/// The results of scripts/ablation: a line with date and machine, then a line `NAME,VM EXITS,USERSPACE EXITS` for each lever: the
/// exits that a boot makes more without it.
const MEASURED: &str = include_str!("measured.csv");

/// The exits that a boot makes more without a lever.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SavedExits {
    /// VM exits, without host interrupts and timer writes.
    pub vm: i64,
    /// Userspace exits: those that KVM passes on to hwvmm.
    pub userspace: i64,
}

/// What the boot of scripts/ablation makes more without `lever`. `None` where that was not measured.
#[must_use]
pub fn measured(lever: Lever) -> Option<SavedExits> {
    let line = MEASURED.lines().find_map(|line| line.strip_prefix(lever.name())?.strip_prefix(','))?;
    let (vm, userspace) = line.split_once(',')?;
    Some(SavedExits { vm: vm.trim().parse().ok()?, userspace: userspace.trim().parse().ok()? })
}

/// The date and the machine of the measurements.
#[must_use]
pub fn measured_on() -> &'static str {
    MEASURED.lines().next().and_then(|line| line.strip_prefix("# ")).unwrap_or("not measured yet")
}

/// The text of `--tune help`: all levers.
#[must_use]
pub fn help() -> String {
    let mut text = String::from(
        "Levers: --tune NAME=on|off|auto,...\nA lever that the host does not support is left out, with a message. all=off turns \
         all levers off.\n",
    );
    let mut group = None;
    for lever in Lever::ALL {
        if group.replace(lever.group()) != Some(lever.group()) {
            let _ = writeln!(text, "\n{}:", lever.group().title());
        }
        let default = if lever.is_default_on() { "on" } else { "off" };
        let effect = match measured(lever) {
            Some(SavedExits { vm, userspace }) => {
                format!("; without it {vm:+} VM exits, {userspace:+} userspace exits")
            }
            None => String::new(),
        };
        let _ = writeln!(text, "  {:<18} [{default}{effect}]", lever.name());
        wrap(&mut text, &format!("{}.", lever.what()));
        wrap(&mut text, &format!("Without it {}.", lever.without()));
    }
    let _ = writeln!(text, "\nExits of a Linux boot, measured by scripts/ablation:\n{}.", measured_on());
    text
}

/// Adds a paragraph in lines of at most 100 columns.
fn wrap(text: &mut String, paragraph: &str) {
    const INDENT: &str = "      ";
    const COLUMNS: usize = 100;
    let mut line = String::from(INDENT);
    for word in paragraph.split_whitespace() {
        if line.len() + word.len() >= COLUMNS {
            text.push_str(line.trim_end());
            text.push('\n');
            INDENT.clone_into(&mut line);
        }
        line.push_str(word);
        line.push(' ');
    }
    text.push_str(line.trim_end());
    text.push('\n');
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
    fn the_help_fits_a_terminal_and_has_whole_sentences() {
        assert!(help().lines().all(|line| line.chars().count() <= 100));
        for lever in Lever::ALL {
            let (what, without) = (lever.what(), lever.without());
            assert!(!what.ends_with('.') && !without.ends_with('.'), "{}", lever.name());
        }
    }

    #[test]
    fn later_settings_win_and_all_on_leaves_levers_that_are_off_by_default() {
        let mut tune = Tune::default();
        assert!(tune.wants(Lever::UartCount) && !tune.wants(Lever::DisableHlt));
        tune.set("all=off,halt-poll=30").expect("valid");
        assert!(!tune.wants(Lever::UartCount));
        assert_eq!(tune.choice(Lever::HaltPoll), Choice::Micros(30));
        tune.set("all=on").expect("valid");
        assert!(tune.wants(Lever::UartCount) && !tune.wants(Lever::DisableHlt));
        assert_eq!(tune.choice(Lever::ExitClusters), Choice::Off, "as all=off had it: not for every guest");
        tune.set("all=auto,disable-hlt=on").expect("valid");
        assert_eq!(tune.describe(), "disable-hlt=on");
        tune.set("disable-hlt=auto,exit-clusters=gain").expect("valid");
        assert_eq!((tune.describe().as_str(), tune.wants(Lever::ExitClusters)), ("exit-clusters=gain", true));
    }

    #[test]
    fn errors_name_the_lever_and_the_value() {
        let error = |text: &str| Tune::default().set(text).expect_err("an error").to_string();
        assert!(error("pci-probing").contains("--tune help"));
        assert!(error("no-pic=on").contains("'no-pic'"));
        assert!(error("pci-probing=30").contains("'30'"));
        assert!(error("halt-poll=0").contains("microseconds"));
        assert!(error("halt-poll=gain").contains("microseconds") && !error("uart-count=gain").contains("or gain"));
        assert!(error("exit-clusters=30").contains("or gain"));
        assert!(error("halt-poll=100001").contains("100000"));
    }
}
