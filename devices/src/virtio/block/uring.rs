//! io_uring for one queue of a raw disk.

use crate::memory::Held;
use io_uring::{IoUring, opcode, squeue, types};
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Operations in flight at once.
const ENTRIES: u32 = 256;

#[derive(Clone, Copy)]
enum Kind {
    Read,
    Write,
    Flush,
}

struct InFlight {
    kind: Kind,
    at: u64,
    data: Held,
    /// What the kernel reads while it works; boxed, so that it stays where it is.
    iovecs: Box<[libc::iovec]>,
    token: usize,
}

// SAFETY: the raw pointers are the addresses of guest memory that `data` keeps mapped; only the kernel follows them.
unsafe impl Send for InFlight {}

/// A ring, and what is in flight on it.
pub(super) struct Ring {
    ring: IoUring,
    file: File,
    event: EventFd,
    slots: Vec<Option<InFlight>>,
    free: Vec<usize>,
    write_through: bool,
}

impl Ring {
    /// A ring for `file`.
    ///
    /// # Errors
    /// Where the host has no io_uring, or does not let us.
    pub(super) fn new(file: File, write_through: bool) -> io::Result<Self> {
        let ring = IoUring::new(ENTRIES)?;
        let event = EventFd::new(EFD_NONBLOCK)?;
        ring.submitter().register_eventfd(event.as_raw_fd())?;
        let count = ENTRIES as usize;
        let slots = (0..count).map(|_| None).collect();
        Ok(Self { ring, file, event, slots, free: (0..count).collect(), write_through })
    }

    /// Readable when something is done.
    pub(super) fn event(&self) -> &EventFd {
        &self.event
    }

    /// Whether anything is in flight.
    pub(super) fn is_idle(&self) -> bool {
        self.free.len() == self.slots.len()
    }

    pub(super) fn read(&mut self, at: u64, data: Held, token: usize) -> Result<(), Held> {
        self.start(Kind::Read, at, data, token)
    }

    pub(super) fn write(&mut self, at: u64, data: Held, token: usize) -> Result<(), Held> {
        self.start(Kind::Write, at, data, token)
    }

    pub(super) fn flush(&mut self, data: Held, token: usize) -> Result<(), Held> {
        self.start(Kind::Flush, 0, data, token)
    }

    fn start(&mut self, kind: Kind, at: u64, data: Held, token: usize) -> Result<(), Held> {
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
            Kind::Read => opcode::Readv::new(fd, flight.iovecs.as_ptr(), len).offset(flight.at).build(),
            Kind::Write => {
                let flags = if self.write_through { libc::RWF_DSYNC } else { 0 };
                opcode::Writev::new(fd, flight.iovecs.as_ptr(), len).offset(flight.at).rw_flags(flags).build()
            }
            Kind::Flush => opcode::Fsync::new(fd).flags(types::FsyncFlags::DATASYNC).build(),
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

    /// Hands everything that was started to the kernel.
    pub(super) fn submit(&mut self) {
        if let Err(error) = self.ring.submit() {
            log::error!("block: io_uring_enter: {error}");
        }
    }

    /// What is done: tokens and results. What was done in part is started again.
    pub(super) fn reap(&mut self) -> Vec<(usize, io::Result<()>)> {
        let _ = self.event.read();
        let mut done = Vec::new();
        let completions: Vec<(u64, i32)> =
            self.ring.completion().map(|entry| (entry.user_data(), entry.result())).collect();
        for (slot, result) in completions {
            let Ok(slot) = usize::try_from(slot) else { continue };
            let Some(mut flight) = self.slots.get_mut(slot).and_then(Option::take) else { continue };
            match progress(&mut flight, result) {
                Some(result) => {
                    self.free.push(slot);
                    done.push((flight.token, result));
                }
                None => {
                    flight.iovecs = flight.data.iovecs().into_boxed_slice();
                    let (entry, flight) = self.entry(slot, flight);
                    let token = flight.token;
                    self.slots[slot] = Some(flight);
                    if let Err(error) = self.push(&entry) {
                        self.slots[slot] = None;
                        self.free.push(slot);
                        done.push((token, Err(error)));
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

/// The end of an operation, or none where there is more to do.
fn progress(flight: &mut InFlight, result: i32) -> Option<io::Result<()>> {
    let Ok(bytes) = usize::try_from(result) else {
        return match -result {
            libc::EINTR | libc::EAGAIN => None,
            errno => Some(Err(io::Error::from_raw_os_error(errno))),
        };
    };
    match flight.kind {
        Kind::Flush => Some(Ok(())),
        Kind::Read | Kind::Write => {
            let left = flight.data.with(|data| {
                data.skip(bytes);
                data.len()
            });
            flight.at += bytes as u64;
            match (left, bytes) {
                (0, _) => Some(Ok(())),
                // The file ends here, or takes no more.
                (_, 0) => Some(Err(io::ErrorKind::UnexpectedEof.into())),
                _ => None,
            }
        }
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // The kernel may still write to guest memory: wait until it does not.
        while !self.is_idle() {
            if let Err(error) = self.ring.submit_and_wait(1)
                && error.kind() != io::ErrorKind::Interrupted
            {
                log::error!("block: waiting for I/O in flight: {error}");
                // Rather leak than free what the kernel still uses.
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
