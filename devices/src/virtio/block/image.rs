//! Disk images on the host: opening, locking, size and block size.

use super::request::SECTOR_BYTES;
use imago::qcow2::Qcow2;
use imago::{
    DenyImplicitOpenGate, FormatAccess, FormatDriverBuilder, PermissiveImplicitOpenGate, Storage, StorageOpenOptions,
};
use rustix::fs::{FlockOperation, OFlags};
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::PathBuf;
use std::sync::RwLock;
use std::sync::atomic::{AtomicU64, Ordering};
use thiserror::Error;

const QCOW2_MAGIC: [u8; 4] = *b"QFI\xfb";

/// The format of an image.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Format {
    /// qcow2 where the image starts with the magic number of qcow2, otherwise raw. As a guest can write the magic number to
    /// a raw image, a qcow2 image found this way must not have a backing file.
    #[default]
    Auto,
    /// The bytes of the file are the bytes of the disk.
    Raw,
    /// qcow2, with backing files.
    Qcow2,
}

/// How an image is opened.
#[derive(Clone, Debug)]
pub struct ImageOptions {
    /// Path of the file or block device.
    pub path: PathBuf,
    /// Format of the image.
    pub format: Format,
    /// Open the image for reading only; the guest sees a read-only disk.
    pub read_only: bool,
    /// Bypass the host's page cache (`O_DIRECT`).
    pub direct: bool,
}

/// An image cannot be opened.
#[derive(Debug, Error)]
pub enum ImageError {
    /// The file cannot be opened.
    #[error("cannot open the disk {} for {}{}", .path.display(), if *.read_only { "reading" } else { "reading and writing" }, open_remedy(.source, *.read_only))]
    Open {
        /// Path of the image.
        path: PathBuf,
        /// The image was opened for reading only.
        read_only: bool,
        /// The host's error.
        source: io::Error,
    },
    /// The path is neither a file nor a block device.
    #[error("the disk {} is neither a file nor a block device", .0.display())]
    Kind(PathBuf),
    /// Another process has locked the image.
    #[error("the disk {} is in use by another process{}", .path.display(), if *.read_only { "" } else { "; two writers would corrupt it" })]
    Locked {
        /// Path of the image.
        path: PathBuf,
        /// The image was opened for reading only.
        read_only: bool,
    },
    /// The size is not a multiple of the sector size.
    #[error("the disk {} has {bytes} bytes, which is not a multiple of {SECTOR_BYTES}: `truncate -s %512 FILE` extends it to one", .path.display())]
    Size {
        /// Path of the image.
        path: PathBuf,
        /// Size of the file in bytes.
        bytes: u64,
    },
    /// The qcow2 image is damaged or not supported.
    #[error("the qcow2 image {} cannot be used{}", .path.display(), if *.detected { ": set format=qcow2 if it has a backing file" } else { "" })]
    Qcow2 {
        /// Path of the image.
        path: PathBuf,
        /// The format was detected by the magic number.
        detected: bool,
        /// The error of imago, which reads the image.
        source: io::Error,
    },
    /// Type or size of the file cannot be read.
    #[error("cannot get type and size of the disk {}", .path.display())]
    Stat {
        /// Path of the image.
        path: PathBuf,
        /// The host's error.
        source: io::Error,
    },
}

/// Returns advice on a disk that cannot be opened, to append to a message; empty where there is none.
fn open_remedy(error: &io::Error, read_only: bool) -> &'static str {
    match error.kind() {
        io::ErrorKind::NotFound => " (check the path; `truncate -s 1G FILE` makes an empty disk)",
        io::ErrorKind::PermissionDenied if read_only => " (check its permissions)",
        io::ErrorKind::PermissionDenied => " (check its permissions; set readonly=on if you can only read it)",
        io::ErrorKind::ReadOnlyFilesystem => " (it can only be read: set readonly=on)",
        io::ErrorKind::IsADirectory => " (a disk is a file or a block device)",
        _ => "",
    }
}

