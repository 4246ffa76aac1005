//! Reads symbols in a process of its own, which answers with a list.
//!
//! The answer is a byte for what it is, and then for each symbol its address (8 bytes), the length of its name (2 bytes) and the name;
//! all numbers are little-endian. kallsyms is its tables, as `kallsyms/packed.rs` has them: a profile asks for few of 100,000 names. An
//! error is its number and a value.

use super::kallsyms::Kallsyms;
use super::limits::{ELF_BYTES, MAX_NAMES_BYTES, MAX_SYMBOLS, STEPS, SearchError};
use super::table::{Origin, Table};
use crate::sandbox::{ConfinedError, Isolation, Limits, confined};
use std::fs::File;
use std::io::{self, Read, Seek};
use std::os::fd::AsFd;
use std::time::Duration;

/// More than any System.map has.
const MAX_MAP_BYTES: u64 = 64 << 20;
/// Bytes of a symbol in the answer, beside its name.
const SYMBOL_BYTES: usize = 10;
/// The longest name in bytes.
const NAME_BYTES: usize = 1024;
const LIMITS: Limits = Limits {
    memory_bytes: 1 << 30,
    cpu: Duration::from_secs(20),
    wall: Duration::from_secs(40),
    file_bytes: 0,
    answer_bytes: MAX_NAMES_BYTES + MAX_SYMBOLS * SYMBOL_BYTES + 1,
};

/// What the first byte of an answer says.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Elf = 0,
    Kallsyms,
    SystemMap,
    Nothing,
    Steps,
    Symbols,
    Names,
    ElfBytes,
    Read,
}

impl Kind {
    const ALL: [Self; 9] = [
        Self::Elf,
        Self::Kallsyms,
        Self::SystemMap,
        Self::Nothing,
        Self::Steps,
        Self::Symbols,
        Self::Names,
        Self::ElfBytes,
        Self::Read,
    ];
}

/// Symbols as they were found.
pub(super) enum Source {
    /// The symbols that were found.
    Table(Table),
    /// The tables that a kernel has for itself.
    Kallsyms(Kallsyms),
}

/// The symbols of `file`: its symbol table, its kallsyms, or a System.map.
pub(super) fn read(file: &File, isolation: Isolation) -> Result<Option<Source>, SearchError> {
    if isolation == Isolation::None {
        return search(file);
    }
    let answer = confined(isolation, &LIMITS, &[file.as_fd()], || encode(&search(file)))?;
    decode(&answer).unwrap_or(Err(ConfinedError::Nonsense.into()))
}

fn search(file: &File) -> Result<Option<Source>, SearchError> {
    if let Some(table) = Table::from_elf(file)? {
        return Ok(Some(Source::Table(table)));
    }
    match Kallsyms::read(file)? {
        Some(kallsyms) => Ok(Some(Source::Kallsyms(kallsyms))),
        None => Ok(system_map(file)?.map(Source::Table)),
    }
}

/// A System.map: a text of some megabytes.
fn system_map(mut file: &File) -> Result<Option<Table>, SearchError> {
    let mut contents = Vec::new();
    file.rewind()?;
    file.take(MAX_MAP_BYTES).read_to_end(&mut contents)?;
    Table::from_system_map(&contents)
}

fn encode(result: &Result<Option<Source>, SearchError>) -> Vec<u8> {
    let failed = |kind: Kind, value: i32| [&[kind as u8], value.to_le_bytes().as_slice()].concat();
    match result {
        Ok(None) => vec![Kind::Nothing as u8],
        Ok(Some(Source::Table(table))) => encode_table(table),
        Ok(Some(Source::Kallsyms(kallsyms))) => match kallsyms.pack() {
            Some(packed) => [&[Kind::Kallsyms as u8], packed.as_slice()].concat(),
            None => failed(Kind::Symbols, 0),
        },
        Err(SearchError::Steps(_)) => failed(Kind::Steps, 0),
        Err(SearchError::Symbols(_)) => failed(Kind::Symbols, 0),
        Err(SearchError::Names(_)) => failed(Kind::Names, 0),
        Err(SearchError::ElfBytes(_)) => failed(Kind::ElfBytes, 0),
        Err(SearchError::Read(error)) => failed(Kind::Read, error.raw_os_error().unwrap_or(0)),
        Err(SearchError::Process(_)) => failed(Kind::Read, 0),
    }
}

fn encode_table(table: &Table) -> Vec<u8> {
    let kind = match table.origin() {
        Origin::Elf => Kind::Elf,
        Origin::SystemMap => Kind::SystemMap,
    };
    let (mut answer, mut bytes) = (vec![kind as u8], 0);
    for (address, name) in table.symbols() {
        let name = shortened(name).as_bytes();
        let Ok(length) = u16::try_from(name.len()) else { continue };
        bytes += name.len();
        if bytes > MAX_NAMES_BYTES {
            return encode(&Err(SearchError::Names(MAX_NAMES_BYTES)));
        }
        answer.extend(address.to_le_bytes());
        answer.extend(length.to_le_bytes());
        answer.extend(name);
    }
    answer
}

/// At most [`NAME_BYTES`] of a name, in whole characters.
fn shortened(name: &str) -> &str {
    let end = (0..=NAME_BYTES.min(name.len())).rev().find(|end| name.is_char_boundary(*end)).unwrap_or(0);
    name.get(..end).unwrap_or_default()
}

