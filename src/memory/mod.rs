//! Guest memory: anonymous mappings, or private ones of the file of a snapshot, aligned so that a huge page of the host backs a huge page of the guest.

mod available;
mod own;
mod shared;
mod used;
mod view;

pub use available::available_bytes;
pub use own::give_back_startup;
pub use shared::SharedWords;
pub use used::{Ready, Used};
pub use view::{GuestPage, PAGE_BYTES};

use hwvmm_arch::layout::GpaRange;
use std::fs::File;
use std::io;
use std::num::TryFromIntError;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use thiserror::Error;
use vm_memory::mmap::MmapRegionError;
use vm_memory::{
    GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryMmap, GuestRegionCollectionError, GuestRegionMmap,
    MmapRegion,
};

/// The host pages that back guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backing {
    /// Pages of 4 KiB only (MADV_NOHUGEPAGE).
    SmallPages,
    /// Transparent huge pages where the host has them (MADV_HUGEPAGE).
    TransparentHugePages,
    /// Huge pages that the host has reserved (hugetlbfs).
    HugeTlb {
        /// The size of a page in bytes, a power of two.
        page_bytes: u64,
    },
}

/// Why guest memory cannot be made.
#[derive(Debug, Error)]
pub enum MemoryError {
    /// A bank's size is no multiple of the huge page size.
    #[error(
        "with huge pages of {page} bytes each bank of guest memory must be a multiple of that, and {size} bytes is not"
    )]
    NotMultiple {
        /// The size of a huge page in bytes.
        page: u64,
        /// The size of the bank in bytes.
        size: u64,
    },
    /// The host refuses the mapping.
    #[error("cannot map {size} bytes of guest memory{}", remedy(*.page))]
    Map {
        /// The size of the bank in bytes.
        size: u64,
        /// The size of a huge page in bytes, where huge pages were asked for.
        page: Option<u64>,
        /// The error of the system call.
        source: io::Error,
    },
    /// A bank is larger than the host's address space.
    #[error("cannot address {size} bytes of guest memory: give the guest less with -m")]
    TooLarge {
        /// The size of the bank in bytes.
        size: u64,
        /// The conversion that failed.
        source: TryFromIntError,
    },
    /// A bank ends beyond the guest's address space.
    #[error("{} bytes of guest memory at gpa {:#x} end beyond the address space: give the guest less with -m", .0.bytes, .0.start)]
    AddressSpace(GpaRange),
    /// vm-memory refuses the mapping of a bank.
    #[error("cannot use {size} bytes of guest memory")]
    Region {
        /// The size of the bank in bytes.
        size: u64,
        /// The error of vm-memory.
        source: MmapRegionError,
    },
    /// vm-memory refuses the banks together.
    #[error("the banks of guest memory overlap or are not in order")]
    Banks(#[source] GuestRegionCollectionError),
    /// There is no memory at the gpa.
    #[error("there is no guest memory at gpa {gpa:#x}")]
    NoMemory {
        /// The guest physical address.
        gpa: u64,
        /// The error of vm-memory.
        source: GuestMemoryError,
    },
    /// The protection of the page at the gpa cannot be changed.
    #[error("cannot change the protection of the page at gpa {gpa:#x}")]
    Protect {
        /// The guest physical address.
        gpa: u64,
        /// The error of the system call.
        source: io::Error,
    },
    /// The host has too little free memory to fill all pages.
    #[error("cannot fill {size} bytes of guest memory: is there enough free memory?")]
    Populate {
        /// The number of bytes that were to be filled.
        size: u64,
        /// The error of the system call.
        source: io::Error,
    },
}

fn remedy(page: Option<u64>) -> String {
    match page {
        None => ": give the guest less with -m, or see `ulimit -v` and vm.overcommit_memory".into(),
        Some(bytes) => format!(
            ": reserve huge pages first (echo NUMBER > /sys/kernel/mm/hugepages/hugepages-{}kB/nr_hugepages), or \
             leave out hugepages=",
            bytes >> 10
        ),
    }
}

/// The alignment of mappings in bytes: the size of a huge page.
const ALIGNMENT: u64 = 2 << 20;
const PAGE: usize = 4096;
const HUGE_PAGE: usize = 2 << 20;

/// A mapping of this process, unmapped when the value is dropped.
struct Mapping {
    address: *mut libc::c_void,
    bytes: usize,
}

