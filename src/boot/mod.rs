//! Kernels and initial RAM disks: told apart, unpacked, put into guest memory.

pub mod cache;
mod load;
pub mod unpack;

pub use load::{Loaded, Request, load};

use crate::config::RunConfig;
use cache::Cache;
use hwvmm_arch::acpi::AcpiTooLarge;
use hwvmm_arch::boot::bzimage::{BzImage, BzImageError};
use hwvmm_arch::boot::elf::{ElfError, ElfImage};
use hwvmm_arch::boot::multiboot::{self, MultibootError};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use thiserror::Error;
use unpack::UnpackError;

/// A guest cannot be loaded.
#[derive(Debug, Error)]
pub enum KernelError {
    /// A file cannot be opened or read.
    #[error("cannot read the {what} {}{}", .path.display(), remedy(.source))]
    Read {
        /// "kernel", "initrd", "module".
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's words.
        source: io::Error,
    },
    /// A folder, a device.
    #[error("the {what} {} is not a file", .path.display())]
    NotFile {
        /// "kernel", "initrd", "module".
        what: &'static str,
        /// The path.
        path: PathBuf,
    },
    /// Something else than a kernel.
    #[error("{} is not a kernel that hwvmm can boot: {what}; it takes a bzImage (vmlinuz), an x86 ELF (vmlinux) or a multiboot ELF", .path.display())]
    NotKernel {
        /// The file.
        path: PathBuf,
        /// What was found.
        what: String,
    },
    /// A bzImage.
    #[error("{}: {source}", .path.display())]
    BzImage {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: BzImageError,
    },
    /// An ELF.
    #[error("{}: {source}", .path.display())]
    Elf {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: ElfError,
    },
    /// A multiboot kernel.
    #[error("{}: {source}", .path.display())]
    Multiboot {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: MultibootError,
    },
    /// Unpacking failed, and so would the guest's.
    #[error("the kernel in {} cannot be unpacked: {source}", .path.display())]
    Unpack {
        /// The file.
        path: PathBuf,
        /// Why.
        source: UnpackError,
    },
    /// The protocol asked for is not this kernel's.
    #[error("--boot {asked}: {} {why}", .path.display())]
    Protocol {
        /// The file.
        path: PathBuf,
        /// The protocol.
        asked: &'static str,
        /// Why not.
        why: &'static str,
    },
    /// Not enough memory.
    #[error(
        "the {what} takes gpa {start:#x} to {end:#x}, and guest memory below the hole ends at {memory_end:#x}: give the guest more with -m"
    )]
    NoRoom {
        /// "kernel", "initrd", "module".
        what: &'static str,
        /// First gpa.
        start: u64,
        /// gpa behind the last.
        end: u64,
        /// Where memory ends.
        memory_end: u64,
    },
    /// The initrd does not fit between kernel and the end of memory.
    #[error(
        "the {what} has {bytes} bytes, and {room} bytes of guest memory are left for it: give the guest more with -m"
    )]
    TooLarge {
        /// "initrd", "module".
        what: &'static str,
        /// Its size.
        bytes: u64,
        /// What is left.
        room: u64,
    },
    /// The kernel overlaps what hwvmm puts at low addresses.
    #[error("{} wants to be loaded at gpa {start:#x}, where hwvmm keeps page tables and boot data (below {limit:#x})", .path.display())]
    LowAddress {
        /// The file.
        path: PathBuf,
        /// First gpa.
        start: u64,
        /// From where kernels may be.
        limit: u64,
    },
    /// The command line is too long.
    #[error("the kernel command line has {bytes} bytes, and this kernel takes {limit}: shorten --cmdline or --append")]
    CmdlineTooLong {
        /// Its length.
        bytes: usize,
        /// The limit.
        limit: usize,
    },
    /// A NUL in the command line.
    #[error("the kernel command line has a NUL character")]
    CmdlineNul,
    /// ACPI.
    #[error(transparent)]
    Acpi(#[from] AcpiTooLarge),
    /// Guest memory cannot be written.
    #[error("cannot write {what} to guest memory: {why}")]
    Write {
        /// What.
        what: &'static str,
        /// Why.
        why: String,
    },
}

fn remedy(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::NotFound => " (check the path)",
        io::ErrorKind::PermissionDenied => {
            " (check its permissions; distributions often let only root read /boot/vmlinuz: copy it, or run as root)"
        }
        _ => "",
    }
}

/// Opens a regular file.
pub(crate) fn open(what: &'static str, path: &Path) -> Result<File, KernelError> {
    let read = |source| KernelError::Read { what, path: path.to_owned(), source };
    // Looked at before it is opened: opening a FIFO waits for whoever writes to it.
    if !std::fs::metadata(path).map_err(read)?.is_file() {
        return Err(KernelError::NotFile { what, path: path.to_owned() });
    }
    File::open(path).map_err(read)
}

/// What a kernel file is.
pub enum Kind {
    /// An x86 ELF, with a PVH note or without.
    Elf(ElfImage),
    /// A multiboot kernel (32-bit ELF).
    Multiboot(ElfImage),
    /// A bzImage.
    BzImage(Box<BzImage>),
}

