//! The kernel that is in the image of a disk (`--kernel-from`).

use super::disks::Disks;
use crate::boot::image::{ImageKernel, ImageKernelError, OpenDisk, ReadAt, Root, kernel_of, root_of};
use crate::boot::{KernelError, KernelFile, isolation};
use crate::config::{ROOT_DISK, RootChoice, RunConfig};
use crate::escape::escape;
use hwvmm_devices::path_text::PathText as _;
use hwvmm_devices::virtio::block::Image;
use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;
use thiserror::Error;

/// The longest text of an image in a message, in bytes.
const SHOWN_BYTES: usize = 512;

/// Why there is no kernel from an image.
#[derive(Debug, Error)]
pub enum ImageError {
    /// The image has none, or it cannot be read.
    #[error("{}", .path.shown())]
    Image {
        /// The path of the image.
        path: PathBuf,
        /// What is wrong.
        source: Box<ImageKernelError>,
    },
    /// What the image has for a kernel is none.
    #[error(transparent)]
    Kernel(#[from] KernelError),
}

/// What a guest is loaded from that an image has.
pub struct FromImage {
    /// The kernel.
    pub kernel: KernelFile,
    /// The initrd, if the entry has one.
    pub(super) initrd: Option<File>,
    /// The kernel's parameters.
    pub(super) cmdline: String,
}

/// An image as the reader of its file systems has it.
struct Disk(Arc<Image>);

impl ReadAt for Disk {
    fn bytes(&self) -> u64 {
        self.0.bytes()
    }

    fn read_exact_at(&self, buffer: &mut [u8], at: u64) -> io::Result<()> {
        self.0.read_exact_at(buffer, at)
    }
}

impl Disks {
    /// Takes the kernel out of the disk that `config` says; `None` where the kernel is a file.
    ///
    /// # Errors
    /// [`ImageError`].
    pub fn kernel(&self, config: &RunConfig) -> Result<Option<FromImage>, ImageError> {
        let Some(path) = &config.kernel_from else { return Ok(None) };
        let Some((_, image)) = config.disk.iter().zip(&self.0).find(|(disk, _)| disk.path == *path) else {
            return Ok(None);
        };
        let disk = OpenDisk { files: image.file_numbers(), disk: Rc::new(Disk(Arc::clone(image))) };
        let taken = kernel_of(&disk, config.entry.as_deref(), isolation(config.sandbox));
        let ImageKernel { found, kernel, initrd } =
            taken.map_err(|source| ImageError::Image { path: path.clone(), source: Box::new(source) })?;
        log::info!(
            "{}: entry {}: kernel {}, initrd of {} bytes, parameters: {}",
            path.shown(),
            escape(&format!("{} ({})", found.entry.number, found.entry.title), SHOWN_BYTES),
            escape(&found.kernel, SHOWN_BYTES),
            found.initrd_bytes,
            escape(&found.cmdline, SHOWN_BYTES),
        );
        let kernel = KernelFile::of_image(&named(path, &found.kernel), kernel)?;
        Ok(Some(FromImage { kernel, initrd, cmdline: found.cmdline }))
    }
}

impl Disks {
    /// Finds the root file system of a command on the disk that `config` says; `None` where it is no disk.
    ///
    /// # Errors
    /// [`ImageError`].
    pub fn root(&self, config: &RunConfig) -> Result<Option<Root>, ImageError> {
        let RootChoice::Image(path) = &config.root else { return Ok(None) };
        let Some((_, image)) = config.disk.iter().zip(&self.0).find(|(disk, _)| disk.serial == ROOT_DISK) else {
            return Ok(None);
        };
        let disk = OpenDisk { files: image.file_numbers(), disk: Rc::new(Disk(Arc::clone(image))) };
        let root = root_of(&disk, isolation(config.sandbox));
        let root = root.map_err(|source| ImageError::Image { path: path.clone(), source: Box::new(source) })?;
        log::info!("{}: the root is on partition {:?}", path.shown(), root.partition);
        Ok(Some(root))
    }
}

/// A file of an image, for messages.
fn named(image: &Path, file: &str) -> PathBuf {
    let mut name = OsString::from(image);
    name.push(":");
    name.push(escape(file, SHOWN_BYTES));
    name.into()
}
