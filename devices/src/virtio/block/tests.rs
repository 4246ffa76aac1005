//! The block device, with valid and invalid requests, by io_uring (where the host has it) and by system calls.
#![allow(clippy::cast_possible_truncation, reason = "numbers of tests are small")]

use super::{Block, BlockOptions, Format, Image, ImageError, ImageOptions, IoEngine, WhenFull};
use crate::virtio::device::VirtioDevice;
use crate::virtio::mock::{Descriptor, Driver, MEMORY_BYTES, NEXT, Used, WRITE};
use proptest::prelude::*;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use tempfile::TempDir;
use vm_memory::{Bytes, GuestAddress};

const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPPORTED: u8 = 2;
const DISK_BYTES: u64 = 1 << 20;

pub(super) fn options(path: &Path) -> ImageOptions {
    ImageOptions { path: path.to_owned(), format: Format::Auto, read_only: false, direct: false, data_file: None }
}

fn device(image: Image, queues: u16) -> Box<dyn VirtioDevice> {
    with_engine(image, queues, IoEngine::Async)
}

fn with_engine(image: Image, queues: u16, io_engine: IoEngine) -> Box<dyn VirtioDevice> {
    let serial = "a-serial-number-of-more-than-20".into();
    let options = BlockOptions { queues, serial, when_full: WhenFull::Report, io_engine };
    Box::new(Block::new(image, options).expect("a device"))
}

fn raw() -> (TempDir, Driver) {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("disk");
    File::create(&path).expect("a file").set_len(DISK_BYTES).expect("sparse");
    let image = Image::open(&options(&path)).expect("an image");
    (folder, Driver::running(device(image, 1)))
}

fn header(kind: u32, sector: u64) -> Vec<u8> {
    let mut bytes = kind.to_le_bytes().to_vec();
    bytes.extend([0; 4]);
    bytes.extend(sector.to_le_bytes());
    bytes
}

/// Makes a request and returns its status and the bytes that the device wrote.
fn request(driver: &mut Driver, header: &[u8], data: &[u8], room: u32) -> (u8, Vec<u8>) {
    let readable: Vec<&[u8]> = if data.is_empty() { vec![header] } else { vec![header, data] };
    let writable: Vec<u32> = if room == 0 { vec![1] } else { vec![room, 1] };
    let submitted = driver.submit(0, &readable, &writable);
    let Used { head, len } = driver.wait_used(0);
    assert_eq!(head, u32::from(submitted.head));
    // The status is the last byte, wherever `len` ends.
    let mut all = driver.contents(&submitted, u32::MAX);
    let status = all.pop().expect("a status");
    all.truncate(len.saturating_sub(1) as usize);
    (status, all)
}

fn write(driver: &mut Driver, sector: u64, data: &[u8]) -> u8 {
    request(driver, &header(1, sector), data, 0).0
}

fn read(driver: &mut Driver, sector: u64, bytes: u32) -> (u8, Vec<u8>) {
    request(driver, &header(0, sector), &[], bytes)
}

#[test]
fn what_is_written_is_read_and_flushed_to_the_file() {
    let (folder, mut driver) = raw();
    let data: Vec<u8> = (0..8192_u32).map(|at| (at % 251) as u8).collect();
    assert_eq!(write(&mut driver, 7, &data), OK);
    assert_eq!(read(&mut driver, 7, 8192), (OK, data.clone()));
    assert_eq!(request(&mut driver, &header(4, 0), &[], 0).0, OK);
    let mut seen = vec![0; data.len()];
    File::open(folder.path().join("disk")).expect("there").read_exact_at(&mut seen, 7 * 512).expect("long enough");
    assert_eq!(seen, data);
    let (status, id) = request(&mut driver, &header(8, 0), &[], 20);
    assert_eq!((status, id.as_slice()), (OK, &b"a-serial-number-of-m"[..]));
}

