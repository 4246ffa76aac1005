//! The receive side of the UART: the FIFO with the host's input, and when the guest is interrupted for it.
//!
//! A 16550 holds its interrupt line up for as long as there is input. The line of an ISA interrupt is edge-triggered, so a driver
//! that leaves input in the FIFO gets no further interrupt from the line alone. Real hardware goes on by the time-out
//! interrupt. Here [`Receiver::remind`] does that, and from then on each byte that is read raises the line again while there is
//! more, until the driver turns out to read until there is none.

use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// Most bytes of input in the FIFO. A 16550A has 16; more save wake-ups of the event loop.
pub(super) const FIFO_BYTES: usize = 64;
/// Reads of the line status register without output in between, after which the guest is taken to poll for input. Drivers that
/// only transmit read it once for each byte.
const POLLS: u32 = 16;
/// How long all interrupt enable bits must be set to be more than a probe of the UART's type.
const PROBE: Duration = Duration::from_millis(100);
/// How long input may be left in the FIFO until the line is raised again. Doubles up to [`MAX_LEFT`] while nothing is read.
const MIN_LEFT: Duration = Duration::from_millis(2);
const MAX_LEFT: Duration = Duration::from_secs(1);
/// How often an interrupt must have been for nothing until reads do not raise the line any more.
const CREDITS: u32 = 32;

// Bits of the registers (PC16550D data sheet §8).
const IER_RECEIVED: u8 = 1;
const IER_ALL: u8 = 0xf;
/// The trigger levels of the FIFO, in bytes.
const TRIGGERS: [usize; 4] = [1, 4, 8, 14];
const FCR_ENABLE: u8 = 1;
const IIR_FIFO: u8 = 0xc0;
const IIR_RECEIVED: u8 = 4;
/// There is less in the FIFO than its trigger level.
const IIR_TIME_OUT: u8 = 0xc;

/// What a snapshot has of the receive side. Times, and what only saves interrupts, begin anew.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct ReceiverState {
    fifo: Vec<u8>,
    interrupt_enable: u8,
    trigger: Option<u8>,
    /// All interrupt enable bits were set last.
    probed: bool,
    polls: u32,
}

/// Input that the driver has not read since [`Watch::reads`].
struct Watch {
    reads: u64,
    due: Instant,
    left: Duration,
}

/// The result of [`Receiver::remind`]: what the UART has to do for input that the driver has left.
pub(super) enum Reminder {
    /// No input waits to be read.
    Nothing,
    /// To be called again after this time.
    Later(Duration),
    /// Raise the line, and call again after this time.
    Raise(Duration),
    /// The driver takes input from now on.
    Ready,
}

/// The receive side. Its owner says where bytes of the loopback mode wait, which the UART's model keeps.
pub(super) struct Receiver {
    fifo: VecDeque<u8>,
    interrupt_enable: u8,
    /// Bytes in the FIFO at which it reports received data; `None` while it is off.
    trigger: Option<usize>,
    /// All interrupt enable bits were set at this time, and nothing else was done since.
    probed: Option<Instant>,
    /// Reads of the line status register without output.
    polls: u32,
    /// The line was raised since there is input.
    raised: bool,
    /// While above 0, each read raises the line again where there is more input.
    credits: u32,
    /// The line was raised by a read.
    raised_by_read: bool,
    /// Number of bytes that the guest has read.
    reads: u64,
    watch: Option<Watch>,
}

impl Receiver {
    pub(super) fn new() -> Self {
        Self {
            fifo: VecDeque::with_capacity(FIFO_BYTES),
            interrupt_enable: 0,
            trigger: None,
            probed: None,
            polls: 0,
            raised: false,
            // Without the FIFO a UART has one byte at a time, and each is an interrupt.
            credits: CREDITS,
            raised_by_read: false,
            reads: 0,
            watch: None,
        }
    }

    pub(super) fn save(&self) -> ReceiverState {
        ReceiverState {
            fifo: self.unread(),
            interrupt_enable: self.interrupt_enable,
            trigger: self.trigger.and_then(|trigger| u8::try_from(trigger).ok()),
            probed: self.probed.is_some(),
            polls: self.polls,
        }
    }

    /// Returns the receive side of a state; `None` where it is that of no UART.
    pub(super) fn restore(state: &ReceiverState) -> Option<Self> {
        let ReceiverState { fifo, interrupt_enable, trigger, probed, polls } = state;
        let is_valid = fifo.len() <= FIFO_BYTES
            && interrupt_enable & !IER_ALL == 0
            && trigger.is_none_or(|trigger| TRIGGERS.contains(&trigger.into()));
        is_valid.then(|| Self {
            fifo: fifo.iter().copied().collect(),
            interrupt_enable: *interrupt_enable,
            trigger: trigger.map(usize::from),
            probed: probed.then(Instant::now),
            polls: *polls,
            ..Self::new()
        })
    }

    pub(super) fn is_empty(&self) -> bool {
        self.fifo.is_empty()
    }

    /// Returns true if the guest's driver reads input: by interrupts, or by polling.
    pub(super) fn is_wanted(&self) -> bool {
        let by_interrupt = self.interrupt_enable & IER_RECEIVED != 0 && self.probed.is_none();
        by_interrupt || self.polls >= POLLS
    }

