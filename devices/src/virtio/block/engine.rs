//! How data moves between guest memory and the image: by io_uring for raw files, where the host has it, else by plain
//! system calls on the queue's thread, which may wait.

use super::image::{Content, Image};
use super::request::Operation;
use super::uring::Ring;
use crate::memory::{Buffers, Held};
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, PoisonError};

/// Bytes moved at once where data must pass through host memory.
const BOUNCE_BYTES: usize = 256 << 10;
const BOUNCE_ALIGNMENT: usize = 4096;

/// What became of an operation that was started.
pub(super) enum Started {
    Done(io::Result<()>),
    /// [`Engine::reap`] tells.
    Pending,
}

/// One queue's way to the image.
pub(super) struct Engine {
    image: Arc<Image>,
    ring: Option<Ring>,
    /// The driver does not flush: each write must be durable when it is answered (virtio 1.3 §5.2.6.2).
    write_through: bool,
}

impl Engine {
    pub(super) fn new(image: &Arc<Image>, write_through: bool, plain: bool) -> Self {
        let ring = match &image.content {
            _ if plain => Err(io::ErrorKind::Unsupported.into()),
            Content::Raw(file) => file.try_clone().and_then(|file| Ring::new(file, write_through)),
            Content::Qcow2(_) => Err(io::ErrorKind::Unsupported.into()),
        };
        if let (Err(error), Content::Raw(_)) = (&ring, &image.content)
            && !plain
        {
            log::info!("block: no io_uring ({error}): plain system calls");
        }
        Self { image: Arc::clone(image), ring: ring.ok(), write_through }
    }

    /// The ring, where there is one.
    pub(super) fn ring(&mut self) -> Option<&mut Ring> {
        self.ring.as_mut()
    }

    /// Starts `operation` on `data`; `token` names it when it is done. Hands the data back where the ring is full.
    pub(super) fn start(&mut self, operation: Operation, mut data: Held, token: usize) -> Result<Started, Held> {
        let aligned = !self.image.is_direct() || data.with(|data| data.is_aligned(BOUNCE_ALIGNMENT.min(512)));
        if let Some(ring) = self.ring.as_mut().filter(|_| aligned) {
            match operation {
                Operation::Read { at } => return ring.read(at, data, token).map(|()| Started::Pending),
                Operation::Write { at } => return ring.write(at, data, token).map(|()| Started::Pending),
                Operation::Flush => return ring.flush(data, token).map(|()| Started::Pending),
                Operation::Id | Operation::Discard { .. } | Operation::WriteZeroes { .. } => {}
            }
        }
        Ok(Started::Done(data.with(|data| self.now(operation, data, aligned))))
    }

    /// Carries an operation out before it returns.
    fn now(&self, operation: Operation, data: &mut Buffers<'_>, aligned: bool) -> io::Result<()> {
        match &self.image.content {
            Content::Raw(file) => {
                raw(file, operation, data, aligned)?;
                let writes = !matches!(operation, Operation::Read { .. } | Operation::Id);
                if self.write_through && writes { file.sync_data() } else { Ok(()) }
            }
            Content::Qcow2(_) => self.qcow2(operation, data),
        }
    }

    fn qcow2(&self, operation: Operation, data: &mut Buffers<'_>) -> io::Result<()> {
        let Content::Qcow2(lock) = &self.image.content else { return Ok(()) };
        if let Operation::Discard { at, len } = operation {
            let mut image = lock.write().unwrap_or_else(PoisonError::into_inner);
            return unless_unsupported(image.discard_to_any(at, len));
        }
        let image = lock.read().unwrap_or_else(PoisonError::into_inner);
        match operation {
            Operation::Read { at } => bounce(data, at, |chunk, at, data| {
                image.read(&mut *chunk, at)?;
                data.write(chunk);
                Ok(())
            })?,
            Operation::Write { at } => bounce(data, at, |chunk, at, data| {
                data.read(chunk);
                image.write(&*chunk, at)
            })?,
            // To the disk, in an order that a crash survives: data and tables, then what points to them.
            Operation::Flush => return image.flush().and_then(|()| image.sync()),
            Operation::WriteZeroes { at, len, .. } => image.write_zeroes(at, len)?,
            Operation::Id | Operation::Discard { .. } => {}
        }
        let writes = matches!(operation, Operation::Write { .. } | Operation::WriteZeroes { .. });
        if self.write_through && writes { image.flush().and_then(|()| image.sync()) } else { Ok(()) }
    }
}

fn raw(file: &File, operation: Operation, data: &mut Buffers<'_>, aligned: bool) -> io::Result<()> {
    use rustix::fs::FallocateFlags as Flags;
    match operation {
        Operation::Read { at } if !aligned => bounce(data, at, |chunk, at, data| {
            file.read_exact_at(chunk, at)?;
            data.write(chunk);
            Ok(())
        }),
        Operation::Write { at } if !aligned => bounce(data, at, |chunk, at, data| {
            data.read(chunk);
            file.write_all_at(chunk, at)
        }),
        Operation::Read { at } => all(data, at, |data, at| data.read_from(file.as_fd(), Some(at))),
        Operation::Write { at } => all(data, at, |data, at| data.write_to(file.as_fd(), Some(at))),
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

fn allocate(file: &File, flags: rustix::fs::FallocateFlags, at: u64, len: u64) -> io::Result<()> {
    if len == 0 {
        return Ok(());
    }
    rustix::fs::fallocate(file, flags, at, len).map_err(Into::into)
}

/// A discard is a hint: a host that cannot is no error.
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

/// Repeats partial I/O until all of `data` is used up.
fn all<'m>(
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

/// Host memory at a multiple of [`BOUNCE_ALIGNMENT`].
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

/// Moves all of `data` through host memory, a chunk at a time.
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
