//! The inodes that the guest knows and the files that it has open. Each is an open file of this process, so both have a bound.

use crate::virtio::saved::{FileContent, FileId, ShareHandle};
use libc::stat64;
use rustix::io::Errno;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use std::collections::HashMap;
use std::ffi::CString;
use std::io;

/// The most inodes of a share that the guest can know at once (Linux keeps those in its cache of names).
pub(super) const MAX_INODES: usize = 1 << 18;
/// The most files and directories of a share that the guest can have open at once.
pub(super) const MAX_HANDLES: usize = 1 << 14;
/// Fewer inodes than this are worth a warning: a guest may need more for a large source tree.
const FEW_INODES: usize = 1 << 16;

/// The node of the shared directory, which is never forgotten.
pub(super) const ROOT: u64 = 1;
/// The first of the numbers that fuse-backend-rs gives to no node (`VFS_MAX_INO`). Here they are for files that it numbers as the guest
/// knows another one, from before the snapshot.
const FIRST_OWN_NUMBER: u64 = 1 << 56;
/// The numbers of nodes and of open files that a snapshot has are below this.
pub(super) const MAX_NUMBER: u64 = 1 << 62;
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

/// What tells a file from others.
pub(super) fn file_id(stat: &stat64) -> FileId {
    let modified_ns = stat.st_mtime.saturating_mul(1_000_000_000).saturating_add(stat.st_mtime_nsec);
    id_of(stat.st_dev, stat.st_ino, stat.st_mode, modified_ns)
}

/// What tells a file from others, by the values of stat(2).
fn id_of(device: u64, inode: u64, mode: u32, modified_ns: i64) -> FileId {
    let kind = mode & libc::S_IFMT;
    FileId { device, inode, kind, link_made_ns: if kind == libc::S_IFLNK { modified_ns } else { 0 } }
}

/// Where a name is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Place {
    /// The node of the directory.
    pub(super) parent: u64,
    pub(super) name: CString,
}

/// A file that the guest knows.
pub(super) struct Node {
    /// Its number at fuse-backend-rs. `None`: it is from a snapshot, and its name leads to it no longer.
    pub(super) inner: Option<u64>,
    /// How often it was looked up, without what the guest has taken back by FORGET.
    pub(super) lookups: u64,
    pub(super) file: FileId,
    /// Where it was found last, if that is kept.
    pub(super) place: Option<Place>,
}

/// A file or a directory that the guest has open.
#[derive(Clone, Copy, Debug)]
pub(super) struct Handle {
    /// Its number at fuse-backend-rs, and that of its node there.
    pub(super) inner: u64,
    pub(super) inner_node: u64,
    /// The number by which the guest knows it.
    pub(super) node: u64,
    /// The flags that it was opened with.
    pub(super) flags: u32,
}

/// What a snapshot has of a share, checked, whose files are to be looked up again.
pub(super) struct Restoring {
    /// Each node with its number. None has a number at fuse-backend-rs yet.
    pub(super) nodes: Vec<(u64, Node)>,
    pub(super) handles: Vec<ShareHandle>,
}

/// A file as fuse-backend-rs has found it.
pub(super) struct Found {
    pub(super) inner: u64,
    pub(super) file: FileId,
    pub(super) place: Option<Place>,
}

/// What the guest knows and has open, by the numbers that it knows.
pub(super) struct Tables {
    limits: Limits,
    pub(super) inodes: HashMap<u64, Node>,
    pub(super) handles: HashMap<u64, Handle>,
    /// What tells the contents of open files from others, by node, as they were when the workers ended.
    pub(super) contents: HashMap<u64, FileContent>,
    /// The nodes that have another number at fuse-backend-rs: by that, the guest's.
    renumbered: HashMap<u64, u64>,
    next_number: u64,
    next_handle: u64,
    /// A file beyond [`MAX_NUMBERED`] was seen.
    numbers_used_up: bool,
    /// The guest goes on from a snapshot: a number that is not here is none.
    is_restored: bool,
}

impl Tables {
    pub(super) fn new(limits: Limits) -> Self {
        Self {
            limits,
            inodes: HashMap::new(),
            handles: HashMap::new(),
            contents: HashMap::new(),
            renumbered: HashMap::new(),
            next_number: FIRST_OWN_NUMBER,
            next_handle: 1,
            numbers_used_up: false,
            is_restored: false,
        }
    }

    pub(super) fn limits(&self) -> Limits {
        self.limits
    }

