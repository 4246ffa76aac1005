//! Words that this process and those that it forks share.

use std::io;
use std::ptr::NonNull;
use std::sync::atomic::AtomicU64;

/// An anonymous shared mapping (mmap(2), MAP_SHARED | MAP_ANONYMOUS) of 64-bit words, all 0 at first. A child that is forked
/// while it exists has it, too; each of the two unmaps its own.
pub struct SharedWords {
    start: NonNull<AtomicU64>,
    words: usize,
}

// SAFETY: the mapping is only reached by `words`, as atomics.
unsafe impl Send for SharedWords {}
// SAFETY: as above.
unsafe impl Sync for SharedWords {}

impl SharedWords {
    /// Maps `words` words; pages take memory when they are first written.
    ///
    /// # Errors
    /// Returns the error of mmap(2), or `InvalidInput` for no words or more than fit the address space.
    pub fn new(words: usize) -> io::Result<Self> {
        let bytes = words.checked_mul(size_of::<AtomicU64>()).filter(|bytes| *bytes > 0);
        let bytes = bytes.ok_or(io::ErrorKind::InvalidInput)?;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice changes no existing one.
        let address = unsafe {
            libc::mmap(std::ptr::null_mut(), bytes, protection, libc::MAP_SHARED | libc::MAP_ANONYMOUS, -1, 0)
        };
        if address == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start = NonNull::new(address.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { start, words })
    }

    /// Returns all words of the mapping; the other process may change them at any time.
    #[must_use]
    pub fn words(&self) -> &[AtomicU64] {
        // SAFETY: `start` is the page-aligned start of a mapping of `words` words, readable and writable, that lives as long as
        // `self`. Every bit pattern is an `AtomicU64`, and other processes may write it at any time because it is atomic.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.words) }
    }
}

impl Drop for SharedWords {
    fn drop(&mut self) {
        // SAFETY: the range is the mapping made by `new`, which belongs to this value alone; borrows of it have ended.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.words * size_of::<AtomicU64>()) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::Ordering;

    #[test]
    fn words_start_as_zero_and_keep_what_is_written() {
        let shared = SharedWords::new(1000).expect("8000 bytes");
        assert!(shared.words().iter().all(|word| word.load(Ordering::Relaxed) == 0));
        shared.words()[999].store(7, Ordering::Relaxed);
        assert_eq!((shared.words().len(), shared.words()[999].load(Ordering::Relaxed)), (1000, 7));
        assert!(SharedWords::new(0).is_err() && SharedWords::new(usize::MAX).is_err());
    }
}
