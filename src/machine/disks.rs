//! The images of a machine's disks.

use super::error::MachineError;
use super::seed;
use crate::boot::isolation;
use crate::config::{DiskConfig, DiskFormat, RunConfig};
use crate::sandbox::{Limits, confined};
use hwvmm_devices::path_text::PathText as _;
use hwvmm_devices::virtio::block::{CheckJob, Format, Image, ImageOptions};
use rustix::fs::{Mode, OFlags};
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt as _;
use std::os::unix::fs::FileTypeExt as _;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

/// What the check of an image may take. It reads at most 1 GiB of tables.
const LIMITS: Limits = Limits {
    memory_bytes: CheckJob::MEMORY_BYTES,
    cpu: Duration::from_secs(60),
    wall: Duration::from_secs(300),
    file_bytes: 0,
    answer_bytes: CheckJob::ANSWER_BYTES,
};

/// The images of a machine's disks, opened and locked. Header and tables of qcow2 images are checked by a process of its own, so
/// they are opened while this process has one thread.
pub struct Disks {
    /// In the order of the configuration.
    pub(super) images: Vec<Arc<Image>>,
    /// That of `--seed`.
    pub(super) seed: Option<Arc<Image>>,
}

impl Disks {
    /// Opens the disks of `config`, and makes that of `--seed`.
    ///
    /// # Errors
    /// [`MachineError::Disk`] and [`MachineError::Seed`].
    pub fn open(config: &RunConfig) -> Result<Self, MachineError> {
        let place = |job: &CheckJob<'_>| {
            let answer = confined(isolation(config.sandbox), &LIMITS, &[job.file.as_fd()], || job.run());
            answer.map_err(Into::into)
        };
        let open = |disk| Ok(Arc::new(Image::open_checked_at(&image_options(disk), Some(&place))?));
        let images = config.disk.iter().map(open).collect::<Result<_, MachineError>>()?;
        let seed = config.seed.as_deref().map(seed::open).transpose()?.map(Arc::new);
        Ok(Self { images, seed })
    }

    /// The paths of the backing files that are open.
    pub fn backing_files(&self) -> impl Iterator<Item = &Path> {
        self.images.iter().flat_map(|image| image.backing_files())
    }
}

/// Detects the formats of the disks that have none, and keeps them in `config`: once, before the guest's first start, as the
/// guest can write a header to a raw disk, and is not asked again when it is started again.
///
/// # Errors
/// [`MachineError::Disk`] where a disk cannot be read or is of a format that is not supported.
pub fn detect_disk_formats(config: &mut RunConfig) -> Result<(), MachineError> {
    for disk in config.disk.iter_mut().filter(|disk| disk.format == DiskFormat::Auto) {
        disk.format = match image_options(disk).detect()? {
            Format::DetectedQcow2 => DiskFormat::DetectedQcow2,
            Format::Qcow2 => DiskFormat::Qcow2,
            Format::Raw => DiskFormat::Raw,
            Format::DetectedRaw | Format::Auto => DiskFormat::DetectedRaw,
        };
        log::info!("the disk {} is {:?}", disk.path.shown(), disk.format);
    }
    Ok(())
}

/// Returns true if the file at `path` is a disk image, and no kernel: qcow2, a disk with a partition table, or one that is a
/// file system of ext4 or FAT. Anything else is left to the code that reads kernels.
#[must_use]
pub fn is_disk_image(path: &Path) -> bool {
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let Ok(file) = rustix::fs::open(path, flags, Mode::empty()).map(File::from) else { return false };
    let is_file = file.metadata().is_ok_and(|metadata| metadata.is_file() || metadata.file_type().is_block_device());
    let mut start = [0; 2048];
    is_file && file.read_exact_at(&mut start, 0).is_ok() && starts_disk(&start)
}

/// Returns true if a disk starts so.
fn starts_disk(start: &[u8; 2048]) -> bool {
    let has = |at: usize, magic: &[u8]| start.get(at..).is_some_and(|rest| rest.starts_with(magic));
    // A bzImage has the signature of a boot sector, too.
    let kernel = has(0, b"\x7fELF") || has(0x202, b"HdrS");
    let disk = has(510, &[0x55, 0xaa]) || has(512, b"EFI PART") || has(1024 + 56, &[0x53, 0xef]);
    has(0, b"QFI\xfb") || disk && !kernel
}

/// The name of the disk with `index` in counts and logs.
pub(super) fn disk_name(index: usize, disk: &DiskConfig) -> String {
    disk.id.clone().unwrap_or_else(|| format!("disk{index}"))
}

fn image_options(disk: &DiskConfig) -> ImageOptions {
    let format = match disk.format {
        DiskFormat::Auto => Format::Auto,
        DiskFormat::Raw => Format::Raw,
        DiskFormat::Qcow2 => Format::Qcow2,
        DiskFormat::DetectedRaw => Format::DetectedRaw,
        DiskFormat::DetectedQcow2 => Format::DetectedQcow2,
    };
    ImageOptions {
        path: disk.path.clone(),
        format,
        read_only: disk.read_only,
        direct: disk.direct,
        data_file: disk.data_file.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks_are_told_from_kernels() {
        let starts = |marks: &[(usize, &[u8])]| {
            let mut start = [0; 2048];
            marks.iter().for_each(|(at, bytes)| start[*at..*at + bytes.len()].copy_from_slice(bytes));
            starts_disk(&start)
        };
        assert!(starts(&[(0, b"QFI\xfb")]) && starts(&[(510, &[0x55, 0xaa])]) && starts(&[(1080, &[0x53, 0xef])]));
        assert!(!starts(&[(510, &[0x55, 0xaa]), (0x202, b"HdrS")]), "a bzImage");
        assert!(!starts(&[(0, b"\x7fELF"), (1080, &[0x53, 0xef])]), "a vmlinux");
        assert!(!starts(&[]));
        assert!(!is_disk_image(Path::new("/missing")) && !is_disk_image(Path::new("/dev/null")));
    }
}
