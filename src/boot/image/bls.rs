//! Entries of the Boot Loader Specification (<https://uapi-group.org/specifications/specs/boot_loader_specification/>), type 1:
//! files in /loader/entries.

use super::file::PATH_BYTES;
use super::menu::{Entry, MAX_INITRDS, compare_versions};
use std::cmp::Ordering;

/// The largest file of an entry in bytes.
pub(super) const MAX_BYTES: u64 = 64 << 10;

/// Parameters of an entry are read as far as this, in bytes. So many are refused, as they are too many for Linux.
const OPTIONS_BYTES: usize = 64 << 10;

/// A file of an entry.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct BlsEntry {
    /// The name of the file, without `.conf`.
    id: String,
    /// True if it was tried as often as it may be, and never worked (boot counting).
    is_bad: bool,
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
        let (id, is_bad) = tries(id).map_or((id, false), |(id, left)| (id, left == 0));
        let mut entry = Self { id: id.to_owned(), is_bad, ..Self::default() };
        let mut bytes = 0_usize;
        for line in text.lines().map(str::trim).filter(|line| !line.starts_with('#')) {
            let Some((key, value)) = line.split_once(char::is_whitespace) else { continue };
            let value = value.trim();
            match key {
                "title" => entry.title = value.to_owned(),
                "version" => entry.version = value.to_owned(),
                "machine-id" => entry.machine_id = value.to_owned(),
                "sort-key" => entry.sort_key = value.to_owned(),
                "linux" => entry.linux = Some(expand(value)),
                // One more than there may be, so that they are refused.
                "initrd" => {
                    let left = (MAX_INITRDS + 1).saturating_sub(entry.initrds.len());
                    let path = |path: &str| path.chars().take(PATH_BYTES + 1).collect();
                    entry.initrds.extend(expand(value).split_whitespace().take(left).map(path));
                }
                "options" if bytes <= OPTIONS_BYTES => {
                    let options = expand(value);
                    bytes += options.len();
                    entry.options.push(options);
                }
                _ => {}
            }
        }
        entry.linux.is_some().then_some(entry)
    }

    /// The order of a menu: those that never worked last; by sort keys, those without one last; then the newest first.
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
        self.is_bad.cmp(&other.is_bad).then(keys).then_with(|| newest(&self.id, &other.id))
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
            // Files are named from the root of /boot, which can be a folder of the root.
            looks_in_boot: true,
        }
    }
}

/// Splits the name of an entry from the counter of its tries behind it, `+LEFT` or `+LEFT-DONE`. Returns the name, and how many tries
/// are left; `None` where there is no counter: a kernel's release may have a plus sign as well.
fn tries(name: &str) -> Option<(&str, u32)> {
    let (name, counter) = name.rsplit_once('+')?;
    let (left, done) = counter.split_once('-').unwrap_or((counter, "0"));
    let is_number = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    (is_number(left) && is_number(done)).then(|| (name, left.parse().unwrap_or(u32::MAX)))
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
            looks_in_boot: true,
        };
        assert_eq!(entry, expected);
        assert!(parse("a.conf", "title x\nefi /shell.efi\n").is_none(), "no Linux");
        assert!(parse("a.conf~", text).is_none(), "no entry");
    }

    #[test]
    fn only_a_counter_of_tries_is_no_part_of_the_name() {
        let id = |name: &str| parse(name, "linux /k").map(|entry| (entry.id, entry.is_bad));
        for (name, expected) in [
            ("m-6.12.41+deb13-amd64.conf", ("m-6.12.41+deb13-amd64", false)),
            ("m-6.12+.conf", ("m-6.12+", false)),
            ("m-6.1+3.conf", ("m-6.1", false)),
            ("m-6.1+bpo+2-1.conf", ("m-6.1+bpo", false)),
            ("m-6.1+0-3.conf", ("m-6.1", true)),
            ("m-6.1+0.conf", ("m-6.1", true)),
        ] {
            assert_eq!(id(name), Some((expected.0.to_owned(), expected.1)), "{name}");
        }
        let mut entries: Vec<_> =
            ["a-2+0-3.conf", "a-1.conf"].map(|name| parse(name, "linux /k").expect("an entry")).into();
        entries.sort_by(BlsEntry::compare);
        assert_eq!(entries.first().map(|entry| entry.id.as_str()), Some("a-1"), "the other never worked");
    }

    #[test]
    fn an_entry_does_not_grow_without_bound() {
        let text = format!("linux /k\n{}{}", "options $a\n".repeat(5_000), "initrd $a\n".repeat(5_000));
        let entry = BlsEntry::parse("a.conf", &text, &|_| "x y ".repeat(20_000)).expect("an entry");
        let options: usize = entry.options.iter().map(String::len).sum();
        assert!(options <= OPTIONS_BYTES + 80_000 && entry.initrds.len() == MAX_INITRDS + 1, "{options}");
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