/// A qcow2 image. A discard needs exclusive access; other operations share it.
pub(super) type Qcow2Image = RwLock<FormatAccess<imago::file::File>>;

pub(super) enum Content {
    Raw(File),
    Qcow2(Box<Qcow2Image>),
}

/// An opened image and its size in bytes.
struct OpenImage {
    content: Content,
    bytes: u64,
}

/// How the format of an image became known.
#[derive(Clone, Copy, PartialEq, Eq)]
enum FormatSource {
    /// By its magic number.
    Detected,
    /// By the configuration.
    Configured,
}

/// Block sizes in bytes.
#[derive(Clone, Copy)]
struct BlockSizes {
    /// The smallest unit of I/O.
    logical: u32,
    /// The unit that the host's disk writes without a read-modify-write cycle.
    physical: u32,
}

/// Whether the host's page cache is used.
#[derive(Clone, Copy, PartialEq, Eq)]
enum HostCache {
    Used,
    /// `O_DIRECT`.
    Bypassed,
}

/// An open image.
pub struct Image {
    pub(super) content: Content,
    /// The file that is locked with flock(2).
    lock: File,
    read_only: bool,
    direct: bool,
    bytes: AtomicU64,
    block_sizes: BlockSizes,
}

impl Image {
    /// Opens and locks an image.
    ///
    /// # Errors
    /// Returns [`ImageError`] where the image cannot be opened, is locked by another process or has an invalid size.
    pub fn open(options: &ImageOptions) -> Result<Self, ImageError> {
        let ImageOptions { path, read_only, .. } = options;
        let stat_error = |source| ImageError::Stat { path: path.clone(), source };
        let host_cache = if options.direct { HostCache::Bypassed } else { HostCache::Used };
        let file = open_file(options, HostCache::Used)?;
        let kind = file.metadata().map_err(stat_error)?;
        let is_device = kind.file_type().is_block_device();
        if !is_device && !kind.is_file() {
            return Err(ImageError::Kind(path.clone()));
        }
        let operation =
            if *read_only { FlockOperation::NonBlockingLockShared } else { FlockOperation::NonBlockingLockExclusive };
        rustix::fs::flock(&file, operation)
            .map_err(|_| ImageError::Locked { path: path.clone(), read_only: *read_only })?;
        let mut magic = [0; 4];
        let is_qcow2 = file.read_exact_at(&mut magic, 0).is_ok() && magic == QCOW2_MAGIC;
        let OpenImage { content, bytes } = match options.format {
            Format::Qcow2 => open_qcow2(options, FormatSource::Configured)?,
            Format::Auto if is_qcow2 => open_qcow2(options, FormatSource::Detected)?,
            Format::Auto | Format::Raw => {
                let file = open_file(options, host_cache)?;
                let bytes = size(&file).map_err(stat_error)?;
                OpenImage { content: Content::Raw(file), bytes }
            }
        };
        if !bytes.is_multiple_of(SECTOR_BYTES) {
            return Err(ImageError::Size { path: path.clone(), bytes });
        }
        let block_sizes = if is_device { device_block_sizes(&file) } else { file_block_sizes(&file, host_cache) };
        Ok(Self {
            content,
            lock: file,
            read_only: *read_only,
            direct: options.direct,
            bytes: AtomicU64::new(bytes),
            block_sizes,
        })
    }

