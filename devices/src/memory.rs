//! Guest memory as devices see it, and vectored I/O between it and host files.
//!
//! Bytes of a running guest are no Rust slice: the guest changes them at any time. So they are only ever moved by
//! volatile copies or by the kernel (readv, writev, io_uring), which takes addresses.

use std::any::Any;
use std::io;
use std::ops::Deref;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;
use vm_memory::{ByteValued, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, VolatileSlice};

/// The most pieces of one vectored I/O (Linux' UIO_MAXIOV).
const MAX_PIECES: usize = 1024;

/// Guest memory, with whoever keeps it mapped.
#[derive(Clone)]
pub struct Memory {
    memory: GuestMemoryMmap,
    _owner: Arc<dyn Any + Send + Sync>,
}

impl Memory {
    /// `memory`, which stays mapped as long as `owner` lives.
    #[must_use]
    pub fn new(memory: GuestMemoryMmap, owner: Arc<dyn Any + Send + Sync>) -> Self {
        Self { memory, _owner: owner }
    }
}

impl Deref for Memory {
    type Target = GuestMemoryMmap;

    fn deref(&self) -> &GuestMemoryMmap {
        &self.memory
    }
}

/// A list of pieces of guest memory, used from its front like a stream.
#[derive(Clone, Default)]
pub struct Buffers<'m> {
    pieces: Vec<VolatileSlice<'m>>,
    /// The first piece that is not used up.
    next: usize,
    len: usize,
}

impl<'m> Buffers<'m> {
    /// Adds `len` bytes at `gpa`.
    ///
    /// # Errors
    /// Where they are not all guest memory, or the whole would be longer than 2³² (virtio 1.3 §2.7.5.2).
    pub fn push(&mut self, memory: &'m Memory, gpa: GuestAddress, len: u32) -> io::Result<()> {
        let added = len as usize;
        let total = self.len.checked_add(added).filter(|total| u32::try_from(*total).is_ok());
        let total = total.ok_or_else(|| io::Error::other("a descriptor chain longer than 4 GiB"))?;
        for piece in GuestMemoryBackend::get_slices(&**memory, gpa, added) {
            let piece = piece.map_err(|_| io::Error::other(format!("{len} bytes at {gpa:?} are not guest memory")))?;
            self.pieces.push(piece);
        }
        self.len = total;
        Ok(())
    }

    /// Bytes that are left.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether nothing is left.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Whether each piece starts and ends at a multiple of `alignment`, as host addresses.
    #[must_use]
    pub fn is_aligned(&self, alignment: usize) -> bool {
        self.rest().iter().all(|piece| {
            piece.ptr_guard().as_ptr().addr().is_multiple_of(alignment) && piece.len().is_multiple_of(alignment)
        })
    }

    fn rest(&self) -> &[VolatileSlice<'m>] {
        self.pieces.get(self.next..).unwrap_or(&[])
    }

    /// Uses up the first `count` bytes, or all where there are fewer.
    pub fn skip(&mut self, count: usize) {
        self.take(count, |_, _| ());
    }

    /// Takes up to `count` bytes off the front, and shows each piece with its offset in what is taken.
    fn take(&mut self, count: usize, mut each: impl FnMut(usize, &VolatileSlice<'m>)) -> usize {
        let mut done = 0;
        while let Some(piece) = self.pieces.get_mut(self.next).filter(|_| done < count) {
            let part = piece.len().min(count - done);
            if let Ok((first, rest)) = piece.split_at(part) {
                each(done, &first);
                *piece = rest;
            }
            if piece.is_empty() {
                self.next += 1;
            }
            done += part;
        }
        self.len -= done;
        done
    }

    /// Splits off the first `count` bytes, or all where there are fewer.
    #[must_use]
    pub fn split_to(&mut self, count: usize) -> Self {
        let mut pieces = Vec::new();
        let len = self.take(count, |_, piece| pieces.push(*piece));
        Self { pieces, next: 0, len }
    }

    /// Copies from the front into `data`; returns how many bytes there were.
    pub fn read(&mut self, data: &mut [u8]) -> usize {
        self.take(data.len(), |at, piece| {
            if let Some(part) = data.get_mut(at..at + piece.len()) {
                piece.copy_to(part);
            }
        })
    }

    /// An object from the front.
    ///
    /// # Errors
    /// Where too few bytes are left.
    pub fn read_obj<T: ByteValued + Default>(&mut self) -> io::Result<T> {
        let mut object = T::default();
        let bytes = object.as_mut_slice();
        let want = bytes.len();
        if self.read(bytes) == want { Ok(object) } else { Err(too_short(want)) }
    }

    /// Copies `data` to the front; returns how many bytes had room.
    pub fn write(&mut self, data: &[u8]) -> usize {
        self.take(data.len(), |at, piece| {
            if let Some(part) = data.get(at..at + piece.len()) {
                piece.copy_from(part);
            }
        })
    }

    /// Copies all of `data` to the front.
    ///
    /// # Errors
    /// Where it has no room.
    pub fn write_all(&mut self, data: &[u8]) -> io::Result<()> {
        if data.len() > self.len {
            return Err(too_short(data.len()));
        }
        self.write(data);
        Ok(())
    }

    /// All that is left, as one block of host memory.
    #[must_use]
    pub fn to_vec(&mut self) -> Vec<u8> {
        let mut data = vec![0; self.len];
        self.read(&mut data);
        data
    }

    /// Fills what is left with zeroes.
    pub fn zero(&mut self) {
        const ZEROES: [u8; 4096] = [0; 4096];
        while self.write(&ZEROES) > 0 {}
    }

    /// The pieces as the kernel takes them. They hold as long as the guest's memory is mapped.
    #[must_use]
    pub fn iovecs(&self) -> Vec<libc::iovec> {
        let iovec = |piece: &VolatileSlice<'m>| libc::iovec {
            iov_base: piece.ptr_guard_mut().as_ptr().cast(),
            iov_len: piece.len(),
        };
        self.rest().iter().map(iovec).collect()
    }

