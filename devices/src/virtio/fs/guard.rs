//! The passthrough file system of fuse-backend-rs, behind rules (`requests.rs`). The rules are checked on the decoded values that the file
//! system then uses.

use super::policy::{Access, Rules};
use super::tables::{Found, Limits, Place, Restoring, Tables, file_id};
use super::xattr::Attributes;
use crate::virtio::saved::FileId;
use fuse_backend_rs::abi::fuse_abi::CreateIn;
use fuse_backend_rs::api::filesystem::{Context, Entry, FileSystem as _, OpenOptions};
use fuse_backend_rs::api::server::Server;
use fuse_backend_rs::passthrough::PassthroughFs;
use rustix::io::Errno;
use std::ffi::CStr;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};

/// Decodes requests for a shared directory.
pub(super) type FsServer = Server<Arc<GuardedFs>>;

/// The file system of a shared directory: checks each request against the rules before fuse-backend-rs carries it out.
pub(super) struct GuardedFs {
    pub(super) inner: PassthroughFs,
    attributes: Attributes,
    /// The guest may use extended attributes in this session.
    pub(super) has_attributes: AtomicBool,
    pub(super) rules: Rules,
    /// The shared directory.
    pub(super) root: FileId,
    /// Locked while `inner` changes its own tables, so that both always agree.
    tables: Mutex<Tables>,
    /// What a snapshot has of it, until the first thread of the device looks it up.
    pub(super) restoring: Mutex<Option<Restoring>>,
    /// The workers end, and the guest goes on with what it knows afterwards.
    keeps: AtomicBool,
}

impl GuardedFs {
    /// Wraps `inner`, whose `root` is open.
    pub(super) fn new(
        inner: PassthroughFs,
        root: FileId,
        attributes: Attributes,
        rules: Rules,
        limits: Limits,
    ) -> Self {
        Self {
            inner,
            attributes,
            has_attributes: AtomicBool::new(false),
            rules,
            root,
            tables: Mutex::new(Tables::new(limits)),
            restoring: Mutex::default(),
            keeps: AtomicBool::new(false),
        }
    }

    /// The guest is to go on with what it knows and has open when the workers have ended, or not.
    pub(super) fn keep(&self, keeps: bool) {
        self.keeps.store(keeps, Ordering::Release);
    }

    pub(super) fn keeps(&self) -> bool {
        self.keeps.load(Ordering::Acquire)
    }

    pub(super) fn rules(&self) -> Rules {
        self.rules
    }

    /// Closes all files but the shared directory itself. Returns false where a request holds the tables, as the host's file
    /// system does not answer.
    pub(super) fn try_reset(&self) -> bool {
        let tables = match self.tables.try_lock() {
            Ok(tables) => tables,
            Err(TryLockError::Poisoned(error)) => error.into_inner(),
            Err(TryLockError::WouldBlock) => return false,
        };
        self.reset(tables);
        true
    }

    pub(super) fn reset(&self, mut tables: MutexGuard<'_, Tables>) {
        let context = Context::default();
        let old = tables.take();
        for handle in old.handles.values() {
            // It fails for a handle that is not there only.
            let _ = self.inner.release(&context, handle.inner_node, 0, handle.inner, false, false, None);
        }
        let nodes = old.inodes.values().filter_map(|node| node.inner);
        self.inner.batch_forget(&context, nodes.map(|inner| (inner, u64::MAX)).collect());
    }

    /// Returns the number that `inner` has for a node.
    pub(super) fn node(&self, inode: u64) -> io::Result<u64> {
        self.tables().inner(inode)
    }

    /// Returns the numbers that `inner` has for a node and for an open file.
    pub(super) fn open_node(&self, inode: u64, handle: u64) -> io::Result<(u64, u64)> {
        let tables = self.tables();
        Ok((tables.inner(inode)?, tables.inner_handle(handle)?))
    }

    /// Where a file is. A directory that the guest can write has no snapshots, for which this is kept.
    pub(super) fn place(&self, parent: u64, name: &CStr) -> Option<Place> {
        (self.rules.access == Access::ReadOnly).then(|| Place { parent, name: name.to_owned() })
    }

    pub(super) fn tables(&self) -> MutexGuard<'_, Tables> {
        self.tables.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts the lookup of `entry`, and gives it the number that the guest knows; or makes `inner` forget it.
    pub(super) fn count(
        &self,
        tables: &mut Tables,
        ctx: &Context,
        place: Option<Place>,
        entry: Entry,
    ) -> io::Result<Entry> {
        match tables.add_lookup(Found { inner: entry.inode, file: file_id(&entry.attr), place }) {
            Ok(inode) => Ok(Entry { inode, ..entry }),
            Err(full) => {
                self.inner.forget(ctx, entry.inode, 1);
                Err(full)
            }
        }
    }

    /// Looks a file up and opens it, for a CREATE of a file that is there already.
    pub(super) fn open_existing(
        &self,
        tables: &mut Tables,
        ctx: &Context,
        parent: u64,
        name: &CStr,
        args: CreateIn,
    ) -> io::Result<(Entry, Option<u64>, OpenOptions, Option<u32>)> {
        let found = self.inner.lookup(ctx, tables.inner(parent)?, name)?;
        let entry = self.count(tables, ctx, self.place(parent, name), found)?;
        match self.inner.open(ctx, found.inode, args.flags, args.fuse_flags) {
            Ok((handle, options, backing)) => {
                let handle = tables.add_handle(handle, entry.inode, args.flags);
                Ok((entry, handle, options, backing))
            }
            Err(error) => {
                tables.forget(entry.inode, 1);
                self.inner.forget(ctx, found.inode, 1);
                Err(error)
            }
        }
    }

    /// Runs a request that makes a file and looks it up. Nothing is made where there is no room for one more inode.
    pub(super) fn make(
        &self,
        ctx: &Context,
        parent: u64,
        make: impl FnOnce(&PassthroughFs, u64) -> io::Result<Entry>,
    ) -> io::Result<Entry> {
        let inner = self.writable()?;
        let mut tables = self.tables();
        tables.check_inodes()?;
        let entry = make(inner, tables.inner(parent)?)?;
        self.count(&mut tables, ctx, None, entry)
    }

    /// # Errors
    /// Returns ENOSYS where the session has no extended attributes: the guest then asks for none again.
    pub(super) fn attributes(&self) -> io::Result<&Attributes> {
        if self.has_attributes.load(Ordering::Relaxed) { Ok(&self.attributes) } else { Err(Errno::NOSYS.into()) }
    }

    /// Returns the file system for a request that changes files.
    ///
    /// # Errors
    /// Returns EROFS where the directory is read-only.
    pub(super) fn writable(&self) -> io::Result<&PassthroughFs> {
        match self.rules.access {
            Access::ReadWrite => Ok(&self.inner),
            Access::ReadOnly => Err(Errno::ROFS.into()),
        }
    }
}
