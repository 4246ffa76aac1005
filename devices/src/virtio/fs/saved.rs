//! What a guest knows of a shared directory and has open in it, for snapshots.
//!
//! A file is saved as a name in a directory that the guest knows, and is looked up again by it: beneath the shared directory, one name at
//! a time, as a LOOKUP of the guest is. It is the same file if the number of the file and of its device are the same. Where they are not,
//! as a file was replaced or removed on the host, requests for it fail with ESTALE, as on a network file system: Linux looks its name up
//! again then, and finds what is there now. A file that the guest has open cannot be found in that way, and a program may have mapped it:
//! it must be there, and must have the content that it had, or the guest does not go on.

use super::guard::GuardedFs;
use super::policy::{Access, check_name, open_flags};
use super::tables::{Handle, MAX_HANDLES, MAX_INODES, MAX_NUMBER, Node, Place, ROOT, Restoring, Tables, file_id};
use crate::path_text::PathText as _;
use crate::virtio::saved::{
    DeviceFault, FileContent, FileId, NodePlace, SaveFault, ShareHandle, ShareNode, ShareState,
};
use fuse_backend_rs::api::filesystem::{Context, FileSystem as _};
use libc::stat64;
use std::collections::{HashMap, HashSet, VecDeque};
use std::ffi::{CString, OsStr};
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::sync::PoisonError;
use std::sync::atomic::Ordering;

/// The most bytes of a share in a snapshot: all of a machine together may have 16 MiB.
const MAX_BYTES: usize = 8 << 20;
/// Bytes of a node in a snapshot without its name, at most: numbers of 7 bits a byte.
const NODE_BYTES: usize = 60;
/// The longest path in a message, in bytes, and the most names of one.
const MAX_SHOWN: usize = 200;
const MAX_SHOWN_NAMES: usize = 32;

/// What tells the content of a file from what it was. That of a directory is not compared.
fn content(stat: &stat64) -> FileContent {
    if stat.st_mode & libc::S_IFMT == libc::S_IFDIR {
        return FileContent::default();
    }
    FileContent { bytes: stat.st_size.cast_unsigned(), modified: (stat.st_mtime, stat.st_mtime_nsec) }
}

/// Shows the path of a node that `place` finds, as far as that is short.
fn shown(number: u64, place: impl Fn(u64) -> Option<(u64, Vec<u8>)>) -> String {
    let (mut names, mut at) = (Vec::new(), number);
    while names.len() < MAX_SHOWN_NAMES
        && let Some((parent, name)) = place(at)
    {
        names.push(name);
        at = parent;
    }
    names.reverse();
    let path = names.join(&b'/');
    let mut text = OsStr::from_bytes(path.get(..path.len().min(MAX_SHOWN)).unwrap_or_default()).shown().to_string();
    if path.len() > MAX_SHOWN {
        text.push_str("...");
    }
    text
}

impl Tables {
    fn shown(&self, number: u64) -> String {
        shown(number, |at| {
            let place = self.inodes.get(&at)?.place.as_ref()?;
            Some((place.parent, place.name.as_bytes().to_vec()))
        })
    }

    /// The nodes that can be found by their names, a directory before what is in it.
    fn in_order(&self) -> Vec<u64> {
        let mut children: HashMap<u64, Vec<u64>> = HashMap::new();
        for (number, node) in &self.inodes {
            if let (Some(place), Some(_)) = (&node.place, node.inner) {
                children.entry(place.parent).or_default().push(*number);
            }
        }
        let (mut order, mut directories) = (Vec::new(), VecDeque::from([ROOT]));
        while let Some(directory) = directories.pop_front() {
            let mut found = children.remove(&directory).unwrap_or_default();
            found.sort_unstable();
            directories.extend(&found);
            order.extend(found);
        }
        order
    }
}

