//! Partition tables: GPT (UEFI specification 2.10, chapter 5) and MBR with logical partitions.
//!
//! Crates for them allocate what a header asks for, or panic on an array whose size is not that of its entries; what is needed of a
//! table is where its partitions are.

use super::disk::Range;
use flate2::Crc;

/// A sector in bytes, as MBRs count them.
const SECTOR: u64 = 512;
/// The sector sizes that a GPT is looked for with.
const GPT_SECTORS: [u64; 2] = [512, 4096];
/// The most entries of a GPT. Usual are 128.
const GPT_ENTRIES: u32 = 1024;
/// The bytes of an entry of a GPT, at least and at most.
const GPT_ENTRY: std::ops::RangeInclusive<u32> = 128..=1024;
/// The bytes of a GPT's header that are used.
const GPT_HEADER: usize = 92;
/// The most logical partitions of an MBR.
const LOGICAL: u32 = 60;
/// Where the signature of an MBR is, in bytes.
const MBR_SIGNATURE: u64 = 440;
/// The type of the partition of an MBR that stands for a GPT.
const PROTECTIVE: u8 = 0xee;
/// The types of an MBR's extended partitions.
const EXTENDED: [u8; 3] = [0x05, 0x0f, 0x85];

/// A partition.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Partition {
    /// Its number, as Linux and GRUB count.
    pub number: u32,
    /// Its first byte on the disk.
    pub start: u64,
    /// Its size in bytes.
    pub bytes: u64,
    /// What Linux calls it by `PARTUUID=`: the GUID of a GPT's entry, or the signature of an MBR and the number.
    pub uuid: String,
}

/// The partitions of `disk`, in the order of their numbers; none where it has no table, as a disk that is one file system.
#[must_use]
pub(super) fn partitions(disk: &Range) -> Vec<Partition> {
    // A GPT counts only behind an MBR that says so. An older one may be left on a disk that has been partitioned anew.
    let sectors = if is_protective(disk) { GPT_SECTORS.as_slice() } else { &[] };
    for &sector in sectors {
        let ends = [Some(sector), (disk.bytes() / sector).checked_sub(1).map(|last| last * sector)];
        if let Some(found) = ends.into_iter().flatten().find_map(|at| gpt(disk, at, sector)) {
            return found;
        }
    }
    mbr(disk).unwrap_or_default()
}

/// Returns true if the MBR has a partition of the type that stands for a GPT.
fn is_protective(disk: &Range) -> bool {
    mbr_entries(disk, 0).is_some_and(|entries| entries.iter().any(|entry| entry.kind == PROTECTIVE))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..)?.first_chunk().map(|bytes| u32::from_le_bytes(*bytes))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    bytes.get(at..)?.first_chunk().map(|bytes| u64::from_le_bytes(*bytes))
}

fn crc32(bytes: &[u8]) -> u32 {
    let mut crc = Crc::new();
    crc.update(bytes);
    crc.sum()
}

/// The partitions of the GPT whose header is at `at`; `None` where there is none, or a damaged one.
fn gpt(disk: &Range, at: u64, sector: u64) -> Option<Vec<Partition>> {
    let header: [u8; GPT_HEADER] = disk.array(at)?;
    if !header.starts_with(b"EFI PART") || u32_at(&header, 12)? != u32::try_from(GPT_HEADER).ok()? {
        return None;
    }
    let mut summed = header;
    summed.get_mut(16..20)?.fill(0);
    if crc32(&summed) != u32_at(&header, 16)? {
        return None;
    }
    let (count, size) = (u32_at(&header, 80)?, u32_at(&header, 84)?);
    if count > GPT_ENTRIES || !GPT_ENTRY.contains(&size) {
        return None;
    }
    let mut entries = vec![0; usize::try_from(count * size).ok()?];
    disk.read(&mut entries, u64_at(&header, 72)?.checked_mul(sector)?).ok()?;
    if crc32(&entries) != u32_at(&header, 88)? {
        return None;
    }
    let found = (1..).zip(entries.chunks_exact(usize::try_from(size).ok()?)).filter_map(|(number, entry)| {
        let (first, last) = (u64_at(entry, 32)?, u64_at(entry, 40)?);
        let used = entry.get(..16)?.iter().any(|byte| *byte != 0);
        let (start, end) = (first.checked_mul(sector)?, last.checked_add(1)?.checked_mul(sector)?);
        let bytes = end.checked_sub(start).filter(|_| used)?;
        disk.part(start, bytes)?;
        Some(Partition { number, start, bytes, uuid: guid(entry.get(16..32)?)? })
    });
    Some(found.collect())
}

