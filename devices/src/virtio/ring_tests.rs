//! Hostile drivers: rings that overlap, rings that change while the device works, and chains that are too long.
#![allow(clippy::cast_possible_truncation, reason = "numbers of tests are small")]

use super::block::{Block, BlockOptions, Format, Image, ImageOptions, IoEngine, WhenFull};
use super::console::{Console, ConsoleSize};
use super::features::F_VERSION_1;
use super::hostile::{DEVICES, device};
use super::mock::{Descriptor, Driver, INDIRECT, NEEDS_RESET, NEXT, RING_BYTES, WRITE};
use super::rng::Rng;
use crate::console::ConsoleInput;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

fn rng() -> Driver {
    Driver::running(Box::new(Rng::new(None).expect("a device")))
}

/// Checks that the device starts after a reset and handles a request.
fn works(driver: &mut Driver) {
    driver.start(u64::MAX);
    assert_eq!(driver.status(), 15);
    assert_eq!(driver.request(0, &[], &[64]).len(), 64);
}

/// Starts a queue of 64 descriptors with its three areas at the given addresses.
fn start_at(driver: &mut Driver, features: u64, areas: [u32; 3]) {
    driver.negotiate(features);
    driver.write(0x30, 0);
    driver.write(0x38, 64);
    for (register, address) in [0x80, 0x90, 0xa0].into_iter().zip(areas) {
        driver.write(register, address);
        driver.write(register + 4, 0);
    }
    driver.write(0x44, 1);
    driver.write(0x70, 15);
}

#[test]
fn overlapping_areas_of_a_queue_are_refused() {
    let mut driver = Driver::new(Box::new(Rng::new(None).expect("a device")));
    // 64 descriptors: 1024 bytes; available ring: 4 + 128 bytes; used ring: 4 + 512 bytes; 2 more with EVENT_IDX.
    let refused = [
        ("used ring over the available index", [0, 0x4002, 0x4004]),
        ("used ring over the end of the available ring", [0, 0x4000, 0x4080]),
        ("used ring in the descriptor table", [0x4000, 0x8000, 0x4200]),
        ("available ring at the descriptor table", [0x4000, 0x4000, 0x8000]),
        ("available ring at the used ring", [0, 0x4000, 0x4000]),
        ("descriptor table in the used ring", [0x4100, 0x8000, 0x4000]),
    ];
    for features in [F_VERSION_1, u64::MAX] {
        for (name, areas) in refused {
            start_at(&mut driver, features, areas);
            assert_eq!(driver.status() & NEEDS_RESET, NEEDS_RESET, "{name}");
        }
        // Each area starts where another ends.
        start_at(&mut driver, features, [0x4000, 0x4400, 0x4488]);
        assert_eq!(driver.status(), 15);
    }
    // The two bytes at the end of the available ring are its own where EVENT_IDX was negotiated.
    start_at(&mut driver, u64::MAX, [0x4000, 0x4400, 0x4484]);
    assert_eq!(driver.status() & NEEDS_RESET, NEEDS_RESET);
    works(&mut driver);
}

#[test]
fn queues_of_a_device_that_overlap_are_refused() {
    let device = super::balloon::Balloon::new(0, super::balloon::FreePageReporting::On).expect("a balloon");
    let mut driver = Driver::new(Box::new(device));
    driver.start(u64::MAX);
    assert_eq!(driver.status(), 15);
    driver.negotiate(u64::MAX);
    for queue in 0..driver.queues() as u32 {
        driver.write(0x30, queue);
        let base = 0x1_0000 * queue;
        // The used ring of the last queue is that of the first.
        for (register, address) in
            [(0x80, base), (0x90, base + 0x4000), (0xa0, if queue == 3 { 0x8000 } else { base + 0x8000 })]
        {
            driver.write(register, address);
        }
        driver.write(0x44, 1);
    }
    driver.write(0x70, 15);
    assert_eq!(driver.status() & NEEDS_RESET, NEEDS_RESET);
}

