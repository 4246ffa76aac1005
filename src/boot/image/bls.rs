//! Entries of the Boot Loader Specification (<https://uapi-group.org/specifications/specs/boot_loader_specification/>), type 1:
//! files in /loader/entries.

use super::menu::{Entry, compare_versions};
use std::cmp::Ordering;

/// The largest file of an entry in bytes.
pub(super) const MAX_BYTES: u64 = 64 << 10;

/// A file of an entry.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct BlsEntry {
    /// The name of the file, without `.conf`.
    id: String,
    title: String,
    version: String,
    machine_id: String,
    sort_key: String,
    linux: Option<String>,
    initrds: Vec<String>,
    options: Vec<String>,
}

impl BlsEntry {
    /// Reads the file `name` with this `text`. `None` if it starts no Linux. `expand` replaces variables, which GRUB permits.
    #[must_use]
    pub(super) fn parse(name: &str, text: &str, expand: &dyn Fn(&str) -> String) -> Option<Self> {
        let id = name.strip_suffix(".conf")?;
        // Tries that are left and done, behind a plus sign, are no part of the name.
        let id = id.rsplit_once('+').map_or(id, |(id, _)| id).to_owned();
        let mut entry = Self { id, ..Self::default() };
        for line in text.lines().map(str::trim).filter(|line| !line.starts_with('#')) {
            let Some((key, value)) = line.split_once(char::is_whitespace) else { continue };
            let value = value.trim();
            match key {
                "title" => entry.title = value.to_owned(),
                "version" => entry.version = value.to_owned(),
                "machine-id" => entry.machine_id = value.to_owned(),
                "sort-key" => entry.sort_key = value.to_owned(),
                "linux" => entry.linux = Some(expand(value)),
                "initrd" => entry.initrds.extend(expand(value).split_whitespace().map(str::to_owned)),
                "options" => entry.options.push(expand(value)),
                _ => {}
            }
        }
        entry.linux.is_some().then_some(entry)
    }

    /// The order of a menu: by sort keys, those without one last, then the newest first.
    #[must_use]
    pub(super) fn compare(&self, other: &Self) -> Ordering {
        let newest = |a: &str, b: &str| compare_versions(b, a);
        let keys = match (self.sort_key.is_empty(), other.sort_key.is_empty()) {
            (false, false) => self
                .sort_key
                .cmp(&other.sort_key)
                .then(self.machine_id.cmp(&other.machine_id))
                .then_with(|| newest(&self.version, &other.version)),
            (a, b) => a.cmp(&b),
        };
        keys.then_with(|| newest(&self.id, &other.id))
    }

    /// The entry as a menu has it, with the number `number` in it; its files are on `device`.
    #[must_use]
    pub(super) fn into_entry(self, number: usize, device: &str) -> Entry {
        let title = if self.title.is_empty() { self.id.clone() } else { self.title };
        Entry {
            numbers: vec![number],
            titles: vec![title],
            id: self.id,
            device: device.to_owned(),
            kernel: self.linux,
            initrds: self.initrds,
            cmdline: self.options.join(" ").split_whitespace().collect::<Vec<_>>().join(" "),
        }
    }
}

/// The pattern of the entry that systemd-boot starts by itself, in its loader.conf; empty where there is none.
#[must_use]
pub(super) fn default_pattern(loader_conf: &str) -> &str {
    let mut lines = loader_conf.lines().filter_map(|line| line.trim().split_once(char::is_whitespace));
    lines.rfind(|(key, _)| *key == "default").map_or("", |(_, value)| value.trim())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(name: &str, text: &str) -> Option<BlsEntry> {
        BlsEntry::parse(name, text, &|text| text.replace("$kernelopts", "ro quiet"))
    }

    #[test]
    fn an_entry_has_its_files_and_parameters() {
        let text = "# comment\ntitle Fedora Linux (6.5)\nversion\t6.5\nlinux /vmlinuz-6.5\ninitrd /a.img\ninitrd /b.img\n\
            options root=UUID=1 \noptions $kernelopts\ngrub_users $grub_users\n";
        let entry = parse("abc-6.5+2-1.conf", text).expect("an entry").into_entry(3, "vol1");
        let expected = Entry {
            numbers: vec![3],
            titles: vec!["Fedora Linux (6.5)".into()],
            id: "abc-6.5".into(),
            device: "vol1".into(),
            kernel: Some("/vmlinuz-6.5".into()),
            initrds: vec!["/a.img".into(), "/b.img".into()],
            cmdline: "root=UUID=1 ro quiet".into(),
        };
        assert_eq!(entry, expected);
        assert!(parse("a.conf", "title x\nefi /shell.efi\n").is_none(), "no Linux");
        assert!(parse("a.conf~", text).is_none(), "no entry");
    }

    #[test]
    fn the_newest_is_first() {
        let mut entries: Vec<_> = [("a-6.1.9", ""), ("a-6.1.10", ""), ("old", "sort-key b"), ("new", "sort-key a")]
            .map(|(id, more)| parse(&format!("{id}.conf"), &format!("linux /k\n{more}")).expect("an entry"))
            .into();
        entries.sort_by(BlsEntry::compare);
        let ids: Vec<_> = entries.iter().map(|entry| entry.id.as_str()).collect();
        assert_eq!(ids, ["new", "old", "a-6.1.10", "a-6.1.9"]);
    }

    #[test]
    fn loader_conf_has_a_default() {
        assert_eq!(default_pattern("timeout 3\ndefault abc-*\n"), "abc-*");
        assert_eq!(default_pattern("timeout 3"), "");
    }
}
