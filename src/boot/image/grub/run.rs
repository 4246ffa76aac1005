//! Runs a grub.cfg as far as its menu needs: variables, conditions, where files are searched, and the entries.

use super::super::bls::BlsEntry;
use super::super::menu::{Entry, MAX_ENTRIES, Menu};
use super::syntax::{Statement, SyntaxError, parse};
use super::variables::Variables;

/// The most commands that are run. Every command of a script runs once, and those of an entry when it is read.
const MAX_COMMANDS: usize = 100_000;
/// The most bytes that the words of all commands have, with the values of their variables.
const MAX_WORD_BYTES: usize = 16 << 20;
/// Options of `menuentry` and `submenu` that have a value.
const WITH_VALUE: [&str; 4] = ["--class", "--users", "--hotkey", "--source"];

/// What a file system is searched by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum By {
    /// Its UUID.
    Uuid,
    /// Its label.
    Label,
    /// A file on it.
    File,
}

/// The file systems that a script sees.
pub(crate) trait Volumes {
    /// The name of the device with the file system that is searched.
    fn search(&self, by: By, what: &str) -> Option<String>;
    /// Returns true if there is something at `path` on `device`.
    fn exists(&self, device: &str, path: &str) -> bool;
    /// The entries of the Boot Loader Specification on `device`.
    fn bls(&self, device: &str, expand: &dyn Fn(&str) -> String) -> Vec<BlsEntry>;
}

/// A grub.cfg and where it was found.
pub(crate) struct Config<'a> {
    /// Its text.
    pub text: &'a str,
    /// The text of the file grubenv beside it; empty where there is none.
    pub environment: &'a str,
    /// The device that it is on.
    pub device: &'a str,
    /// The folder that it is in.
    pub folder: &'a str,
}

/// Reads the menu of a grub.cfg.
///
/// # Errors
/// [`SyntaxError`].
pub(crate) fn menu(config: &Config<'_>, volumes: &dyn Volumes) -> Result<Menu, SyntaxError> {
    let statements = parse(config.text)?;
    let mut variables = Variables::default();
    variables.set("root", config.device);
    variables.set("prefix", &format!("({}){}", config.device, config.folder));
    variables.set("grub_platform", "pc");
    variables.set("grub_cpu", "x86_64");
    let mut run = Run {
        config,
        volumes,
        variables,
        left: MAX_COMMANDS,
        left_bytes: MAX_WORD_BYTES,
        entries: Vec::new(),
        pending: Vec::new(),
    };
    run.list(&statements, &mut Level::default());
    // GRUB runs the commands of an entry when it is chosen: after the rest of the script.
    let (variables, pending) = (run.variables.clone(), std::mem::take(&mut run.pending));
    for (index, block) in pending {
        run.variables = variables.clone();
        let mut level = Level { entry: run.entries.get(index).cloned(), ..Level::default() };
        run.list(block, &mut level);
        if let (Some(place), Some(entry)) = (run.entries.get_mut(index), level.entry) {
            *place = entry;
        }
    }
    Ok(Menu { entries: run.entries, default: variables.get("default").to_owned() })
}

/// The menu that commands add to, or the entry that they are in.
#[derive(Default)]
struct Level {
    /// Of the submenu; empty at the top.
    numbers: Vec<usize>,
    titles: Vec<String>,
    /// How many entries and submenus it has.
    count: usize,
    /// The entry whose commands are run.
    entry: Option<Entry>,
}

struct Run<'a, 's> {
    config: &'a Config<'a>,
    volumes: &'a dyn Volumes,
    variables: Variables,
    left: usize,
    /// The bytes that words may still have with the values of their variables.
    left_bytes: usize,
    entries: Vec<Entry>,
    /// Entries whose commands have yet to be run: their index and their commands.
    pending: Vec<(usize, &'s [Statement])>,
}

impl<'s> Run<'_, 's> {
    /// Runs statements. Returns whether the last of them succeeded.
    fn list(&mut self, statements: &'s [Statement], level: &mut Level) -> bool {
        let mut success = true;
        for statement in statements {
            let Some(left) = self.left.checked_sub(1) else { return false };
            self.left = left;
            success = match statement {
                Statement::Command { words, block } => {
                    let words = self.variables.expand(words, &mut self.left_bytes);
                    self.command(&words, block.as_deref(), level)
                }
                Statement::If { branches, otherwise } => {
                    let holds = branches.iter().find(|(condition, _)| self.list(condition, level));
                    self.list(holds.map_or(otherwise, |(_, branch)| branch), level)
                }
            };
        }
        success
    }

    fn command(&mut self, words: &[String], block: Option<&'s [Statement]>, level: &mut Level) -> bool {
        let Some((name, arguments)) = words.split_first() else { return true };
        let first = arguments.first().map_or("", String::as_str);
        match (name.as_str(), block) {
            ("menuentry" | "submenu", Some(block)) => self.entry(name == "submenu", arguments, block, level),
            ("[" | "test", _) => {
                let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
                self.test(words.strip_suffix(&["]"]).unwrap_or(&words))
            }
            ("!", _) => !self.command(arguments, None, level),
            ("set", _) => first.split_once('=').is_none_or(|(name, value)| {
                self.variables.set(name, value);
                true
            }),
            ("unset", _) => {
                self.variables.set(first, "");
                true
            }
            ("load_env", _) => {
                self.variables.load(self.config.environment);
                true
            }
            ("search" | "search.fs_uuid" | "search.fs_label" | "search.file", _) => self.search(name, arguments),
            ("blscfg", _) => self.bls(level),
            ("true" | "insmod" | "export", _) => true,
            ("linux" | "linux16" | "linuxefi", _) => level.entry.as_mut().is_some_and(|entry| {
                entry.kernel = Some(first.to_owned());
                entry.cmdline = arguments.iter().skip(1).map(|word| parameter(word)).collect::<Vec<_>>().join(" ");
                entry.device = self.variables.get("root").to_owned();
                true
            }),
            ("initrd" | "initrd16" | "initrdefi", _) => level.entry.as_mut().is_some_and(|entry| {
                entry.initrds = arguments.to_vec();
                true
            }),
            (name, _) => match name.split_once('=') {
                Some((name, value)) if !name.is_empty() && !name.contains(['/', '-']) => {
                    self.variables.set(name, value);
                    true
                }
                _ => false,
            },
        }
    }

