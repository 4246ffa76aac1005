//! Opens the file of an image, and detects its format.

use super::error::ImageError;
use super::magic::{self, ForeignFormat};
use super::options::{Format, ImageOptions};
use rustix::fs::OFlags;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};

/// The way of I/O on an image: through the host's page cache, or past it.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum HostCache {
    Used,
    /// The file is opened with `O_DIRECT`: I/O bypasses the page cache.
    Bypassed,
}

impl ImageOptions {
    /// Returns the format with which the image is opened: that of the options, or the one that the image has now.
    ///
    /// # Errors
    /// [`ImageError`] where the image cannot be read, or is of a format that this program does not know.
    pub fn detect(&self) -> Result<Format, ImageError> {
        match self.format {
            Format::Auto => detect(&open_file(self)?, self),
            known => Ok(known),
        }
    }
}

/// Opens the file of an image by its path.
pub(super) fn open_file(options: &ImageOptions) -> Result<File, ImageError> {
    let ImageOptions { path, read_only, .. } = options;
    // NONBLOCK, as the open of a FIFO would block.
    let flags = OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = File::options()
        .read(true)
        .write(!read_only)
        .custom_flags(i32::try_from(flags.bits()).unwrap_or(0))
        .open(path)
        .map_err(|source| ImageError::Open { path: path.clone(), read_only: *read_only, source })?;
    let kind = file.metadata().map_err(|source| ImageError::Stat { path: path.clone(), source })?;
    if kind.file_type().is_block_device() || kind.is_file() { Ok(file) } else { Err(ImageError::Kind(path.clone())) }
}

/// An open file once more, for this way of I/O: the same file, whatever its path means by now.
pub(super) fn again(file: &File, read_only: bool, host_cache: HostCache) -> io::Result<File> {
    match host_cache {
        HostCache::Used => file.try_clone(),
        HostCache::Bypassed => reopen(file, read_only, OFlags::DIRECT),
    }
}

/// Opens the file of a descriptor with other flags, which two descriptors of one open file would share.
pub(super) fn reopen(file: &File, read_only: bool, flags: OFlags) -> io::Result<File> {
    let flags = flags | OFlags::CLOEXEC;
    File::options()
        .read(true)
        .write(!read_only)
        .custom_flags(i32::try_from(flags.bits()).unwrap_or(0))
        .open(format!("/proc/self/fd/{}", file.as_raw_fd()))
}

/// Returns [`Format::DetectedRaw`] or [`Format::DetectedQcow2`].
pub(super) fn detect(file: &File, options: &ImageOptions) -> Result<Format, ImageError> {
    let path = &options.path;
    let failed = |source| ImageError::Detect { path: path.clone(), source };
    let format = match magic::detect(&sector(file, 0).map_err(failed)?) {
        None => {
            let end = size(file).map_err(failed)?.saturating_sub(magic::START_BYTES as u64);
            magic::detect_end(&sector(file, end).map_err(failed)?)
        }
        found => found,
    };
    match format {
        None => Ok(Format::DetectedRaw),
        Some(ForeignFormat::Qcow2) => Ok(Format::DetectedQcow2),
        Some(format) => Err(ImageError::Foreign { path: path.clone(), format }),
    }
}

/// Reads the sector at `at`; zeroes behind the end of the file.
fn sector(file: &File, at: u64) -> io::Result<[u8; magic::START_BYTES]> {
    let mut sector = [0; magic::START_BYTES];
    let mut read = 0;
    while read < sector.len() {
        match file.read_at(&mut sector[read..], at + read as u64) {
            Ok(0) => break,
            Ok(bytes) => read += bytes,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(sector)
}

/// Returns the size in bytes of a file or a block device.
pub(super) fn size(file: &File) -> io::Result<u64> {
    rustix::fs::seek(file.as_fd(), rustix::fs::SeekFrom::End(0)).map_err(Into::into)
}

#[cfg(test)]
mod tests {
    use super::super::Image;
    use super::super::image::Content;
    use super::*;

    /// The kernel of `--kernel-from` and the format are read before the guest has the disk: all of it is of one file.
    #[test]
    fn an_image_is_the_file_that_was_opened() {
        let folder = tempfile::tempdir().expect("a folder");
        let (path, other) = (folder.path().join("disk"), folder.path().join("other"));
        for direct in [false, true] {
            std::fs::write(&path, vec![1; 4096]).expect("written");
            std::fs::write(&other, vec![2; 4096]).expect("written");
            let options = ImageOptions { direct, ..super::super::tests::options(&path) };
            let file = open_file(&options).expect("opened");
            let inode = rustix::fs::fstat(&file).expect("known").st_ino;
            std::fs::rename(&other, &path).expect("replaced");
            let image = match Image::of_file(file, &options, None) {
                // A file system that has no O_DIRECT.
                Err(ImageError::Open { source, .. }) if direct && source.raw_os_error() == Some(22) => continue,
                image => image.expect("an image"),
            };
            let mut byte = [0];
            image.read_exact_at(&mut byte, 0).expect("read");
            assert_eq!(byte, [1]);
            let Content::Raw(file, _) = &image.content else { panic!("a raw disk") };
            assert_eq!(rustix::fs::fstat(file).expect("known").st_ino, inode, "direct: {direct}");
        }
    }
}
