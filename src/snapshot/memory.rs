//! The file `memory`: the banks of guest memory one behind the other. Pages of zeros are holes.

use crate::memory::GuestRam;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use vm_memory::{Bytes, GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};

const PAGE: usize = 4096;
/// Memory that is looked at at once, in bytes.
const PIECE: usize = 1 << 20;

/// The size of the file in bytes.
#[must_use]
pub fn bytes_of_banks(ram: &GuestRam) -> u64 {
    ram.get().iter().map(GuestMemoryRegion::len).sum()
}

/// Writes all pages that are not zero to `file`, which is empty and gets the length of the memory. Returns how many bytes were
/// written. The guest must not run meanwhile.
///
/// # Errors
/// The error of a write: a disk that is full.
pub fn write_memory(ram: &GuestRam, file: &File) -> io::Result<u64> {
    file.set_len(bytes_of_banks(ram))?;
    let (mut piece, mut offset, mut written) = (vec![0; PIECE], 0, 0);
    for bank in ram.get().iter() {
        let mut at = 0;
        while at < bank.len() {
            let count = usize::try_from(bank.len() - at).unwrap_or(PIECE).min(PIECE);
            let bytes = &mut piece[..count];
            bank.read_slice(bytes, MemoryRegionAddress(at)).map_err(io::Error::other)?;
            written += write_pages(file, bytes, offset + at)?;
            at += count as u64;
        }
        offset += bank.len();
    }
    Ok(written)
}

/// Writes the pages of `bytes` that are not zero, neighbours by one write.
fn write_pages(file: &File, bytes: &[u8], offset: u64) -> io::Result<u64> {
    let (mut start, mut written) = (0, 0);
    while start < bytes.len() {
        let rest = &bytes[start..];
        let is_zero = |page: &[u8]| page.iter().all(|byte| *byte == 0);
        let kind = is_zero(&rest[..PAGE.min(rest.len())]);
        let count = rest.chunks(PAGE).take_while(|page| is_zero(page) == kind).map(<[u8]>::len).sum::<usize>();
        if !kind {
            file.write_all_at(&rest[..count], offset + start as u64)?;
            written += count as u64;
        }
        start += count;
    }
    Ok(written)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::Backing;
    use hwvmm_arch::layout::GpaRange;
    use std::os::unix::fs::MetadataExt;
    use vm_memory::GuestAddress;

    #[test]
    fn memory_is_written_with_holes_and_read_back() {
        let banks = [GpaRange { start: 0, bytes: 4 << 20 }, GpaRange { start: 1 << 32, bytes: 12 << 10 }];
        let ram = GuestRam::new(&banks, Backing::SmallPages).expect("4 MiB");
        let places =
            [(0, 1_u64), (PIECE as u64 - 8, 2), (PIECE as u64, 3), ((4 << 20) - 8, 4), ((1 << 32) + 0x2ff8, 5)];
        for (gpa, value) in places {
            ram.get().write_obj(value, GuestAddress(gpa)).expect("memory");
        }
        let file = tempfile::tempfile().expect("a file");
        assert_eq!(write_memory(&ram, &file).expect("room"), 5 * 4096);
        let metadata = file.metadata().expect("a file");
        assert_eq!(metadata.len(), (4 << 20) + (12 << 10));
        assert!(metadata.blocks() * 512 <= 16 * 4096, "{} blocks", metadata.blocks());
        let again = GuestRam::of_file(&banks, &file).expect("mapped");
        for (gpa, value) in places {
            assert_eq!(again.get().read_obj::<u64>(GuestAddress(gpa)).expect("memory"), value, "{gpa:#x}");
        }
        // Writes are the guest's own.
        again.get().write_obj(9_u64, GuestAddress(0)).expect("memory");
        let other = GuestRam::of_file(&banks, &file).expect("mapped");
        assert_eq!(other.get().read_obj::<u64>(GuestAddress(0)).expect("memory"), 1);
        assert_eq!(other.get().read_obj::<u64>(GuestAddress(2 << 20)).expect("memory"), 0);
    }
}