    /// Fills from a file: at `offset`, or where the file stands. Uses up what was filled; 0 is the file's end.
    ///
    /// # Errors
    /// The system's.
    pub fn read_from(&mut self, file: BorrowedFd<'_>, offset: Option<u64>) -> io::Result<usize> {
        let iovecs = self.iovecs();
        let count = count(&iovecs);
        let done = retry(|| {
            // SAFETY: `count` iovecs are valid for the call; each names guest memory that is mapped (the borrow of the
            // `Memory` in `'m`), which the guest may change at the same time and which Rust never sees as a slice.
            unsafe {
                match offset {
                    Some(at) => libc::preadv(file.as_raw_fd(), iovecs.as_ptr(), count, file_offset(at)),
                    None => libc::readv(file.as_raw_fd(), iovecs.as_ptr(), count),
                }
            }
        })?;
        self.skip(done);
        Ok(done)
    }

    /// Writes to a file: at `offset`, or where the file stands. Uses up what was written.
    ///
    /// # Errors
    /// The system's.
    pub fn write_to(&mut self, file: BorrowedFd<'_>, offset: Option<u64>) -> io::Result<usize> {
        let iovecs = self.iovecs();
        let count = count(&iovecs);
        let done = retry(|| {
            // SAFETY: as in `read_from`; the kernel only reads the pieces.
            unsafe {
                match offset {
                    Some(at) => libc::pwritev(file.as_raw_fd(), iovecs.as_ptr(), count, file_offset(at)),
                    None => libc::writev(file.as_raw_fd(), iovecs.as_ptr(), count),
                }
            }
        })?;
        self.skip(done);
        Ok(done)
    }
}

/// Pieces of guest memory that stay usable for as long as this lives, whoever else goes: for I/O in flight.
#[derive(Clone)]
pub struct Held {
    // 'static is not so: the pieces live as long as `_memory`, which goes last, and they leave only by `with`, which
    // no borrow of them survives.
    buffers: Buffers<'static>,
    _memory: Memory,
}

// SAFETY: what keeps `Buffers` on one thread are the addresses in it, of guest memory that any thread may use.
unsafe impl Send for Held {}

