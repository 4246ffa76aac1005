//! Disk images on the host: opening, locking, size and block size.

use super::error::ImageError;
use super::file::{HostCache, again, detect, open_file, size};
use super::lock::{LockError, LockedFile, Use};
use super::options::{Format, ImageOptions};
use super::qcow2::{self, CheckPlace, FormatSource, OpenChain};
use super::request::SECTOR_BYTES;
use crate::virtio::saved::FileMark;
use imago::FormatAccess;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError, RwLock};

/// A qcow2 image. A discard needs exclusive access; other operations share it.
pub(super) type Qcow2Image = RwLock<FormatAccess<imago::file::File>>;

pub(super) enum Content {
    Raw(File, FirstSector),
    Qcow2(Box<Qcow2Image>),
}

/// An opened image and its size in bytes.
struct OpenImage {
    content: Content,
    bytes: u64,
    /// Other files that are locked.
    locks: Vec<LockedFile>,
    backing: Vec<PathBuf>,
    read_files: Vec<RawFd>,
}

/// What a guest may write to the first sector of a disk.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum FirstSector {
    /// Any content: the format was configured as raw.
    Free,
    /// Anything but the magic number of an image format.
    Guarded,
}

/// Block sizes in bytes.
#[derive(Clone, Copy)]
struct BlockSizes {
    /// The smallest unit of I/O.
    logical: u32,
    /// The unit that the host's disk writes without a read-modify-write cycle.
    physical: u32,
}

/// A disk image that is open and locked.
pub struct Image {
    pub(super) content: Content,
    /// The file, locked.
    file: LockedFile,
    /// The other files of the image, locked too.
    locks: Vec<LockedFile>,
    /// The numbers of the files that imago has.
    read_files: Vec<RawFd>,
    backing: Vec<PathBuf>,
    read_only: bool,
    direct: bool,
    bytes: AtomicU64,
    block_sizes: BlockSizes,
    /// Taken by the last flush that the guest did not ask for.
    marks: Mutex<Option<Vec<FileMark>>>,
    /// Errors of writes to the host's disk are told once, and a snapshot was told of one.
    lost_writes: AtomicBool,
}

impl Image {
    /// Opens and locks an image.
    ///
    /// # Errors
    /// Returns [`ImageError`] where the image cannot be opened, is locked by another process or has an invalid size.
    pub fn open(options: &ImageOptions) -> Result<Self, ImageError> {
        Self::open_checked_at(options, None)
    }

    /// As [`Image::open`]; header and tables of qcow2 images are checked at `place`.
    ///
    /// # Errors
    /// As [`Image::open`].
    pub fn open_checked_at(options: &ImageOptions, place: Option<&CheckPlace<'_>>) -> Result<Self, ImageError> {
        Self::of_file(open_file(options)?, options, place)
    }

    /// The image that is open as `file`. Its path is not opened again: it may be another file's by now, and what was read of this one
    /// (its format, a kernel) would be no part of what the guest has.
    pub(super) fn of_file(
        file: File,
        options: &ImageOptions,
        place: Option<&CheckPlace<'_>>,
    ) -> Result<Self, ImageError> {
        let ImageOptions { path, read_only, .. } = options;
        let stat_error = |source| ImageError::Stat { path: path.clone(), source };
        let host_cache = if options.direct { HostCache::Bypassed } else { HostCache::Used };
        let is_device = file.metadata().map_err(stat_error)?.file_type().is_block_device();
        let used = if *read_only { Use::Reading } else { Use::ReadingAndWriting };
        let locked = LockedFile::new(file, used).map_err(|error| match error {
            LockError::Conflict(conflict) => ImageError::Locked { path: path.clone(), conflict },
            LockError::Host(source) => ImageError::Lock { path: path.clone(), source },
        })?;
        let file = &locked.0;
        let raw = |first_sector| {
            let open_error = |source| ImageError::Open { path: path.clone(), read_only: *read_only, source };
            let file = again(file, *read_only, host_cache).map_err(open_error)?;
            let bytes = size(&file).map_err(stat_error)?;
            let content = Content::Raw(file, first_sector);
            Ok(OpenImage { content, bytes, locks: Vec::new(), backing: Vec::new(), read_files: Vec::new() })
        };
        let format = match options.format {
            Format::Auto => detect(file, options)?,
            known => known,
        };
        let qcow2 = |source| {
            let OpenChain { access, locks, backing, storage } = qcow2::open(options, file, source, place)?;
            let bytes = access.size();
            if is_device && !read_only {
                qcow2::warn_of_device(options, file, bytes).map_err(stat_error)?;
            }
            let content = Content::Qcow2(Box::new(RwLock::new(access)));
            Ok(OpenImage { content, bytes, locks, backing, read_files: storage })
        };
        let OpenImage { content, bytes, locks, backing, read_files } = match format {
            Format::Qcow2 => qcow2(FormatSource::Configured)?,
            Format::DetectedQcow2 => qcow2(FormatSource::Detected)?,
            Format::Raw => raw(FirstSector::Free)?,
            Format::DetectedRaw | Format::Auto => raw(FirstSector::Guarded)?,
        };
        if !bytes.is_multiple_of(SECTOR_BYTES) {
            return Err(ImageError::Size { path: path.clone(), bytes });
        }
        let block_sizes = if is_device { device_block_sizes(file) } else { file_block_sizes(file, host_cache) };
        Ok(Self {
            content,
            file: locked,
            locks,
            read_files,
            backing,
            read_only: *read_only,
            direct: options.direct,
            bytes: AtomicU64::new(bytes),
            block_sizes,
            marks: Mutex::default(),
            lost_writes: AtomicBool::new(false),
        })
    }

