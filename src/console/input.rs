//! Input of a console, from stdin, no faster than the guest takes it.

use crate::exit::EndReason;
use crate::vcpu::Control;
use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use hwvmm_devices::console::ConsoleInput;
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::timerfd::TimerFd;

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

/// Input that a guest had not read when it reset itself. It is for the next start.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnreadInput {
    bytes: Vec<u8>,
    /// Ctrl-A was typed, and nothing behind it yet.
    ctrl_a: bool,
}

impl UnreadInput {
    /// The most that is kept, in bytes: what is held, one more read of stdin, and what the console has taken.
    pub const MAX_BYTES: usize = HELD_BYTES + (16 << 10);

    /// Returns true if all input was read.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty() && !self.ctrl_a
    }

    /// Cuts it to [`Self::MAX_BYTES`]: another process may have sent more.
    #[must_use]
    pub fn bounded(mut self) -> Self {
        self.bytes.truncate(Self::MAX_BYTES);
        self
    }
}

/// Input that the console has not taken.
#[derive(Default)]
struct Held {
    bytes: Vec<u8>,
    /// Finds the escape sequences in the input; `None` where all keys are the guest's ([`Keys::Raw`]).
    escapes: Option<Escapes>,
}

/// Returns what a guest has not read, once it has ended.
#[derive(Clone)]
pub struct Unread {
    port: Arc<dyn ConsoleInput>,
    held: Arc<Mutex<Held>>,
}

impl Unread {
    /// Takes all input that the guest has not read, in order.
    #[must_use]
    pub fn take(&self) -> UnreadInput {
        let mut held = lock(&self.held);
        let mut bytes = self.port.unread();
        bytes.append(&mut held.bytes);
        let ctrl_a = held.escapes.take().is_some_and(|escapes| escapes.pending);
        UnreadInput { bytes, ctrl_a }.bounded()
    }
}

fn lock(held: &Mutex<Held>) -> MutexGuard<'_, Held> {
    held.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Passes stdin on to one console.
pub struct Input {
    stdin: File,
    port: Arc<dyn ConsoleInput>,
    /// Written by the console when it can take more.
    wanted: Arc<EventFd>,
    /// When the console wants to be reminded of input that the guest has left.
    reminder: TimerFd,
    /// True while `reminder` is armed.
    reminding: bool,
    control: Arc<Control>,
    keys: Keys,
    held: Arc<Mutex<Held>>,
    /// The event loop waits for stdin.
    registered: bool,
    /// Stdin is a regular file or the like: always readable, and not for epoll.
    unpollable: bool,
    /// Stdin has ended or failed.
    ended: bool,
}

impl Input {
    /// Passes `unread` and then `stdin` on to `port`, which writes `wanted` when it can take more. `control` ends the run on
    /// Ctrl-A x.
    ///
    /// # Errors
    /// Returns the error of timerfd_create(2).
    pub fn new(
        stdin: File,
        keys: Keys,
        unread: UnreadInput,
        port: Arc<dyn ConsoleInput>,
        wanted: Arc<EventFd>,
        control: Arc<Control>,
    ) -> io::Result<Self> {
        let UnreadInput { bytes, ctrl_a: pending } = unread.bounded();
        let escapes = (keys == Keys::Escaped).then_some(Escapes { pending });
        Ok(Self {
            stdin,
            port,
            wanted,
            reminder: TimerFd::new()?,
            reminding: false,
            control,
            keys,
            held: Arc::new(Mutex::new(Held { bytes, escapes })),
            registered: false,
            unpollable: false,
            ended: false,
        })
    }

    /// Returns what finds the input that the guest has not read, once it has ended.
    #[must_use]
    pub fn unread(&self) -> Unread {
        Unread { port: Arc::clone(&self.port), held: Arc::clone(&self.held) }
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
        let Held { bytes: held, escapes } = &mut *lock(&self.held);
        match escapes {
            None => held.extend_from_slice(bytes),
            Some(escapes) => {
                if escapes.filter(bytes, held) == Typed::Quit {
                    self.control.end(EndReason::Quit, None);
                }
            }
        }
    }

    /// Passes on as much as the console takes.
    fn pass_on(&mut self) {
        let held = &mut lock(&self.held).bytes;
        while !held.is_empty() {
            match self.port.enqueue(held) {
                Ok(0) => break,
                Ok(count) => drop(held.drain(..count)),
                Err(error) => {
                    log::error!("{error}");
                    break;
                }
            }
        }
    }