/// Writes an indirect table of `count` descriptors of `len` bytes each and returns its descriptor.
fn indirect(driver: &mut Driver, count: u16, len: u32) -> Descriptor {
    let bytes: Vec<u8> = (0..count)
        .flat_map(|index| {
            let flags = if index + 1 < count { WRITE | NEXT } else { WRITE };
            Descriptor { gpa: 0x80_0000, len, flags, next: index + 1 }.to_bytes()
        })
        .collect();
    let table = driver.buffer(bytes.len() as u64);
    driver.memory.write_slice(&bytes, GuestAddress(table)).expect("memory");
    Descriptor { gpa: table, len: bytes.len() as u32, flags: INDIRECT, next: 0 }
}

#[test]
fn a_chain_that_is_longer_than_its_queue_is_refused() {
    let mut driver = rng();
    let table = indirect(&mut driver, 64, 4);
    driver.put_descriptor(0, 0, table);
    driver.make_available(0, 0);
    driver.kick(0);
    assert_eq!(driver.wait_used(0).len, 256, "as long as the queue");

    let cases: [(&str, u16, u16); 3] =
        [("one more", 0, 65), ("one before and 64 indirect ones", 1, 64), ("the longest table", 0, 65535)];
    for (name, direct, count) in cases {
        works(&mut driver);
        let table = indirect(&mut driver, count, 4);
        for index in 0..direct {
            let descriptor = Descriptor { gpa: 0x80_0000, len: 4, flags: WRITE | NEXT, next: index + 1 };
            driver.put_descriptor(0, index, descriptor);
        }
        driver.put_descriptor(0, direct, table);
        driver.make_available(0, 0);
        driver.kick(0);
        driver.wait_needs_reset();
        assert!(driver.poll_used(0).is_none(), "{name}");
    }
    works(&mut driver);
}

#[test]
fn a_chain_with_more_bytes_than_its_device_takes_is_refused() {
    let mut driver = rng();
    let max = super::DEFAULT_MAX_CHAIN_BYTES;
    for (len, refused) in [(max, false), (max + 1, true)] {
        driver.put_descriptor(0, 0, Descriptor { gpa: 0x80_0000, len, flags: WRITE, next: 0 });
        driver.make_available(0, 0);
        driver.kick(0);
        if refused {
            driver.wait_needs_reset();
            assert!(driver.poll_used(0).is_none());
        } else {
            assert!(driver.wait_used(0).len > 0);
        }
    }
    works(&mut driver);
}

/// Makes chains available on all queues of a running device, for as long as it lives, from another thread: as a second vCPU
/// does, or a disk whose reads go to the rings.
struct Feeder {
    stop: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Feeder {
    fn start(driver: &Driver) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let (stopping, memory, queues) = (Arc::clone(&stop), driver.memory.clone(), driver.queues() as u64);
        let thread = std::thread::spawn(move || {
            while !stopping.load(Ordering::Relaxed) {
                for base in (0..queues).map(|queue| queue * RING_BYTES) {
                    let used: u16 = memory.read_obj(GuestAddress(base + 0x8002)).expect("memory");
                    memory.write_obj(used.wrapping_add(24), GuestAddress(base + 0x4002)).expect("memory");
                }
            }
        });
        Self { stop, thread: Some(thread) }
    }
}

impl Drop for Feeder {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().into_iter().for_each(|thread| thread.join().expect("no panic"));
    }
}

/// Writes 0 to the device status in another thread and returns the driver once that returns, which it must soon.
fn reset(driver: Driver, what: &str) -> Driver {
    let resetting = std::thread::spawn(move || {
        driver.write(0x70, 0);
        driver
    });
    let deadline = Instant::now() + Duration::from_secs(5);
    while !resetting.is_finished() {
        assert!(Instant::now() < deadline, "{what}: the reset does not return");
        std::thread::sleep(Duration::from_millis(1));
    }
    resetting.join().expect("no panic")
}

