//! A bounce buffer between guest memory and fuse-backend-rs. That crate reads requests from and writes replies to a descriptor
//! chain of older versions of vm-memory and virtio-queue. So each request is copied to a queue of those versions, and the
//! reply back.

use super::guard::FsServer;
use crate::memory::Buffers;
use fuse_backend_rs::transport::{Reader, VirtioFsWriter, Writer};
use thiserror::Error;
use virtio_queue_017::desc::{RawDescriptor, split::Descriptor};
use virtio_queue_017::{Queue, QueueT};
use vm_memory_017::{Bytes, GuestAddress, GuestMemoryMmap};

/// Size in bytes of struct `fuse_in_header`: len, opcode, unique, nodeid, uid, gid, pid, padding.
const HEADER_BYTES: usize = 40;
/// The longest request or reply in bytes: 1 MiB of data, and headers (FUSE's own limit).
pub(super) const MAX_BYTES: usize = (1 << 20) + 0x1000;
/// The opcodes whose requests end with a name: LOOKUP, SYMLINK, MKNOD, MKDIR, UNLINK, RMDIR, RENAME, LINK, GETXATTR,
/// REMOVEXATTR, CREATE, RENAME2.
const NAMED: [u32; 12] = [1, 6, 8, 9, 10, 11, 12, 13, 22, 24, 35, 45];
/// The opcodes whose requests have data: WRITE, SETXATTR, BATCH_FORGET.
const WITH_DATA: [u32; 3] = [16, 21, 42];
/// The longest request without data in bytes: header, arguments, a name, and the target of a symbolic link (Linux:
/// `PATH_MAX`).
const MAX_WITHOUT_DATA: usize = 0x2000;

// Addresses in the buffer: descriptor table, available ring, used ring, request, reply.
const TABLE: u64 = 0;
const AVAILABLE: u64 = 0x100;
const USED: u64 = 0x200;
const REQUEST: u64 = 0x1000;
const REPLY: u64 = 0x20_0000;
/// Size of the buffer in bytes.
const TOTAL: usize = 0x40_0000;
/// Bytes copied at once.
const CHUNK: usize = 64 << 10;

