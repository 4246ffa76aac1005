//! The passthrough file system of fuse-backend-rs, behind rules. The rules are checked on the decoded values that the file
//! system then uses. A request that is not implemented here is refused (ENOSYS), whatever fuse-backend-rs can do.

use super::policy::{Access, PrivilegedFiles, Rules, Users, check_name, host_flags, open_flags, umask};
use super::tables::{Limits, Tables};
use super::xattr::{self, Attributes, Operation, Wanted};
use fuse_backend_rs::abi::fuse_abi::CreateIn;
use fuse_backend_rs::api::filesystem::{
    Context, DirEntry, Entry, FileSystem, FsOptions, GetxattrReply, ListxattrReply, OpenOptions, SetattrValid,
    ZeroCopyReader, ZeroCopyWriter,
};
use fuse_backend_rs::api::server::Server;
use fuse_backend_rs::passthrough::PassthroughFs;
use libc::{stat64, statvfs64};
use rustix::io::Errno;
use std::ffi::CStr;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::Duration;

/// What Linux may do to make fewer requests, each of which is a kick, an interrupt and mostly a halt of the guest:
/// - names and attributes of a directory in one request (`DO_READDIRPLUS`, where it looks as if both are wanted: `AUTO`);
/// - up to 1 MiB of data a request, in place of 4 KiB (WRITE) and 128 KiB (READ): `MAX_PAGES`, and `BIG_WRITES` for Linux before 4.20;
/// - several requests at a time, for one file (`ASYNC_READ`) and for the names of one directory (`PARALLEL_DIROPS`): they share a
///   kick and an interrupt;
/// - a symbolic link is read once (`CACHE_SYMLINKS`): its target never changes, as another link is another inode, and the number of
///   an inode that the guest knows is not used again on the host, where it is open.
const REQUEST_SAVERS: FsOptions = FsOptions::DO_READDIRPLUS
    .union(FsOptions::READDIRPLUS_AUTO)
    .union(FsOptions::MAX_PAGES)
    .union(FsOptions::BIG_WRITES)
    .union(FsOptions::ASYNC_READ)
    .union(FsOptions::PARALLEL_DIROPS)
    .union(FsOptions::CACHE_SYMLINKS);

/// Decodes requests for a shared directory.
pub(super) type FsServer = Server<Arc<GuardedFs>>;

/// The file system of a shared directory: checks each request against the rules before fuse-backend-rs carries it out.
pub(super) struct GuardedFs {
    inner: PassthroughFs,
    attributes: Attributes,
    /// The guest may use extended attributes in this session.
    has_attributes: AtomicBool,
    rules: Rules,
    /// Locked while `inner` changes its own tables, so that both always agree.
    tables: Mutex<Tables>,
}

impl GuardedFs {
    /// Wraps `inner`, whose root is open.
    pub(super) fn new(inner: PassthroughFs, attributes: Attributes, rules: Rules, limits: Limits) -> Self {
        Self {
            inner,
            attributes,
            has_attributes: AtomicBool::new(false),
            rules,
            tables: Mutex::new(Tables::new(limits)),
        }
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

    fn reset(&self, mut tables: MutexGuard<'_, Tables>) {
        let context = Context::default();
        for (handle, inode) in tables.take_handles() {
            // It fails for a handle that is not there only.
            let _ = self.inner.release(&context, inode, 0, handle, false, false, None);
        }
        self.inner.batch_forget(&context, tables.take_inodes());
    }

    fn tables(&self) -> MutexGuard<'_, Tables> {
        self.tables.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts the lookup of `entry`, or makes `inner` forget it.
    fn count(&self, tables: &mut Tables, ctx: &Context, entry: Entry) -> io::Result<Entry> {
        match tables.add_lookup(entry.inode) {
            Ok(()) => Ok(entry),
            Err(full) => {
                self.inner.forget(ctx, entry.inode, 1);
                Err(full)
            }
        }
    }

    /// Looks a file up and opens it, for a CREATE of a file that is there already.
    fn open_existing(
        &self,
        tables: &mut Tables,
        ctx: &Context,
        parent: u64,
        name: &CStr,
        args: CreateIn,
    ) -> io::Result<(Entry, Option<u64>, OpenOptions, Option<u32>)> {
        let entry = self.inner.lookup(ctx, parent, name)?;
        let entry = self.count(tables, ctx, entry)?;
        match self.inner.open(ctx, entry.inode, args.flags, args.fuse_flags) {
            Ok((handle, options, backing)) => {
                tables.add_handle(handle, entry.inode);
                Ok((entry, handle, options, backing))
            }
            Err(error) => {
                tables.forget(entry.inode, 1);
                self.inner.forget(ctx, entry.inode, 1);
                Err(error)
            }
        }
    }

    /// Runs a request that makes a file and looks it up. Nothing is made where there is no room for one more inode.
    fn make(&self, ctx: &Context, make: impl FnOnce(&PassthroughFs) -> io::Result<Entry>) -> io::Result<Entry> {
        let inner = self.writable()?;
        let mut tables = self.tables();
        tables.check_inodes()?;
        let entry = make(inner)?;
        self.count(&mut tables, ctx, entry)
    }

    /// # Errors
    /// Returns ENOSYS where the session has no extended attributes: the guest then asks for none again.
    fn attributes(&self) -> io::Result<&Attributes> {
        if self.has_attributes.load(Ordering::Relaxed) { Ok(&self.attributes) } else { Err(Errno::NOSYS.into()) }
    }

    /// Returns the file system for a request that changes files.
    ///
    /// # Errors
    /// Returns EROFS where the directory is read-only.
    fn writable(&self) -> io::Result<&PassthroughFs> {
        match self.rules.access {
            Access::ReadWrite => Ok(&self.inner),
            Access::ReadOnly => Err(Errno::ROFS.into()),
        }
    }
}

impl FileSystem for GuardedFs {
    type Inode = u64;
    type Handle = u64;