    fn held_bytes(&self) -> usize {
        lock(&self.held).bytes.len()
    }

    fn pump(&mut self) {
        self.pass_on();
        while self.unpollable && !self.ended && self.held_bytes() == 0 {
            self.read();
            self.pass_on();
        }
    }

    /// Has the console look after input that the guest has left.
    fn remind(&mut self) {
        if self.reminding {
            return;
        }
        let Some(after) = self.port.remind() else { return };
        match self.reminder.reset(after, None) {
            Ok(()) => self.reminding = true,
            Err(error) => log::error!("cannot set the timer for input: {error}"),
        }
    }

    /// Waits for stdin only while there is room for more input.
    fn update_registration(&mut self, ops: &mut EventOps<'_>) {
        let room = match self.keys {
            Keys::Escaped => HELD_BYTES,
            Keys::Raw => 1,
        };
        let wanted = !self.ended && !self.unpollable && self.held_bytes() < room;
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
        } else if events.fd() == self.reminder.as_raw_fd() {
            // It has run out, so that this does not block.
            let _ = self.reminder.wait();
            self.reminding = false;
        } else {
            self.read();
        }
        self.pump();
        self.remind();
        self.update_registration(ops);
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        if let Err(error) = ops.add(Events::new(&*self.wanted, EventSet::IN)) {
            log::error!("cannot wait for the guest to take input: {error:?}");
        }
        if let Err(error) = ops.add(Events::new(&self.reminder, EventSet::IN)) {
            log::error!("cannot wait for the timer for input: {error:?}");
        }
        self.update_registration(ops);
    }
}

/// What the user has typed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Typed {
    /// Input for the guest.
    Input,
    /// Ctrl-A x, which ends the run.
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
    use hwvmm_devices::console::InputError;
    use std::io::Write;
    use std::os::fd::OwnedFd;

    #[test]
    fn ctrl_a_x_quits_and_all_else_reaches_the_guest() {
        let mut escapes = Escapes::default();
        let mut out = Vec::new();
        assert_eq!(escapes.filter(b"ab\x01\x01\x01c\x01", &mut out), Typed::Input);
        assert_eq!(out, b"ab\x01\x01c");
        assert_eq!(escapes.filter(b"x", &mut out), Typed::Quit);
    }

    /// A console of which the guest has read nothing.
    struct Full(Vec<u8>);
    impl ConsoleInput for Full {
        fn enqueue(&self, _input: &[u8]) -> Result<usize, InputError> {
            Ok(0)
        }
        fn unread(&self) -> Vec<u8> {
            self.0.clone()
        }
    }

    fn input(stdin: File, keys: Keys, unread: UnreadInput, taken: &[u8]) -> Input {
        let wanted = Arc::new(EventFd::new(0).expect("an eventfd"));
        let control = Arc::new(Control::new().expect("an eventfd"));
        Input::new(stdin, keys, unread, Arc::new(Full(taken.to_vec())), wanted, control).expect("a timer")
    }

    #[test]
    fn what_a_guest_has_not_read_is_for_the_next_start() {
        let (reader, mut writer) = std::io::pipe().expect("a pipe");
        let stdin = File::from(OwnedFd::from(reader));
        let mut first = input(stdin, Keys::Escaped, UnreadInput::default(), b"in the FIFO, ");
        writer.write_all(b"held, \x01").expect("written");
        first.read();
        first.pump();
        let unread = first.unread().take();
        assert!(!unread.is_empty());
        let mut second = input(first.stdin, Keys::Escaped, unread, b"");
        writer.write_all(b"\x01").expect("written");
        second.read();
        let unread = second.unread().take();
        assert_eq!(unread, UnreadInput { bytes: b"in the FIFO, held, \x01".to_vec(), ctrl_a: false });
        assert!(second.unread().take().is_empty());
    }

    #[test]
    fn what_another_process_hands_over_is_bounded() {
        let long = UnreadInput { bytes: vec![b'x'; 2 * UnreadInput::MAX_BYTES], ctrl_a: false };
        assert_eq!(long.bounded().bytes.len(), UnreadInput::MAX_BYTES);
    }
}
