//! The UART, from the guest and from the host.

mod restored;

use super::receiver::FIFO_BYTES;
use super::*;
use proptest::prelude::*;
use std::sync::mpsc::{self, Sender, channel};
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

fn port() -> (SerialPort, mpsc::Receiver<Vec<u8>>, Arc<EventFd>) {
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

/// As serial8250_console_write of Linux: interrupts off, and the line status before each byte.
fn print(port: &SerialPort, text: &[u8]) {
    port.write(1, &[0]);
    for byte in text {
        port.read(5, &mut [0]);
        port.write(0, &[*byte]);
    }
}

#[test]
fn polled_output_is_written_in_lines() {
    let (port, output, _) = port();
    port.batch_output();
    let next = || output.try_recv().ok();
    print(&port, b"one\r\ntwo");
    assert_eq!((next().as_deref(), next()), (Some(&b"one\r\n"[..]), None), "a line at once");
    port.write(1, &[5]);
    assert_eq!(next().as_deref(), Some(&b"two"[..]), "the driver's interrupts are on again");
    port.write(0, b"x");
    assert_eq!(next().as_deref(), Some(&b"x"[..]), "a driver that does not poll");
    print(&port, b"login: ");
    assert_eq!(next(), None);
    BusDevice::flush(&port);
    assert_eq!(next().as_deref(), Some(&b"login: "[..]));
    print(&port, b"abc");
    port.read(2, &mut [0]);
    assert_eq!(next().as_deref(), Some(&b"abc"[..]), "another register is read");
    print(&port, &[b'-'; HELD_BYTES + 1]);
    assert_eq!(next().map(|bytes| bytes.len()), Some(HELD_BYTES), "a long line");
}

#[test]
fn without_batching_each_byte_is_written_at_once() {
    let (port, output, _) = port();
    print(&port, b"ab");
    assert_eq!(output.try_iter().collect::<Vec<_>>(), [b"a", b"b"]);
}

/// Output that blocks until the test allows it to continue.
struct Stuck(mpsc::Receiver<()>, Sender<()>);
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
    wanted.read().expect("woken, to see the end of the probe");
    assert_eq!(port.enqueue(b"probe").expect("no interrupt"), 0, "the driver is probing");
    port.read(1, &mut [0]);
    assert_eq!(port.enqueue(b"probe").expect("no interrupt"), 0, "the driver is probing");
    port.write(1, &[0]);
    assert!(wanted.read().is_err());
    port.write(1, &[0x5]);
    wanted.read().expect("the event loop is woken");
    let long = [b'x'; 100];
    assert_eq!(port.enqueue(&long).expect("enqueued"), 64);
    assert_eq!(port.enqueue(&long).expect("full"), 0);
    assert_eq!(port.unread(), [b'x'; 64]);
    for _ in 0..64 {
        port.read(0, &mut [0]);
    }
    wanted.read().expect("woken again when empty");
    assert_eq!(port.enqueue(b"y").expect("enqueued"), 1);
}

/// A guest, its host, and the interrupt line between them.
struct Guest {
    port: SerialPort,
    line: Arc<EventFd>,
    wanted: Arc<EventFd>,
    /// What the guest has read.
    read: Vec<u8>,
    /// When the host's timer runs out.
    due: Option<Instant>,
    /// Times at which only a reminder went on.
    reminders: u32,
}

/// How a driver looks for input before it reads a byte.
#[derive(Clone, Copy, Debug)]
enum Check {
    Identification,
    LineStatus,
}

/// How a driver reads.
#[derive(Clone, Copy, Debug)]
enum Habit {
    /// One byte for each interrupt.
    One(Check),
    /// Up to so many bytes for each interrupt, as long as the line status shows more.
    Burst(usize),
    /// What the interrupt identification promises: the trigger level, or a byte after a time-out.
    Promised,
    /// Until the line status shows no more.
    Drain,
    /// As Linux: until the interrupt identification shows no more.
    Identified,
    /// Polls the line status register, without interrupts.
    Poll,
}

/// What a driver does before it goes on to read.
#[derive(Clone, Copy, Debug)]
enum Before {
    Nothing,
    /// Disables interrupts, as Linux does for a message, and prints.
    Print,
    /// Tests the UART in loopback mode.
    Loopback,
    /// Leaves input and interrupts alone for a moment.
    Pause,
}

const LCR: u64 = 3;
const MCR: u64 = 4;
const LSR: u64 = 5;

impl Guest {
    fn new() -> Self {
        let event = || Arc::new(EventFd::new(EFD_NONBLOCK).expect("eventfd"));
        let (line, wanted) = (event(), event());
        let port = SerialPort::new(IrqLine::new(Arc::clone(&line)), Box::new(io::sink()), Arc::clone(&wanted));
        Self { port, line, wanted, read: Vec::new(), due: None, reminders: 0 }
    }

    fn register(&self, register: u64) -> u8 {
        let mut value = [0];
        self.port.read(register, &mut value);
        value[0]
    }

    fn set(&self, register: u64, value: u8) {
        self.port.write(register, &[value]);
    }

