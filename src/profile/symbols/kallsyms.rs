//! The symbols that a kernel carries for itself (scripts/kallsyms.c of Linux): a stripped distribution kernel has no
//! others. They are found in the image by their shape, since nothing says where they are.
//!
//! The tables: names, compressed by a table of 256 tokens; an index of that table; a marker for each 256th name; and
//! addresses as offsets from a base. Linux 6.5 moved the addresses behind the tokens; 6.2 to 6.4 have one table more
//! between markers and tokens; 6.1 has lengths of two bytes. All of these are read.

use object::{Object, ObjectSection, ReadCache};
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

/// How many tokens there are.
const TOKENS: usize = 256;
/// Names between two markers.
const MARKED: usize = 256;
/// The tokens of the ten digits, which stand for themselves in every kernel.
const DIGITS: &[u8; 20] = b"0\x001\x002\x003\x004\x005\x006\x007\x008\x009\0";
/// Fewer and more symbols than any kernel has.
const COUNTS: Range<usize> = 500..4_000_000;
/// Bytes read at a time.
const CHUNK: usize = 1 << 20;
/// How far around the tokens the other tables are looked for.
const WINDOWS: [u64; 2] = [4 << 20, 64 << 20];
/// How far before the tokens the names may start.
const NAMES_WITHIN: usize = 64 << 20;
/// Names looked at before all of them are walked.
const SAMPLE: usize = 48;
/// Where kernels are linked to.
const KERNEL_BASE: u64 = 0xffff_8000_0000_0000;

/// The decoded tables of kallsyms.
pub(super) struct Kallsyms {
    tokens: Vec<Vec<u8>>,
    names: Vec<u8>,
    markers: Vec<usize>,
    addresses: Vec<u64>,
}

struct TokenTable {
    /// Where it starts and where its index ends, in the image.
    range: Range<usize>,
    tokens: Vec<Vec<u8>>,
}

struct Names {
    /// Where the count stands, in the image.
    count_at: usize,
    count: usize,
    range: Range<usize>,
    /// Where each 256th name starts, from the first.
    markers: Vec<usize>,
}

/// Where a kernel's read-only data lie in its file, if it says so.
fn read_only_data(file: &File) -> Option<u64> {
    let contents = ReadCache::new(file);
    let elf = object::File::parse(&contents).ok()?;
    elf.section_by_name(".rodata")?.file_range().map(|(offset, _)| offset)
}

/// Reads as much as there is, up to the buffer's end.
fn read_at(file: &File, at: u64, buffer: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while let Some(rest) = buffer.get_mut(filled..).filter(|rest| !rest.is_empty()) {
        match file.read_at(rest, at + filled as u64) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

fn align(offset: usize, to: usize) -> usize {
    offset.next_multiple_of(to)
}

fn u16_at(image: &[u8], at: usize) -> Option<usize> {
    Some(usize::from(u16::from_le_bytes(image.get(at..at.checked_add(2)?)?.try_into().ok()?)))
}

fn u32_at(image: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(image.get(at..at.checked_add(4)?)?.try_into().ok()?))
}

fn u64_at(image: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(image.get(at..at.checked_add(8)?)?.try_into().ok()?))
}

impl TokenTable {
    /// The table around the digits at `digits`, if there is one.
    fn at(image: &[u8], digits: usize) -> Option<Self> {
        // From the digits on to the last token.
        let mut end = digits;
        for _ in usize::from(b'0')..TOKENS {
            end += image.get(end..)?.iter().take(256).position(|byte| *byte == 0)? + 1;
        }
        [8, 4, 2].into_iter().find_map(|alignment| Self::with_index(image, digits, end, align(end, alignment)))
    }

    fn with_index(image: &[u8], digits: usize, end: usize, index_at: usize) -> Option<Self> {
        let index: Vec<usize> = (0..TOKENS).map(|token| u16_at(image, index_at + 2 * token)).collect::<Option<_>>()?;
        let start = digits.checked_sub(*index.get(usize::from(b'0'))?)?;
        let ends = index.iter().skip(1).copied().chain([end.checked_sub(start)?]);
        let token = |(from, to): (&usize, usize)| {
            let bytes = image.get(start + from..start + to)?;
            let (nul, token) = bytes.split_last()?;
            (*nul == 0 && !token.contains(&0)).then(|| token.to_vec())
        };
        let tokens = index.iter().zip(ends).map(token).collect::<Option<_>>()?;
        (index.first() == Some(&0)).then_some(Self { range: start..index_at + 2 * TOKENS, tokens })
    }

