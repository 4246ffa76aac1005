//! Extended attributes of the name space `user`. fuse-backend-rs names the file by a path in procfs for them, and a system call
//! with a path could name any file of the host. So the file is opened, as for OPEN, and named by its descriptor.

use fuse_backend_rs::abi::virtio_fs::RemovemappingOne;
use fuse_backend_rs::api::filesystem::{Context, FileSystem};
use fuse_backend_rs::passthrough::PassthroughFs;
use fuse_backend_rs::transport::FsCacheReqHandler;
use rustix::fs::{CWD, Mode, OFlags, XattrFlags, fgetxattr, flistxattr, fremovexattr, fsetxattr, openat};
use rustix::io::Errno;
use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;

const USER: &[u8] = b"user.";
/// The longest name in bytes, name space included (Linux: `XATTR_NAME_MAX`).
const MAX_NAME: usize = 255;
/// The longest value and the longest list of names in bytes (Linux: `XATTR_SIZE_MAX`, `XATTR_LIST_MAX`).
const MAX_VALUE: usize = 65536;

/// A name in the name space `user`.
#[derive(Debug)]
pub(super) struct Name(CString);

impl Name {
    /// # Errors
    /// Returns EOPNOTSUPP for other name spaces, such as `security` and `trusted`: they are privileges on the host. ERANGE for
    /// a name that is too long.
    pub(super) fn new(name: &CStr) -> io::Result<Self> {
        let bytes = name.to_bytes();
        match bytes.strip_prefix(USER) {
            None => Err(Errno::OPNOTSUPP.into()),
            Some([]) => Err(Errno::INVAL.into()),
            Some(_) if bytes.len() > MAX_NAME => Err(Errno::RANGE.into()),
            Some(_) => Ok(Self(name.to_owned())),
        }
    }
}

/// What to do with the attributes of a file.
pub(super) enum Operation {
    Get(Name),
    Set(Name, Vec<u8>, XattrFlags),
    List,
    Remove(Name),
}

impl Operation {
    /// Makes a [`Operation::Set`].
    ///
    /// # Errors
    /// Returns EINVAL for unknown flags, and E2BIG for a value that is too long.
    pub(super) fn set(name: &CStr, value: &[u8], flags: u32) -> io::Result<Self> {
        let name = Name::new(name)?;
        let flags = XattrFlags::from_bits(flags)
            .filter(|flags| (XattrFlags::CREATE | XattrFlags::REPLACE).contains(*flags))
            .ok_or(Errno::INVAL)?;
        if value.len() > MAX_VALUE { Err(Errno::TOOBIG.into()) } else { Ok(Self::Set(name, value.to_owned(), flags)) }
    }

    /// Returns the answer for what is no file and no directory, which Linux lets have no such attributes.
    fn without_attributes(&self) -> io::Result<Vec<u8>> {
        match self {
            Self::Get(_) => Err(Errno::NODATA.into()),
            Self::List => Ok(Vec::new()),
            Self::Set(..) | Self::Remove(_) => Err(Errno::PERM.into()),
        }
    }

    /// Returns the value or the names, each with a terminating zero; nothing for other operations.
    fn run(&self, file: BorrowedFd<'_>) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        match self {
            Self::Get(name) => {
                bytes.resize(MAX_VALUE, 0);
                let len = fgetxattr(file, &*name.0, bytes.as_mut_slice())?;
                bytes.truncate(len);
            }
            Self::Set(name, value, flags) => fsetxattr(file, &*name.0, value, *flags)?,
            Self::Remove(name) => fremovexattr(file, &*name.0)?,
            Self::List => {
                let mut all = vec![0; MAX_VALUE];
                let len = flistxattr(file, all.as_mut_slice())?;
                let names = all[..len].split_inclusive(|byte| *byte == 0);
                names.filter(|name| name.starts_with(USER)).for_each(|name| bytes.extend(name));
            }
        }
        Ok(bytes)
    }
}

/// Runs an operation on the file that fuse-backend-rs opens for it. It opens one for a window of shared memory (DAX) only, which
/// this device does not have.
struct OnOpenFile {
    operation: Operation,
    open_files: Arc<OwnedFd>,
    result: io::Result<Vec<u8>>,
}

impl FsCacheReqHandler for OnOpenFile {
    fn map(&mut self, _file: u64, _memory: u64, _len: u64, _flags: u64, fd: RawFd) -> io::Result<()> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        let file = openat(&*self.open_files, fd.to_string(), flags, Mode::empty())?;
        self.result = self.operation.run(file.as_fd());
        Ok(())
    }

    fn unmap(&mut self, _requests: Vec<RemovemappingOne>) -> io::Result<()> {
        Ok(())
    }
}

/// The way to the attributes of files.
pub(super) struct Attributes {
    /// The directory of this process's open files in procfs, by which a number becomes a file.
    open_files: Arc<OwnedFd>,
}

impl Attributes {
    /// # Errors
    /// Returns the error of openat(2).
    pub(super) fn new() -> io::Result<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(Self { open_files: Arc::new(openat(CWD, c"/proc/self/fd", flags, Mode::empty())?) })
    }

    /// Runs an operation on the file `inode`. Returns the value or the names.
    ///
    /// # Errors
    /// Returns the host's error.
    pub(super) fn run(
        &self,
        fs: &PassthroughFs,
        ctx: &Context,
        inode: u64,
        operation: Operation,
    ) -> io::Result<Vec<u8>> {
        let open_files = Arc::clone(&self.open_files);
        let mut on_file = OnOpenFile { operation, open_files, result: Ok(Vec::new()) };
        // Flags of 0 open for reading. fsetxattr(2) asks for the right to write the file, not for a file that is open for writing; but a file
        // that this process may only write cannot be opened here: fuse-backend-rs opens for reading, or for both.
        match fs.setupmapping(ctx, inode, 0, 0, 0, 0, 0, &mut on_file) {
            Ok(()) => on_file.result,
            Err(error) if error.raw_os_error() == Some(libc::EBADF) => on_file.operation.without_attributes(),
            Err(error) => Err(error),
        }
    }
}

/// What a request for a value or for names asks for.
pub(super) enum Wanted {
    /// The length of the value or of the names, in bytes.
    Length(u32),
    Bytes(Vec<u8>),
}

/// Returns what a request gets whose buffer has `size` bytes; 0 asks for the length.
///
/// # Errors
/// Returns ERANGE where the buffer is too small.
pub(super) fn fit(bytes: Vec<u8>, size: u32) -> io::Result<Wanted> {
    let len = u32::try_from(bytes.len()).map_err(|_| Errno::TOOBIG)?;
    match size {
        0 => Ok(Wanted::Length(len)),
        size if size < len => Err(Errno::RANGE.into()),
        _ => Ok(Wanted::Bytes(bytes)),
    }
}
