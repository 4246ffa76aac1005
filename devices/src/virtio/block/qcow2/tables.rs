//! The tables of a qcow2 image: every cluster that they use must be inside the file, must have been counted, and metadata must
//! be used once. Then imago takes no cluster for free that is not.

use super::error::{Qcow2Error, Table};
use super::header::{DataPlace, Header, read};
use std::fs::File;

/// The most clusters of an image file: 4 TiB in clusters of 64 KiB. The check takes 2 bytes for each.
const MAX_CLUSTERS: u64 = 64 << 20;
/// The most bytes of L2 tables, and of refcount blocks, which the check reads: 4 TiB of disk in clusters of 64 KiB.
const MAX_TABLE_BYTES: u64 = 512 << 20;
/// Bytes that are read at once.
const CHUNK_BYTES: usize = 64 << 10;

// Bits of table entries.
const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;
const ZERO: u64 = 1;
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
const L1_RESERVED: u64 = 0x7f00_0000_0000_01ff;
const L2_RESERVED: u64 = 0x3f00_0000_0000_01fe;
const REFCOUNT_RESERVED: u64 = 0x1ff;

// The uses of a cluster: their number, and what they are.
const USE_METADATA: u16 = 1 << 15;
const USE_COPIED: u16 = 1 << 14;
const USE_COUNT: u16 = USE_COPIED - 1;

/// How the format of an image became known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::virtio::block) enum FormatSource {
    /// By its magic number.
    Detected,
    /// The configuration names it.
    Configured,
}

/// Checks the tables of `file`, an image of `file_bytes` bytes with this header. Reads at most [`MAX_TABLE_BYTES`] of L2 tables
/// and as much of refcount blocks, and takes 2 bytes of memory for each cluster.
pub(in crate::virtio::block) fn check(
    file: &File,
    file_bytes: u64,
    header: &Header,
    format: FormatSource,
) -> Result<(), Qcow2Error> {
    let mut check = Check::new(file, file_bytes, header)?;
    check.uses.add_metadata(0, 1, Table::L1)?;
    check.uses.add_metadata(header.l1_offset, header.l1_entries * 8, Table::L1)?;
    let refcount_bytes = header.refcount_table_clusters << header.cluster_bits;
    check.uses.add_metadata(header.refcount_table_offset, refcount_bytes, Table::Refcount)?;
    let blocks = check.refcount_blocks()?;
    check.l1_table()?;
    check.refcounts(&blocks, format)
}

/// How often each cluster is used.
struct Uses {
    cluster_bits: u32,
    file_bytes: u64,
    /// For each cluster of the file, and one more, as the last compressed cluster may end behind the file.
    counts: Vec<u16>,
}

impl Uses {
    fn is_inside(&self, at: u64, bytes: u64) -> bool {
        at.checked_add(bytes).is_some_and(|end| end <= self.file_bytes)
    }

    fn add_metadata(&mut self, at: u64, bytes: u64, table: Table) -> Result<(), Qcow2Error> {
        let (first, end) = (at >> self.cluster_bits, (at + bytes).div_ceil(1 << self.cluster_bits));
        for cluster in first..end {
            match usize::try_from(cluster).ok().and_then(|index| self.counts.get_mut(index)) {
                Some(count) if *count == 0 => *count = USE_METADATA | 1,
                _ => return Err(Qcow2Error::Overlap { at: cluster << self.cluster_bits, table }),
            }
        }
        Ok(())
    }

    /// Adds a use by an L2 table.
    fn add_data(&mut self, cluster: u64, copied: bool) -> Result<(), Qcow2Error> {
        let at = cluster << self.cluster_bits;
        let count = usize::try_from(cluster).ok().and_then(|index| self.counts.get_mut(index));
        let Some(count) = count.filter(|count| **count & USE_METADATA == 0) else {
            return Err(Qcow2Error::Overlap { at, table: Table::L2 });
        };
        if *count & USE_COUNT == USE_COUNT {
            return Err(Qcow2Error::TooLarge {
                what: "a number of uses of a cluster",
                value: 1 << 14,
                limit: USE_COUNT.into(),
            });
        }
        *count = (*count + 1) | if copied { USE_COPIED } else { 0 };
        Ok(())
    }
}

struct Check<'a> {
    file: &'a File,
    header: &'a Header,
    uses: Uses,
}

impl<'a> Check<'a> {
    fn new(file: &'a File, file_bytes: u64, header: &'a Header) -> Result<Self, Qcow2Error> {
        let clusters = file_bytes.div_ceil(header.cluster_bytes());
        limited("a number of clusters of the file", clusters, MAX_CLUSTERS)?;
        let counts = vec![0; usize::try_from(clusters + 1).unwrap_or(0)];
        Ok(Self { file, header, uses: Uses { cluster_bits: header.cluster_bits, file_bytes, counts } })
    }