    fn has_input(&self) -> bool {
        self.register(LSR) & 1 != 0
    }

    fn read_byte(&mut self) {
        let byte = self.register(0);
        self.read.push(byte);
    }

    fn handle_interrupt(&mut self, habit: Habit, trigger: usize) {
        match habit {
            Habit::One(Check::Identification) => {
                if matches!(self.register(2) & 0xf, 4 | 0xc) {
                    self.read_byte();
                }
            }
            Habit::One(Check::LineStatus) => {
                if self.has_input() {
                    self.read_byte();
                }
            }
            Habit::Burst(most) => {
                let mut left = most;
                while left > 0 && self.has_input() {
                    self.read_byte();
                    left -= 1;
                }
            }
            Habit::Promised => {
                let count = match self.register(2) & 0xf {
                    4 => trigger,
                    0xc => 1,
                    _ => 0,
                };
                (0..count).for_each(|_| self.read_byte());
            }
            Habit::Drain => {
                while self.has_input() {
                    self.read_byte();
                }
            }
            Habit::Identified => {
                while self.register(2) & 1 == 0 {
                    while self.has_input() {
                        self.read_byte();
                    }
                }
            }
            Habit::Poll => {
                for _ in 0..40 {
                    if self.has_input() {
                        self.read_byte();
                    }
                }
            }
        }
    }

    fn prepare(&self, before: Before, enable: u8) {
        match before {
            Before::Nothing => {}
            Before::Print => {
                self.set(1, 0);
                for byte in b"a message" {
                    self.register(LSR);
                    self.set(0, *byte);
                }
                self.set(1, enable);
            }
            Before::Loopback => {
                self.set(MCR, 0x1b);
                assert!(!self.has_input(), "the host's input is not looped");
                for byte in [1, 2, 3] {
                    self.set(0, byte);
                    assert!(self.has_input());
                    assert_eq!(self.register(0), byte);
                }
                self.set(MCR, 0x0b);
            }
            Before::Pause => {
                let _ = self.line.read();
            }
        }
    }

    /// Reads with `habit` until the guest has `end` bytes of `input`.
    fn read_until(&mut self, end: usize, input: &[u8], passed: &mut usize, habit: Habit, trigger: usize) {
        let start = Instant::now();
        if *passed == 0 {
            self.wanted.write(1).expect("the host has input");
        }
        while self.read.len() < end {
            assert!(start.elapsed() < Duration::from_secs(20), "{habit:?} has {} bytes", self.read.len());
            if self.wanted.read().is_ok() {
                while *passed < input.len() {
                    let count = self.port.enqueue(&input[*passed..]).expect("no error");
                    *passed += count;
                    if count == 0 {
                        break;
                    }
                }
                self.due = self.due.or_else(|| self.port.remind().map(|after| Instant::now() + after));
            }
            if matches!(habit, Habit::Poll) || self.line.read().is_ok() {
                self.handle_interrupt(habit, trigger);
            } else if let Some(at) = self.due {
                std::thread::sleep(at.saturating_duration_since(Instant::now()));
                self.reminders += 1;
                self.due = self.port.remind().map(|after| Instant::now() + after);
            } else {
                panic!("{habit:?}: stuck at {} of {end} bytes, {passed} passed on", self.read.len());
            }
        }
    }
}

fn pattern(bytes: usize) -> Vec<u8> {
    (0..bytes).map(|at| u8::try_from(at % 251).expect("small")).collect()
}

#[test]
fn received_data_stay_reported_while_there_are_any() {
    let (port, _output, _) = port();
    port.write(1, &[1]);
    assert_eq!(port.enqueue(b"abc").expect("taken"), 3);
    for left in (0..3).rev() {
        let mut byte = [0];
        port.read(0, &mut byte);
        port.read(2, &mut byte);
        assert_eq!(byte[0] & 1 == 0, left > 0, "{left} bytes left: {:#x}", byte[0]);
        port.read(2, &mut byte);
        assert_eq!(byte[0] & 1 == 0, left > 0, "reading the register takes nothing back");
    }
}

#[test]
fn input_and_output_are_identified_one_after_the_other() {
    let guest = Guest::new();
    guest.set(2, 0xc1);
    guest.set(1, 3);
    assert_eq!(guest.port.enqueue(&pattern(14)).expect("taken"), 14);
    assert_eq!(guest.register(2), 0xc4, "the trigger level of 14 bytes");
    guest.register(0);
    assert_eq!(guest.register(2), 0xcc, "less than the trigger level");
    for _ in 0..13 {
        guest.register(0);
    }
    assert_eq!(guest.register(2), 0xc2, "the transmitter was not forgotten");
    assert_eq!(guest.register(2), 0xc1);
}

