//! The modules of a kernel: where they are on the host, and their contents.

#[cfg(test)]
mod tests;

use super::index::{Driver, IndexError, IndexFiles, ModuleIndex};
use super::link::{AgentLink, LinkChoice, Resolved};
use crate::boot::unpack::{Content, FailedTask, Job, Limits, Task, UnpackError, run_all};
use crate::bounded_read::{OpenError, ReadError, open_regular, path_of};
use crate::sandbox::Isolation;
use hwvmm_arch::boot::FileRange;
use hwvmm_arch::boot::bzimage::Compression;
use hwvmm_devices::path_text::PathText as _;
use rustix::fs::{MemfdFlags, memfd_create};
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use thiserror::Error;

/// The largest file of depmod(8) that is read. modules.dep of a distribution has less than 1 MiB.
const INDEX_BYTES: u64 = 32 << 20;
/// The largest module, unpacked.
const MODULE_BYTES: u64 = 64 << 20;
/// The largest size of all modules together, unpacked. Those that a guest needs have less than 10 MiB.
const TOTAL_BYTES: u64 = 256 << 20;
/// Modules that are open at once, each with the file that it is unpacked into: what they take together before [`TOTAL_BYTES`] is looked
/// at. A guest needs about ten.
const UNPACKED_AT_ONCE: usize = 16;
/// Where distributions keep modules.
const SYSTEM_FOLDERS: [&str; 2] = ["/lib/modules", "/usr/lib/modules"];

/// Why the modules of a kernel cannot be had.
#[derive(Debug, Error)]
pub enum ModulesError {
    /// The folder that `--modules` names has no modules of this kernel.
    #[error("--modules {}: no modules of kernel {release} there (a modules.dep in it, in lib/modules/{release} or in {release})", .folder.shown())]
    NotThere {
        /// The folder as it was given.
        folder: PathBuf,
        /// The kernel's release, as `uname -r` prints it.
        release: String,
    },
    /// There are modules, and no modules.dep.
    #[error("{} has modules, and no modules.dep: make it with `depmod -b DIR RELEASE`, where this is DIR/lib/modules/RELEASE", .0.shown())]
    NoIndex(PathBuf),
    /// A driver is missing, or modules.dep is damaged.
    #[error("modules in {}", .folder.shown())]
    Index {
        /// The folder with modules.dep.
        folder: PathBuf,
        /// The fault of the index.
        source: IndexError,
    },
    /// A file cannot be read.
    #[error("cannot read {}", .path.shown())]
    Read {
        /// The module, or the file of depmod(8), on the host.
        path: PathBuf,
        /// The error of the read, or the limit that the file exceeds.
        source: ReadError,
    },
    /// All modules together are too large.
    #[error("the modules in {} that the guest needs have more than {} MiB", .0.shown(), TOTAL_BYTES >> 20)]
    TooMuch(PathBuf),
    /// A link to a file that is no module of this host.
    #[error(
        "the module {} is a symbolic link to a file outside of its folder and of {}: copy the file there",
        .0.shown(), SYSTEM_FOLDERS[0]
    )]
    Outside(PathBuf),
    /// A module, or a file of depmod(8), cannot be opened.
    #[error("cannot open {}", .path.shown())]
    Open {
        /// The module, or the file of depmod(8), on the host.
        path: PathBuf,
        /// The error of the open, or that it is no regular file.
        source: OpenError,
    },
    /// A compressed module cannot be unpacked.
    #[error("cannot unpack the module {}", .path.shown())]
    Unpack {
        /// The module, or the file of depmod(8), on the host.
        path: PathBuf,
        /// What is wrong with the compressed module.
        source: UnpackError,
    },
}

/// A module, unpacked.
#[derive(Debug)]
pub(super) struct Module {
    /// The file's name in the guest, which ends in `.ko`.
    pub(super) name: String,
    /// The contents: an ELF file.
    pub(super) bytes: Vec<u8>,
}

