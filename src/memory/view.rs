//! Single accesses to guest memory as the guest's processor would make them: naturally aligned, whole, in order.
//!
//! vm-memory looks a region up and checks for each access; an interpreter makes one every few instructions. Here a page is looked up
//! once, and an access within it costs a comparison. Other vCPUs and devices change the same memory: every access is an atomic one of
//! 1, 2, 4 or 8 bytes, with acquire and release order, which on x86 are plain MOVs.

use super::GuestRam;
use std::marker::PhantomData;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

/// The size of a [`GuestPage`] in bytes.
pub const PAGE_BYTES: u64 = 4096;

/// One page of guest memory, mapped for as long as the [`GuestRam`] that it came from lives.
#[derive(Clone, Copy)]
pub struct GuestPage<'a> {
    start: NonNull<u8>,
    _ram: PhantomData<&'a GuestRam>,
}

impl GuestRam {
    /// Finds the page at the guest physical address `gpa`, whose lower 12 bits are ignored. `None` where there is no memory.
    #[must_use]
    pub fn page(&self, gpa: u64) -> Option<GuestPage<'_>> {
        let gpa = gpa & !(PAGE_BYTES - 1);
        self.get().iter().find_map(|region| {
            let offset = gpa.checked_sub(region.start_addr().0)?;
            if offset >= region.len() || region.len() - offset < PAGE_BYTES {
                return None;
            }
            let offset = usize::try_from(offset).ok()?;
            // SAFETY: the page lies within the region's mapping, which `self` keeps mapped, readable and writable.
            let start = NonNull::new(unsafe { region.as_ptr().add(offset) })?;
            Some(GuestPage { start, _ram: PhantomData })
        })
    }
}

/// The value of a result that has the same in both cases.
fn either<T>(result: Result<T, T>) -> T {
    result.unwrap_or_else(|value| value)
}

