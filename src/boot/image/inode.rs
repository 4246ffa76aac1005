//! The inodes of ext2 to ext4: where the blocks of a file are. What ext4-view does not tell.

use super::disk::Range;
use super::file::FileError;

/// The size of the superblock.
pub(super) const SUPERBLOCK_BYTES: usize = 1024;
/// The inode of the root (`EXT4_ROOT_INO`).
const ROOT: u32 = 2;
/// `EXT4_EXTENTS_FL`: the file has extents; without it, a map of blocks.
const EXTENTS_FLAG: u32 = 0x8_0000;
/// INCOMPAT_64BIT: group descriptors have upper halves.
const IS_64BIT: u32 = 0x80;
/// The smallest inode, and the part of each that is read here, in bytes.
const INODE_BYTES: u16 = 128;
/// `i_block`: the root of the extents, or numbers of blocks.
const BLOCK_FIELD: std::ops::Range<usize> = 0x28..0x64;
/// The blocks in `i_block` of a map; behind them are three blocks of numbers, of one to three levels.
const DIRECT_BLOCKS: usize = 12;
/// The magic number of a node of extents.
const NODE_MAGIC: u16 = 0xf30a;
/// The size of a node's header, and of each of its entries.
const ENTRY_BYTES: usize = 12;
/// The most levels of nodes below the root.
const MAX_DEPTH: u16 = 5;
/// An extent with a greater length has that many blocks less, and was not written (`EXT_INIT_MAX_LEN`).
const MAX_WRITTEN: u16 = 0x8000;
/// The most extents of a file that are read: one a block of 1 KiB in the largest kernel.
const MAX_EXTENTS: usize = 1 << 19;
/// The most blocks of a folder.
const MAX_FOLDER_BLOCKS: u64 = 1 << 16;

/// Whether an extent was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ExtentState {
    /// It has data.
    Written,
    /// It was allocated only: it reads as zeroes.
    Unwritten,
}

/// Blocks of a file that lie behind each other on the disk, too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Extent {
    /// The first block, counted in the file.
    pub(super) first: u32,
    /// The number of blocks.
    pub(super) blocks: u32,
    /// The first block, counted in the file system.
    pub(super) on_disk: u64,
    pub(super) state: ExtentState,
}

/// A part of an inode.
pub(super) struct Inode([u8; INODE_BYTES as usize]);

impl Inode {
    /// The size of the file in bytes.
    pub(super) fn bytes(&self) -> u64 {
        u64::from(u32_at(&self.0, 0x4)) | u64::from(u32_at(&self.0, 0x6c)) << 32
    }

    fn has_extents(&self) -> bool {
        u32_at(&self.0, 0x20) & EXTENTS_FLAG != 0
    }

    fn block_field(&self) -> &[u8] {
        self.0.get(BLOCK_FIELD).unwrap_or_default()
    }
}

/// Where the inodes of a file system are.
#[derive(Clone, Copy, Debug)]
pub(super) struct Inodes {
    block_bytes: u64,
    /// The first byte of the table of group descriptors.
    descriptors: u64,
    descriptor_bytes: u16,
    has_upper_halves: bool,
    per_group: u32,
    count: u32,
    inode_bytes: u16,
}

fn damaged(what: &str) -> FileError {
    FileError::Read(format!("{what} is damaged"))
}

impl Inodes {
    /// Those of the file system with this superblock, whose block size was checked; `None` where its numbers cannot be.
    pub(super) fn of(superblock: &[u8; SUPERBLOCK_BYTES]) -> Option<Self> {
        let (u16_at, u32_at) = (|at| u16_at(superblock, at), |at| u32_at(superblock, at));
        let block_bytes = 1024_u64 << u32_at(0x18);
        let is_first_revision = u32_at(0x4c) == 0;
        let inode_bytes = if is_first_revision { INODE_BYTES } else { u16_at(0x58) };
        let has_upper_halves = u32_at(0x60) & IS_64BIT != 0;
        let descriptor_bytes = if has_upper_halves { u16_at(0xfe) } else { 32 };
        let (count, per_group) = (u32_at(0), u32_at(0x28));
        let fits = (u64::from(INODE_BYTES)..=block_bytes).contains(&u64::from(inode_bytes))
            && (!has_upper_halves || descriptor_bytes >= 64)
            && per_group > 0;
        let descriptors = (u64::from(u32_at(0x14)) + 1) * block_bytes;
        fits.then_some(Self {
            block_bytes,
            descriptors,
            descriptor_bytes,
            has_upper_halves,
            per_group,
            count,
            inode_bytes,
        })
    }

