//! Runs a grub.cfg as far as its menu needs: variables, conditions, where files are searched, and the entries.

use super::super::bls::BlsEntry;
use super::super::menu::{Entry, MAX_ENTRIES, Menu};
use super::syntax::{Statement, SyntaxError, parse};
use super::variables::Variables;
use std::rc::Rc;
use thiserror::Error;

/// The most commands that are run. Every command of a script runs once, and those of an entry when it is read.
const MAX_COMMANDS: usize = 100_000;
/// The most bytes that the words of all commands have, with the values of their variables.
const MAX_WORD_BYTES: usize = 16 << 20;
/// The most files that a script may read.
const MAX_SOURCES: usize = 16;
/// The most files that may be read within each other.
const MAX_SOURCE_DEPTH: usize = 4;
/// The longest title that is kept, in characters.
const TITLE_CHARS: usize = 1024;
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

/// Why a menu cannot be read.
#[derive(Debug, Error)]
pub(crate) enum MenuError {
    /// The script, or one that it reads.
    #[error("{0}")]
    Syntax(#[from] SyntaxError),
    /// A file that it reads.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// It reads too many files.
    #[error("it reads more than {MAX_SOURCES} files, or more than {MAX_SOURCE_DEPTH} within each other")]
    Sources,
    /// It does not end, or has too much in it.
    #[error("it has more than {MAX_COMMANDS} commands, or more than {} MiB in their words", MAX_WORD_BYTES >> 20)]
    Budget,
    /// It has too many entries.
    #[error("it has more than {MAX_ENTRIES} entries")]
    Entries,
}

/// Why a file that a script reads cannot be read.
#[derive(Debug, Error)]
#[error("{path}: {why}")]
pub(crate) struct SourceError {
    /// The path of the file.
    pub path: String,
    /// What is wrong.
    pub why: String,
}

/// The file systems that a script sees.
pub(crate) trait Volumes {
    /// The name of the device with the file system that is searched.
    fn search(&self, by: By, what: &str) -> Option<String>;
    /// Returns true if there is something at `path` on `device`.
    fn exists(&self, device: &str, path: &str) -> bool;
    /// The text of the file at `path` on `device`; `None` where there is none.
    fn read(&self, device: &str, path: &str) -> Result<Option<String>, SourceError>;
    /// The entries of the Boot Loader Specification on `device`.
    fn bls(&self, device: &str, expand: &dyn Fn(&str) -> String) -> Result<Vec<BlsEntry>, SourceError>;
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
/// [`MenuError`].
pub(crate) fn menu(config: &Config<'_>, volumes: &dyn Volumes) -> Result<Menu, MenuError> {
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
        left_sources: MAX_SOURCES,
        depth: 0,
        failed: None,
        entries: Vec::new(),
        pending: Vec::new(),
    };
    run.list(&statements, &mut Level::default());
    let default = run.variables.get("default").to_owned();
    // GRUB runs the commands of an entry when it is chosen: after the rest of the script.
    run.run_pending(0);
    match run.failed {
        Some(error) => Err(error),
        None => Ok(Menu { entries: run.entries, default }),
    }
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

struct Run<'a> {
    config: &'a Config<'a>,
    volumes: &'a dyn Volumes,
    variables: Variables,
    left: usize,
    /// The bytes that words may still have with the values of their variables.
    left_bytes: usize,
    /// The files that may still be read.
    left_sources: usize,
    /// The files that are being read, one within the other.
    depth: usize,
    /// The first error. A menu that was read in part would have another default.
    failed: Option<MenuError>,
    entries: Vec<Entry>,
    /// Entries whose commands have yet to be run: their index and their commands.
    pending: Vec<(usize, Rc<[Statement]>)>,
}

impl Run<'_> {
    fn fail(&mut self, error: impl Into<MenuError>) -> bool {
        self.failed.get_or_insert(error.into());
        false
    }

    /// Runs the commands of the entries from the pending one with this number on, each with the variables as they are now.
    fn run_pending(&mut self, from: usize) {
        for (index, block) in self.pending.split_off(from) {
            let variables = self.variables.clone();
            let mut level = Level { entry: self.entries.get(index).cloned(), ..Level::default() };
            self.list(&block, &mut level);
            if let (Some(place), Some(entry)) = (self.entries.get_mut(index), level.entry) {
                *place = entry;
            }
            self.variables = variables;
        }
    }

