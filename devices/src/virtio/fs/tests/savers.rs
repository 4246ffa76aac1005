//! What saves requests: their size, and those that Linux need not make.

use super::hostile::{lookup, number};
use super::{INIT, REQUESTS, ask, folders, init, message, mount_with, options, request, share, words};
use std::fs;

const OPEN: u32 = 14;
const READ: u32 = 15;
const WRITE: u32 = 16;
const FLUSH: u32 = 25;
/// `FUSE_ASYNC_READ`, `FUSE_BIG_WRITES`, `FUSE_DO_READDIRPLUS`, `FUSE_READDIRPLUS_AUTO`, `FUSE_PARALLEL_DIROPS`, `FUSE_MAX_PAGES`,
/// `FUSE_CACHE_SYMLINKS`, `FUSE_HANDLE_KILLPRIV_V2`.
const TAKEN: u32 = 1 | 1 << 5 | 1 << 13 | 1 << 14 | 1 << 18 | 1 << 22 | 1 << 23 | 1 << 28;
const MIB: usize = 1 << 20;

/// The fields of `fuse_init_out`: flags, `max_write` in bytes, `max_pages`.
fn negotiated(driver: &mut crate::virtio::mock::Driver, flags: u32) -> (u32, u32, u16) {
    let (error, reply) = ask(driver, INIT, 0, &words(&[7, 36, 128 << 10, flags, 0]));
    assert_eq!(error, 0);
    let word = |at: usize| u32::from_le_bytes(reply[at..at + 4].try_into().expect("four bytes"));
    (word(12), word(20), u16::from_le_bytes(reply[28..30].try_into().expect("two bytes")))
}

#[test]
fn a_session_has_large_requests_and_no_more_than_the_guest_can() {
    let (_folder, mut driver) = share(false);
    // All but FUSE_INIT_EXT, behind which there are more flags.
    assert_eq!(negotiated(&mut driver, !(1 << 30)), (TAKEN, 1 << 20, 256));
    assert_eq!(negotiated(&mut driver, 1 << 13), (1 << 13, 4096, 0));
}

/// As Linux makes them: a descriptor for each page.
#[test]
fn a_mebibyte_is_written_and_read_by_one_request_each() {
    let folder = folders();
    let mut driver = mount_with(options("tag", &folder.path().join("shared")));
    driver.start_sized(u64::MAX, 512);
    init(&mut driver);
    let file = lookup(&mut driver, 1, "file");
    let (error, reply) = ask(&mut driver, OPEN, file, &words(&[libc::O_RDWR.cast_unsigned(), 0]));
    assert_eq!(error, 0);
    let handle = number(&reply, 0).to_le_bytes();
    let data: Vec<u8> = (0..MIB).map(|at| (at / 4096) as u8 ^ at as u8).collect();
    let size = u32::try_from(MIB).expect("small");
    let mut body = handle.to_vec();
    // The offset, the size, and flags that are all off.
    body.extend(words(&[0, 0, size, 0, 0, 0, 0, 0]));
    let mut write = message(WRITE, file, &body);
    let total = u32::try_from(write.len() + MIB).expect("small");
    write[..4].copy_from_slice(&total.to_le_bytes());
    let mut parts = vec![&write[..40], &write[40..]];
    parts.extend(data.chunks(4096));
    let reply = driver.request(REQUESTS, &parts, &[16, 8]);
    assert_eq!(reply[4..8], [0; 4], "the error");
    assert_eq!(reply[16..20], size.to_le_bytes());
    assert!(fs::read(folder.path().join("shared/file")).expect("there") == data);
    let read = message(READ, file, &body);
    let mut room = vec![16];
    room.extend([4096; MIB / 4096]);
    let reply = driver.request(REQUESTS, &[&read[..40], &read[40..]], &room);
    assert!(reply[16..] == data, "{} bytes", reply.len());
}

#[test]
fn closing_a_file_asks_nothing_where_nothing_can_be_written() {
    for (read_only, answer) in [(true, libc::ENOSYS), (false, 0)] {
        let (_folder, mut driver) = share(read_only);
        let file = lookup(&mut driver, 1, "file");
        let (error, reply) = ask(&mut driver, OPEN, file, &words(&[0, 0]));
        assert_eq!(error, 0);
        let mut body = number(&reply, 0).to_le_bytes().to_vec();
        body.extend([0; 16]);
        assert_eq!(request(&mut driver, FLUSH, file, &body), answer);
    }
}
