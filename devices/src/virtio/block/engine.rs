//! I/O between guest memory and an image: by io_uring for raw images, where the host has it, otherwise by system calls on the
//! queue's thread, which may block.

use super::image::{Content, FirstSector, Image, Qcow2Image};
use super::magic::{self, ForeignFormat};
use super::options::{Durability, IoEngine};
use super::request::{Operation, SECTOR_BYTES};
use super::uring::Ring;
use crate::memory::{Buffers, OwnedBuffers};
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, PoisonError};
use thiserror::Error;

/// Size in bytes of the buffer for I/O that cannot access guest memory directly.
const BOUNCE_BYTES: usize = 256 << 10;
/// Alignment in bytes of that buffer.
const BOUNCE_ALIGNMENT: usize = 4096;
/// Alignment in bytes that `O_DIRECT` needs of guest memory.
const DIRECT_ALIGNMENT: usize = 512;

/// The state of an operation that was started.
pub(super) enum Started {
    /// It has completed, with this result.
    Done(io::Result<()>),
    /// [`Ring::reap`] will return its result.
    Pending,
}

/// How data moves between guest memory and the image.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Transfer {
    /// The host accesses guest memory.
    Direct,
    /// Through a buffer, as guest memory is not aligned as the image needs it (`O_DIRECT`).
    Bounced,
    /// Written through a buffer whose first sector is checked: what was checked is what is written, whatever the guest does to
    /// its memory meanwhile.
    Checked,
}

/// A guest wrote the magic number of another format to a raw disk.
#[derive(Debug, Error)]
#[error(
    "the first sector would make the disk a {0} image, and the disk's format was detected: refused (format=raw permits it)"
)]
struct ChangesFormat(ForeignFormat);

/// Files and images of other crates have io::Error for every operation on a disk, and so have the operations here.
impl From<ChangesFormat> for io::Error {
    fn from(error: ChangesFormat) -> Self {
        Self::new(io::ErrorKind::PermissionDenied, error)
    }
}

/// The I/O of one queue.
pub(super) struct Engine {
    image: Arc<Image>,
    ring: Option<Ring>,
    durability: Durability,
}

/// Makes an io_uring for `image`, where it is a raw one and the host has io_uring.
pub(super) fn new_ring(image: &Image, io_engine: IoEngine) -> Option<Ring> {
    match (&image.content, io_engine) {
        (Content::Raw(file, _), IoEngine::Async) => Ring::new(file)
            .inspect_err(|error| log::info!("block: io_uring is not available, using system calls: {error}"))
            .ok(),
        (Content::Raw(..), IoEngine::Sync) | (Content::Qcow2(_), _) => None,
    }
}

impl Engine {
    /// Makes the I/O of a queue, by `ring` where there is one.
    pub(super) fn new(image: &Arc<Image>, mut ring: Option<Ring>, durability: Durability) -> Self {
        if let Some(ring) = &mut ring {
            ring.set_durability(durability);
        }
        Self { image: Arc::clone(image), ring, durability }
    }

    /// Waits for all operations and returns the io_uring, where there is one that can be used again.
    pub(super) fn take_ring(&mut self) -> Option<Ring> {
        let mut ring = self.ring.take().filter(|ring| !ring.is_broken())?;
        match ring.drain() {
            Ok(_) => Some(ring),
            Err(error) => {
                log::error!("block: cannot wait for the operations in flight: {error}");
                None
            }
        }
    }

    /// Returns when written data must be on stable storage.
    pub(super) fn durability(&self) -> Durability {
        self.durability
    }

    /// Returns the io_uring, where there is one.
    pub(super) fn ring(&mut self) -> Option<&mut Ring> {
        self.ring.as_mut()
    }

    /// Starts `operation` on `data`; `token` identifies its completion. Returns the data where the ring is full.
    pub(super) fn start(
        &mut self,
        operation: Operation,
        mut data: OwnedBuffers,
        token: usize,
    ) -> Result<Started, OwnedBuffers> {
        let transfer = self.transfer(operation, &mut data);
        if let Some(ring) = self.ring.as_mut().filter(|_| transfer == Transfer::Direct) {
            match operation {
                Operation::Read { at } => return ring.read(at, data, token).map(|()| Started::Pending),
                Operation::Write { at } => return ring.write(at, data, token).map(|()| Started::Pending),
                Operation::Flush => return ring.flush(data, token).map(|()| Started::Pending),
                Operation::Id | Operation::Discard { .. } | Operation::WriteZeroes { .. } => {}
            }
        }
        Ok(Started::Done(data.with(|data| self.run_sync(operation, data, transfer))))
    }

    fn transfer(&self, operation: Operation, data: &mut OwnedBuffers) -> Transfer {
        // A write that has bytes of the first sector begins there, as requests are whole sectors.
        match (&self.image.content, operation) {
            (Content::Raw(_, FirstSector::Guarded), Operation::Write { at }) if at < SECTOR_BYTES => Transfer::Checked,
            _ if self.image.is_direct() && !data.with(|data| data.is_aligned(DIRECT_ALIGNMENT)) => Transfer::Bounced,
            _ => Transfer::Direct,
        }
    }

    /// Runs an operation to its end.
    fn run_sync(&self, operation: Operation, data: &mut Buffers<'_>, transfer: Transfer) -> io::Result<()> {
        match &self.image.content {
            Content::Raw(file, _) => {
                run_raw(file, operation, data, transfer)?;
                let writes = !matches!(operation, Operation::Read { .. } | Operation::Id);
                if self.durability == Durability::EachWrite && writes { file.sync_data() } else { Ok(()) }
            }
            Content::Qcow2(image) => self.run_qcow2(image, operation, data),
        }
    }

