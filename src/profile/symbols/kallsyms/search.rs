//! The search for the tables of kallsyms in a kernel's file.

use super::super::image_map::ImageMap;
use super::super::limits::{Allowance, SearchError};
use super::addresses::Reader;
use super::names::{DIGITS, Markers, Names, TokenTable};
use hwvmm_arch::boot::ReadAt;
use std::io;
use std::ops::Range;

/// Bytes read at a time.
pub(super) const CHUNK: u64 = 1 << 20;
/// How far around the tokens of the digits the table of tokens reaches: 256 tokens of at most 256 bytes, and their index.
const TABLE_REACH: u64 = 72 << 10;
/// How far before the tokens markers are looked for: first those right before them, then those with another table between,
/// which has 3 bytes for each symbol.
const MARKERS_WITHIN: [u64; 2] = [256 << 10, 4 << 20];

/// The tables, decoded.
pub(super) struct Tables {
    pub(super) tokens: Vec<Vec<u8>>,
    /// The compressed names.
    pub(super) names: Vec<u8>,
    /// Where each [`MARKED`]th name starts, from the first.
    ///
    /// [`MARKED`]: super::read::MARKED
    pub(super) starts: Vec<usize>,
    /// The addresses of all symbols, sorted.
    pub(super) addresses: Vec<u64>,
}

/// A part of a file.
struct Window {
    start: u64,
    bytes: Vec<u8>,
}

impl Window {
    /// Reads `range`, or to the end of the file. The steps that this takes are taken before.
    fn read(file: &(impl ReadAt + ?Sized), range: Range<u64>, work: &Allowance) -> io::Result<Option<Self>> {
        let mut window = Self { start: range.start, bytes: Vec::new() };
        Ok(window.move_to(file, range, work)?.map(|()| window))
    }

    /// Reads `range` into the memory that the window has already.
    fn move_to(
        &mut self,
        file: &(impl ReadAt + ?Sized),
        range: Range<u64>,
        work: &Allowance,
    ) -> io::Result<Option<()>> {
        let count = range.end.min(file.len_bytes()?).saturating_sub(range.start);
        let count = usize::try_from(count).unwrap_or(usize::MAX);
        if work.take_bytes(count).is_none() {
            return Ok(None);
        }
        if self.bytes.is_empty() {
            // Zeroed by the kernel where it is large.
            self.bytes = vec![0; count];
        } else {
            self.bytes.resize(count, 0);
        }
        self.start = range.start;
        file.read_exact_at(&mut self.bytes, range.start)?;
        Ok(Some(()))
    }

    /// Where `place` of the file is in the window.
    fn index(&self, place: u64) -> usize {
        usize::try_from(place.saturating_sub(self.start)).unwrap_or(usize::MAX)
    }
}

/// A multiple of 8 in the file is one in a window that starts at a multiple of 8.
fn floor(place: u64) -> u64 {
    place & !7
}

/// Looks for the tables, first in the read-only data, where they should be, then before them; in at most `steps` steps.
pub(super) fn search(file: &(impl ReadAt + ?Sized), map: &ImageMap, steps: u64) -> Result<Option<Tables>, SearchError> {
    let work = Allowance::new(steps);
    let search = Search { file, map, work: &work };
    let first = map.read_only_data;
    for part in [first..file.len_bytes()?, 0..first] {
        if let Some(found) = search.within(part)? {
            return Ok(Some(found));
        }
    }
    if work.is_exhausted() { Err(SearchError::Steps(steps)) } else { Ok(None) }
}

struct Search<'a, F: ReadAt + ?Sized> {
    file: &'a F,
    map: &'a ImageMap,
    work: &'a Allowance,
}

