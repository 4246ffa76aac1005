//! The names of kallsyms: tokens, markers, and the names themselves.

use super::super::limits::{Allowance, MAX_SYMBOLS};
use super::read::{MARKED, NAME_BYTES, align, expand, name_at, number_at, u16_at, u32_at, u64_at};
use std::ops::{Range, RangeInclusive};

/// How many tokens there are.
const TOKENS: usize = 256;
/// The tokens of the ten digits, which stand for themselves in every kernel.
pub(super) const DIGITS: &[u8; 20] = b"0\x001\x002\x003\x004\x005\x006\x007\x008\x009\0";
/// Fewer and more symbols than any kernel has.
const COUNTS: Range<usize> = 500..MAX_SYMBOLS;
/// The most symbols of Linux 6.2 to 6.4: those of distributions have a fifth of it.
const MAX_SEQUENCES: usize = 1 << 20;
/// The bytes that 256 names take: each has its length and one token at least.
const MARKED_BYTES: RangeInclusive<usize> = 2 * MARKED..=MARKED * (NAME_BYTES + 2);
/// Names that are expanded and looked at.
const SAMPLE: usize = 48;

/// The tokens that names are compressed by.
pub(super) struct TokenTable {
    /// Where it starts and where its index ends, in the image.
    pub(super) range: Range<usize>,
    pub(super) tokens: Vec<Vec<u8>>,
}

impl TokenTable {
    /// The table around the digits at `digits`, if there is one.
    pub(super) fn at(image: &[u8], digits: usize) -> Option<Self> {
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
}

/// The kernel's own markers: where each 256th name starts, from the first.
pub(super) struct Markers {
    /// Where they start, in the image.
    pub(super) at: usize,
    offsets: Vec<usize>,
}

impl Markers {
    /// The markers that end at or some bytes before `end`, where the next table starts.
    pub(super) fn before(image: &[u8], end: usize, work: &Allowance) -> impl Iterator<Item = Self> {
        let forms = [(4, 0), (4, 4), (8, 0)];
        forms.into_iter().filter_map(move |(width, padding)| {
            let end = end.checked_sub(padding)?;
            (padding == 0 || u32_at(image, end)? == 0).then_some(())?;
            Self::backwards(image, end, width, work)
        })
    }

    /// Walks from the last marker, which ends at `end`, to the first, which is 0.
    fn backwards(image: &[u8], end: usize, width: usize, work: &Allowance) -> Option<Self> {
        let (mut at, mut offsets) = (end, Vec::new());
        loop {
            work.take(1)?;
            at = at.checked_sub(width)?;
            let offset = usize::try_from(number_at(image, at, width)?).ok()?;
            let fits = offsets
                .last()
                .is_none_or(|next: &usize| next.checked_sub(offset).is_some_and(|bytes| MARKED_BYTES.contains(&bytes)));
            if !fits || offsets.len() > COUNTS.end / MARKED {
                return None;
            }
            offsets.push(offset);
            if offset == 0 {
                break;
            }
        }
        offsets.reverse();
        (offsets.len() > 1).then_some(Self { at, offsets })
    }

