//! The cache of decoded blocks. A block is used only where the bytes at its guest physical address are still those that were decoded.

use super::{End, PortExit};
use super::decode::{MAX_BYTES, decode};
use super::mmu::Mmu;
use super::op::Op;
use crate::kvm::Direction;
use crate::memory::{GuestPage, PAGE_BYTES};

/// Blocks kept at most; a power of two.
const BLOCKS: usize = 1024;
/// The longest instruction in bytes (SDM vol. 2A §2.3.11).
const LONGEST: u64 = 15;

/// Instructions in a row, within one page.
pub(super) struct Block {
    rip: u64,
    gpa: u64,
    /// The 8-byte words that hold the block's bytes.
    words: Box<[u64]>,
    /// None where the first instruction is not interpreted.
    pub(super) ops: Box<[Op]>,
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
        mmu.running = page_gpa;
        let gpa = page_gpa | rip & (PAGE_BYTES - 1);
        let place = &mut self.blocks[hash(rip)];
        let found = place.as_ref().is_some_and(|block| block.rip == rip && block.gpa == gpa && block.is_unchanged(page));
        if !found {
            *place = Some(Block::new(rip, gpa, page));
        }
        place.as_ref().ok_or(End::Unsupported)
    }
}

#[allow(clippy::cast_possible_truncation, reason = "the remainder is small")]
fn hash(rip: u64) -> usize {
    (rip ^ rip >> 10) as usize % BLOCKS
}

impl Block {
    #[cold]
    fn new(rip: u64, gpa: u64, page: GuestPage<'_>) -> Self {
        let offset = rip & (PAGE_BYTES - 1);
        // The words are read once: what is decoded is what is compared later.
        let words = read(page, offset, MAX_BYTES as u64);
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        let bytes = bytes.get(usize::try_from(offset % 8).unwrap_or(0)..).unwrap_or_default();
        let (ops, length) = decode(bytes, rip);
        let length = if ops.is_empty() { LONGEST } else { length as u64 };
        let used = usize::try_from((offset % 8 + length).div_ceil(8)).unwrap_or(0).min(words.len());
        Self { rip, gpa, words: words[..used].into(), ops: ops.into() }
    }

    /// Returns the length of the first instruction if it is the port I/O of the exit.
    pub(super) fn port_io(&self, exit: &PortExit) -> Option<u64> {
        let input = exit.direction == Direction::In;
        self.ops.first().filter(|op| op.is_port_io(input, exit.width)).map(|op| op.next.into())
    }

    /// Returns true if the block's bytes are those that were decoded.
    #[inline]
    fn is_unchanged(&self, page: GuestPage<'_>) -> bool {
        let mut at = self.rip & (PAGE_BYTES - 8);
        self.words.iter().all(|word| {
            let same = page.load(at, 3) == Some(*word);
            at += 8;
            same
        })
    }
}

/// Reads the words of `bytes` bytes from an offset on, up to the end of the page.
fn read(page: GuestPage<'_>, offset: u64, bytes: u64) -> Vec<u64> {
    let end = (offset + bytes).min(PAGE_BYTES);
    (offset & !7..end).step_by(8).map_while(|at| page.load(at, 3)).collect()
}