impl GuardedFs {
    /// Notes what tells the contents of open files from others. To be called on a thread of the device.
    pub(super) fn mark_open_files(&self) {
        let mut tables = self.tables();
        let nodes: HashSet<_> = tables.handles.values().map(|handle| (handle.node, handle.inner_node)).collect();
        let context = Context::default();
        let mark = |(node, inner)| {
            let (stat, _) = self.inner.getattr(&context, inner, None).ok()?;
            (stat.st_nlink > 0).then(|| (node, content(&stat)))
        };
        tables.contents = nodes.into_iter().filter_map(mark).collect();
    }

    /// Returns what the guest knows and has open; `None` for a directory that it can write. No worker may have it.
    ///
    /// # Errors
    /// Where that is too much, or a file is open that has no name any more.
    pub(super) fn save(&self) -> Result<Option<ShareState>, SaveFault> {
        if self.rules.access != Access::ReadOnly {
            return Ok(None);
        }
        let tables = self.tables();
        let order = tables.in_order();
        let placed: HashSet<u64> = order.iter().copied().collect();
        let mut others: Vec<u64> = tables.inodes.keys().copied().filter(|number| !placed.contains(number)).collect();
        others.sort_unstable();
        let nodes: Vec<ShareNode> = order
            .into_iter()
            .chain(others)
            .filter_map(|number| {
                let node = tables.inodes.get(&number)?;
                let place = node.place.as_ref().filter(|_| placed.contains(&number));
                let place = place.map(|place| NodePlace { parent: place.parent, name: place.name.as_bytes().to_vec() });
                Some(ShareNode { number, lookups: node.lookups, file: node.file, place })
            })
            .collect();
        let bytes = nodes.iter().map(|node| NODE_BYTES + node.place.as_ref().map_or(0, |place| place.name.len())).sum();
        if MAX_BYTES < bytes {
            return Err(SaveFault::ManyFiles { files: nodes.len() });
        }
        let mut handles = Vec::new();
        for (number, handle) in &tables.handles {
            let content =
                tables.contents.get(&handle.node).filter(|_| handle.node == ROOT || placed.contains(&handle.node));
            let Some(content) = content else { return Err(SaveFault::OpenFile { path: tables.shown(handle.node) }) };
            handles.push(ShareHandle { number: *number, node: handle.node, flags: handle.flags, content: *content });
        }
        handles.sort_unstable_by_key(|handle| handle.number);
        let has_attributes = self.has_attributes.load(Ordering::Relaxed);
        Ok(Some(ShareState { has_attributes, root: self.root, nodes, handles }))
    }

    /// Takes what the guest is to know and have open. Its files are looked up again by [`Self::finish_restore`].
    ///
    /// # Errors
    /// Where the state is of another directory or none of any.
    pub(super) fn restore(&self, state: &ShareState) -> Result<(), DeviceFault> {
        if self.rules.access != Access::ReadOnly || self.root != state.root {
            return Err(DeviceFault::OtherShare);
        }
        let places = check(state)?;
        let (limits, needed) = (self.tables().limits(), (state.nodes.len(), state.handles.len()));
        if needed.0 > limits.inodes || needed.1 > limits.handles {
            return Err(DeviceFault::ManyFiles { files: needed.0.saturating_add(needed.1) });
        }
        let nodes =
            state.nodes.iter().zip(places).map(|(node, place)| {
                (node.number, Node { inner: None, lookups: node.lookups, file: node.file, place })
            });
        let restoring = Restoring { nodes: nodes.collect(), handles: state.handles.clone() };
        *self.restoring.lock().unwrap_or_else(PoisonError::into_inner) = Some(restoring);
        self.has_attributes.store(state.has_attributes, Ordering::Relaxed);
        self.keep(true);
        Ok(())
    }

    /// Looks up again what the guest knows, and opens what it has open, where there is a snapshot's. To be called on a thread of the device,
    /// which can do what a guest's own requests can, and no more.
    ///
    /// # Errors
    /// Where an open file is not what it was, or the host has no room for one.
    pub(super) fn finish_restore(&self) -> Result<(), DeviceFault> {
        let restoring = self.restoring.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(Restoring { nodes, handles }) = restoring else { return Ok(()) };
        let mut tables = self.tables();
        tables.set_restored();
        for (number, node) in nodes {
            let inner = node.place.as_ref().map(|place| self.look_up(&mut tables, place, node.file)).transpose();
            let inner = inner.map_err(DeviceFault::Io)?.flatten();
            tables.insert_restored(number, Node { inner, ..node });
        }
        for handle in handles {
            let opened = self.open_again(&tables, &handle);
            let Some(opened) = opened else { return Err(DeviceFault::OpenFile { path: tables.shown(handle.node) }) };
            tables.insert_restored_handle(handle.number, opened);
        }
        Ok(())
    }