/// A GUID as text: its first three fields are little-endian numbers (UEFI specification, appendix A).
fn guid(bytes: &[u8]) -> Option<String> {
    let [a, b, c, d, e, f, g, h, rest @ ..]: [u8; 16] = bytes.try_into().ok()?;
    let (first, second, third) =
        (u32::from_le_bytes([a, b, c, d]), u16::from_le_bytes([e, f]), u16::from_le_bytes([g, h]));
    let rest = u64::from_be_bytes(rest);
    Some(format!("{first:08x}-{second:04x}-{third:04x}-{:04x}-{:012x}", rest >> 48, rest & 0xffff_ffff_ffff))
}

/// An entry of an MBR: its type, and where its partition is.
struct MbrEntry {
    kind: u8,
    start: u64,
    bytes: u64,
}

/// The entries of the MBR at `at`; `None` where there is none.
fn mbr_entries(disk: &Range, at: u64) -> Option<[MbrEntry; 4]> {
    let sector: [u8; 512] = disk.array(at)?;
    if !sector.ends_with(&[0x55, 0xaa]) {
        return None;
    }
    let entry = |index: usize| -> Option<MbrEntry> {
        let entry = sector.get(446 + 16 * index..)?.get(..16)?;
        // The code of a boot sector has other values here.
        if !matches!(entry.first()?, 0 | 0x80) {
            return None;
        }
        let sectors = |at| u32_at(entry, at).map(|sectors| u64::from(sectors) * SECTOR);
        Some(MbrEntry { kind: *entry.get(4)?, start: sectors(8)?, bytes: sectors(12)? })
    };
    Some([entry(0)?, entry(1)?, entry(2)?, entry(3)?])
}

fn mbr(disk: &Range) -> Option<Vec<Partition>> {
    let signature: [u8; 4] = disk.array(MBR_SIGNATURE)?;
    let signature = u32::from_le_bytes(signature);
    let uuid = |number: u32| format!("{signature:08x}-{number:02x}");
    let mut found = Vec::new();
    for (number, entry) in (1..).zip(mbr_entries(disk, 0)?) {
        if EXTENDED.contains(&entry.kind) {
            found.extend(logical(disk, entry.start, uuid));
        } else if !matches!(entry.kind, 0 | PROTECTIVE) && disk.part(entry.start, entry.bytes).is_some() {
            found.push(Partition { number, start: entry.start, bytes: entry.bytes, uuid: uuid(number) });
        }
    }
    found.sort_by_key(|partition| partition.number);
    Some(found)
}

