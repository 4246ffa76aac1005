//! Shared directories, with FUSE requests made by hand.
#![allow(clippy::cast_possible_truncation, reason = "numbers of tests are small")]

mod bounds;
mod hostile;
mod pause;
mod savers;
mod xattr;

use super::{Fs, FsOptions, ShareError};
use crate::virtio::mock::{Descriptor, Driver, NEXT, WRITE};
use proptest::prelude::*;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use tempfile::TempDir;
use vm_memory::{Bytes, GuestAddress};

const LOOKUP: u32 = 1;
const UNLINK: u32 = 10;
const INIT: u32 = 26;
const CREATE: u32 = 35;
const REQUESTS: usize = 1;

/// Makes a folder that is not shared, with a secret, and a shared one in it.
fn folders() -> TempDir {
    let folder = tempfile::tempdir().expect("a folder");
    std::fs::create_dir(folder.path().join("shared")).expect("made");
    std::fs::write(folder.path().join("secret"), "outside").expect("written");
    std::fs::write(folder.path().join("shared/file"), "inside").expect("written");
    std::os::unix::fs::symlink("../secret", folder.path().join("shared/link")).expect("linked");
    folder
}

fn options(tag: &str, directory: &Path) -> FsOptions {
    FsOptions { tag: tag.into(), directory: directory.to_owned(), read_only: false, privileged_files: false }
}

fn mount_with(options: FsOptions) -> Driver {
    let mut driver = Driver::running(Box::new(Fs::new(options).expect("shared")));
    init(&mut driver);
    driver
}

/// Shares a directory and mounts it in the guest.
fn mount(directory: &Path, read_only: bool) -> Driver {
    mount_with(FsOptions { read_only, ..options("tag", directory) })
}

fn init(driver: &mut Driver) {
    // major 7, minor 31, readahead, flags: FUSE_HANDLE_KILLPRIV_V2.
    assert_eq!(request(driver, INIT, 0, &words(&[7, 31, 0, 1 << 28])), 0);
}

#[test]
fn a_directory_whose_own_path_is_not_utf8_is_shared() {
    use std::os::unix::ffi::OsStrExt;
    let folder = folders();
    let path = folder.path().join(std::ffi::OsStr::from_bytes(b"a,b=\xff c"));
    std::fs::rename(folder.path().join("shared"), &path).expect("renamed");
    let mut driver = mount(&path, false);
    assert_eq!(request(&mut driver, LOOKUP, 1, b"file\0"), 0);
    assert_ne!(request(&mut driver, LOOKUP, 1, b"none\0"), 0);
}

fn share(read_only: bool) -> (TempDir, Driver) {
    let folder = folders();
    let driver = mount(&folder.path().join("shared"), read_only);
    (folder, driver)
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// Returns a request as in guest memory.
fn message(opcode: u32, node: u64, body: &[u8]) -> Vec<u8> {
    let mut bytes = u32::try_from(40 + body.len()).expect("short").to_le_bytes().to_vec();
    bytes.extend(opcode.to_le_bytes());
    bytes.extend(1_u64.to_le_bytes());
    bytes.extend(node.to_le_bytes());
    bytes.extend([0; 16]);
    bytes.extend(body);
    bytes
}

/// Makes a request and returns the error of the reply, 0 for none, and its body.
fn ask(driver: &mut Driver, opcode: u32, node: u64, body: &[u8]) -> (i32, Vec<u8>) {
    let reply = driver.request(REQUESTS, &[&message(opcode, node, body)], &[4096]);
    let word = reply.get(4..8).and_then(|word| word.try_into().ok()).map(i32::from_le_bytes);
    (-word.expect("a reply"), reply.get(16..).expect("a body").to_vec())
}

/// Makes a request and returns the error of the reply, 0 for none.
fn request(driver: &mut Driver, opcode: u32, node: u64, body: &[u8]) -> i32 {
    ask(driver, opcode, node, body).0
}

#[test]
fn the_configuration_has_the_tag() {
    let (_folder, driver) = share(false);
    let mut config = [0; 40];
    driver.read_bytes(0x100, &mut config);
    assert_eq!((&config[..4], config[36]), (&b"tag\0"[..], 1));
}

#[test]
fn names_do_not_lead_out_of_the_directory() {
    let (_folder, mut driver) = share(false);
    assert_eq!(request(&mut driver, LOOKUP, 1, b"file\0"), 0);
    assert_eq!(request(&mut driver, LOOKUP, 1, b"none\0"), libc::ENOENT);
    for name in ["../secret\0", "..//secret\0", "/etc/passwd\0", "link/../../secret\0", "file/..\0"] {
        assert_ne!(request(&mut driver, LOOKUP, 1, name.as_bytes()), 0, "{name:?}");
    }
    // Unknown nodes, names without a terminating zero, requests without a body.
    assert_ne!(request(&mut driver, LOOKUP, 0xdead, b"file\0"), 0);
    assert_ne!(request(&mut driver, LOOKUP, 1, b"file"), 0);
    assert_ne!(request(&mut driver, LOOKUP, 1, b""), 0);
    assert_ne!(request(&mut driver, 0xffff, 1, b""), 0);
    assert_eq!(request(&mut driver, LOOKUP, 1, b"file\0"), 0);
}

#[test]
fn a_read_only_directory_refuses_changes() {
    let (folder, mut driver) = share(true);
    let mut body = vec![0; 16];
    body.extend(b"new\0");
    assert_eq!(request(&mut driver, CREATE, 1, &body), libc::EROFS);
    assert!(!folder.path().join("shared/new").exists());
    assert_eq!(request(&mut driver, LOOKUP, 1, b"file\0"), 0);
}

/// A request whose opcode a second thread of the guest changes between LOOKUP and UNLINK while the device reads it.
#[test]
fn a_request_that_changes_while_it_is_read_does_not_write_a_read_only_directory() {
    const TRIES: usize = 4000;
    let (folder, mut driver) = share(true);
    assert_eq!(request(&mut driver, UNLINK, 1, b"file\0"), libc::EROFS);
    let (at, reply_at) = (driver.buffer(4096), driver.buffer(512));
    let bytes = message(LOOKUP, 1, b"file\0");
    driver.memory.write_slice(&bytes, GuestAddress(at)).expect("memory");
    let stop = Arc::new(AtomicBool::new(false));
    let second = {
        let (memory, stop) = (driver.memory.clone(), Arc::clone(&stop));
        std::thread::spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                for opcode in [LOOKUP, UNLINK] {
                    memory.write_obj(opcode, GuestAddress(at + 4)).expect("memory");
                    (0..50).for_each(|_| std::hint::spin_loop());
                }
            }
        })
    };
    let len = u32::try_from(bytes.len()).expect("short");
    for _ in 0..TRIES {
        driver.put_descriptor(REQUESTS, 0, Descriptor { gpa: at, len, flags: NEXT, next: 1 });
        driver.put_descriptor(REQUESTS, 1, Descriptor { gpa: reply_at, len: 512, flags: WRITE, next: 0 });
        driver.make_available(REQUESTS, 0);
        driver.kick(REQUESTS);
        driver.wait_used(REQUESTS);
        if !folder.path().join("shared/file").exists() {
            break;
        }
    }
    stop.store(true, Ordering::Relaxed);
    second.join().expect("ended");
    assert!(folder.path().join("shared/file").exists());
}

