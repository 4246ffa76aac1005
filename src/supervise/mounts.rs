//! The mounts of this process' namespace (proc_pid_mountinfo(5)).

use std::ffi::OsString;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

/// A mount of this process' namespace.
struct Mount {
    id: u64,
    /// Device numbers, as text.
    device: Vec<u8>,
    /// What of the file system is mounted.
    root: PathBuf,
    point: PathBuf,
}

/// The mounts of this process' namespace.
pub(super) struct Mounts(Vec<Mount>);

impl Mounts {
    /// Reads the list; an empty one where there is no /proc.
    pub(super) fn read() -> Self {
        let text = std::fs::read("/proc/thread-self/mountinfo").unwrap_or_default();
        Self(text.split(|byte| *byte == b'\n').filter_map(Mount::parse).collect())
    }

    /// Returns the device of the file system of the open folder, and its path in that file system.
    pub(super) fn place(&self, folder: &OwnedFd) -> Option<Place> {
        let number = folder.as_raw_fd();
        let info = std::fs::read_to_string(format!("/proc/thread-self/fdinfo/{number}")).ok()?;
        let id = info.lines().find_map(|line| line.strip_prefix("mnt_id:"))?.trim().parse::<u64>().ok()?;
        let mount = self.0.iter().find(|mount| mount.id == id)?;
        let path = std::fs::read_link(format!("/proc/thread-self/fd/{number}")).ok()?;
        let below = path.strip_prefix(&mount.point).ok()?;
        Some(Place { device: mount.device.clone(), path: mount.root.join(below) })
    }

    /// Returns what is mounted at `folder` or below it.
    pub(super) fn below(&self, folder: &Path) -> impl Iterator<Item = Place> {
        let below = self.0.iter().filter(move |mount| mount.point.starts_with(folder));
        below.map(|mount| Place { device: mount.device.clone(), path: mount.root.clone() })
    }
}

impl Mount {
    /// Reads a line of mountinfo.
    fn parse(line: &[u8]) -> Option<Self> {
        let mut words = line.split(|byte| *byte == b' ');
        let id = std::str::from_utf8(words.next()?).ok()?.parse().ok()?;
        let device = words.nth(1)?.to_vec();
        let mut path = || words.next().map(unescape);
        Some(Self { id, device, root: path()?, point: path()? })
    }
}

/// Returns a path of mountinfo, where a space, for example, is `\040`.
fn unescape(mut text: &[u8]) -> PathBuf {
    let mut bytes = Vec::new();
    while let Some((&first, rest)) = text.split_first() {
        let octal = rest.get(..3).and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok());
        match (first, octal) {
            (b'\\', Some(byte)) => {
                bytes.push(byte);
                text = rest.get(3..).unwrap_or_default();
            }
            _ => {
                bytes.push(first);
                text = rest;
            }
        }
    }
    OsString::from_vec(bytes).into()
}

/// A folder by its place in a file system.
pub(super) struct Place {
    device: Vec<u8>,
    path: PathBuf,
}

impl Place {
    /// Returns true if `other` is this folder or below it.
    pub(super) fn has(&self, other: &Self) -> bool {
        self.device == other.device && other.path.starts_with(&self.path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_of_mountinfo_are_read() {
        let line = br"36 35 98:0 /mnt1\040x /mnt2\134y rw,noatime master:1 - ext3 /dev/root rw";
        let mount = Mount::parse(line).expect("a mount");
        assert_eq!((mount.id, &mount.device[..]), (36, &b"98:0"[..]));
        assert_eq!((mount.root, mount.point), ("/mnt1 x".into(), r"/mnt2\y".into()));
    }
}
