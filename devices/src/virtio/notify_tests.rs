//! Used buffer notifications: how many there are, and how long a driver waits for one.

use super::device::{ActivateError, Activation, DeviceKind, VirtioDevice};
use super::device_thread::DeviceThread;
use super::mock::{Descriptor, Driver, WRITE};
use super::queue::Virtqueue;
use super::worker::{Worker, watch};
use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// `VIRTIO_F_EVENT_IDX`, without which the device notifies the driver of each batch.
const EVENT_IDX: u64 = 1 << 29;
/// Far more than the device may take, for a host with other work, and far less than without a bound.
const MAX_WAIT: Duration = Duration::from_millis(100);

/// A device that takes its time for each chain.
struct Slow(Duration);

struct SlowWorker {
    queue: Virtqueue,
    time: Duration,
}

impl VirtioDevice for Slow {
    fn kind(&self) -> DeviceKind {
        DeviceKind { id: 4, name: "slow", pci_class: 0x00ff }
    }

    fn queue_max_sizes(&self) -> Vec<u16> {
        vec![256]
    }

    fn thread_role(&self) -> DeviceThread {
        DeviceThread::Rng
    }

    fn activate(&mut self, mut activation: Activation) -> Result<Vec<Worker>, ActivateError> {
        Ok(vec![Box::new(SlowWorker { queue: activation.take_queue(0)?, time: self.0 })])
    }
}

impl MutEventSubscriber for SlowWorker {
    fn process(&mut self, _events: Events, _ops: &mut EventOps<'_>) {
        let time = self.time;
        self.queue.serve(|_| {
            let start = Instant::now();
            while start.elapsed() < time {
                std::thread::yield_now();
            }
            Some(1)
        });
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        watch(ops, Events::new(self.queue.kick(), EventSet::IN));
    }
}

fn slow(time: Duration) -> Driver {
    let mut driver = Driver::new(Box::new(Slow(time)));
    driver.start(!EVENT_IDX);
    for index in 0..256 {
        driver.put_descriptor(0, index, Descriptor { gpa: 0x80_0000, len: 1, flags: WRITE, next: 0 });
    }
    driver
}

/// Makes `more` be called until `end`, and returns the longest time without an interrupt.
fn longest_wait(driver: &mut Driver, end: Duration, mut more: impl FnMut(&mut Driver)) -> Duration {
    let (start, mut last, mut longest) = (Instant::now(), Instant::now(), Duration::ZERO);
    while start.elapsed() < end {
        more(driver);
        if driver.interrupts() > 0 {
            last = Instant::now();
        }
        longest = longest.max(last.elapsed());
        std::thread::sleep(Duration::from_micros(50));
    }
    longest
}

#[test]
fn chains_that_keep_coming_delay_no_notification() {
    let mut driver = slow(Duration::ZERO);
    let mut head = 0;
    let longest = longest_wait(&mut driver, MAX_WAIT * 5, |driver| {
        while driver.poll_used(0).is_some() {}
        driver.make_available(0, head % 256);
        driver.kick(0);
        head = head.wrapping_add(1);
    });
    assert!(longest < MAX_WAIT, "{longest:?} without an interrupt");
}

#[test]
fn a_ring_that_is_never_empty_delays_no_notification() {
    let mut driver = slow(Duration::from_micros(20));
    let mut index = 0_u16;
    let longest = longest_wait(&mut driver, MAX_WAIT * 5, |driver| {
        // As many as the queue has, whatever is used: each round ends with chains left.
        let used = driver.used_index(0);
        if used.wrapping_add(255) != index {
            index = used.wrapping_add(255);
            driver.set_available_index(0, index);
            driver.kick(0);
        }
    });
    assert!(longest < MAX_WAIT, "{longest:?} without an interrupt");
}

#[test]
fn a_batch_that_takes_long_delays_no_notification() {
    let mut driver = slow(Duration::from_millis(1));
    (0..256).for_each(|head| driver.make_available(0, head));
    driver.kick(0);
    let longest = longest_wait(&mut driver, Duration::from_millis(250), |_| {});
    assert!(longest < MAX_WAIT, "{longest:?} without an interrupt");
}

/// Returns the number of notifications for `batches` batches of `depth` chains, each made available after the one before.
fn notifications(batches: u64, depth: u16) -> u64 {
    let mut driver = slow(Duration::ZERO);
    for _ in 0..batches {
        (0..depth).for_each(|head| driver.make_available(0, head));
        driver.kick(0);
        for _ in 0..depth {
            driver.wait_used(0);
        }
        driver.wait_interrupt();
    }
    driver.device().counts()[0].interrupts.load(Ordering::Relaxed)
}

#[test]
fn a_batch_is_one_notification() {
    for depth in [1, 32] {
        // A host with other work may take longer than a notification may be delayed.
        let fewest = (0..5).map(|_| notifications(40, depth)).min();
        assert_eq!(fewest, Some(40), "depth {depth}");
    }
}
