//! A kernel as an ELF file and an initrd as an uncompressed archive: unpacked once, then taken from the cache.

use super::cache::{Cache, Identity};
use super::error::{FileRole, KernelError};
use super::file::{open, read_start};
use super::identify::{KernelFile, KernelFormat};
use super::placement::KernelPlacement;
use super::unpack::{Content, Job, Limits, UnpackError};
use crate::config::{BootProtocol, RunConfig, SandboxMode, Unpack};
use crate::error::chain;
use crate::sandbox::{Isolation, Mode};
use hwvmm_arch::boot::FileRange;
use hwvmm_arch::boot::bzimage::{BzImage, Compression};
use hwvmm_arch::boot::elf::ElfImage;
use hwvmm_devices::path_text::PathText as _;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// An unpacked initrd may take at most one part in this many of the guest's free memory.
const INITRD_SHARE: u64 = 4;
/// The name of an initramfs that hwvmm made, in messages.
const MADE_INITRD: &str = "initramfs of the command";
/// The name of an initrd from an image, in messages.
const IMAGE_INITRD: &str = "initrd of the image";

/// What is to be prepared, and how.
pub struct Wanted<'a> {
    /// The initial RAM disk. For a multiboot kernel it is the first module.
    pub initrd: Option<InitrdSource<'a>>,
    /// The size of guest memory in bytes.
    pub memory_bytes: u64,
    /// Who unpacks a bzImage: hwvmm, or the guest by the decompressor in it.
    pub unpack: Unpack,
    /// The boot protocol asked for; with `Auto`, the kernel's format decides.
    pub boot: BootProtocol,
    /// How it is unpacked.
    pub how: UnpackOptions<'a>,
}

