//! The menu of a boot loader: its entries, and the one that is chosen.

use serde::{Deserialize, Serialize};
use std::cmp::Ordering;

/// The most entries of a menu.
pub(super) const MAX_ENTRIES: usize = 256;
/// The most initrds of an entry.
pub(super) const MAX_INITRDS: usize = 16;
/// What is between the numbers or the titles of a submenu and its entry (GRUB manual, `default`).
const WITHIN: char = '>';

/// An entry of a menu.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Entry {
    /// Its number, behind those of the submenus that it is in.
    pub numbers: Vec<usize>,
    /// Its title, behind those of the submenus.
    pub titles: Vec<String>,
    /// Its id (`--id` of GRUB, the name of the file of a BLS entry); empty where it has none.
    pub id: String,
    /// The device that paths without one are on, as the boot loader names it.
    pub device: String,
    /// The path of the kernel; `None` for an entry that starts no Linux.
    pub kernel: Option<String>,
    /// The paths of the initrds, which are loaded behind each other.
    pub initrds: Vec<String>,
    /// The kernel's parameters.
    pub cmdline: String,
    /// True if files that are not where the entry says are looked for in /boot.
    pub looks_in_boot: bool,
}

/// An entry as messages and lists show it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Listed {
    /// Its number: `0`, or `1>0` in a submenu.
    pub number: String,
    /// Its title, with those of the submenus.
    pub title: String,
}

impl Entry {
    /// The entry as lists show it.
    #[must_use]
    pub(super) fn listed(&self) -> Listed {
        let number = self.numbers.iter().map(ToString::to_string).collect::<Vec<_>>().join(">");
        Listed { number, title: self.titles.join(" > ") }
    }

    /// Returns true if `wanted` names a submenu that the entry is in.
    fn is_within(&self, wanted: &str) -> bool {
        let parts: Vec<&str> = wanted.split(WITHIN).map(str::trim).collect();
        let levels = self.numbers.iter().zip(&self.titles);
        parts.len() < self.titles.len()
            && parts.iter().zip(levels).all(|(part, (number, title))| part.parse() == Ok(*number) || *part == title)
    }

    /// Returns true if `wanted` names the entry: by numbers or titles, with those of the submenus, or by its own title or id.
    fn is(&self, wanted: &str) -> bool {
        if self.titles.last().is_some_and(|title| title == wanted) || !self.id.is_empty() && self.id == wanted {
            return true;
        }
        let parts: Vec<&str> = wanted.split(WITHIN).map(str::trim).collect();
        let matches =
            |(part, (number, title)): (&&str, (&usize, &String))| part.parse() == Ok(*number) || part == title;
        let (last, before) = (parts.len() - 1, self.titles.len().saturating_sub(1));
        let own = |part: &str| !self.id.is_empty() && part == self.id;
        parts.len() == self.titles.len()
            && (0..=last).all(|index| {
                let level = self.numbers.get(index).zip(self.titles.get(index));
                let here = level.is_some_and(|level| matches((&parts[index], level)));
                // Submenus have ids that are not kept: the entry's own is enough.
                here || index == before && own(parts[index])
            })
    }
}

/// The menu of a boot loader.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Menu {
    /// Its entries, in their order; those that start no Linux, too.
    pub entries: Vec<Entry>,
    /// What the boot loader starts by itself: numbers, titles, an id; empty for the first entry.
    pub default: String,
}

impl Menu {
    /// The entry that `wanted` names, or else that which the boot loader would start. `None` where none is named so, or it starts
    /// no Linux: another one in its place would be a guess.
    #[must_use]
    pub(super) fn choose(&self, wanted: Option<&str>) -> Option<&Entry> {
        match wanted {
            Some(wanted) => self.entries.iter().filter(|entry| entry.kernel.is_some()).find(|entry| entry.is(wanted)),
            None => {
                // An id of a submenu with one of its entries: the last part names it.
                let last = self.default.rsplit(WITHIN).next().filter(|last| last.parse::<usize>().is_err());
                let named = |name: &str| self.entries.iter().find(|entry| entry.is(name));
                let within = || self.entries.iter().find(|entry| entry.is_within(&self.default));
                // A default that names nothing is the first entry.
                let default = named(&self.default).or_else(|| named(last?)).or_else(within);
                default.or(self.entries.first()).filter(|entry| entry.kernel.is_some())
            }
        }
    }

    /// Returns true if an entry starts Linux.
    #[must_use]
    pub(super) fn has_linux(&self) -> bool {
        self.entries.iter().any(|entry| entry.kernel.is_some())
    }