    fn find(image: &[u8]) -> Option<Self> {
        memchr::memmem::find_iter(image, DIGITS).find_map(|digits| Self::at(image, digits))
    }
}

/// The compressed name at `at`: where its tokens are. Since Linux 6.1 a length of 128 and more has two bytes.
fn name_at(image: &[u8], at: usize) -> Option<Range<usize>> {
    let first = usize::from(*image.get(at)?);
    let (start, length) = if first & 0x80 != 0 {
        (at + 2, first & 0x7f | usize::from(*image.get(at + 1)?) << 7)
    } else {
        (at + 1, first)
    };
    (length > 0 && start + length <= image.len()).then_some(start..start + length)
}

fn expand(tokens: &[Vec<u8>], name: &[u8]) -> Vec<u8> {
    name.iter().flat_map(|token| tokens.get(usize::from(*token)).map_or(&[][..], Vec::as_slice)).copied().collect()
}

/// A symbol's name has its type first, as `nm` prints it.
fn is_symbol(name: &[u8]) -> bool {
    let kinds = b"aAbBcCdDgGiInNpPrRsSTtuUvVwW?";
    name.len() > 1 && kinds.contains(&name[0]) && name[1..].iter().all(u8::is_ascii_graphic)
}

impl Names {
    /// The names that start at `count_at`, with their number, if there are such.
    fn at(image: &[u8], table: &TokenTable, count_at: usize) -> Option<Self> {
        let count = usize::try_from(u32_at(image, count_at)?).ok().filter(|count| COUNTS.contains(count))?;
        // Every table starts at a multiple of 8: behind the count are four bytes of nothing.
        let start = count_at + 8;
        if u32_at(image, count_at + 4)? != 0 {
            return None;
        }
        let mut at = start;
        for _ in 0..SAMPLE.min(count) {
            let name = name_at(image, at)?;
            at = name.end;
            if !is_symbol(&expand(&table.tokens, image.get(name)?)) {
                return None;
            }
        }
        let (mut at, mut markers) = (start, Vec::with_capacity(count / MARKED + 1));
        for number in 0..count {
            if number % MARKED == 0 {
                markers.push(at - start);
            }
            at = name_at(image, at)?.end;
        }
        // The kernel's own markers agree, or this is something else.
        let theirs = align(at, 8);
        let agree =
            |(number, marker): (usize, &usize)| u32_at(image, theirs + 4 * number) == u32::try_from(*marker).ok();
        let agrees = at <= table.range.start && markers.iter().enumerate().all(agree);
        agrees.then_some(Self { count_at, count, range: start..at, markers })
    }

    fn find(image: &[u8], table: &TokenTable) -> Option<Self> {
        let first = align(table.range.start.saturating_sub(NAMES_WITHIN), 8);
        // Backwards: they are near.
        (first..table.range.start).step_by(8).rev().find_map(|at| Self::at(image, table, at))
    }
}

/// The addresses: `count` offsets at `offsets_at` from the base at `base_at`.
fn addresses(image: &[u8], offsets_at: usize, base_at: usize, count: usize) -> Option<Vec<u64>> {
    let base = u64_at(image, base_at).filter(|base| *base >= KERNEL_BASE)?;
    let offsets: Vec<u32> = (0..count).map(|number| u32_at(image, offsets_at + 4 * number)).collect::<Option<_>>()?;
    // With CONFIG_KALLSYMS_ABSOLUTE_PERCPU (until Linux 6.14), what is not negative is an address by itself.
    let absolute_percpu = offsets.last().is_some_and(|last| last.cast_signed() < 0);
    let address = |offset: &u32| match (absolute_percpu, offset.cast_signed()) {
        (true, negative @ i32::MIN..0) => base.wrapping_sub(1).wrapping_sub(i64::from(negative).cast_unsigned()),
        (true, _) => u64::from(*offset),
        (false, _) => base.wrapping_add(u64::from(*offset)),
    };
    let addresses: Vec<u64> = offsets.iter().map(address).collect();
    addresses.is_sorted().then_some(addresses)
}