    /// Reads the refcount table. Returns the offsets of the refcount blocks; 0 where there is none.
    fn refcount_blocks(&mut self) -> Result<Vec<u64>, Qcow2Error> {
        let cluster_bytes = self.header.cluster_bytes();
        let mut blocks = Vec::new();
        let (at, bytes) = (self.header.refcount_table_offset, self.header.refcount_table_clusters * cluster_bytes);
        let uses = &mut self.uses;
        each_entry(self.file, at, bytes / 8, |index, entry| {
            let bad = |rule| Err(Qcow2Error::Entry { table: Table::Refcount, index, entry, rule });
            if entry & REFCOUNT_RESERVED != 0 || !entry.is_multiple_of(cluster_bytes) {
                return bad("it must be a multiple of the cluster size");
            }
            if entry != 0 {
                if !uses.is_inside(entry, 1) {
                    return bad("the refcount block must be inside the file");
                }
                uses.add_metadata(entry, cluster_bytes, Table::Refcount)?;
            }
            blocks.push(entry);
            Ok(())
        })?;
        Ok(blocks)
    }

    /// Reads the L1 table and the L2 tables.
    fn l1_table(&mut self) -> Result<(), Qcow2Error> {
        let (cluster_bits, cluster_bytes) = (self.header.cluster_bits, self.header.cluster_bytes());
        let mut tables = Vec::new();
        let uses = &mut self.uses;
        each_entry(self.file, self.header.l1_offset, self.header.l1_entries, |index, entry| {
            let bad = |rule| Err(Qcow2Error::Entry { table: Table::L1, index, entry, rule });
            let at = entry & OFFSET;
            if entry & L1_RESERVED != 0 || !at.is_multiple_of(cluster_bytes) {
                return bad("its offset must be a multiple of the cluster size, and reserved bits 0");
            }
            if at == 0 {
                return Ok(());
            }
            if !uses.is_inside(at, 1) {
                return bad("the L2 table must be inside the file");
            }
            uses.add_metadata(at, cluster_bytes, Table::L1)?;
            if entry & COPIED != 0
                && let Some(count) = usize::try_from(at >> cluster_bits).ok().and_then(|at| uses.counts.get_mut(at))
            {
                *count |= USE_COPIED;
            }
            tables.push((index, at));
            limited("a number of bytes of L2 tables", tables.len() as u64 * cluster_bytes, MAX_TABLE_BYTES)
        })?;
        let entries = cluster_bytes / 8;
        for (l1_index, at) in tables {
            let (uses, header) = (&mut self.uses, self.header);
            each_entry(self.file, at, entries, |index, entry| {
                l2_entry(uses, header, l1_index * entries + index, entry)
            })?;
        }
        Ok(())
    }

    /// Compares the uses of the clusters with their reference counts.
    fn refcounts(&self, blocks: &[u64], format: FormatSource) -> Result<(), Qcow2Error> {
        let order = self.header.refcount_order;
        // Reference counts of a block.
        let per_block = usize::try_from((self.header.cluster_bytes() * 8) >> order).unwrap_or(0);
        let end = self.uses.file_bytes.div_ceil(self.header.cluster_bytes());
        let mut budget = 0;
        let mut cluster = 0_u64;
        let mut used = self.uses.counts.chunks(per_block);
        let mut blocks = blocks.iter();
        loop {
            let (used, block) = (used.next().unwrap_or_default(), blocks.next());
            let block = match block {
                None if used.is_empty() => return Ok(()),
                block => block.copied().unwrap_or(0),
            };
            // Behind the file only those of detected images are of interest.
            if block != 0 && (!used.is_empty() || format == FormatSource::Detected) {
                budget += self.header.cluster_bytes();
                limited("a number of bytes of refcount blocks", budget, MAX_TABLE_BYTES)?;
                self.each_refcount(block, |index, refcount| {
                    let cluster = cluster + index as u64;
                    if format == FormatSource::Detected
                        && cluster >= end
                        && refcount != 0
                        && used.get(index).is_none_or(|uses| *uses == 0)
                    {
                        return Err(Qcow2Error::BehindEnd { at: cluster << self.header.cluster_bits, refcount });
                    }
                    used.get(index).map_or(Ok(()), |uses| self.refcount(cluster, *uses, refcount))
                })?;
            } else if let Some(index) = used.iter().position(|uses| *uses != 0) {
                self.refcount(cluster + index as u64, used[index], 0)?;
            }
            cluster += per_block as u64;
        }
    }

    fn refcount(&self, cluster: u64, uses: u16, refcount: u64) -> Result<(), Qcow2Error> {
        let at = cluster << self.header.cluster_bits;
        let count = uses & USE_COUNT;
        if refcount < u64::from(count) {
            Err(Qcow2Error::Refcount { at, refcount, uses: count })
        } else if uses & USE_COPIED != 0 && refcount != 1 {
            Err(Qcow2Error::Copied { at, refcount })
        } else {
            Ok(())
        }
    }

