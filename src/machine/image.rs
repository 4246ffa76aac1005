//! What a guest is started from that is in the images of disks: the kernel and its modules (`--kernel-from`), and the root of a command.

use super::disks::Disks;
use super::drivers::{drivers, links};
use crate::boot::image::{
    ChosenBy, ImageKernel, ImageKernelError, Listed, OpenDisk, ReadAt, Root, WantedKernel, WantedModules, WantedRoot,
    kernel_of, list_seen, modules_of, root_of,
};
use crate::boot::initramfs::{CopiedModule, CopiedModules, kernel_release};
use crate::boot::{KernelError, KernelFile, isolation};
use crate::config::{DiskConfig, ROOT_DISK, RootChoice, RunConfig, UserChoice};
use crate::escape::escape;
use hwvmm_arch::boot::FileRange;
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
    /// The entry of the boot loader's menu that names it.
    pub entry: Listed,
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

/// What the guest of a command has from the images of disks.
#[derive(Debug, Default)]
pub struct DiskParts {
    /// Its root; `None` where that is on no disk.
    pub(super) root: Option<Root>,
    /// The modules of its kernel; `None` where that is in no image, or its modules are elsewhere.
    pub(super) modules: Option<CopiedModules>,
    /// Where the image has no modules of its kernel: what to do if there should be some.
    pub(super) no_modules: Option<String>,
}

impl Disks {
    /// The disk that `config` has and `is_it` knows.
    fn find(&self, config: &RunConfig, is_it: impl Fn(&DiskConfig) -> bool) -> Option<OpenDisk> {
        let (_, image) = config.disk.iter().zip(&self.images).find(|(disk, _)| is_it(disk))?;
        Some(OpenDisk { files: image.file_numbers(), disk: Rc::new(Disk(Arc::clone(image))) })
    }

    /// Takes the kernel out of the disk that `config` says; `None` where the kernel is a file.
    ///
    /// # Errors
    /// [`ImageError`].
    pub fn kernel(&self, config: &RunConfig) -> Result<Option<FromImage>, ImageError> {
        let Some(path) = &config.kernel_from else { return Ok(None) };
        let Some(disk) = self.find(config, |disk| disk.path == *path) else { return Ok(None) };
        // A command has an initramfs of hwvmm's own.
        let initrd = config.initrd.is_none() && !config.has_agent();
        let wanted = WantedKernel { entry: config.entry.as_deref(), initrd };
        let taken = kernel_of(&disk, wanted, isolation(config.sandbox));
        let ImageKernel { found, kernel, initrd } = taken.map_err(|source| failed(path, source))?;
        let entry = entry_text(&found.entry);
        log::info!(
            "{}: entry {entry}: kernel {}, initrd of {} bytes, parameters: {}",
            path.shown(),
            escape(&found.kernel, SHOWN_BYTES),
            found.initrd_bytes,
            escape(&found.cmdline, SHOWN_BYTES),
        );
        if found.needs_recovery {
            log::info!("{}: a journal on it is not replayed before the kernel is read, as GRUB does it", path.shown());
        }
        let kernel = KernelFile::of_image(&named(path, &found.kernel), kernel)?;
        Ok(Some(FromImage { kernel, entry: found.entry, initrd, cmdline: found.cmdline }))
    }

    /// Finds what the command of `config` needs of disks: its root, and the modules of `kernel` where that was in an image. Nothing
    /// where there is no command.
    ///
    /// # Errors
    /// [`ImageError`].
    pub fn parts(&self, config: &RunConfig, kernel: &KernelFile) -> Result<DiskParts, ImageError> {
        let parts = DiskParts { root: self.root(config)?, ..DiskParts::default() };
        let (Some(path), None, true) = (&config.kernel_from, &config.modules, config.has_agent()) else {
            return Ok(parts);
        };
        let Some(disk) = self.find(config, |disk| disk.path == *path) else { return Ok(parts) };
        // A kernel that cannot be read is reported by the one who makes the initramfs.
        let Ok(Some(release)) = kernel_release(kernel) else { return Ok(parts) };
        let wanted = WantedModules { release: &release, drivers: &drivers(config), links: links(config) };
        let taken = modules_of(&disk, wanted, isolation(config.sandbox)).map_err(|source| failed(path, source))?;
        let folder = taken.found.folder;
        let no_modules = folder.is_none().then(|| {
            format!(
                "no modules of kernel {release} were found in {} ({}): if its drivers are modules, name their folder with \
                 --modules DIR",
                path.shown(),
                escape(&list_seen(&taken.found.seen), SHOWN_BYTES)
            )
        });
        let mut offset = 0;
        let mut modules = Vec::new();
        for module in taken.found.modules {
            let in_image = format!("{}/{}", folder.as_deref().unwrap_or_default(), module.path);
            modules
                .push(CopiedModule { path: named(path, &in_image), range: FileRange { offset, bytes: module.bytes } });
            offset = offset.saturating_add(module.bytes);
        }
        let folder = folder.map(|folder| named(path, &folder));
        let modules = Some(CopiedModules { folder, file: taken.file, modules, link: taken.found.link });
        Ok(DiskParts { modules, no_modules, ..parts })
    }

    /// Finds the root file system of a command on the disk that `config` says; `None` where it is no disk.
    fn root(&self, config: &RunConfig) -> Result<Option<Root>, ImageError> {
        let RootChoice::Image(path) = &config.root else { return Ok(None) };
        let Some(disk) = self.find(config, |disk| disk.serial == ROOT_DISK) else { return Ok(None) };
        let user = match &config.user {
            UserChoice::Name(name) => Some(name.as_str()),
            UserChoice::Ids { .. } => None,
        };
        // --entry is of the image with the kernel.
        let entry = config.entry.as_deref().filter(|_| config.kernel_from.as_ref() == Some(path));
        let root = root_of(&disk, WantedRoot { entry, user }, isolation(config.sandbox))
            .map_err(|source| failed(path, source))?;
        if root.needs_recovery {
            log::warn!(
                "{}: the root was not unmounted, and its journal is not replayed (mount option noload): the command may see old or damaged \
                 files; start the image once as it is, or run `fsck.ext4` on it",
                path.shown()
            );
        }
        let is_guess = !root.others.is_empty() && root.chosen_by == ChosenBy::Order;
        if let (Some(partition), true) = (root.partition, is_guess) {
            log::warn!(
                "{}: the root of the command is partition {partition}; others look like a root, too: {:?}, and no boot loader says which \
                 is. To have one of those, copy it out of the image (dd), and name the copy",
                path.shown(),
                root.others
            );
        }
        log::info!("{}: the root is on partition {:?}", path.shown(), root.partition);
        Ok(Some(root))
    }
}

/// An entry, for messages.
#[must_use]
pub fn entry_text(entry: &Listed) -> String {
    escape(&format!("{} ({})", entry.number, entry.title), SHOWN_BYTES)
}

fn failed(path: &Path, source: ImageKernelError) -> ImageError {
    ImageError::Image { path: path.to_owned(), source: Box::new(source) }
}

/// A file of an image, for messages.
fn named(image: &Path, file: &str) -> PathBuf {
    let mut name = OsString::from(image);
    name.push(":");
    name.push(escape(file, SHOWN_BYTES));
    name.into()
}
