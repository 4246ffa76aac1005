//! The guest kernel's symbols: which function an instruction belongs to.

mod kallsyms;
mod table;

use crate::boot;
use crate::config::RunConfig;
use kallsyms::Kallsyms;
use std::fs::File;
use std::io::{self, Read, Seek};
use std::path::PathBuf;
use table::Table;
use thiserror::Error;

/// Where Linux links its text, and from which physical address it does so (CONFIG_PHYSICAL_START may differ; the
/// difference of both is the same): what the kernel's first instructions run at, before paging is its own.
const KERNEL_MAP: u64 = 0xffff_ffff_8000_0000;
/// A symbol farther away than this says nothing.
const REACH: u64 = 4 << 20;
/// KASLR moves a kernel by whole steps of this.
const KASLR_STEP: u64 = 2 << 20;
const KASLR_MOST: u64 = 1 << 30;
/// The names of the functions that the MSR LSTAR can point to.
const SYSCALL_ENTRIES: [&str; 3] = ["entry_SYSCALL_64", "system_call", "entry_SYSCALL_64_trampoline"];
/// More than any System.map has.
const MAX_MAP_BYTES: u64 = 64 << 20;

/// There are no symbols.
#[derive(Debug, Error)]
pub enum SymbolsError {
    /// The kernel cannot be read or unpacked.
    #[error(transparent)]
    Kernel(#[from] boot::KernelError),
    /// A file of symbols cannot be read.
    #[error("cannot read {}", .0.display())]
    Read(PathBuf, #[source] std::io::Error),
    /// Neither symbol table nor kallsyms.
    #[error(
        "{} has no symbols: neither a symbol table nor kallsyms (CONFIG_KALLSYMS); give them with --symbols vmlinux or \
         --symbols System.map", .0.display()
    )]
    None(PathBuf),
}

enum Source {
    Table(Table),
    Kallsyms(Kallsyms),
}

/// The symbols of a kernel.
pub struct Symbols {
    source: Source,
    /// By how much the running kernel was moved.
    slide: u64,
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
            Some(path) => (path, File::open(path).map_err(|source| SymbolsError::Read(path.clone(), source))?),
            None => (&config.kernel, boot::unpacked(config)?),
        };
        let failed = |source| SymbolsError::Read(path.clone(), source);
        if !file.metadata().map_err(failed)?.is_file() {
            return Err(failed(io::Error::other("it is not a file")));
        }
        Self::read(&file).map_err(failed)?.ok_or_else(|| SymbolsError::None(path.clone()))
    }

    /// The symbols in an unpacked kernel (its symbol table, or its kallsyms), or those of a System.map; `None` where there
    /// are none.
    ///
    /// # Errors
    /// Where the file cannot be read.
    pub fn read(file: &File) -> io::Result<Option<Self>> {
        let source = match Table::from_elf(file).map(Source::Table) {
            Some(source) => Some(source),
            None => match Kallsyms::read(file)?.map(Source::Kallsyms) {
                Some(source) => Some(source),
                None => Self::system_map(file)?,
            },
        };
        Ok(source.map(|source| Self { source, slide: 0 }))
    }

    /// A System.map: a text of some megabytes.
    fn system_map(mut file: &File) -> io::Result<Option<Source>> {
        let mut contents = Vec::new();
        file.rewind()?;
        file.take(MAX_MAP_BYTES).read_to_end(&mut contents)?;
        Ok(Table::from_system_map(&contents).map(Source::Table))
    }

    /// Where they come from, and how many there are.
    #[must_use]
    pub fn description(&self) -> String {
        match &self.source {
            Source::Table(table) => format!("{} symbols of {}", table.len(), table.origin()),
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
        self.linked(rip.checked_add(KERNEL_MAP)?)
    }

    fn linked(&self, address: u64) -> Option<Place> {
        let (function, start) = match &self.source {
            Source::Table(table) => table.resolve(address)?,
            Source::Kallsyms(kallsyms) => kallsyms.resolve(address)?,
        };
        let offset = address - start;
        (start >= KERNEL_MAP && offset < REACH).then_some(Place { function, offset })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAP: &str = "0000000000000000 A fixed_percpu_data\nffffffff81000000 T _text\nffffffff81000000 T startup_64\n\
        ffffffff81000100 t early\nffffffff81c00080 T entry_SYSCALL_64\nffffffff82000000 D data\n";

    #[test]
    fn kaslr_is_found_from_the_system_call_entry() {
        let table = Table::from_system_map(MAP.as_bytes()).expect("symbols");
        let mut symbols = Symbols { source: Source::Table(table), slide: 0 };
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