    /// Starts a new session. `inner` has no part in it: it would open the shared directory by its path again.
    fn init(&self, capable: FsOptions) -> io::Result<FsOptions> {
        self.reset(self.tables());
        let mut options = REQUEST_SAVERS;
        // The host takes set-user-ID bits and capabilities from files that this thread writes, as it has no CAP_FSETID. A guest
        // that does not know that asks for the attribute `security.capability` before each write, which doubles its requests:
        // then there are no extended attributes.
        if self.rules.privileged_files == PrivilegedFiles::Refused {
            options |= FsOptions::HANDLE_KILLPRIV_V2;
        }
        let negotiated = (options & capable).contains(FsOptions::HANDLE_KILLPRIV_V2);
        self.has_attributes.store(negotiated, Ordering::Relaxed);
        Ok(options)
    }

    /// Without root's rights hwvmm cannot act as another user, and owns all that the guest makes. For user 0,
    /// fuse-backend-rs changes to no other user.
    fn id_remap(&self, ctx: &mut Context) -> io::Result<()> {
        if self.rules.users == Users::AsHwvmm {
            (ctx.uid, ctx.gid) = (0, 0);
        }
        Ok(())
    }

    fn destroy(&self) {
        self.reset(self.tables());
    }

    fn lookup(&self, ctx: &Context, parent: u64, name: &CStr) -> io::Result<Entry> {
        check_name(name)?;
        let mut tables = self.tables();
        let entry = self.inner.lookup(ctx, parent, name)?;
        self.count(&mut tables, ctx, entry)
    }

    fn forget(&self, ctx: &Context, inode: u64, count: u64) {
        let mut tables = self.tables();
        self.inner.forget(ctx, inode, count);
        tables.forget(inode, count);
    }

    fn getattr(&self, ctx: &Context, inode: u64, handle: Option<u64>) -> io::Result<(stat64, Duration)> {
        self.inner.getattr(ctx, inode, handle)
    }

    fn setattr(
        &self,
        ctx: &Context,
        inode: u64,
        attr: stat64,
        handle: Option<u64>,
        valid: SetattrValid,
    ) -> io::Result<(stat64, Duration)> {
        let inner = self.writable()?;
        if valid.contains(SetattrValid::MODE) {
            let (now, _) = inner.getattr(ctx, inode, None)?;
            self.rules.privileged_files.check_change(now.st_mode, attr.st_mode)?;
        }
        inner.setattr(ctx, inode, attr, handle, valid)
    }

    fn readlink(&self, ctx: &Context, inode: u64) -> io::Result<Vec<u8>> {
        self.inner.readlink(ctx, inode)
    }

    fn symlink(&self, ctx: &Context, target: &CStr, parent: u64, name: &CStr) -> io::Result<Entry> {
        check_name(name)?;
        self.make(ctx, |inner| inner.symlink(ctx, target, parent, name))
    }

    fn mknod(&self, ctx: &Context, parent: u64, name: &CStr, mode: u32, device: u32, mask: u32) -> io::Result<Entry> {
        check_name(name)?;
        self.writable()?;
        self.rules.privileged_files.check_node(mode)?;
        self.make(ctx, |inner| inner.mknod(ctx, parent, name, mode, device, umask(mask)))
    }

    fn mkdir(&self, ctx: &Context, parent: u64, name: &CStr, mode: u32, mask: u32) -> io::Result<Entry> {
        check_name(name)?;
        self.writable()?;
        self.rules.privileged_files.check_mode(mode)?;
        self.make(ctx, |inner| inner.mkdir(ctx, parent, name, mode, umask(mask)))
    }

