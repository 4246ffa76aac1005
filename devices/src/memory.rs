//! Guest memory as devices see it, and vectored I/O between it and host files.
//!
//! Memory of a running guest is never a Rust slice, as the guest can change it at any time. It is only accessed by volatile
//! copies, or by the kernel (readv, writev, io_uring), which takes addresses.

use std::any::Any;
use std::io;
use std::ops::Deref;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;
use thiserror::Error;
use vm_memory::{ByteValued, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, VolatileSlice};

/// The most buffers of one vectored I/O (Linux: `UIO_MAXIOV`).
const MAX_IOVECS: usize = 1024;

/// Guest memory cannot be accessed as asked.
#[derive(Debug, Error)]
pub enum BufferError {
    /// The buffers of a descriptor chain are longer than 4 GiB in total (virtio 1.3 §2.7.5.2).
    #[error("the buffers of a descriptor chain have {0} bytes, more than 4 GiB")]
    TooLong(usize),
    /// A range is not, or not all, guest memory.
    #[error("the {len} bytes at {gpa:#x} are not guest memory")]
    OutsideMemory {
        /// First guest physical address of the range.
        gpa: u64,
        /// Length of the range in bytes.
        len: usize,
    },
    /// The buffers have fewer bytes left than an access needs.
    #[error("the descriptor chain has {left} bytes left, {wanted} are needed")]
    TooShort {
        /// Bytes that the access needs.
        wanted: usize,
        /// Bytes that are not consumed yet.
        left: usize,
    },
    /// The host refused to take memory back.
    #[error("madvise(MADV_DONTNEED) of {len} bytes of guest memory failed")]
    Discard {
        /// Length of the range in bytes.
        len: usize,
        /// The error of madvise(2).
        source: io::Error,
    },
}

fn outside_memory(gpa: GuestAddress, len: usize) -> BufferError {
    BufferError::OutsideMemory { gpa: gpa.0, len }
}

/// Guest memory, together with the owner of its mapping. Clones share both.
#[derive(Clone)]
pub struct Memory {
    memory: GuestMemoryMmap,
    _owner: Arc<dyn Any + Send + Sync>,
}

impl Memory {
    /// Wraps `memory`, which must stay mapped for as long as `owner` lives.
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

/// A list of buffers in guest memory, consumed from the front like a stream of bytes.
///
/// Not `Clone`: what was read is consumed, so that no byte is read twice. The guest could change it between a check and
/// its use.
#[derive(Default)]
pub struct Buffers<'m> {
    pieces: Vec<VolatileSlice<'m>>,
    /// Index of the first piece that is not consumed.
    next: usize,
    len: usize,
}

impl<'m> Buffers<'m> {
    /// Appends the `len` bytes at `gpa`.
    ///
    /// # Errors
    /// Returns [`BufferError::OutsideMemory`] where they are not all guest memory, and [`BufferError::TooLong`] where the
    /// total would be more than 4 GiB.
    pub fn push(&mut self, memory: &'m Memory, gpa: GuestAddress, len: u32) -> Result<(), BufferError> {
        let len = len as usize;
        let total = self.len.saturating_add(len);
        if u32::try_from(total).is_err() {
            return Err(BufferError::TooLong(total));
        }
        for piece in GuestMemoryBackend::get_slices(&**memory, gpa, len) {
            self.pieces.push(piece.map_err(|_| outside_memory(gpa, len))?);
        }
        self.len = total;
        Ok(())
    }

    /// Returns the number of bytes that are not consumed yet.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Returns true if all bytes are consumed.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Returns true if each buffer starts and ends at a host address that is a multiple of `alignment`.
    #[must_use]
    pub fn is_aligned(&self, alignment: usize) -> bool {
        self.rest().iter().all(|piece| {
            piece.ptr_guard().as_ptr().addr().is_multiple_of(alignment) && piece.len().is_multiple_of(alignment)
        })
    }

    fn rest(&self) -> &[VolatileSlice<'m>] {
        self.pieces.get(self.next..).unwrap_or(&[])
    }

    /// Consumes the first `count` bytes, or all where there are fewer.
    pub fn skip(&mut self, count: usize) {
        self.consume(count, |_, _| ());
    }

