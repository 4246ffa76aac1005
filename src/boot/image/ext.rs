//! ext2, ext3 and ext4: ext4-view reads them, but for two things.
//!
//! - Extents that were allocated and never written (fallocate(2)): ext4-view takes their mark for a part of their length, and reads what
//!   the disk has there, and behind it. A file with such extents is read here.
//! - A journal that was not replayed: ext4-view replays it in memory. Neither GRUB does that nor a guest that mounts the root of a
//!   disk which it cannot write (`noload`): here it is left out as well, so that all see the same files.
//!
//! The format: Documentation/filesystems/ext4 of Linux, "superblock", "group_descr", "inodes", "ifork" and "directory".

use super::disk::Range;
use super::file::{FileError, PATH_BYTES, copy_pieces};
use super::inode::{Extent, ExtentState, Inodes, SUPERBLOCK_BYTES, u32_at};
use ext4_view::{Ext4, Ext4Read};
use std::error::Error;
use std::io::{self, Read as _, Write};

/// The superblock is here, in bytes from the start of the file system.
const SUPERBLOCK: u64 = 1024;
/// Where its fields are in it: `s_feature_incompat`, `s_feature_ro_compat`, `s_checksum`.
const INCOMPATIBLE: usize = 0x60;
const READ_ONLY_COMPATIBLE: usize = 0x64;
const CHECKSUM: usize = 0x3fc;
/// INCOMPAT_RECOVER: the journal is to be replayed.
const RECOVER: u32 = 0x4;
/// The most groups of blocks: 128 TiB, as mke2fs makes them. ext4-view keeps something of each in memory.
const MAX_GROUPS: u64 = 1 << 20;
/// RO_COMPAT_METADATA_CSUM: the superblock has a checksum.
const METADATA_CHECKSUMS: u32 = 0x400;
/// CRC-32C, reversed.
const POLYNOMIAL: u32 = 0x82f6_3b78;

/// A file system.
pub(super) struct Ext {
    view: Ext4,
    disk: Range,
    inodes: Inodes,
    needs_recovery: bool,
}

impl Ext {
    /// The file system on `disk`, which has the magic number of one. The error is what is wrong, for lists of what is on a disk.
    pub(super) fn load(disk: &Range) -> Result<Self, String> {
        let superblock = disk.array(SUPERBLOCK).filter(|superblock| is_plausible(superblock, disk.bytes()));
        let inodes = superblock.as_ref().and_then(Inodes::of);
        let (Some(superblock), Some(inodes)) = (superblock, inodes) else {
            return Err("a damaged ext2, ext3 or ext4".into());
        };
        if groups(&superblock) > MAX_GROUPS {
            return Err(format!("ext4 of more than {MAX_GROUPS} groups of blocks"));
        }
        let needs_recovery = u32_at(&superblock, INCOMPATIBLE) & RECOVER != 0;
        let superblock = if needs_recovery { without_recovery(superblock) } else { superblock };
        let view = Ext4::load(Box::new(ExtDisk { disk: disk.clone(), superblock }))
            .map_err(|error| format!("ext4 that cannot be read ({})", FileError::from(error)))?;
        Ok(Self { view, disk: disk.clone(), inodes, needs_recovery })
    }

    /// Returns true if its journal is to be replayed: it was not unmounted.
    pub(super) fn needs_recovery(&self) -> bool {
        self.needs_recovery
    }

    pub(super) fn uuid(&self) -> String {
        self.view.uuid().to_string()
    }

    pub(super) fn label(&self) -> String {
        self.view.label().to_str().unwrap_or_default().to_owned()
    }

    pub(super) fn exists(&self, path: &str) -> bool {
        absolute(path).is_ok_and(|path| self.view.exists(&path).unwrap_or(false))
    }

    pub(super) fn names(&self, path: &str, limit: usize) -> Result<Vec<String>, FileError> {
        let entries = self.view.read_dir(&absolute(path)?)?.take(limit);
        entries.map(|entry| Ok(String::from_utf8_lossy(entry?.file_name().as_ref()).into_owned())).collect()
    }

    /// Copies the file at `path` to the end of `out`. Returns its size in bytes.
    pub(super) fn copy(&self, path: &str, limit: u64, out: &mut dyn Write) -> Result<u64, FileError> {
        let path = absolute(path)?;
        // It checks what this file does not: modes, checksums, features.
        let mut file = self.view.open(&path)?;
        let bytes = file.metadata().len();
        if bytes > limit {
            return Err(FileError::TooLarge { bytes, limit });
        }
        let real = self.view.canonicalize(&path)?;
        let inode = self.inodes.find(&self.disk, real.as_ref())?;
        let extents = self.inodes.extents(&self.disk, &inode)?;
        if !extents.iter().any(|extent| extent.state == ExtentState::Unwritten) {
            return copy_pieces(limit, out, |piece| Ok(file.read_bytes(piece)?));
        }
        if inode.bytes() != bytes {
            return Err(FileError::Read("the file has two sizes".into()));
        }
        self.copy_extents(&extents, bytes, out)
    }

    /// Copies the file at `path` without ext4-view, whatever its extents are.
    #[cfg(test)]
    pub(super) fn copy_own(&self, path: &str, out: &mut dyn Write) -> Result<u64, FileError> {
        let real = self.view.canonicalize(&absolute(path)?)?;
        let inode = self.inodes.find(&self.disk, real.as_ref())?;
        self.copy_extents(&self.inodes.extents(&self.disk, &inode)?, inode.bytes(), out)
    }

