//! A page of device registers that the guest can read without an exit: the machine maps it as a read-only memslot (KVM API
//! §4.35, `KVM_MEM_READONLY`). Writes still exit to the device, which then updates the page.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use thiserror::Error;
use vm_memory::mmap::MmapRegionError;
use vm_memory::{Bytes, MmapRegion, VolatileMemory};

/// A page of registers cannot be mapped.
#[derive(Debug, Error)]
#[error("cannot map a page for device registers")]
pub struct PageError(#[source] MmapRegionError);

/// A page of registers. Clones share the page.
#[derive(Clone)]
pub struct RegisterPage {
    region: Arc<MmapRegion>,
    /// Stands in for a register at an invalid offset.
    scratch: Arc<AtomicU32>,
}

impl RegisterPage {
    /// The size of the page in bytes.
    pub const BYTES: usize = 4096;

    /// Maps a page of zeros.
    ///
    /// # Errors
    /// Returns [`PageError`] where mmap(2) fails.
    pub fn new() -> Result<Self, PageError> {
        let region = MmapRegion::new(Self::BYTES).map_err(PageError)?;
        Ok(Self { region: Arc::new(region), scratch: Arc::default() })
    }

    /// Maps a page of all ones, which is what a read of an unmapped address returns.
    ///
    /// # Errors
    /// Returns [`PageError`] where mmap(2) fails.
    pub fn all_ones() -> Result<Self, PageError> {
        let page = Self::new()?;
        page.write(0, &[0xff; Self::BYTES]);
        Ok(page)
    }

    /// Returns the page's host virtual address. It is mapped for as long as any clone lives.
    #[must_use]
    pub fn address(&self) -> *mut u8 {
        self.region.as_ptr()
    }

    /// Copies `bytes` to byte `offset` of the page. Bytes beyond the end of the page are dropped.
    pub fn write(&self, offset: usize, bytes: &[u8]) {
        let count = bytes.len().min(Self::BYTES.saturating_sub(offset));
        if self.region.as_volatile_slice().write_slice(&bytes[..count], offset).is_err() {
            log::error!("cannot write {count} bytes to a register page at offset {offset:#x}: this is a bug in hwvmm");
        }
    }

    /// Returns the 32-bit register at byte `offset`, a multiple of 4, in little-endian byte order.
    #[must_use]
    pub fn register(&self, offset: usize) -> &AtomicU32 {
        self.region.get_atomic_ref(offset).unwrap_or(&self.scratch)
    }

    /// Sets the 32-bit register at byte `offset`, a multiple of 4, to `value` with a single store.
    pub fn write_register(&self, offset: usize, value: u32) {
        self.register(offset).store(value.to_le(), Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writes_end_at_the_end_of_the_page() {
        let page = RegisterPage::new().expect("a page");
        page.write_register(8, 0x0403_0201);
        page.write(12, &[5, 6]);
        page.write(RegisterPage::BYTES - 1, &[7, 8]);
        page.write(usize::MAX, &[9]);
        let mut seen = [0; 6];
        page.region.as_volatile_slice().read_slice(&mut seen, 8).expect("in the page");
        assert_eq!(seen, [1, 2, 3, 4, 5, 6]);
        page.region.as_volatile_slice().read_slice(&mut seen[..1], RegisterPage::BYTES - 1).expect("the last byte");
        assert_eq!(seen[0], 7);
        page.register(2).store(1, Ordering::Relaxed);
        assert_eq!(RegisterPage::all_ones().expect("a page").register(0).load(Ordering::Relaxed), u32::MAX);
    }
}