    /// Returns the number that fuse-backend-rs has for `node`.
    ///
    /// # Errors
    /// Returns ESTALE where the node is from a snapshot, and its name leads to it no longer; EBADF where the guest knows none.
    pub(super) fn inner(&self, node: u64) -> io::Result<u64> {
        match self.inodes.get(&node) {
            Some(known) => known.inner.ok_or_else(|| Errno::STALE.into()),
            None if node != ROOT && self.is_restored => Err(Errno::BADF.into()),
            None => Ok(node),
        }
    }

    /// Returns the number that fuse-backend-rs has for an open file.
    ///
    /// # Errors
    /// Returns EBADF where it is not open.
    pub(super) fn inner_handle(&self, handle: u64) -> io::Result<u64> {
        self.handles.get(&handle).map(|handle| handle.inner).ok_or_else(|| Errno::BADF.into())
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
    pub(super) fn check_number(&mut self, inner: u64) -> io::Result<()> {
        if inner & NUMBERED != 0 && inner & NUMBER_BITS > MAX_NUMBERED {
            self.numbers_used_up = true;
            return Err(Errno::NFILE.into());
        }
        Ok(())
    }

    /// The number by which the guest knows a node of fuse-backend-rs, if it does.
    pub(super) fn known_as(&self, inner: u64) -> Option<u64> {
        let same = || self.inodes.get(&inner).filter(|node| node.inner == Some(inner)).map(|_| inner);
        if inner == ROOT { Some(ROOT) } else { self.renumbered.get(&inner).copied().or_else(same) }
    }

    /// Counts a lookup, and returns the number of the node.
    ///
    /// # Errors
    /// Returns ENFILE, and counts nothing, where the inode is new and there is no room for it.
    pub(super) fn add_lookup(&mut self, found: Found) -> io::Result<u64> {
        let Found { inner, file, place } = found;
        if let Some(known) = self.known_as(inner) {
            if let Some(node) = self.inodes.get_mut(&known) {
                node.lookups = node.lookups.saturating_add(1);
                node.place = place;
            }
            return Ok(known);
        }
        self.check_number(inner)?;
        self.check_inodes()?;
        let number = if self.inodes.contains_key(&inner) { self.own_number() } else { inner };
        self.insert(number, Node { inner: Some(inner), lookups: 1, file, place });
        Ok(number)
    }

    fn own_number(&mut self) -> u64 {
        let number = self.next_number;
        self.next_number = number.saturating_add(1);
        number
    }

    fn insert(&mut self, number: u64, node: Node) {
        if let Some(inner) = node.inner.filter(|inner| *inner != number) {
            self.renumbered.insert(inner, number);
        }
        self.inodes.insert(number, node);
    }

    /// Adds a node of a snapshot, by the number that the guest knows.
    pub(super) fn insert_restored(&mut self, number: u64, node: Node) {
        self.next_number = self.next_number.max(number.saturating_add(1));
        self.insert(number, node);
    }

    /// Adds an open file of a snapshot, by the number that the guest knows.
    pub(super) fn insert_restored_handle(&mut self, number: u64, handle: Handle) {
        self.next_handle = self.next_handle.max(number.saturating_add(1));
        self.handles.insert(number, handle);
    }

    /// From now on, numbers that are not here are none.
    pub(super) fn set_restored(&mut self) {
        self.is_restored = true;
    }

    /// Takes `count` lookups back. Returns the number that fuse-backend-rs is to forget, where none are left.
    pub(super) fn forget(&mut self, number: u64, count: u64) -> Option<u64> {
        let node = self.inodes.get_mut(&number)?;
        node.lookups = node.lookups.saturating_sub(count);
        if node.lookups > 0 {
            return None;
        }
        let inner = self.inodes.remove(&number)?.inner?;
        self.renumbered.remove(&inner);
        Some(inner)
    }

    /// Counts an open file, and returns its number. A file that is open without a handle is not counted, as it is not kept open.
    pub(super) fn add_handle(&mut self, inner: Option<u64>, node: u64, flags: u32) -> Option<u64> {
        let (inner, inner_node) = (inner?, self.inner(node).ok()?);
        let number = self.next_handle;
        self.next_handle = number.saturating_add(1);
        self.handles.insert(number, Handle { inner, inner_node, node, flags });
        Some(number)
    }

    /// Takes an open file of `node` back.
    ///
    /// # Errors
    /// Returns EBADF where it is not open.
    pub(super) fn remove_handle(&mut self, handle: u64, node: u64) -> io::Result<Handle> {
        if self.handles.get(&handle).is_none_or(|open| open.node != node) {
            return Err(Errno::BADF.into());
        }
        self.handles.remove(&handle).ok_or_else(|| Errno::BADF.into())
    }

    /// Empties the tables.
    pub(super) fn take(&mut self) -> Self {
        let numbers_used_up = self.numbers_used_up;
        std::mem::replace(self, Self { numbers_used_up, ..Self::new(self.limits) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file() -> FileId {
        FileId { device: 1, inode: 2, kind: libc::S_IFREG, link_made_ns: 0 }
    }

    fn found(inner: u64) -> Found {
        Found { inner, file: file(), place: None }
    }

    #[test]
    fn another_link_with_the_same_number_is_another_file() {
        assert_ne!(id_of(1, 7, libc::S_IFLNK | 0o777, 1), id_of(1, 7, libc::S_IFLNK | 0o777, 2));
        // What is written to a file or made in a directory makes no other one of it.
        for kind in [libc::S_IFREG, libc::S_IFDIR] {
            assert_eq!(id_of(1, 7, kind | 0o600, 1), id_of(1, 7, kind | 0o700, 2));
        }
    }

    #[test]
    fn the_limits_fit_into_the_open_files() {
        assert_eq!(Limits::within(1 << 20), Limits { inodes: MAX_INODES, handles: MAX_HANDLES });
        assert_eq!(Limits::within(1000), Limits { inodes: 750, handles: 250 });
        assert_eq!(Limits::within(0), Limits { inodes: 0, handles: 0 });
    }

    #[test]
    fn lookups_are_counted_to_the_bound() {
        let mut tables = Tables::new(Limits { inodes: 2, handles: 1 });
        assert!(
            [5, 6, 5, ROOT]
                .into_iter()
                .all(|inode| tables.add_lookup(found(inode)).is_ok_and(|number| number == inode))
        );
        assert!(tables.add_lookup(found(7)).is_err() && tables.check_inodes().is_err());
        assert_eq!(tables.forget(5, 1), None);
        assert!(tables.add_lookup(found(7)).is_err());
        assert_eq!((tables.forget(5, u64::MAX), tables.forget(5, 1), tables.forget(ROOT, 1)), (Some(5), None, None));
        assert!(tables.add_lookup(found(7)).is_ok());
        let handle = tables.add_handle(Some(9), 5, 0).expect("counted");
        assert!(tables.check_handles().is_err() && tables.inner_handle(handle).is_ok_and(|inner| inner == 9));
        assert!(tables.remove_handle(handle, 6).is_err() && tables.remove_handle(handle, 5).is_ok());
        assert!(tables.check_handles().is_ok() && tables.inner_handle(handle).is_err());
    }

    #[test]
    fn files_that_are_remembered_for_ever_are_bounded() {
        let mut tables = Tables::new(Limits { inodes: 100, handles: 1 });
        assert!(tables.add_lookup(found(NUMBERED | MAX_NUMBERED)).is_ok());
        assert!(tables.add_lookup(found(MAX_NUMBERED + 1)).is_ok());
        assert!(tables.check_inodes().is_ok());
        assert!(tables.add_lookup(found(NUMBERED | (MAX_NUMBERED + 1))).is_err());
        assert!(tables.check_inodes().is_err());
        assert!(tables.take().check_inodes().is_err() && tables.check_inodes().is_err());
    }

    /// A guest that goes on from a snapshot knows 5 as what fuse-backend-rs now numbers 6, and the other way round.
    #[test]
    fn numbers_of_a_snapshot_stay_the_guests() {
        let mut tables = Tables::new(Limits { inodes: 100, handles: 9 });
        tables.set_restored();
        let node = |inner| Node { inner, lookups: 2, file: file(), place: None };
        tables.insert_restored(5, node(Some(6)));
        tables.insert_restored(7, node(None));
        assert_eq!((tables.inner(5).ok(), tables.add_lookup(found(6)).ok()), (Some(6), Some(5)));
        // What has the number 5, or 7, there now is another file.
        for other in [5, 7] {
            let number = tables.add_lookup(found(other)).expect("room");
            assert!(number >= FIRST_OWN_NUMBER && tables.inner(number).ok() == Some(other));
            assert_eq!(tables.add_lookup(found(other)).ok(), Some(number));
            assert_eq!(tables.forget(number, 2), Some(other));
            assert!(tables.inner(number).is_err() && tables.known_as(other).is_none());
        }
        let error = |number| tables.inner(number).expect_err("none").raw_os_error();
        assert_eq!((error(7), error(6), tables.inner(ROOT).ok()), (Some(libc::ESTALE), Some(libc::EBADF), Some(ROOT)));
        tables.insert_restored_handle(40, Handle { inner: 1, inner_node: 6, node: 5, flags: 0 });
        assert_eq!(tables.add_handle(Some(1), 5, 0), Some(41));
        assert_eq!((tables.forget(5, 3), tables.forget(7, 2)), (Some(6), None));
    }
}