#[test]
fn system_calls_do_the_same() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("disk");
    File::create(&path).expect("a file").set_len(DISK_BYTES).expect("sparse");
    // Without FLUSH negotiated, each write is durable when it completes.
    for features in [u64::MAX, !(1 << 9)] {
        let mut driver = Driver::new(with_engine(Image::open(&options(&path)).expect("an image"), 1, IoEngine::Sync));
        driver.start(features);
        assert_eq!(write(&mut driver, 3, &[features as u8 | 1; 5120]), OK);
        assert_eq!(request(&mut driver, &header(4, 0), &[], 0).0, OK);
        assert_eq!(read(&mut driver, 3, 5120), (OK, vec![features as u8 | 1; 5120]));
    }
}

#[test]
fn the_configuration_has_size_and_queues() {
    let (_folder, driver) = raw();
    let mut config = [0; 60];
    driver.read_bytes(0x100, &mut config);
    assert_eq!(u64::from_le_bytes(config[..8].try_into().expect("8")), DISK_BYTES / 512);
    assert_eq!(u32::from_le_bytes(config[20..24].try_into().expect("4")), 512);
    assert_eq!(u16::from_le_bytes(config[34..36].try_into().expect("2")), 1);
    // The configuration is read-only, and zeros follow it.
    driver.write_bytes(0x100, &[0xff; 8]);
    let mut again = [0; 100];
    driver.read_bytes(0x100, &mut again);
    assert_eq!(again[..60], config);
    assert!(again[60..].iter().all(|byte| *byte == 0));
}

#[test]
fn a_request_of_more_than_64_mib_fails_and_the_disk_goes_on() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("disk");
    File::create(&path).expect("a file").set_len(256 << 20).expect("sparse");
    let mut driver = Driver::running(device(Image::open(&options(&path)).expect("an image"), 1));
    let header_gpa = driver.buffer(16);
    driver.memory.write_slice(&header(0, 0), GuestAddress(header_gpa)).expect("memory");
    for (buffers, expected) in [(8, OK), (9, IOERR)] {
        driver.put_descriptor(0, 0, Descriptor { gpa: header_gpa, len: 16, flags: NEXT, next: 1 });
        for index in 1..=buffers {
            let data = Descriptor { gpa: 0x80_0000, len: 8 << 20, flags: WRITE | NEXT, next: index + 1 };
            driver.put_descriptor(0, index, data);
        }
        let status = driver.buffer(1);
        driver.memory.write_obj(0xff_u8, GuestAddress(status)).expect("memory");
        driver.put_descriptor(0, buffers + 1, Descriptor { gpa: status, len: 1, flags: WRITE, next: 0 });
        driver.make_available(0, 0);
        driver.kick(0);
        driver.wait_used(0);
        assert_eq!(driver.memory.read_obj::<u8>(GuestAddress(status)).expect("memory"), expected, "{buffers} x 8 MiB");
    }
    assert_eq!(driver.status(), 15);
}

#[test]
fn requests_beyond_the_disk_fail_and_change_nothing() {
    let (_folder, mut driver) = raw();
    let last = DISK_BYTES / 512 - 1;
    assert_eq!(write(&mut driver, last, &[1; 512]), OK);
    assert_eq!(write(&mut driver, last, &[1; 1024]), IOERR);
    assert_eq!(write(&mut driver, last, &[1; 100]), IOERR, "not a whole sector");
    for sector in [last + 1, u64::MAX, u64::MAX / 512, 1 << 55] {
        assert_eq!(write(&mut driver, sector, &[1; 512]), IOERR, "{sector:#x}");
        assert_eq!(read(&mut driver, sector, 512).0, IOERR, "{sector:#x}");
    }
    assert_eq!(request(&mut driver, &header(99, 0), &[], 0).0, UNSUPPORTED);
    assert_eq!(request(&mut driver, &[0; 9], &[], 0).0, IOERR, "a short header");
    assert_eq!(read(&mut driver, last, 512), (OK, vec![1; 512]));
}

#[test]
fn a_request_without_a_status_byte_is_completed() {
    let (_folder, mut driver) = raw();
    let submitted = driver.submit(0, &[&header(4, 0)], &[]);
    assert_eq!(driver.wait_used(0), Used { head: u32::from(submitted.head), len: 0 });
    let submitted = driver.submit(0, &[&header(4, 0)], &[0]);
    assert_eq!(driver.wait_used(0), Used { head: u32::from(submitted.head), len: 0 });
    assert_eq!(write(&mut driver, 0, &[1; 512]), OK);
}