impl Kallsyms {
    /// Finds and decodes the tables in the file of an unpacked kernel: they are in its read-only data. Only what is looked at
    /// is read, since most of a kernel is something else.
    pub(super) fn read(file: &File) -> io::Result<Option<Self>> {
        if let Some(offset) = read_only_data(file)
            && let Some(found) = Self::from(file, offset)?
        {
            return Ok(Some(found));
        }
        Self::from(file, 0)
    }

    /// Looks for the tables from `at` on.
    fn from(file: &File, mut at: u64) -> io::Result<Option<Self>> {
        let mut chunk = vec![0; CHUNK];
        loop {
            let count = read_at(file, at, &mut chunk)?;
            let Some(part) = chunk.get(..count) else { return Ok(None) };
            for digits in memchr::memmem::find_iter(part, DIGITS) {
                if let Some(found) = Self::around(file, at + digits as u64)? {
                    return Ok(Some(found));
                }
            }
            if count < CHUNK {
                return Ok(None);
            }
            at += (CHUNK - DIGITS.len()) as u64;
        }
    }

    /// The tables around a place in the file, in a small window first.
    fn around(file: &File, place: u64) -> io::Result<Option<Self>> {
        for reach in WINDOWS {
            // A multiple of 8 in the file must be one in the window.
            let start = place.saturating_sub(reach) & !7;
            let mut window = vec![0; usize::try_from(place - start + reach).unwrap_or(usize::MAX)];
            let count = read_at(file, start, &mut window)?;
            window.truncate(count);
            if let Some(found) = Self::find(&window) {
                return Ok(Some(found));
            }
        }
        Ok(None)
    }

    /// Finds and decodes the tables in a part of an unpacked kernel; `None` where it has none.
    pub(super) fn find(image: &[u8]) -> Option<Self> {
        let table = TokenTable::find(image)?;
        let names = Names::find(image, &table)?;
        let bytes = align(4 * names.count, 8);
        // Up to Linux 6.4: offsets, base, count, names. Since then: names, markers, tokens, offsets, base.
        let before = names.count_at.checked_sub(8).and_then(|base| Some((base.checked_sub(bytes)?, base)));
        let behind = align(table.range.end, 8);
        let places = before.into_iter().chain([(behind, behind + bytes)]);
        let addresses = places.into_iter().find_map(|(at, base)| addresses(image, at, base, names.count))?;
        let names_bytes = image.get(names.range)?.to_vec();
        Some(Self { tokens: table.tokens, names: names_bytes, markers: names.markers, addresses })
    }

    /// How many symbols there are.
    pub(super) fn len(&self) -> usize {
        self.addresses.len()
    }

    /// The symbol of a number, with its type first.
    fn raw_name(&self, number: usize) -> Option<Vec<u8>> {
        let mut at = *self.markers.get(number / MARKED)?;
        for _ in 0..number % MARKED {
            at = name_at(&self.names, at)?.end;
        }
        Some(expand(&self.tokens, self.names.get(name_at(&self.names, at)?)?))
    }

    /// Name and address of the symbol that `address` lies in: as the kernel, the first of several at one place.
    pub(super) fn resolve(&self, address: u64) -> Option<(String, u64)> {
        let behind = self.addresses.partition_point(|start| *start <= address);
        let start = *self.addresses.get(behind.checked_sub(1)?)?;
        let number = self.addresses.partition_point(|other| *other < start);
        let name = self.raw_name(number)?;
        Some((String::from_utf8_lossy(name.get(1..)?).into_owned(), start))
    }

    /// The address of a symbol.
    pub(super) fn address(&self, wanted: &str) -> Option<u64> {
        let mut at = 0;
        for address in &self.addresses {
            let name = name_at(&self.names, at)?;
            at = name.end;
            if self.is(self.names.get(name)?, wanted.as_bytes()) {
                return Some(*address);
            }
        }
        None
    }

    /// Returns true if the compressed name is `wanted`; it is compared without being expanded.
    fn is(&self, name: &[u8], wanted: &[u8]) -> bool {
        let mut left = wanted;
        for (number, token) in name.iter().enumerate() {
            let Some(token) = self.tokens.get(usize::from(*token)) else { return false };
            let token = if number == 0 { token.get(1..).unwrap_or(&[]) } else { token };
            match left.strip_prefix(token) {
                Some(rest) => left = rest,
                None => return false,
            }
        }
        left.is_empty()
    }
}

#[cfg(test)]
mod tests;