#[test]
fn a_long_input_reaches_a_guest_of_any_habit() {
    let input = pattern(40_000);
    let check = |habit, control: u8, trigger, enable: u8| {
        let mut guest = Guest::new();
        guest.set(2, control);
        guest.set(1, enable);
        let mut passed = 0;
        guest.read_until(input.len(), &input, &mut passed, habit, trigger);
        assert!(guest.read == input, "{habit:?}");
        assert!(guest.reminders < 60, "{habit:?} needed {} reminders", guest.reminders);
    };
    for (control, trigger) in [(0, 1), (0xc1, 14), (1, 1)] {
        check(Habit::One(Check::Identification), control, trigger, 1);
        check(Habit::One(Check::LineStatus), control, trigger, 5);
        check(Habit::Burst(16), control, trigger, 1);
        check(Habit::Burst(10), control, trigger, 1);
        check(Habit::Promised, control, trigger, 1);
        check(Habit::Drain, control, trigger, 0xd);
        check(Habit::Identified, control, trigger, 5);
        check(Habit::Identified, control, trigger, 0xf);
        check(Habit::Poll, control, trigger, 0);
    }
}

#[test]
fn a_driver_that_reads_all_there_is_gets_no_more_interrupts_than_bursts() {
    let mut guest = Guest::new();
    let input = pattern(64 * 100);
    guest.set(2, 0x81);
    guest.set(1, 5);
    let (mut passed, mut interrupts) = (0, 0);
    while guest.read.len() < input.len() {
        passed += guest.port.enqueue(&input[passed..]).expect("taken");
        while guest.line.read().is_ok() {
            interrupts += 1;
            guest.handle_interrupt(Habit::Identified, 8);
        }
    }
    assert_eq!(interrupts, input.len() / FIFO_BYTES);
}

#[test]
fn input_that_is_left_raises_the_line_ever_more_rarely() {
    let guest = Guest::new();
    guest.set(2, 1);
    guest.set(1, 1);
    assert_eq!(guest.port.enqueue(b"left").expect("taken"), 4);
    assert_eq!(guest.line.read().expect("raised"), 1);
    let (start, mut waits) = (Instant::now(), Vec::new());
    while waits.len() < 4 {
        assert!(start.elapsed() < Duration::from_secs(20), "raised {} times", waits.len());
        let after = guest.port.remind().expect("input is left");
        if guest.line.read().is_ok() {
            waits.push(after);
        }
        std::thread::sleep(after);
    }
    // A thread that has waited for a processor is late, and the next wait is as long as it would have been.
    assert!(waits.is_sorted_by(|one, next| *next == 2 * *one), "{waits:?}");
    guest.set(1, 0);
    assert_eq!(guest.port.remind(), None, "the driver does not want interrupts");
}

fn habits() -> impl Strategy<Value = Habit> {
    prop_oneof![
        Just(Habit::One(Check::Identification)),
        Just(Habit::One(Check::LineStatus)),
        (1_usize..40).prop_map(Habit::Burst),
        Just(Habit::Promised),
        Just(Habit::Drain),
        Just(Habit::Identified),
        Just(Habit::Poll),
    ]
}

fn befores() -> impl Strategy<Value = Before> {
    prop_oneof![Just(Before::Nothing), Just(Before::Print), Just(Before::Loopback), Just(Before::Pause)]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    /// Whatever a driver does, it gets all input, in order.
    #[test]
    fn input_is_whole_and_in_order_with_changing_habits(
        steps in prop::collection::vec(
            (habits(), befores(), 0_u8..8, prop::sample::select(vec![1_u8, 3, 5, 0xd, 0xf]), 1_usize..600), 1..12)
    ) {
        let input = pattern(steps.iter().map(|step| step.4).sum());
        let (mut guest, mut passed, mut end) = (Guest::new(), 0, 0);
        for (habit, before, control, enable, bytes) in steps {
            let (level, enabled) = (usize::from(control >> 1), control & 1);
            let trigger = if enabled == 0 { 1 } else { [1, 4, 8, 14][level] };
            guest.set(2, u8::try_from(level).expect("small") << 6 | 6 | enabled);
            guest.set(LCR, 3);
            let enable = if matches!(habit, Habit::Poll) { 0 } else { enable };
            guest.set(1, enable);
            guest.prepare(before, enable);
            end += bytes;
            guest.read_until(end, &input, &mut passed, habit, trigger);
        }
        // The last burst may have more than the guest wanted.
        prop_assert!(guest.read[..] == input[..guest.read.len()]);
    }
}

/// A driver that looks at the line status only is interrupted for each burst of output; one interrupt is enough for it.
#[test]
fn output_brings_the_interrupt_of_the_transmitter_again() {
    let guest = Guest::new();
    guest.set(1, 2);
    for _ in 0..3 {
        assert_eq!(guest.line.read().expect("the transmitter is empty"), 1);
        assert_eq!(guest.register(LSR) & 0x20, 0x20);
        (b'a'..=b'p').for_each(|byte| guest.set(0, byte));
    }
    assert_eq!(guest.line.read().expect("the transmitter is empty"), 1);
    // One that identifies it gets as many.
    for _ in 0..3 {
        assert_eq!(guest.register(2) & 0xf, 2);
        (b'a'..=b'p').for_each(|byte| guest.set(0, byte));
        assert_eq!(guest.line.read().expect("the transmitter is empty"), 1);
    }
    assert_eq!(guest.register(2) & 0xf, 2);
    assert_eq!(guest.register(2) & 0xf, 1);
    assert!(guest.line.read().is_err());
}
