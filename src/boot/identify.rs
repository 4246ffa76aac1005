//! Which format a kernel file has.

use super::error::{FileRole, KernelError};
use super::file::{open, read_start};
use hwvmm_arch::boot::bzimage::{BzImage, Compression};
use hwvmm_arch::boot::elf::{ElfClass, ElfImage};
use hwvmm_arch::boot::multiboot;
use std::fs::File;
use std::path::Path;

/// The format of a kernel file, with its parsed headers.
pub enum KernelFormat {
    /// An x86 ELF file, with or without a PVH note.
    Elf(ElfImage),
    /// A 32-bit ELF file with a Multiboot 1 header.
    Multiboot(ElfImage),
    /// A Linux bzImage.
    BzImage(Box<BzImage>),
}

/// Finds the format of the open kernel `file`. `path` is for messages only.
///
/// # Errors
/// [`KernelError::NotKernel`] for any other format; [`KernelError::Elf`], [`KernelError::Multiboot`] and
/// [`KernelError::BzImage`] for a kernel that cannot be used.
pub fn identify(path: &Path, file: &File) -> Result<KernelFormat, KernelError> {
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

/// Returns true if the file at `path` is a multiboot kernel. A file that cannot be read or identified is none; the error
/// is reported when it is loaded.
#[must_use]
pub fn is_multiboot(path: &Path) -> bool {
    open(FileRole::Kernel, path)
        .and_then(|file| identify(path, &file))
        .is_ok_and(|kind| matches!(kind, KernelFormat::Multiboot(_)))
}

/// Returns true if the file at `path` is entered by the boot protocols of Linux: a bzImage, or an ELF file without a
/// Multiboot header. A file that cannot be read or identified is not; the error is reported when it is loaded.
#[must_use]
pub fn is_linux(path: &Path) -> bool {
    let format = open(FileRole::Kernel, path).and_then(|file| identify(path, &file));
    format.is_ok_and(|format| matches!(format, KernelFormat::BzImage(_) | KernelFormat::Elf(_)))
}