    /// The markers before a table of Linux 6.2 to 6.4 that has 3 bytes for each symbol, and ends before `end`.
    pub(super) fn before_sequences<'a>(
        image: &'a [u8],
        end: usize,
        work: &'a Allowance,
    ) -> impl Iterator<Item = Self> + 'a {
        let first = end.saturating_sub(3 * MAX_SEQUENCES).next_multiple_of(4);
        let places = (first..end).step_by(4).rev().take_while(|_| work.take(1).is_some());
        places.filter_map(move |place| {
            // The first marker is as far back as the table's size says, less paddings. It is 0, and the second fits it.
            let [most, least] =
                [end - place, (end - place).saturating_sub(7)].map(|bytes| (bytes / 3).div_ceil(MARKED));
            let with = |markers: usize, padding: usize| {
                let start = place.checked_sub(4 * markers + padding)?;
                let both = u64_at(image, start)?;
                // Little-endian: the first marker is the low half.
                if both & u64::from(u32::MAX) != 0 || !MARKED_BYTES.contains(&usize::try_from(both >> 32).ok()?) {
                    return None;
                }
                let found = Self::backwards(image, start + 4 * markers, 4, work)?;
                (found.offsets.len() == markers).then_some(found)
            };
            let padded = |markers| with(markers, 0).or_else(|| with(markers, 4));
            padded(most).or_else(|| (least != most).then(|| padded(least))?)
        })
    }

    /// Where each [`MARKED`]th name starts, from the first name.
    pub(super) fn offsets(&self) -> &[usize] {
        &self.offsets
    }

    /// The most bytes that the names and their count take.
    pub(super) fn names_bytes(&self) -> usize {
        self.offsets.last().copied().unwrap_or(0).saturating_add(MARKED_BYTES.end() + 16)
    }
}

/// The compressed names.
pub(super) struct Names {
    /// Where the count stands, in the image.
    pub(super) count_at: usize,
    pub(super) count: usize,
    pub(super) range: Range<usize>,
}

impl Names {
    /// The names at the end of `image`, where the markers start.
    pub(super) fn before(image: &[u8], table: &TokenTable, markers: &Markers, work: &Allowance) -> Option<Self> {
        let last = *markers.offsets.last()?;
        let counts = (markers.offsets.len() - 1) * MARKED + 1..=markers.offsets.len() * MARKED;
        let latest = image.len().checked_sub(last + 2)?;
        // Every table starts at a multiple of 4 at least.
        let mut starts = (0..latest + 1).step_by(4).rev().take_while(|_| work.take(1).is_some());
        starts.find_map(|start| {
            // The count is a number of 4 or 8 bytes, or one of 4 with 4 bytes of padding.
            let count_at = |back| {
                let at = start.checked_sub(back)?;
                let count = usize::try_from(number_at(image, at, back)?).ok()?;
                (counts.contains(&count) && COUNTS.contains(&count)).then_some((at, count))
            };
            [4, 8].into_iter().filter_map(count_at).find_map(|(count_at, count)| {
                Some(Self { count_at, ..Self::at(image, table, markers, start, count, work)? })
            })
        })
    }

    /// The `count` names from `start` on, if they fit the markers.
    fn at(
        image: &[u8],
        table: &TokenTable,
        markers: &Markers,
        start: usize,
        count: usize,
        work: &Allowance,
    ) -> Option<Self> {
        // Those behind the last marker first: they are few.
        let last = *markers.offsets.last()?;
        let end = walk(image, start + last, count - (markers.offsets.len() - 1) * MARKED, work)?;
        let padding = image.get(end..)?;
        if padding.len() >= 8 || padding.iter().any(|byte| *byte != 0) {
            return None;
        }
        let mut at = start;
        for _ in 0..SAMPLE.min(count) {
            let name = name_at(image, at)?;
            at = name.end;
            let name = expand(&table.tokens, image.get(name)?);
            work.take(name.len() as u64)?;
            if !is_symbol(&name) {
                return None;
            }
        }
        for pair in markers.offsets.windows(2) {
            if walk(image, start + pair[0], MARKED, work)? != start + pair[1] {
                return None;
            }
        }
        Some(Self { count_at: start, count, range: start..end })
    }
}

/// Walks over `names` names from `at` on, and returns where they end.
fn walk(image: &[u8], mut at: usize, names: usize, work: &Allowance) -> Option<usize> {
    work.take(names as u64)?;
    for _ in 0..names {
        at = name_at(image, at)?.end;
    }
    Some(at)
}

/// A symbol's name has its type first, as `nm` prints it.
fn is_symbol(name: &[u8]) -> bool {
    let kinds = b"aAbBcCdDgGiInNpPrRsSTtuUvVwW?";
    (2..=NAME_BYTES).contains(&name.len()) && kinds.contains(&name[0]) && name[1..].iter().all(u8::is_ascii_graphic)
}