    /// The size of a block in bytes.
    pub(super) fn block_bytes(&self) -> u64 {
        self.block_bytes
    }

    /// The inode of the file at `path`, which is absolute and leads over no symbolic links.
    pub(super) fn find(&self, disk: &Range, path: &[u8]) -> Result<Inode, FileError> {
        let mut inode = self.read(disk, ROOT)?;
        for name in path.split(|byte| *byte == b'/').filter(|name| !name.is_empty()) {
            inode = self.read(disk, self.child(disk, &inode, name)?)?;
        }
        Ok(inode)
    }

    fn read(&self, disk: &Range, number: u32) -> Result<Inode, FileError> {
        let index = number.checked_sub(1).filter(|_| number <= self.count).ok_or_else(|| damaged("a folder"))?;
        let group = self.descriptors + u64::from(index / self.per_group) * u64::from(self.descriptor_bytes);
        let mut descriptor = [0; 64];
        let part = if self.has_upper_halves { &mut descriptor[..] } else { &mut descriptor[..32] };
        disk.read(part, group)?;
        let table = u64::from(u32_at(&descriptor, 0x8)) | u64::from(u32_at(&descriptor, 0x28)) << 32;
        let at = table
            .checked_mul(self.block_bytes)
            .and_then(|table| table.checked_add(u64::from(index % self.per_group) * u64::from(self.inode_bytes)))
            .ok_or_else(|| damaged("a group descriptor"))?;
        let mut inode = [0; INODE_BYTES as usize];
        disk.read(&mut inode, at)?;
        Ok(Inode(inode))
    }

    fn block(&self, disk: &Range, number: u64) -> Result<Vec<u8>, FileError> {
        let mut block = vec![0; usize::try_from(self.block_bytes).unwrap_or(0)];
        let at = number.checked_mul(self.block_bytes).ok_or_else(|| damaged("the number of a block"))?;
        disk.read(&mut block, at)?;
        Ok(block)
    }

    /// The number of the inode that `folder` has by this name.
    fn child(&self, disk: &Range, folder: &Inode, name: &[u8]) -> Result<u32, FileError> {
        let blocks = folder.bytes().div_ceil(self.block_bytes).min(MAX_FOLDER_BLOCKS);
        let mut places = Vec::new();
        if folder.has_extents() {
            for extent in self.extents(disk, folder)? {
                let left = blocks.saturating_sub(places.len() as u64);
                places
                    .extend((0..u64::from(extent.blocks).min(left)).map(|block| extent.on_disk.saturating_add(block)));
            }
        } else {
            self.mapped(disk, folder, blocks, &mut places)?;
        }
        for place in places {
            if let Some(inode) = named(&self.block(disk, place)?, name) {
                return Ok(inode);
            }
        }
        Err(FileError::NotFound)
    }

    /// The places of the first `blocks` blocks of a file with a map.
    fn mapped(&self, disk: &Range, inode: &Inode, blocks: u64, places: &mut Vec<u64>) -> Result<(), FileError> {
        let field = inode.block_field();
        let numbers = |bytes: &[u8]| -> Vec<u64> {
            bytes.as_chunks::<4>().0.iter().map(|bytes| u64::from(u32::from_le_bytes(*bytes))).collect()
        };
        places.extend(numbers(field).into_iter().take(DIRECT_BLOCKS));
        for (level, root) in numbers(field).into_iter().skip(DIRECT_BLOCKS).enumerate() {
            let mut tables = vec![root];
            for _ in 0..level {
                let mut below = Vec::new();
                for table in tables.into_iter().filter(|table| *table != 0) {
                    if places.len() as u64 + below.len() as u64 >= blocks {
                        break;
                    }
                    below.extend(numbers(&self.block(disk, table)?));
                }
                tables = below;
            }
            for table in tables.into_iter().filter(|table| *table != 0) {
                if places.len() as u64 >= blocks {
                    break;
                }
                places.extend(numbers(&self.block(disk, table)?));
            }
        }
        places.truncate(usize::try_from(blocks).unwrap_or(usize::MAX));
        // A folder has no holes.
        places.retain(|place| *place != 0);
        Ok(())
    }