/// Each sector that the driver reads makes the next read available: the request reads to the available ring and to its own
/// header. After 65536 requests it starts over.
#[test]
fn reads_of_a_disk_that_feed_its_ring_hold_up_no_reset() {
    const SECTORS: u64 = 65536;
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("disk");
    let mut disk = vec![0; SECTORS as usize * 512];
    for (number, sector) in (0_u64..).zip(disk.chunks_mut(512)) {
        sector[2..4].copy_from_slice(&(number as u16).wrapping_add(2).to_le_bytes());
        sector[256 + 8..256 + 16].copy_from_slice(&((number + 1) % SECTORS).to_le_bytes());
    }
    std::fs::write(&path, &disk).expect("room");
    for io_engine in [IoEngine::Sync, IoEngine::Async] {
        let options =
            ImageOptions { path: path.clone(), format: Format::Raw, read_only: false, direct: false, data_file: None };
        let image = Image::open(&options).expect("an image");
        let options = BlockOptions { queues: 1, serial: String::new(), when_full: WhenFull::Report, io_engine };
        let mut driver = Driver::new(Box::new(Block::new(image, options).expect("a device")));
        start_at(&mut driver, u64::MAX, [0, 0x4000, 0x8000]);
        driver.put_descriptor(0, 0, Descriptor { gpa: 0x4100, len: 16, flags: NEXT, next: 1 });
        driver.put_descriptor(0, 1, Descriptor { gpa: 0x4000, len: 512, flags: NEXT | WRITE, next: 2 });
        driver.put_descriptor(0, 2, Descriptor { gpa: 0x80_0000, len: 1, flags: WRITE, next: 0 });
        driver.make_available(0, 0);
        driver.kick(0);
        let used = |driver: &Driver| driver.memory.read_obj::<u16>(GuestAddress(0x8002)).expect("memory");
        let start = Instant::now();
        while used(&driver) < 2000 {
            assert!(start.elapsed().as_secs() < 10, "{io_engine:?}: the reads go on");
            std::thread::sleep(Duration::from_millis(1));
        }
        let counts = &driver.device().counts()[0];
        assert_eq!(counts.kicks.load(Ordering::Relaxed), 1, "the rounds of the worker are not counted as kicks");
        let mut driver = reset(driver, &format!("{io_engine:?}"));
        driver.start(u64::MAX);
        assert_eq!(driver.status(), 15);
    }
}

#[test]
fn a_ring_that_never_empties_holds_up_no_reset_of_any_device() {
    let folder = tempfile::tempdir().expect("a folder");
    for kind in 0..DEVICES {
        let mut driver = Driver::new(device(kind, folder.path()).expect("a device"));
        driver.start(u64::MAX);
        assert_eq!(driver.status(), 15, "device {kind}");
        for queue in 0..driver.queues() {
            driver.put_descriptor(queue, 0, Descriptor { gpa: 0x80_0000, len: 64, flags: NEXT, next: 1 });
            driver.put_descriptor(queue, 1, Descriptor { gpa: 0x80_1000, len: 64, flags: WRITE, next: 0 });
        }
        let feeder = Feeder::start(&driver);
        for queue in 0..driver.queues() {
            driver.kick(queue);
        }
        std::thread::sleep(Duration::from_millis(100));
        driver = reset(driver, &format!("device {kind}"));
        drop(feeder);
        driver.start(u64::MAX);
        assert_eq!(driver.status(), 15, "device {kind}");
    }
}