/// A request cannot be handled at all.
#[derive(Debug, Error)]
pub(super) enum BounceError {
    /// The buffer cannot be allocated.
    #[error("cannot allocate the buffer for requests and replies")]
    Allocate(#[source] vm_memory_017::mmap::FromRangesError),
    /// The request is shorter than its header.
    #[error("a request has {0} bytes, fewer than the {HEADER_BYTES} of a header")]
    TooShort(usize),
    /// The request is longer than FUSE allows.
    #[error("a request has {0} bytes, more than {MAX_BYTES}")]
    TooLong(usize),
    /// The header gives a length that the request does not have.
    #[error("the header of a request says {said} bytes, and it has {bytes}")]
    Length {
        /// The length in the header.
        said: u32,
        /// The bytes that were copied.
        bytes: usize,
    },
    /// The request has no data, and is longer than its arguments and names can be.
    #[error("a request has {0} bytes, more than {MAX_WITHOUT_DATA} without data")]
    TooLongWithoutData(usize),
    /// The name at the end of the request has no terminating zero.
    #[error("the name in a request has no terminating zero")]
    Unterminated,
    /// The buffer cannot be accessed.
    #[error("cannot access the buffer for requests and replies")]
    Memory(#[from] vm_memory_017::GuestMemoryError),
    /// The queue in the buffer is invalid.
    #[error("cannot set up the queue for requests and replies")]
    Queue(#[from] virtio_queue_017::Error),
    /// The queue in the buffer has no chain.
    #[error("the queue for requests and replies is empty")]
    NoChain,
    /// fuse-backend-rs does not accept the descriptor chain.
    #[error("cannot read the descriptor chain of a request")]
    Transport(#[from] fuse_backend_rs::transport::Error),
    /// fuse-backend-rs cannot decode the request, or cannot write the reply.
    #[error("the file system cannot handle a request")]
    Server(#[from] fuse_backend_rs::Error),
}

/// A request, copied from guest memory to the buffer. It is the only form in which a request can be handled.
pub(super) struct CopiedRequest<'b> {
    bounce: &'b mut Bounce,
    bytes: usize,
    /// Bytes that were not copied, as the request is too long.
    left: usize,
    header: [u8; HEADER_BYTES],
}

impl CopiedRequest<'_> {
    /// Returns the opcode of the request (`fuse_in_header.opcode`).
    pub(super) fn opcode(&self) -> u32 {
        self.word(4)
    }

    fn word(&self, at: usize) -> u32 {
        self.header.get(at..at + 4).and_then(|word| word.try_into().ok()).map_or(0, u32::from_le_bytes)
    }

    /// Returns the number that identifies the request in its reply, as in guest memory.
    pub(super) fn unique(&self) -> [u8; 8] {
        self.header.get(8..16).and_then(|unique| unique.try_into().ok()).unwrap_or_default()
    }

    /// Checks the length of the request, and that its names end: fuse-backend-rs logs a request without a name as a whole.
    fn check(&self) -> Result<(), BounceError> {
        if self.left > 0 {
            return Err(BounceError::TooLong(self.bytes.saturating_add(self.left)));
        }
        let said = self.word(0);
        let len = usize::try_from(said).unwrap_or(usize::MAX);
        if !(HEADER_BYTES..=self.bytes).contains(&len) {
            return Err(BounceError::Length { said, bytes: self.bytes });
        }
        if len > MAX_WITHOUT_DATA && !WITH_DATA.contains(&self.opcode()) {
            return Err(BounceError::TooLongWithoutData(len));
        }
        let last: u8 = self.bounce.memory.read_obj(GuestAddress(REQUEST + len as u64 - 1))?;
        if last != 0 && NAMED.contains(&self.opcode()) { Err(BounceError::Unterminated) } else { Ok(()) }
    }

    /// Lets `server` handle the request, and returns the number of bytes written to `reply`.
    ///
    /// # Errors
    /// Returns [`BounceError`] where there is no reply.
    pub(super) fn handle(self, server: &FsServer, reply: &mut Buffers<'_>) -> Result<usize, BounceError> {
        self.check()?;
        let bounce = self.bounce;
        let out_bytes = reply.len().min(MAX_BYTES);
        let memory = bounce.memory.clone();
        let chain = bounce.chain(&memory, self.bytes, out_bytes)?;
        let reader = Reader::from_descriptor_chain(&memory, chain.clone())?;
        let writer = VirtioFsWriter::new(&memory, chain)?;
        let written = server.handle_message(reader, Writer::VirtioFs(writer), None, None)?;
        bounce.copy_out(reply, written.min(out_bytes))
    }
}

/// A queue with one chain, in memory of its own.
pub(super) struct Bounce {
    memory: GuestMemoryMmap,
    queue: Queue,
    chunk: Vec<u8>,
    next: u16,
}

impl Bounce {
    /// # Errors
    /// Returns an error where the buffer cannot be allocated.
    pub(super) fn new() -> Result<Self, BounceError> {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), TOTAL)]).map_err(BounceError::Allocate)?;
        let mut queue = Queue::new(2)?;
        queue.try_set_desc_table_address(GuestAddress(TABLE))?;
        queue.try_set_avail_ring_address(GuestAddress(AVAILABLE))?;
        queue.try_set_used_ring_address(GuestAddress(USED))?;
        queue.set_ready(true);
        Ok(Self { memory, queue, chunk: vec![0; CHUNK], next: 0 })
    }

    /// Copies a request from guest memory. This consumes the buffers, so that no byte is read twice: the guest can change
    /// them at any time, and what is checked must be what is used.
    ///
    /// # Errors
    /// Returns [`BounceError::TooShort`] for a request without a whole header.
    pub(super) fn take(&mut self, mut request: Buffers<'_>) -> Result<CopiedRequest<'_>, BounceError> {
        let mut bytes = 0;
        while bytes < MAX_BYTES {
            let part = (MAX_BYTES - bytes).min(CHUNK);
            let count = request.read(&mut self.chunk[..part]);
            if count == 0 {
                break;
            }
            self.memory.write_slice(&self.chunk[..count], GuestAddress(REQUEST + bytes as u64))?;
            bytes += count;
        }
        if bytes < HEADER_BYTES {
            return Err(BounceError::TooShort(bytes));
        }
        let mut header = [0; HEADER_BYTES];
        self.memory.read_slice(&mut header, GuestAddress(REQUEST))?;
        Ok(CopiedRequest { bounce: self, bytes, left: request.len(), header })
    }

    fn copy_out(&mut self, reply: &mut Buffers<'_>, bytes: usize) -> Result<usize, BounceError> {
        let mut done = 0;
        while done < bytes {
            let part = (bytes - done).min(CHUNK);
            let from = GuestAddress(REPLY + done as u64);
            self.memory.read_slice(&mut self.chunk[..part], from)?;
            done += reply.write(&self.chunk[..part]);
        }
        Ok(done)
    }

    /// Makes the chain available, the request and the buffer for the reply, and pops it.
    fn chain<'m>(
        &mut self,
        memory: &'m GuestMemoryMmap,
        in_bytes: usize,
        out_bytes: usize,
    ) -> Result<virtio_queue_017::DescriptorChain<&'m GuestMemoryMmap>, BounceError> {
        // VIRTQ_DESC_F_NEXT and VIRTQ_DESC_F_WRITE.
        const NEXT: u16 = 1;
        const WRITE: u16 = 2;
        let length = |bytes: usize| u32::try_from(bytes).unwrap_or(0);
        let put = |index: u64, descriptor: Descriptor| {
            let at = GuestAddress(TABLE + index * 16);
            memory.write_obj(RawDescriptor::from(descriptor), at)
        };
        let flags = if out_bytes > 0 { NEXT } else { 0 };
        put(0, Descriptor::new(REQUEST, length(in_bytes), flags, 1))?;
        put(1, Descriptor::new(REPLY, length(out_bytes), WRITE, 0))?;
        // Both entries of the available ring are descriptor 0; only the index changes.
        self.next = self.next.wrapping_add(1);
        memory.write_obj(self.next, GuestAddress(AVAILABLE + 2))?;
        self.queue.pop_descriptor_chain(memory).ok_or(BounceError::NoChain)
    }
}
