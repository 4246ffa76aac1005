//! The kernel, the initrd and the kernel's command line of an image: what its boot loader would start.

use super::disk::Range;
use super::file::FileError;
use super::filesystem::FileSystem;
use super::grub::split_device;
use super::menu::{Entry, Listed, MAX_INITRDS};
use super::volumes::{Seen, Volumes};
use serde::{Deserialize, Serialize};
use std::io::{self, Write};
use thiserror::Error;

/// The largest kernel, and the largest initrd, in bytes.
pub(super) const MAX_FILE_BYTES: u64 = 512 << 20;
/// The longest command line that an image gives, in bytes. Linux takes 2047.
const CMDLINE_BYTES: usize = 4096;
/// The longest text that an answer has, in bytes.
const TEXT_BYTES: usize = 1024;
/// Initrds are at multiples of this behind each other, as boot loaders load them.
const ALIGNMENT: u64 = 4;

/// What was found in an image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Found {
    /// The entry of the boot loader's menu.
    pub entry: Listed,
    /// The path of the kernel, as the entry has it.
    pub kernel: String,
    /// The size of the initrd in bytes; 0 where the entry has none, or it was not asked for.
    pub initrd_bytes: u64,
    /// The kernel's parameters.
    pub cmdline: String,
    /// True if a file system on it has a journal that was not replayed.
    pub needs_recovery: bool,
}

/// Why no kernel was found.
#[derive(Clone, Debug, PartialEq, Eq, Error, Serialize, Deserialize)]
pub enum FindError {
    /// There is no configuration of a boot loader on a file system that can be read.
    #[error(
        "no boot loader's configuration with an entry for Linux (GRUB's grub.cfg, or /loader/entries) is on it: {}; take the \
         kernel out of it by other means, and give it as KERNEL with --disk", list_seen(.0)
    )]
    NoMenu(Vec<Seen>),
    /// There is no root file system.
    #[error("no root file system that hwvmm reads (ext2 to ext4, with /etc and one of /bin, /usr/bin, /sbin) is on it: {}", list_seen(.0))]
    NoRoot(Vec<Seen>),
    /// The configuration cannot be read.
    #[error("its {path} cannot be read: {why}")]
    Menu {
        /// The path of the file in the image.
        path: String,
        /// What is wrong.
        why: String,
    },
    /// No entry is named so.
    #[error("--entry {wanted}: it has no such entry; there are: {}", list_entries(.entries))]
    NoEntry {
        /// What was given.
        wanted: String,
        /// The entries.
        entries: Vec<Listed>,
    },
    /// The entry that the boot loader starts by itself is not for Linux, or in words that are not understood.
    #[error(
        "the entry that its boot loader starts by itself{} starts no Linux that hwvmm understands; choose one with --entry: {}",
        named(.default), list_entries(.entries)
    )]
    NoDefault {
        /// How the boot loader's configuration names it; empty for its first entry.
        default: String,
        /// The entries that start Linux.
        entries: Vec<Listed>,
    },
    /// A reader of file systems panicked.
    #[error(
        "its file systems are damaged in a way that their reader does not expect ({0}): check the file systems (fsck), and do not trust \
         the image"
    )]
    Reader(String),
    /// The kernel's modules are there, and cannot be used.
    #[error("the kernel's modules in its {folder} cannot be used: {why}")]
    Modules {
        /// The folder in the image.
        folder: String,
        /// What is wrong.
        why: String,
    },
    /// The file of an entry cannot be read.
    #[error("entry {} ({}): {path} cannot be read: {why}; on it: {}", .entry.number, .entry.title, list_seen(.seen))]
    File {
        /// The entry.
        entry: Listed,
        /// The path of the file, as the entry has it.
        path: String,
        /// What is wrong.
        why: String,
        /// The partitions that were searched.
        seen: Vec<Seen>,
    },
}

/// Lists partitions for messages.
#[must_use]
pub fn list_seen(seen: &[Seen]) -> String {
    let one = |seen: &Seen| match seen.partition {
        Some(number) => format!("partition {number} has {}", seen.what),
        None => format!("no partitions, but {}", seen.what),
    };
    if seen.is_empty() { "it has no partitions".into() } else { seen.iter().map(one).collect::<Vec<_>>().join(", ") }
}

