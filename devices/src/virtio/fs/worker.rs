//! One queue of a shared folder at work.

use super::bounce::Bounce;
use crate::memory::Buffers;
use crate::virtio::worker::watch;
use crate::virtio::{Chain, Virtqueue};
use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use fuse_backend_rs::api::server::Server;
use fuse_backend_rs::passthrough::PassthroughFs;
use std::io;
use std::sync::Arc;

/// struct fuse_in_header: length, opcode, unique, node, uid, gid, pid, more.
const HEADER_BYTES: usize = 40;
/// struct fuse_out_header: length, error, unique.
const REPLY_BYTES: u32 = 16;

const OPEN: u32 = 14;
/// What a guest may ask of a folder that it may not change: LOOKUP, FORGET, GETATTR, READLINK, OPEN (for reading), READ,
/// STATFS, RELEASE, FSYNC, GETXATTR, LISTXATTR, FLUSH, INIT, OPENDIR, READDIR, RELEASEDIR, FSYNCDIR, GETLK, SETLK, SETLKW,
/// ACCESS, INTERRUPT, DESTROY, POLL, BATCH_FORGET, READDIRPLUS, LSEEK, SYNCFS.
const READING: [u32; 28] =
    [1, 2, 3, 5, OPEN, 15, 17, 18, 20, 22, 23, 25, 26, 27, 28, 29, 30, 31, 32, 33, 34, 36, 38, 40, 42, 44, 46, 50];

pub(super) struct Requests {
    queue: Virtqueue,
    server: Arc<Server<PassthroughFs>>,
    bounce: Bounce,
    read_only: bool,
}

impl Requests {
    /// # Errors
    /// Where there is no memory.
    pub(super) fn new(queue: Virtqueue, server: Arc<Server<PassthroughFs>>, read_only: bool) -> io::Result<Self> {
        Ok(Self { queue, server, bounce: Bounce::new()?, read_only })
    }
}

fn word(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).and_then(|word| word.try_into().ok()).map_or(0, u32::from_le_bytes)
}

/// Whether a request (its header and the first word behind it) changes anything.
fn changes(start: &[u8]) -> bool {
    let opcode = word(start, 4);
    let flags = word(start, HEADER_BYTES).cast_signed();
    let writes = flags & libc::O_ACCMODE != libc::O_RDONLY || flags & (libc::O_TRUNC | libc::O_CREAT) != 0;
    !READING.contains(&opcode) || (opcode == OPEN && writes)
}

/// An error as FUSE says it.
fn refuse(start: &[u8], reply: &mut Buffers<'_>, errno: i32) -> u32 {
    let mut header = [0; REPLY_BYTES as usize];
    header[..4].copy_from_slice(&REPLY_BYTES.to_le_bytes());
    header[4..8].copy_from_slice(&(-errno).to_le_bytes());
    if let Some(unique) = start.get(8..16) {
        header[8..].copy_from_slice(unique);
    }
    if reply.len() < header.len() { 0 } else { u32::try_from(reply.write(&header)).unwrap_or(0) }
}

fn answer(chain: &mut Chain<'_>, server: &Server<PassthroughFs>, bounce: &mut Bounce, read_only: bool) -> u32 {
    let mut start = [0; HEADER_BYTES + 4];
    let count = chain.readable.clone().read(&mut start);
    if count < HEADER_BYTES {
        log::warn!("fs: a request of {count} bytes");
        return 0;
    }
    if read_only && changes(&start) {
        return refuse(&start, &mut chain.writable, libc::EROFS);
    }
    match bounce.answer(server, &mut chain.readable, &mut chain.writable) {
        Ok(written) => u32::try_from(written).unwrap_or(0),
        Err(error) => {
            log::warn!("fs: request {}: {error}", word(&start, 4));
            refuse(&start, &mut chain.writable, libc::EIO)
        }
    }
}

impl MutEventSubscriber for Requests {
    fn process(&mut self, _events: Events, _ops: &mut EventOps<'_>) {
        let (server, bounce, read_only) = (&self.server, &mut self.bounce, self.read_only);
        self.queue.serve(|chain| Some(answer(chain, server, bounce, read_only)));
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        // The guest's kernel has applied its user's umask already. This thread's alone is taken away.
        match unshare_umask() {
            Ok(()) => drop(rustix::process::umask(rustix::fs::Mode::empty())),
            Err(error) => log::warn!("fs: the host's umask applies as well: {error}"),
        }
        watch(ops, Events::new(self.queue.kick(), EventSet::IN));
    }
}

#[allow(deprecated, reason = "its successor is unsafe for flags that are not used here")]
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
    fn a_read_only_folder_is_only_read() {
        assert!(!changes(&request(OPEN, libc::O_RDONLY | libc::O_DIRECTORY)));
        for flags in [libc::O_WRONLY, libc::O_RDWR, libc::O_TRUNC, libc::O_CREAT] {
            assert!(changes(&request(OPEN, flags)), "{flags:#x}");
        }
        // SETATTR, SYMLINK, MKNOD ... CREATE, FALLOCATE, RENAME2, COPY_FILE_RANGE, TMPFILE, and what does not exist.
        for opcode in [4, 6, 8, 9, 10, 11, 12, 13, 16, 21, 24, 35, 39, 43, 45, 47, 48, 51, 4096, u32::MAX] {
            assert!(changes(&request(opcode, 0)), "{opcode}");
        }
    }
}
