//! Which pages of guest memory that is mapped from a file have been used, and having them ready before the guest uses them.

use super::{GuestRam, HUGE_PAGE, Mapping, MemoryError, PAGE};
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

/// Bytes of an entry of /proc/self/pagemap.
const ENTRY: usize = 8;
/// Entries that are read at once.
const ENTRIES: usize = 8192;
/// The page is in swap; the page is in memory (Linux' Documentation/admin-guide/mm/pagemap.rst).
const SWAPPED_OR_PRESENT: u64 = 1 << 62 | 1 << 63;
/// The page is one of a file: not a private copy.
const OF_FILE: u64 = 1 << 61;

/// What a page of memory that is mapped private from a file was used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Used {
    /// It was read, or one of the same 64 KiB was: Linux maps neighbours with it.
    Read,
    /// It was written, and is a copy of this process.
    Written,
}

/// What pages are made ready for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ready {
    /// To be read: they are mapped.
    ToRead,
    /// To be written: they are copied.
    ToWrite,
}

impl GuestRam {
    /// Calls `each` for every page that was used since the memory was mapped, with its number in the file, in order. `pagemap` is
    /// /proc/self/pagemap.
    ///
    /// # Errors
    /// Where `pagemap` cannot be read.
    pub fn for_each_used(&self, pagemap: &File, mut each: impl FnMut(u64, Used)) -> io::Result<()> {
        let mut entries = vec![0; ENTRIES * ENTRY];
        let mut number = 0;
        for mapping in self.mappings.iter() {
            let (first, pages) = (mapping.address.addr() / PAGE, mapping.bytes / PAGE);
            for start in (0..pages).step_by(ENTRIES) {
                let part = &mut entries[..ENTRIES.min(pages - start) * ENTRY];
                pagemap.read_exact_at(part, ((first + start) * ENTRY) as u64)?;
                for entry in part.chunks_exact(ENTRY) {
                    let entry = entry.try_into().map_or(0, u64::from_ne_bytes);
                    if entry & SWAPPED_OR_PRESENT != 0 {
                        each(number, if entry & OF_FILE == 0 { Used::Written } else { Used::Read });
                    }
                    number += 1;
                }
            }
        }
        Ok(())
    }

    /// Makes `bytes` bytes ready from `offset` in the file on, both multiples of a page. What lies beyond the memory is left out. Does nothing
    /// before Linux 5.14 (MADV_POPULATE_READ).
    ///
    /// # Errors
    /// [`MemoryError::Populate`].
    pub fn make_ready(&self, offset: u64, bytes: u64, ready: Ready) -> Result<(), MemoryError> {
        let advice = match ready {
            Ready::ToRead => libc::MADV_POPULATE_READ,
            Ready::ToWrite => libc::MADV_POPULATE_WRITE,
        };
        self.for_each_part(offset, bytes, |mapping, first, bytes| {
            // SAFETY: `for_each_part` gives ranges within a mapping of this value; the advice changes no contents.
            if unsafe { libc::madvise(mapping.address.byte_add(first), bytes, advice) } == 0 {
                return Ok(());
            }
            let source = io::Error::last_os_error();
            if source.raw_os_error() == Some(libc::EINVAL) {
                return Ok(());
            }
            Err(MemoryError::Populate { size: bytes as u64, source })
        })
    }

    /// Replaces the huge page at `offset` in `file`, which this memory is mapped from, by a copy in a huge page of the host, where
    /// it has one. Nothing may use the memory yet. Leaves it as it is, and returns false, where the bank has no whole huge page there.
    ///
    /// # Errors
    /// [`MemoryError::Map`], [`MemoryError::Populate`]. The memory must not be used then: a part of it may be zeros.
    pub fn copy_huge_page(&self, file: &File, offset: u64) -> Result<bool, MemoryError> {
        let mut copied = false;
        self.for_each_part(offset, HUGE_PAGE as u64, |mapping, first, bytes| {
            if bytes != HUGE_PAGE || !first.is_multiple_of(HUGE_PAGE) {
                return Ok(());
            }
            copied = true;
            replace(mapping, first, file, offset)
        })?;
        Ok(copied)
    }

    /// Calls `each` with the parts of the mappings that have the `bytes` bytes from `offset` in the file on.
    fn for_each_part(
        &self,
        offset: u64,
        bytes: u64,
        mut each: impl FnMut(&Mapping, usize, usize) -> Result<(), MemoryError>,
    ) -> Result<(), MemoryError> {
        let mut before = 0;
        let end = offset.saturating_add(bytes);
        for mapping in self.mappings.iter() {
            let (start, behind) = (before, before + mapping.bytes as u64);
            let (first, last) = (offset.clamp(start, behind), end.clamp(start, behind));
            if first < last {
                let place = |at: u64| usize::try_from(at - start).unwrap_or(mapping.bytes);
                each(mapping, place(first), place(last) - place(first))?;
            }
            before = behind;
        }
        Ok(())
    }
}