    /// Returns the number that the file has at `inner` now; `None` where there is another one, or none.
    ///
    /// # Errors
    /// Where the host has no room for one more open file.
    fn look_up(&self, tables: &mut Tables, place: &Place, file: FileId) -> io::Result<Option<u64>> {
        let Ok(parent) = tables.inner(place.parent) else { return Ok(None) };
        let context = Context::default();
        let entry = match self.inner.lookup(&context, parent, &place.name) {
            Ok(entry) => entry,
            Err(error) if matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE | libc::ENOMEM)) => {
                return Err(error);
            }
            Err(_) => return Ok(None),
        };
        // Another name of a file that the guest knows by another number was one of another file.
        let is_same = file_id(&entry.attr) == file && tables.known_as(entry.inode).is_none();
        if is_same && tables.check_number(entry.inode).is_ok() {
            return Ok(Some(entry.inode));
        }
        self.inner.forget(&context, entry.inode, 1);
        Ok(None)
    }

    /// Opens a file for reading that must be what it was.
    fn open_again(&self, tables: &Tables, handle: &ShareHandle) -> Option<Handle> {
        let context = Context::default();
        let inner_node = tables.inner(handle.node).ok()?;
        let (stat, _) = self.inner.getattr(&context, inner_node, None).ok()?;
        if content(&stat) != handle.content {
            return None;
        }
        let flags = open_flags(handle.flags, Access::ReadOnly).ok()?;
        let inner = if file_id(&stat).kind == libc::S_IFDIR {
            self.inner.opendir(&context, inner_node, flags).ok()?.0
        } else {
            self.inner.open(&context, inner_node, flags, 0).ok()?.0
        };
        Some(Handle { inner: inner?, inner_node, node: handle.node, flags })
    }
}

/// Checks that a guest can know this, and returns the places of the nodes. Nothing was looked up yet.
fn check(state: &ShareState) -> Result<Vec<Option<Place>>, DeviceFault> {
    if state.nodes.len() > MAX_INODES || state.handles.len() > MAX_HANDLES {
        return Err(DeviceFault::NoShare);
    }
    let mut kinds = HashMap::from([(ROOT, libc::S_IFDIR)]);
    let mut places = Vec::new();
    for node in &state.nodes {
        let place = match &node.place {
            None => None,
            // A directory comes before what is in it: there is no circle.
            Some(NodePlace { parent, name }) if kinds.get(parent) == Some(&libc::S_IFDIR) => {
                let name = CString::new(name.as_slice()).map_err(|_| DeviceFault::NoShare)?;
                check_name(&name).map_err(|_| DeviceFault::NoShare)?;
                Some(Place { parent: *parent, name })
            }
            Some(_) => return Err(DeviceFault::NoShare),
        };
        let is_valid = (ROOT + 1..MAX_NUMBER).contains(&node.number) && node.lookups > 0;
        if !is_valid || kinds.insert(node.number, node.file.kind).is_some() {
            return Err(DeviceFault::NoShare);
        }
        places.push(place);
    }
    let mut numbers = HashSet::new();
    for handle in &state.handles {
        let is_open = kinds.get(&handle.node).is_some_and(|kind| [libc::S_IFDIR, libc::S_IFREG].contains(kind));
        let is_valid = (1..MAX_NUMBER).contains(&handle.number) && open_flags(handle.flags, Access::ReadOnly).is_ok();
        if !is_open || !is_valid || !numbers.insert(handle.number) {
            return Err(DeviceFault::NoShare);
        }
    }
    Ok(places)
}