    /// Returns the size of the disk in bytes, as the guest sees it.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Acquire)
    }

    /// Reads the size of a raw image again. Returns true if it has changed.
    pub(super) fn update_size(&self) -> bool {
        let Content::Raw(file) = &self.content else { return false };
        match size(file) {
            Ok(new) => {
                let new = new - new % SECTOR_BYTES;
                self.bytes.swap(new, Ordering::AcqRel) != new
            }
            Err(error) => {
                log::warn!("block: cannot read the size of the disk: {error}");
                false
            }
        }
    }

    /// Returns true if the guest cannot write to the disk.
    #[must_use]
    pub fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// Returns true if I/O bypasses the page cache of the host.
    pub(super) fn is_direct(&self) -> bool {
        self.direct
    }

    /// Returns the logical block size in bytes: the smallest unit of I/O.
    pub(super) fn block_bytes(&self) -> u32 {
        self.block_sizes.logical
    }

    /// Returns the physical block size in bytes: the unit that the host's disk writes best.
    pub(super) fn physical_block_bytes(&self) -> u32 {
        self.block_sizes.physical
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        if let Content::Qcow2(image) = &self.content
            && !self.read_only
            && let Ok(image) = image.read()
            && let Err(error) = image.sync()
        {
            log::error!("block: cannot write the metadata of the qcow2 image: {error}");
        }
        if let Err(error) = rustix::fs::flock(&self.lock, FlockOperation::Unlock) {
            log::debug!("block: cannot unlock the image: {error}");
        }
    }
}

fn open_file(options: &ImageOptions, host_cache: HostCache) -> Result<File, ImageError> {
    let ImageOptions { path, read_only, .. } = options;
    // NONBLOCK, as the open of a FIFO would block.
    let mut flags = OFlags::NONBLOCK | OFlags::CLOEXEC;
    if host_cache == HostCache::Bypassed {
        flags |= OFlags::DIRECT;
    }
    File::options()
        .read(true)
        .write(!read_only)
        .custom_flags(i32::try_from(flags.bits()).unwrap_or(0))
        .open(path)
        .map_err(|source| ImageError::Open { path: path.clone(), read_only: *read_only, source })
}

fn open_qcow2(options: &ImageOptions, format: FormatSource) -> Result<OpenImage, ImageError> {
    let detected = format == FormatSource::Detected;
    let bad = |source| ImageError::Qcow2 { path: options.path.clone(), detected, source };
    let storage = StorageOpenOptions::new().filename(&options.path).write(!options.read_only).direct(options.direct);
    let storage = imago::file::File::open(storage).map_err(bad)?;
    let builder = Qcow2::<imago::file::File>::builder(storage).write(!options.read_only);
    let image = if detected {
        builder.open(DenyImplicitOpenGate::default()).map_err(bad)?
    } else {
        builder.open(PermissiveImplicitOpenGate::default()).map_err(bad)?
    };
    let access = FormatAccess::new(image);
    let bytes = access.size();
    Ok(OpenImage { content: Content::Qcow2(Box::new(RwLock::new(access))), bytes })
}

/// Returns the size in bytes of a file or a block device.
fn size(file: &File) -> io::Result<u64> {
    rustix::fs::seek(file.as_fd(), rustix::fs::SeekFrom::End(0)).map_err(Into::into)
}

/// Returns the block sizes of a block device.
fn device_block_sizes(file: &File) -> BlockSizes {
    let logical = rustix::fs::ioctl_blksszget(file).unwrap_or(512);
    let physical = rustix::fs::ioctl_blkpbszget(file).unwrap_or(logical);
    BlockSizes { logical, physical }
}

/// Returns the block sizes of a file. Where the page cache is bypassed, the logical block size is the alignment that the file
/// system needs.
fn file_block_sizes(file: &File, host_cache: HostCache) -> BlockSizes {
    let page = 4096;
    let alignment = rustix::fs::statx(file, "", rustix::fs::AtFlags::EMPTY_PATH, rustix::fs::StatxFlags::DIOALIGN)
        .ok()
        .filter(|stat| {
            host_cache == HostCache::Bypassed && stat.stx_mask & rustix::fs::StatxFlags::DIOALIGN.bits() != 0
        })
        .map_or(512, |stat| stat.stx_dio_offset_align);
    BlockSizes { logical: alignment.clamp(512, page), physical: page }
}
