//! The requests of a guest, each checked against the rules before fuse-backend-rs carries it out. One that is not here is refused (ENOSYS),
//! whatever fuse-backend-rs can do.

use super::guard::GuardedFs;
use super::policy::{Access, PrivilegedFiles, Users, check_name, host_flags, open_flags, umask};
use super::tables::Handle;
use super::xattr::{self, Operation, Wanted};
use fuse_backend_rs::abi::fuse_abi::CreateIn;
use fuse_backend_rs::api::filesystem::{
    Context, DirEntry, Entry, FileSystem, FsOptions, GetxattrReply, ListxattrReply, OpenOptions, SetattrValid,
    ZeroCopyReader, ZeroCopyWriter,
};
use libc::{stat64, statvfs64};
use rustix::io::Errno;
use std::ffi::{CStr, CString};
use std::io;
use std::sync::atomic::Ordering;
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
        let entry = self.inner.lookup(ctx, tables.inner(parent)?, name)?;
        self.count(&mut tables, ctx, self.place(parent, name), entry)
    }

    /// `inner` forgets all lookups at once: it need not have as many as the guest, which may go on from a snapshot.
    fn forget(&self, ctx: &Context, inode: u64, count: u64) {
        let mut tables = self.tables();
        if let Some(inner) = tables.forget(inode, count) {
            self.inner.forget(ctx, inner, u64::MAX);
        }
    }

    fn getattr(&self, ctx: &Context, inode: u64, handle: Option<u64>) -> io::Result<(stat64, Duration)> {
        let (node, handle) = match handle {
            Some(handle) => self.open_node(inode, handle).map(|(node, handle)| (node, Some(handle)))?,
            None => (self.node(inode)?, None),
        };
        self.inner.getattr(ctx, node, handle)
    }

    fn setattr(
        &self,
        ctx: &Context,
        inode: u64,
        attr: stat64,
        handle: Option<u64>,
        valid: SetattrValid,
    ) -> io::Result<(stat64, Duration)> {
        let (inner, node) = (self.writable()?, self.node(inode)?);
        if valid.contains(SetattrValid::MODE) {
            let (now, _) = inner.getattr(ctx, node, None)?;
            self.rules.privileged_files.check_change(now.st_mode, attr.st_mode)?;
        }
        let handle = handle.map(|handle| self.tables().inner_handle(handle)).transpose()?;
        inner.setattr(ctx, node, attr, handle, valid)
    }

    fn readlink(&self, ctx: &Context, inode: u64) -> io::Result<Vec<u8>> {
        self.inner.readlink(ctx, self.node(inode)?)
    }

    fn symlink(&self, ctx: &Context, target: &CStr, parent: u64, name: &CStr) -> io::Result<Entry> {
        check_name(name)?;
        self.make(ctx, parent, |inner, parent| inner.symlink(ctx, target, parent, name))
    }

    fn mknod(&self, ctx: &Context, parent: u64, name: &CStr, mode: u32, device: u32, mask: u32) -> io::Result<Entry> {
        check_name(name)?;
        self.writable()?;
        self.rules.privileged_files.check_node(mode)?;
        self.make(ctx, parent, |inner, parent| inner.mknod(ctx, parent, name, mode, device, umask(mask)))
    }

    fn mkdir(&self, ctx: &Context, parent: u64, name: &CStr, mode: u32, mask: u32) -> io::Result<Entry> {
        check_name(name)?;
        self.writable()?;
        self.rules.privileged_files.check_mode(mode)?;
        self.make(ctx, parent, |inner, parent| inner.mkdir(ctx, parent, name, mode, umask(mask)))
    }

    fn unlink(&self, ctx: &Context, parent: u64, name: &CStr) -> io::Result<()> {
        check_name(name)?;
        self.writable()?.unlink(ctx, self.node(parent)?, name)
    }

    fn rmdir(&self, ctx: &Context, parent: u64, name: &CStr) -> io::Result<()> {
        check_name(name)?;
        self.writable()?.rmdir(ctx, self.node(parent)?, name)
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
        inner.rename(ctx, self.node(old_parent)?, old_name, self.node(new_parent)?, new_name, flags)
    }

    fn link(&self, ctx: &Context, inode: u64, new_parent: u64, new_name: &CStr) -> io::Result<Entry> {
        check_name(new_name)?;
        let node = self.node(inode)?;
        self.make(ctx, new_parent, |inner, parent| inner.link(ctx, node, parent, new_name))
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
        let (handle, options, backing) = self.inner.open(ctx, tables.inner(inode)?, flags, fuse_flags)?;
        Ok((tables.add_handle(handle, inode, flags), options, backing))
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
        let node = tables.inner(parent)?;
        let (entry, handle, options, backing) = match inner.create(ctx, node, name, new) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists && flags & exclusive == 0 => {
                return self.open_existing(&mut tables, ctx, parent, name, CreateIn { flags, ..args });
            }
            created => created?,
        };
        let created = entry.inode;
        let counted = self.count(&mut tables, ctx, None, entry);
        if let (Err(_), Some(handle)) = (&counted, handle) {
            let _ = inner.release(ctx, created, 0, handle, false, false, None);
        }
        let entry = counted?;
        Ok((entry, tables.add_handle(handle, entry.inode, flags), options, backing))
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
        let (inode, handle) = self.open_node(inode, handle)?;
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
        let (inode, handle) = self.open_node(inode, handle)?;
        inner.write(ctx, inode, handle, reader, size, offset, lock_owner, delayed_write, flags, fuse_flags)
    }

    /// # Errors
    /// Returns ENOSYS where the directory is read-only: there is nothing to write when a file is closed, and the guest asks no more.
    fn flush(&self, ctx: &Context, inode: u64, handle: u64, lock_owner: u64) -> io::Result<()> {
        if self.rules.access == Access::ReadOnly {
            return Err(Errno::NOSYS.into());
        }
        let (inode, handle) = self.open_node(inode, handle)?;
        self.inner.flush(ctx, inode, handle, lock_owner)
    }

    fn fsync(&self, ctx: &Context, inode: u64, data_only: bool, handle: u64) -> io::Result<()> {
        let (inode, handle) = self.open_node(inode, handle)?;
        self.inner.fsync(ctx, inode, data_only, handle)
    }

    fn fallocate(&self, ctx: &Context, inode: u64, handle: u64, mode: u32, offset: u64, length: u64) -> io::Result<()> {
        let (inode, handle) = self.open_node(inode, handle)?;
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
        let Handle { inner, inner_node, .. } = self.tables().remove_handle(handle, inode)?;
        self.inner.release(ctx, inner_node, flags, inner, flush, flock_release, lock_owner)
    }

    fn statfs(&self, ctx: &Context, inode: u64) -> io::Result<statvfs64> {
        self.inner.statfs(ctx, self.node(inode)?)
    }

    fn opendir(&self, ctx: &Context, inode: u64, flags: u32) -> io::Result<(Option<u64>, OpenOptions)> {
        let flags = open_flags(flags, self.rules.access)?;
        let mut tables = self.tables();
        tables.check_handles()?;
        let (handle, options) = self.inner.opendir(ctx, tables.inner(inode)?, flags)?;
        Ok((tables.add_handle(handle, inode, flags), options))
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
        let (inode, handle) = (tables.inner(inode)?, tables.inner_handle(handle)?);
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
        let (node, handle) = (tables.inner(inode)?, tables.inner_handle(handle)?);
        self.inner.readdirplus(ctx, node, handle, size, offset, &mut |name, found| {
            let place = CString::new(name.name).ok().and_then(|name| self.place(inode, &name));
            let Ok(entry) = self.count(&mut tables, ctx, place, found) else {
                // Without a node the guest gets the name alone, and the list stays complete.
                return add_entry(name, Entry { inode: 0, ..found });
            };
            let added = add_entry(name, entry);
            if !matches!(added, Ok(1..)) {
                tables.forget(entry.inode, 1);
            }
            if added.is_err() {
                // `inner` forgets it where there was no room for it, but not after an error.
                self.inner.forget(ctx, found.inode, 1);
            }
            added
        })
    }

    fn fsyncdir(&self, ctx: &Context, inode: u64, data_only: bool, handle: u64) -> io::Result<()> {
        let (inode, handle) = self.open_node(inode, handle)?;
        self.inner.fsyncdir(ctx, inode, data_only, handle)
    }

    fn releasedir(&self, ctx: &Context, inode: u64, flags: u32, handle: u64) -> io::Result<()> {
        let Handle { inner, inner_node, .. } = self.tables().remove_handle(handle, inode)?;
        self.inner.releasedir(ctx, inner_node, flags, inner)
    }

    fn access(&self, ctx: &Context, inode: u64, mask: u32) -> io::Result<()> {
        self.inner.access(ctx, self.node(inode)?, mask)
    }

    fn lseek(&self, ctx: &Context, inode: u64, handle: u64, offset: u64, whence: u32) -> io::Result<u64> {
        let (inode, handle) = self.open_node(inode, handle)?;
        self.inner.lseek(ctx, inode, handle, offset, whence)
    }

    fn setxattr(&self, ctx: &Context, inode: u64, name: &CStr, value: &[u8], flags: u32) -> io::Result<()> {
        let (attributes, inner) = (self.attributes()?, self.writable()?);
        attributes.run(inner, ctx, self.node(inode)?, Operation::set(name, value, flags)?).map(drop)
    }

    fn getxattr(&self, ctx: &Context, inode: u64, name: &CStr, size: u32) -> io::Result<GetxattrReply> {
        let attributes = self.attributes()?;
        let operation = Operation::Get(xattr::Name::new(name)?);
        Ok(match xattr::fit(attributes.run(&self.inner, ctx, self.node(inode)?, operation)?, size)? {
            Wanted::Length(len) => GetxattrReply::Count(len),
            Wanted::Bytes(value) => GetxattrReply::Value(value),
        })
    }

    fn listxattr(&self, ctx: &Context, inode: u64, size: u32) -> io::Result<ListxattrReply> {
        Ok(match xattr::fit(self.attributes()?.run(&self.inner, ctx, self.node(inode)?, Operation::List)?, size)? {
            Wanted::Length(len) => ListxattrReply::Count(len),
            Wanted::Bytes(names) => ListxattrReply::Names(names),
        })
    }

    fn removexattr(&self, ctx: &Context, inode: u64, name: &CStr) -> io::Result<()> {
        let (attributes, inner) = (self.attributes()?, self.writable()?);
        attributes.run(inner, ctx, self.node(inode)?, Operation::Remove(xattr::Name::new(name)?)).map(drop)
    }
}
