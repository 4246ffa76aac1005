//! A kernel as an ELF file and an initrd as an uncompressed archive: unpacked once, then taken from the cache.

use super::cache::Cache;
use super::error::{FileRole, KernelError};
use super::file::{open, read_start};
use super::identify::{KernelFormat, identify};
use super::unpack::{self, UnpackError};
use crate::config::RunConfig;
use hwvmm_arch::boot::FileRange;
use hwvmm_arch::boot::bzimage::{BzImage, Compression};
use std::fs::File;
use std::os::unix::fs::FileExt;

/// Unpacks the kernel in a bzImage into an anonymous file, or into a file of `cache`, where a later call finds it.
/// `progress` is called with a message before the unpacking, which takes about a second.
///
/// # Errors
/// [`UnpackError`] where the image has no payload, or its payload cannot be unpacked.
pub fn unpack_bzimage(
    file: &File,
    image: &BzImage,
    cache: Option<&Cache>,
    progress: &dyn Fn(&str),
) -> Result<File, UnpackError> {
    if let Some(found) = cache.and_then(|cache| cache.find(file)) {
        return Ok(found);
    }
    let FileRange { offset, bytes } = image.payload.ok_or(UnpackError::NoPayload)?;
    let mut payload = vec![0; usize::try_from(bytes).unwrap_or(usize::MAX)];
    file.read_exact_at(&mut payload, offset).map_err(UnpackError::Read)?;
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

/// Unpacks an initrd as the guest would, into an anonymous file or a file of `cache`. Returns `None` where the initrd is
/// not compressed, only in part compressed, damaged, or larger than `limit` bytes when unpacked: the guest then unpacks it.
#[must_use]
pub fn unpack_initrd(file: &File, cache: Option<&Cache>, limit: u64) -> Option<File> {
    let small = |found: File| found.metadata().is_ok_and(|metadata| metadata.len() <= limit).then_some(found);
    if let Some(found) = cache.and_then(|cache| cache.find(file)) {
        return small(found);
    }
    let mut start = [0; 16];
    let count = read_start(file, &mut start).ok()?;
    Compression::detect(&start[..count]).filter(|kind| *kind != Compression::None)?;
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

/// Returns the kernel of a configuration as an ELF file. A bzImage is unpacked, or taken from the cache.
///
/// # Errors
/// [`KernelError`] where the kernel cannot be read, identified or unpacked.
pub fn unpacked(config: &RunConfig) -> Result<File, KernelError> {
    let path = &config.kernel;
    let file = open(FileRole::Kernel, path)?;
    match identify(path, &file)? {
        KernelFormat::Elf(_) | KernelFormat::Multiboot(_) => Ok(file),
        KernelFormat::BzImage(image) => {
            let cache = config.kernel_cache.as_deref().map(Cache::new);
            unpack_bzimage(&file, &image, cache.as_ref(), &|_| {})
                .map_err(|source| KernelError::Unpack { path: path.clone(), source })
        }
    }
}