    /// A raw disk that cannot be written, with the bytes of `file`. It is not locked: `file` is one in memory (memfd_create(2)), which
    /// no other process opens.
    ///
    /// # Errors
    /// Where the file's size cannot be read, or is no number of sectors.
    pub fn of_memory(file: File) -> io::Result<Self> {
        let bytes = size(&file)?;
        if !bytes.is_multiple_of(SECTOR_BYTES) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let block_sizes = file_block_sizes(&file, HostCache::Used);
        Ok(Self {
            content: Content::Raw(file.try_clone()?, FirstSector::Guarded),
            file: LockedFile(file),
            locks: Vec::new(),
            read_files: Vec::new(),
            backing: Vec::new(),
            read_only: true,
            direct: false,
            bytes: AtomicU64::new(bytes),
            block_sizes,
            marks: Mutex::default(),
            lost_writes: AtomicBool::new(false),
        })
    }

    /// The paths of the backing files, which the headers of a qcow2 image name.
    pub fn backing_files(&self) -> impl Iterator<Item = &Path> {
        self.backing.iter().map(PathBuf::as_path)
    }

    /// Fills `buffer` from the offset `at` of the disk, in bytes, as the guest would read it.
    ///
    /// # Errors
    /// Where the image cannot be read, or ends before the buffer is full.
    pub fn read_exact_at(&self, buffer: &mut [u8], at: u64) -> io::Result<()> {
        let end = at.checked_add(buffer.len() as u64);
        if end.is_none_or(|end| end > self.bytes()) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        match &self.content {
            // Not by the file of `content`, which may need aligned buffers.
            Content::Raw(..) => self.file.0.read_exact_at(buffer, at),
            Content::Qcow2(image) => image.read().unwrap_or_else(PoisonError::into_inner).read(buffer, at),
        }
    }

    /// The numbers of the files that [`Image::read_exact_at`] reads.
    #[must_use]
    pub fn file_numbers(&self) -> Vec<RawFd> {
        [&self.read_files[..], &[self.file.0.as_raw_fd()]].concat()
    }

    /// Brings all that was written to stable storage, and takes the marks of the files. The guest has not asked for it: an error is kept for the guest's next flush, as
    /// fsync(2) tells each open file of an error once.
    ///
    /// # Errors
    /// Returns the error of a write or of fsync(2).
    pub(super) fn flush(&self) -> io::Result<()> {
        if !self.read_only {
            self.keep_error(self.sync_files())?;
        }
        *self.marks.lock().unwrap_or_else(PoisonError::into_inner) = Some(self.marks()?);
        Ok(())
    }

    /// Returns the marks that [`Self::flush`] has taken, so that no other thread waits for the host; new ones where there are none.
    pub(super) fn flushed_marks(&self) -> io::Result<Vec<FileMark>> {
        let taken = self.marks.lock().unwrap_or_else(PoisonError::into_inner).take();
        taken.map_or_else(|| self.marks(), Ok)
    }

    fn keep_error(&self, result: io::Result<()>) -> io::Result<()> {
        if result.is_err() {
            self.lost_writes.store(true, Ordering::Release);
        }
        result
    }

    /// Returns `result`, that of a flush for the guest, or the error that was kept.
    pub(super) fn with_kept_error(&self, result: io::Result<()>) -> io::Result<()> {
        let lost = self.lost_writes.swap(false, Ordering::AcqRel);
        result.and_then(|()| if lost { Err(io::Error::from_raw_os_error(libc::EIO)) } else { Ok(()) })
    }

    fn sync_files(&self) -> io::Result<()> {
        match &self.content {
            // Not only the data: the time of the last write is a part of the image's marks.
            Content::Raw(file, _) => file.sync_all(),
            Content::Qcow2(image) => {
                let image = image.read().unwrap_or_else(PoisonError::into_inner);
                image.flush()?;
                image.sync()?;
                drop(image);
                self.file.0.sync_all()
            }
        }
    }

    /// Returns by what the files of the image are told from others: first its own, then its data and backing files.
    ///
    /// # Errors
    /// Returns the error of fstat(2).
    pub(super) fn marks(&self) -> io::Result<Vec<FileMark>> {
        std::iter::once(&self.file).chain(&self.locks).map(|file| mark(&file.0)).collect()
    }

    /// Returns the size of the disk in bytes, as the guest sees it.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Acquire)
    }

    /// Reads the size of a raw image again. Returns true if it has changed.
    pub(super) fn update_size(&self) -> bool {
        let Content::Raw(file, _) = &self.content else { return false };
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
    }
}

fn mark(file: &File) -> io::Result<FileMark> {
    let metadata = file.metadata()?;
    let is_file = metadata.is_file();
    Ok(FileMark {
        number: [metadata.dev(), metadata.ino()],
        bytes: size(file)?,
        modified: is_file.then(|| (metadata.mtime(), metadata.mtime_nsec())),
        changed: is_file.then(|| (metadata.ctime(), metadata.ctime_nsec())),
    })
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_guest_gets_the_error_of_a_flush_that_it_did_not_ask_for() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        file.as_file().set_len(512).expect("long");
        let (path, format) = (file.path().to_owned(), Format::Raw);
        let options = ImageOptions { path, format, read_only: false, direct: false, data_file: None };
        let image = Image::open(&options).expect("an image");
        image.flush().expect("flushed");
        image.with_kept_error(Ok(())).expect("no error");
        let error = || Err(io::Error::from_raw_os_error(libc::EIO));
        assert!(image.keep_error(error()).is_err());
        image.flush().expect("it is told once");
        assert!(image.with_kept_error(Ok(())).is_err(), "the guest is told");
        image.with_kept_error(Ok(())).expect("once");
    }
}
