//! Registers as memory: a page that the guest reads without an exit, where the machine maps it read-only (KVM API 4.35,
//! KVM_MEM_READONLY). Its writes still reach the device, which then shows what a read gives from now on.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use vm_memory::{Bytes, MmapRegion, VolatileMemory};

/// A page of registers. Clones share it.
#[derive(Clone)]
pub struct RegisterPage {
    region: Arc<MmapRegion>,
    /// Used where the page has no such word: no register lies there.
    nowhere: Arc<AtomicU32>,
}

impl RegisterPage {
    /// Its size in bytes.
    pub const BYTES: usize = 4096;

    /// A page that reads as zeros.
    ///
    /// # Errors
    /// Where it cannot be mapped.
    pub fn new() -> io::Result<Self> {
        let region = MmapRegion::new(Self::BYTES).map_err(io::Error::other)?;
        Ok(Self { region: Arc::new(region), nowhere: Arc::default() })
    }

    /// A page where nobody is: all ones.
    ///
    /// # Errors
    /// As [`RegisterPage::new`].
    pub fn ones() -> io::Result<Self> {
        let page = Self::new()?;
        page.show(0, &[0xff; Self::BYTES]);
        Ok(page)
    }

    /// Where it is in this process; mapped as long as any clone lives.
    #[must_use]
    pub fn address(&self) -> *mut u8 {
        self.region.as_ptr()
    }

    /// From now on the guest reads `bytes` at `offset`. What is beyond the page's end is left out.
    pub fn show(&self, offset: usize, bytes: &[u8]) {
        let count = bytes.len().min(Self::BYTES.saturating_sub(offset));
        if self.region.as_volatile_slice().write_slice(&bytes[..count], offset).is_err() {
            log::error!("a register page has no {count} bytes at {offset:#x}: this is a bug in hwvmm");
        }
    }

    /// The 32-bit register at `offset` (a multiple of 4), as an atomic: for one that changes while the guest reads it.
    #[must_use]
    pub fn word(&self, offset: usize) -> &AtomicU32 {
        self.region.get_atomic_ref(offset).unwrap_or(&self.nowhere)
    }

    /// The 32-bit register at `offset` is `value` from now on, in one piece.
    pub fn show_u32(&self, offset: usize, value: u32) {
        self.word(offset).store(value.to_le(), Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shows_what_was_said_and_nothing_beyond() {
        let page = RegisterPage::new().expect("a page");
        page.show_u32(8, 0x0403_0201);
        page.show(12, &[5, 6]);
        page.show(RegisterPage::BYTES - 1, &[7, 8]);
        page.show(usize::MAX, &[9]);
        let mut seen = [0; 6];
        page.region.as_volatile_slice().read_slice(&mut seen, 8).expect("in the page");
        assert_eq!(seen, [1, 2, 3, 4, 5, 6]);
        page.region.as_volatile_slice().read_slice(&mut seen[..1], RegisterPage::BYTES - 1).expect("the last byte");
        assert_eq!(seen[0], 7);
        page.word(2).store(1, Ordering::Relaxed);
        assert_eq!(RegisterPage::ones().expect("a page").word(0).load(Ordering::Relaxed), u32::MAX);
    }
}