    /// Calls `each` with the reference counts of a block.
    fn each_refcount(
        &self,
        block: u64,
        mut each: impl FnMut(usize, u64) -> Result<(), Qcow2Error>,
    ) -> Result<(), Qcow2Error> {
        let order = self.header.refcount_order;
        let mut index = 0;
        each_chunk(self.file, block, self.header.cluster_bytes(), |chunk| {
            if order < 3 {
                // Several counts in a byte, the first in the lowest bits.
                let (bits, mask) = (1 << order, (1_u64 << (1 << order)) - 1);
                for byte in chunk {
                    for shift in (0..8).step_by(bits) {
                        each(index, u64::from(*byte) >> shift & mask)?;
                        index += 1;
                    }
                }
            } else {
                for bytes in chunk.chunks_exact(1 << (order - 3)) {
                    each(index, bytes.iter().fold(0, |value, byte| value << 8 | u64::from(*byte)))?;
                    index += 1;
                }
            }
            Ok(())
        })
    }
}

fn limited(what: &'static str, value: u64, limit: u64) -> Result<(), Qcow2Error> {
    if value <= limit { Ok(()) } else { Err(Qcow2Error::TooLarge { what, value, limit }) }
}

/// Checks an entry of an L2 table. `index` is that of the cluster of the disk.
fn l2_entry(uses: &mut Uses, header: &Header, index: u64, entry: u64) -> Result<(), Qcow2Error> {
    if entry == 0 {
        return Ok(());
    }
    let bad = |rule| Err(Qcow2Error::Entry { table: Table::L2, index, entry, rule });
    if entry & COMPRESSED != 0 {
        return compressed(uses, header, index, entry);
    }
    let (at, copied) = (entry & OFFSET, entry & COPIED != 0);
    if entry & L2_RESERVED != 0 || !at.is_multiple_of(header.cluster_bytes()) {
        return bad("its offset must be a multiple of the cluster size, and reserved bits 0");
    }
    if entry & ZERO != 0 && header.version < 3 {
        return bad("version 2 has no clusters of zeroes");
    }
    match header.data {
        DataPlace::File(_) if at == 0 && !copied => Ok(()),
        DataPlace::File(_) if at != index << header.cluster_bits => bad("a data file has each cluster at its place"),
        DataPlace::File(_) => Ok(()),
        DataPlace::Image if at == 0 && !copied => Ok(()),
        DataPlace::Image if at == 0 || !uses.is_inside(at, 1) => {
            bad("the cluster must be inside the file, behind the header")
        }
        DataPlace::Image => uses.add_data(at >> header.cluster_bits, copied),
    }
}

/// Checks an entry of a compressed cluster.
fn compressed(uses: &mut Uses, header: &Header, index: u64, entry: u64) -> Result<(), Qcow2Error> {
    let bad = |rule| Err(Qcow2Error::Entry { table: Table::L2, index, entry, rule });
    // The number of sectors behind the first one is above the offset.
    let offset_bits = 62 - (header.cluster_bits - 8);
    let descriptor = entry & (COMPRESSED - 1);
    let (at, sectors) = (descriptor & ((1 << offset_bits) - 1), descriptor >> offset_bits);
    if entry & COPIED != 0 || at & !(OFFSET | 0x1ff) != 0 {
        return bad("a compressed cluster is not marked as unshared, and its offset has 56 bits");
    }
    if header.data != DataPlace::Image {
        return bad("an image with a data file has no compressed clusters");
    }
    let end = (at & !0x1ff) + (sectors + 1) * 512;
    if !uses.is_inside(at, 1) || end.saturating_sub(uses.file_bytes) >= header.cluster_bytes() {
        return bad("the compressed cluster must be inside the file");
    }
    for cluster in at >> header.cluster_bits..=(end - 1) >> header.cluster_bits {
        uses.add_data(cluster, false)?;
    }
    Ok(())
}

/// Calls `each` with the entries of a table, big-endian numbers of 8 bytes.
fn each_entry(
    file: &File,
    at: u64,
    entries: u64,
    mut each: impl FnMut(u64, u64) -> Result<(), Qcow2Error>,
) -> Result<(), Qcow2Error> {
    let mut index = 0;
    each_chunk(file, at, entries * 8, |chunk| {
        for bytes in chunk.as_chunks::<8>().0 {
            each(index, u64::from_be_bytes(*bytes))?;
            index += 1;
        }
        Ok(())
    })
}

/// Calls `each` with the bytes from `at` on, [`CHUNK_BYTES`] at a time.
fn each_chunk(
    file: &File,
    mut at: u64,
    bytes: u64,
    mut each: impl FnMut(&[u8]) -> Result<(), Qcow2Error>,
) -> Result<(), Qcow2Error> {
    let end = at + bytes;
    let mut chunk = vec![0; usize::try_from(bytes).unwrap_or(CHUNK_BYTES).min(CHUNK_BYTES)];
    while at < end {
        let part = usize::try_from(end - at).unwrap_or(CHUNK_BYTES).min(CHUNK_BYTES);
        read(file, at, &mut chunk[..part])?;
        each(&chunk[..part])?;
        at += part as u64;
    }
    Ok(())
}
