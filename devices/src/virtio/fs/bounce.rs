//! A bounce buffer between guest memory and fuse-backend-rs. That crate reads requests from and writes replies to a descriptor
//! chain of older versions of vm-memory and virtio-queue. So each request is copied to a queue of those versions, and the
//! reply back.

use crate::memory::Buffers;
use fuse_backend_rs::api::server::Server;
use fuse_backend_rs::passthrough::PassthroughFs;
use fuse_backend_rs::transport::{Reader, VirtioFsWriter, Writer};
use thiserror::Error;
use virtio_queue_017::desc::{RawDescriptor, split::Descriptor};
use virtio_queue_017::{Queue, QueueT};
use vm_memory_017::{Bytes, GuestAddress, GuestMemoryMmap};

/// The longest request or reply in bytes: 1 MiB of data, and headers (FUSE's own limit).
pub(super) const MAX_BYTES: usize = (1 << 20) + 0x1000;

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
    /// The request is longer than FUSE allows.
    #[error("a request has {0} bytes, more than {MAX_BYTES}")]
    TooLong(usize),
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
    /// fuse-backend-rs cannot reply.
    #[error("the file system cannot handle a request")]
    Server(#[from] fuse_backend_rs::Error),
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

    /// Lets `server` handle `request`, and returns the number of bytes written to `reply`.
    ///
    /// # Errors
    /// Returns [`BounceError`] where there is no reply.
    pub(super) fn handle(
        &mut self,
        server: &Server<PassthroughFs>,
        request: &mut Buffers<'_>,
        reply: &mut Buffers<'_>,
    ) -> Result<usize, BounceError> {
        let (in_bytes, out_bytes) = (request.len(), reply.len().min(MAX_BYTES));
        if in_bytes > MAX_BYTES {
            return Err(BounceError::TooLong(in_bytes));
        }
        self.copy_in(request)?;
        let memory = self.memory.clone();
        let chain = self.chain(&memory, in_bytes, out_bytes)?;
        let reader = Reader::from_descriptor_chain(&memory, chain.clone())?;
        let writer = VirtioFsWriter::new(&memory, chain)?;
        let written = server.handle_message(reader, Writer::VirtioFs(writer), None, None)?;
        self.copy_out(reply, written.min(out_bytes))
    }

    fn copy_in(&mut self, request: &mut Buffers<'_>) -> Result<(), BounceError> {
        let mut at = REQUEST;
        loop {
            let count = request.read(&mut self.chunk);
            if count == 0 {
                return Ok(());
            }
            self.memory.write_slice(&self.chunk[..count], GuestAddress(at))?;
            at += count as u64;
        }
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