#[test]
fn invalid_requests_are_completed() {
    let (_folder, mut driver) = share(false);
    driver.request(REQUESTS, &[&[1; 39]], &[100]);
    driver.request(REQUESTS, &[&[1; 60]], &[]);
    driver.request(REQUESTS, &[&[0xff; 4000]], &[8]);
    driver.request(REQUESTS, &[&vec![1; 1 << 20], &vec![1; 1 << 16]], &[100]);
    assert_eq!(request(&mut driver, LOOKUP, 1, b"file\0"), 0);
}

/// The length of the longest line that fuse-backend-rs has logged.
static LONGEST_LINE: AtomicUsize = AtomicUsize::new(0);

struct Lengths;

impl log::Log for Lengths {
    fn enabled(&self, _metadata: &log::Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &log::Record<'_>) {
        if record.target().starts_with("fuse_backend_rs") {
            LONGEST_LINE.fetch_max(record.args().to_string().len(), Ordering::Relaxed);
        }
    }

    fn flush(&self) {}
}

/// fuse-backend-rs logs names without a terminating zero, as lists of numbers.
#[test]
fn no_request_is_logged_as_a_whole() {
    log::set_logger(&Lengths).expect("no other logger in these tests");
    log::set_max_level(log::LevelFilter::Warn);
    let (_folder, mut driver) = share(false);
    let long = vec![b'x'; 100_000];
    for opcode in [LOOKUP, 6, 8, 9, UNLINK, 11, 12, 13, 21, 22, 24, 35, 39, 45] {
        for (body, terminated) in [(&long[..], false), (&long[..200], false), (&long[..], true)] {
            let mut body = body.to_vec();
            body.extend(terminated.then_some(0));
            assert_ne!(request(&mut driver, opcode, 1, &body), 0, "{opcode}");
        }
    }
    // The header says more, and less, than there is.
    for said in [0_u32, 39, 10_000, u32::MAX] {
        let mut bytes = message(LOOKUP, 1, b"file\0");
        bytes[..4].copy_from_slice(&said.to_le_bytes());
        driver.request(REQUESTS, &[&bytes], &[512]);
    }
    // GETATTR of a node that is not there: a line that is logged.
    assert_eq!(request(&mut driver, 3, 0xdead, &[0; 16]), libc::EBADF);
    let longest = LONGEST_LINE.load(Ordering::Relaxed);
    assert!((1..1000).contains(&longest), "{longest}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]
    #[test]
    fn any_requests_are_survived(
        requests in proptest::collection::vec(
            (0_u32..55, 0_u64..4, proptest::collection::vec(prop_oneof![0_u8..4, any::<u8>()], 0..160), 0_u32..300),
            1..60,
        ),
    ) {
        let (folder, mut driver) = share(false);
        request(&mut driver, LOOKUP, 1, b"file\0");
        for (opcode, node, body, reply) in requests {
            driver.request(REQUESTS, &[&message(opcode, node, &body)], &[reply]);
        }
        init(&mut driver);
        prop_assert_eq!(std::fs::read_to_string(folder.path().join("secret")).expect("there"), "outside");
    }
}

#[test]
fn what_cannot_be_shared_is_refused() {
    let folder = tempfile::tempdir().expect("a folder");
    let share = |tag: &str, directory: &Path| Fs::new(options(tag, directory));
    assert!(matches!(share("", folder.path()), Err(ShareError::Tag(_))));
    assert!(matches!(share(&"x".repeat(37), folder.path()), Err(ShareError::Tag(_))));
    assert!(matches!(share("x", Path::new("/nowhere/at/all")), Err(ShareError::Access(..))));
    assert!(matches!(share("x", Path::new("/dev/null")), Err(ShareError::NotDirectory(_))));
}
