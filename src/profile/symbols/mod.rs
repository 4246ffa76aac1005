//! The guest kernel's symbols: which function an instruction belongs to.

mod elf;
mod image_map;
mod kallsyms;
mod limits;
mod process;
mod table;

pub use limits::SearchError;

use crate::boot;
use crate::bounded_read::{OpenError, open_regular};
use crate::config::RunConfig;
use crate::sandbox::Isolation;
use hwvmm_devices::path_text::PathText as _;
use process::Source;
use std::fs::File;
use std::path::{Path, PathBuf};
use thiserror::Error;

/// The virtual address to which 64-bit Linux is linked less its physical address, at which its first instructions run, before
/// paging is its own.
const KERNEL_MAP: u64 = 0xffff_ffff_8000_0000;
/// The same of a 32-bit Linux is CONFIG_PAGE_OFFSET, a multiple of this, which is at least the second. The kernel is linked less
/// than the first behind it.
const PAGE_OFFSET_STEP: u64 = 128 << 20;
const LOWEST_PAGE_OFFSET: u64 = 0x4000_0000;
/// A symbol farther away than this says nothing.
const REACH: u64 = 4 << 20;
/// KASLR moves a kernel by whole steps of this.
const KASLR_STEP: u64 = 2 << 20;
const KASLR_MOST: u64 = 1 << 30;
/// The names of the functions that the MSR LSTAR can point to.
const SYSCALL_ENTRIES: [&str; 3] = ["entry_SYSCALL_64", "system_call", "entry_SYSCALL_64_trampoline"];

/// There are no symbols.
#[derive(Debug, Error)]
pub enum SymbolsError {
    /// The kernel cannot be read or unpacked.
    #[error(transparent)]
    Kernel(#[from] boot::KernelError),
    /// A file of symbols cannot be read.
    #[error("cannot read {}", .0.shown())]
    Read(PathBuf, #[source] std::io::Error),
    /// It is a folder, a pipe or a device.
    #[error("{} is not a regular file: it has no symbols", .0.shown())]
    NotFile(PathBuf),
    /// The file's symbols cannot be read, or reading them takes too much.
    #[error("cannot read the symbols of {}", .0.shown())]
    Search(PathBuf, #[source] SearchError),
    /// Neither symbol table nor kallsyms.
    #[error(
        "{} has no symbols: neither a symbol table nor kallsyms (CONFIG_KALLSYMS); give them with --symbols vmlinux or \
         --symbols System.map", .0.shown()
    )]
    None(PathBuf),
    /// The kernel was taken out of an image.
    #[error("{}: the symbols of a kernel in a disk image are not read; give them with --symbols System.map", .0.shown())]
    InImage(PathBuf),
}

/// The symbols of a kernel.
pub struct Symbols {
    source: Source,
    /// The kernel's virtual addresses less its physical ones, which no function's address is below.
    map: u64,
    /// By how much the running kernel was moved.
    slide: u64,
}

impl From<Source> for Symbols {
    fn from(source: Source) -> Self {
        let bounds = match &source {
            Source::Table(table) => table.bounds(),
            Source::Kallsyms(kallsyms) => kallsyms.bounds(),
        };
        let (first, last) = bounds.unwrap_or((0, 0));
        let is_32_bit = first >= LOWEST_PAGE_OFFSET && last <= u32::MAX.into();
        let map = if is_32_bit { first - first % PAGE_OFFSET_STEP } else { KERNEL_MAP };
        Self { source, map, slide: 0 }
    }
}

fn open(path: &Path) -> Result<File, SymbolsError> {
    open_regular(path).map_err(|error| match error {
        OpenError::Io(source) => SymbolsError::Read(path.to_owned(), source),
        OpenError::Kind => SymbolsError::NotFile(path.to_owned()),
    })
}

/// A place in the guest's kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The name of the function.
    pub function: String,
    /// Bytes from its start.
    pub offset: u64,
}

impl Symbols {
    /// The symbols of a run's kernel, or those that were given instead.
    ///
    /// # Errors
    /// [`SymbolsError`].
    pub fn load(config: &RunConfig) -> Result<Self, SymbolsError> {
        let (path, file) = match &config.symbols {
            Some(path) => (path, open(path)?),
            None if config.kernel_from.is_some() => return Err(SymbolsError::InImage(config.kernel.clone())),
            None => (&config.kernel, boot::unpacked(config)?),
        };
        // A process of its own costs two per cent of a boot's instructions. The search of the run's kernel is bounded in steps; what
        // --symbols names is parsed whole, and a guest with a writable share may have put another file in the kernel's place.
        let guest_writes = config.share.iter().any(|share| !share.read_only);
        let foreign = config.symbols.is_some() || guest_writes;
        let isolation = if foreign { boot::isolation(config.sandbox) } else { Isolation::None };
        let found = process::read(&file, isolation).map_err(|source| SymbolsError::Search(path.clone(), source))?;
        found.map(Self::from).ok_or_else(|| SymbolsError::None(path.clone()))
    }