// SAFETY: the pointer is only an address to unmap; nothing is read or written through it here.
unsafe impl Send for Mapping {}
// SAFETY: as above: `populate` has the kernel fill pages, or writes to those of its caller's range only.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Makes the host allocate the pages of `bytes` bytes from offset `first` on. What lies beyond the mapping is left out.
    fn populate(&self, first: usize, bytes: usize) -> Result<(), MemoryError> {
        let bytes = bytes.min(self.bytes.saturating_sub(first));
        // SAFETY: the range lies within this value's mapping; MADV_POPULATE_WRITE changes no contents.
        let result = unsafe { libc::madvise(self.address.byte_add(first), bytes, libc::MADV_POPULATE_WRITE) };
        if result == 0 {
            return Ok(());
        }
        let source = io::Error::last_os_error();
        if source.raw_os_error() != Some(libc::EINVAL) {
            return Err(MemoryError::Populate { size: bytes as u64, source });
        }
        touch(self, first, bytes);
        Ok(())
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range was mapped by `map_aligned` and belongs to this value alone. Everything that points into it
        // (`GuestRam::memory`, KVM's slots) is declared before it wherever the two are kept together, so is gone.
        unsafe { libc::munmap(self.address, self.bytes) };
    }
}

/// A range of addresses of this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HvaRange {
    /// The host virtual address of the first byte.
    pub start: u64,
    /// The length in bytes.
    pub bytes: u64,
}

/// Guest memory. Clones share it; it is unmapped with the last of them.
#[derive(Clone)]
pub struct GuestRam {
    memory: GuestMemoryMmap,
    mappings: Arc<Vec<Mapping>>,
}

impl GuestRam {
    /// Maps `banks`, whose sizes must be multiples of 4 KiB.
    ///
    /// # Errors
    /// [`MemoryError`], with its remedy.
    pub fn new(banks: &[GpaRange], backing: Backing) -> Result<Self, MemoryError> {
        Self::of_banks(banks, |bytes| map(bytes, backing))
    }

    /// Maps `banks`, whose sizes must be multiples of 4 KiB, from `file`, which has them one behind the other. A page is read when it
    /// is first used, and copied when it is first written: the file is not changed, and machines that are made from it share what
    /// they do not write. If the file is made shorter while the memory is in use, an access ends the process (SIGBUS).
    ///
    /// # Errors
    /// [`MemoryError`].
    pub fn of_file(banks: &[GpaRange], file: &File) -> Result<Self, MemoryError> {
        let mut offset = 0;
        Self::of_banks(banks, |bytes| {
            let mapping = map_file(bytes, file, offset);
            offset += bytes as u64;
            mapping
        })
    }

    fn of_banks(
        banks: &[GpaRange],
        mut map: impl FnMut(usize) -> Result<Mapping, MemoryError>,
    ) -> Result<Self, MemoryError> {
        let (mut mappings, mut regions) = (Vec::new(), Vec::new());
        for bank in banks {
            let size = bank.bytes;
            let bytes = usize::try_from(size).map_err(|source| MemoryError::TooLarge { size, source })?;
            let mapping = map(bytes)?;
            // SAFETY: the range is mapped readable and writable, page-aligned, and `mappings` keeps it as long as the
            // region's owner, `GuestRam`, lives.
            let region = unsafe {
                MmapRegion::build_raw(
                    mapping.address.cast(),
                    bytes,
                    libc::PROT_READ | libc::PROT_WRITE,
                    libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                )
            };
            mappings.push(mapping);
            let region = region.map_err(|source| MemoryError::Region { size, source })?;
            let region = GuestRegionMmap::new(region, GuestAddress(bank.start));
            regions.push(region.ok_or(MemoryError::AddressSpace(*bank))?);
        }
        let memory = GuestMemoryMmap::from_regions(regions).map_err(MemoryError::Banks)?;
        Ok(Self { memory, mappings: Arc::new(mappings) })
    }

    /// The memory as vm-memory has it, for reading, writing and memslots.
    #[must_use]
    pub fn get(&self) -> &GuestMemoryMmap {
        &self.memory
    }

