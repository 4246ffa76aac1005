//! A queue pair at work: frames in, frames out.

use super::{FRAME_BYTES, HEADER_BYTES, Slot};
use crate::memory::Memory;
use crate::virtio::worker::watch;
use crate::virtio::{Chain, Virtqueue};
use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::PoisonError;

use super::Backend;

/// Frames of one direction before the other has its turn.
const BATCH: usize = 64;

pub(super) struct Pair {
    slot: Slot,
    backend: Option<Box<dyn Backend>>,
    /// A copy of the backend's file descriptor, to wait on.
    fd: File,
    receive: Virtqueue,
    transmit: Virtqueue,
    mergeable: bool,
    frame: Vec<u8>,
    /// Bytes in `frame` that the guest has no room for yet.
    held: usize,
    /// The backend takes no more for now.
    blocked: bool,
}

impl Pair {
    /// Takes the backend out of `slot`; it comes back there when this goes. `None` where it is gone.
    pub(super) fn new(slot: Slot, receive: Virtqueue, mut transmit: Virtqueue, mergeable: bool) -> Option<Self> {
        let backend = slot.lock().unwrap_or_else(PoisonError::into_inner).take()?;
        // A TCP of its own (passt) takes acknowledgements that come late, in a bunch, for lost segments, and sends
        // everything again: seen, 24 times over. The kernel's TCP behind a tap interface does not mind.
        if !backend.has_header() {
            transmit.disable_coalescing();
        }
        let fd = backend.fd().try_clone_to_owned().map(File::from);
        let fd = match fd {
            Ok(fd) => fd,
            Err(error) => {
                log::error!("net: {error}");
                return None;
            }
        };
        let frame = vec![0; FRAME_BYTES];
        Some(Self { slot, backend: Some(backend), fd, receive, transmit, mergeable, frame, held: 0, blocked: false })
    }

    /// Frames to the guest, a batch of them. True where there may be more.
    fn frames_in(&mut self, memory: &Memory) -> bool {
        let Some(backend) = self.backend.as_mut() else { return false };
        let start = if backend.has_header() { 0 } else { HEADER_BYTES };
        for _ in 0..BATCH {
            if self.held == 0 {
                match backend.receive(&mut self.frame[start..]) {
                    Ok(Some(len)) => self.held = start + len,
                    Ok(None) => return false,
                    Err(error) => {
                        log::warn!("net: receive: {error}");
                        return false;
                    }
                }
            }
            if self.held < HEADER_BYTES {
                self.held = 0;
                continue;
            }
            match place(&mut self.receive, memory, &mut self.frame[..self.held], self.mergeable) {
                Placed::Done => self.held = 0,
                // The driver kicks when it has buffers again; look once more after asking it to.
                Placed::NoRoom if self.receive.enable_notification_beyond_available() => {}
                Placed::NoRoom => return false,
            }
        }
        true
    }

    /// Frames from the guest.
    fn frames_out(&mut self) {
        let Some(backend) = self.backend.as_mut().filter(|_| !self.blocked) else { return };
        let header = backend.has_header();
        let mut blocked = false;
        self.transmit.serve(|chain| {
            if !header {
                chain.readable.skip(HEADER_BYTES);
            }
            match backend.send(&mut chain.readable) {
                Ok(()) => Some(0),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    blocked = true;
                    None
                }
                Err(error) => {
                    log::debug!("net: a frame was not sent: {error}");
                    Some(0)
                }
            }
        });
        self.blocked = blocked;
    }
}

enum Placed {
    /// In the guest, or dropped because no buffer of the guest's is ever large enough.
    Done,
    /// For want of buffers.
    NoRoom,
}

/// Puts a frame, header first, into one chain, or into as many as it takes where buffers may be merged (§5.1.6.3.2).
fn place(queue: &mut Virtqueue, memory: &Memory, frame: &mut [u8], mergeable: bool) -> Placed {
    let mut chains: Vec<Chain<'_>> = Vec::new();
    let mut room = 0;
    while room < frame.len() && (mergeable || chains.is_empty()) {
        let Some(chain) = queue.pop(memory) else {
            chains.iter().for_each(|_| queue.undo_pop());
            return Placed::NoRoom;
        };
        room += chain.writable.len();
        chains.push(chain);
        // A guest whose whole queue does not hold a frame never will.
        if chains.len() == usize::from(queue.size()) {
            break;
        }
    }
    if room < frame.len() {
        log::debug!("net: a frame of {} bytes does not fit into the guest's buffers: dropped", frame.len());
        chains.iter().for_each(|_| queue.undo_pop());
        return Placed::Done;
    }
    let count = u16::try_from(chains.len()).unwrap_or(u16::MAX);
    frame[HEADER_BYTES - 2..HEADER_BYTES].copy_from_slice(&count.to_le_bytes());
    let mut rest = &frame[..];
    for chain in &mut chains {
        let written = chain.writable.write(rest);
        rest = &rest[written..];
        queue.push(chain.head, u32::try_from(written).unwrap_or(0));
    }
    Placed::Done
}

impl MutEventSubscriber for Pair {
    fn process(&mut self, events: Events, _ops: &mut EventOps<'_>) {
        if events.fd() == self.fd.as_raw_fd() && events.event_set().contains(EventSet::OUT) {
            let flushed = self.backend.as_mut().is_none_or(|backend| backend.flush().is_ok());
            self.blocked &= !flushed;
        }
        self.receive.take_kicks();
        self.transmit.take_kicks();
        let memory = self.receive.memory();
        // The file descriptor tells of changes only: go on until there is nothing, or no room.
        loop {
            self.receive.disable_notification();
            let more = self.frames_in(&memory);
            self.receive.notify();
            self.frames_out();
            if !more {
                break;
            }
        }
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        watch(ops, Events::new(self.receive.kick(), EventSet::IN));
        watch(ops, Events::new(self.transmit.kick(), EventSet::IN));
        watch(ops, Events::new(&self.fd, EventSet::IN | EventSet::OUT | EventSet::EDGE_TRIGGERED));
    }
}

impl Drop for Pair {
    fn drop(&mut self) {
        *self.slot.lock().unwrap_or_else(PoisonError::into_inner) = self.backend.take();
    }
}
