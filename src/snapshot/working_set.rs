//! The file `working-set`: the pages of guest memory that a run from the snapshot has used, which later runs have ready when they
//! start.
//!
//! | Offset | Bytes | |
//! |---|---|---|
//! | 0 | 8 | magic, `hwvmm\0WS` |
//! | 8 | 4 | version, little-endian |
//! | 12 | 4 | CRC-32 of the payload |
//! | 16 | | payload: a [`WorkingSet`] in postcard's encoding |

use super::format::checksum;
use serde::{Deserialize, Serialize};
use thiserror::Error;

const MAGIC: [u8; 8] = *b"hwvmm\0WS";
const VERSION: u32 = 1;
const HEADER: usize = 16;
/// The size of a page in bytes.
pub(super) const PAGE: u64 = 4096;

/// The most ranges of a working set. In a message between processes it takes less than 1 MiB.
pub(super) const MAX_RANGES: usize = 8192;
/// The longest file in bytes: a range takes 11 at most.
pub const MAX_WORKING_SET_BYTES: usize = HEADER + 16 + MAX_RANGES * 11;

/// How pages were used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum PageUse {
    /// They were read.
    Read,
    /// They were written: this run has copies of its own.
    Written,
}

/// Pages one behind the other that were used in the same way. Pages are counted as in the file `memory`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PageRange {
    /// The number of the first page.
    pub first: u32,
    /// How many pages.
    pub pages: u32,
    /// How they were used.
    pub usage: PageUse,
}

impl PageRange {
    /// The number of the page behind the last.
    #[must_use]
    pub fn end(&self) -> u64 {
        u64::from(self.first) + u64::from(self.pages)
    }
}

/// The pages that a run has used.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WorkingSet {
    /// The size of guest memory in bytes.
    pub memory_bytes: u64,
    /// In the order of their pages, without overlap.
    pub ranges: Vec<PageRange>,
}

