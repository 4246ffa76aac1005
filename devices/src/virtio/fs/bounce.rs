//! Memory between the guest's and fuse-backend-rs: that crate reads requests from, and writes replies to, a descriptor
//! chain of its own versions of vm-memory and virtio-queue. So a request is copied to a small queue made of those, and
//! the reply back.

use crate::memory::Buffers;
use fuse_backend_rs::api::server::Server;
use fuse_backend_rs::passthrough::PassthroughFs;
use fuse_backend_rs::transport::{Reader, VirtioFsWriter, Writer};
use std::io;
use virtio_queue_017::desc::{RawDescriptor, split::Descriptor};
use virtio_queue_017::{Queue, QueueT};
use vm_memory_017::{Bytes, GuestAddress, GuestMemoryMmap};

/// The longest request or reply: 1 MiB of data, and headers (FUSE's own limit).
pub(super) const MAX_BYTES: usize = (1 << 20) + 0x1000;

const TABLE: u64 = 0;
const AVAILABLE: u64 = 0x100;
const USED: u64 = 0x200;
const REQUEST: u64 = 0x1000;
const REPLY: u64 = 0x20_0000;
const TOTAL: usize = 0x40_0000;
const CHUNK: usize = 64 << 10;

/// A queue of one chain, in memory of its own.
pub(super) struct Bounce {
    memory: GuestMemoryMmap,
    queue: Queue,
    chunk: Vec<u8>,
    next: u16,
}

impl Bounce {
    /// # Errors
    /// Where there is no memory.
    pub(super) fn new() -> io::Result<Self> {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), TOTAL)]).map_err(io::Error::other)?;
        let mut queue = Queue::new(2).map_err(io::Error::other)?;
        queue.try_set_desc_table_address(GuestAddress(TABLE)).map_err(io::Error::other)?;
        queue.try_set_avail_ring_address(GuestAddress(AVAILABLE)).map_err(io::Error::other)?;
        queue.try_set_used_ring_address(GuestAddress(USED)).map_err(io::Error::other)?;
        queue.set_ready(true);
        Ok(Self { memory, queue, chunk: vec![0; CHUNK], next: 0 })
    }

    /// Has `server` answer `request`: the number of bytes written to `reply`.
    ///
    /// # Errors
    /// Where the request cannot be answered at all.
    pub(super) fn answer(
        &mut self,
        server: &Server<PassthroughFs>,
        request: &mut Buffers<'_>,
        reply: &mut Buffers<'_>,
    ) -> io::Result<usize> {
        let (in_bytes, out_bytes) = (request.len(), reply.len().min(MAX_BYTES));
        if in_bytes > MAX_BYTES {
            return Err(io::Error::other(format!("a request of {in_bytes} bytes")));
        }
        self.copy_in(request)?;
        let memory = self.memory.clone();
        let chain = self.chain(&memory, in_bytes, out_bytes)?;
        let reader = Reader::from_descriptor_chain(&memory, chain.clone()).map_err(io::Error::other)?;
        let writer = VirtioFsWriter::new(&memory, chain).map_err(io::Error::other)?;
        let written = server.handle_message(reader, Writer::VirtioFs(writer), None, None).map_err(io::Error::other)?;
        self.copy_out(reply, written.min(out_bytes))
    }

    fn copy_in(&mut self, request: &mut Buffers<'_>) -> io::Result<()> {
        let mut at = REQUEST;
        loop {
            let count = request.read(&mut self.chunk);
            if count == 0 {
                return Ok(());
            }
            self.memory.write_slice(&self.chunk[..count], GuestAddress(at)).map_err(io::Error::other)?;
            at += count as u64;
        }
    }

    fn copy_out(&mut self, reply: &mut Buffers<'_>, bytes: usize) -> io::Result<usize> {
        let mut done = 0;
        while done < bytes {
            let part = (bytes - done).min(CHUNK);
            let from = GuestAddress(REPLY + done as u64);
            self.memory.read_slice(&mut self.chunk[..part], from).map_err(io::Error::other)?;
            done += reply.write(&self.chunk[..part]);
        }
        Ok(done)
    }

    /// The one chain: the request, then room for the reply.
    fn chain<'m>(
        &mut self,
        memory: &'m GuestMemoryMmap,
        in_bytes: usize,
        out_bytes: usize,
    ) -> io::Result<virtio_queue_017::DescriptorChain<&'m GuestMemoryMmap>> {
        // VRING_DESC_F_NEXT and VRING_DESC_F_WRITE.
        const NEXT: u16 = 1;
        const WRITE: u16 = 2;
        let length = |bytes: usize| u32::try_from(bytes).unwrap_or(0);
        let put = |index: u64, descriptor: Descriptor| {
            let at = GuestAddress(TABLE + index * 16);
            memory.write_obj(RawDescriptor::from(descriptor), at).map_err(io::Error::other)
        };
        let flags = if out_bytes > 0 { NEXT } else { 0 };
        put(0, Descriptor::new(REQUEST, length(in_bytes), flags, 1))?;
        put(1, Descriptor::new(REPLY, length(out_bytes), WRITE, 0))?;
        // The ring's two slots both name descriptor 0; only the index moves.
        self.next = self.next.wrapping_add(1);
        memory.write_obj(self.next, GuestAddress(AVAILABLE + 2)).map_err(io::Error::other)?;
        self.queue.pop_descriptor_chain(memory).ok_or_else(|| io::Error::other("no chain"))
    }
}
