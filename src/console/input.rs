//! Input of a console, from stdin, no faster than the guest takes it.

use crate::exit::EndReason;
use crate::vcpu::Control;
use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use hwvmm_devices::console::ConsoleInput;
use rustix::io::Errno;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use vmm_sys_util::eventfd::EventFd;

/// Input that is kept for a guest that takes none, in bytes. Stdin is not read while there is more.
const HELD_BYTES: usize = 64 << 10;
const CTRL_A: u8 = 1;

/// What the bytes of stdin mean.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keys {
    /// A user types: Ctrl-A x ends the run, Ctrl-A Ctrl-A is one Ctrl-A for the guest.
    Escaped,
    /// All bytes are for the guest.
    Raw,
}

/// Passes stdin on to one console.
pub struct Input {
    stdin: File,
    port: Arc<dyn ConsoleInput>,
    /// Written by the console when it can take more.
    wanted: Arc<EventFd>,
    control: Arc<Control>,
    /// For [`Keys::Escaped`].
    escapes: Option<Escapes>,
    /// Input that the console has not taken.
    held: Vec<u8>,
    /// The event loop waits for stdin.
    registered: bool,
    /// Stdin is a regular file or the like: always readable, and not for epoll.
    unpollable: bool,
    /// Stdin has ended or failed.
    ended: bool,
}

impl Input {
    /// Passes `stdin` on to `port`, which writes `wanted` when it can take more. `control` ends the run on Ctrl-A x.
    #[must_use]
    pub fn new(
        stdin: File,
        keys: Keys,
        port: Arc<dyn ConsoleInput>,
        wanted: Arc<EventFd>,
        control: Arc<Control>,
    ) -> Self {
        let escapes = (keys == Keys::Escaped).then(Escapes::default);
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
                if escapes.filter(bytes, &mut self.held) == Typed::Quit {
                    self.control.end(EndReason::Quit, None);
                }
            }
        }
    }

    /// Passes on as much as the console takes.
    fn pass_on(&mut self) {
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
        self.pass_on();
        while self.unpollable && !self.ended && self.held.is_empty() {
            self.read();
            self.pass_on();
        }
    }

    /// Waits for stdin only while there is room for more input.
    fn update_registration(&mut self, ops: &mut EventOps<'_>) {
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
            // Non-blocking: it may have been read since the event.
            let _ = self.wanted.read();
        } else {
            self.read();
        }
        self.pump();
        self.update_registration(ops);
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        if let Err(error) = ops.add(Events::new(&*self.wanted, EventSet::IN)) {
            log::error!("cannot wait for the guest to take input: {error:?}");
        }
        self.update_registration(ops);
    }
}

/// What the user has typed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Typed {
    /// Input for the guest.
    Input,
    /// Ctrl-A x.
    Quit,
}

/// Recognizes Ctrl-A x (quits) and Ctrl-A Ctrl-A or Ctrl-A a (one Ctrl-A for the guest).
#[derive(Default)]
struct Escapes {
    /// The last byte was Ctrl-A.
    pending: bool,
}

impl Escapes {
    /// Appends to `out` what is for the guest.
    fn filter(&mut self, bytes: &[u8], out: &mut Vec<u8>) -> Typed {
        for &byte in bytes {
            match (std::mem::take(&mut self.pending), byte) {
                (false, CTRL_A) => self.pending = true,
                (true, b'x' | b'X') => return Typed::Quit,
                (true, CTRL_A | b'a') => out.push(CTRL_A),
                (true, other) => out.extend([CTRL_A, other]),
                (false, other) => out.push(other),
            }
        }
        Typed::Input
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ctrl_a_x_quits_and_all_else_reaches_the_guest() {
        let mut escapes = Escapes::default();
        let mut out = Vec::new();
        assert_eq!(escapes.filter(b"ab\x01\x01\x01c\x01", &mut out), Typed::Input);
        assert_eq!(out, b"ab\x01\x01c");
        assert_eq!(escapes.filter(b"x", &mut out), Typed::Quit);
    }
}
