//! The symbols that a kernel carries for itself (scripts/kallsyms.c of Linux): a stripped distribution kernel has no
//! others. They are found in the image by their shape, since nothing says where they are.
//!
//! The tables: names, compressed by a table of 256 tokens; an index of that table; a marker for each 256th name; and
//! addresses. The layouts that are read:
//!
//! | Linux | Tables in their order | Addresses | Multiples of |
//! |---|---|---|---|
//! | to 4.19 | addresses, count, names, markers, tokens, index | offsets from a base, or addresses; markers have the size of a pointer | a pointer |
//! | to 6.4 | the same; 6.2 to 6.4 have one more between markers and tokens | the same; markers have 4 bytes | a pointer |
//! | to 6.19 | count, names, markers, tokens, index, addresses | the same, the base behind the offsets | a pointer |
//! | since 7.0 | the same | offsets, each from its own place; no base | 4 |
//!
//! Since 6.1 a long name has a length of two bytes.

mod addresses;
mod names;
mod packed;
mod read;
mod search;

use super::elf::image_map;
use super::limits::{STEPS, SearchError};
use crate::escape::{SYMBOL_BYTES, escape};
use read::{MARKED, expand, name_at};
use search::{Tables, search};
use std::fs::File;

/// What is kept of a name, in bytes (Linux: KSYM_NAME_LEN, 512).
const NAME_BYTES: usize = 1024;
/// The decoded tables of kallsyms. Names are expanded when they are asked for.
pub(super) struct Kallsyms {
    tables: Tables,
}

impl Kallsyms {
    /// Finds and decodes the tables in the file of an unpacked kernel. Only what is looked at is read, since most of a
    /// kernel is something else.
    pub(super) fn read(file: &File) -> Result<Option<Self>, SearchError> {
        Ok(search(file, &image_map(file).unwrap_or_default(), STEPS)?.map(|tables| Self { tables }))
    }

    /// How many symbols there are.
    pub(super) fn len(&self) -> usize {
        self.tables.addresses.len()
    }

    /// The first and the last address.
    pub(super) fn bounds(&self) -> Option<(u64, u64)> {
        Some((*self.tables.addresses.first()?, *self.tables.addresses.last()?))
    }

    /// The symbol of a number, without its type.
    fn name(&self, number: usize) -> Option<String> {
        let names = &self.tables.names;
        let mut at = *self.tables.starts.get(number / MARKED)?;
        for _ in 0..number % MARKED {
            at = name_at(names, at)?.end;
        }
        let mut name = expand(&self.tables.tokens, names.get(name_at(names, at)?)?);
        name.truncate(NAME_BYTES);
        Some(String::from_utf8_lossy(name.get(1..)?).into_owned())
    }

    /// Returns the name, escaped, and the address of the function at `address`: as the kernel, the first of several at one place.
    pub(super) fn resolve(&self, address: u64) -> Option<(String, u64)> {
        let addresses = &self.tables.addresses;
        let behind = addresses.partition_point(|start| *start <= address);
        let start = *addresses.get(behind.checked_sub(1)?)?;
        let name = self.name(addresses.partition_point(|other| *other < start))?;
        Some((escape(&name, SYMBOL_BYTES), start))
    }

    /// The address of a symbol.
    pub(super) fn address(&self, wanted: &str) -> Option<u64> {
        // Most names differ in their first token already, which has their type first.
        let mut is_first = [false; 256];
        for (first, token) in is_first.iter_mut().zip(&self.tables.tokens) {
            *first = token.get(1..).is_some_and(|token| wanted.as_bytes().starts_with(token));
        }
        let mut at = 0;
        for address in &self.tables.addresses {
            let name = name_at(&self.tables.names, at)?;
            at = name.end;
            let name = self.tables.names.get(name)?;
            if is_first[usize::from(*name.first()?)] && self.is(name, wanted.as_bytes()) {
                return Some(*address);
            }
        }
        None
    }

    /// Returns true if the compressed name is `wanted`; it is compared without being expanded.
    fn is(&self, name: &[u8], wanted: &[u8]) -> bool {
        let mut left = wanted;
        for (number, token) in name.iter().enumerate() {
            let Some(token) = self.tables.tokens.get(usize::from(*token)) else { return false };
            let token = if number == 0 { token.get(1..).unwrap_or(&[]) } else { token };
            match left.strip_prefix(token) {
                Some(rest) => left = rest,
                None => return false,
            }
        }
        left.is_empty()
    }

    /// All symbols as a list.
    #[cfg(test)]
    pub(super) fn symbols(&self) -> Vec<(u64, String)> {
        let name = |number| self.name(number).expect("a name for each address");
        self.tables.addresses.iter().enumerate().map(|(number, address)| (*address, name(number))).collect()
    }
}

#[cfg(test)]
mod tests;