    /// The symbols in an unpacked kernel (its symbol table, or its kallsyms), or those of a System.map; `None` where there
    /// are none. Reads them in the calling thread: for tests and fuzz targets.
    ///
    /// # Errors
    /// [`SearchError`]: where the file cannot be read, or reading its symbols takes more than it may.
    pub fn read(file: &File) -> Result<Option<Self>, SearchError> {
        Ok(process::read(file, Isolation::None)?.map(Self::from))
    }

    /// Where they come from, and how many there are.
    #[must_use]
    pub fn description(&self) -> String {
        match &self.source {
            Source::Table(table) => table.description(),
            Source::Kallsyms(kallsyms) => format!("{} symbols of the kernel's own kallsyms", kallsyms.len()),
        }
    }

    /// By how much the running kernel was moved, found from where it takes system calls.
    #[must_use]
    pub fn slide(&self) -> u64 {
        self.slide
    }

    /// The address of a symbol, where the kernel was linked to.
    #[must_use]
    pub fn address(&self, name: &str) -> Option<u64> {
        match &self.source {
            Source::Table(table) => table.address(name),
            Source::Kallsyms(kallsyms) => kallsyms.address(name),
        }
    }

    /// Learns from the running guest's LSTAR by how much its kernel was moved (KASLR). `false` where it fits no kernel
    /// with these symbols.
    pub fn locate(&mut self, lstar: u64) -> bool {
        let linked = SYSCALL_ENTRIES.iter().find_map(|name| self.address(name));
        let slide = linked.and_then(|linked| lstar.checked_sub(linked));
        match slide.filter(|slide| slide.is_multiple_of(KASLR_STEP) && *slide <= KASLR_MOST) {
            Some(slide) => {
                self.slide = slide;
                true
            }
            None => false,
        }
    }

    /// The function of an instruction in the running kernel.
    #[must_use]
    pub fn resolve(&self, rip: u64) -> Option<Place> {
        self.linked(rip.checked_sub(self.slide)?)
    }

    /// The function of an instruction in a kernel that runs where it was loaded, before it maps itself to where it was
    /// linked for.
    #[must_use]
    pub fn resolve_unmapped(&self, rip: u64) -> Option<Place> {
        self.linked(rip.checked_add(self.map)?)
    }

    fn linked(&self, address: u64) -> Option<Place> {
        let (function, start) = match &self.source {
            Source::Table(table) => table.resolve(address)?,
            Source::Kallsyms(kallsyms) => kallsyms.resolve(address)?,
        };
        let offset = address - start;
        (start >= self.map && offset < REACH).then_some(Place { function, offset })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAP: &str = "0000000000000000 A fixed_percpu_data\nffffffff81000000 T _text\nffffffff81000000 T startup_64\n\
        ffffffff81000100 t early\nffffffff81c00080 T entry_SYSCALL_64\nffffffff82000000 D data\n";

    #[test]
    fn a_fifo_is_refused_and_not_waited_for() {
        let folder = tempfile::tempdir().expect("a folder");
        let fifo = folder.path().join("fifo");
        rustix::fs::mkfifoat(rustix::fs::CWD, &fifo, rustix::fs::Mode::RUSR).expect("made");
        let text = format!("kernel = '/nowhere'\nsymbols = '{}'", fifo.display());
        let options: crate::config::RunOptions = toml::from_str(&text).expect("TOML");
        let config = options.into_config().expect("valid");
        assert!(matches!(Symbols::load(&config), Err(SymbolsError::NotFile(_))));
    }

    #[test]
    fn kaslr_is_found_from_the_system_call_entry() {
        let table = super::table::Table::from_system_map(MAP.as_bytes()).expect("few").expect("symbols");
        let mut symbols = Symbols::from(Source::Table(table));
        assert!(symbols.description().contains("System.map"));
        assert!(!symbols.locate(0x1234) && symbols.slide() == 0, "no kernel's");
        assert!(!symbols.locate(0xffff_ffff_81c0_0080 + 4096), "not a step of KASLR");
        assert!(symbols.locate(0xffff_ffff_81c0_0080 + 0x1a00_0000));
        let place = symbols.resolve(0xffff_ffff_8100_0110 + 0x1a00_0000);
        assert_eq!(place, Some(Place { function: "early".into(), offset: 0x10 }));
        let early = symbols.resolve_unmapped(0x100_0005);
        assert_eq!(early, Some(Place { function: "_text".into(), offset: 5 }), "where it was loaded, not moved");
        assert_eq!(symbols.resolve(0x7f12_3456_7890), None);
    }
}
