//! The bytes of a disk: all of them or a range, with a limit on what is read.

use std::cell::Cell;
use std::io;
use std::rc::Rc;

/// What a read costs at least, in bytes: small reads take time, too.
const LEAST: u64 = 4096;

/// A disk that is read by offset.
pub trait ReadAt {
    /// The size of the disk in bytes.
    fn bytes(&self) -> u64;

    /// Fills `buffer` from the offset `at`, in bytes.
    ///
    /// # Errors
    /// Of the host's file, and where the disk ends before the buffer is full.
    fn read_exact_at(&self, buffer: &mut [u8], at: u64) -> io::Result<()>;
}

impl ReadAt for std::fs::File {
    fn bytes(&self) -> u64 {
        self.metadata().map_or(0, |metadata| metadata.len())
    }

    fn read_exact_at(&self, buffer: &mut [u8], at: u64) -> io::Result<()> {
        std::os::unix::fs::FileExt::read_exact_at(self, buffer, at)
    }
}

impl ReadAt for Vec<u8> {
    fn bytes(&self) -> u64 {
        self.len() as u64
    }

    fn read_exact_at(&self, buffer: &mut [u8], at: u64) -> io::Result<()> {
        let start = usize::try_from(at).unwrap_or(usize::MAX);
        let end = start.saturating_add(buffer.len());
        buffer.copy_from_slice(self.get(start..end).ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }
}

/// A range of a disk: the disk, or a partition. All ranges of a disk share one limit.
#[derive(Clone)]
pub struct Range {
    disk: Rc<dyn ReadAt>,
    left: Rc<Cell<u64>>,
    start: u64,
    bytes: u64,
}

impl Range {
    /// The whole of `disk`, of which at most `limit` bytes are read. A read of less than 4 KiB counts as 4 KiB, so a structure that
    /// leads in circles comes to an end.
    #[must_use]
    pub fn whole(disk: Rc<dyn ReadAt>, limit: u64) -> Self {
        let bytes = disk.bytes();
        Self { disk, left: Rc::new(Cell::new(limit)), start: 0, bytes }
    }

    /// The part of this range at `start`; `None` where it does not lie in it.
    #[must_use]
    pub fn part(&self, start: u64, bytes: u64) -> Option<Self> {
        let end = start.checked_add(bytes)?;
        (bytes > 0 && end <= self.bytes).then(|| Self { start: self.start + start, bytes, ..self.clone() })
    }

    /// The size in bytes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Fills `buffer` from the offset `at` in this range.
    ///
    /// # Errors
    /// Of the disk, where the range ends before the buffer is full, and where the limit is reached.
    pub fn read(&self, buffer: &mut [u8], at: u64) -> io::Result<()> {
        let length = buffer.len() as u64;
        if at.checked_add(length).is_none_or(|end| end > self.bytes) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let left = self.left.get().checked_sub(length.max(LEAST));
        self.left.set(left.ok_or_else(|| io::Error::other("more is read than the files of an image can need"))?);
        self.disk.read_exact_at(buffer, self.start + at)
    }

    /// The `N` bytes at `at`; `None` where they cannot be read.
    #[must_use]
    pub(super) fn array<const N: usize>(&self, at: u64) -> Option<[u8; N]> {
        let mut bytes = [0; N];
        self.read(&mut bytes, at).ok().map(|()| bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_ends_where_it_ends() {
        let disk = Range::whole(Rc::new((0..=255).collect::<Vec<u8>>()), 1 << 20);
        let part = disk.part(16, 16).expect("inside");
        assert_eq!(part.array::<2>(14), Some([30, 31]));
        assert_eq!(part.array::<2>(15), None);
        assert_eq!(part.array::<1>(u64::MAX), None);
        assert!(disk.part(250, 7).is_none() && disk.part(u64::MAX, 2).is_none() && disk.part(0, 0).is_none());
        assert_eq!(part.part(1, 2).and_then(|part| part.array::<1>(0)), Some([17]));
    }

    #[test]
    fn what_is_read_is_limited() {
        let disk = Range::whole(Rc::new(vec![0; 8192]), 3 * LEAST);
        assert!((0..3).all(|_| disk.array::<1>(0).is_some()));
        assert!(disk.part(0, 1).expect("inside").read(&mut [0], 0).is_err());
    }
}
