//! More requests than an io_uring has entries: chains wait in the queue.
#![allow(clippy::cast_possible_truncation, reason = "numbers of tests are small")]

use super::{Block, BlockOptions, Format, Image, ImageOptions, IoEngine, WhenFull};
use crate::virtio::mock::{Descriptor, Driver, INDIRECT, NEXT, WRITE};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};
use tempfile::TempDir;
use vm_memory::{Bytes, GuestAddress};

/// An io_uring has 256 entries, the queue 512.
const REQUESTS: u16 = 400;
/// The second queue, which has no timer that would look at the queue again.
const QUEUE: usize = 1;
// Guest physical addresses: the indirect tables, the headers, the statuses, the sectors.
const TABLES: u64 = 0x90_0000;
const HEADERS: u64 = 0xa0_0000;
const STATUSES: u64 = 0xa8_0000;
const DATA: u64 = 0xb0_0000;
/// `VIRTIO_BLK_T_IN` and `VIRTIO_BLK_T_OUT`.
const READ: u32 = 0;
const OUT: u32 = 1;

fn disk() -> (TempDir, Driver) {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("disk");
    std::fs::write(&path, vec![7; 512 * usize::from(REQUESTS)]).expect("written");
    let options = ImageOptions { path, format: Format::Raw, read_only: false, direct: false, data_file: None };
    let image = Image::open(&options).expect("an image");
    let (when_full, io_engine) = (WhenFull::Report, IoEngine::Async);
    let options = BlockOptions { queues: 2, serial: String::new(), when_full, io_engine };
    let mut driver = Driver::new(Box::new(Block::new(image, options).expect("a device")));
    driver.start_sized(u64::MAX, 512);
    (folder, driver)
}

/// Makes a request for each sector available, of the type `kind`, and kicks once.
fn submit_all(driver: &mut Driver, kind: u32) {
    for index in 0..REQUESTS {
        let at = u64::from(index);
        let (header, status, data) = (HEADERS + at * 16, STATUSES + at, DATA + at * 512);
        let mut bytes = kind.to_le_bytes().to_vec();
        bytes.extend([0; 4]);
        bytes.extend(at.to_le_bytes());
        driver.memory.write_slice(&bytes, GuestAddress(header)).expect("memory");
        driver.memory.write_obj(0xff_u8, GuestAddress(status)).expect("memory");
        driver.memory.write_slice(&[index as u8; 512], GuestAddress(data)).expect("memory");
        let flags = if kind == READ { NEXT | WRITE } else { NEXT };
        let mut table = Descriptor { gpa: header, len: 16, flags: NEXT, next: 1 }.to_bytes();
        table.extend(Descriptor { gpa: data, len: 512, flags, next: 2 }.to_bytes());
        table.extend(Descriptor { gpa: status, len: 1, flags: WRITE, next: 0 }.to_bytes());
        let gpa = TABLES + at * 64;
        driver.memory.write_slice(&table, GuestAddress(gpa)).expect("memory");
        driver.put_descriptor(QUEUE, index, Descriptor { gpa, len: 48, flags: INDIRECT, next: 0 });
    }
    (0..REQUESTS).for_each(|head| driver.make_available(QUEUE, head));
    driver.kick(QUEUE);
}

/// Checks that all requests have succeeded, and that all writes are on the disk.
fn check_written(folder: &TempDir, driver: &Driver) {
    let file = File::open(folder.path().join("disk")).expect("there");
    for index in 0..REQUESTS {
        let status: u8 = driver.memory.read_obj(GuestAddress(STATUSES + u64::from(index))).expect("memory");
        assert_eq!(status, 0, "status of request {index}");
        let mut sector = [0; 512];
        file.read_exact_at(&mut sector, u64::from(index) * 512).expect("read");
        assert_eq!(sector, [index as u8; 512], "sector {index}");
    }
}

#[test]
fn reads_from_the_page_cache_do_not_stall_a_queue() {
    let (_folder, mut driver) = disk();
    submit_all(&mut driver, READ);
    let start = Instant::now();
    while driver.used_index(QUEUE) < REQUESTS {
        assert!(start.elapsed().as_secs() < 10, "{} of {REQUESTS} requests", driver.used_index(QUEUE));
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_reset_completes_what_was_available_before() {
    let (folder, mut driver) = disk();
    for _ in 0..5 {
        submit_all(&mut driver, OUT);
        driver.write(0x70, 0);
        assert_eq!(driver.status(), 0);
        assert_eq!(driver.used_index(QUEUE), REQUESTS);
        check_written(&folder, &driver);
        // Nothing is written to guest memory after the reset.
        std::thread::sleep(Duration::from_millis(10));
        assert_eq!(driver.used_index(QUEUE), REQUESTS);
        driver.start_sized(u64::MAX, 512);
    }
}

#[test]
fn the_end_of_a_run_completes_what_was_available_before() {
    let (folder, mut driver) = disk();
    submit_all(&mut driver, OUT);
    driver.device().request_stop();
    driver.device().wait_stopped(Instant::now() + Duration::from_secs(10));
    check_written(&folder, &driver);
}
