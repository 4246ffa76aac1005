//! Coalesced writes (KVM API 4.116, KVM_REGISTER_COALESCED_MMIO): KVM puts a guest's write into a ring instead of returning
//! from KVM_RUN. The ring is drained at the next exit, in the order in which the guest made the writes.

use super::error::{KvmError, Named};
use kvm_bindings::{KVM_COALESCED_MMIO_PAGE_OFFSET, kvm_coalesced_mmio};
use std::os::fd::RawFd;
use std::ptr;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

const PAGE: usize = 4096;
/// The size of the ring's two indices, in bytes; the entries follow.
const HEADER: usize = 8;
/// The number of entries: as many as fit into the page (KVM_COALESCED_MMIO_MAX).
const ENTRIES: u32 = 170;

/// What a coalesced write was made to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CoalescedAddress {
    /// The number of an I/O port.
    Pio(u16),
    /// A guest physical address.
    Mmio(u64),
}

/// One coalesced write, or several writes of a byte to the same address in a row.
#[derive(Clone, Copy, Debug)]
pub struct CoalescedWrite<'a> {
    /// The port or the gpa.
    pub address: CoalescedAddress,
    /// The size of one item in bytes: 1, 2, 4 or 8.
    pub item_bytes: usize,
    /// The items that were written, in order.
    pub data: &'a [u8],
}

/// The ring of coalesced writes of a machine (struct kvm_coalesced_mmio_ring).
pub struct CoalescedRing {
    page: *mut u8,
    /// Held while the ring is drained, so that writes are delivered in order.
    draining: Mutex<()>,
    drained: AtomicU64,
}

// SAFETY: the page is a mapping that lives as long as the value. Its indices are read and written as atomics, its
// entries under the lock, and only those that KVM has finished (see `drain`).
unsafe impl Send for CoalescedRing {}
// SAFETY: as above.
unsafe impl Sync for CoalescedRing {}

impl Drop for CoalescedRing {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `new`, and no reference into it outlives the value.
        unsafe { libc::munmap(self.page.cast(), PAGE) };
    }
}

impl CoalescedRing {
    /// Maps the ring of the machine that the vCPU's file descriptor belongs to.
    ///
    /// # Errors
    /// [`KvmError`] where it cannot be mapped.
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
        Ok(Self { page: page.cast(), draining: Mutex::new(()), drained: AtomicU64::new(0) })
    }

    /// The index of the first entry that is not drained, and of the next entry that KVM fills.
    fn indices(&self) -> (&AtomicU32, &AtomicU32) {
        // SAFETY: both are aligned words at the start of the page, which lives as long as `self`; KVM reads and writes
        // them whole.
        unsafe { (&*self.page.cast::<AtomicU32>(), &*self.page.cast::<AtomicU32>().add(1)) }
    }

    /// Takes the first entry, if KVM has filled one.
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
        self.drained.fetch_add(1, Ordering::Relaxed);
        Some(entry)
    }

    /// Calls `each` with every write in the ring, in order. Writes of a byte to the same address in a row are one call, as
    /// those of a string instruction are.
    pub fn drain(&self, mut each: impl FnMut(CoalescedWrite<'_>)) {
        let (first, last) = self.indices();
        if first.load(Ordering::Relaxed) == last.load(Ordering::Acquire) {
            return;
        }
        let _guard = self.draining.lock().unwrap_or_else(PoisonError::into_inner);
        // No allocation: this runs on every exit, and on a thread that allocates nothing else.
        let (mut text, mut held) = ([0; ENTRIES as usize], 0);
        let mut place = CoalescedAddress::Pio(0);
        while let Some(entry) = self.next() {
            // SAFETY: both members of the union are one 32-bit word.
            let is_port = unsafe { entry.__bindgen_anon_1.pio } == 1;
            let address = match u16::try_from(entry.phys_addr) {
                Ok(port) if is_port => CoalescedAddress::Pio(port),
                _ => CoalescedAddress::Mmio(entry.phys_addr),
            };
            let bytes = usize::try_from(entry.len).unwrap_or(0).min(entry.data.len());
            if held > 0 && (bytes != 1 || held == text.len() || place != address) {
                each(CoalescedWrite { address: place, item_bytes: 1, data: &text[..held] });
                held = 0;
            }
            if bytes == 1 && held < text.len() {
                place = address;
                text[held] = entry.data[0];
                held += 1;
            } else {
                each(CoalescedWrite { address, item_bytes: bytes, data: &entry.data[..bytes] });
            }
        }
        if held > 0 {
            each(CoalescedWrite { address: place, item_bytes: 1, data: &text[..held] });
        }
    }

    /// The number of writes that have been drained so far.
    #[must_use]
    pub fn drained(&self) -> u64 {
        self.drained.load(Ordering::Relaxed)
    }
}