#[test]
fn discarded_and_zeroed_sectors_read_as_zeroes() {
    let (_folder, mut driver) = raw();
    let segment = |sector: u64, count: u32, flags: u32| {
        let mut bytes = sector.to_le_bytes().to_vec();
        bytes.extend(count.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes
    };
    assert_eq!(write(&mut driver, 0, &[7; 16384]), OK);
    assert_eq!(request(&mut driver, &header(11, 0), &segment(0, 8, 0), 0).0, OK);
    assert_eq!(request(&mut driver, &header(13, 0), &segment(8, 8, 1), 0).0, OK);
    assert_eq!(request(&mut driver, &header(13, 0), &segment(16, 3, 0), 0).0, OK);
    let (status, data) = read(&mut driver, 0, 16384);
    assert_eq!(status, OK);
    assert!(data[..19 * 512].iter().all(|byte| *byte == 0) && data[19 * 512..].iter().all(|byte| *byte == 7));
    for (kind, segment, wanted) in [
        (11, segment(0, 8, 1), UNSUPPORTED),
        (13, segment(0, 8, 2), UNSUPPORTED),
        (11, segment(2040, 16, 0), IOERR),
        (11, segment(0, u32::MAX, 0), IOERR),
        (13, segment(u64::MAX, 1, 0), IOERR),
        (13, vec![0; 15], UNSUPPORTED),
        (13, vec![0; 32], UNSUPPORTED),
    ] {
        assert_eq!(request(&mut driver, &header(kind, 0), &segment, 0).0, wanted, "{kind} {segment:?}");
    }
}

#[test]
fn a_read_only_disk_is_not_written() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("disk");
    std::fs::write(&path, [5; 4096]).expect("written");
    let image = Image::open(&ImageOptions { read_only: true, ..options(&path) }).expect("an image");
    let mut driver = Driver::running(device(image, 1));
    assert_ne!(driver.device_features() & (1 << 5), 0);
    assert_eq!(write(&mut driver, 0, &[1; 512]), IOERR);
    assert_eq!(request(&mut driver, &header(11, 0), &[0; 16], 0).0, IOERR);
    assert_eq!(read(&mut driver, 0, 512), (OK, vec![5; 512]));
}

#[test]
fn many_requests_on_many_queues_all_come_back() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("disk");
    File::create(&path).expect("a file").set_len(DISK_BYTES).expect("sparse");
    let mut driver = Driver::running(device(Image::open(&options(&path)).expect("an image"), 4));
    for round in 0..50_u64 {
        for queue in 0..4_u64 {
            for slot in 0..16 {
                let sector = (queue * 16 + slot) * 8;
                let data = [(round + queue + slot) as u8; 4096];
                driver.submit(queue as usize, &[&header(1, sector), &data], &[1]);
            }
        }
        for queue in 0..4 {
            for _ in 0..16 {
                driver.wait_used(queue);
            }
        }
    }
    driver.start(u64::MAX);
    assert_eq!(read(&mut driver, (3 * 16 + 15) * 8, 4096), (OK, vec![(49 + 3 + 15) as u8; 4096]));
}

#[test]
fn a_reset_with_requests_in_flight_waits_for_them() {
    let (_folder, mut driver) = raw();
    for round in 0..20 {
        for slot in 0..60 {
            driver.submit(0, &[&header(1, slot * 8), &[round; 4096]], &[1]);
        }
        driver.start(u64::MAX);
    }
    assert_eq!(write(&mut driver, 0, &[9; 512]), OK);
}

