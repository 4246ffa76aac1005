//! The cache of decoded blocks. A block is used only where the bytes at its guest physical address are still those that were decoded.

use super::decode::{MAX_BYTES, MAX_OPS, decode};
use super::mmu::Mmu;
use super::op::Op;
use super::port_exit::PortExit;
use super::steps::Step;
use crate::kvm::Direction;
use crate::measure::clusters::ClusterEnd as End;
use crate::memory::{GuestPage, PAGE_BYTES};

/// Sets of the cache, of two blocks each: log2 of their number.
const SETS_LOG2: u32 = 9;
/// Blocks in the cache.
const PLACES: usize = 2 << SETS_LOG2;
/// The longest instruction in bytes (SDM vol. 2A §2.3.11).
const LONGEST: u64 = 15;

/// Instructions in a row, within one page; or one instruction across two pages.
pub(super) struct Block {
    rip: u64,
    /// The value of [`Blocks::epoch`] for which the block is known to be unchanged.
    checked: u64,
    gpa: u64,
    /// The 8-byte words that hold the block's bytes in its first page.
    words: Box<[u64]>,
    /// The instruction's bytes in the page behind it.
    rest: Option<Box<Rest>>,
    /// None where the first instruction is not interpreted.
    pub(super) steps: Box<[Step]>,
}

struct Rest {
    /// The page's gpa.
    gpa: u64,
    /// The words from the start of the page on.
    words: Box<[u64]>,
}

/// The cache: each address has one set, and in it the newest block comes first.
pub(super) struct Blocks {
    /// Empty before the first cluster.
    blocks: Box<[Block]>,
    /// Changes with each cluster, and within one where the MMU no longer watches all pages of the blocks that were checked. A block is
    /// compared with memory once in an epoch: a write by the guest's own instructions to its pages ends the cluster, and a write
    /// by others need not be seen before a serializing instruction (SDM vol. 3A §9.1.3), which ends it too.
    epoch: u64,
    /// Blocks that were decoded, and that were compared with memory.
    decoded: u64,
    compared: u64,
}

impl Blocks {
    pub(super) fn new() -> Self {
        Self { blocks: Box::default(), epoch: 1, decoded: 0, compared: 0 }
    }

    /// How many blocks were decoded so far.
    pub(super) fn decoded(&self) -> u64 {
        self.decoded
    }

    /// How many blocks were compared with memory so far, or decoded.
    pub(super) fn compared(&self) -> u64 {
        self.compared
    }

    /// Starts a cluster: every block is compared with memory once more. The first makes the cache, of 64 KiB without the blocks; many guests need none.
    pub(super) fn start(&mut self) {
        if self.blocks.is_empty() {
            self.blocks = std::iter::repeat_with(Block::none).take(PLACES).collect();
        }
        self.epoch += 1;
    }

    /// Returns the block at a linear address, whose pages the MMU watches from then on.
    #[inline]
    pub(super) fn at(&mut self, rip: u64, mmu: &mut Mmu<'_>) -> Result<&Block, End> {
        let first = first_place(rip);
        let is_known = |block: &Block| block.rip == rip && block.checked == self.epoch;
        let place = if is_known(&self.blocks[first]) {
            first
        } else if is_known(&self.blocks[first + 1]) {
            first + 1
        } else {
            self.check(rip, first, mmu)?
        };
        Ok(&self.blocks[place])
    }

    /// Finds the block by comparing it with memory, or decodes it. Returns its place, which is `first` or the next one.
    #[inline(never)]
    fn check(&mut self, rip: u64, first: usize, mmu: &mut Mmu<'_>) -> Result<usize, End> {
        let (page, page_gpa) = mmu.code(rip)?;
        let gpa = page_gpa | rip & (PAGE_BYTES - 1);
        self.compared += 1;
        let ways = &mut self.blocks[first..first + 2];
        let decoded = &mut self.decoded;
        let way = ways.iter().position(|block| block.is_unchanged(rip, gpa, page, mmu)).unwrap_or_else(|| {
            *decoded += 1;
            // The other one stays if this is its new version.
            if ways[0].rip != rip {
                ways.swap(0, 1);
            }
            ways[0] = Block::new(rip, gpa, page, mmu);
            0
        });
        if mmu.has_forgotten_code() {
            self.epoch += 1;
        }
        ways[way].checked = self.epoch;
        Ok(first + way)
    }
}

/// The first of the two places that an address has.
#[allow(clippy::cast_possible_truncation, reason = "less than the number of places")]
fn first_place(rip: u64) -> usize {
    // Multiplicative hashing: the upper bits of the product depend on all of the address.
    (rip.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (64 - SETS_LOG2)) as usize * 2
}

impl Rest {
    /// Returns true if the second page is the same, with the same bytes.
    fn is_unchanged(&self, rip: u64, mmu: &mut Mmu<'_>) -> bool {
        let Ok((page, gpa)) = mmu.code(behind(rip)) else { return false };
        gpa == self.gpa && page.holds(0, &self.words)
    }
}

/// The first address of the page behind that of `rip`.
fn behind(rip: u64) -> u64 {
    (rip & !(PAGE_BYTES - 1)).wrapping_add(PAGE_BYTES)
}

impl Block {
    /// The content of a free place: it was never checked.
    fn none() -> Self {
        Self { rip: 0, checked: 0, gpa: u64::MAX, words: Box::default(), rest: None, steps: Box::default() }
    }

    /// Returns true if this is the block at the address, and memory still has its bytes.
    #[inline]
    fn is_unchanged(&self, rip: u64, gpa: u64, page: GuestPage<'_>, mmu: &mut Mmu<'_>) -> bool {
        self.rip == rip
            && self.gpa == gpa
            && page.holds(rip & (PAGE_BYTES - 8), &self.words)
            && self.rest.as_ref().is_none_or(|rest| rest.is_unchanged(rip, mmu))
    }

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
        Self { rip, checked: 0, gpa, words: words[..used].into(), rest: None, steps: steps(ops) }
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
        let rest = Box::new(Rest { gpa: rest_gpa, words: rest.into() });
        Some(Self { rip, checked: 0, gpa, words: words.into(), rest: Some(rest), steps: steps(ops) })
    }

    /// Returns the length of the first instruction if it is the port I/O of the exit.
    pub(super) fn port_io(&self, exit: &PortExit) -> Option<u64> {
        let input = exit.direction == Direction::In;
        self.steps.first().filter(|step| step.op.is_port_io(input, exit.width)).map(|step| step.op.next.into())
    }
}

fn steps(ops: Vec<Op>) -> Box<[Step]> {
    ops.into_iter().map(Step::new).collect()
}

/// Reads the words of `bytes` bytes from an offset on, up to the end of the page.
fn read(page: GuestPage<'_>, offset: u64, bytes: u64) -> Vec<u64> {
    let end = (offset + bytes).min(PAGE_BYTES);
    (offset & !7..end).step_by(8).map_while(|at| page.load(at, 3)).collect()
}
