//! The images of a machine's disks.

use super::error::MachineError;
use crate::boot::isolation;
use crate::config::{DiskConfig, DiskFormat, RunConfig};
use crate::sandbox::{Limits, confined};
use hwvmm_devices::path_text::PathText as _;
use hwvmm_devices::virtio::block::{CheckJob, Format, Image, ImageOptions};
use std::os::fd::AsFd;
use std::path::Path;
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
pub struct Disks(pub(super) Vec<Image>);

impl Disks {
    /// Opens the disks of `config`, in their order.
    ///
    /// # Errors
    /// [`MachineError::Disk`].
    pub fn open(config: &RunConfig) -> Result<Self, MachineError> {
        let place = |job: &CheckJob<'_>| {
            let answer = confined(isolation(config.sandbox), &LIMITS, &[job.file.as_fd()], || job.run());
            answer.map_err(Into::into)
        };
        let open = |disk| Ok(Image::open_checked_at(&image_options(disk), Some(&place))?);
        config.disk.iter().map(open).collect::<Result<_, _>>().map(Self)
    }

    /// The paths of the backing files that are open.
    pub fn backing_files(&self) -> impl Iterator<Item = &Path> {
        self.0.iter().flat_map(Image::backing_files)
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