#[test]
fn a_disk_that_grows_is_seen() {
    let (folder, driver) = raw();
    let _ = driver.interrupts();
    let generation = driver.read(0xfc);
    let file = File::options().write(true).open(folder.path().join("disk")).expect("there");
    file.set_len(DISK_BYTES * 2).expect("grown");
    let start = std::time::Instant::now();
    while driver.read(0xfc) == generation {
        assert!(start.elapsed().as_secs() < 10, "the new size was not noticed");
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    assert_eq!(u64::from(driver.read(0x100)), DISK_BYTES * 2 / 512);
    assert_ne!(driver.read(0x60) & 2, 0);
}

#[test]
fn images_are_locked_and_checked() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("disk");
    std::fs::write(&path, [0; 1024]).expect("written");
    let one = Image::open(&options(&path)).expect("an image");
    assert!(matches!(Image::open(&options(&path)), Err(ImageError::Locked { .. })));
    let reading = ImageOptions { read_only: true, ..options(&path) };
    assert!(matches!(Image::open(&reading), Err(ImageError::Locked { .. })));
    drop(one);
    let (_a, _b) = (Image::open(&reading).expect("shared"), Image::open(&reading).expect("shared"));
    assert!(Image::open(&options(&path)).is_err());
    std::fs::write(folder.path().join("odd"), [0; 1000]).expect("written");
    assert!(matches!(Image::open(&options(&folder.path().join("odd"))), Err(ImageError::Size { bytes: 1000, .. })));
    assert!(matches!(Image::open(&options(folder.path())), Err(ImageError::Open { .. } | ImageError::Kind(_))));
    assert!(matches!(Image::open(&options(&folder.path().join("none"))), Err(ImageError::Open { .. })));
    assert!(matches!(Image::open(&options(Path::new("/dev/null"))), Err(ImageError::Kind(_))));
}

#[test]
fn direct_io_takes_any_buffer() {
    let folder = tempfile::tempdir_in("/var/tmp").expect("a folder");
    let path = folder.path().join("disk");
    File::create(&path).expect("a file").set_len(DISK_BYTES).expect("sparse");
    // Not every file system can.
    let Ok(image) = Image::open(&ImageOptions { direct: true, ..options(&path) }) else {
        return crate::skip::skipped("the temporary folder has no O_DIRECT");
    };
    let block = image.block_bytes();
    let mut driver = Driver::running(device(image, 1));
    let data: Vec<u8> = (0..block * 3).map(|at| (at % 241) as u8).collect();
    // In pieces that no disk likes.
    let mut readable: Vec<&[u8]> = vec![];
    let head = header(1, u64::from(block / 512));
    readable.push(&head);
    readable.extend(data.chunks(100));
    driver.request(0, &readable, &[1]);
    assert_eq!(read(&mut driver, u64::from(block / 512), block * 3), (OK, data));
}

fn qcow2(folder: &TempDir) -> Option<std::path::PathBuf> {
    let path = folder.path().join("disk.qcow2");
    let made =
        std::process::Command::new("qemu-img").args(["create", "-q", "-f", "qcow2"]).arg(&path).arg("1M").status();
    made.is_ok_and(|status| status.success()).then_some(path)
}

#[test]
fn qcow2_is_detected_unless_the_format_is_raw() {
    let folder = tempfile::tempdir().expect("a folder");
    // scripts/test installs qemu-img; without it there is no image to test.
    let Some(path) = qcow2(&folder) else { return crate::skip::skipped("qemu-img is not installed") };
    let mut driver = Driver::running(device(Image::open(&options(&path)).expect("qcow2"), 1));
    assert_eq!(u64::from(driver.read(0x100)), DISK_BYTES / 512);
    assert_eq!(write(&mut driver, 100, &[3; 4096]), OK);
    assert_eq!(request(&mut driver, &header(4, 0), &[], 0).0, OK);
    assert_eq!(read(&mut driver, 100, 4096), (OK, vec![3; 4096]));
    drop(driver);
    let again = Image::open(&options(&path)).expect("closed cleanly");
    drop(again);
    let as_raw = Image::open(&ImageOptions { format: Format::Raw, ..options(&path) });
    assert!(as_raw.is_ok_and(|image| image.bytes() < DISK_BYTES) || path.metadata().is_ok_and(|m| m.len() % 512 != 0));
}

#[test]
fn a_backing_file_is_opened_only_with_an_explicit_format() {
    let folder = tempfile::tempdir().expect("a folder");
    let Some(base) = qcow2(&folder) else { return crate::skip::skipped("qemu-img is not installed") };
    let path = folder.path().join("top.qcow2");
    let made = std::process::Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b"])
        .args([&base, &path])
        .status();
    assert!(made.is_ok_and(|status| status.success()));
    let error = Image::open(&options(&path)).err().expect("refused").to_string();
    assert!(error.contains("format=qcow2"), "{error}");
    assert!(Image::open(&ImageOptions { format: Format::Qcow2, ..options(&path) }).is_ok());
}