/// The modules that a guest needs.
#[derive(Debug, Default)]
pub(super) struct Modules {
    /// The folder with modules.dep. `None` if no modules of this kernel were found: it has to have all drivers built in.
    pub(super) folder: Option<PathBuf>,
    /// In the order in which they are to be loaded.
    pub(super) modules: Vec<Module>,
    /// What the agent reaches the host by; `None` where no modules were found.
    pub(super) link: Option<AgentLink>,
}

/// Modules that were copied out of a disk image.
#[derive(Debug)]
pub struct CopiedModules {
    /// Their folder in the image, for messages. `None` if it has none of this kernel.
    pub folder: Option<PathBuf>,
    /// What has their bytes.
    pub file: File,
    /// In the order in which they are to be loaded.
    pub modules: Vec<CopiedModule>,
    /// What the agent reaches the host by, as their list says; `None` where there is none.
    pub link: Option<AgentLink>,
}

/// A module in the file of [`CopiedModules`].
#[derive(Debug)]
pub struct CopiedModule {
    /// Its path in the image, for messages. The name of its file is the one in the guest.
    pub path: PathBuf,
    /// Where it is in the file.
    pub range: FileRange,
}

/// Where to look for modules.
#[derive(Clone, Copy, Debug)]
pub struct Places<'a> {
    /// The kernel file on the host: modules are looked for beside it.
    pub kernel: &'a Path,
    /// The value of `--modules`.
    pub given: Option<&'a Path>,
}

/// The folders that may have the modules of `release`, those that are looked at first in front.
fn candidates(places: Places<'_>, release: &str) -> Vec<PathBuf> {
    let below = |folder: &Path| {
        [
            folder.to_owned(),
            folder.join("lib/modules").join(release),
            folder.join("usr/lib/modules").join(release),
            folder.join(release),
        ]
    };
    if let Some(given) = places.given {
        return below(given).into();
    }
    let mut folders = Vec::new();
    if let Some(beside) = places.kernel.parent() {
        // Of a name alone it is empty, which is no path (path_resolution(7)).
        let beside = if beside.as_os_str().is_empty() { Path::new(".") } else { beside };
        folders.extend(below(beside));
        folders.push(beside.join("modules"));
        // An unpacked package has boot/vmlinuz and lib/modules.
        folders.push(beside.join("../lib/modules").join(release));
        folders.push(beside.join("../usr/lib/modules").join(release));
    }
    folders.extend(SYSTEM_FOLDERS.iter().map(|folder| Path::new(folder).join(release)));
    folders
}

fn text(path: &Path) -> Result<String, ModulesError> {
    let file = open_regular(path).map_err(|source| ModulesError::Open { path: path.to_owned(), source })?;
    let text = read(&file, INDEX_BYTES).and_then(|bytes| {
        String::from_utf8(bytes).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error).into())
    });
    text.map_err(|source| ModulesError::Read { path: path.to_owned(), source })
}

/// As [`text`], and empty where there is no such file.
fn text_if_there(path: &Path) -> Result<String, ModulesError> {
    if path.exists() { text(path) } else { Ok(String::new()) }
}