    /// Adds an entry, or those of a submenu.
    fn entry(&mut self, is_submenu: bool, arguments: &[String], block: &'s [Statement], level: &mut Level) -> bool {
        let (mut title, mut id) = (None, String::new());
        let mut words = arguments.iter();
        while let Some(word) = words.next() {
            match word.as_str() {
                "--id" => id = words.next().cloned().unwrap_or_default(),
                with_value if WITH_VALUE.contains(&with_value) => {
                    words.next();
                }
                option if option.starts_with("--") => {
                    id = option.strip_prefix("--id=").map_or(id, str::to_owned);
                }
                text => title = title.or(Some(text)),
            }
        }
        let number = level.count;
        level.count += 1;
        let with = |before: &[String], title: &str| [before, &[title.to_owned()]].concat();
        let titles = with(&level.titles, title.unwrap_or_default());
        let numbers = [level.numbers.as_slice(), &[number]].concat();
        if is_submenu {
            let before = self.variables.clone();
            self.list(block, &mut Level { numbers, titles, ..Level::default() });
            self.variables = before;
        } else if self.entries.len() < MAX_ENTRIES {
            self.pending.push((self.entries.len(), block));
            self.entries.push(Entry { numbers, titles, id, ..Entry::default() });
        }
        true
    }

    fn bls(&mut self, level: &mut Level) -> bool {
        let device = self.variables.get("root").to_owned();
        let found = self.volumes.bls(&device, &|text| self.variables.expand_text(text));
        for entry in found {
            if self.entries.len() < MAX_ENTRIES {
                self.entries.push(entry.into_entry(level.count, &device));
                level.count += 1;
            }
        }
        true
    }

    /// Sets a variable to the device with a file system.
    fn search(&mut self, name: &str, arguments: &[String]) -> bool {
        let mut by = match name {
            "search.fs_uuid" => By::Uuid,
            "search.fs_label" => By::Label,
            _ => By::File,
        };
        let (mut variable, mut positional) = (None, Vec::new());
        let mut words = arguments.iter();
        while let Some(word) = words.next() {
            match word.as_str() {
                "-u" | "--fs-uuid" => by = By::Uuid,
                "-l" | "--label" | "--fs-label" => by = By::Label,
                "-f" | "--file" => by = By::File,
                "-s" | "--set" => variable = words.next().map(String::as_str),
                "--hint" => {
                    words.next();
                }
                option if option.starts_with("--set=") => variable = option.strip_prefix("--set="),
                option if option.starts_with('-') => {}
                what => positional.push(what),
            }
        }
        // `search.fs_uuid UUID VARIABLE`
        if name != "search" {
            variable = variable.or(positional.get(1).copied());
        }
        let found = positional.first().and_then(|what| self.volumes.search(by, what));
        if let Some(device) = &found {
            self.variables.set(variable.unwrap_or("root"), device);
        }
        found.is_some()
    }

    /// The command `[`.
    fn test(&self, words: &[&str]) -> bool {
        if let Some(at) = words.iter().position(|word| *word == "-o") {
            return self.test(&words[..at]) || self.test(&words[at + 1..]);
        }
        if let Some(at) = words.iter().position(|word| *word == "-a") {
            return self.test(&words[..at]) && self.test(&words[at + 1..]);
        }
        let number = |text: &str| text.parse::<i64>().unwrap_or(0);
        match words {
            ["!", rest @ ..] => !self.test(rest),
            ["-z", text] => text.is_empty(),
            ["-n", text] => !text.is_empty(),
            ["-z"] => true,
            ["-e" | "-f" | "-s" | "-d", path] => self.exists(path),
            [text] => !text.is_empty(),
            [a, "=" | "==", b] => a == b,
            [a, "!=", b] => a != b,
            [a, "-eq", b] => number(a) == number(b),
            [a, "-ne", b] => number(a) != number(b),
            [a, "-lt", b] => number(a) < number(b),
            [a, "-le", b] => number(a) <= number(b),
            [a, "-gt", b] => number(a) > number(b),
            [a, "-ge", b] => number(a) >= number(b),
            _ => false,
        }
    }

    fn exists(&self, path: &str) -> bool {
        let (device, path) = split_device(path);
        self.volumes.exists(device.unwrap_or(self.variables.get("root")), path)
    }
}

/// Splits `(DEVICE)/PATH`.
#[must_use]
pub(crate) fn split_device(path: &str) -> (Option<&str>, &str) {
    let split = path.strip_prefix('(').and_then(|rest| rest.split_once(')'));
    split.map_or((None, path), |(device, path)| (Some(device), path))
}

/// A word of the kernel's command line. GRUB puts those with spaces into quotes.
fn parameter(word: &str) -> String {
    if word.contains(' ') { format!("\"{word}\"") } else { word.to_owned() }
}