#[test]
fn damaged_qcow2_is_refused() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("bad");
    for rest in [vec![0; 508], vec![0xff; 508], [vec![0, 0, 0, 3], vec![0xff; 504]].concat()] {
        let mut bytes = b"QFI\xfb".to_vec();
        bytes.extend(rest);
        std::fs::write(&path, &bytes).expect("written");
        assert!(matches!(Image::open(&options(&path)), Err(ImageError::Qcow2 { .. })));
    }
}

/// The first sector of a qcow2 image, and of nothing else.
fn qcow2_sector() -> [u8; 512] {
    let mut sector = [0; 512];
    sector[..8].copy_from_slice(b"QFI\xfb\0\0\0\x03");
    sector
}

#[test]
fn a_guest_cannot_make_a_raw_disk_an_image_of_another_format() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("disk");
    for (format, engine, direct) in [
        (Format::Auto, IoEngine::Async, false),
        (Format::DetectedRaw, IoEngine::Async, true),
        (Format::DetectedRaw, IoEngine::Sync, false),
    ] {
        std::fs::write(&path, vec![7; DISK_BYTES as usize]).expect("written");
        // Not every file system has O_DIRECT.
        let Ok(image) = Image::open(&ImageOptions { format, direct, ..options(&path) }) else { continue };
        let mut driver = Driver::running(with_engine(image, 1, engine));
        let seen = |bytes: usize| std::fs::read(&path).expect("there")[..bytes].to_vec();
        let block = driver.read(0x100 + 20) as usize;
        let image_header: Vec<u8> = [&qcow2_sector()[..], &vec![1; block * 9 - 512]].concat();
        let mut vdi = vec![0; block];
        vdi[64..68].copy_from_slice(&[0x7f, 0x10, 0xda, 0xbe]);
        let vhdx: Vec<u8> = [&b"vhdxfile"[..], &vec![0; block - 8]].concat();
        for refused in [&image_header, &vdi, &vhdx] {
            assert_eq!(write(&mut driver, 0, refused), IOERR);
            assert_eq!(seen(512), [7; 512], "nothing is written");
        }
        // In pieces of a few bytes, too.
        let head = header(1, 0);
        let pieces: Vec<&[u8]> =
            std::iter::once(&head[..]).chain(image_header[..block].chunks(block / 16 - 3)).collect();
        let submitted = driver.submit(0, &pieces, &[1]);
        driver.wait_used(0);
        assert_eq!(driver.contents(&submitted, u32::MAX), [IOERR]);
        assert_eq!(seen(512), [7; 512]);
        // Everything else is written, and the magic number everywhere else.
        assert_eq!(write(&mut driver, (block / 512) as u64, &image_header), OK);
        assert_eq!(seen(block + 4)[block..], *b"QFI\xfb");
        let other = vec![9; block * 2];
        assert_eq!(write(&mut driver, 0, &other), OK);
        assert_eq!(seen(block * 2), other);
        assert_eq!(request(&mut driver, &header(13, 0), &[[0; 8], [8, 0, 0, 0, 0, 0, 0, 0]].concat(), 0).0, OK);
        assert_eq!(seen(4096), [0; 4096]);
    }
    std::fs::write(&path, vec![7; DISK_BYTES as usize]).expect("written");
    let image = Image::open(&ImageOptions { format: Format::Raw, ..options(&path) }).expect("raw");
    assert_eq!(write(&mut Driver::running(device(image, 1)), 0, &qcow2_sector()), OK, "format=raw permits it");
}