    /// Makes the host allocate all pages now, on all of its processors at once: by MADV_POPULATE_WRITE, or before Linux 5.14
    /// by writing to each page.
    ///
    /// # Errors
    /// [`MemoryError::Populate`] where the host has too little free memory.
    pub fn populate(&self) -> Result<(), MemoryError> {
        let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        for mapping in self.mappings.iter() {
            let pages = mapping.bytes.div_ceil(HUGE_PAGE);
            let share = pages.div_ceil(threads) * HUGE_PAGE;
            let shares: Vec<(usize, usize)> = (0..mapping.bytes)
                .step_by(share.max(HUGE_PAGE))
                .map(|first| (first, share.min(mapping.bytes - first)))
                .collect();
            // This thread fills the first share.
            std::thread::scope(|scope| {
                let (mine, others) = shares.split_first().unwrap_or((&(0, 0), &[]));
                let others: Vec<_> =
                    others.iter().map(|&(first, bytes)| scope.spawn(move || mapping.populate(first, bytes))).collect();
                let mut result = mapping.populate(mine.0, mine.1);
                for other in others {
                    let joined = other.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
                    result = result.and(joined);
                }
                result
            })?;
        }
        Ok(())
    }

    /// Makes KVM drop its translations of the page at `gpa`, so that the guest's next access faults. A change of the host
    /// mapping's protection does that; here to executable and back, so that the page stays readable and writable.
    ///
    /// # Errors
    /// [`MemoryError::NoMemory`], and [`MemoryError::Protect`] where the host allows no executable memory (SELinux' execmem)
    /// or its pages are larger.
    pub fn flush_page(&self, gpa: u64) -> Result<(), MemoryError> {
        let page = GuestAddress(gpa & !(PAGE as u64 - 1));
        let slice = self.memory.get_slice(page, PAGE).map_err(|source| MemoryError::NoMemory { gpa, source })?;
        let address = slice.ptr_guard_mut().as_ptr().cast::<libc::c_void>();
        for rights in [libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC, libc::PROT_READ | libc::PROT_WRITE] {
            // SAFETY: the page lies in a mapping of guest memory, which `self` keeps; reading and writing stay allowed, and
            // nothing in this process jumps there.
            if unsafe { libc::mprotect(address, PAGE, rights) } != 0 {
                return Err(MemoryError::Protect { gpa, source: io::Error::last_os_error() });
            }
        }
        Ok(())
    }

    /// The host virtual addresses of the mappings, one for each bank.
    pub fn host_ranges(&self) -> impl Iterator<Item = HvaRange> {
        self.mappings.iter().map(|mapping| HvaRange { start: mapping.address as u64, bytes: mapping.bytes as u64 })
    }
}

/// Writes back the first byte of each page of a range of the mapping. No guest runs yet, and no two threads have the same
/// page.
fn touch(mapping: &Mapping, first: usize, bytes: usize) {
    let base = mapping.address.cast::<u8>();
    for offset in (first..first + bytes).step_by(PAGE) {
        // SAFETY: `offset` is within the mapping (see `Mapping::populate`), which is readable and writable; volatile because
        // the guest's memory is no Rust object.
        unsafe {
            let byte = base.add(offset);
            byte.write_volatile(byte.read_volatile());
        }
    }
}

fn map(bytes: usize, backing: Backing) -> Result<Mapping, MemoryError> {
    let size = bytes as u64;
    match backing {
        Backing::SmallPages | Backing::TransparentHugePages => {
            let mapping = map_aligned(bytes).map_err(|source| MemoryError::Map { size, page: None, source })?;
            let transparent = backing == Backing::TransparentHugePages;
            let advice = if transparent { libc::MADV_HUGEPAGE } else { libc::MADV_NOHUGEPAGE };
            // SAFETY: the range is the mapping just made. A kernel without huge pages refuses, which does no harm.
            if unsafe { libc::madvise(mapping.address, bytes, advice) } != 0 {
                log::debug!("transparent huge pages: {}", io::Error::last_os_error());
            }
            Ok(mapping)
        }
        Backing::HugeTlb { page_bytes: page } => {
            if !size.is_multiple_of(page) {
                return Err(MemoryError::NotMultiple { page, size });
            }
            let log2 = i32::try_from(page.trailing_zeros()).unwrap_or(21);
            let flags = libc::MAP_HUGETLB | log2 << libc::MAP_HUGE_SHIFT;
            let address =
                map_anonymous(bytes, flags).map_err(|source| MemoryError::Map { size, page: Some(page), source })?;
            Ok(Mapping { address, bytes })
        }
    }
}