    /// The extents of a file, in their order; none for one with a map, in which all blocks are written.
    pub(super) fn extents(&self, disk: &Range, inode: &Inode) -> Result<Vec<Extent>, FileError> {
        let mut found = Vec::new();
        if inode.has_extents() {
            let root = inode.block_field();
            let depth = Some(u16_at(root, 6)).filter(|depth| *depth <= MAX_DEPTH);
            self.node(disk, root, depth.ok_or_else(|| damaged("the tree of a file's extents"))?, &mut found)?;
        }
        Ok(found)
    }

    /// Adds the extents of a node, whose depth must be this.
    fn node(&self, disk: &Range, node: &[u8], depth: u16, found: &mut Vec<Extent>) -> Result<(), FileError> {
        let wrong = || damaged("the tree of a file's extents");
        let entries = ENTRY_BYTES * (usize::from(u16_at(node, 2)) + 1);
        if u16_at(node, 0) != NODE_MAGIC || u16_at(node, 6) != depth {
            return Err(wrong());
        }
        for entry in node.get(ENTRY_BYTES..entries).ok_or_else(wrong)?.chunks_exact(ENTRY_BYTES) {
            if let Some(below) = depth.checked_sub(1) {
                let place = u64::from(u32_at(entry, 4)) | u64::from(u16_at(entry, 8)) << 32;
                self.node(disk, &self.block(disk, place)?, below, found)?;
                continue;
            }
            let length = u16_at(entry, 4);
            let (blocks, state) = match length.checked_sub(MAX_WRITTEN) {
                None | Some(0) => (length, ExtentState::Written),
                Some(blocks) => (blocks, ExtentState::Unwritten),
            };
            let first = u32_at(entry, 0);
            let on_disk = u64::from(u32_at(entry, 8)) | u64::from(u16_at(entry, 6)) << 32;
            // They lie behind each other (Linux: `ext4_valid_extent_entries`).
            let end = found.last().map_or(0, |last| u64::from(last.first) + u64::from(last.blocks));
            if blocks == 0 || u64::from(first) < end || found.len() >= MAX_EXTENTS {
                return Err(wrong());
            }
            found.push(Extent { first, blocks: blocks.into(), on_disk, state });
        }
        Ok(())
    }
}

/// The number of the inode that a block of a folder has by this name. The blocks of a folder's index have one entry without an inode.
fn named(block: &[u8], name: &[u8]) -> Option<u32> {
    let mut rest = block;
    while rest.len() >= 8 {
        let (inode, length) = (u32_at(rest, 0), usize::from(u16_at(rest, 4)));
        let own = rest.get(8..8 + usize::from(*rest.get(6)?));
        if inode != 0 && own == Some(name) {
            return Some(inode);
        }
        // 64 KiB, which do not fit in the field.
        let length = if length == 0 || length == usize::from(u16::MAX) { rest.len() } else { length };
        rest = rest.get(length.max(8)..)?;
    }
    None
}

/// The number at `at` of a structure that has it.
pub(super) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..).and_then(|rest| rest.first_chunk()).map_or(0, |bytes| u32::from_le_bytes(*bytes))
}

/// As [`u32_at`].
fn u16_at(bytes: &[u8], at: usize) -> u16 {
    bytes.get(at..).and_then(|rest| rest.first_chunk()).map_or(0, |bytes| u16::from_le_bytes(*bytes))
}