impl<F: ReadAt + ?Sized> Search<'_, F> {
    fn window(&self, range: Range<u64>) -> io::Result<Option<Window>> {
        Window::read(self.file, range, self.work)
    }

    /// Looks for tables whose tokens of the digits start in `part` of the file.
    fn within(&self, part: Range<u64>) -> io::Result<Option<Tables>> {
        let mut at = part.start;
        let mut chunk = Window { start: at, bytes: Vec::new() };
        while at < part.end {
            let range = at..at.saturating_add(CHUNK);
            if chunk.move_to(self.file, range, self.work)?.is_none() {
                return Ok(None);
            }
            for digits in memchr::memmem::find_iter(&chunk.bytes, DIGITS) {
                let place = at + digits as u64;
                if place < part.end
                    && let Some(found) = self.around(place)?
                {
                    return Ok(Some(found));
                }
                if self.work.is_exhausted() {
                    return Ok(None);
                }
            }
            at += CHUNK - DIGITS.len() as u64;
        }
        Ok(None)
    }

    /// The tables around the tokens of the digits at `place`.
    fn around(&self, place: u64) -> io::Result<Option<Tables>> {
        let start = floor(place.saturating_sub(TABLE_REACH));
        let Some(near) = self.window(start..place.saturating_add(TABLE_REACH))? else { return Ok(None) };
        let Some(table) = TokenTable::at(&near.bytes, near.index(place)) else { return Ok(None) };
        let tokens = near.start + table.range.start as u64..near.start + table.range.end as u64;
        for reach in MARKERS_WITHIN {
            let start = floor(tokens.start.saturating_sub(reach));
            let Some(window) = self.window(start..tokens.start)? else { return Ok(None) };
            let end = window.bytes.len();
            let found = if reach == MARKERS_WITHIN[0] {
                self.first(&window, Markers::before(&window.bytes, end, self.work), &table, &tokens)?
            } else {
                self.first(&window, Markers::before_sequences(&window.bytes, end, self.work), &table, &tokens)?
            };
            if found.is_some() {
                return Ok(found);
            }
        }
        Ok(None)
    }

    /// The first of the markers in `window` with which names and addresses are found.
    fn first(
        &self,
        window: &Window,
        markers: impl Iterator<Item = Markers>,
        table: &TokenTable,
        tokens: &Range<u64>,
    ) -> io::Result<Option<Tables>> {
        for markers in markers {
            if let Some(found) = self.decode(window, &markers, table, tokens)? {
                return Ok(Some(found));
            }
        }
        Ok(None)
    }

    /// Names and addresses for `markers`, which are in `window`.
    fn decode(
        &self,
        window: &Window,
        markers: &Markers,
        table: &TokenTable,
        tokens: &Range<u64>,
    ) -> io::Result<Option<Tables>> {
        // Most names are before the window.
        let end = window.start + markers.at as u64;
        let start = floor(end.saturating_sub(markers.names_bytes() as u64));
        let Some(mut near) = self.window(start..end)? else { return Ok(None) };
        let Some(names) = Names::before(&near.bytes, table, markers, self.work) else { return Ok(None) };
        let count_at = near.start + names.count_at as u64;
        let reader =
            |window: Window| Reader { start: window.start, image: window.bytes, map: self.map, count: names.count };
        let bytes = 8 * names.count as u64 + 32;
        let Some(before) = self.window(floor(count_at.saturating_sub(bytes))..count_at)? else { return Ok(None) };
        let mut addresses = reader(before).before();
        if addresses.is_none() {
            let range = floor(tokens.end)..tokens.end.saturating_add(bytes);
            let Some(behind) = self.window(range)? else { return Ok(None) };
            let end = behind.index(tokens.end);
            addresses = reader(behind).behind(end);
        }
        let Some(addresses) = addresses else { return Ok(None) };
        // The window becomes the names: a copy costs a page fault for each 4 KiB.
        near.bytes.truncate(names.range.end);
        near.bytes.drain(..names.range.start.min(names.range.end));
        let (tokens, starts) = (table.tokens.clone(), markers.offsets().to_vec());
        Ok(Some(Tables { tokens, names: near.bytes, starts, addresses }))
    }
}
