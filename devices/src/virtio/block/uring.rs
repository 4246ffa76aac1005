//! The io_uring of one queue of a block device with a raw image.

use super::options::Durability;
use crate::memory::OwnedBuffers;
use io_uring::register::Restriction;
use io_uring::{IoUring, cqueue, opcode, squeue, types};
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// The most operations in flight.
const ENTRIES: u32 = 256;

/// How long the kernel may be short of what an operation needs.
const SHORTAGE: Duration = Duration::from_secs(5);
/// How long to wait before it is asked again.
const SHORTAGE_STEP: Duration = Duration::from_millis(5);

/// The image in the ring's table of registered files, the only file that operations can name.
const IMAGE: types::Fixed = types::Fixed(0);

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
    event: EventFd,
    slots: Vec<Option<InFlight>>,
    free: Vec<usize>,
    durability: Durability,
    /// Operations were given up that the kernel may still do.
    is_broken: bool,
}

impl Ring {
    /// Makes an io_uring that can read, write and flush `file` and do nothing else. System calls by way of an io_uring are
    /// not seen by seccomp, so the ring itself is restricted before it is enabled.
    ///
    /// # Errors
    /// Returns an error where the host has no io_uring with restrictions (Linux 5.10) or does not permit it.
    pub(super) fn new(file: &File) -> io::Result<Self> {
        let ring = IoUring::builder().setup_r_disabled().build(ENTRIES)?;
        let event = EventFd::new(EFD_NONBLOCK)?;
        let submitter = ring.submitter();
        submitter.register_eventfd(event.as_raw_fd())?;
        submitter.register_files(&[file.as_raw_fd()])?;
        submitter.register_restrictions(&mut restrictions())?;
        submitter.register_enable_rings()?;
        let count = ENTRIES as usize;
        let slots = (0..count).map(|_| None).collect();
        Ok(Self { ring, event, slots, free: (0..count).collect(), durability: Durability::EachWrite, is_broken: false })
    }

    /// Returns the eventfd that is readable when operations have completed.
    pub(super) fn event(&self) -> &EventFd {
        &self.event
    }

    /// Sets when the data of the writes that follow must be on stable storage; at first, with each write.
    pub(super) fn set_durability(&mut self, durability: Durability) {
        self.durability = durability;
    }

