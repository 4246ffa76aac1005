//! What a disk is on the host: opened, locked, measured.

use imago::qcow2::Qcow2;
use imago::{
    DenyImplicitOpenGate, FormatAccess, FormatDriverBuilder, PermissiveImplicitOpenGate, Storage, StorageOpenOptions,
};
use rustix::fs::{FlockOperation, OFlags};
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::RwLock;
use std::sync::atomic::{AtomicU64, Ordering};
use thiserror::Error;

const QCOW2_MAGIC: [u8; 4] = *b"QFI\xfb";
const SECTOR: u64 = 512;

/// How an image is to be read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Format {
    /// By its first bytes. A qcow2 image found this way may have no backing file: a guest can write those bytes.
    #[default]
    Auto,
    /// The bytes of the disk, one by one.
    Raw,
    /// qcow2, with its backing files.
    Qcow2,
}

/// How an image is opened.
#[derive(Clone, Debug)]
pub struct ImageOptions {
    /// The file or block device.
    pub path: PathBuf,
    /// Its format.
    pub format: Format,
    /// Never write.
    pub read_only: bool,
    /// Past the host's page cache (O_DIRECT).
    pub direct: bool,
}

/// An image cannot be used.
#[derive(Debug, Error)]
pub enum ImageError {
    /// It cannot be opened.
    #[error("cannot open the disk {} for {}{}", .path.display(), if *.read_only { "reading" } else { "reading and writing" }, open_remedy(.source, *.read_only))]
    Open {
        /// The file.
        path: PathBuf,
        /// It is not to be written.
        read_only: bool,
        /// The system's error.
        source: io::Error,
    },
    /// Neither a file nor a block device.
    #[error("the disk {} is neither a file nor a block device", .0.display())]
    Kind(PathBuf),
    /// Somebody else has it.
    #[error("the disk {} is in use by another process{}", .path.display(), if *.read_only { "" } else { "; two writers would destroy it" })]
    Locked {
        /// The file.
        path: PathBuf,
        /// Only to be read.
        read_only: bool,
    },
    /// The size is no multiple of a sector.
    #[error("the disk {} has {bytes} bytes, which is not a multiple of {SECTOR}: `truncate -s %512 FILE` makes it one", .path.display())]
    Size {
        /// The file.
        path: PathBuf,
        /// Its size.
        bytes: u64,
    },
    /// qcow2 says no.
    #[error("the qcow2 image {} cannot be used{}", .path.display(), if *.automatic { ": if it has a backing file, say format=qcow2" } else { "" })]
    Qcow2 {
        /// The file.
        path: PathBuf,
        /// The format was found out.
        automatic: bool,
        /// imago's words.
        source: io::Error,
    },
    /// Something else of the system.
    #[error("cannot {what} the disk {}", .path.display())]
    Io {
        /// What.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's words.
        source: io::Error,
    },
}

/// What to do about a disk that cannot be opened; empty where nothing is known.
fn open_remedy(error: &io::Error, read_only: bool) -> &'static str {
    match error.kind() {
        io::ErrorKind::NotFound => " (check the path; `truncate -s 1G FILE` makes an empty disk)",
        io::ErrorKind::PermissionDenied if read_only => " (check its permissions)",
        io::ErrorKind::PermissionDenied => " (check its permissions; if you may only read it, say readonly=on)",
        io::ErrorKind::ReadOnlyFilesystem => " (it can only be read: say readonly=on)",
        io::ErrorKind::IsADirectory => " (a disk is a file or a block device)",
        _ => "",
    }
}

pub(super) enum Content {
    Raw(File),
    // Discarding wants it alone; everything else shares it.
    Qcow2(Box<RwLock<FormatAccess<imago::file::File>>>),
}

/// An open image.
pub struct Image {
    pub(super) content: Content,
    /// Holds the lock.
    lock: File,
    read_only: bool,
    direct: bool,
    bytes: AtomicU64,
    block_bytes: u32,
    physical_block_bytes: u32,
}

