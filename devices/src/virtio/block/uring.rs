//! The io_uring of one queue of a block device with a raw image.

use super::options::Durability;
use crate::memory::OwnedBuffers;
use io_uring::{IoUring, cqueue, opcode, squeue, types};
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// The most operations in flight.
const ENTRIES: u32 = 256;

#[derive(Clone, Copy)]
enum OperationKind {
    Read,
    Write,
    Flush,
}

struct InFlight {
    kind: OperationKind,
    /// Offset in the file, in bytes.
    at: u64,
    data: OwnedBuffers,
    /// Read by the kernel while the operation is in flight; boxed, so that its address does not change.
    iovecs: Box<[libc::iovec]>,
    token: usize,
}

// SAFETY: the raw pointers are addresses of guest memory that `data` keeps mapped; only the kernel dereferences them.
unsafe impl Send for InFlight {}

/// The end of an operation.
pub(super) struct Completion {
    /// The token that the operation was started with.
    pub(super) token: usize,
    pub(super) result: io::Result<()>,
}

/// An io_uring with its operations in flight.
pub(super) struct Ring {
    ring: IoUring,
    file: File,
    event: EventFd,
    slots: Vec<Option<InFlight>>,
    free: Vec<usize>,
    durability: Durability,
}

impl Ring {
    /// Makes an io_uring for `file`.
    ///
    /// # Errors
    /// Returns an error where the host has no io_uring or does not permit it.
    pub(super) fn new(file: File, durability: Durability) -> io::Result<Self> {
        let ring = IoUring::new(ENTRIES)?;
        let event = EventFd::new(EFD_NONBLOCK)?;
        ring.submitter().register_eventfd(event.as_raw_fd())?;
        let count = ENTRIES as usize;
        let slots = (0..count).map(|_| None).collect();
        Ok(Self { ring, file, event, slots, free: (0..count).collect(), durability })
    }

    /// Returns the eventfd that is readable when operations have completed.
    pub(super) fn event(&self) -> &EventFd {
        &self.event
    }

    /// Returns true if no operation is in flight.
    pub(super) fn is_idle(&self) -> bool {
        self.free.len() == self.slots.len()
    }

    pub(super) fn read(&mut self, at: u64, data: OwnedBuffers, token: usize) -> Result<(), OwnedBuffers> {
        self.start(OperationKind::Read, at, data, token)
    }

    pub(super) fn write(&mut self, at: u64, data: OwnedBuffers, token: usize) -> Result<(), OwnedBuffers> {
        self.start(OperationKind::Write, at, data, token)
    }

    pub(super) fn flush(&mut self, data: OwnedBuffers, token: usize) -> Result<(), OwnedBuffers> {
        self.start(OperationKind::Flush, 0, data, token)
    }

    fn start(&mut self, kind: OperationKind, at: u64, data: OwnedBuffers, token: usize) -> Result<(), OwnedBuffers> {
        let Some(slot) = self.free.pop() else { return Err(data) };
        let iovecs = data.iovecs().into_boxed_slice();
        let (entry, flight) = self.entry(slot, InFlight { kind, at, data, iovecs, token });
        self.slots[slot] = Some(flight);
        if self.push(&entry).is_err() {
            self.free.push(slot);
            return self.slots[slot].take().map_or(Ok(()), |flight| Err(flight.data));
        }
        Ok(())
    }

    fn entry(&self, slot: usize, flight: InFlight) -> (squeue::Entry, InFlight) {
        let fd = types::Fd(self.file.as_raw_fd());
        let len = u32::try_from(flight.iovecs.len().min(1024)).unwrap_or(1);
        let entry = match flight.kind {
            OperationKind::Read => opcode::Readv::new(fd, flight.iovecs.as_ptr(), len).offset(flight.at).build(),
            OperationKind::Write => {
                let flags = if self.durability == Durability::EachWrite { libc::RWF_DSYNC } else { 0 };
                opcode::Writev::new(fd, flight.iovecs.as_ptr(), len).offset(flight.at).rw_flags(flags).build()
            }
            OperationKind::Flush => opcode::Fsync::new(fd).flags(types::FsyncFlags::DATASYNC).build(),
        };
        (entry.user_data(slot as u64), flight)
    }

    fn push(&mut self, entry: &squeue::Entry) -> io::Result<()> {
        // SAFETY: the entry's iovecs and the guest memory behind them live in `slots` until its completion is reaped,
        // and `drop` waits for all completions before they go.
        if unsafe { self.ring.submission().push(entry) }.is_ok() {
            return Ok(());
        }
        self.ring.submit()?;
        // SAFETY: as above.
        unsafe { self.ring.submission().push(entry) }.map_err(|_| io::ErrorKind::WouldBlock.into())
    }

    /// Submits all operations that were started to the kernel.
    pub(super) fn submit(&mut self) {
        if let Err(error) = self.ring.submit() {
            log::error!("block: cannot submit I/O (io_uring_enter): {error}");
        }
    }

    /// Returns the operations that have completed. Those that completed in part are started again for the rest.
    pub(super) fn reap(&mut self) -> Vec<Completion> {
        let _ = self.event.read();
        let mut done = Vec::new();
        let entries: Vec<cqueue::Entry> = self.ring.completion().collect();
        for entry in entries {
            let Ok(slot) = usize::try_from(entry.user_data()) else { continue };
            let Some(mut flight) = self.slots.get_mut(slot).and_then(Option::take) else { continue };
            match progress(&mut flight, entry.result()) {
                Some(result) => {
                    self.free.push(slot);
                    done.push(Completion { token: flight.token, result });
                }
                None => {
                    flight.iovecs = flight.data.iovecs().into_boxed_slice();
                    let (entry, flight) = self.entry(slot, flight);
                    let token = flight.token;
                    self.slots[slot] = Some(flight);
                    if let Err(error) = self.push(&entry) {
                        self.slots[slot] = None;
                        self.free.push(slot);
                        done.push(Completion { token, result: Err(error) });
                    }
                }
            }
        }
        if !self.ring.submission().is_empty() {
            self.submit();
        }
        done
    }
}

/// Returns the result of an operation, or `None` where a part of it is left.
fn progress(flight: &mut InFlight, result: i32) -> Option<io::Result<()>> {
    let Ok(bytes) = usize::try_from(result) else {
        return match -result {
            libc::EINTR | libc::EAGAIN => None,
            errno => Some(Err(io::Error::from_raw_os_error(errno))),
        };
    };
    match flight.kind {
        OperationKind::Flush => Some(Ok(())),
        OperationKind::Read | OperationKind::Write => {
            let left = flight.data.with(|data| {
                data.skip(bytes);
                data.len()
            });
            flight.at += bytes as u64;
            match (left, bytes) {
                (0, _) => Some(Ok(())),
                // The file ends here, or does not grow.
                (_, 0) => Some(Err(io::ErrorKind::UnexpectedEof.into())),
                _ => None,
            }
        }
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // The kernel accesses guest memory until all operations have completed.
        while !self.is_idle() {
            if let Err(error) = self.ring.submit_and_wait(1)
                && error.kind() != io::ErrorKind::Interrupted
            {
                log::error!("block: cannot wait for the operations in flight: {error}");
                // Leaked, as the kernel still uses the memory.
                std::mem::forget(std::mem::take(&mut self.slots));
                return;
            }
            let slots: Vec<u64> = self.ring.completion().map(|entry| entry.user_data()).collect();
            for slot in slots {
                if let Ok(slot) = usize::try_from(slot) {
                    self.slots[slot] = None;
                    self.free.push(slot);
                }
            }
        }
    }
}
