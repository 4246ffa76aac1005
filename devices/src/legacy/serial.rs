//! The 16550 UART on the bus: vm-superio's model of its registers and its transmitter, and a receiver of our own.
//! Input waits until the guest's driver is ready for it.

mod receiver;
mod state;
#[cfg(test)]
mod tests;

use crate::bus::{Action, BusDevice};
use crate::console::{ConsoleInput, InputError};
use crate::irq::IrqLine;
pub use state::{UartState, UartStateError};

use receiver::{Ready, Receiver, Reminder};
use std::io::{self, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::{Duration, Instant};
use vm_superio::serial::{Error as UartError, NoEvents};
use vm_superio::{Serial, Trigger};
use vmm_sys_util::eventfd::EventFd;

// Registers (PC16550D data sheet §8) and their bits.
const DATA: u8 = 0;
const INTERRUPT_ENABLE: u8 = 1;
/// Interrupt identification when read, FIFO control when written.
const INTERRUPT_IDENTIFICATION: u8 = 2;
const FIFO_CONTROL: u8 = 2;
const LINE_CONTROL: u8 = 3;
const MODEM_CONTROL: u8 = 4;
const LINE_STATUS: u8 = 5;
/// Registers 0 and 1 are the divisor of the bit rate.
const LCR_DIVISOR: u8 = 1 << 7;
const MCR_LOOP: u8 = 1 << 4;
const LSR_DATA_READY: u8 = 1;

/// Bytes of output that are held back at most.
const HELD_BYTES: usize = 512;
/// When [`SerialPort::remind`] is to be called again where a vCPU holds the lock.
const BUSY: Duration = Duration::from_millis(10);

fn wake(event: &EventFd) {
    if let Err(error) = event.write(1) {
        log::error!("UART: cannot wake the event loop for input: {error}");
    }
}

/// Collects the bytes of one access. vm-superio flushes after each byte, and one write to the host costs less than many.
struct Collected {
    bytes: Vec<u8>,
}

impl Write for Collected {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// When output goes to the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Batching {
    /// With each access.
    Off,
    /// Output of a driver that polls: a line at once.
    Lines,
}

struct Inner {
    batching: Batching,
    uart: Serial<IrqLine, NoEvents, Collected>,
    irq: IrqLine,
    receiver: Receiver,
    output: Box<dyn Write + Send>,
    /// The guest took input at the last look.
    wanted: bool,
    /// The last access was a byte of output.
    in_output: bool,
    /// An output error was logged.
    failed: bool,
}

impl Inner {
    fn has_divisor(&mut self) -> bool {
        self.uart.read(LINE_CONTROL) & LCR_DIVISOR != 0
    }

    fn is_loopback(&mut self) -> bool {
        self.uart.read(MODEM_CONTROL) & MCR_LOOP != 0
    }

    /// Returns true if the model has a byte that was sent in loopback mode.
    fn has_looped(&mut self) -> bool {
        self.uart.read(LINE_STATUS) & LSR_DATA_READY != 0
    }

    /// In loopback mode the guest reads what it has written; the host's input waits.
    fn ready(&mut self) -> Ready {
        let ready = self.has_looped() || !self.receiver.is_empty() && !self.is_loopback();
        if ready { Ready::Yes } else { Ready::No }
    }

    fn read_register(&mut self, register: u8) -> u8 {
        self.in_output = false;
        match register {
            DATA if !self.has_divisor() => {
                let looped = self.has_looped() || self.is_loopback();
                let value = if looped { None } else { self.receiver.take() };
                let value = value.unwrap_or_else(|| self.uart.read(DATA));
                let ready = self.ready();
                self.receiver.note_read(ready);
                value
            }
            INTERRUPT_ENABLE if !self.has_divisor() => self.receiver.interrupt_enable(),
            INTERRUPT_IDENTIFICATION => {
                let ready = self.ready();
                self.receiver.identification(ready, || self.uart.read(INTERRUPT_IDENTIFICATION))
            }
            LINE_STATUS => {
                let ready = self.ready();
                self.receiver.note_line_status(ready);
                let input = if ready == Ready::Yes { LSR_DATA_READY } else { 0 };
                self.uart.read(LINE_STATUS) | input
            }
            _ => self.uart.read(register),
        }
    }

    fn write_register(&mut self, register: u8, value: u8) {
        let mut for_model = value;
        match register {
            INTERRUPT_ENABLE if !self.has_divisor() => {
                self.receiver.set_interrupt_enable(value);
                for_model = self.receiver.interrupt_enable_of_model();
            }
            DATA if !self.has_divisor() => {
                self.receiver.note_output();
                // Output takes the transmitter's interrupt back, and brings it again, also for a driver that does not identify it.
                // The model wants that. One interrupt for each burst of bytes is enough.
                if !self.in_output && !self.is_loopback() {
                    self.uart.read(INTERRUPT_IDENTIFICATION);
                }
            }
            FIFO_CONTROL => self.receiver.set_fifo_control(value),
            LINE_CONTROL | MODEM_CONTROL => self.receiver.note_set_up(),
            _ => {}
        }
        self.in_output = register == DATA;
        if let Err(error) = self.uart.write(register, for_model) {
            self.log_once(&error);
        }
    }

    fn log_once(&mut self, error: &UartError<io::Error>) {
        // A closed pipe fails at every byte.
        if !std::mem::replace(&mut self.failed, true) {
            log::error!("UART: cannot write the output, or interrupt the guest: {error}");
        }
    }

    /// Writes the guest's output to the host. Blocks while the host does not accept it, so that no byte is lost.
    fn flush(&mut self) {
        let bytes = std::mem::take(&mut self.uart.writer_mut().bytes);
        if bytes.is_empty() {
            return;
        }
        if let Err(error) = self.output.write_all(&bytes).and_then(|()| self.output.flush()) {
            self.log_once(&UartError::IOError(error));
        }
        let mut bytes = bytes;
        bytes.clear();
        self.uart.writer_mut().bytes = bytes;
    }

    /// Writes the output after an access to `register`. A driver that polls, as Linux' printk does, has interrupts off, and reads
    /// the line status before each byte: its output is held back until the line ends, it does something else, or
    /// [`BusDevice::flush`] is called. One write to the host costs less than many.
    fn flush_after(&mut self, register: u8) {
        let polls = self.receiver.interrupt_enable() == 0 && matches!(register, DATA | LINE_STATUS);
        let bytes = &self.uart.writer_mut().bytes;
        let hold = self.batching == Batching::Lines && polls && bytes.len() < HELD_BYTES && !bytes.ends_with(b"\n");
        if !hold {
            self.flush();
        }
    }

    fn accepts_input(&mut self) -> bool {
        self.receiver.is_wanted() && !self.is_loopback()
    }

    /// Raises the line where input interrupts the guest now. Returns true if it does.
    fn update_line(&mut self) -> bool {
        let ready = self.ready();
        let raise = self.receiver.update_line(ready);
        if raise {
            self.raise_line();
        }
        raise
    }

    fn raise_line(&mut self) {
        if let Err(error) = self.irq.trigger() {
            self.log_once(&UartError::Trigger(error));
        }
    }

    /// Must be called after each access of the guest. Returns true if the UART takes more input than before.
    fn finish_access(&mut self, was_empty: bool) -> bool {
        let wanted = self.accepts_input();
        let wanted_before = std::mem::replace(&mut self.wanted, wanted);
        wanted && (!wanted_before || !was_empty && self.receiver.is_empty())
    }
}

/// A UART, which has eight ports.
pub struct SerialPort {
    inner: Mutex<Inner>,
    /// Signalled when the UART can take more input.
    input_wanted: Arc<EventFd>,
    /// Input could not be passed on, as a vCPU held the lock.
    input_missed: AtomicBool,
}

impl SerialPort {
    /// Makes a UART that raises `irq`, writes to `output`, and writes to `input_wanted` when it can take more input.
    #[must_use]
    pub fn new(irq: IrqLine, output: Box<dyn Write + Send>, input_wanted: Arc<EventFd>) -> Self {
        let uart = Serial::new(irq.clone(), Collected { bytes: Vec::new() });
        let receiver = Receiver::new();
        Self {
            inner: Mutex::new(Inner {
                batching: Batching::Off,
                uart,
                irq,
                receiver,
                output,
                wanted: false,
                in_output: false,
                failed: false,
            }),
            input_wanted,
            input_missed: AtomicBool::new(false),
        }
    }

    /// Has the output of drivers that poll written in lines. [`BusDevice::flush`] must be called regularly then.
    pub fn batch_output(&self) {
        self.lock().batching = Batching::Lines;
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn try_lock(&self) -> Option<MutexGuard<'_, Inner>> {
        match self.inner.try_lock() {
            Ok(guard) => Some(guard),
            Err(TryLockError::Poisoned(error)) => Some(error.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    /// Returns its state, but for output that is held back: [`BusDevice::flush`] comes first.
    #[must_use]
    pub fn save(&self) -> UartState {
        let inner = self.lock();
        UartState::new(&inner.uart.state(), &inner.receiver, inner.in_output)
    }

    /// Sets its state, and raises its line where the driver has interrupts on: what it had raised may not have reached the
    /// interrupt controller. A driver finds nothing to do then.
    ///
    /// # Errors
    /// [`UartStateError`].
    pub fn restore(&self, state: &UartState) -> Result<(), UartStateError> {
        let mut inner = self.lock();
        let receiver = state.receiver()?;
        let output = Collected { bytes: Vec::new() };
        inner.uart = Serial::from_state(&state.model(), inner.irq.clone(), NoEvents, output)
            .map_err(|error| UartStateError::Model(error.to_string()))?;
        inner.receiver = receiver;
        inner.in_output = state.in_output;
        inner.wanted = inner.accepts_input();
        if inner.receiver.interrupt_enable() != 0 {
            inner.raise_line();
        }
        drop(inner);
        self.request_input(true);
        Ok(())
    }

    /// Must be called after the lock was released. Requests input where it is `wanted`, or could not be passed on meanwhile.
    fn request_input(&self, wanted: bool) {
        if self.input_missed.swap(false, Ordering::AcqRel) || wanted {
            wake(&self.input_wanted);
        }
    }
}

impl ConsoleInput for SerialPort {
    /// Returns 0 while the guest's driver does not read input or the FIFO is full; `input_wanted` is signalled when that
    /// changes. Does not wait for the lock, which a vCPU holds for as long as the host does not accept its output.
    fn enqueue(&self, input: &[u8]) -> Result<usize, InputError> {
        let guard = self.try_lock().or_else(|| {
            // Set before the second try, so that a vCPU that releases the lock in between sees it.
            self.input_missed.store(true, Ordering::Release);
            self.try_lock()
        });
        let Some(mut inner) = guard else { return Ok(0) };
        if !inner.accepts_input() {
            return Ok(0);
        }
        let count = inner.receiver.add(input);
        inner.update_line();
        Ok(count)
    }

    /// Raises the line again where the guest has left input in the FIFO.
    fn remind(&self) -> Option<Duration> {
        let Some(mut inner) = self.try_lock() else { return Some(BUSY) };
        let ready = inner.ready();
        match inner.receiver.remind(ready, Instant::now()) {
            Reminder::Nothing => None,
            Reminder::Later(after) => Some(after),
            Reminder::Raise(after) => {
                inner.raise_line();
                Some(after)
            }
            Reminder::Ready => {
                drop(inner);
                wake(&self.input_wanted);
                None
            }
        }
    }

    fn unread(&self) -> Vec<u8> {
        self.lock().receiver.unread()
    }
}

impl BusDevice for SerialPort {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let (Ok(register), [value]) = (u8::try_from(offset), data) else { return };
        let mut inner = self.lock();
        let was_empty = inner.receiver.is_empty();
        if register != INTERRUPT_ENABLE {
            inner.receiver.note_access();
        }
        *value = inner.read_register(register);
        inner.flush_after(register);
        inner.update_line();
        let wanted = inner.finish_access(was_empty);
        drop(inner);
        self.request_input(wanted);
    }

    fn write(&self, offset: u64, data: &[u8]) -> Action {
        self.write_string(offset, 1, data.get(..1).unwrap_or_default())
    }

    fn write_string(&self, offset: u64, size: usize, data: &[u8]) -> Action {
        let Ok(register) = u8::try_from(offset) else { return Action::None };
        let mut inner = self.lock();
        if register != INTERRUPT_ENABLE {
            inner.receiver.note_access();
        }
        for value in data.iter().step_by(size.max(1)) {
            inner.write_register(register, *value);
        }
        inner.flush_after(register);
        let was_empty = inner.receiver.is_empty();
        // The event loop has to watch that this interrupt is seen, or for the end of the probe.
        let watch = inner.update_line() || register == INTERRUPT_ENABLE && inner.receiver.is_probed();
        let wanted = inner.finish_access(was_empty) || watch;
        drop(inner);
        self.request_input(wanted);
        Action::None
    }
    fn flush(&self) {
        self.lock().flush();
        self.request_input(false);
    }
}