    /// Adds as much of `input` as there is room for, and returns its length.
    pub(super) fn add(&mut self, input: &[u8]) -> usize {
        let count = input.len().min(FIFO_BYTES - self.fifo.len());
        self.fifo.extend(&input[..count]);
        count
    }

    /// Returns what is in the FIFO, the oldest byte first.
    pub(super) fn unread(&self) -> Vec<u8> {
        self.fifo.iter().copied().collect()
    }

    /// Takes the oldest byte.
    pub(super) fn take(&mut self) -> Option<u8> {
        self.fifo.pop_front()
    }

    pub(super) fn interrupt_enable(&self) -> u8 {
        self.interrupt_enable
    }

    pub(super) fn set_interrupt_enable(&mut self, value: u8) {
        self.interrupt_enable = value & IER_ALL;
        self.polls = 0;
        self.probed = (self.interrupt_enable == IER_ALL).then(Instant::now);
    }

    /// Returns what vm-superio gets of the interrupt enable register: it must not interrupt for input itself, as it takes
    /// that back when a byte is read while there are more.
    pub(super) fn interrupt_enable_of_model(&self) -> u8 {
        self.interrupt_enable & !IER_RECEIVED
    }

    /// Sets the FIFO control register. Its bits that clear the FIFOs are ignored: drivers set them with each new setting, and
    /// what the host's user types is no noise of a line.
    pub(super) fn set_fifo_control(&mut self, value: u8) {
        let trigger = TRIGGERS[usize::from(value >> 6)];
        let trigger = (value & FCR_ENABLE != 0).then_some(trigger);
        if trigger.is_some() != self.trigger.is_some() {
            self.credits = if trigger.is_some() { 0 } else { CREDITS };
        }
        self.trigger = trigger;
        self.polls = 0;
    }

    /// Notes an access to a register other than the interrupt enable register: a driver that probes the UART's type makes none.
    pub(super) fn note_access(&mut self) {
        self.probed = None;
    }

    /// Returns true if all interrupt enable bits were set last.
    pub(super) fn is_probed(&self) -> bool {
        self.probed.is_some()
    }

    /// Notes that the driver sets the line up.
    pub(super) fn note_set_up(&mut self) {
        self.polls = 0;
    }

    /// Notes a byte of output. A driver that polls for input goes on to do so.
    pub(super) fn note_output(&mut self) {
        if self.polls < POLLS {
            self.polls = 0;
        }
    }

    /// Notes a read of the line status register, which showed input where `ready` is set.
    pub(super) fn note_line_status(&mut self, ready: Ready) {
        self.polls = self.polls.saturating_add(1);
        if ready == Ready::No {
            self.note_nothing();
        }
    }

    /// Notes that the driver has looked for input where there is none: it reads until then, or was interrupted for nothing.
    fn note_nothing(&mut self) {
        if std::mem::take(&mut self.raised_by_read) {
            self.credits = self.credits.saturating_sub(1);
        }
    }

    /// Notes that the driver has read a byte. `ready` says if there is more.
    pub(super) fn note_read(&mut self, ready: Ready) {
        self.reads = self.reads.wrapping_add(1);
        if self.credits > 0 && self.interrupts(ready) {
            self.raised = false;
            self.raised_by_read = true;
        }
    }

    /// Returns true if input interrupts the guest. `ready` says if there is input.
    fn interrupts(&self, ready: Ready) -> bool {
        ready == Ready::Yes && self.interrupt_enable & IER_RECEIVED != 0
    }

    /// Returns the interrupt identification register where input interrupts the guest, else what the model has, in `model`.
    pub(super) fn identification(&mut self, ready: Ready, model: impl FnOnce() -> u8) -> u8 {
        let fifo = if self.trigger.is_some() { IIR_FIFO } else { 0 };
        if self.interrupts(ready) {
            let below = self.trigger.is_some_and(|trigger| self.fifo.len() < trigger);
            return fifo | if below { IIR_TIME_OUT } else { IIR_RECEIVED };
        }
        self.note_nothing();
        fifo | model() & !IIR_FIFO
    }

    /// Returns true if the line is to be raised, as input interrupts the guest since the last call, or again.
    pub(super) fn update_line(&mut self, ready: Ready) -> bool {
        let interrupts = self.interrupts(ready);
        let was = std::mem::replace(&mut self.raised, interrupts);
        interrupts && !was
    }

    /// Looks for input that the driver has left in the FIFO.
    pub(super) fn remind(&mut self, ready: Ready, now: Instant) -> Reminder {
        if let Some(since) = self.probed {
            let left = PROBE.saturating_sub(now.saturating_duration_since(since));
            if !left.is_zero() {
                return Reminder::Later(left);
            }
            self.probed = None;
            return Reminder::Ready;
        }
        if !self.interrupts(ready) {
            self.watch = None;
            return Reminder::Nothing;
        }
        match &mut self.watch {
            Some(watch) if watch.reads == self.reads => {
                let wait = watch.due.saturating_duration_since(now);
                if !wait.is_zero() {
                    return Reminder::Later(wait);
                }
                watch.left = (watch.left * 2).min(MAX_LEFT);
                watch.due = now + watch.left;
                self.credits = CREDITS;
                Reminder::Raise(watch.left)
            }
            _ => {
                self.watch = Some(Watch { reads: self.reads, due: now + MIN_LEFT, left: MIN_LEFT });
                Reminder::Later(MIN_LEFT)
            }
        }
    }
}

/// If there is input to read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ready {
    Yes,
    No,
}
