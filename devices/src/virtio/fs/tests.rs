//! Shared directories, with FUSE requests made by hand.
#![allow(clippy::cast_possible_truncation, reason = "numbers of tests are small")]

use super::{Fs, FsOptions, ShareError};
use crate::virtio::mock::Driver;
use std::path::Path;
use tempfile::TempDir;

const LOOKUP: u32 = 1;
const INIT: u32 = 26;
const CREATE: u32 = 35;
const REQUESTS: usize = 1;

fn share(read_only: bool) -> (TempDir, Driver) {
    let folder = tempfile::tempdir().expect("a folder");
    std::fs::create_dir(folder.path().join("shared")).expect("made");
    std::fs::write(folder.path().join("secret"), "outside").expect("written");
    std::fs::write(folder.path().join("shared/file"), "inside").expect("written");
    std::os::unix::fs::symlink("../secret", folder.path().join("shared/link")).expect("linked");
    let options = FsOptions { tag: "tag".into(), directory: folder.path().join("shared"), read_only };
    let device = Fs::new(options).expect("shared");
    let mut driver = Driver::running(Box::new(device));
    // major 7, minor 31, readahead, flags.
    let body: Vec<u8> = [7_u32, 31, 0, 0].iter().flat_map(|word| word.to_le_bytes()).collect();
    assert_eq!(request(&mut driver, INIT, 0, &body), 0);
    (folder, driver)
}

/// Makes a request and returns the error of the reply, 0 for none.
fn request(driver: &mut Driver, opcode: u32, node: u64, body: &[u8]) -> i32 {
    let mut bytes = u32::try_from(40 + body.len()).expect("short").to_le_bytes().to_vec();
    bytes.extend(opcode.to_le_bytes());
    bytes.extend(1_u64.to_le_bytes());
    bytes.extend(node.to_le_bytes());
    bytes.extend([0; 16]);
    bytes.extend(body);
    let reply = driver.request(REQUESTS, &[&bytes], &[512]);
    let word = reply.get(4..8).and_then(|word| word.try_into().ok()).map(i32::from_le_bytes);
    -word.expect("a reply")
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

#[test]
fn invalid_requests_are_completed() {
    let (_folder, mut driver) = share(false);
    driver.request(REQUESTS, &[&[1; 39]], &[100]);
    driver.request(REQUESTS, &[&[1; 60]], &[]);
    driver.request(REQUESTS, &[&[0xff; 4000]], &[8]);
    driver.request(REQUESTS, &[&vec![1; 1 << 20], &vec![1; 1 << 16]], &[100]);
    assert_eq!(request(&mut driver, LOOKUP, 1, b"file\0"), 0);
}

#[test]
fn what_cannot_be_shared_is_refused() {
    let folder = tempfile::tempdir().expect("a folder");
    let share = |tag: &str, directory: &Path| {
        Fs::new(FsOptions { tag: tag.into(), directory: directory.to_owned(), read_only: false })
    };
    assert!(matches!(share("", folder.path()), Err(ShareError::Tag(_))));
    assert!(matches!(share(&"x".repeat(37), folder.path()), Err(ShareError::Tag(_))));
    assert!(matches!(share("x", Path::new("/nowhere/at/all")), Err(ShareError::Access(..))));
    assert!(matches!(share("x", Path::new("/dev/null")), Err(ShareError::NotDirectory(_))));
}