fn list_entries(entries: &[Listed]) -> String {
    let one = |entry: &Listed| format!("{} ({})", entry.number, entry.title);
    entries.iter().map(one).collect::<Vec<_>>().join(", ")
}

fn named(default: &str) -> String {
    if default.is_empty() { String::new() } else { format!(" ({default})") }
}

/// Cuts a text that an image gave.
pub(super) fn cut(text: &str) -> String {
    text.chars().take(TEXT_BYTES / 4).collect()
}

fn cut_listed(listed: &Listed) -> Listed {
    Listed { number: cut(&listed.number), title: cut(&listed.title) }
}

/// Copies the kernel of the entry that `wanted` names, or of the one that the boot loader would start, to `kernel`, and its
/// initrds, one behind the other, to `initrd`, where that is given.
///
/// # Errors
/// [`FindError`].
pub fn find(
    disk: &Range,
    wanted: Option<&str>,
    kernel: &mut dyn Write,
    initrd: Option<&mut dyn Write>,
) -> Result<Found, FindError> {
    let volumes = Volumes::of(disk);
    let seen = || volumes.seen().into_iter().map(|seen| Seen { what: cut(&seen.what), ..seen }).collect();
    let menu = volumes.menu().map_err(|(path, why)| FindError::Menu { path, why: cut(&why) })?;
    let menu = menu.ok_or_else(|| FindError::NoMenu(seen()))?;
    let Some(entry) = menu.choose(wanted) else {
        let entries = menu.listed().iter().map(cut_listed).collect();
        return Err(match wanted {
            Some(wanted) => FindError::NoEntry { wanted: cut(wanted), entries },
            None => FindError::NoDefault { default: cut(&menu.default), entries },
        });
    };
    let listed = cut_listed(&entry.listed());
    let failed = |path: &str, why: String| FindError::File {
        entry: listed.clone(),
        path: cut(path),
        why: cut(&why),
        seen: seen(),
    };
    let copy = |path: &str, limit: u64, out: &mut dyn Write| {
        copy(&volumes, entry, path, limit, out).map_err(|error| failed(path, error.to_string()))
    };
    let path = entry.kernel.clone().unwrap_or_default();
    copy(&path, MAX_FILE_BYTES, kernel)?;
    let mut bytes = 0_u64;
    if let Some(initrd) = initrd {
        if entry.initrds.len() > MAX_INITRDS {
            return Err(failed(&path, format!("the entry has more than {MAX_INITRDS} initrds")));
        }
        for path in &entry.initrds {
            let padding = bytes.next_multiple_of(ALIGNMENT) - bytes;
            let zeroes = [0; 8];
            let padding_bytes =
                usize::try_from(padding).ok().and_then(|padding| zeroes.get(..padding)).unwrap_or_default();
            initrd.write_all(padding_bytes).map_err(|error: io::Error| failed(path, error.to_string()))?;
            bytes += padding;
            bytes += copy(path, MAX_FILE_BYTES.saturating_sub(bytes), initrd)?;
        }
    }
    // A tab is between two words.
    let cmdline = entry.cmdline.chars().map(|c| if c.is_control() { ' ' } else { c }).collect::<String>();
    if cmdline.len() > CMDLINE_BYTES {
        return Err(failed(&path, format!("its parameters have more than {CMDLINE_BYTES} bytes")));
    }
    Ok(Found {
        entry: listed.clone(),
        kernel: cut(&path),
        initrd_bytes: bytes,
        cmdline,
        needs_recovery: volumes.needs_recovery(),
    })
}

/// Copies a file of an entry.
fn copy(volumes: &Volumes, entry: &Entry, path: &str, limit: u64, out: &mut dyn Write) -> Result<u64, FileError> {
    let (device, path) = split_device(path);
    let fs: &FileSystem = volumes.device(device.unwrap_or(&entry.device)).ok_or(FileError::NotFound)?;
    match fs.copy(path, limit, out) {
        Err(FileError::NotFound) if entry.looks_in_boot => {
            fs.copy(&format!("/boot/{}", path.trim_start_matches('/')), limit, out)
        }
        result => result,
    }
}