    /// The entries that start Linux, as lists show them.
    #[must_use]
    pub(super) fn listed(&self) -> Vec<Listed> {
        self.entries.iter().filter(|entry| entry.kernel.is_some()).map(Entry::listed).collect()
    }
}

/// Compares versions as people do: digits by value, letters by order.
#[must_use]
pub(super) fn compare_versions(a: &str, b: &str) -> Ordering {
    let (mut a, mut b) = (a.as_bytes(), b.as_bytes());
    loop {
        // A tilde is before everything, the end too, as in Debian's and RPM's versions.
        match (a.first() == Some(&b'~'), b.first() == Some(&b'~')) {
            (true, false) => return Ordering::Less,
            (false, true) => return Ordering::Greater,
            _ => {}
        }
        let (Some(x), Some(y)) = (a.first(), b.first()) else { return a.len().cmp(&b.len()) };
        if x.is_ascii_digit() && y.is_ascii_digit() {
            let (first, second) = (digits(&mut a), digits(&mut b));
            match first.len().cmp(&second.len()).then(first.cmp(second)) {
                Ordering::Equal => {}
                other => return other,
            }
            continue;
        }
        if x != y {
            return x.cmp(y);
        }
        (a, b) = (a.get(1..).unwrap_or_default(), b.get(1..).unwrap_or_default());
    }
}

/// Takes the digits off the front, without zeroes before them.
fn digits<'a>(text: &mut &'a [u8]) -> &'a [u8] {
    let count = text.iter().take_while(|byte| byte.is_ascii_digit()).count();
    let (digits, rest) = text.split_at(count);
    *text = rest;
    digits.get(digits.iter().take_while(|byte| **byte == b'0').count()..).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(numbers: &[usize], titles: &[&str], id: &str) -> Entry {
        Entry {
            numbers: numbers.to_vec(),
            titles: titles.iter().map(ToString::to_string).collect(),
            id: id.into(),
            kernel: Some("k".into()),
            ..Entry::default()
        }
    }

    fn menu(default: &str) -> Menu {
        let no_linux = Entry { kernel: None, ..entry(&[2], &["Firmware"], "fw") };
        let entries =
            vec![entry(&[0], &["Debian"], "simple"), entry(&[1, 0], &["Advanced", "Debian 6.1"], "adv"), no_linux];
        Menu { entries, default: default.into() }
    }

    #[test]
    fn entries_are_chosen_as_grub_names_them() {
        let menu = menu("");
        let chosen = |wanted| menu.choose(Some(wanted)).map(|entry| entry.listed().number);
        for first in ["0", "Debian", "simple"] {
            assert_eq!(chosen(first).as_deref(), Some("0"), "{first}");
        }
        for second in ["1>0", "1 > 0", "Advanced>Debian 6.1", "Advanced > Debian 6.1", "Debian 6.1", "adv", "1>adv"] {
            assert_eq!(chosen(second).as_deref(), Some("1>0"), "{second}");
        }
        for none in ["1", "2", "Firmware", "", "0>0", "debian"] {
            assert_eq!(chosen(none), None, "{none}");
        }
        assert_eq!(menu.listed()[1], Listed { number: "1>0".into(), title: "Advanced > Debian 6.1".into() });
    }

    #[test]
    fn without_a_choice_it_is_the_boot_loaders() {
        let chosen = |default: &str| menu(default).choose(None).map(|entry| entry.listed().number);
        assert_eq!(chosen("").as_deref(), Some("0"));
        assert_eq!(chosen("1>0").as_deref(), Some("1>0"));
        assert_eq!(chosen("advanced-id>adv").as_deref(), Some("1>0"));
        assert_eq!(chosen("1").as_deref(), Some("1>0"), "the first of a submenu");
        assert_eq!(chosen("Advanced").as_deref(), Some("1>0"), "the first of a submenu");
        assert_eq!(chosen("gone").as_deref(), Some("0"), "the first, as nothing is named so");
        assert_eq!(chosen("fw"), None, "the boot loader would start no Linux");
        assert_eq!(chosen("2"), None, "the boot loader would start no Linux");
        assert!(Menu::default().choose(None).is_none());
    }

    #[test]
    fn versions_are_compared_by_value() {
        for (small, large) in [("6.1.9", "6.1.10"), ("6.1~rc1", "6.1"), ("6.1", "6.1.1"), ("a", "b"), ("1", "a")] {
            assert_eq!(compare_versions(small, large), Ordering::Less, "{small} {large}");
            assert_eq!(compare_versions(large, small), Ordering::Greater, "{small} {large}");
        }
        assert_eq!(compare_versions("1.01", "1.1"), Ordering::Equal);
    }
}
