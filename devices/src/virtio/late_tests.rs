//! What happens on a device's thread while another thread has the transport: the end of a reset, changes of the configuration.

use super::device::{ActivateError, Activation, DeviceKind, VirtioDevice};
use super::device_thread::DeviceThread;
use super::interrupt::DeviceInterrupt;
use super::mock::Driver;
use super::worker::Worker;
use event_manager::{EventOps, Events, MutEventSubscriber};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

/// Lets threads pass once it is open.
#[derive(Clone, Default)]
pub(super) struct Gate(Arc<(Mutex<bool>, Condvar)>);

impl Gate {
    pub(super) fn open(&self) {
        *self.0.0.lock().expect("not poisoned") = true;
        self.0.1.notify_all();
    }

    fn pass(&self) {
        let open = self.0.0.lock().expect("not poisoned");
        drop(self.0.1.wait_while(open, |open| !*open).expect("not poisoned"));
    }
}

/// What a test has of a [`Late`] device.
#[derive(Clone, Default)]
pub(super) struct Handle {
    interrupt: Arc<Mutex<Option<Arc<DeviceInterrupt>>>>,
    /// Open: the worker ends.
    pub(super) end: Gate,
    value: Arc<AtomicU32>,
    /// Reads of the configuration wait here while `held` is not 0.
    reading: Gate,
    held: Arc<AtomicU32>,
}

impl Handle {
    pub(super) fn interrupt(&self) -> Arc<DeviceInterrupt> {
        self.interrupt.lock().expect("not poisoned").clone().expect("a driver")
    }
}

/// A device whose worker waits for the host when it ends.
pub(super) struct Late(pub(super) Handle);

struct LateWorker(Gate);

impl MutEventSubscriber for LateWorker {
    fn process(&mut self, _events: Events, _ops: &mut EventOps<'_>) {}

    fn init(&mut self, _ops: &mut EventOps<'_>) {}
}

impl Drop for LateWorker {
    fn drop(&mut self) {
        self.0.pass();
    }
}

impl VirtioDevice for Late {
    fn kind(&self) -> DeviceKind {
        DeviceKind { id: 4, name: "late", pci_class: 0x00ff }
    }

    fn queue_max_sizes(&self) -> Vec<u16> {
        vec![8]
    }

    fn thread_role(&self) -> DeviceThread {
        DeviceThread::Rng
    }

    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        let value = self.0.value.load(Ordering::SeqCst);
        if self.0.held.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |held| held.checked_sub(1)).is_ok() {
            self.0.reading.pass();
        }
        data[..4].copy_from_slice(&value.to_le_bytes());
    }

    fn activate(&mut self, activation: Activation) -> Result<Vec<Worker>, ActivateError> {
        *self.0.interrupt.lock().expect("not poisoned") = Some(activation.interrupt);
        Ok(vec![Box::new(LateWorker(self.0.end.clone()))])
    }
}

#[test]
fn a_reset_that_ends_late_leaves_no_interrupt_status() {
    let handle = Handle::default();
    let mut driver = Driver::running(Box::new(Late(handle.clone())));
    driver.write(0x70, 0);
    assert_eq!(driver.status(), 15, "the reset has not ended");
    handle.interrupt().signal_config_changed();
    handle.interrupt().signal_used_queue(0);
    handle.end.open();
    let start = Instant::now();
    while driver.read_page(0x70) != 0 {
        assert!(start.elapsed() < Duration::from_secs(10), "the reset does not end");
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_eq!((driver.read_page(0x60), driver.read(0x60)), (0, 0));
    driver.start(u64::MAX);
    assert_eq!(driver.status(), 15);
}

/// Two threads of a device change its configuration: the page of registers shows the last change.
#[test]
fn the_register_page_shows_a_change_that_came_while_it_was_updated() {
    let handle = Handle::default();
    handle.end.open();
    let driver = Driver::running(Box::new(Late(handle.clone())));
    let interrupt = handle.interrupt();
    handle.value.store(1, Ordering::SeqCst);
    handle.held.store(1, Ordering::SeqCst);
    let first = {
        let interrupt = Arc::clone(&interrupt);
        std::thread::spawn(move || interrupt.signal_config_changed())
    };
    while handle.held.load(Ordering::SeqCst) > 0 {
        std::thread::sleep(Duration::from_millis(1));
    }
    handle.value.store(2, Ordering::SeqCst);
    interrupt.signal_config_changed();
    handle.reading.open();
    first.join().expect("no panic");
    assert_eq!(driver.read_page(0x100), 2);
    assert_eq!(driver.read_page(0xfc), interrupt.config_generation());
}

/// A thread of the host looks at the device meanwhile.
#[test]
fn the_register_page_shows_a_change_that_came_while_the_host_had_the_device() {
    let handle = Handle::default();
    handle.end.open();
    let driver = Driver::running(Box::new(Late(handle.clone())));
    let interrupt = handle.interrupt();
    let stop = Arc::new(AtomicU32::new(0));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while stop.load(Ordering::Relaxed) == 0 {
                let _ = driver.device().counts();
            }
        });
        let missed = (1..5000).find(|value| {
            handle.value.store(*value, Ordering::SeqCst);
            interrupt.signal_config_changed();
            let start = Instant::now();
            while driver.read_page(0x100) != *value && start.elapsed() < Duration::from_secs(2) {
                std::thread::yield_now();
            }
            driver.read_page(0x100) != *value
        });
        stop.store(1, Ordering::Relaxed);
        assert_eq!(missed, None);
    });
}