    fn unlink(&self, ctx: &Context, parent: u64, name: &CStr) -> io::Result<()> {
        check_name(name)?;
        self.writable()?.unlink(ctx, parent, name)
    }

    fn rmdir(&self, ctx: &Context, parent: u64, name: &CStr) -> io::Result<()> {
        check_name(name)?;
        self.writable()?.rmdir(ctx, parent, name)
    }

    fn rename(
        &self,
        ctx: &Context,
        old_parent: u64,
        old_name: &CStr,
        new_parent: u64,
        new_name: &CStr,
        flags: u32,
    ) -> io::Result<()> {
        check_name(old_name)?;
        check_name(new_name)?;
        let inner = self.writable()?;
        self.rules.privileged_files.check_rename(flags)?;
        inner.rename(ctx, old_parent, old_name, new_parent, new_name, flags)
    }

    fn link(&self, ctx: &Context, inode: u64, new_parent: u64, new_name: &CStr) -> io::Result<Entry> {
        check_name(new_name)?;
        self.make(ctx, |inner| inner.link(ctx, inode, new_parent, new_name))
    }

    fn open(
        &self,
        ctx: &Context,
        inode: u64,
        flags: u32,
        fuse_flags: u32,
    ) -> io::Result<(Option<u64>, OpenOptions, Option<u32>)> {
        let flags = open_flags(flags, self.rules.access)?;
        let mut tables = self.tables();
        tables.check_handles()?;
        let opened = self.inner.open(ctx, inode, flags, fuse_flags)?;
        tables.add_handle(opened.0, inode);
        Ok(opened)
    }

    fn create(
        &self,
        ctx: &Context,
        parent: u64,
        name: &CStr,
        args: CreateIn,
    ) -> io::Result<(Entry, Option<u64>, OpenOptions, Option<u32>)> {
        check_name(name)?;
        let inner = self.writable()?;
        self.rules.privileged_files.check_mode(args.mode)?;
        let mut tables = self.tables();
        tables.check_inodes()?;
        tables.check_handles()?;
        // With O_EXCL, as `inner` keeps a lookup of a file that is there but cannot be opened.
        let flags = host_flags(args.flags);
        let exclusive = libc::O_EXCL.cast_unsigned();
        let new = CreateIn { flags: flags | exclusive, umask: umask(args.umask), ..args };
        let (entry, handle, options, backing) = match inner.create(ctx, parent, name, new) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists && flags & exclusive == 0 => {
                return self.open_existing(&mut tables, ctx, parent, name, CreateIn { flags, ..args });
            }
            created => created?,
        };
        tables.add_handle(handle, entry.inode);
        Ok((self.count(&mut tables, ctx, entry)?, handle, options, backing))
    }

    fn read(
        &self,
        ctx: &Context,
        inode: u64,
        handle: u64,
        writer: &mut dyn ZeroCopyWriter,
        size: u32,
        offset: u64,
        lock_owner: Option<u64>,
        flags: u32,
    ) -> io::Result<usize> {
        self.inner.read(ctx, inode, handle, writer, size, offset, lock_owner, host_flags(flags))
    }

    fn write(
        &self,
        ctx: &Context,
        inode: u64,
        handle: u64,
        reader: &mut dyn ZeroCopyReader,
        size: u32,
        offset: u64,
        lock_owner: Option<u64>,
        delayed_write: bool,
        flags: u32,
        fuse_flags: u32,
    ) -> io::Result<usize> {
        let (inner, flags) = (self.writable()?, host_flags(flags));
        inner.write(ctx, inode, handle, reader, size, offset, lock_owner, delayed_write, flags, fuse_flags)
    }

    /// # Errors
    /// Returns ENOSYS where the directory is read-only: there is nothing to write when a file is closed, and the guest asks no more.
    fn flush(&self, ctx: &Context, inode: u64, handle: u64, lock_owner: u64) -> io::Result<()> {
        if self.rules.access == Access::ReadOnly {
            return Err(Errno::NOSYS.into());
        }
        self.inner.flush(ctx, inode, handle, lock_owner)
    }

    fn fsync(&self, ctx: &Context, inode: u64, data_only: bool, handle: u64) -> io::Result<()> {
        self.inner.fsync(ctx, inode, data_only, handle)
    }

    fn fallocate(&self, ctx: &Context, inode: u64, handle: u64, mode: u32, offset: u64, length: u64) -> io::Result<()> {
        self.writable()?.fallocate(ctx, inode, handle, mode, offset, length)
    }

