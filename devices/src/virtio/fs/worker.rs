//! The worker of one queue of a shared directory.

use super::Session;
use super::bounce::{Bounce, BounceError};
use super::guard::FsServer;
use crate::error::chain as error_chain;
use crate::memory::Buffers;
use crate::virtio::chain::Chain;
use crate::virtio::queue::Virtqueue;
use crate::virtio::worker::watch;
use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use std::sync::Arc;

/// Size in bytes of struct `fuse_out_header`: len, error, unique.
const REPLY_BYTES: u32 = 16;

pub(super) struct FsWorker {
    queue: Virtqueue,
    session: Arc<Session>,
    bounce: Bounce,
}

impl FsWorker {
    /// # Errors
    /// Returns an error where the buffer for requests and replies cannot be allocated.
    pub(super) fn new(queue: Virtqueue, session: Arc<Session>) -> Result<Self, BounceError> {
        Ok(Self { queue, session, bounce: Bounce::new()? })
    }
}

/// Writes a reply with the error `errno` and returns its length in bytes; 0 where the reply does not fit.
fn reply_error(unique: [u8; 8], reply: &mut Buffers<'_>, errno: i32) -> u32 {
    let mut header = [0; REPLY_BYTES as usize];
    header[..4].copy_from_slice(&REPLY_BYTES.to_le_bytes());
    header[4..8].copy_from_slice(&(-errno).to_le_bytes());
    header[8..].copy_from_slice(&unique);
    if reply.len() < header.len() { 0 } else { u32::try_from(reply.write(&header)).unwrap_or(0) }
}

/// Handles a request and returns the length of the reply in bytes.
fn handle(chain: &mut Chain<'_>, server: &FsServer, bounce: &mut Bounce) -> u32 {
    let request = match bounce.take(std::mem::take(&mut chain.readable)) {
        Ok(request) => request,
        Err(error) => {
            log::warn!("fs: request ignored: {}", error_chain(&error));
            return 0;
        }
    };
    let (opcode, unique) = (request.opcode(), request.unique());
    match request.handle(server, &mut chain.writable) {
        Ok(written) => u32::try_from(written).unwrap_or(0),
        Err(error) => {
            log::warn!("fs: request with opcode {opcode} failed: {}", error_chain(&error));
            reply_error(unique, &mut chain.writable, libc::EIO)
        }
    }
}

impl MutEventSubscriber for FsWorker {
    fn process(&mut self, _events: Events, _ops: &mut EventOps<'_>) {
        let (server, bounce) = (&self.session.server, &mut self.bounce);
        self.queue.serve(|chain| Some(handle(chain, server, bounce)));
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        watch(ops, Events::new(self.queue.kick(), EventSet::IN));
    }
}