/// `None` where the answer is none.
fn decode(answer: &[u8]) -> Option<Result<Option<Source>, SearchError>> {
    let (kind, rest) = answer.split_first()?;
    let kind = Kind::ALL.into_iter().find(|known| *known as u8 == *kind)?;
    let value = || Some(i32::from_le_bytes(rest.try_into().ok()?));
    let origin = match kind {
        Kind::Elf => Origin::Elf,
        Kind::Kallsyms => return Kallsyms::unpack(rest).map(|kallsyms| Ok(Some(Source::Kallsyms(kallsyms)))),
        Kind::SystemMap => Origin::SystemMap,
        Kind::Nothing => return rest.is_empty().then_some(Ok(None)),
        Kind::Steps => return Some(Err(SearchError::Steps(STEPS))),
        Kind::Symbols => return Some(Err(SearchError::Symbols(MAX_SYMBOLS))),
        Kind::Names => return Some(Err(SearchError::Names(MAX_NAMES_BYTES))),
        Kind::ElfBytes => return Some(Err(SearchError::ElfBytes(ELF_BYTES))),
        Kind::Read => {
            let error = match value()? {
                0 => io::ErrorKind::InvalidData.into(),
                number => io::Error::from_raw_os_error(number),
            };
            return Some(Err(SearchError::Read(error)));
        }
    };
    decode_table(rest, origin).map(|table| Ok(Some(Source::Table(table))))
}

fn decode_table(mut rest: &[u8], origin: Origin) -> Option<Table> {
    let mut symbols: Vec<(u64, String)> = Vec::new();
    while !rest.is_empty() {
        let (address, behind) = rest.split_first_chunk()?;
        let (length, behind) = behind.split_first_chunk()?;
        let (name, behind) = behind.split_at_checked(u16::from_le_bytes(*length).into())?;
        let address = u64::from_le_bytes(*address);
        let follows = symbols.last().is_none_or(|(before, _)| *before <= address);
        if !follows || name.len() > NAME_BYTES || symbols.len() >= MAX_SYMBOLS {
            return None;
        }
        symbols.push((address, std::str::from_utf8(name).ok()?.to_owned()));
        rest = behind;
    }
    Table::new(symbols, origin)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table_of(source: &Source) -> &Table {
        match source {
            Source::Table(table) => table,
            Source::Kallsyms(_) => panic!("a list was given"),
        }
    }

    fn round(result: Result<Option<Table>, SearchError>) -> String {
        let result = result.map(|table| table.map(Source::Table));
        let decoded = decode(&encode(&result)).expect("an answer");
        let text = |result: &Result<Option<Source>, SearchError>| match result
            .as_ref()
            .map(|source| source.as_ref().map(table_of))
        {
            Ok(table) => format!("{:?}", table.map(|table| (table.description(), table.symbols().to_vec()))),
            Err(error) => format!("{error} {:?}", std::error::Error::source(error).map(ToString::to_string)),
        };
        assert_eq!(text(&result), text(&decoded));
        text(&decoded)
    }

    #[test]
    fn answers_keep_symbols_and_errors_as_they_are() {
        for origin in [Origin::Elf, Origin::SystemMap] {
            let symbols = vec![(1, "a".to_owned()), (2, String::new()), (2, "\u{e9}\u{1b}".to_owned())];
            assert!(round(Ok(Table::new(symbols, origin))).contains("3 symbols"));
        }
        let long = Table::new(vec![(1, "\u{e9}".repeat(NAME_BYTES)), (2, "b".repeat(100_000))], Origin::Elf);
        let decoded =
            decode(&encode(&Ok(long.map(Source::Table)))).expect("an answer").expect("symbols").expect("symbols");
        assert!(table_of(&decoded).symbols().iter().all(|(_, name)| name.len() == NAME_BYTES));
        round(Ok(None));
        for error in [
            SearchError::Steps(STEPS),
            SearchError::Symbols(MAX_SYMBOLS),
            SearchError::Names(MAX_NAMES_BYTES),
            SearchError::ElfBytes(ELF_BYTES),
            SearchError::Read(io::Error::from_raw_os_error(libc::EIO)),
        ] {
            round(Err(error));
        }
    }

    #[test]
    fn answers_are_checked() {
        let symbol = |address: u64, name: &[u8]| {
            let length = u16::try_from(name.len()).expect("short").to_le_bytes();
            [address.to_le_bytes().as_slice(), &length, name].concat()
        };
        let answer = |symbols: &[Vec<u8>]| [vec![0], symbols.concat()].concat();
        assert!(decode(&answer(&[symbol(1, b"a"), symbol(2, b"b")])).is_some());
        assert!(decode(&answer(&[symbol(2, b"a"), symbol(1, b"b")])).is_none(), "not in order");
        assert!(decode(&answer(&[symbol(1, &[b'x'; NAME_BYTES + 1])])).is_none(), "a long name");
        assert!(decode(&answer(&[symbol(1, &[0xff])])).is_none(), "no text");
        let whole = answer(&[symbol(1, b"abc")]);
        for cut in 0..whole.len() {
            assert!(decode(&whole[..cut]).is_none(), "cut at {cut}");
        }
        assert!(decode(&[200]).is_none() && decode(&[Kind::Nothing as u8, 0]).is_none());
    }
}
