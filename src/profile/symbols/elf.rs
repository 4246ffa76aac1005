//! What is read of an ELF kernel: its sections and its symbol table.

use super::image_map::{ImageMap, Mapped};
use super::limits::{Allowance, ELF_BYTES, MAX_SEGMENTS, MAX_SYMBOLS, SearchError};
use hwvmm_arch::boot::elf::ElfClass;
use object::{Object, ObjectSection, ObjectSegment, ObjectSymbol, ReadCache, ReadRef, SymbolKind};
use std::fs::File;
use std::ops::Range;

/// Reads only what is asked for, and no more than is allowed: sizes in headers are as the file's author wants them.
#[derive(Clone, Copy)]
struct Limited<'a> {
    cache: &'a ReadCache<&'a File>,
    allowance: &'a Allowance,
}

impl<'a> ReadRef<'a> for Limited<'a> {
    fn len(self) -> Result<u64, ()> {
        ReadRef::len(self.cache)
    }

    fn read_bytes_at(self, offset: u64, size: u64) -> Result<&'a [u8], ()> {
        self.allowance.take(size).ok_or(())?;
        self.cache.read_bytes_at(offset, size)
    }

    fn read_bytes_at_until(self, range: Range<u64>, delimiter: u8) -> Result<&'a [u8], ()> {
        let bytes = self.cache.read_bytes_at_until(range, delimiter)?;
        self.allowance.take(bytes.len() as u64 + 1).ok_or(())?;
        Ok(bytes)
    }
}

/// Where what is in a kernel's file; `None` where it is no ELF file.
pub(super) fn image_map(file: &File) -> Option<ImageMap> {
    let (cache, allowance) = (ReadCache::new(file), Allowance::new(ELF_BYTES));
    let elf = object::File::parse(Limited { cache: &cache, allowance: &allowance }).ok()?;
    let segments = elf.segments().take(MAX_SEGMENTS).map(|segment| {
        let (offset, file_bytes) = segment.file_range();
        Mapped { offset, file_bytes, address: segment.address(), memory_bytes: segment.size() }
    });
    let read_only_data = elf.section_by_name(".rodata").and_then(|section| section.file_range());
    Some(ImageMap {
        class: if elf.is_64() { ElfClass::Elf64 } else { ElfClass::Elf32 },
        read_only_data: read_only_data.map_or(0, |(offset, _)| offset),
        segments: segments.collect(),
    })
}

/// Addresses and names of the functions in the symbol table of an ELF file; none where it has no symbol table.
pub(super) fn functions(file: &File) -> Result<Vec<(u64, String)>, SearchError> {
    let (cache, allowance) = (ReadCache::new(file), Allowance::new(ELF_BYTES));
    let mut found = Vec::new();
    if let Ok(elf) = object::File::parse(Limited { cache: &cache, allowance: &allowance }) {
        let code = elf.symbols().filter(|symbol| {
            symbol.is_definition()
                && matches!(symbol.kind(), SymbolKind::Text | SymbolKind::Label | SymbolKind::Unknown)
        });
        for symbol in code {
            if let Some(name) = symbol.name().ok().filter(|name| !name.is_empty()) {
                found.push((symbol.address(), name.to_owned()));
            }
            if found.len() > MAX_SYMBOLS {
                return Err(SearchError::Symbols(MAX_SYMBOLS));
            }
            if allowance.is_exhausted() {
                break;
            }
        }
    }
    if allowance.is_exhausted() { Err(SearchError::ElfBytes(ELF_BYTES)) } else { Ok(found) }
}
