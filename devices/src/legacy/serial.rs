//! The 16550 UART (vm-superio's model) on the bus. Input waits until the guest's driver is ready for it.

use crate::bus::{Action, BusDevice};
use crate::console::{ConsoleInput, InputError};
use crate::irq::IrqLine;
use std::io::{self, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use vm_superio::Serial;
use vm_superio::serial::{Error as UartError, SerialEvents};
use vmm_sys_util::eventfd::EventFd;

// Registers and bits (PC16550D data sheet §8): interrupt enable register, modem control register.
const IER_OFFSET: u8 = 1;
const IER_RECEIVED: u8 = 1;
const IER_ALL: u8 = 0xf;
const MCR_LOOP: u8 = 1 << 4;

/// Wakes the event loop when the guest has read all input.
struct InputTaken(Arc<EventFd>);

impl SerialEvents for InputTaken {
    fn buffer_read(&self) {}
    fn out_byte(&self) {}
    fn tx_lost_byte(&self) {}
    fn in_buffer_empty(&self) {
        wake(&self.0);
    }
}

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

struct Inner {
    uart: Serial<IrqLine, InputTaken, Collected>,
    output: Box<dyn Write + Send>,
    /// An output error was logged.
    failed: bool,
}

impl Inner {
    fn write_register(&mut self, register: u8, value: u8) {
        if let Err(error) = self.uart.write(register, value) {
            self.log_once(&error);
        }
    }

    fn log_once(&mut self, error: &UartError<io::Error>) {
        // A closed pipe fails at every byte.
        if !std::mem::replace(&mut self.failed, true) {
            log::error!("UART: cannot write the output: {error}");
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

    /// Returns true if the guest's driver reads input. All interrupt enable bits at once, or loopback, mean that a driver
    /// probes the type of the UART.
    fn accepts_input(&self) -> bool {
        let state = self.uart.state();
        let enabled = state.interrupt_enable & IER_ALL;
        enabled & IER_RECEIVED != 0 && enabled != IER_ALL && state.modem_control & MCR_LOOP == 0
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
        let events = InputTaken(Arc::clone(&input_wanted));
        let uart = Serial::with_events(irq, events, Collected { bytes: Vec::new() });
        Self {
            inner: Mutex::new(Inner { uart, output, failed: false }),
            input_wanted,
            input_missed: AtomicBool::new(false),
        }
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

    /// Must be called after the lock was released. Requests input again that could not be passed on meanwhile.
    fn request_missed_input(&self) {
        if self.input_missed.swap(false, Ordering::AcqRel) {
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
        let count = input.len().min(inner.uart.fifo_capacity());
        match inner.uart.enqueue_raw_bytes(&input[..count]) {
            Ok(taken) => Ok(taken),
            Err(UartError::Trigger(error)) => Err(InputError::Signal(error)),
            Err(UartError::FullFifo | UartError::IOError(_)) => Ok(0),
        }
    }
}

impl BusDevice for SerialPort {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let (Ok(register), [value]) = (u8::try_from(offset), data) else { return };
        *value = self.lock().uart.read(register);
        self.request_missed_input();
    }

    fn write(&self, offset: u64, data: &[u8]) -> Action {
        self.write_string(offset, 1, data.get(..1).unwrap_or_default())
    }

    fn write_string(&self, offset: u64, size: usize, data: &[u8]) -> Action {
        let Ok(register) = u8::try_from(offset) else { return Action::None };
        let mut inner = self.lock();
        for value in data.iter().step_by(size.max(1)) {
            inner.write_register(register, *value);
        }
        inner.flush();
        let ready = register == IER_OFFSET && inner.accepts_input();
        drop(inner);
        if ready {
            wake(&self.input_wanted);
        }
        self.request_missed_input();
        Action::None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::{Receiver, Sender, channel};
    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    struct Sink(Sender<Vec<u8>>);
    impl Write for Sink {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.send(bytes.to_vec()).map_err(io::Error::other)?;
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn port() -> (SerialPort, Receiver<Vec<u8>>, Arc<EventFd>) {
        let event = || Arc::new(EventFd::new(EFD_NONBLOCK).expect("eventfd"));
        let (wanted, (sender, receiver)) = (event(), channel());
        let port = SerialPort::new(IrqLine::new(event()), Box::new(Sink(sender)), Arc::clone(&wanted));
        (port, receiver, wanted)
    }

    #[test]
    fn a_string_is_one_write_and_loses_nothing() {
        let (port, output, _) = port();
        port.write_string(0, 1, b"hello");
        assert_eq!(output.try_recv().expect("one write"), b"hello");
        assert!(output.try_recv().is_err());
        // Items of two bytes: the port is one byte wide, so that only the low byte is written.
        port.write_string(0, 2, b"a-b-");
        assert_eq!(output.try_recv().expect("one write"), b"ab");
    }

    /// Output that blocks until the test allows it to continue.
    struct Stuck(Receiver<()>, Sender<()>);
    impl Write for Stuck {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.1.send(()).map_err(io::Error::other)?;
            self.0.recv().map_err(io::Error::other)?;
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn input_does_not_wait_for_stuck_output() {
        let event = || Arc::new(EventFd::new(EFD_NONBLOCK).expect("eventfd"));
        let wanted = event();
        let ((go, wait), (inside, entered)) = (channel(), channel());
        let output = Box::new(Stuck(wait, inside));
        let port = Arc::new(SerialPort::new(IrqLine::new(event()), output, Arc::clone(&wanted)));
        port.write(1, &[5]);
        wanted.read().expect("woken by the driver");
        let vcpu = {
            let port = Arc::clone(&port);
            std::thread::spawn(move || port.write(0, b"x"))
        };
        entered.recv().expect("the vCPU writes");
        assert_eq!(port.enqueue(b"typed").expect("no interrupt"), 0);
        go.send(()).expect("the output goes on");
        vcpu.join().expect("written");
        wanted.read().expect("woken to try again");
        assert_eq!(port.enqueue(b"typed").expect("enqueued"), 5);
    }

    #[test]
    fn the_transmitter_is_always_ready() {
        let (port, _output, _) = port();
        let mut status = [0xff];
        port.read(5, &mut status);
        assert_eq!(status, [0x60]);
        let mut wide = [0xff; 4];
        port.read(5, &mut wide);
        assert_eq!(wide, [0xff; 4]);
    }

    #[test]
    fn input_waits_for_the_guest() {
        let (port, _output, wanted) = port();
        assert_eq!(port.enqueue(b"early").expect("no interrupt"), 0);
        port.write(1, &[0xf]);
        assert_eq!(port.enqueue(b"probe").expect("no interrupt"), 0, "the driver is probing");
        assert!(wanted.read().is_err());
        port.write(1, &[0x5]);
        wanted.read().expect("the event loop is woken");
        let long = [b'x'; 100];
        assert_eq!(port.enqueue(&long).expect("enqueued"), 64);
        assert_eq!(port.enqueue(&long).expect("full"), 0);
        for _ in 0..64 {
            port.read(0, &mut [0]);
        }
        wanted.read().expect("woken again when empty");
        assert_eq!(port.enqueue(b"y").expect("enqueued"), 1);
    }
}