/// The logical partitions of the extended partition at `extended`: each sector has one, and where the next sector is.
fn logical(disk: &Range, extended: u64, uuid: impl Fn(u32) -> String) -> Vec<Partition> {
    let (mut found, mut at, mut number) = (Vec::new(), extended, 5);
    for _ in 0..LOGICAL {
        let Some([own, next, ..]) = mbr_entries(disk, at) else { break };
        // A sector without a partition of its own has no number: that of a partition that was deleted.
        if own.kind != 0 && own.bytes > 0 {
            let start = at.saturating_add(own.start);
            if disk.part(start, own.bytes).is_some() {
                found.push(Partition { number, start, bytes: own.bytes, uuid: uuid(number) });
            }
            number += 1;
        }
        if !EXTENDED.contains(&next.kind) {
            break;
        }
        at = extended.saturating_add(next.start);
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::rc::Rc;

    fn read(bytes: Vec<u8>) -> Vec<Partition> {
        partitions(&Range::whole(Rc::new(bytes), 1 << 20))
    }

    fn put(disk: &mut [u8], at: usize, bytes: &[u8]) {
        disk[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn mbr_entry(disk: &mut [u8], at: usize, kind: u8, start: u32, sectors: u32) {
        disk[at + 4] = kind;
        put(disk, at + 8, &start.to_le_bytes());
        put(disk, at + 12, &sectors.to_le_bytes());
    }

    fn on_mbr(number: u32, first: u64, sectors: u64) -> Partition {
        let uuid = format!("00c0ffee-{number:02x}");
        Partition { number, start: first * 512, bytes: sectors * 512, uuid }
    }

    /// An empty MBR.
    fn mbr_disk() -> Vec<u8> {
        let mut disk = vec![0; 64 * 512];
        put(&mut disk, 510, &[0x55, 0xaa]);
        put(&mut disk, 440, &[0xee, 0xff, 0xc0, 0]);
        disk
    }

    /// A disk with a GPT of two partitions, 2 and 3, whose header is in sector `at`.
    fn gpt_disk(at: usize) -> Vec<u8> {
        let mut disk = mbr_disk();
        mbr_entry(&mut disk, 446, PROTECTIVE, 1, 63);
        for (number, first, last) in [(1, 40_u64, 47_u64), (2, 48, 63)] {
            let entry = 2 * 512 + number * 128;
            put(&mut disk, entry, &[7; 16]);
            put(&mut disk, entry + 16, &[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16]);
            put(&mut disk, entry + 32, &first.to_le_bytes());
            put(&mut disk, entry + 40, &last.to_le_bytes());
        }
        let sum = crc32(&disk[2 * 512..2 * 512 + 4 * 128]);
        let header = at * 512;
        put(&mut disk, header, b"EFI PART");
        put(&mut disk, header + 12, &92_u32.to_le_bytes());
        put(&mut disk, header + 72, &2_u64.to_le_bytes());
        put(&mut disk, header + 80, &4_u32.to_le_bytes());
        put(&mut disk, header + 84, &128_u32.to_le_bytes());
        put(&mut disk, header + 88, &sum.to_le_bytes());
        let sum = crc32(&disk[header..header + GPT_HEADER]);
        put(&mut disk, header + 16, &sum.to_le_bytes());
        disk
    }

    #[test]
    fn a_gpt_is_read_from_either_end() {
        let uuid = "04030201-0605-0807-090a-0b0c0d0e0f10";
        let both = [
            Partition { number: 2, start: 40 * 512, bytes: 8 * 512, uuid: uuid.into() },
            Partition { number: 3, start: 48 * 512, bytes: 16 * 512, uuid: uuid.into() },
        ];
        assert_eq!(read(gpt_disk(1)), both);
        let mut disk = gpt_disk(63);
        disk.truncate(64 * 512);
        // The last partition would have the header in it: only its place counts here.
        assert_eq!(read(disk), both);
        for at in [512 + 16, 512 + 80, 2 * 512 + 128] {
            let mut damaged = gpt_disk(1);
            damaged[at] ^= 1;
            assert!(read(damaged).is_empty(), "{at}");
        }
    }

    #[test]
    fn a_gpt_that_was_left_behind_an_mbr_is_none() {
        let mut disk = gpt_disk(63);
        mbr_entry(&mut disk, 446, 0x83, 8, 8);
        assert_eq!(read(disk), [on_mbr(1, 8, 8)]);
    }

    #[test]
    fn a_deleted_logical_partition_has_no_number() {
        let mut disk = mbr_disk();
        for at in [16, 32] {
            put(&mut disk, at * 512 + 510, &[0x55, 0xaa]);
        }
        mbr_entry(&mut disk, 446, 0x05, 16, 48);
        mbr_entry(&mut disk, 16 * 512 + 462, 0x05, 16, 16);
        mbr_entry(&mut disk, 32 * 512 + 446, 0x83, 1, 4);
        assert_eq!(read(disk), [on_mbr(5, 33, 4)]);
    }

    #[test]
    fn an_mbr_has_primary_and_logical_partitions() {
        let mut disk = mbr_disk();
        mbr_entry(&mut disk, 446, 0x83, 8, 8);
        mbr_entry(&mut disk, 462, 0x05, 32, 32);
        mbr_entry(&mut disk, 478, 0x83, 60, 5);
        put(&mut disk, 32 * 512 + 510, &[0x55, 0xaa]);
        mbr_entry(&mut disk, 32 * 512 + 446, 0x83, 1, 4);
        // The next one is this one: the chain has an end all the same.
        mbr_entry(&mut disk, 32 * 512 + 462, 0x05, 0, 8);
        let found = read(disk.clone());
        assert_eq!(found[0], on_mbr(1, 8, 8));
        assert_eq!(found[1], on_mbr(5, 33, 4));
        assert_eq!(found.len(), 61);
        disk[446] = 0x33;
        assert!(read(disk).is_empty(), "code is no table");
        assert!(read(vec![0; 512]).is_empty() && read(Vec::new()).is_empty());
    }
}