impl Held {
    /// Works on the pieces.
    pub fn with<T>(&mut self, work: impl FnOnce(&mut Buffers<'_>) -> T) -> T {
        work(&mut self.buffers)
    }

    /// The pieces as the kernel takes them.
    #[must_use]
    pub fn iovecs(&self) -> Vec<libc::iovec> {
        self.buffers.iovecs()
    }
}

impl<'m> Buffers<'m> {
    /// Keeps what is left, and the memory that it is in.
    #[must_use]
    pub fn hold(self, memory: &Memory) -> Held {
        // SAFETY: only the lifetime changes. `Held` keeps `memory`, and with it the mapping that the pieces point to,
        // until after they are gone, and hands them out only for the time of a call.
        let buffers = unsafe { std::mem::transmute::<Buffers<'m>, Buffers<'static>>(self) };
        Held { buffers, _memory: memory.clone() }
    }
}

fn too_short(want: usize) -> io::Error {
    io::Error::new(io::ErrorKind::UnexpectedEof, format!("the descriptor chain has no {want} bytes left"))
}

fn count(iovecs: &[libc::iovec]) -> i32 {
    i32::try_from(iovecs.len().min(MAX_PIECES)).unwrap_or(1)
}

/// Offsets that no file can have become one that the kernel refuses.
fn file_offset(at: u64) -> i64 {
    i64::try_from(at).unwrap_or(i64::MAX)
}

fn retry(mut call: impl FnMut() -> isize) -> io::Result<usize> {
    loop {
        if let Ok(done) = usize::try_from(call()) {
            return Ok(done);
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

/// Has the host take back `len` bytes of guest memory at `gpa`: they read as zeroes until they are written again.
///
/// # Errors
/// Where they are not guest memory, or the host refuses.
pub fn give_back(memory: &Memory, gpa: GuestAddress, len: usize) -> io::Result<()> {
    for piece in GuestMemoryBackend::get_slices(&**memory, gpa, len) {
        let piece = piece.map_err(|_| io::Error::other(format!("{len} bytes at {gpa:?} are not guest memory")))?;
        release(&piece)?;
    }
    Ok(())
}

impl Buffers<'_> {
    /// Has the host take back all that is left, as [`give_back`] does.
    ///
    /// # Errors
    /// Where the host refuses.
    pub fn give_back(&self) -> io::Result<()> {
        self.rest().iter().try_for_each(release)
    }
}

fn release(piece: &VolatileSlice<'_>) -> io::Result<()> {
    // SAFETY: the range is guest memory, mapped private and anonymous by its owner; no Rust object lies in it. The
    // guest said that it does not use it; where it lies, it finds zeroes.
    let result = unsafe { libc::madvise(piece.ptr_guard_mut().as_ptr().cast(), piece.len(), libc::MADV_DONTNEED) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// A little-endian number of the guest's memory.
///
/// # Errors
/// Where `gpa` is not guest memory.
pub fn read_u16(memory: &Memory, gpa: GuestAddress) -> io::Result<u16> {
    memory.read_obj::<u16>(gpa).map(u16::from_le).map_err(io::Error::other)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::os::fd::AsFd;

    fn memory() -> Memory {
        let ranges = [(GuestAddress(0), 0x2000), (GuestAddress(0x2000), 0x1000), (GuestAddress(0x10_0000), 0x1000)];
        Memory::new(GuestMemoryMmap::from_ranges(&ranges).expect("small"), Arc::new(()))
    }

    #[test]
    fn what_is_not_guest_memory_is_refused() {
        let memory = memory();
        let mut buffers = Buffers::default();
        buffers.push(&memory, GuestAddress(0x1ff0), 0x20).expect("two regions in a row");
        assert_eq!(buffers.iovecs().len(), 2);
        for (gpa, len) in [(0x2ff0, 0x20), (0x5000, 1), (u64::MAX - 1, 16), (0x10_0000, u32::MAX)] {
            assert!(Buffers::default().push(&memory, GuestAddress(gpa), len).is_err(), "{gpa:#x}");
        }
        assert!(give_back(&memory, GuestAddress(0x2000), 0x2000).is_err());
    }

    #[test]
    fn files_are_read_and_written_across_pieces() {
        let memory = memory();
        let mut file = tempfile::tempfile().expect("a file");
        let mut out = Buffers::default();
        memory.write_slice(b"0123456789", GuestAddress(0x1ffb)).expect("there");
        out.push(&memory, GuestAddress(0x1ffb), 10).expect("there");
        assert_eq!(out.write_to(file.as_fd(), Some(4)).expect("written"), 10);
        assert!(out.is_empty());
        let mut back = Buffers::default();
        back.push(&memory, GuestAddress(0x10_0000), 3).expect("there");
        back.push(&memory, GuestAddress(0x100), 100).expect("there");
        assert_eq!(back.read_from(file.as_fd(), Some(4)).expect("read"), 10);
        assert_eq!(back.len(), 93);
        let mut seen = [0; 7];
        memory.read_slice(&mut seen, GuestAddress(0x100)).expect("there");
        assert_eq!(&seen, b"3456789");
        io::Write::write_all(&mut file, b"x").expect("the file's own position did not move");
        assert!(back.read_from(file.as_fd(), Some(u64::MAX)).is_err());
    }

    proptest! {
        #[test]
        fn a_stream_of_pieces_is_one_stream(
            pieces in proptest::collection::vec((0_u64..0x2f00, 0_u32..200), 0..8),
            steps in proptest::collection::vec(0_usize..150, 0..12),
        ) {
            let memory = memory();
            for at in 0..0x3000_u64 {
                memory.write_obj((at % 251) as u8, GuestAddress(at)).unwrap();
            }
            let mut buffers = Buffers::default();
            let mut expected = Vec::new();
            for (gpa, len) in pieces {
                buffers.push(&memory, GuestAddress(gpa), len).unwrap();
                expected.extend((gpa..gpa + u64::from(len)).map(|at| (at % 251) as u8));
            }
            let mut seen = Vec::new();
            for (index, step) in steps.into_iter().enumerate() {
                if index % 2 == 0 {
                    let mut data = vec![0; step];
                    let count = buffers.read(&mut data);
                    seen.extend(&data[..count]);
                } else {
                    seen.extend(buffers.split_to(step).to_vec());
                }
                prop_assert_eq!(buffers.len(), expected.len() - seen.len());
            }
            seen.extend(buffers.to_vec());
            prop_assert_eq!(seen, expected);
        }
    }
}