/// Maps `bytes` of `file` from `offset` on, private to this process.
fn map_file(bytes: usize, file: &File, offset: u64) -> Result<Mapping, MemoryError> {
    let size = bytes as u64;
    let failed = |source| MemoryError::Map { size, page: None, source };
    let offset = i64::try_from(offset).map_err(|source| MemoryError::TooLarge { size, source })?;
    // It is replaced at once, and takes no memory.
    let mapping = map_aligned(bytes).map_err(failed)?;
    let (access, flags) =
        (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_NORESERVE | libc::MAP_FIXED);
    // SAFETY: the range is the mapping just made, of which no other code has the address. Its place is taken by another mapping of
    // the same length, which `Mapping` unmaps alike.
    let address = unsafe { libc::mmap(mapping.address, bytes, access, flags, file.as_raw_fd(), offset) };
    if address == libc::MAP_FAILED { Err(failed(io::Error::last_os_error())) } else { Ok(mapping) }
}

fn map_anonymous(bytes: usize, flags: i32) -> io::Result<*mut libc::c_void> {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | flags;
    // SAFETY: a new anonymous mapping at an address of the kernel's choice touches nothing that exists.
    let address = unsafe { libc::mmap(std::ptr::null_mut(), bytes, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0) };
    if address == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(address) }
}

/// Maps `bytes` at a multiple of [`ALIGNMENT`]: maps more than needed, then unmaps both ends.
fn map_aligned(bytes: usize) -> io::Result<Mapping> {
    let alignment = usize::try_from(ALIGNMENT).unwrap_or(PAGE);
    let whole = bytes.checked_add(alignment).ok_or(io::ErrorKind::InvalidInput)?;
    let start = map_anonymous(whole, libc::MAP_NORESERVE)?;
    let before = start.addr().next_multiple_of(alignment) - start.addr();
    let address = start.wrapping_byte_add(before);
    let after = whole - before - bytes;
    // SAFETY: both ranges are ends of the mapping just made, in whole pages (`bytes` is, so are both alignments), and
    // no other code has their addresses. Lengths of 0 are left out.
    unsafe {
        if before > 0 {
            libc::munmap(start, before);
        }
        if after > 0 {
            libc::munmap(address.wrapping_byte_add(bytes), after);
        }
    }
    Ok(Mapping { address, bytes })
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::{Bytes, GuestMemoryBackend};

    #[test]
    fn banks_are_aligned_and_usable_to_the_last_byte() {
        let banks = [GpaRange { start: 0, bytes: 4 << 20 }, GpaRange { start: 1 << 32, bytes: 12 << 10 }];
        let ram = GuestRam::new(&banks, Backing::TransparentHugePages).expect("16 MiB");
        for range in ram.host_ranges() {
            assert!(range.start.is_multiple_of(ALIGNMENT));
        }
        for bank in banks {
            ram.get().write_obj(0x5a_u8, GuestAddress(bank.end() - 1)).expect("last byte");
            assert!(ram.get().write_obj(0_u8, GuestAddress(bank.end())).is_err());
        }
        ram.populate().expect("populated");
        assert_eq!(ram.get().read_obj::<u8>(GuestAddress((4 << 20) - 1)).expect("kept"), 0x5a);
        assert_eq!(ram.get().num_regions(), 2);
        ram.flush_page((4 << 20) - 1).expect("flushed");
        assert_eq!(ram.get().read_obj::<u8>(GuestAddress((4 << 20) - 1)).expect("kept"), 0x5a);
        assert!(ram.flush_page(4 << 20).is_err());
    }

    #[test]
    fn errors_about_huge_pages_name_the_remedy() {
        let bank = |bytes| GpaRange { start: 0, bytes };
        let error =
            GuestRam::new(&[bank(3 << 20)], Backing::HugeTlb { page_bytes: 2 << 20 }).err().expect("not a multiple");
        assert!(matches!(error, MemoryError::NotMultiple { .. }));
        let error = GuestRam::new(&[bank(1 << 45)], Backing::HugeTlb { page_bytes: 1 << 30 }).err().expect("too many");
        assert!(error.to_string().contains("nr_hugepages"), "{error}");
    }
}
