//! Symbols as a list: from an ELF's symbol table, or from a System.map.

use object::{Object, ObjectSymbol, ReadCache, SymbolKind};
use std::fs::File;

/// A table of symbols, sorted by address.
pub(super) struct Table {
    symbols: Vec<(u64, String)>,
    origin: &'static str,
}

impl Table {
    /// The functions of an ELF's symbol table; `None` where it has none.
    pub(super) fn from_elf(file: &File) -> Option<Self> {
        // Reads only what is asked for.
        let contents = ReadCache::new(file);
        let elf = object::File::parse(&contents).ok()?;
        let code = elf.symbols().filter(|symbol| {
            symbol.is_definition()
                && matches!(symbol.kind(), SymbolKind::Text | SymbolKind::Label | SymbolKind::Unknown)
        });
        let symbols = code.filter_map(|symbol| Some((symbol.address(), symbol.name().ok()?.to_owned())));
        Self::new(symbols.filter(|(_, name)| !name.is_empty()).collect(), "the ELF's symbol table")
    }

    /// The symbols of a System.map: address, type, name.
    pub(super) fn from_system_map(contents: &[u8]) -> Option<Self> {
        let text = std::str::from_utf8(contents).ok()?;
        let line = |line: &str| {
            let mut words = line.split_whitespace();
            let address = u64::from_str_radix(words.next()?, 16).ok()?;
            let _kind = words.next().filter(|kind| kind.len() == 1)?;
            Some((address, words.next()?.to_owned()))
        };
        Self::new(text.lines().map_while(line).collect(), "a System.map")
    }

    fn new(mut symbols: Vec<(u64, String)>, origin: &'static str) -> Option<Self> {
        // Stable: of several at one place the first stays first, as in the kernel.
        symbols.sort_by_key(|(address, _)| *address);
        (!symbols.is_empty()).then_some(Self { symbols, origin })
    }

    pub(super) fn len(&self) -> usize {
        self.symbols.len()
    }

    pub(super) fn origin(&self) -> &'static str {
        self.origin
    }

    pub(super) fn resolve(&self, address: u64) -> Option<(String, u64)> {
        let behind = self.symbols.partition_point(|(start, _)| *start <= address);
        let (start, _) = self.symbols.get(behind.checked_sub(1)?)?;
        let first = self.symbols.partition_point(|(other, _)| other < start);
        self.symbols.get(first).map(|(start, name)| (name.clone(), *start))
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
        let table = Table::from_elf(&file).expect("a symbol table");
        let main = table.address("main").expect("a program has main");
        assert_eq!(table.resolve(main + 1).map(|(_, start)| start), Some(main));
        let mut nonsense = tempfile::tempfile().expect("a file");
        std::io::Write::write_all(&mut nonsense, b"\x7fELF and nonsense").expect("written");
        assert!(Table::from_elf(&nonsense).is_none());
        assert!(Table::from_system_map(b"no map").is_none() && Table::from_system_map(&[0xff; 9]).is_none());
    }
}