    /// Returns true if operations were given up that the kernel may still do, to guest memory as well. The ring must not be used again.
    pub(super) fn is_broken(&self) -> bool {
        self.is_broken
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
        let len = u32::try_from(flight.iovecs.len().min(1024)).unwrap_or(1);
        let entry = match flight.kind {
            OperationKind::Read => opcode::Readv::new(IMAGE, flight.iovecs.as_ptr(), len).offset(flight.at).build(),
            OperationKind::Write => {
                let flags = if self.durability == Durability::EachWrite { libc::RWF_DSYNC } else { 0 };
                opcode::Writev::new(IMAGE, flight.iovecs.as_ptr(), len).offset(flight.at).rw_flags(flags).build()
            }
            OperationKind::Flush => opcode::Fsync::new(IMAGE).flags(types::FsyncFlags::DATASYNC).build(),
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

/// What a ring permits: reads, writes and flushes of registered files, and no further registration.
fn restrictions() -> [Restriction; 4] {
    // IOSQE_FIXED_FILE (io_uring_enter(2)).
    const FIXED_FILE: u8 = 1;
    [
        Restriction::sqe_op(opcode::Readv::CODE),
        Restriction::sqe_op(opcode::Writev::CODE),
        Restriction::sqe_op(opcode::Fsync::CODE),
        Restriction::sqe_flags_required(FIXED_FILE),
    ]
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

impl Ring {
    /// Waits until an operation in flight has completed, and returns as [`Ring::reap`] does.
    ///
    /// # Errors
    /// Returns the error of io_uring_enter(2). The ring must not be used again then.
    pub(super) fn wait(&mut self) -> io::Result<Vec<Completion>> {
        let start = Instant::now();
        while let Err(error) = self.ring.submit_and_wait(1) {
            match error.raw_os_error() {
                Some(libc::EINTR) => break,
                // The kernel is short of memory, or has completions for which the ring has no room (EBUSY): those are reaped.
                Some(libc::EAGAIN | libc::ENOMEM | libc::EBUSY) if start.elapsed() < SHORTAGE => {
                    if !self.ring.completion().is_empty() {
                        break;
                    }
                    std::thread::sleep(SHORTAGE_STEP);
                    continue;
                }
                _ => {}
            }
            // Leaked, as the kernel still uses the memory.
            std::mem::forget(std::mem::take(&mut self.slots));
            self.free.clear();
            self.is_broken = true;
            return Err(error);
        }
        Ok(self.reap())
    }

    /// Waits until no operation is in flight. Those that completed in part go on to their end. The kernel accesses guest memory
    /// until then.
    ///
    /// # Errors
    /// Returns the error of io_uring_enter(2). The ring must not be used again then.
    pub(super) fn drain(&mut self) -> io::Result<Vec<Completion>> {
        let mut done = Vec::new();
        while !self.is_idle() {
            done.extend(self.wait()?);
        }
        Ok(done)
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        if let Err(error) = self.drain() {
            log::error!("block: cannot wait for the operations in flight: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{Buffers, Memory};
    use std::ffi::CString;
    use std::io::Write;
    use std::os::unix::fs::FileExt;
    use std::sync::Arc;
    use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

    /// Submits one operation of a hostile program that has taken over the ring. Returns its result.
    fn submit(ring: &mut Ring, entry: &squeue::Entry) -> i32 {
        // SAFETY: what the entry points to lives until the wait below has returned.
        unsafe { ring.ring.submission().push(entry) }.expect("room");
        ring.ring.submit_and_wait(1).expect("submitted");
        ring.ring.completion().next().expect("a completion").result()
    }

    fn ring() -> (Ring, File) {
        let mut file = tempfile::tempfile().expect("a file");
        file.write_all(&[7; 512]).expect("written");
        (Ring::new(&file).expect("an io_uring"), file)
    }

    #[test]
    fn the_ring_reads_its_image_and_nothing_else() {
        let (mut ring, file) = ring();
        let mut bytes = [0_u8; 512];
        let iovec = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
        let read = opcode::Readv::new(IMAGE, &raw const iovec, 1).build();
        assert_eq!(submit(&mut ring, &read), 512);
        assert_eq!(bytes, [7; 512]);
        let other = opcode::Readv::new(types::Fd(file.as_raw_fd()), &raw const iovec, 1).build();
        assert_eq!(submit(&mut ring, &other), -libc::EACCES, "a file that is not registered");
        let path = CString::new("/etc/passwd").expect("a path");
        let open = opcode::OpenAt::new(types::Fd(libc::AT_FDCWD), path.as_ptr()).build();
        assert_eq!(submit(&mut ring, &open), -libc::EACCES, "another operation");
    }

    #[test]
    fn nothing_can_be_registered_later() {
        let (ring, file) = ring();
        let submitter = ring.ring.submitter();
        let denied = |result: io::Result<usize>| result.err().and_then(|error| error.raw_os_error());
        assert_eq!(denied(submitter.register_files_update(0, &[file.as_raw_fd()])), Some(libc::EACCES));
        assert_eq!(denied(submitter.register_restrictions(&mut restrictions()).map(|()| 0)), Some(libc::EACCES));
    }

    /// The kernel takes 1024 buffers at once: a longer operation completes in part, as one does that a signal interrupts.
    #[test]
    fn an_operation_that_completed_in_part_goes_on_while_the_ring_is_drained() {
        const PARTS: u64 = 2500;
        let (mut ring, file) = ring();
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 4 << 20)]).expect("memory");
        let memory = Memory::new(memory, Arc::new(()));
        let part = |index: u64| [u8::try_from(index % 251).expect("small"); 512];
        let mut buffers = Buffers::default();
        for index in 0..PARTS {
            let gpa = GuestAddress(index * 1024);
            memory.write_slice(&part(index), gpa).expect("memory");
            buffers.push(&memory, gpa, 512).expect("in memory");
        }
        assert!(ring.write(0, buffers.into_owned(&memory), 7).is_ok());
        let done = ring.drain().expect("completed");
        assert!(matches!(done.as_slice(), [Completion { token: 7, result: Ok(()) }]));
        for index in 0..PARTS {
            let mut written = [0; 512];
            file.read_exact_at(&mut written, index * 512).expect("written");
            assert_eq!(written, part(index), "{index}");
        }
    }
}
