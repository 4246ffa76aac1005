//! The threads of devices: made once, confined by their caller, and no wait for them is without an end.

use super::console::{Console, ConsoleSize};
use super::device::VirtioDevice;
use super::device_thread::{DeviceThread, ThreadStart};
use super::hostile::{DEVICES, device};
use super::mmio::MmioDevice;
use super::mock::Driver;
use super::rng::Rng;
use super::transport::VirtioTransport;
use crate::memory::Memory;
use std::io::{self, Write};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};
use vm_memory::{GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// What a [`Gate`] has come to.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum GateState {
    #[default]
    Closed,
    /// A writer waits.
    Waiting,
    Open,
}

/// An output whose reader takes nothing until the gate is open.
#[derive(Clone, Default)]
struct Gate(Arc<(Mutex<GateState>, Condvar)>);

impl Gate {
    fn open(&self) {
        *self.0.0.lock().expect("not poisoned") = GateState::Open;
        self.0.1.notify_all();
    }

    fn wait_for_writer(&self) {
        let state = self.0.0.lock().expect("not poisoned");
        let closed = |state: &mut GateState| *state == GateState::Closed;
        let (_state, waited) =
            self.0.1.wait_timeout_while(state, Duration::from_secs(20), closed).expect("not poisoned");
        assert!(!waited.timed_out(), "nothing is written");
    }
}

impl Write for Gate {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut state = self.0.0.lock().expect("not poisoned");
        if *state == GateState::Closed {
            *state = GateState::Waiting;
            self.0.1.notify_all();
        }
        drop(self.0.1.wait_while(state, |state| *state != GateState::Open).expect("not poisoned"));
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A console whose output waits for the gate, with output of the guest.
fn stuck_console() -> (Gate, Driver) {
    let (gate, wanted) = (Gate::default(), Arc::new(EventFd::new(EFD_NONBLOCK).expect("an eventfd")));
    let size = ConsoleSize { columns: 80, rows: 25 };
    let device = Console::new(Box::new(gate.clone()), wanted, size).expect("a console");
    let mut driver = Driver::running(Box::new(device));
    driver.submit(1, &[b"a line"], &[]);
    gate.wait_for_writer();
    (gate, driver)
}

#[test]
fn a_reset_shows_its_end_where_a_worker_waits_for_the_host() {
    let (gate, mut driver) = stuck_console();
    let start = Instant::now();
    driver.write(0x70, 0);
    assert!(start.elapsed() < Duration::from_secs(3), "{:?}", start.elapsed());
    assert_eq!(driver.status(), 15, "the reset has not ended");
    // What a driver does that does not wait.
    driver.write(0x70, 1);
    driver.write(0x70, 0);
    assert_eq!(driver.status(), 15);
    assert!(start.elapsed() < Duration::from_secs(3), "{:?}", start.elapsed());
    gate.open();
    // A guest that has the page of registers mapped reads the status without an access that exits.
    while driver.read_page(0x70) != 0 {
        assert!(start.elapsed() < Duration::from_secs(10), "the reset does not end");
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(driver.status(), 0);
    driver.start(u64::MAX);
    assert_eq!(driver.status(), 15);
    driver.request(1, &[b"another line"], &[]);
}

#[test]
fn the_end_of_a_run_does_not_wait_for_the_host() {
    let (gate, driver) = stuck_console();
    let start = Instant::now();
    driver.device().request_stop();
    driver.device().wait_stopped(start + Duration::from_millis(300));
    assert!(start.elapsed() < Duration::from_secs(3), "{:?}", start.elapsed());
    gate.open();
}

/// Returns the number of threads and of file descriptors of this process.
fn threads_and_files() -> (usize, usize) {
    let count = |path| std::fs::read_dir(path).expect("procfs").count();
    (count("/proc/self/task"), count("/proc/self/fd"))
}

/// In a process of its own, as it counts what the whole process has.
#[test]
fn a_driver_that_starts_a_device_makes_no_threads_and_opens_no_files() {
    const CHILD: &str = "HWVMM_THREADS_TEST_CHILD";
    if std::env::var_os(CHILD).is_none() {
        let name = "virtio::thread_tests::a_driver_that_starts_a_device_makes_no_threads_and_opens_no_files";
        let mut command = std::process::Command::new(std::env::current_exe().expect("this program"));
        let output = command.args(["--exact", name, "--nocapture"]).env(CHILD, "1").output().expect("started");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let (own_threads, _) = threads_and_files();
    for kind in 0..DEVICES {
        // A thread that was joined is listed until the kernel has removed it.
        let deadline = Instant::now() + Duration::from_secs(10);
        while threads_and_files().0 != own_threads {
            assert!(Instant::now() < deadline, "threads of device {} are left", kind - 1);
            std::thread::sleep(Duration::from_millis(1));
        }
        let mut driver = Driver::new(device(kind, folder.path()).expect("a device"));
        let before = threads_and_files();
        for _ in 0..2 {
            driver.start(u64::MAX);
            std::thread::sleep(Duration::from_millis(20));
            let (threads, files) = threads_and_files();
            assert_eq!(threads, before.0, "threads of device {kind}");
            assert_eq!(files, before.1, "files of device {kind}");
        }
    }
}

fn on_mmio(device: Box<dyn VirtioDevice>) -> Arc<MmioDevice> {
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).expect("memory");
    let event = Arc::new(EventFd::new(EFD_NONBLOCK).expect("an eventfd"));
    MmioDevice::new("a-device", device, Memory::new(memory, Arc::new(())), event).expect("a device")
}

#[test]
fn each_thread_is_prepared_by_its_role_before_the_driver_starts() {
    let folder = tempfile::tempdir().expect("a folder");
    use DeviceThread::{Balloon, Block, Console, Fs, Net, Rng, Vsock};
    let expected: [&[DeviceThread]; DEVICES as usize] = [
        &[Rng],
        &[Block; 2],
        &[Block; 2],
        &[Console; 2],
        &[Net],
        &[Vsock],
        &[Balloon; 2],
        &[Fs; 2],
        &[Vsock],
        &[Fs; 2],
    ];
    for (kind, expected) in (0..).zip(expected) {
        let seen: Arc<Mutex<Vec<DeviceThread>>> = Arc::default();
        let seen_by_thread = Arc::clone(&seen);
        let start: ThreadStart = Arc::new(move |role| {
            assert!(std::thread::current().name().is_some_and(|name| name.starts_with("a-device.")));
            seen_by_thread.lock().expect("not poisoned").push(role);
            Ok(())
        });
        let device = on_mmio(device(kind, folder.path()).expect("a device"));
        device.start_threads(&start).expect("threads");
        assert_eq!(*seen.lock().expect("not poisoned"), expected, "device {kind}");
    }
}

#[test]
fn a_thread_that_cannot_be_prepared_fails_the_start() {
    let device = on_mmio(Box::new(Rng::new(None).expect("a device")));
    let error = device.start_threads(&(Arc::new(|_| Err("no seccomp".into())) as ThreadStart)).expect_err("refused");
    assert_eq!(crate::error::chain(&error), "cannot prepare the rng thread a-device.0: no seccomp");
}
