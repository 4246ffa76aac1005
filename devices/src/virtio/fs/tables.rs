//! The inodes that the guest knows and the files that it has open. Each is an open file of this process, so both have a bound.

use rustix::io::Errno;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use std::collections::HashMap;
use std::io;

/// The most inodes of a share that the guest can know at once (Linux keeps those in its cache of names).
const MAX_INODES: usize = 1 << 18;
/// The most files and directories of a share that the guest can have open at once.
const MAX_HANDLES: usize = 1 << 14;
/// Fewer inodes than this are worth a warning: a guest may need more for a large source tree.
const FEW_INODES: usize = 1 << 16;

/// The node of the shared directory, which is never forgotten.
const ROOT: u64 = 1;
/// Set in a node for a file whose inode number on the host is 2^47 or more: fuse-backend-rs numbers those itself, from 2 on in
/// the lowest 47 bits, and remembers their numbers for ever.
const NUMBERED: u64 = 1 << 55;
const NUMBER_BITS: u64 = (1 << 47) - 1;
/// The most such files in the life of a share.
const MAX_NUMBERED: u64 = 1 << 20;

/// Bounds of a share.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Limits {
    pub(super) inodes: usize,
    pub(super) handles: usize,
}

impl Limits {
    /// Raises the process's limit of open files by what a share may need, and returns what the share gets of it.
    pub(super) fn reserve() -> Self {
        let need = (MAX_INODES + MAX_HANDLES) as u64;
        let limits = Self::within(raise_file_limit(need));
        if limits.inodes < FEW_INODES {
            log::warn!(
                "fs: the guest can use {} files of the shared directory at most; raise the limit with `ulimit -n`",
                limits.inodes
            );
        }
        limits
    }

    /// Divides `files` open files.
    fn within(files: u64) -> Self {
        let files = usize::try_from(files).unwrap_or(usize::MAX);
        let handles = MAX_HANDLES.min(files / 4);
        Self { inodes: MAX_INODES.min(files - handles), handles }
    }
}

/// Raises the limit of open files by `need`, or as far as the host allows. Returns how many of the open files a share can use:
/// what was added, or a quarter of all where that is more, so that the rest of the process keeps enough.
fn raise_file_limit(need: u64) -> u64 {
    let before = getrlimit(Resource::Nofile);
    let Some(current) = before.current else { return need };
    let wanted = current.saturating_add(need);
    let candidates = [
        Rlimit { current: Some(wanted), maximum: before.maximum.map(|maximum| maximum.max(wanted)) },
        Rlimit { current: before.maximum.map(|maximum| maximum.min(wanted)), maximum: before.maximum },
    ];
    let added = candidates.into_iter().find(|limit| setrlimit(Resource::Nofile, *limit).is_ok());
    let after = added.and_then(|limit| limit.current).unwrap_or(current);
    need.min(after.saturating_sub(current).max(after / 4))
}

/// What the guest knows and has open.
pub(super) struct Tables {
    limits: Limits,
    /// The number of lookups of each node that the guest has not taken back by FORGET.
    inodes: HashMap<u64, u64>,
    /// The node of each open file.
    handles: HashMap<u64, u64>,
    /// A file beyond [`MAX_NUMBERED`] was seen.
    numbers_used_up: bool,
}

impl Tables {
    pub(super) fn new(limits: Limits) -> Self {
        Self { limits, inodes: HashMap::new(), handles: HashMap::new(), numbers_used_up: false }
    }

    /// Checks that there is room for a new inode.
    ///
    /// # Errors
    /// Returns ENFILE.
    pub(super) fn check_inodes(&self) -> io::Result<()> {
        let full = self.numbers_used_up || self.inodes.len() >= self.limits.inodes;
        if full { Err(Errno::NFILE.into()) } else { Ok(()) }
    }

