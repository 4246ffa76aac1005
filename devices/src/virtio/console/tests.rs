//! The console, from the driver and from the host.

use super::port::PENDING_BYTES;
use super::{Console, ConsoleSize};
use crate::console::ConsoleInput;
use crate::virtio::mock::{Driver, Used};
use proptest::prelude::*;
use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

#[derive(Clone, Default)]
struct Sink(Arc<Mutex<Vec<u8>>>);
impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().expect("not poisoned").extend(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn console() -> (Arc<super::Port>, Sink, Arc<EventFd>, Driver) {
    let (sink, wanted) = (Sink::default(), Arc::new(EventFd::new(EFD_NONBLOCK).expect("an eventfd")));
    let device = Console::new(Box::new(sink.clone()), Arc::clone(&wanted), ConsoleSize { columns: 80, rows: 25 })
        .expect("a console");
    (device.port(), sink, wanted, Driver::running(Box::new(device)))
}

#[test]
fn output_comes_out_in_order() {
    let (_port, sink, _wanted, mut driver) = console();
    let long = vec![b'x'; 10_000];
    driver.request(1, &[b"one ", b"two\n"], &[]);
    driver.request(1, &[&long], &[]);
    let seen = sink.0.lock().expect("not poisoned");
    assert_eq!(seen[..8], *b"one two\n");
    assert_eq!(seen.len(), 10_008);
}

#[test]
fn input_waits_for_buffers_and_more_is_requested() {
    let (port, _sink, wanted, mut driver) = console();
    let input: Vec<u8> = (0..PENDING_BYTES + 100).map(|at| u8::try_from(at % 251).expect("small")).collect();
    assert_eq!(port.enqueue(&input).expect("taken"), PENDING_BYTES);
    assert_eq!(port.enqueue(&input).expect("full"), 0);
    let mut seen = Vec::new();
    while seen.len() < PENDING_BYTES {
        seen.extend(driver.request(0, &[], &[700, 300]));
    }
    assert_eq!(seen, input[..PENDING_BYTES]);
    let start = std::time::Instant::now();
    while wanted.read().is_err() {
        assert!(start.elapsed().as_secs() < 10, "not wanted");
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    let waiting = driver.submit(0, &[], &[64]);
    assert_eq!(port.enqueue(b"late").expect("taken"), 4);
    assert_eq!(driver.wait_used(0), Used { head: u32::from(waiting.head), len: 4 });
    assert_eq!(driver.contents(&waiting, 4), b"late");
}

#[test]
fn the_driver_is_notified_of_the_size_and_of_its_changes() {
    let (port, _sink, _wanted, driver) = console();
    assert_eq!(driver.read(0x100), 25 << 16 | 80);
    assert_eq!(driver.interrupts(), 1, "Linux reads the size only after a configuration change notification");
    let generation = driver.read(0xfc);
    port.resize(ConsoleSize { columns: 100, rows: 40 });
    assert_eq!(driver.read(0x100), 40 << 16 | 100);
    assert_eq!(driver.read_page(0x100), 40 << 16 | 100, "in the register page");
    assert_ne!(driver.read(0xfc), generation);
    assert_eq!(driver.read_page(0xfc), driver.read(0xfc));
    assert_eq!(driver.read_page(0x60), 2, "a change of the configuration");
    assert_eq!(driver.interrupts(), 1);
}

/// Pastes `bytes` bytes to a guest whose buffers have the lengths `lengths`, one after the other. The guest has up to `posted`
/// of them available, and posts none for a while after each `pause` bytes.
fn paste(bytes: usize, lengths: &[u32], posted: usize, pause: usize) {
    let (port, _sink, wanted, mut driver) = console();
    let input: Vec<u8> = (0..bytes).map(|at| u8::try_from(at % 251).expect("small")).collect();
    let (mut passed, mut seen, mut next_pause) = (0, Vec::new(), pause);
    let (mut waiting, mut lengths) = (VecDeque::new(), lengths.iter().copied().cycle());
    wanted.write(1).expect("the host has input");
    let start = Instant::now();
    while seen.len() < bytes {
        assert!(start.elapsed() < Duration::from_secs(60), "{} of {bytes} bytes", seen.len());
        // Interrupts before what is looked at now are not waited for again.
        let _ = driver.interrupts();
        let (passed_before, seen_before, posted_before) = (passed, seen.len(), waiting.len());
        if wanted.read().is_ok() {
            loop {
                let count = port.enqueue(&input[passed..]).expect("no error");
                passed += count;
                if count == 0 {
                    break;
                }
            }
        }
        if seen.len() >= next_pause {
            next_pause += pause;
            std::thread::sleep(Duration::from_millis(2));
        } else {
            while waiting.len() < posted {
                waiting.push_back(driver.submit(0, &[], &[lengths.next().expect("without end")]));
            }
        }
        // What the guest has not taken waits on the host.
        assert!(passed <= seen.len() + PENDING_BYTES + waiting.len() * 5000, "{passed}");
        while let Some(used) = driver.poll_used(0) {
            let buffer = waiting.pop_front().expect("posted");
            assert_eq!(used.head, u32::from(buffer.head), "in order");
            seen.extend(driver.contents(&buffer, used.len));
        }
        // A loop would take the processor from the device's thread, for a time slice for each byte where there is no other one.
        if (passed, seen.len(), waiting.len()) == (passed_before, seen_before, posted_before) {
            driver.wait_interrupt_or(&wanted);
        }
    }
    assert!(seen == input);
}

#[test]
fn a_long_input_reaches_a_guest_with_buffers_of_any_size() {
    paste(1 << 20, &[4096], 16, 1 << 18);
    paste(1 << 20, &[5000, 1, 300], 60, 1 << 18);
    paste(20_000, &[1], 60, 7000);
    paste(20_000, &[1], 1, 7000);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn input_is_whole_and_in_order_whatever_the_buffers(
        lengths in prop::collection::vec(prop_oneof![1_u32..4, 1_u32..5000], 1..20),
        posted in 1_usize..60,
        pause in 500_usize..20_000,
    ) {
        paste(20_000, &lengths, posted, pause);
    }
}