/// Finds and reads the modules that `drivers` need, with what of `choice` the kernel has in place of vsock.
///
/// # Errors
/// [`ModulesError`].
pub(super) fn find(
    places: Places<'_>,
    release: &str,
    drivers: &[Driver],
    choice: LinkChoice,
    isolation: Isolation,
) -> Result<Modules, ModulesError> {
    let folders = candidates(places, release);
    let Some(folder) = folders.iter().find(|folder| folder.join("modules.dep").is_file()) else {
        if let Some(folder) = folders.iter().find(|folder| folder.join("modules.order").is_file()) {
            return Err(ModulesError::NoIndex(folder.clone()));
        }
        return match places.given {
            Some(given) => Err(ModulesError::NotThere { folder: given.to_owned(), release: release.to_owned() }),
            None => Ok(Modules::default()),
        };
    };
    let dependencies = text(&folder.join("modules.dep"))?;
    let builtin = text_if_there(&folder.join("modules.builtin"))?;
    let soft = text_if_there(&folder.join("modules.softdep"))?;
    let index = ModuleIndex::parse(IndexFiles { dependencies: &dependencies, builtin: &builtin, soft: &soft });
    let resolved = Resolved::of(&index, drivers, choice);
    let Resolved { paths, link } = resolved.map_err(|source| ModulesError::Index { folder: folder.clone(), source })?;
    // Symbolic links to modules of other kernels are usual (weak-modules). One to anything else would give its contents to the guest.
    let homes: Vec<PathBuf> = SYSTEM_FOLDERS
        .iter()
        .map(Path::new)
        .chain([folder.as_path()])
        .filter_map(|folder| folder.canonicalize().ok())
        .collect();
    let paths: Vec<_> = paths.into_iter().map(|path| folder.join(path)).collect();
    let modules = read_all(folder, paths.len(), isolation, |number| {
        let path = paths.get(number).map_or(Path::new(""), PathBuf::as_path);
        let (file, range) = open(path, &homes)?;
        Opened::new(path, number, file, range)
    })?;
    Ok(Modules { folder: Some(folder.clone()), modules, link: Some(link) })
}

/// Reads copies of modules.
///
/// # Errors
/// [`ModulesError`].
pub(super) fn of_copies(copied: &CopiedModules, isolation: Isolation) -> Result<Modules, ModulesError> {
    let Some(folder) = &copied.folder else { return Ok(Modules::default()) };
    let modules = read_all(folder, copied.modules.len(), isolation, |number| {
        let missing = || io::Error::from(io::ErrorKind::NotFound);
        let failed = |path: &Path, error: io::Error| ModulesError::Read { path: path.to_owned(), source: error.into() };
        let module = copied.modules.get(number).ok_or_else(|| failed(folder, missing()))?;
        let file = copied.file.try_clone().map_err(|error| failed(&module.path, error))?;
        Opened::new(&module.path, number, file, module.range)
    })?;
    Ok(Modules { folder: Some(folder.clone()), modules, link: copied.link })
}

/// A module's file, open.
struct Opened {
    /// The path of the module, which messages name.
    path: PathBuf,
    /// The file's name in the guest. It begins with the module's number: two folders may have modules of one name.
    name: String,
    file: File,
    /// Where the module is in the file.
    range: FileRange,
    /// Where it is compressed: the file that it is unpacked into.
    out: Option<File>,
}

impl Opened {
    fn new(path: &Path, number: usize, file: File, range: FileRange) -> Result<Self, ModulesError> {
        let file_name = path.file_name().unwrap_or_default().to_string_lossy();
        let stem = file_name.split(".ko").next().unwrap_or_default();
        let name = format!("{number:02}-{stem}.ko");
        let mut start = [0; 16];
        let count = usize::try_from(range.bytes).unwrap_or(usize::MAX).min(start.len());
        let start = start.get_mut(..count).unwrap_or_default();
        file.read_exact_at(start, range.offset)
            .map_err(|error| ModulesError::Read { path: path.to_owned(), source: error.into() })?;
        let is_packed = Compression::detect(start).is_some_and(|kind| kind != Compression::None);
        let out = is_packed.then(|| memfd_create("module", MemfdFlags::CLOEXEC).map(File::from)).transpose();
        let out = out.map_err(|error| ModulesError::Unpack {
            path: path.to_owned(),
            source: UnpackError::Write(error.into()),
        })?;
        Ok(Self { path: path.to_owned(), name, file, range, out })
    }