    /// Copies `bytes` of a file that has these extents; what is in none of them, or in one that was not written, is zeroes.
    fn copy_extents(&self, extents: &[Extent], bytes: u64, out: &mut dyn Write) -> Result<u64, FileError> {
        let block = self.inodes.block_bytes();
        let damaged = || FileError::Read("an extent of the file lies outside of the file system".into());
        let mut done = 0;
        let zeroes = |from: u64, to: u64, out: &mut dyn Write| {
            io::copy(&mut io::repeat(0).take(to.saturating_sub(from)), out).map_err(FileError::Write)
        };
        for extent in extents.iter().filter(|extent| extent.state == ExtentState::Written) {
            let start = u64::from(extent.first) * block;
            if start >= bytes {
                break;
            }
            done += zeroes(done, start, out)?;
            let length = (u64::from(extent.blocks) * block).min(bytes - start);
            let from = extent.on_disk.checked_mul(block).ok_or_else(damaged)?;
            let range = self.disk.part(from, length).ok_or_else(damaged)?;
            let mut at = 0;
            done += copy_pieces(length, out, |piece| {
                let count = usize::try_from(length - at).unwrap_or(usize::MAX).min(piece.len());
                let piece = piece.get_mut(..count).unwrap_or_default();
                if count > 0 {
                    range.read(piece, at)?;
                }
                at += count as u64;
                Ok(count)
            })?;
        }
        Ok(done + zeroes(done, bytes, out)?)
    }
}

fn absolute(path: &str) -> Result<ext4_view::PathBuf, FileError> {
    if path.len() > PATH_BYTES {
        return Err(FileError::NotFound);
    }
    let absolute = format!("/{}", path.trim_start_matches('/'));
    ext4_view::PathBuf::try_from(absolute.as_bytes()).map_err(|_| FileError::NotFound)
}

/// Returns true if a superblock has blocks of a size that there is, and not more of them than fit in `disk_bytes`: ext4-view allocates
/// by these numbers.
fn is_plausible(superblock: &[u8; SUPERBLOCK_BYTES], disk_bytes: u64) -> bool {
    let (log, per_group) = (u32_at(superblock, 24), u32_at(superblock, 32));
    let bytes = blocks(superblock).checked_mul(1024 << log.min(32));
    log <= 6 && per_group >= 8 && bytes.is_some_and(|bytes| bytes <= disk_bytes)
}

/// The number of blocks.
fn blocks(superblock: &[u8; SUPERBLOCK_BYTES]) -> u64 {
    let u32_at = |at| u32_at(superblock, at);
    // INCOMPAT_64BIT: the number has an upper half.
    let high = if u32_at(INCOMPATIBLE) & 0x80 == 0 { 0 } else { u32_at(336) };
    u64::from(u32_at(4)) | u64::from(high) << 32
}

/// The number of groups of blocks.
fn groups(superblock: &[u8; SUPERBLOCK_BYTES]) -> u64 {
    blocks(superblock).div_ceil(u64::from(u32_at(superblock, 32)).max(1))
}

/// A superblock of which no journal is to be replayed, with a checksum that fits if it did before.
fn without_recovery(mut superblock: [u8; SUPERBLOCK_BYTES]) -> [u8; SUPERBLOCK_BYTES] {
    let has_checksum = u32_at(&superblock, READ_ONLY_COMPATIBLE) & METADATA_CHECKSUMS != 0;
    let sum = |superblock: &[u8; SUPERBLOCK_BYTES]| crc32c(superblock.get(..CHECKSUM).unwrap_or_default());
    let is_damaged = has_checksum && u32_at(&superblock, CHECKSUM) != sum(&superblock);
    if is_damaged {
        return superblock;
    }
    let features = u32_at(&superblock, INCOMPATIBLE) & !RECOVER;
    superblock[INCOMPATIBLE..INCOMPATIBLE + 4].copy_from_slice(&features.to_le_bytes());
    if has_checksum {
        let sum = sum(&superblock).to_le_bytes();
        superblock[CHECKSUM..].copy_from_slice(&sum);
    }
    superblock
}

/// CRC-32C as ext4 has it: not inverted at its end.
fn crc32c(bytes: &[u8]) -> u32 {
    bytes.iter().fold(u32::MAX, |sum, byte| {
        let step = |sum: u32, _| (sum >> 1) ^ if sum & 1 == 0 { 0 } else { POLYNOMIAL };
        (0..8).fold(sum ^ u32::from(*byte), step)
    })
}

/// A range as ext4-view reads it, with this superblock.
struct ExtDisk {
    disk: Range,
    superblock: [u8; SUPERBLOCK_BYTES],
}

impl Ext4Read for ExtDisk {
    fn read(&mut self, start_byte: u64, dst: &mut [u8]) -> Result<(), Box<dyn Error + Send + Sync + 'static>> {
        self.disk.read(dst, start_byte)?;
        let is_superblock = start_byte == SUPERBLOCK && dst.len() == SUPERBLOCK_BYTES;
        if is_superblock {
            dst.copy_from_slice(&self.superblock);
        }
        Ok(())
    }
}