/// A file is no working set that can be used.
#[derive(Debug, Error)]
pub enum WorkingSetError {
    /// The header is cut off, or has another magic.
    #[error("it is no working set of hwvmm")]
    Magic,
    /// The file is of another version of the format.
    #[error("it has version {found}, and this hwvmm reads version {VERSION}")]
    Version {
        /// The version that it has.
        found: u32,
    },
    /// The file is longer than one is.
    #[error("it has more than {MAX_WORKING_SET_BYTES} bytes")]
    TooLong,
    /// The checksum is wrong.
    #[error("its checksum is wrong")]
    Checksum,
    /// The payload is none.
    #[error("it cannot be read")]
    Payload(#[source] postcard::Error),
    /// It is of no machine, or of another one.
    #[error("{0}")]
    Contradiction(&'static str),
    /// It cannot be put into bytes.
    #[error("it cannot be written")]
    Encode(#[source] postcard::Error),
}

impl WorkingSet {
    /// Makes the working set of a machine of `memory_bytes` out of `ranges`, which are in order and do not overlap. Where there are too
    /// many, those with small gaps between them become one, with what lies between them, and count as read.
    #[must_use]
    pub fn new(memory_bytes: u64, mut ranges: Vec<PageRange>) -> Self {
        let mut gap = 1;
        while ranges.len() > MAX_RANGES {
            ranges = merged(&ranges, gap);
            gap *= 2;
        }
        Self { memory_bytes, ranges }
    }

    /// The number of pages that were used so.
    #[must_use]
    pub fn pages(&self, usage: PageUse) -> u64 {
        self.ranges.iter().filter(|range| range.usage == usage).map(|range| u64::from(range.pages)).sum()
    }

    /// Checks that it is one of a machine with `memory_bytes` of memory.
    ///
    /// # Errors
    /// [`WorkingSetError::Contradiction`].
    pub fn check(&self, memory_bytes: u64) -> Result<(), WorkingSetError> {
        let mut end = 0;
        let mut next = |range: &PageRange| {
            let fits = range.pages > 0 && u64::from(range.first) >= end;
            end = range.end();
            fits
        };
        let fault = if self.memory_bytes != memory_bytes {
            Some("it is of a machine with another size of memory")
        } else if self.ranges.len() > MAX_RANGES {
            Some("it has too many ranges")
        } else if !self.ranges.iter().all(&mut next) || end > memory_bytes / PAGE {
            Some("its ranges overlap, are not in order, or lie beyond the memory")
        } else {
            None
        };
        fault.map_or(Ok(()), |fault| Err(WorkingSetError::Contradiction(fault)))
    }

    /// Returns the bytes of the file.
    ///
    /// # Errors
    /// [`WorkingSetError::Encode`].
    pub fn encode(&self) -> Result<Vec<u8>, WorkingSetError> {
        let payload = postcard::to_extend(self, Vec::new()).map_err(WorkingSetError::Encode)?;
        let header = MAGIC.into_iter().chain(VERSION.to_le_bytes()).chain(checksum(&payload).to_le_bytes());
        Ok(header.chain(payload.iter().copied()).collect())
    }

    /// Reads the bytes of the file, which must be of a machine with `memory_bytes` of memory.
    ///
    /// # Errors
    /// [`WorkingSetError`].
    pub fn decode(bytes: &[u8], memory_bytes: u64) -> Result<Self, WorkingSetError> {
        if bytes.len() > MAX_WORKING_SET_BYTES {
            return Err(WorkingSetError::TooLong);
        }
        let (magic, rest) = bytes.split_first_chunk().ok_or(WorkingSetError::Magic)?;
        let (version, rest) = rest.split_first_chunk().ok_or(WorkingSetError::Magic)?;
        let (sum, payload) = rest.split_first_chunk().ok_or(WorkingSetError::Magic)?;
        if *magic != MAGIC {
            return Err(WorkingSetError::Magic);
        }
        let found = u32::from_le_bytes(*version);
        if found != VERSION {
            return Err(WorkingSetError::Version { found });
        }
        if checksum(payload) != u32::from_le_bytes(*sum) {
            return Err(WorkingSetError::Checksum);
        }
        let (set, rest): (Self, _) = postcard::take_from_bytes(payload).map_err(WorkingSetError::Payload)?;
        if !rest.is_empty() {
            return Err(WorkingSetError::Contradiction("there are bytes behind it"));
        }
        set.check(memory_bytes)?;
        Ok(set)
    }
}

/// Joins ranges that have at most `gap` pages between them. What is joined counts as read: writing would copy pages that the guest does
/// not write.
fn merged(ranges: &[PageRange], gap: u64) -> Vec<PageRange> {
    let mut joined: Vec<PageRange> = Vec::with_capacity(ranges.len());
    for range in ranges {
        match joined.last_mut() {
            Some(last) if u64::from(range.first) <= last.end().saturating_add(gap) => {
                last.pages = u32::try_from(range.end() - u64::from(last.first)).unwrap_or(last.pages);
                last.usage = PageUse::Read;
            }
            _ => joined.push(*range),
        }
    }
    joined
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MEMORY: u64 = 16 << 20;

    fn sample() -> WorkingSet {
        let range = |first, pages, usage| PageRange { first, pages, usage };
        let ranges = vec![range(0, 1, PageUse::Read), range(1, 2, PageUse::Written), range(4000, 96, PageUse::Read)];
        WorkingSet::new(MEMORY, ranges)
    }

    /// The sample that the fuzz target starts from is of this version.
    #[test]
    fn the_corpus_has_a_working_set_of_this_version() {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/corpus/working_set");
        let path = folder.join("sample");
        if std::env::var_os("HWVMM_WRITE_CORPUS").is_some() {
            std::fs::create_dir_all(&folder).expect("made");
            std::fs::write(&path, sample().encode().expect("encoded")).expect("written");
        }
        let bytes = std::fs::read(path).expect("readable");
        let read = WorkingSet::decode(&bytes, MEMORY).expect("of this version: HWVMM_WRITE_CORPUS=1 writes it anew");
        assert_eq!((&read, read.pages(PageUse::Read), read.pages(PageUse::Written)), (&sample(), 97, 2));
    }

    #[test]
    fn what_is_not_whole_or_of_another_machine_is_an_error() {
        let bytes = sample().encode().expect("encoded");
        assert_eq!(WorkingSet::decode(&bytes, MEMORY).expect("whole"), sample());
        for end in 0..bytes.len() {
            assert!(WorkingSet::decode(&bytes[..end], MEMORY).is_err(), "{end} bytes");
            let mut changed = bytes.clone();
            changed[end] ^= 1;
            assert!(WorkingSet::decode(&changed, MEMORY).is_err(), "byte {end} changed");
        }
        assert!(WorkingSet::decode(&bytes, MEMORY / 2).is_err());
        assert!(matches!(
            WorkingSet::decode(&vec![0; MAX_WORKING_SET_BYTES + 1], MEMORY),
            Err(WorkingSetError::TooLong)
        ));
    }

    #[test]
    fn ranges_that_overlap_or_lie_beyond_the_memory_are_refused() {
        let range = |first, pages| PageRange { first, pages, usage: PageUse::Read };
        for ranges in [
            vec![range(0, 0)],
            vec![range(4095, 2)],
            vec![range(u32::MAX, u32::MAX)],
            vec![range(0, 2), range(1, 1)],
            vec![range(5, 1), range(1, 1)],
            (0..=8192).map(|number| range(2 * number, 1)).collect(),
        ] {
            let set = WorkingSet { memory_bytes: 1 << 30, ranges };
            let memory = if set.ranges.len() > 1 { 1 << 30 } else { MEMORY };
            let set = WorkingSet { memory_bytes: memory, ..set };
            assert!(set.check(memory).is_err(), "{:?}", set.ranges.first());
            assert!(WorkingSet::decode(&set.encode().expect("encoded"), memory).is_err());
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(8))]
        #[test]
        fn too_many_ranges_become_fewer_with_all_of_their_pages(gaps in prop::collection::vec((0_u32..9, 1_u32..4, any::<bool>()), 9000..12000)) {
            let mut at = 0;
            let ranges: Vec<_> = gaps
                .iter()
                .map(|(gap, pages, written)| {
                    let first = at + gap;
                    at = first + pages;
                    PageRange { first, pages: *pages, usage: if *written { PageUse::Written } else { PageUse::Read } }
                })
                .collect();
            let set = WorkingSet::new(1 << 30, ranges.clone());
            prop_assert!(set.check(1 << 30).is_ok() && set.ranges.len() <= MAX_RANGES);
            for range in ranges {
                let behind = set.ranges.partition_point(|all| all.first <= range.first);
                prop_assert!(behind > 0 && set.ranges[behind - 1].end() >= range.end());
            }
            prop_assert!(set.encode().expect("encoded").len() <= MAX_WORKING_SET_BYTES);
        }
    }
}