#[test]
fn what_was_checked_is_written_while_the_guest_changes_it() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("disk");
    std::fs::write(&path, vec![0; DISK_BYTES as usize]).expect("written");
    let mut driver = Driver::running(device(Image::open(&options(&path)).expect("an image"), 1));
    let memory = driver.memory.clone();
    let stop = std::sync::atomic::AtomicBool::new(false);
    let at = std::sync::atomic::AtomicU64::new(0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut odd = false;
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                let gpa = at.load(std::sync::atomic::Ordering::Relaxed);
                if gpa != 0 {
                    let byte = if odd { b'Q' } else { b'x' };
                    let _ = vm_memory::Bytes::write_obj(&*memory, byte, vm_memory::GuestAddress(gpa));
                    odd = !odd;
                }
            }
        });
        let mut changed = false;
        for _ in 0..2000 {
            let data = driver.buffer(512);
            vm_memory::Bytes::write_slice(&*driver.memory, &qcow2_sector(), vm_memory::GuestAddress(data))
                .expect("fits");
            at.store(data, std::sync::atomic::Ordering::Relaxed);
            let head = driver.buffer(17);
            vm_memory::Bytes::write_slice(&*driver.memory, &header(1, 0), vm_memory::GuestAddress(head)).expect("fits");
            driver.put_descriptor(0, 0, Descriptor { gpa: head, len: 16, flags: NEXT, next: 1 });
            driver.put_descriptor(0, 1, Descriptor { gpa: data, len: 512, flags: NEXT, next: 2 });
            driver.put_descriptor(0, 2, Descriptor { gpa: head + 16, len: 1, flags: WRITE, next: 0 });
            driver.make_available(0, 0);
            driver.kick(0);
            driver.wait_used(0);
            let mut start = [0; 4];
            File::open(&path).expect("there").read_exact_at(&mut start, 0).expect("long enough");
            changed |= &start == b"QFI\xfb";
        }
        // Before the assertion, as the scope waits for the thread.
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        assert!(!changed, "the disk begins as a qcow2 image");
    });
}

#[test]
fn the_format_is_kept_once_it_is_detected() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("disk");
    std::fs::write(&path, [0; 4096]).expect("written");
    let format = options(&path).detect().expect("readable");
    assert_eq!(format, Format::DetectedRaw);
    std::fs::write(&path, [&qcow2_sector()[..], &[0; 3584]].concat()).expect("written");
    assert_eq!(options(&path).detect().expect("readable"), Format::DetectedQcow2);
    let again = ImageOptions { format, ..options(&path) };
    assert_eq!(again.detect().expect("known"), format);
    assert_eq!(Image::open(&again).expect("raw").bytes(), 4096);
    std::fs::write(&path, [&b"KDMV"[..], &[0; 508]].concat()).expect("written");
    let error = Image::open(&options(&path)).err().expect("refused").to_string();
    assert!(error.contains("VMDK") && error.contains("format=raw"), "{error}");
    assert!(Image::open(&ImageOptions { format: Format::Raw, ..options(&path) }).is_ok());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn any_request_is_survived(
        requests in proptest::collection::vec(
            (0_u32..16, any::<u64>(), 0_u64..3000, proptest::collection::vec((any::<u16>(), any::<bool>()), 0..6)), 1..8),
    ) {
        let (_folder, mut driver) = raw();
        for (slot, (kind, far, near, parts)) in (0_u16..).zip(requests) {
            let at = driver.buffer(16);
            let sector = if kind % 2 == 0 { near } else { far };
            vm_memory::Bytes::write_slice(&*driver.memory, &header(kind, sector), vm_memory::GuestAddress(at)).unwrap();
            let first = slot * 8;
            let more = |index: usize| if index < parts.len() { NEXT } else { 0 };
            driver.put_descriptor(0, first, Descriptor { gpa: at, len: 16, flags: more(0), next: first + 1 });
            for (index, (len, writable)) in parts.iter().enumerate() {
                let gpa = (u64::from(*len) * 977) % (MEMORY_BYTES - 0x1_0000);
                let flags = more(index + 1) | if *writable { WRITE } else { 0 };
                // Above the rings, so that the device does not overwrite them.
                let next = first + 2 + index as u16;
                let (gpa, len) = (gpa.max(0x20_0000), u32::from(*len));
                driver.put_descriptor(0, next - 1, Descriptor { gpa, len, flags, next });
            }
            driver.make_available(0, first);
        }
        driver.kick(0);
        driver.start(u64::MAX);
        prop_assert_eq!(write(&mut driver, 1, &[4; 512]), OK);
        prop_assert_eq!(read(&mut driver, 1, 512), (OK, vec![4; 512]));
    }
}