/// Where an initial RAM disk is.
#[derive(Clone, Copy)]
pub enum InitrdSource<'a> {
    /// In a file that the user names. It is unpacked where it is compressed.
    Path(&'a Path),
    /// In an open file of hwvmm's own, not compressed.
    Made(&'a File),
    /// In an open file of hwvmm's own, as it was in an image. It is unpacked where it is compressed.
    Image(&'a File),
}

/// How kernels and initrds are unpacked.
#[derive(Clone, Copy)]
pub struct UnpackOptions<'a> {
    /// The cache of unpacked kernels and initrds.
    pub cache: Option<&'a Cache>,
    /// Where the decompressors run.
    pub isolation: Isolation,
    /// Called with a message before an unpacking that takes long.
    pub progress: &'a dyn Fn(&str),
}

/// Returns where foreign files are read in a run with this `mode`.
#[must_use]
pub fn isolation(mode: SandboxMode) -> Isolation {
    Isolation::Process(match mode {
        SandboxMode::On => Mode::On,
        SandboxMode::Log => Mode::Log,
        SandboxMode::Off => Mode::Off,
    })
}

/// The files that a guest is loaded from, beside the kernel's own.
pub struct Prepared {
    /// The kernel that was unpacked from a bzImage; `None` where the guest unpacks it, or there is nothing to unpack.
    pub(super) unpacked: Option<UnpackedKernel>,
    pub(super) initrd: Option<InitrdFile>,
}

impl Prepared {
    /// The kernel as an ELF file; `None` where the guest unpacks it.
    #[must_use]
    pub fn vmlinux<'a>(&'a self, kernel: &'a KernelFile) -> Option<&'a File> {
        match (&self.unpacked, kernel.format()) {
            (Some(unpacked), _) => Some(&unpacked.file),
            (None, KernelFormat::Elf(_)) => Some(kernel.file()),
            (None, KernelFormat::BzImage(_) | KernelFormat::Multiboot(_)) => None,
        }
    }
}

/// A kernel that was unpacked from a bzImage.
pub(super) struct UnpackedKernel {
    pub(super) file: File,
    pub(super) elf: ElfImage,
}

/// An initrd that is open for loading.
pub(super) struct InitrdFile {
    /// The path that the user gave, or a name for messages.
    pub(super) path: PathBuf,
    /// The file, or what was unpacked from it.
    pub(super) file: File,
}

/// Unpacks what is to be unpacked for a start of `kernel`, and opens its initrd.
///
/// # Errors
/// [`KernelError`] where the initrd cannot be opened. What cannot be unpacked is left to the guest.
pub fn prepare(kernel: &KernelFile, wanted: &Wanted<'_>) -> Result<Prepared, KernelError> {
    let unpacked = match kernel.format() {
        KernelFormat::BzImage(image) if wanted.unpack == Unpack::Host => vmlinux(kernel, image, wanted),
        KernelFormat::BzImage(_) | KernelFormat::Elf(_) | KernelFormat::Multiboot(_) => None,
    };
    let placement = match (kernel.format(), &unpacked) {
        (KernelFormat::Multiboot(_), _) => None,
        (KernelFormat::Elf(elf), _) => Some(KernelPlacement::of_elf(elf, None, wanted.boot)),
        (KernelFormat::BzImage(image), Some(vmlinux)) => {
            Some(KernelPlacement::of_elf(&vmlinux.elf, Some(image), wanted.boot))
        }
        (KernelFormat::BzImage(image), None) => Some(KernelPlacement::of_guest_unpacked(image)),
    };
    let initrd = match wanted.initrd {
        Some(InitrdSource::Path(path)) => {
            Some(initrd(path.to_owned(), open(FileRole::Initrd, path)?, placement, wanted))
        }
        Some(InitrdSource::Image(file)) => {
            let (path, file) = copied(file, IMAGE_INITRD)?;
            Some(initrd(path, file, placement, wanted))
        }
        Some(InitrdSource::Made(file)) => {
            let (path, file) = copied(file, MADE_INITRD)?;
            Some(InitrdFile { path, file })
        }
        None => None,
    };
    Ok(Prepared { unpacked, initrd })
}

/// The kernel in a bzImage; `None`, and a message, where it cannot be unpacked.
fn vmlinux(kernel: &KernelFile, image: &BzImage, wanted: &Wanted<'_>) -> Option<UnpackedKernel> {
    let limits = Limits::kernel(wanted.memory_bytes);
    let why = match unpack_bzimage(kernel.file(), image, limits, &wanted.how) {
        Ok(file) => match ElfImage::parse(&file) {
            Ok(elf) => return Some(UnpackedKernel { file, elf }),
            Err(error) => chain(&error),
        },
        Err(error) => chain(&error),
    };
    log::warn!("{} cannot be unpacked here ({why}): the guest unpacks it itself", kernel.path().shown());
    None
}

/// A copy of a descriptor, and its name for messages.
fn copied(file: &File, name: &str) -> Result<(PathBuf, File), KernelError> {
    let path = PathBuf::from(name);
    match file.try_clone() {
        Ok(file) => Ok((path, file)),
        Err(source) => Err(KernelError::Read { role: FileRole::Initrd, path, source }),
    }
}

/// Unpacks the initrd where that is wanted. `placement` is that of a Linux kernel.
fn initrd(path: PathBuf, file: File, placement: Option<KernelPlacement>, wanted: &Wanted<'_>) -> InitrdFile {
    let unpacked = placement.filter(|_| wanted.unpack == Unpack::Host).and_then(|placement| {
        // The guest holds the archive and its files at the same time while it unpacks it, hence the smaller limit.
        let limit = placement.initrd_room(wanted.memory_bytes).bytes / INITRD_SHARE;
        unpack_initrd(&file, limit, &wanted.how)
    });
    InitrdFile { path, file: unpacked.unwrap_or(file) }
}

/// Unpacks the kernel in a bzImage into an anonymous file, or into a file of the cache, where a later call finds it,
/// within `limits`. The unpacking takes about a second.
///
/// # Errors
/// [`UnpackError`] where the image has no payload, or its payload cannot be unpacked.
pub fn unpack_bzimage(
    file: &File,
    image: &BzImage,
    limits: Limits,
    how: &UnpackOptions<'_>,
) -> Result<File, UnpackError> {
    let range = image.payload.ok_or(UnpackError::NoPayload)?;
    let job = Job { range, content: Content::Stream, limits };
    let packed = Packed { role: FileRole::Kernel, file, job, isolation: how.isolation };
    packed.unpacked(how.cache, &|| (how.progress)("unpacking the kernel (the next run finds it unpacked)"))
}

/// Unpacks an initrd as the guest would, into an anonymous file or a file of the cache. Returns `None` where the initrd is
/// not compressed, only in part compressed, damaged, or larger than `limit` bytes when unpacked: the guest then unpacks it.
#[must_use]
pub fn unpack_initrd(file: &File, limit: u64, how: &UnpackOptions<'_>) -> Option<File> {
    let mut start = [0; 16];
    let count = read_start(file, &mut start).ok()?;
    Compression::detect(&start[..count]).filter(|kind| *kind != Compression::None)?;
    let range = FileRange { offset: 0, bytes: file.metadata().ok()?.len() };
    let limits = Limits::of(limit);
    let job = Job { range, content: Content::Parts, limits };
    let packed = Packed { role: FileRole::Initrd, file, job, isolation: how.isolation };
    match packed.unpacked(how.cache, &|| ()) {
        Ok(out) => out.metadata().is_ok_and(|metadata| metadata.len() <= limit).then_some(out),
        Err(error) => {
            log::info!("the guest unpacks its initrd itself: {}", chain(&error));
            None
        }
    }
}

/// A packed file, and how it is unpacked.
struct Packed<'a> {
    role: FileRole,
    file: &'a File,
    job: Job,
    isolation: Isolation,
}

