//! Reads an image in a process of its own, which has the image's files and the two files to fill.

use super::disk::{Range, ReadAt};
use super::find::{FindError, Found, MAX_FILE_BYTES, cut, find};
use super::modules::{FoundModules, MAX_MODULES, WantedModules, find_modules};
use super::root::{Root, WantedRoot, find_root};
use crate::escape::escape;
use crate::sandbox::{ConfinedError, Isolation, Limits, confined_with};
use rustix::fs::{MemfdFlags, memfd_create};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::any::Any;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, RawFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;
use std::time::Duration;
use thiserror::Error;

/// What is read of an image at most, in bytes: kernel and initrd several times, and as much of tables.
const READ_BYTES: u64 = 8 << 30;
/// The longest answer in bytes: 256 entries with long titles.
const ANSWER_BYTES: usize = 1 << 20;
/// The longest text that is shown of an image.
const SHOWN_BYTES: usize = 4096;
const LIMITS: Limits = Limits {
    memory_bytes: 512 << 20,
    cpu: Duration::from_secs(60),
    wall: Duration::from_secs(300),
    file_bytes: MAX_FILE_BYTES,
    answer_bytes: ANSWER_BYTES,
};

/// Why an image gives no kernel, or no root.
#[derive(Debug, Error)]
pub enum ImageKernelError {
    /// It has none that can be found.
    #[error("{}", escape(&.0.to_string(), SHOWN_BYTES))]
    Find(FindError),
    /// The process that reads it gave no answer.
    #[error("its file systems were not read")]
    Process(#[source] ConfinedError),
    /// The kernel cannot be kept in memory.
    #[error("cannot keep what is in it in memory")]
    Memory(#[source] io::Error),
}

/// The kernel of an image.
pub struct ImageKernel {
    /// What was found.
    pub found: Found,
    /// The kernel, as it is in the image.
    pub kernel: File,
    /// The initrds, one behind the other; `None` where there are none.
    pub initrd: Option<File>,
}

/// A disk and the files of this process that it reads, by their numbers.
pub struct OpenDisk {
    /// The disk.
    pub disk: Rc<dyn ReadAt>,
    /// The files.
    pub files: Vec<RawFd>,
}

/// Which kernel is taken out of an image.
#[derive(Clone, Copy, Debug)]
pub struct WantedKernel<'a> {
    /// The entry that names it; `None`: the one which the boot loader would start.
    pub entry: Option<&'a str>,
    /// True if the initrds of the entry are taken, too.
    pub initrd: bool,
}

/// The modules of an image.
pub struct ImageModules {
    /// What was found.
    pub found: FoundModules,
    /// The modules as they are in the image, one behind the other.
    pub file: File,
}

/// Takes the kernel out of an image.
///
/// # Errors
/// [`ImageKernelError`].
pub fn kernel_of(
    disk: &OpenDisk,
    wanted: WantedKernel<'_>,
    isolation: Isolation,
) -> Result<ImageKernel, ImageKernelError> {
    let (kernel, initrd) = (in_memory("kernel")?, in_memory("initrd")?);
    let job = || {
        let range = Range::whole(Rc::clone(&disk.disk), READ_BYTES);
        let mut initrd = &initrd;
        let initrd = wanted.initrd.then_some(&mut initrd as &mut dyn Write);
        find(&range, wanted.entry, &mut &kernel, initrd)
    };
    let found: Found = answer(disk, &[kernel.as_fd(), initrd.as_fd()], isolation, job)?;
    let bytes = initrd.metadata().map_err(ImageKernelError::Memory)?.len();
    if bytes != found.initrd_bytes || found.cmdline.contains(char::is_control) {
        return Err(ImageKernelError::Process(ConfinedError::Nonsense));
    }
    Ok(ImageKernel { found, kernel, initrd: (bytes > 0).then_some(initrd) })
}

/// Takes modules out of an image.
///
/// # Errors
/// [`ImageKernelError`].
pub fn modules_of(
    disk: &OpenDisk,
    wanted: WantedModules<'_>,
    isolation: Isolation,
) -> Result<ImageModules, ImageKernelError> {
    let file = in_memory("modules")?;
    let job = || {
        let range = Range::whole(Rc::clone(&disk.disk), READ_BYTES);
        find_modules(&range, wanted, &mut &file)
    };
    let found: FoundModules = answer(disk, &[file.as_fd()], isolation, job)?;
    let bytes = file.metadata().map_err(ImageKernelError::Memory)?.len();
    let sum = found.modules.iter().try_fold(0_u64, |sum, module| sum.checked_add(module.bytes));
    if sum != Some(bytes) || found.modules.len() > MAX_MODULES {
        return Err(ImageKernelError::Process(ConfinedError::Nonsense));
    }
    Ok(ImageModules { found, file })
}

fn in_memory(name: &str) -> Result<File, ImageKernelError> {
    memfd_create(name, MemfdFlags::CLOEXEC).map(File::from).map_err(|error| ImageKernelError::Memory(error.into()))
}

/// Finds the root file system of an image that is `wanted`.
///
/// # Errors
/// [`ImageKernelError`].
pub fn root_of(disk: &OpenDisk, wanted: WantedRoot<'_>, isolation: Isolation) -> Result<Root, ImageKernelError> {
    answer(disk, &[], isolation, || find_root(&Range::whole(Rc::clone(&disk.disk), READ_BYTES), wanted))
}

/// Runs a job on `disk`, which fills `files`, and reads its answer.
pub(super) fn answer<T: Serialize + DeserializeOwned>(
    disk: &OpenDisk,
    files: &[BorrowedFd<'_>],
    isolation: Isolation,
    job: impl FnOnce() -> Result<T, FindError>,
) -> Result<T, ImageKernelError> {
    let job = || {
        // The readers of file systems are other crates: what makes one panic is the image. What it had is not used again.
        let found = catch_unwind(AssertUnwindSafe(job)).unwrap_or_else(|panic| Err(FindError::Reader(said(&*panic))));
        serde_json::to_vec(&found).unwrap_or_default()
    };
    let answer = confined_with(isolation, &LIMITS, files, &disk.files, job).map_err(ImageKernelError::Process)?;
    let answer: Result<T, FindError> =
        serde_json::from_slice(&answer).map_err(|_| ImageKernelError::Process(ConfinedError::Nonsense))?;
    answer.map_err(ImageKernelError::Find)
}

/// The message of a panic.
fn said(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().copied().or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    cut(text.unwrap_or("without a message"))
}