    /// Consumes up to `count` bytes and passes each piece to `each`, with its offset in the consumed bytes. Returns the
    /// number of bytes consumed.
    fn consume(&mut self, count: usize, mut each: impl FnMut(usize, &VolatileSlice<'m>)) -> usize {
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

    /// Splits the first `count` bytes off, or all where there are fewer.
    #[must_use]
    pub fn split_to(&mut self, count: usize) -> Self {
        let mut pieces = Vec::new();
        let len = self.consume(count, |_, piece| pieces.push(*piece));
        Self { pieces, next: 0, len }
    }

    /// Copies bytes to `data` and consumes them. Returns their number, less than `data` has where the buffers end.
    pub fn read(&mut self, data: &mut [u8]) -> usize {
        self.consume(data.len(), |at, piece| {
            if let Some(part) = data.get_mut(at..at + piece.len()) {
                piece.copy_to(part);
            }
        })
    }

    /// Reads an object and consumes its bytes.
    ///
    /// # Errors
    /// Returns [`BufferError::TooShort`] where too few bytes are left.
    pub fn read_obj<T: ByteValued + Default>(&mut self) -> Result<T, BufferError> {
        let mut object = T::default();
        let bytes = object.as_mut_slice();
        let (wanted, left) = (bytes.len(), self.len);
        if self.read(bytes) == wanted { Ok(object) } else { Err(BufferError::TooShort { wanted, left }) }
    }

    /// Copies `data` to the buffers and consumes the bytes written. Returns their number, less than `data` has where the
    /// buffers end.
    pub fn write(&mut self, data: &[u8]) -> usize {
        self.consume(data.len(), |at, piece| {
            if let Some(part) = data.get(at..at + piece.len()) {
                piece.copy_from(part);
            }
        })
    }

    /// Consumes all bytes and returns a copy of them.
    #[must_use]
    pub fn to_vec(&mut self) -> Vec<u8> {
        let mut data = vec![0; self.len];
        self.read(&mut data);
        data
    }

    /// Returns the buffers that are not consumed as iovecs. They are valid for as long as guest memory is mapped.
    #[must_use]
    pub fn iovecs(&self) -> Vec<libc::iovec> {
        let iovec = |piece: &VolatileSlice<'m>| libc::iovec {
            iov_base: piece.ptr_guard_mut().as_ptr().cast(),
            iov_len: piece.len(),
        };
        self.rest().iter().map(iovec).collect()
    }

    /// Reads from `file` to the buffers with one system call and consumes the bytes read. Reads at byte `offset` of the file,
    /// or at its current position. Returns the number of bytes; 0 at the end of the file.
    ///
    /// # Errors
    /// Returns the error of preadv(2) or readv(2).
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

    /// Writes the buffers to `file` with one system call and consumes the bytes written. Writes at byte `offset` of the file,
    /// or at its current position. Returns the number of bytes.
    ///
    /// # Errors
    /// Returns the error of pwritev(2) or writev(2).
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

/// [`Buffers`] that keep guest memory mapped, for I/O in flight.
pub struct OwnedBuffers {
    // The lifetime is not really 'static: the pieces are valid as long as `_memory`, which is dropped last. They are only
    // accessible in `with`, and no borrow of them outlives that call.
    buffers: Buffers<'static>,
    _memory: Memory,
}

/// A second handle to the data of a block request, which is transferred again where the host had no space. No decision
/// depends on the content of that data.
impl Clone for OwnedBuffers {
    fn clone(&self) -> Self {
        let Buffers { pieces, next, len } = &self.buffers;
        let buffers = Buffers { pieces: pieces.clone(), next: *next, len: *len };
        Self { buffers, _memory: self._memory.clone() }
    }
}

// SAFETY: `Buffers` is not Send because of the addresses in it. They are of guest memory, which any thread may access.
unsafe impl Send for OwnedBuffers {}

impl OwnedBuffers {
    /// Calls `work` with the buffers.
    pub fn with<T>(&mut self, work: impl FnOnce(&mut Buffers<'_>) -> T) -> T {
        work(&mut self.buffers)
    }

    /// Returns the buffers that are not consumed as iovecs. They are valid for as long as this lives.
    #[must_use]
    pub fn iovecs(&self) -> Vec<libc::iovec> {
        self.buffers.iovecs()
    }
}

impl<'m> Buffers<'m> {
    /// Converts to buffers that keep `memory`, which they must be in, mapped.
    #[must_use]
    pub fn into_owned(self, memory: &Memory) -> OwnedBuffers {
        // SAFETY: only the lifetime changes. `OwnedBuffers` keeps `memory`, and with it the mapping that the pieces point
        // to, until after they are dropped, and lends them for the time of a call only.
        let buffers = unsafe { std::mem::transmute::<Buffers<'m>, Buffers<'static>>(self) };
        OwnedBuffers { buffers, _memory: memory.clone() }
    }
}

fn count(iovecs: &[libc::iovec]) -> i32 {
    i32::try_from(iovecs.len().min(MAX_IOVECS)).unwrap_or(1)
}

/// Converts an offset; one that no file can have becomes one that the kernel refuses.
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

/// Discards the `len` bytes of guest memory at `gpa`: the host takes the memory back, and the guest reads zeros until it
/// writes there again.
///
/// # Errors
/// Returns an error where the range is not all guest memory, or where madvise(2) fails.
pub fn discard(memory: &Memory, gpa: GuestAddress, len: usize) -> Result<(), BufferError> {
    for piece in GuestMemoryBackend::get_slices(&**memory, gpa, len) {
        discard_piece(&piece.map_err(|_| outside_memory(gpa, len))?)?;
    }
    Ok(())
}

impl Buffers<'_> {
    /// Discards the buffers that are not consumed, as [`discard`] does.
    ///
    /// # Errors
    /// Returns an error where madvise(2) fails, such as for buffers that are not whole host pages.
    pub fn discard(&self) -> Result<(), BufferError> {
        self.rest().iter().try_for_each(discard_piece)
    }
}

fn discard_piece(piece: &VolatileSlice<'_>) -> Result<(), BufferError> {
    // SAFETY: the range is guest memory, mapped private and anonymous by its owner; no Rust object is in it. The guest
    // offered it for discarding; if it still uses it, it reads zeros.
    let result = unsafe { libc::madvise(piece.ptr_guard_mut().as_ptr().cast(), piece.len(), libc::MADV_DONTNEED) };
    if result == 0 {
        Ok(())
    } else {
        Err(BufferError::Discard { len: piece.len(), source: io::Error::last_os_error() })
    }
}

/// Reads a little-endian 16-bit number from guest memory.
///
/// # Errors
/// Returns [`BufferError::OutsideMemory`] where `gpa` is not guest memory.
pub fn read_u16(memory: &Memory, gpa: GuestAddress) -> Result<u16, BufferError> {
    memory.read_obj::<u16>(gpa).map(u16::from_le).map_err(|_| outside_memory(gpa, size_of::<u16>()))
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
        assert!(discard(&memory, GuestAddress(0x2000), 0x2000).is_err());
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