    fn release(
        &self,
        ctx: &Context,
        inode: u64,
        flags: u32,
        handle: u64,
        flush: bool,
        flock_release: bool,
        lock_owner: Option<u64>,
    ) -> io::Result<()> {
        let mut tables = self.tables();
        self.inner.release(ctx, inode, flags, handle, flush, flock_release, lock_owner)?;
        tables.remove_handle(handle);
        Ok(())
    }

    fn statfs(&self, ctx: &Context, inode: u64) -> io::Result<statvfs64> {
        self.inner.statfs(ctx, inode)
    }

    fn opendir(&self, ctx: &Context, inode: u64, flags: u32) -> io::Result<(Option<u64>, OpenOptions)> {
        let flags = open_flags(flags, self.rules.access)?;
        let mut tables = self.tables();
        tables.check_handles()?;
        let opened = self.inner.opendir(ctx, inode, flags)?;
        tables.add_handle(opened.0, inode);
        Ok(opened)
    }

    fn readdir(
        &self,
        ctx: &Context,
        inode: u64,
        handle: u64,
        size: u32,
        offset: u64,
        add_entry: &mut dyn FnMut(DirEntry<'_>) -> io::Result<usize>,
    ) -> io::Result<()> {
        let mut tables = self.tables();
        // `inner` looks each name up and forgets it again.
        self.inner.readdir(ctx, inode, handle, size, offset, &mut |entry| {
            tables.check_number(entry.ino)?;
            add_entry(entry)
        })
    }

    fn readdirplus(
        &self,
        ctx: &Context,
        inode: u64,
        handle: u64,
        size: u32,
        offset: u64,
        add_entry: &mut dyn FnMut(DirEntry<'_>, Entry) -> io::Result<usize>,
    ) -> io::Result<()> {
        let mut tables = self.tables();
        self.inner.readdirplus(ctx, inode, handle, size, offset, &mut |name, entry| {
            if self.count(&mut tables, ctx, entry).is_err() {
                // Without a node the guest gets the name alone, and the list stays complete.
                return add_entry(name, Entry { inode: 0, ..entry });
            }
            let added = add_entry(name, entry);
            if !matches!(added, Ok(1..)) {
                tables.forget(entry.inode, 1);
            }
            if added.is_err() {
                // `inner` forgets it where there was no room for it, but not after an error.
                self.inner.forget(ctx, entry.inode, 1);
            }
            added
        })
    }

    fn fsyncdir(&self, ctx: &Context, inode: u64, data_only: bool, handle: u64) -> io::Result<()> {
        self.inner.fsyncdir(ctx, inode, data_only, handle)
    }

    fn releasedir(&self, ctx: &Context, inode: u64, flags: u32, handle: u64) -> io::Result<()> {
        let mut tables = self.tables();
        self.inner.releasedir(ctx, inode, flags, handle)?;
        tables.remove_handle(handle);
        Ok(())
    }

    fn access(&self, ctx: &Context, inode: u64, mask: u32) -> io::Result<()> {
        self.inner.access(ctx, inode, mask)
    }

    fn lseek(&self, ctx: &Context, inode: u64, handle: u64, offset: u64, whence: u32) -> io::Result<u64> {
        self.inner.lseek(ctx, inode, handle, offset, whence)
    }

    fn setxattr(&self, ctx: &Context, inode: u64, name: &CStr, value: &[u8], flags: u32) -> io::Result<()> {
        let (attributes, inner) = (self.attributes()?, self.writable()?);
        attributes.run(inner, ctx, inode, Operation::set(name, value, flags)?).map(drop)
    }

    fn getxattr(&self, ctx: &Context, inode: u64, name: &CStr, size: u32) -> io::Result<GetxattrReply> {
        let attributes = self.attributes()?;
        let operation = Operation::Get(xattr::Name::new(name)?);
        Ok(match xattr::fit(attributes.run(&self.inner, ctx, inode, operation)?, size)? {
            Wanted::Length(len) => GetxattrReply::Count(len),
            Wanted::Bytes(value) => GetxattrReply::Value(value),
        })
    }

    fn listxattr(&self, ctx: &Context, inode: u64, size: u32) -> io::Result<ListxattrReply> {
        Ok(match xattr::fit(self.attributes()?.run(&self.inner, ctx, inode, Operation::List)?, size)? {
            Wanted::Length(len) => ListxattrReply::Count(len),
            Wanted::Bytes(names) => ListxattrReply::Names(names),
        })
    }

    fn removexattr(&self, ctx: &Context, inode: u64, name: &CStr) -> io::Result<()> {
        let (attributes, inner) = (self.attributes()?, self.writable()?);
        attributes.run(inner, ctx, inode, Operation::Remove(xattr::Name::new(name)?)).map(drop)
    }
}