/// The host's input of a console waits for no worker, however busy the guest keeps it.
#[test]
fn a_ring_that_never_empties_holds_up_no_input_of_a_console() {
    let event = || Arc::new(EventFd::new(EFD_NONBLOCK).expect("an eventfd"));
    let (wanted, size) = (event(), ConsoleSize { columns: 80, rows: 25 });
    let device = Console::new(Box::new(std::io::sink()), wanted, size).expect("a console");
    let port = device.port();
    let driver = Driver::running(Box::new(device));
    for queue in 0..driver.queues() {
        driver.put_descriptor(queue, 0, Descriptor { gpa: 0x80_0000, len: 1, flags: WRITE, next: 0 });
    }
    let feeder = Feeder::start(&driver);
    (0..driver.queues()).for_each(|queue| driver.kick(queue));
    let (start, mut longest, mut taken) = (Instant::now(), Duration::ZERO, 0);
    // On a busy host the worker may have no time for longer.
    let goes_on = |taken| {
        start.elapsed() < Duration::from_millis(300) || taken <= 4096 && start.elapsed() < Duration::from_secs(10)
    };
    while goes_on(taken) {
        let before = Instant::now();
        taken += port.enqueue(&[b'x'; 4096]).expect("no error");
        longest = longest.max(before.elapsed());
        // The device may outrun the feeder, and then waits for a kick.
        driver.kick(0);
    }
    drop(feeder);
    assert!(taken > 4096, "{taken}, status {}", driver.status());
    assert!(longest < Duration::from_millis(200), "{longest:?}");
}

/// Returns the largest resident memory of this process so far, in KiB.
fn peak_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("procfs");
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("a peak");
    line.trim().trim_end_matches(" kB").parse().expect("a number")
}

/// Makes 255 disk reads available at once, each with the same indirect table of `entries` descriptors.
fn read_through_one_table(driver: &mut Driver, entries: u16) {
    let mut table = Descriptor { gpa: 0x80_1000, len: 16, flags: NEXT, next: 1 }.to_bytes();
    for index in 1..entries - 1 {
        table.extend(Descriptor { gpa: 0x80_2000, len: 512, flags: WRITE | NEXT, next: index + 1 }.to_bytes());
    }
    table.extend(Descriptor { gpa: 0x80_1010, len: 1, flags: WRITE, next: 0 }.to_bytes());
    driver.memory.write_slice(&table, GuestAddress(0x90_0000)).expect("memory");
    driver.memory.write_slice(&[0; 16], GuestAddress(0x80_1000)).expect("memory");
    driver.put_descriptor(0, 0, Descriptor { gpa: 0x90_0000, len: table.len() as u32, flags: INDIRECT, next: 0 });
    for _ in 0..255 {
        driver.make_available(0, 0);
    }
    driver.kick(0);
}

/// In a process of its own, as it looks at the memory of the whole process.
#[test]
fn requests_in_flight_take_little_memory() {
    const CHILD: &str = "HWVMM_MEMORY_TEST_CHILD";
    if std::env::var_os(CHILD).is_none() {
        let name = "virtio::ring_tests::requests_in_flight_take_little_memory";
        let mut command = std::process::Command::new(std::env::current_exe().expect("this program"));
        let output = command.args(["--exact", name, "--nocapture"]).env(CHILD, "1").output().expect("started");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("disk");
    std::fs::File::create(&path).expect("a file").set_len(64 << 20).expect("sparse");
    let options = ImageOptions { path, format: Format::Raw, read_only: false, direct: false, data_file: None };
    let image = Image::open(&options).expect("an image");
    let (when_full, io_engine) = (WhenFull::Report, IoEngine::Async);
    let options = BlockOptions { queues: 1, serial: String::new(), when_full, io_engine };
    let mut driver = Driver::running(Box::new(Block::new(image, options).expect("a device")));
    assert!(matches!(driver.request(0, &[&[0; 16]], &[512, 1]).as_slice(), [0, ..]));
    let before = peak_kib();
    driver.start(u64::MAX);
    read_through_one_table(&mut driver, 256);
    for _ in 0..255 {
        driver.wait_used(0);
    }
    driver.start(u64::MAX);
    read_through_one_table(&mut driver, 65535);
    driver.wait_needs_reset();
    let grown = peak_kib() - before;
    assert!(grown < 24 << 10, "{grown} KiB");
}
