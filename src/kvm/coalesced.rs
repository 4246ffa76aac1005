//! Writes that wait in the kernel: KVM puts them into a ring (KVM API 4.116, KVM_REGISTER_COALESCED_MMIO) in place of
//! leaving KVM_RUN. Whoever looks next takes them, in the order in which the guest made them.

use super::{KvmError, Named};
use kvm_bindings::{KVM_COALESCED_MMIO_PAGE_OFFSET, kvm_coalesced_mmio};
use std::os::fd::RawFd;
use std::ptr;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

const PAGE: usize = 4096;
/// Bytes of the ring's two indices, in front of its entries.
const HEADER: usize = 8;
/// Entries: as many as fit into the page (KVM_COALESCED_MMIO_MAX).
const ENTRIES: u32 = 170;

/// The ring of a machine.
pub struct Coalesced {
    page: *mut u8,
    /// One takes at a time, so that the order is kept.
    taking: Mutex<()>,
    taken: AtomicU64,
}

// SAFETY: the page is a mapping that lives as long as the value. Its indices are read and written as atomics, its
// entries under the lock, and only those that KVM has finished (see `take`).
unsafe impl Send for Coalesced {}
// SAFETY: as above.
unsafe impl Sync for Coalesced {}

impl Drop for Coalesced {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `new` and nobody else knows of it.
        unsafe { libc::munmap(self.page.cast(), PAGE) };
    }
}

impl Coalesced {
    /// The ring, mapped by a vCPU's file descriptor.
    ///
    /// # Errors
    /// Where it cannot be mapped.
    pub(super) fn new(vcpu: RawFd) -> Result<Self, KvmError> {
        const { assert!(HEADER + ENTRIES as usize * size_of::<kvm_coalesced_mmio>() <= PAGE) };
        let offset = i64::from(KVM_COALESCED_MMIO_PAGE_OFFSET) * 4096;
        let access = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice; the descriptor is a vCPU's, and KVM has the ring
        // at this offset (KVM API 4.116).
        let page = unsafe { libc::mmap(ptr::null_mut(), PAGE, access, libc::MAP_SHARED, vcpu, offset) };
        if page == libc::MAP_FAILED {
            return Err(kvm_ioctls::Error::last()).named("mmap (the ring of coalesced writes)");
        }
        let (taking, taken) = (Mutex::new(()), AtomicU64::new(0));
        Ok(Self { page: page.cast(), taking, taken })
    }

    /// The index of the next entry to take, and of the next that KVM fills.
    fn indices(&self) -> (&AtomicU32, &AtomicU32) {
        // SAFETY: both are aligned words at the start of the page, which lives as long as `self`; KVM reads and writes
        // them whole.
        unsafe { (&*self.page.cast::<AtomicU32>(), &*self.page.cast::<AtomicU32>().add(1)) }
    }

    /// The next entry, if KVM has filled one.
    fn next(&self) -> Option<kvm_coalesced_mmio> {
        let (first, last) = self.indices();
        let at = first.load(Ordering::Relaxed);
        if at == last.load(Ordering::Acquire) || at >= ENTRIES {
            return None;
        }
        let offset = HEADER + usize::try_from(at).unwrap_or(0) * size_of::<kvm_coalesced_mmio>();
        // SAFETY: `at` is below ENTRIES, so the entry lies within the page; KVM has filled it (it moves `last` on
        // behind a write barrier) and leaves it alone until `first` has passed it.
        let entry = unsafe { self.page.add(offset).cast::<kvm_coalesced_mmio>().read_volatile() };
        first.store((at + 1) % ENTRIES, Ordering::Release);
        self.taken.fetch_add(1, Ordering::Relaxed);
        Some(entry)
    }

    /// Hands all writes that wait to `each`, in their order: whether it was a port, its address, bytes an item, and
    /// the items. Single bytes for one place come together, as a string instruction's do.
    pub fn take(&self, mut each: impl FnMut(bool, u64, usize, &[u8])) {
        let (first, last) = self.indices();
        if first.load(Ordering::Relaxed) == last.load(Ordering::Acquire) {
            return;
        }
        let _guard = self.taking.lock().unwrap_or_else(PoisonError::into_inner);
        // No allocation: this runs on every exit, and on a thread that allocates nothing else.
        let (mut text, mut held) = ([0; ENTRIES as usize], 0);
        let mut place = (false, 0);
        while let Some(entry) = self.next() {
            // SAFETY: both members of the union are one 32-bit word.
            let port = unsafe { entry.__bindgen_anon_1.pio } == 1;
            let bytes = usize::try_from(entry.len).unwrap_or(0).min(entry.data.len());
            if held > 0 && (bytes != 1 || held == text.len() || place != (port, entry.phys_addr)) {
                each(place.0, place.1, 1, &text[..held]);
                held = 0;
            }
            if bytes == 1 && held < text.len() {
                place = (port, entry.phys_addr);
                text[held] = entry.data[0];
                held += 1;
            } else {
                each(port, entry.phys_addr, bytes, &entry.data[..bytes]);
            }
        }
        if held > 0 {
            each(place.0, place.1, 1, &text[..held]);
        }
    }

    /// How many writes have been taken.
    #[must_use]
    pub fn taken(&self) -> u64 {
        self.taken.load(Ordering::Relaxed)
    }
}
