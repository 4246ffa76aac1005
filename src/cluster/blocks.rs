//! The cache of decoded blocks. A block is used only where the bytes at its guest physical address are still those that were decoded.

use super::decode::{MAX_BYTES, MAX_OPS, decode};
use super::mmu::Mmu;
use super::op::Op;
use super::port_exit::PortExit;
use crate::kvm::Direction;
use crate::measure::clusters::ClusterEnd as End;
use crate::memory::{GuestPage, PAGE_BYTES};

/// Blocks kept at most; a power of two.
const BLOCKS: usize = 1 << BLOCKS_LOG2;
const BLOCKS_LOG2: u32 = 12;
/// The longest instruction in bytes (SDM vol. 2A §2.3.11).
const LONGEST: u64 = 15;

/// Instructions in a row, within one page; or one instruction across two pages.
pub(super) struct Block {
    rip: u64,
    gpa: u64,
    /// The 8-byte words that hold the block's bytes in its first page.
    words: Box<[u64]>,
    /// The instruction's bytes in the page behind it.
    rest: Option<Rest>,
    /// None where the first instruction is not interpreted.
    pub(super) ops: Box<[Op]>,
}

struct Rest {
    /// The page's gpa.
    gpa: u64,
    /// The words from the start of the page on.
    words: Box<[u64]>,
}

/// The cache: each address has one place.
pub(super) struct Blocks {
    blocks: Box<[Option<Block>]>,
}

impl Blocks {
    pub(super) fn new() -> Self {
        Self { blocks: std::iter::repeat_with(|| None).take(BLOCKS).collect() }
    }

    /// Returns the block at a linear address, and tells the MMU that it is being run.
    #[inline]
    pub(super) fn at(&mut self, rip: u64, mmu: &mut Mmu<'_>) -> Result<&Block, End> {
        let (page, page_gpa) = mmu.code(rip)?;
        mmu.running = [page_gpa; 2];
        let gpa = page_gpa | rip & (PAGE_BYTES - 1);
        let place = &mut self.blocks[hash(rip)];
        let found = place.as_ref().is_some_and(|block| {
            let same = block.rip == rip && block.gpa == gpa && is_unchanged(&block.words, rip, page);
            same && block.rest.as_ref().is_none_or(|rest| rest.is_unchanged(rip, mmu))
        });
        if !found {
            *place = Some(Block::new(rip, gpa, page, mmu));
        }
        place.as_ref().ok_or(End::Unsupported)
    }
}

#[allow(clippy::cast_possible_truncation, reason = "the remainder is small")]
fn hash(rip: u64) -> usize {
    // Multiplicative hashing: the upper bits of the product depend on all of the address.
    (rip.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (64 - BLOCKS_LOG2)) as usize % BLOCKS
}

impl Rest {
    /// Returns true if the second page is the same, with the same bytes; tells the MMU that it is being run.
    fn is_unchanged(&self, rip: u64, mmu: &mut Mmu<'_>) -> bool {
        let Ok((page, gpa)) = mmu.code(behind(rip)) else { return false };
        mmu.running[1] = gpa;
        gpa == self.gpa && is_unchanged(&self.words, 0, page)
    }
}

/// The first address of the page behind that of `rip`.
fn behind(rip: u64) -> u64 {
    (rip & !(PAGE_BYTES - 1)).wrapping_add(PAGE_BYTES)
}

/// Returns true if the page has the words that start at the word of `address`.
#[inline]
fn is_unchanged(words: &[u64], address: u64, page: GuestPage<'_>) -> bool {
    let mut at = address & (PAGE_BYTES - 8);
    words.iter().all(|word| {
        let same = page.load(at, 3) == Some(*word);
        at += 8;
        same
    })
}

impl Block {
    #[cold]
    fn new(rip: u64, gpa: u64, page: GuestPage<'_>, mmu: &mut Mmu<'_>) -> Self {
        let offset = rip & (PAGE_BYTES - 1);
        // The words are read once: what is decoded is what is compared later.
        let words = read(page, offset, MAX_BYTES as u64);
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        let bytes = bytes.get(usize::try_from(offset % 8).unwrap_or(0)..).unwrap_or_default();
        let (ops, length) = decode(bytes, rip, MAX_OPS);
        if ops.is_empty()
            && PAGE_BYTES - offset < LONGEST
            && let Some(block) = Self::across(rip, gpa, bytes, &words, mmu)
        {
            return block;
        }
        let length = if ops.is_empty() { LONGEST } else { length as u64 };
        let used = usize::try_from((offset % 8 + length).div_ceil(8)).unwrap_or(0).min(words.len());
        Self { rip, gpa, words: words[..used].into(), rest: None, ops: ops.into() }
    }

    /// An instruction whose first bytes are the last of a page. `None` where the page behind it has no translation, or the instruction
    /// is not interpreted.
    fn across(rip: u64, gpa: u64, bytes: &[u8], words: &[u64], mmu: &mut Mmu<'_>) -> Option<Self> {
        let (page, rest_gpa) = mmu.code(behind(rip)).ok()?;
        let rest = read(page, 0, LONGEST);
        let bytes: Vec<u8> = bytes.iter().copied().chain(rest.iter().flat_map(|word| word.to_le_bytes())).collect();
        let (ops, _) = decode(&bytes, rip, 1);
        if ops.is_empty() {
            return None;
        }
        mmu.running[1] = rest_gpa;
        let rest = Rest { gpa: rest_gpa, words: rest.into() };
        Some(Self { rip, gpa, words: words.into(), rest: Some(rest), ops: ops.into() })
    }

    /// Returns the length of the first instruction if it is the port I/O of the exit.
    pub(super) fn port_io(&self, exit: &PortExit) -> Option<u64> {
        let input = exit.direction == Direction::In;
        self.ops.first().filter(|op| op.is_port_io(input, exit.width)).map(|op| op.next.into())
    }
}

/// Reads the words of `bytes` bytes from an offset on, up to the end of the page.
fn read(page: GuestPage<'_>, offset: u64, bytes: u64) -> Vec<u64> {
    let end = (offset + bytes).min(PAGE_BYTES);
    (offset & !7..end).step_by(8).map_while(|at| page.load(at, 3)).collect()
}