/// Maps a huge page at `first` in `mapping` in place of what is there, and reads it from `file`.
fn replace(mapping: &Mapping, first: usize, file: &File, offset: u64) -> Result<(), MemoryError> {
    let size = HUGE_PAGE as u64;
    let (access, flags) =
        (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED);
    // SAFETY: the range lies within `mapping`, as `for_each_part` has it, and is whole pages of it. It stays readable and writable, and
    // `Mapping` unmaps it with the rest. Nothing uses the memory yet (`copy_huge_page`).
    let address = unsafe {
        let address = mapping.address.byte_add(first);
        libc::mmap(address, HUGE_PAGE, access, flags, -1, 0)
    };
    if address == libc::MAP_FAILED {
        return Err(MemoryError::Map { size, page: None, source: io::Error::last_os_error() });
    }
    // SAFETY: the range is the mapping just made. A kernel without huge pages refuses, which does no harm.
    unsafe { libc::madvise(address, HUGE_PAGE, libc::MADV_HUGEPAGE) };
    let mut done = 0;
    while done < HUGE_PAGE {
        let at = libc::off_t::try_from(offset + done as u64).unwrap_or(libc::off_t::MAX);
        // SAFETY: the kernel writes at most to the end of the mapping just made, which is no Rust object.
        let count = unsafe { libc::pread(file.as_raw_fd(), address.byte_add(done), HUGE_PAGE - done, at) };
        match usize::try_from(count) {
            Ok(0) => return Err(MemoryError::Populate { size, source: io::ErrorKind::UnexpectedEof.into() }),
            Ok(count) => done += count,
            Err(_) => {
                let source = io::Error::last_os_error();
                if source.kind() != io::ErrorKind::Interrupted {
                    return Err(MemoryError::Populate { size, source });
                }
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use hwvmm_arch::layout::GpaRange;
    use std::collections::BTreeMap;
    use vm_memory::{Bytes, GuestAddress};

    const BANKS: [GpaRange; 2] = [GpaRange { start: 0, bytes: 4 << 20 }, GpaRange { start: 1 << 32, bytes: 2 << 20 }];

    fn file() -> File {
        let file = tempfile::tempfile().expect("a file");
        file.set_len(6 << 20).expect("set");
        for page in 0..6_u64 << 8 {
            file.write_all_at(&page.to_le_bytes(), page << 12).expect("written");
        }
        file
    }

    fn used(ram: &GuestRam) -> BTreeMap<u64, Used> {
        let pagemap = File::open("/proc/self/pagemap").expect("/proc");
        let mut used = BTreeMap::new();
        let insert = |page, how| {
            used.insert(page, how);
        };
        ram.for_each_used(&pagemap, insert).expect("readable");
        used
    }

    #[test]
    fn pages_that_were_used_are_told() {
        let ram = GuestRam::of_file(&BANKS, &file()).expect("mapped");
        assert!(used(&ram).is_empty());
        let value = |gpa| ram.get().read_obj::<u64>(GuestAddress(gpa)).expect("memory");
        assert_eq!((value(0x20_0000), value((1 << 32) + 0x1000)), (0x200, 0x401));
        ram.get().write_obj(7_u8, GuestAddress((1 << 32) + 0x10_0000)).expect("memory");
        let found = used(&ram);
        assert_eq!(found.get(&0x500), Some(&Used::Written));
        assert_eq!((found.get(&0x200), found.get(&0x401)), (Some(&Used::Read), Some(&Used::Read)));
        assert_eq!(found.values().filter(|how| **how == Used::Written).count(), 1);
        // Linux maps 16 pages at most with one that is read.
        assert!(found.len() <= 1 + 2 * 16, "{found:?}");
    }

    #[test]
    fn pages_are_made_ready_and_keep_their_contents() {
        let file = file();
        let ram = GuestRam::of_file(&BANKS, &file).expect("mapped");
        // Across both banks.
        ram.make_ready(0x3f_e000, 0x4000, Ready::ToWrite).expect("memory");
        ram.make_ready(0x8000, 0x1000, Ready::ToRead).expect("memory");
        ram.make_ready(0x5f_f000, u64::MAX, Ready::ToRead).expect("what is beyond is left out");
        let found = used(&ram);
        let copies: Vec<u64> = found.iter().filter(|(_, how)| **how == Used::Written).map(|(page, _)| *page).collect();
        assert_eq!(copies, [0x3fe, 0x3ff, 0x400, 0x401]);
        assert!(found.contains_key(&8) && found.contains_key(&0x5ff));
        assert_eq!(ram.get().read_obj::<u64>(GuestAddress(1 << 32)).expect("memory"), 0x400);
    }

    #[test]
    fn a_file_that_breaks_off_is_an_error() {
        let file = file();
        let ram = GuestRam::of_file(&BANKS, &file).expect("mapped");
        file.set_len(0x30_0000).expect("set");
        assert!(matches!(ram.copy_huge_page(&file, 0x20_0000), Err(MemoryError::Populate { .. })));
    }

    #[test]
    fn a_huge_page_is_a_copy_of_the_file() {
        let file = file();
        let ram = GuestRam::of_file(&BANKS, &file).expect("mapped");
        assert!(ram.copy_huge_page(&file, 0x20_0000).expect("copied"));
        assert!(ram.copy_huge_page(&file, 0x40_0000).expect("copied"), "in the second bank");
        // Not aligned, across banks, beyond.
        for offset in [0x1000, 0x3f_f000, 0x60_0000, u64::MAX - 5] {
            assert!(!ram.copy_huge_page(&file, offset).expect("nothing"), "{offset:#x}");
        }
        let found = used(&ram);
        assert_eq!(found.len(), 1024, "two huge pages");
        for (gpa, page) in [(0x1f_f000, 0x1ff), (0x20_0000, 0x200), (0x3f_f000, 0x3ff), ((1 << 32) + 0x1f_f000, 0x5ff)]
        {
            assert_eq!(ram.get().read_obj::<u64>(GuestAddress(gpa)).expect("memory"), page);
        }
    }
}