    /// Checks that there is room for an open file.
    ///
    /// # Errors
    /// Returns ENFILE.
    pub(super) fn check_handles(&self) -> io::Result<()> {
        if self.handles.len() >= self.limits.handles { Err(Errno::NFILE.into()) } else { Ok(()) }
    }

    /// Checks the number of a node that fuse-backend-rs has seen.
    ///
    /// # Errors
    /// Returns ENFILE where it is beyond [`MAX_NUMBERED`].
    pub(super) fn check_number(&mut self, inode: u64) -> io::Result<()> {
        if inode & NUMBERED != 0 && inode & NUMBER_BITS > MAX_NUMBERED {
            self.numbers_used_up = true;
            return Err(Errno::NFILE.into());
        }
        Ok(())
    }

    /// Counts a lookup.
    ///
    /// # Errors
    /// Returns ENFILE, and counts nothing, where the inode is new and there is no room for it.
    pub(super) fn add_lookup(&mut self, inode: u64) -> io::Result<()> {
        if inode == ROOT {
            return Ok(());
        }
        if let Some(count) = self.inodes.get_mut(&inode) {
            *count = count.saturating_add(1);
            return Ok(());
        }
        self.check_number(inode)?;
        self.check_inodes()?;
        self.inodes.insert(inode, 1);
        Ok(())
    }

    /// Takes `count` lookups back.
    pub(super) fn forget(&mut self, inode: u64, count: u64) {
        if let Some(left) = self.inodes.get_mut(&inode) {
            *left = left.saturating_sub(count);
            if *left == 0 {
                self.inodes.remove(&inode);
            }
        }
    }

    /// Counts an open file. A file that is open without a handle is not counted, as it is not kept open.
    pub(super) fn add_handle(&mut self, handle: Option<u64>, inode: u64) {
        if let Some(handle) = handle {
            self.handles.insert(handle, inode);
        }
    }

    /// Takes an open file back.
    pub(super) fn remove_handle(&mut self, handle: u64) {
        self.handles.remove(&handle);
    }

    /// Empties the tables, and returns each inode with its lookups.
    pub(super) fn take_inodes(&mut self) -> Vec<(u64, u64)> {
        std::mem::take(&mut self.inodes).into_iter().collect()
    }

    /// Empties the table of open files, and returns each handle with its inode.
    pub(super) fn take_handles(&mut self) -> Vec<(u64, u64)> {
        std::mem::take(&mut self.handles).into_iter().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limits_fit_into_the_open_files() {
        assert_eq!(Limits::within(1 << 20), Limits { inodes: MAX_INODES, handles: MAX_HANDLES });
        assert_eq!(Limits::within(1000), Limits { inodes: 750, handles: 250 });
        assert_eq!(Limits::within(0), Limits { inodes: 0, handles: 0 });
    }

    #[test]
    fn lookups_are_counted_to_the_bound() {
        let mut tables = Tables::new(Limits { inodes: 2, handles: 1 });
        assert!([5, 6, 5, ROOT].into_iter().all(|inode| tables.add_lookup(inode).is_ok()));
        assert!(tables.add_lookup(7).is_err() && tables.check_inodes().is_err());
        tables.forget(5, 1);
        assert!(tables.add_lookup(7).is_err());
        tables.forget(5, u64::MAX);
        assert!(tables.add_lookup(7).is_ok());
        tables.add_handle(Some(1), 5);
        assert!(tables.check_handles().is_err());
        tables.remove_handle(1);
        assert!(tables.check_handles().is_ok());
    }

    #[test]
    fn files_that_are_remembered_for_ever_are_bounded() {
        let mut tables = Tables::new(Limits { inodes: 100, handles: 1 });
        assert!(tables.add_lookup(NUMBERED | MAX_NUMBERED).is_ok());
        assert!(tables.add_lookup(MAX_NUMBERED + 1).is_ok());
        assert!(tables.check_inodes().is_ok());
        assert!(tables.add_lookup(NUMBERED | (MAX_NUMBERED + 1)).is_err());
        assert!(tables.check_inodes().is_err());
    }
}