    /// Reads a module that is not compressed.
    fn read(&self) -> Result<Vec<u8>, ReadError> {
        if self.range.bytes > MODULE_BYTES {
            return Err(ReadError::TooLarge { max_bytes: MODULE_BYTES });
        }
        let mut bytes = vec![0; usize::try_from(self.range.bytes).unwrap_or_default()];
        self.file.read_exact_at(&mut bytes, self.range.offset)?;
        Ok(bytes)
    }
}

/// Opens the file of a module.
fn open(path: &Path, homes: &[PathBuf]) -> Result<(File, FileRange), ModulesError> {
    let failed = |error: io::Error| ModulesError::Read { path: path.to_owned(), source: error.into() };
    let file = open_regular(path).map_err(|source| ModulesError::Open { path: path.to_owned(), source })?;
    let resolved = path_of(&file).map_err(failed)?;
    if !homes.iter().any(|home| resolved.starts_with(home)) {
        return Err(ModulesError::Outside(path.to_owned()));
    }
    let bytes = file.metadata().map_err(failed)?.len();
    Ok((file, FileRange { offset: 0, bytes }))
}

fn read(file: &File, max_bytes: u64) -> Result<Vec<u8>, ReadError> {
    let mut bytes = Vec::new();
    file.take(max_bytes + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > max_bytes { Err(ReadError::TooLarge { max_bytes }) } else { Ok(bytes) }
}

/// Reads the `count` modules of `folder`, which `open` opens by their numbers: a few at once.
fn read_all(
    folder: &Path,
    count: usize,
    isolation: Isolation,
    open: impl Fn(usize) -> Result<Opened, ModulesError>,
) -> Result<Vec<Module>, ModulesError> {
    let mut modules: Vec<Module> = Vec::new();
    let numbers: Vec<usize> = (0..count).collect();
    for some in numbers.chunks(UNPACKED_AT_ONCE) {
        let opened = some.iter().map(|number| open(*number)).collect::<Result<Vec<_>, _>>()?;
        modules.extend(contents(&opened, isolation)?);
        let bytes = modules.iter().fold(0_u64, |sum, Module { bytes, .. }| sum.saturating_add(bytes.len() as u64));
        if bytes > TOTAL_BYTES {
            return Err(ModulesError::TooMuch(folder.to_owned()));
        }
    }
    Ok(modules)
}

/// Reads modules; those that are compressed are unpacked together.
fn contents(opened: &[Opened], isolation: Isolation) -> Result<Vec<Module>, ModulesError> {
    let (mut tasks, mut packed) = (Vec::new(), Vec::new());
    for module in opened {
        if let Some(out) = &module.out {
            let job = Job { range: module.range, content: Content::Stream, limits: Limits::of(MODULE_BYTES) };
            tasks.push(Task { job, packed: &module.file, out });
            packed.push(module.path.as_path());
        }
    }
    let failed = |FailedTask { index, error }| ModulesError::Unpack {
        path: packed.get(index).copied().unwrap_or(Path::new("")).to_owned(),
        source: error,
    };
    let sizes = if tasks.is_empty() { Vec::new() } else { run_all(&tasks, isolation).map_err(failed)? };
    let mut sizes = sizes.into_iter();
    let content = |module: &Opened| {
        let path = || module.path.clone();
        let Some(out) = &module.out else {
            return module.read().map_err(|source| ModulesError::Read { path: path(), source });
        };
        let mut bytes = vec![0; sizes.next().and_then(|size| usize::try_from(size).ok()).unwrap_or_default()];
        let source = UnpackError::Read;
        out.read_exact_at(&mut bytes, 0)
            .map_err(|error| ModulesError::Unpack { path: path(), source: source(error) })?;
        Ok(bytes)
    };
    let contents: Vec<Vec<u8>> = opened.iter().map(content).collect::<Result<_, _>>()?;
    Ok(opened.iter().zip(contents).map(|(module, bytes)| Module { name: module.name.clone(), bytes }).collect())
}
