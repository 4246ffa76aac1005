//! A kernel file, and which format it has.

use super::error::{FileRole, KernelError};
use super::file::{open, read_start};
use hwvmm_arch::boot::bzimage::{BzImage, Compression};
use hwvmm_arch::boot::elf::{ElfClass, ElfImage};
use hwvmm_arch::boot::multiboot;
use std::fs::File;
use std::path::{Path, PathBuf};

/// The format of a kernel file, with its parsed headers.
pub enum KernelFormat {
    /// An x86 ELF file, with or without a PVH note.
    Elf(ElfImage),
    /// A 32-bit ELF file with a Multiboot 1 header.
    Multiboot(ElfImage),
    /// A Linux bzImage, with its setup header.
    BzImage(Box<BzImage>),
}

/// Finds the format of the open kernel `file`. `path` is for messages only.
///
/// # Errors
/// [`KernelError::NotKernel`] for any other format; [`KernelError::Elf`], [`KernelError::Multiboot`] and
/// [`KernelError::BzImage`] for a kernel that cannot be used.
fn identify(path: &Path, file: &File) -> Result<KernelFormat, KernelError> {
    let mut start = [0_u8; 0x290];
    let count = read_start(file, &mut start).map_err(|source| KernelError::Read {
        role: FileRole::Kernel,
        path: path.to_owned(),
        source,
    })?;
    let start = &start[..count];
    if ElfImage::is_elf(start) {
        let elf = ElfImage::parse(file).map_err(|source| KernelError::Elf { path: path.to_owned(), source })?;
        let multiboot = elf.class == ElfClass::Elf32
            && multiboot::has_header(file)
                .map_err(|source| KernelError::Multiboot { path: path.to_owned(), source })?;
        return Ok(if multiboot { KernelFormat::Multiboot(elf) } else { KernelFormat::Elf(elf) });
    }
    if BzImage::is_bzimage(start) {
        let image = BzImage::parse(file).map_err(|source| KernelError::BzImage { path: path.to_owned(), source })?;
        return Ok(KernelFormat::BzImage(Box::new(image)));
    }
    let what = match Compression::detect(start) {
        Some(kind) => format!("it is a {} file: unpack it first", kind.name()),
        None if start.is_empty() => "it is empty".to_owned(),
        None => format!("it starts with the bytes {:02x?}", &start[..start.len().min(8)]),
    };
    Err(KernelError::NotKernel { path: path.to_owned(), what })
}

/// A kernel file, opened and identified once for a start of the guest.
pub struct KernelFile {
    pub(super) path: PathBuf,
    pub(super) file: File,
    pub(super) format: KernelFormat,
}

impl KernelFile {
    /// Opens the file at `path`, and reads its headers.
    ///
    /// # Errors
    /// [`KernelError::Read`] and [`KernelError::NotFile`]; [`KernelError::NotKernel`] for a file of another format;
    /// [`KernelError::Elf`], [`KernelError::Multiboot`] and [`KernelError::BzImage`] for a kernel that cannot be used.
    pub fn open(path: &Path) -> Result<Self, KernelError> {
        let file = open(FileRole::Kernel, path)?;
        let format = identify(path, &file)?;
        Ok(Self { path: path.to_owned(), file, format })
    }

    /// The kernel that was copied out of an image to `file`, and is called `path` in messages.
    ///
    /// # Errors
    /// As [`KernelFile::open`], but for those of opening.
    pub fn of_image(path: &Path, file: File) -> Result<Self, KernelError> {
        let format = identify(path, &file)?;
        Ok(Self { path: path.to_owned(), file, format })
    }

    /// Returns the path as it was given.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the open file.
    #[must_use]
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Returns the format with its parsed headers.
    #[must_use]
    pub fn format(&self) -> &KernelFormat {
        &self.format
    }

    /// Returns true if it is a multiboot kernel.
    #[must_use]
    pub fn is_multiboot(&self) -> bool {
        matches!(self.format, KernelFormat::Multiboot(_))
    }

    /// Returns true if it is entered by the boot protocols of Linux: a bzImage, or an ELF file without a Multiboot header.
    #[must_use]
    pub fn is_linux(&self) -> bool {
        !self.is_multiboot()
    }
}