impl Packed<'_> {
    /// Finds the unpacked file in `cache`, or unpacks it after a call of `announce`.
    fn unpacked(&self, cache: Option<&Cache>, announce: &dyn Fn()) -> Result<File, UnpackError> {
        // A private copy of the file is limited, too.
        self.job.check_packed()?;
        // Before anything is read: what is read later is kept only if the file is still the same then.
        let identity = match cache {
            Some(_) => Identity::of(self.file, self.job.range, SystemTime::now()).map_err(UnpackError::Read)?,
            None => None,
        };
        let Some((cache, identity)) = cache.zip(identity) else {
            announce();
            return self.in_memory((self.file, self.job.range));
        };
        if let Some(found) = cache.find(self.role, &identity) {
            return Ok(found);
        }
        announce();
        match self.kept(cache, &identity) {
            Err(UnpackError::Write(error)) => {
                log::info!("the unpacked {} cannot be kept: {error}", self.role);
                self.in_memory(identity.content(self.file))
            }
            result => result,
        }
    }

    fn kept(&self, cache: &Cache, identity: &Identity) -> Result<File, UnpackError> {
        let draft = cache.draft().map_err(UnpackError::Write)?;
        self.unpack_into(identity.content(self.file), draft.file())?;
        if identity.holds(self.file) {
            draft.keep(self.role, identity).map_err(UnpackError::Write)
        } else {
            log::info!("the unpacked {} is not kept: its file was changed in the meantime", self.role);
            draft.discard().map_err(UnpackError::Write)
        }
    }

    fn in_memory(&self, content: (&File, FileRange)) -> Result<File, UnpackError> {
        let memory = anonymous(self.role)?;
        self.unpack_into(content, &memory)?;
        Ok(memory)
    }

    fn unpack_into(&self, (file, range): (&File, FileRange), out: &File) -> Result<(), UnpackError> {
        Job { range, ..self.job }.run_confined(file, out, self.isolation).map(|_| ())
    }
}

fn anonymous(role: FileRole) -> Result<File, UnpackError> {
    let memory = rustix::fs::memfd_create(role.to_string(), rustix::fs::MemfdFlags::CLOEXEC);
    memory.map(File::from).map_err(|error| UnpackError::Write(error.into()))
}

/// Returns the kernel of a configuration as an ELF file. A bzImage is unpacked, or taken from the cache.
///
/// # Errors
/// [`KernelError`] where the kernel cannot be read, identified or unpacked.
pub fn unpacked(config: &RunConfig) -> Result<File, KernelError> {
    let KernelFile { path, file, format } = KernelFile::open(&config.kernel)?;
    match format {
        KernelFormat::Elf(_) | KernelFormat::Multiboot(_) => Ok(file),
        KernelFormat::BzImage(image) => {
            let cache = config.kernel_cache.as_deref().map(Cache::new);
            let how = UnpackOptions { cache: cache.as_ref(), isolation: isolation(config.sandbox), progress: &|_| {} };
            unpack_bzimage(&file, &image, Limits::kernel(config.memory.bytes), &how)
                .map_err(|source| KernelError::Unpack { path, source })
        }
    }
}
