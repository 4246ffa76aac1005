//! Input: from stdin to a console, no faster than the guest takes it.

use crate::exit::EndReason;
use crate::vcpu::Control;
use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use hwvmm_devices::console::ConsoleInput;
use rustix::io::Errno;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use vmm_sys_util::eventfd::EventFd;

/// Input held back for a guest that does not listen, in bytes: then stdin is left alone.
const HELD_BYTES: usize = 64 << 10;
const CTRL_A: u8 = 1;

/// Reads stdin for one console.
pub struct Input {
    stdin: File,
    port: Arc<dyn ConsoleInput>,
    /// The console can take more.
    wanted: Arc<EventFd>,
    control: Arc<Control>,
    /// On a terminal, Ctrl-A is for hwvmm.
    escapes: Option<Escapes>,
    held: Vec<u8>,
    registered: bool,
    /// stdin is a regular file or the like: always readable, and not for epoll.
    unpollable: bool,
    ended: bool,
}

impl Input {
    /// Reads `stdin`; with `terminal`, Ctrl-A x ends the run.
    #[must_use]
    pub fn new(
        stdin: File,
        terminal: bool,
        port: Arc<dyn ConsoleInput>,
        wanted: Arc<EventFd>,
        control: Arc<Control>,
    ) -> Self {
        let escapes = terminal.then(Escapes::default);
        Self {
            stdin,
            port,
            wanted,
            control,
            escapes,
            held: Vec::new(),
            registered: false,
            unpollable: false,
            ended: false,
        }
    }

    fn read(&mut self) {
        let mut buffer = [0; 4096];
        let bytes = match rustix::io::read(&self.stdin, &mut buffer) {
            Ok(0) => {
                self.ended = true;
                return;
            }
            Ok(count) => &buffer[..count],
            Err(Errno::INTR | Errno::AGAIN) => return,
            Err(error) => {
                log::warn!("stdin: {error}; the guest gets no more input");
                self.ended = true;
                return;
            }
        };
        match &mut self.escapes {
            None => self.held.extend_from_slice(bytes),
            Some(escapes) => {
                if escapes.filter(bytes, &mut self.held) {
                    self.control.end(EndReason::Quit, None);
                }
            }
        }
    }

    /// Hands over what the guest takes.
    fn hand_over(&mut self) {
        while !self.held.is_empty() {
            match self.port.enqueue(&self.held) {
                Ok(0) => break,
                Ok(count) => drop(self.held.drain(..count)),
                Err(error) => {
                    log::error!("{error}");
                    break;
                }
            }
        }
    }

    fn pump(&mut self) {
        self.hand_over();
        while self.unpollable && !self.ended && self.held.is_empty() {
            self.read();
            self.hand_over();
        }
    }

    /// Listens to stdin only while there is room.
    fn listen(&mut self, ops: &mut EventOps<'_>) {
        let room = if self.escapes.is_some() { HELD_BYTES } else { 1 };
        let wanted = !self.ended && !self.unpollable && self.held.len() < room;
        if wanted == self.registered {
            return;
        }
        let events = Events::new(&self.stdin, EventSet::IN);
        let result = if wanted { ops.add(events) } else { ops.remove(events) };
        match result {
            Ok(()) => self.registered = wanted,
            // A regular file, or /dev/null.
            Err(_) if wanted => {
                self.unpollable = true;
                self.pump();
            }
            Err(error) => log::error!("stdin: {error:?}"),
        }
    }
}

impl MutEventSubscriber for Input {
    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        if events.fd() == self.wanted.as_raw_fd() {
            // Non-blocking: nothing to read means that somebody else was faster.
            let _ = self.wanted.read();
        } else {
            self.read();
        }
        self.pump();
        self.listen(ops);
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        if let Err(error) = ops.add(Events::new(&*self.wanted, EventSet::IN)) {
            log::error!("cannot wait for the guest to take input: {error:?}");
        }
        self.listen(ops);
    }
}

/// Ctrl-A x quits, Ctrl-A Ctrl-A (or a) is one Ctrl-A for the guest.
#[derive(Default)]
struct Escapes {
    pending: bool,
}

impl Escapes {
    /// Appends to `out` what is for the guest; whether to quit.
    fn filter(&mut self, bytes: &[u8], out: &mut Vec<u8>) -> bool {
        for &byte in bytes {
            match (std::mem::take(&mut self.pending), byte) {
                (false, CTRL_A) => self.pending = true,
                (true, b'x' | b'X') => return true,
                (true, CTRL_A | b'a') => out.push(CTRL_A),
                (true, other) => out.extend([CTRL_A, other]),
                (false, other) => out.push(other),
            }
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ctrl_a_x_quits_and_all_else_reaches_the_guest() {
        let mut escapes = Escapes::default();
        let mut out = Vec::new();
        assert!(!escapes.filter(b"ab\x01\x01\x01c\x01", &mut out));
        assert_eq!(out, b"ab\x01\x01c");
        assert!(escapes.filter(b"x", &mut out));
    }
}