/// Tells what `file` is.
///
/// # Errors
/// Where it is no kernel, or a damaged one.
pub fn identify(path: &Path, file: &File) -> Result<Kind, KernelError> {
    let mut start = [0_u8; 0x290];
    let count = read_start(file, &mut start).map_err(|source| KernelError::Read {
        what: "kernel",
        path: path.to_owned(),
        source,
    })?;
    let start = &start[..count];
    if ElfImage::is_elf(start) {
        let elf = ElfImage::parse(file).map_err(|source| KernelError::Elf { path: path.to_owned(), source })?;
        let multiboot = !elf.is_64
            && multiboot::find_header(file)
                .map_err(|source| KernelError::Multiboot { path: path.to_owned(), source })?;
        return Ok(if multiboot { Kind::Multiboot(elf) } else { Kind::Elf(elf) });
    }
    if BzImage::is_bzimage(start) {
        let image = BzImage::parse(file).map_err(|source| KernelError::BzImage { path: path.to_owned(), source })?;
        return Ok(Kind::BzImage(Box::new(image)));
    }
    let what = match hwvmm_arch::boot::bzimage::Compression::detect(start) {
        Some(kind) => format!("it is a {} file: unpack it first", kind.name()),
        None if start.is_empty() => "it is empty".to_owned(),
        None => format!("it starts with the bytes {:02x?}", &start[..start.len().min(8)]),
    };
    Err(KernelError::NotKernel { path: path.to_owned(), what })
}

/// Returns true if the file at `path` is a kernel that is entered as Linux: a bzImage, or an ELF without a multiboot header.
/// False where it cannot be read: loading it says why.
#[must_use]
pub fn is_linux(path: &Path) -> bool {
    let kind = open("kernel", path).and_then(|file| identify(path, &file));
    kind.is_ok_and(|kind| matches!(kind, Kind::BzImage(_) | Kind::Elf(_)))
}

/// Whether the file at `path` is a multiboot kernel; false where it cannot be told, which loading it will explain.
#[must_use]
pub fn is_multiboot(path: &Path) -> bool {
    open("kernel", path).and_then(|file| identify(path, &file)).is_ok_and(|kind| matches!(kind, Kind::Multiboot(_)))
}

fn read_start(file: &File, buffer: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match file.read_at(&mut buffer[filled..], filled as u64)? {
            0 => break,
            count => filled += count,
        }
    }
    Ok(filled)
}

/// Unpacks the kernel in a bzImage into an anonymous or a cached file. `progress` is told when it takes long.
///
/// # Errors
/// Where there is no payload or it is damaged.
pub fn unpack_bzimage(
    file: &File,
    image: &BzImage,
    cache: Option<&Cache>,
    progress: &dyn Fn(&str),
) -> Result<File, UnpackError> {
    if let Some(found) = cache.and_then(|cache| cache.find(file)) {
        return Ok(found);
    }
    let (offset, bytes) = image.payload.ok_or(UnpackError::Unknown(Vec::new()))?;
    let mut payload = vec![0; usize::try_from(bytes).unwrap_or(usize::MAX)];
    file.read_exact_at(&mut payload, offset).map_err(|error| UnpackError::Data("payload", error))?;
    progress("unpacking the kernel (the next run finds it unpacked)");
    if let Some(cache) = cache {
        match cache.keep(file, |out| unpack::unpack(&payload, out).map(|_| ())) {
            Err(UnpackError::Write(error)) => log::info!("the unpacked kernel cannot be kept: {error}"),
            result => return result,
        }
    }
    let memory = anonymous("kernel")?;
    unpack::unpack(&payload, &memory)?;
    Ok(memory)
}

/// An initrd as the guest would unpack it, in an anonymous or a cached file; `None` where that is not to be had (it is not
/// compressed, or not wholly, or damaged) or would be more than `limit` bytes: the guest then does it.
#[must_use]
pub fn unpack_initrd(file: &File, cache: Option<&Cache>, limit: u64) -> Option<File> {
    let small = |found: File| found.metadata().is_ok_and(|metadata| metadata.len() <= limit).then_some(found);
    if let Some(found) = cache.and_then(|cache| cache.find(file)) {
        return small(found);
    }
    let mut start = [0; 16];
    let count = read_start(file, &mut start).ok()?;
    hwvmm_arch::boot::bzimage::Compression::detect(&start[..count])
        .filter(|kind| *kind != hwvmm_arch::boot::bzimage::Compression::None)?;
    let size = file.metadata().ok()?.len();
    if size > limit {
        return None;
    }
    let mut archive = vec![0; usize::try_from(size).ok()?];
    file.read_exact_at(&mut archive, 0).ok()?;
    let result = match cache {
        Some(cache) => cache.keep(file, |out| unpack::unpack_parts(&archive, out).map(|_| ())),
        None => anonymous("initrd").and_then(|out| unpack::unpack_parts(&archive, &out).map(|_| out)),
    };
    match result {
        Ok(out) => small(out),
        Err(error) => {
            log::info!("the guest unpacks its initrd itself: {error}");
            None
        }
    }
}

fn anonymous(name: &str) -> Result<File, UnpackError> {
    let memory = rustix::fs::memfd_create(name, rustix::fs::MemfdFlags::CLOEXEC);
    memory.map(File::from).map_err(|error| UnpackError::Write(error.into()))
}

/// The kernel of a configuration as an ELF file, unpacked where it is a bzImage.
///
/// # Errors
/// [`KernelError`].
pub fn unpacked(config: &RunConfig) -> Result<File, KernelError> {
    let path = &config.kernel;
    let file = open("kernel", path)?;
    match identify(path, &file)? {
        Kind::Elf(_) | Kind::Multiboot(_) => Ok(file),
        Kind::BzImage(image) => {
            let cache = config.kernel_cache.as_deref().map(Cache::new);
            unpack_bzimage(&file, &image, cache.as_ref(), &|_| {})
                .map_err(|source| KernelError::Unpack { path: path.clone(), source })
        }
    }
}

impl From<io::Error> for UnpackError {
    fn from(error: io::Error) -> Self {
        Self::Write(error)
    }
}
