//! The root file system of an image, for a command that runs on it.

use super::disk::Range;
use super::filesystem::FileSystem;
use super::find::{FindError, cut};
use super::volumes::{Seen, Volumes};
use serde::{Deserialize, Serialize};

/// The list of users of a root (passwd(5)), and its largest size in bytes, as on the host.
const PASSWD: &str = "/etc/passwd";
const PASSWD_BYTES: u64 = 4 << 20;
/// The longest line of it that an answer has, in bytes.
const PASSWD_LINE_BYTES: usize = 4096;

/// Which root is looked for.
#[derive(Clone, Copy, Debug, Default)]
pub struct WantedRoot<'a> {
    /// The entry of the boot loader's menu whose `root=` says it where there are several; `None`: the one which the boot loader
    /// would start.
    pub entry: Option<&'a str>,
    /// The user who is looked up in it.
    pub user: Option<&'a str>,
}

/// Where the root file system of an image is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Root {
    /// The number of its partition; `None` for the whole disk.
    pub partition: Option<u32>,
    /// The numbers of other partitions that look like a root, too.
    pub others: Vec<u32>,
    /// Why it is this one, where there are others.
    pub chosen_by: ChosenBy,
    /// True if its journal was not replayed: neither this program nor a guest that cannot write it sees what is in that.
    pub needs_recovery: bool,
    /// The user that was asked for.
    pub user: RootUser,
}

/// Why a partition was taken for the root.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ChosenBy {
    /// The kernel's parameters of an entry name it (`root=`).
    Parameters,
    /// It is the first that looks like one.
    Order,
}

/// A user in the list of a root (passwd(5)).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum RootUser {
    /// None was asked for.
    NotAsked,
    /// The line of the list.
    Line(String),
    /// The list has no such user.
    None,
    /// The list cannot be read, and why.
    Unreadable(String),
}

/// Finds the root file system of an image: one with /etc and with programs. Of several, it is the one which the boot loader's entry gives to
/// its kernel, or else the first.
///
/// # Errors
/// [`FindError::NoRoot`].
pub fn find_root(disk: &Range, wanted: WantedRoot<'_>) -> Result<Root, FindError> {
    let volumes = Volumes::of(disk);
    let roots: Vec<_> = volumes.roots().collect();
    let Some(first) = roots.first() else {
        let seen = volumes.seen().into_iter().map(|seen| Seen { what: cut(&seen.what), ..seen });
        return Err(FindError::NoRoot(seen.collect()));
    };
    let named = if roots.len() > 1 { named_root(&volumes, wanted.entry) } else { None };
    let named = named.and_then(|partition| roots.iter().find(|(number, _)| *number == Some(partition)));
    let chosen_by = if named.is_some() { ChosenBy::Parameters } else { ChosenBy::Order };
    let (partition, fs) = *named.unwrap_or(first);
    let user = wanted.user.map_or(RootUser::NotAsked, |name| root_user(fs, name));
    let others = roots.iter().filter(|(number, _)| *number != partition).filter_map(|(number, _)| *number).collect();
    Ok(Root { partition, others, chosen_by, needs_recovery: fs.needs_recovery(), user })
}

/// The number of the partition that an entry of the boot loader's menu names as the root. A menu that cannot be read names none: a root
/// needs no boot loader.
fn named_root(volumes: &Volumes, entry: Option<&str>) -> Option<u32> {
    let menu = volumes.menu().ok()??;
    let entry = menu.choose(entry)?;
    // Of two, Linux takes the last one.
    let root = entry
        .cmdline
        .split_ascii_whitespace()
        .filter_map(|word| word.trim_matches('"').strip_prefix("root="))
        .next_back()?;
    volumes.named(root.trim_matches('"'))
}

fn root_user(fs: &FileSystem, name: &str) -> RootUser {
    let text = match fs.read(PASSWD, PASSWD_BYTES) {
        Ok(text) => text,
        Err(error) => return RootUser::Unreadable(cut(&error.to_string())),
    };
    let mut lines = text.split(|byte| *byte == b'\n');
    let line = lines.find(|line| line.split(|byte| *byte == b':').next() == Some(name.as_bytes()));
    match line {
        None => RootUser::None,
        Some(line) if line.len() > PASSWD_LINE_BYTES => {
            RootUser::Unreadable(format!("the line of this user has more than {PASSWD_LINE_BYTES} bytes"))
        }
        Some(line) => RootUser::Line(String::from_utf8_lossy(line).into_owned()),
    }
}
