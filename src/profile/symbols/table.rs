//! Symbols as a list: from an ELF's symbol table, or from a System.map.

use super::elf::functions;
use super::limits::{MAX_SYMBOLS, SearchError};
use crate::escape::{SYMBOL_BYTES, escape};
use std::fs::File;

/// Where symbols come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Origin {
    /// The symbol table of an ELF file.
    Elf,
    /// A System.map, or text of that form.
    SystemMap,
}

/// A table of symbols, sorted by address.
pub(super) struct Table {
    symbols: Vec<(u64, String)>,
    origin: Origin,
}

impl Table {
    /// The functions of an ELF's symbol table; `None` where it has none.
    pub(super) fn from_elf(file: &File) -> Result<Option<Self>, SearchError> {
        Ok(Self::new(functions(file)?, Origin::Elf))
    }

    /// The symbols of a System.map: address, type, name.
    pub(super) fn from_system_map(contents: &[u8]) -> Result<Option<Self>, SearchError> {
        let Ok(text) = std::str::from_utf8(contents) else { return Ok(None) };
        let line = |line: &str| {
            let mut words = line.split_whitespace();
            let address = u64::from_str_radix(words.next()?, 16).ok()?;
            let _kind = words.next().filter(|kind| kind.len() == 1)?;
            Some((address, words.next()?.to_owned()))
        };
        let symbols: Vec<_> = text.lines().map_while(line).take(MAX_SYMBOLS + 1).collect();
        if symbols.len() > MAX_SYMBOLS {
            return Err(SearchError::Symbols(MAX_SYMBOLS));
        }
        Ok(Self::new(symbols, Origin::SystemMap))
    }

    /// `None` without symbols.
    pub(super) fn new(mut symbols: Vec<(u64, String)>, origin: Origin) -> Option<Self> {
        // Stable: of several at one place the first stays first, as in the kernel.
        symbols.sort_by_key(|(address, _)| *address);
        (!symbols.is_empty()).then_some(Self { symbols, origin })
    }

    pub(super) fn origin(&self) -> Origin {
        self.origin
    }

    /// The first and the last address.
    pub(super) fn bounds(&self) -> Option<(u64, u64)> {
        Some((self.symbols.first()?.0, self.symbols.last()?.0))
    }

    pub(super) fn symbols(&self) -> &[(u64, String)] {
        &self.symbols
    }

    /// How many there are, and where they come from.
    pub(super) fn description(&self) -> String {
        let origin = match self.origin {
            Origin::Elf => "the ELF's symbol table",
            Origin::SystemMap => "a System.map",
        };
        format!("{} symbols of {origin}", self.symbols.len())
    }

    /// Returns the name, escaped, and the address of the function at `address`.
    pub(super) fn resolve(&self, address: u64) -> Option<(String, u64)> {
        let behind = self.symbols.partition_point(|(start, _)| *start <= address);
        let (start, _) = self.symbols.get(behind.checked_sub(1)?)?;
        let first = self.symbols.partition_point(|(other, _)| other < start);
        self.symbols.get(first).map(|(start, name)| (escape(name, SYMBOL_BYTES), *start))
    }

    pub(super) fn address(&self, wanted: &str) -> Option<u64> {
        self.symbols.iter().find(|(_, name)| name == wanted).map(|(address, _)| *address)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_test_finds_itself() {
        // Any ELF with a symbol table will do: this one.
        let file = File::open("/proc/self/exe").expect("readable");
        let table = Table::from_elf(&file).expect("readable").expect("a symbol table");
        let main = table.address("main").expect("a program has main");
        assert_eq!(table.resolve(main + 1).map(|(_, start)| start), Some(main));
        let mut nonsense = tempfile::tempfile().expect("a file");
        std::io::Write::write_all(&mut nonsense, b"\x7fELF and nonsense").expect("written");
        assert!(Table::from_elf(&nonsense).expect("readable").is_none());
        for nonsense in [&b"no map"[..], &[0xff; 9]] {
            assert!(Table::from_system_map(nonsense).expect("few").is_none());
        }
    }

    #[test]
    fn symbols_are_counted() {
        let map = "0 T a\n".repeat(MAX_SYMBOLS);
        assert_eq!(
            Table::from_system_map(map.as_bytes()).expect("few").map(|table| table.symbols.len()),
            Some(MAX_SYMBOLS)
        );
        let error = Table::from_system_map(format!("{map}0 T a").as_bytes()).err().expect("too many");
        assert!(error.to_string().contains("4000000"), "{error}");
    }

    /// A symbol table of 16 GiB, in a sparse file.
    #[test]
    fn a_huge_symbol_table_is_refused() {
        use std::os::unix::fs::FileExt;
        let (header, section, size) = (64_usize, 64_usize, 16_u64 << 30);
        let mut elf = vec![0; header + 3 * section];
        let mut put = |at: usize, bytes: &[u8]| elf[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, b"\x7fELF\x02\x01\x01");
        put(16, &[2, 0, 62, 0, 1]);
        put(40, &64_u64.to_le_bytes()); // e_shoff
        put(52, &[64, 0, 0, 0, 0, 0, 64, 0, 3, 0, 2, 0]); // sizes, 3 sections, names in the third
        let mut section_at = |number: usize, kind: u32, offset: u64, size: u64, link: u32, entry: u64| {
            let at = header + number * section;
            put(at + 4, &kind.to_le_bytes());
            put(at + 24, &offset.to_le_bytes());
            put(at + 32, &size.to_le_bytes());
            put(at + 40, &link.to_le_bytes());
            put(at + 56, &entry.to_le_bytes());
        };
        section_at(1, 2, 4096, size, 2, 24); // SHT_SYMTAB
        section_at(2, 3, 256, 16, 0, 0); // SHT_STRTAB
        let file = tempfile::tempfile().expect("a file");
        file.write_all_at(&elf, 0).expect("written");
        file.set_len(4096 + size).expect("sparse");
        let error = Table::from_elf(&file).err().expect("too large");
        assert!(error.to_string().contains("268435456 bytes"), "{error}");
    }
}