impl Image {
    /// Opens and locks an image.
    ///
    /// # Errors
    /// [`ImageError`], with its remedy.
    pub fn open(options: &ImageOptions) -> Result<Self, ImageError> {
        let ImageOptions { path, read_only, .. } = options;
        let plain = open(path, *read_only, false)?;
        let kind = plain.metadata().map_err(|source| ImageError::Io { what: "look at", path: path.clone(), source })?;
        let is_device = kind.file_type().is_block_device();
        if !is_device && !kind.is_file() {
            return Err(ImageError::Kind(path.clone()));
        }
        let operation =
            if *read_only { FlockOperation::NonBlockingLockShared } else { FlockOperation::NonBlockingLockExclusive };
        rustix::fs::flock(&plain, operation)
            .map_err(|_| ImageError::Locked { path: path.clone(), read_only: *read_only })?;
        let mut magic = [0; 4];
        let is_qcow2 = plain.read_exact_at(&mut magic, 0).is_ok() && magic == QCOW2_MAGIC;
        let (content, bytes) = match options.format {
            Format::Qcow2 => open_qcow2(options, false)?,
            Format::Auto if is_qcow2 => open_qcow2(options, true)?,
            Format::Auto | Format::Raw => {
                let file = open(path, *read_only, options.direct)?;
                let bytes =
                    size(&file).map_err(|source| ImageError::Io { what: "measure", path: path.clone(), source })?;
                (Content::Raw(file), bytes)
            }
        };
        if !bytes.is_multiple_of(SECTOR) {
            return Err(ImageError::Size { path: path.clone(), bytes });
        }
        let (block_bytes, physical_block_bytes) = block_sizes(&plain, is_device, options.direct);
        let bytes = AtomicU64::new(bytes);
        Ok(Self {
            content,
            lock: plain,
            read_only: *read_only,
            direct: options.direct,
            bytes,
            block_bytes,
            physical_block_bytes,
        })
    }

    /// Size in bytes, as the guest sees it.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Acquire)
    }

    /// Looks whether the file has grown or shrunk; true if so.
    pub(super) fn measure(&self) -> bool {
        let Content::Raw(file) = &self.content else { return false };
        match size(file) {
            Ok(new) => self.bytes.swap(new & !(SECTOR - 1), Ordering::AcqRel) != new & !(SECTOR - 1),
            Err(error) => {
                log::warn!("block: cannot measure the disk: {error}");
                false
            }
        }
    }

    /// Whether it may not be written.
    #[must_use]
    pub fn is_read_only(&self) -> bool {
        self.read_only
    }

    pub(super) fn is_direct(&self) -> bool {
        self.direct
    }

    /// The smallest unit of I/O, in bytes.
    pub(super) fn block_bytes(&self) -> u32 {
        self.block_bytes
    }

    /// The unit that the host's disk likes.
    pub(super) fn physical_block_bytes(&self) -> u32 {
        self.physical_block_bytes
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        if let Content::Qcow2(image) = &self.content
            && !self.read_only
            && let Ok(image) = image.read()
            && let Err(error) = image.sync()
        {
            log::error!("block: the qcow2 image could not be written out: {error}");
        }
        if let Err(error) = rustix::fs::flock(&self.lock, FlockOperation::Unlock) {
            log::debug!("block: unlock: {error}");
        }
    }
}

fn open(path: &Path, read_only: bool, direct: bool) -> Result<File, ImageError> {
    // Not waiting: a FIFO would.
    let mut flags = OFlags::NONBLOCK | OFlags::CLOEXEC;
    if direct {
        flags |= OFlags::DIRECT;
    }
    File::options()
        .read(true)
        .write(!read_only)
        .custom_flags(i32::try_from(flags.bits()).unwrap_or(0))
        .open(path)
        .map_err(|source| ImageError::Open { path: path.to_owned(), read_only, source })
}

fn open_qcow2(options: &ImageOptions, automatic: bool) -> Result<(Content, u64), ImageError> {
    let bad = |source| ImageError::Qcow2 { path: options.path.clone(), automatic, source };
    let storage = StorageOpenOptions::new().filename(&options.path).write(!options.read_only).direct(options.direct);
    let storage = imago::file::File::open(storage).map_err(bad)?;
    let builder = Qcow2::<imago::file::File>::builder(storage).write(!options.read_only);
    let image = if automatic {
        builder.open(DenyImplicitOpenGate::default()).map_err(bad)?
    } else {
        builder.open(PermissiveImplicitOpenGate::default()).map_err(bad)?
    };
    let access = FormatAccess::new(image);
    let bytes = access.size();
    Ok((Content::Qcow2(Box::new(RwLock::new(access))), bytes))
}

/// A file's size, or a block device's.
fn size(file: &File) -> io::Result<u64> {
    rustix::fs::seek(file.as_fd(), rustix::fs::SeekFrom::End(0)).map_err(Into::into)
}

/// Logical and physical block size: a block device says; a file has its file system's.
fn block_sizes(file: &File, is_device: bool, direct: bool) -> (u32, u32) {
    let page = 4096;
    if is_device {
        let logical = rustix::fs::ioctl_blksszget(file).unwrap_or(512);
        let physical = rustix::fs::ioctl_blkpbszget(file).unwrap_or(logical);
        return (logical, physical);
    }
    // Past the page cache, a file takes what its file system's device takes.
    let alignment = rustix::fs::statx(file, "", rustix::fs::AtFlags::EMPTY_PATH, rustix::fs::StatxFlags::DIOALIGN)
        .ok()
        .filter(|stat| direct && stat.stx_mask & rustix::fs::StatxFlags::DIOALIGN.bits() != 0)
        .map_or(512, |stat| stat.stx_dio_offset_align);
    (alignment.clamp(512, page), page)
}