    /// Runs an operation on a qcow2 image. No lock is held while guest memory is accessed, which may wait for the host.
    fn run_qcow2(&self, lock: &Qcow2Image, operation: Operation, data: &mut Buffers<'_>) -> io::Result<()> {
        let image = || lock.read().unwrap_or_else(PoisonError::into_inner);
        match operation {
            Operation::Read { at } => bounce(data, at, |chunk, at, data| {
                image().read(&mut *chunk, at)?;
                data.write(chunk);
                Ok(())
            })?,
            Operation::Write { at } => bounce(data, at, |chunk, at, data| {
                data.read(chunk);
                image().write(&*chunk, at)
            })?,
            // imago writes data and tables before what points to them, so that the image is valid after a crash.
            Operation::Flush => {
                let image = image();
                return image.flush().and_then(|()| image.sync());
            }
            Operation::WriteZeroes { at, len, .. } => image().write_zeroes(at, len)?,
            Operation::Discard { at, len } => {
                let mut image = lock.write().unwrap_or_else(PoisonError::into_inner);
                return unless_unsupported(image.discard_to_any(at, len));
            }
            Operation::Id => {}
        }
        let writes = matches!(operation, Operation::Write { .. } | Operation::WriteZeroes { .. });
        if self.durability == Durability::EachWrite && writes {
            let image = image();
            image.flush().and_then(|()| image.sync())
        } else {
            Ok(())
        }
    }
}

fn run_raw(file: &File, operation: Operation, data: &mut Buffers<'_>, transfer: Transfer) -> io::Result<()> {
    use rustix::fs::FallocateFlags as Flags;
    match operation {
        Operation::Read { at } if transfer != Transfer::Direct => bounce(data, at, |chunk, at, data| {
            file.read_exact_at(chunk, at)?;
            data.write(chunk);
            Ok(())
        }),
        Operation::Write { at } if transfer != Transfer::Direct => bounce(data, at, |chunk, at, data| {
            data.read(chunk);
            if at == 0 && transfer == Transfer::Checked {
                check_first_sector(chunk)?;
            }
            file.write_all_at(chunk, at)
        }),
        Operation::Read { at } => repeat(data, at, |data, at| data.read_from(file.as_fd(), Some(at))),
        Operation::Write { at } => repeat(data, at, |data, at| data.write_to(file.as_fd(), Some(at))),
        Operation::Flush => file.sync_data(),
        Operation::Id => Ok(()),
        Operation::Discard { at, len } => {
            unless_unsupported(allocate(file, Flags::PUNCH_HOLE | Flags::KEEP_SIZE, at, len))
        }
        Operation::WriteZeroes { at, len, unmap } => {
            let flags = if unmap { Flags::PUNCH_HOLE } else { Flags::ZERO_RANGE };
            match allocate(file, flags | Flags::KEEP_SIZE, at, len) {
                Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => write_zeroes(file, at, len),
                result => result,
            }
        }
    }
}

/// # Errors
/// [`ChangesFormat`] where `written`, the start of a disk, has the magic number of an image format, and an error where it is
/// shorter than a sector.
fn check_first_sector(written: &[u8]) -> io::Result<()> {
    let start = written.first_chunk().ok_or(io::ErrorKind::InvalidInput)?;
    magic::detect(start).map_or(Ok(()), |format| Err(ChangesFormat(format).into()))
}

fn allocate(file: &File, flags: rustix::fs::FallocateFlags, at: u64, len: u64) -> io::Result<()> {
    if len == 0 {
        return Ok(());
    }
    rustix::fs::fallocate(file, flags, at, len).map_err(Into::into)
}

/// Ignores that the host cannot discard, as a discard is a hint.
fn unless_unsupported(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::Unsupported || error.raw_os_error() == Some(libc::EOPNOTSUPP) => {
            Ok(())
        }
        result => result,
    }
}

fn write_zeroes(file: &File, mut at: u64, len: u64) -> io::Result<()> {
    let mut chunk = Bounce::default();
    let end = at + len;
    while at < end {
        let part = usize::try_from(end - at).unwrap_or(BOUNCE_BYTES).min(BOUNCE_BYTES);
        file.write_all_at(&chunk.bytes()[..part], at)?;
        at += part as u64;
    }
    Ok(())
}

/// Repeats partial I/O until all of `data` is consumed.
fn repeat<'m>(
    data: &mut Buffers<'m>,
    mut at: u64,
    mut step: impl FnMut(&mut Buffers<'m>, u64) -> io::Result<usize>,
) -> io::Result<()> {
    while !data.is_empty() {
        let done = step(data, at)?;
        if done == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        at += done as u64;
    }
    Ok(())
}

/// A buffer of [`BOUNCE_BYTES`] in host memory, aligned to [`BOUNCE_ALIGNMENT`].
struct Bounce(Vec<u8>);

impl Default for Bounce {
    fn default() -> Self {
        Self(vec![0; BOUNCE_BYTES + BOUNCE_ALIGNMENT])
    }
}

impl Bounce {
    fn bytes(&mut self) -> &mut [u8] {
        let start = self.0.as_ptr().addr().next_multiple_of(BOUNCE_ALIGNMENT) - self.0.as_ptr().addr();
        &mut self.0[start..start + BOUNCE_BYTES]
    }
}

/// Moves all of `data` through a buffer in host memory, a chunk at a time.
fn bounce<'m>(
    data: &mut Buffers<'m>,
    mut at: u64,
    mut step: impl FnMut(&mut [u8], u64, &mut Buffers<'m>) -> io::Result<()>,
) -> io::Result<()> {
    let mut chunk = Bounce::default();
    while !data.is_empty() {
        let part = data.len().min(BOUNCE_BYTES);
        step(&mut chunk.bytes()[..part], at, data)?;
        at += part as u64;
    }
    Ok(())
}
