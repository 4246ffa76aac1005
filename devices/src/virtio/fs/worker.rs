//! The worker of one queue of a shared directory.

use super::bounce::{Bounce, BounceError};
use crate::error::chain as error_chain;
use crate::memory::Buffers;
use crate::virtio::queue::{Chain, Virtqueue};
use crate::virtio::worker::watch;
use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use fuse_backend_rs::api::server::Server;
use fuse_backend_rs::passthrough::PassthroughFs;
use std::io;
use std::sync::Arc;

/// Size in bytes of struct `fuse_in_header`: len, opcode, unique, nodeid, uid, gid, pid, padding.
const HEADER_BYTES: usize = 40;
/// Size in bytes of struct `fuse_out_header`: len, error, unique.
const REPLY_BYTES: u32 = 16;

/// The opcode of OPEN.
const OPEN: u32 = 14;
/// The opcodes that are allowed in a read-only directory: LOOKUP, FORGET, GETATTR, READLINK, OPEN (for reading), READ,
/// STATFS, RELEASE, FSYNC, GETXATTR, LISTXATTR, FLUSH, INIT, OPENDIR, READDIR, RELEASEDIR, FSYNCDIR, GETLK, SETLK, SETLKW,
/// ACCESS, INTERRUPT, DESTROY, POLL, BATCH_FORGET, READDIRPLUS, LSEEK, SYNCFS.
const READ_ONLY_OPCODES: [u32; 28] =
    [1, 2, 3, 5, OPEN, 15, 17, 18, 20, 22, 23, 25, 26, 27, 28, 29, 30, 31, 32, 33, 34, 36, 38, 40, 42, 44, 46, 50];

/// Whether the guest can change files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Access {
    ReadWrite,
    ReadOnly,
}

pub(super) struct FsWorker {
    queue: Virtqueue,
    server: Arc<Server<PassthroughFs>>,
    bounce: Bounce,
    access: Access,
}

impl FsWorker {
    /// # Errors
    /// Returns an error where the buffer for requests and replies cannot be allocated.
    pub(super) fn new(
        queue: Virtqueue,
        server: Arc<Server<PassthroughFs>>,
        access: Access,
    ) -> Result<Self, BounceError> {
        Ok(Self { queue, server, bounce: Bounce::new()?, access })
    }
}

fn word(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).and_then(|word| word.try_into().ok()).map_or(0, u32::from_le_bytes)
}

/// Returns true if a request may change files. `start` is its header and the 32 bits after it, which are the flags of OPEN.
fn is_modifying(start: &[u8]) -> bool {
    let opcode = word(start, 4);
    let flags = word(start, HEADER_BYTES).cast_signed();
    let writes = flags & libc::O_ACCMODE != libc::O_RDONLY || flags & (libc::O_TRUNC | libc::O_CREAT) != 0;
    !READ_ONLY_OPCODES.contains(&opcode) || (opcode == OPEN && writes)
}

/// Writes a reply with the error `errno` and returns its length in bytes; 0 where the reply does not fit.
fn reply_error(start: &[u8], reply: &mut Buffers<'_>, errno: i32) -> u32 {
    let mut header = [0; REPLY_BYTES as usize];
    header[..4].copy_from_slice(&REPLY_BYTES.to_le_bytes());
    header[4..8].copy_from_slice(&(-errno).to_le_bytes());
    if let Some(unique) = start.get(8..16) {
        header[8..].copy_from_slice(unique);
    }
    if reply.len() < header.len() { 0 } else { u32::try_from(reply.write(&header)).unwrap_or(0) }
}

/// Handles a request and returns the length of the reply in bytes.
fn handle(chain: &mut Chain<'_>, server: &Server<PassthroughFs>, bounce: &mut Bounce, access: Access) -> u32 {
    let mut start = [0; HEADER_BYTES + 4];
    let count = chain.readable.clone().read(&mut start);
    if count < HEADER_BYTES {
        log::warn!("fs: request ignored: its {count} bytes are shorter than a header");
        return 0;
    }
    if access == Access::ReadOnly && is_modifying(&start) {
        return reply_error(&start, &mut chain.writable, libc::EROFS);
    }
    match bounce.handle(server, &mut chain.readable, &mut chain.writable) {
        Ok(written) => u32::try_from(written).unwrap_or(0),
        Err(error) => {
            log::warn!("fs: request with opcode {} failed: {}", word(&start, 4), error_chain(&error));
            reply_error(&start, &mut chain.writable, libc::EIO)
        }
    }
}

impl MutEventSubscriber for FsWorker {
    fn process(&mut self, _events: Events, _ops: &mut EventOps<'_>) {
        let (server, bounce, access) = (&self.server, &mut self.bounce, self.access);
        self.queue.serve(|chain| Some(handle(chain, server, bounce, access)));
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        // The guest's kernel has applied the umask of its process already. Only this thread's umask is cleared.
        match unshare_umask() {
            Ok(()) => drop(rustix::process::umask(rustix::fs::Mode::empty())),
            Err(error) => log::warn!("fs: cannot clear the umask, which applies to new files as well: {error}"),
        }
        watch(ops, Events::new(self.queue.kick(), EventSet::IN));
    }
}

#[allow(deprecated, reason = "unshare_unsafe is unsafe for flags that are not used here")]
fn unshare_umask() -> io::Result<()> {
    rustix::thread::unshare(rustix::thread::UnshareFlags::FS).map_err(Into::into)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(opcode: u32, flags: i32) -> Vec<u8> {
        let mut bytes = vec![0; HEADER_BYTES + 4];
        bytes[4..8].copy_from_slice(&opcode.to_le_bytes());
        bytes[HEADER_BYTES..].copy_from_slice(&flags.to_le_bytes());
        bytes
    }

    #[test]
    fn only_reading_opcodes_do_not_modify() {
        assert!(!is_modifying(&request(OPEN, libc::O_RDONLY | libc::O_DIRECTORY)));
        for flags in [libc::O_WRONLY, libc::O_RDWR, libc::O_TRUNC, libc::O_CREAT] {
            assert!(is_modifying(&request(OPEN, flags)), "{flags:#x}");
        }
        // SETATTR, SYMLINK, MKNOD ... CREATE, FALLOCATE, RENAME2, COPY_FILE_RANGE, TMPFILE, and what does not exist.
        for opcode in [4, 6, 8, 9, 10, 11, 12, 13, 16, 21, 24, 35, 39, 43, 45, 47, 48, 51, 4096, u32::MAX] {
            assert!(is_modifying(&request(opcode, 0)), "{opcode}");
        }
    }
}