impl GuestPage<'_> {
    /// Reads `1 << log2_bytes` bytes at `offset`, zero-extended. `None` where the access is not naturally aligned, leaves the page,
    /// or is larger than 8 bytes.
    #[inline]
    #[must_use]
    pub fn load(&self, offset: u64, log2_bytes: u8) -> Option<u64> {
        let at = self.at(offset, log2_bytes)?;
        // SAFETY: `at` has checked that the access is aligned (mappings start at pages) and lies within the page. The memory is mapped
        // for as long as `self`; the processes that share it use it by atomic or volatile accesses only.
        Some(unsafe {
            match log2_bytes {
                0 => AtomicU8::from_ptr(at).load(Ordering::Acquire).into(),
                1 => AtomicU16::from_ptr(at.cast()).load(Ordering::Acquire).into(),
                2 => AtomicU32::from_ptr(at.cast()).load(Ordering::Acquire).into(),
                _ => AtomicU64::from_ptr(at.cast()).load(Ordering::Acquire),
            }
        })
    }

    /// Writes the lower `1 << log2_bytes` bytes of `value` at `offset`. `None`, and nothing is written, where [`Self::load`] would
    /// return `None`.
    #[inline]
    #[must_use]
    #[allow(clippy::cast_possible_truncation, reason = "the lower bytes are what is written")]
    pub fn store(&self, offset: u64, log2_bytes: u8, value: u64) -> Option<()> {
        let at = self.at(offset, log2_bytes)?;
        // SAFETY: as in `load`; the mapping is writable.
        unsafe {
            match log2_bytes {
                0 => AtomicU8::from_ptr(at).store(value as u8, Ordering::Release),
                1 => AtomicU16::from_ptr(at.cast()).store(value as u16, Ordering::Release),
                2 => AtomicU32::from_ptr(at.cast()).store(value as u32, Ordering::Release),
                _ => AtomicU64::from_ptr(at.cast()).store(value, Ordering::Release),
            }
        }
        Some(())
    }

    /// Writes the lower `1 << log2_bytes` bytes of `new` at `offset` if those of `old` are there, in one step for all processors, as
    /// LOCK CMPXCHG does. Returns what was there. `None`, and nothing is written, where [`Self::load`] would return `None`.
    #[inline]
    #[must_use]
    #[allow(clippy::cast_possible_truncation, reason = "the lower bytes are what is compared and written")]
    pub fn compare_exchange(&self, offset: u64, log2_bytes: u8, old: u64, new: u64) -> Option<u64> {
        const ORDER: Ordering = Ordering::SeqCst;
        let at = self.at(offset, log2_bytes)?;
        // SAFETY: as in `store`. Both results of a comparison have the value that was there.
        Some(unsafe {
            match log2_bytes {
                0 => either(AtomicU8::from_ptr(at).compare_exchange(old as u8, new as u8, ORDER, ORDER)).into(),
                1 => {
                    either(AtomicU16::from_ptr(at.cast()).compare_exchange(old as u16, new as u16, ORDER, ORDER)).into()
                }
                2 => {
                    either(AtomicU32::from_ptr(at.cast()).compare_exchange(old as u32, new as u32, ORDER, ORDER)).into()
                }
                _ => either(AtomicU64::from_ptr(at.cast()).compare_exchange(old, new, ORDER, ORDER)),
            }
        })
    }

    /// Writes the lower `1 << log2_bytes` bytes of `value` at `offset` and returns what was there, in one step for all processors, as
    /// XCHG does. `None`, and nothing is written, where [`Self::load`] would return `None`.
    #[inline]
    #[must_use]
    #[allow(clippy::cast_possible_truncation, reason = "the lower bytes are what is written")]
    pub fn exchange(&self, offset: u64, log2_bytes: u8, value: u64) -> Option<u64> {
        let at = self.at(offset, log2_bytes)?;
        // SAFETY: as in `store`.
        Some(unsafe {
            match log2_bytes {
                0 => AtomicU8::from_ptr(at).swap(value as u8, Ordering::SeqCst).into(),
                1 => AtomicU16::from_ptr(at.cast()).swap(value as u16, Ordering::SeqCst).into(),
                2 => AtomicU32::from_ptr(at.cast()).swap(value as u32, Ordering::SeqCst).into(),
                _ => AtomicU64::from_ptr(at.cast()).swap(value, Ordering::SeqCst),
            }
        })
    }

    /// Returns true if the page has these 8-byte words at `offset`, which must be a multiple of 8. False as well where they
    /// would leave the page.
    #[inline]
    #[must_use]
    pub fn holds(&self, offset: u64, words: &[u64]) -> bool {
        if words.len() as u64 > PAGE_BYTES / 8 || offset > PAGE_BYTES - words.len() as u64 * 8 {
            return false;
        }
        let Some(start) = self.at(offset.min(PAGE_BYTES - 8), 3) else { return false };
        words.iter().enumerate().all(|(number, word)| {
            // SAFETY: as in `load`: `at` has checked the alignment of the first word, and all of them end within the page.
            unsafe { AtomicU64::from_ptr(start.cast::<u64>().add(number)) }.load(Ordering::Acquire) == *word
        })
    }

    /// The address of a naturally aligned access within the page.
    #[inline]
    fn at(&self, offset: u64, log2_bytes: u8) -> Option<*mut u8> {
        let misaligned = offset & ((1 << (log2_bytes & 7)) - 1) != 0;
        if misaligned || offset >= PAGE_BYTES || log2_bytes > 3 {
            return None;
        }
        #[allow(clippy::cast_possible_truncation, reason = "less than a page")]
        // SAFETY: the offset is less than a page, and the page is mapped. An aligned access that starts in a page ends in it.
        Some(unsafe { self.start.as_ptr().add(offset as usize) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::Backing;
    use hwvmm_arch::layout::GpaRange;
    use vm_memory::{Bytes, GuestAddress};

    fn ram() -> GuestRam {
        let banks = [GpaRange { start: 0, bytes: 0x4000 }, GpaRange { start: 0x10_0000, bytes: 0x2000 }];
        GuestRam::new(&banks, Backing::SmallPages).expect("memory")
    }

    #[test]
    fn only_memory_has_pages() {
        let ram = ram();
        let has = |gpa| ram.page(gpa).is_some();
        assert!(has(0) && has(0x3fff) && has(0x10_0000) && has(0x10_1fff));
        assert!(!has(0x4000) && !has(0xf_ffff) && !has(0x10_2000) && !has(u64::MAX));
    }

    #[test]
    fn accesses_have_their_size_and_order() {
        let ram = ram();
        let page = ram.page(0x10_1008).expect("memory");
        assert_eq!(page.store(8, 3, 0x1122_3344_5566_7788), Some(()));
        assert_eq!(page.store(10, 0, 0xfff), Some(()));
        assert_eq!(page.store(12, 1, 0xf_abcd), Some(()));
        assert_eq!(page.load(8, 3), Some(0x1122_abcd_55ff_7788));
        assert_eq!((page.load(8, 0), page.load(8, 1), page.load(12, 2)), (Some(0x88), Some(0x7788), Some(0x1122_abcd)));
        assert_eq!(ram.get().read_obj::<u64>(GuestAddress(0x10_1008)).expect("memory"), 0x1122_abcd_55ff_7788);
    }

    #[test]
    fn exchanges_have_their_size() {
        let ram = ram();
        let page = ram.page(0).expect("memory");
        for (size, mask) in [(0, 0xff), (1, 0xffff), (2, 0xffff_ffff), (3, u64::MAX)] {
            let (before, new) = (0x8877_6655_4433_2211_u64, 0xa1a2_a3a4_a5a6_a7a8);
            assert_eq!(page.store(8, 3, before), Some(()));
            assert_eq!(page.compare_exchange(8, size, before ^ 1, new), Some(before & mask));
            assert_eq!(page.load(8, 3), Some(before), "it was not equal");
            assert_eq!(page.compare_exchange(8, size, before, new), Some(before & mask));
            assert_eq!(page.load(8, 3), Some(before & !mask | new & mask));
            assert_eq!(page.exchange(8, size, before), Some(new & mask));
            assert_eq!(page.load(8, 3), Some(before));
        }
        assert_eq!((page.exchange(9, 1, 0), page.compare_exchange(4096, 0, 0, 0)), (None, None));
    }

    #[test]
    fn words_are_compared_within_the_page() {
        let ram = ram();
        let page = ram.page(0x1000).expect("memory");
        assert_eq!((page.store(4080, 3, 7), page.store(4088, 3, 8)), (Some(()), Some(())));
        assert!(
            page.holds(4080, &[7, 8]) && page.holds(4088, &[8]) && page.holds(4096, &[]) && page.holds(0, &[0; 510])
        );
        assert!(!page.holds(4080, &[7, 9]) && !page.holds(4080, &[6, 8]));
        // Beyond the page, and misaligned.
        assert!(!page.holds(4088, &[8, 0]) && !page.holds(4096, &[0]) && !page.holds(u64::MAX, &[0]));
        assert!(!page.holds(4, &[0]) && !page.holds(0, &[0; 513]));
    }

    #[test]
    fn what_is_misaligned_or_beyond_is_refused() {
        let ram = ram();
        let page = ram.page(0).expect("memory");
        for (offset, size) in [(1, 1), (2, 2), (4, 3), (4096, 0), (u64::MAX, 0), (0, 4), (0, 255)] {
            assert_eq!((page.load(offset, size), page.store(offset, size, 1)), (None, None), "{offset} {size}");
        }
        assert_eq!((page.load(4095, 0), page.load(4088, 3)), (Some(0), Some(0)));
    }
}