    /// Runs statements. Returns whether the last of them succeeded.
    fn list(&mut self, statements: &[Statement], level: &mut Level) -> bool {
        let mut success = true;
        for statement in statements {
            if self.failed.is_some() {
                return false;
            }
            let Some(left) = self.left.checked_sub(1) else { return self.fail(MenuError::Budget) };
            self.left = left;
            success = match statement {
                Statement::Command { words, block } => {
                    let words = self.variables.expand(words, &mut self.left_bytes);
                    if self.left_bytes == 0 {
                        return self.fail(MenuError::Budget);
                    }
                    self.command(&words, block.as_ref(), level)
                }
                Statement::If { branches, otherwise } => {
                    let holds = branches.iter().find(|(condition, _)| self.list(condition, level));
                    self.list(holds.map_or(otherwise, |(_, branch)| branch), level)
                }
            };
        }
        success
    }

    fn command(&mut self, words: &[String], block: Option<&Rc<[Statement]>>, level: &mut Level) -> bool {
        // `! ! COMMAND`: without a call for each, of which there can be many.
        let negations = words.iter().take_while(|word| *word == "!").count();
        if negations > 0 {
            return self.command(words.get(negations..).unwrap_or_default(), None, level) == (negations % 2 == 0);
        }
        let Some((name, arguments)) = words.split_first() else { return true };
        let first = arguments.first().map_or("", String::as_str);
        match (name.as_str(), block) {
            ("menuentry" | "submenu", Some(block)) => self.entry(name == "submenu", arguments, block, level),
            ("[" | "test", _) => {
                let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
                self.test(words.strip_suffix(&["]"]).unwrap_or(&words))
            }
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
            ("source" | "." | "configfile", _) => self.source(first, level),
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
    fn entry(&mut self, is_submenu: bool, arguments: &[String], block: &Rc<[Statement]>, level: &mut Level) -> bool {
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
        let title: String = title.unwrap_or_default().chars().take(TITLE_CHARS).collect();
        let titles = with(&level.titles, &title);
        let numbers = [level.numbers.as_slice(), &[number]].concat();
        if is_submenu {
            let (before, pending) = (self.variables.clone(), self.pending.len());
            self.list(block, &mut Level { numbers, titles, ..Level::default() });
            // Its entries see its variables.
            self.run_pending(pending);
            self.variables = before;
        } else if self.entries.len() < MAX_ENTRIES {
            self.pending.push((self.entries.len(), Rc::clone(block)));
            self.entries.push(Entry { numbers, titles, id, ..Entry::default() });
        } else {
            return self.fail(MenuError::Entries);
        }
        true
    }

    /// Runs the commands of another file.
    fn source(&mut self, path: &str, level: &mut Level) -> bool {
        let (device, path) = split_device(path);
        let text = match self.volumes.read(device.unwrap_or(self.variables.get("root")), path) {
            Ok(Some(text)) => text,
            Ok(None) => return false,
            Err(error) => return self.fail(error),
        };
        let Some(left) = self.left_sources.checked_sub(1).filter(|_| self.depth < MAX_SOURCE_DEPTH) else {
            return self.fail(MenuError::Sources);
        };
        let statements = match parse(&text) {
            Ok(statements) => statements,
            Err(error) => return self.fail(SourceError { path: path.to_owned(), why: error.to_string() }),
        };
        self.left_sources = left;
        self.depth += 1;
        let success = self.list(&statements, level);
        self.depth -= 1;
        success
    }

    fn bls(&mut self, level: &mut Level) -> bool {
        let device = self.variables.get("root").to_owned();
        let found = match self.volumes.bls(&device, &|text| self.variables.expand_text(text)) {
            Ok(found) => found,
            Err(error) => return self.fail(error),
        };
        for entry in found {
            if self.entries.len() == MAX_ENTRIES {
                return self.fail(MenuError::Entries);
            }
            self.entries.push(entry.into_entry(level.count, &device));
            level.count += 1;
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
        words.split(|word| *word == "-o").any(|words| words.split(|word| *word == "-a").all(|words| self.holds(words)))
    }

    /// One condition of the command `[`.
    fn holds(&self, words: &[&str]) -> bool {
        let negations = words.iter().take_while(|word| **word == "!").count();
        let words = words.get(negations..).unwrap_or_default();
        let number = |text: &str| text.parse::<i64>().unwrap_or(0);
        let holds = match words {
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
        };
        holds == (negations % 2 == 0)
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
