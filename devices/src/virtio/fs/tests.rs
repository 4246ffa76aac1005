//! Shared folders, by hand-made FUSE requests.
#![allow(clippy::cast_possible_truncation, reason = "numbers of tests are small")]

use super::{Fs, ShareError};
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
    let device = Fs::new("tag", &folder.path().join("shared"), read_only).expect("shared");
    let mut driver = Driver::running(Box::new(device));
    // major 7, minor 31, readahead, flags.
    let body: Vec<u8> = [7_u32, 31, 0, 0].iter().flat_map(|word| word.to_le_bytes()).collect();
    assert_eq!(ask(&mut driver, INIT, 0, &body), 0);
    (folder, driver)
}

/// A request; the reply's error, 0 for none.
fn ask(driver: &mut Driver, opcode: u32, node: u64, body: &[u8]) -> i32 {
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
fn the_tag_is_told() {
    let (_folder, driver) = share(false);
    let mut config = [0; 40];
    driver.read_bytes(0x100, &mut config);
    assert_eq!((&config[..4], config[36]), (&b"tag\0"[..], 1));
}

#[test]
fn names_lead_nowhere_else() {
    let (_folder, mut driver) = share(false);
    assert_eq!(ask(&mut driver, LOOKUP, 1, b"file\0"), 0);
    assert_eq!(ask(&mut driver, LOOKUP, 1, b"none\0"), libc::ENOENT);
    for name in ["../secret\0", "..//secret\0", "/etc/passwd\0", "link/../../secret\0", "file/..\0"] {
        assert_ne!(ask(&mut driver, LOOKUP, 1, name.as_bytes()), 0, "{name:?}");
    }
    // Nodes that nobody was told of, names without an end, requests without a body.
    assert_ne!(ask(&mut driver, LOOKUP, 0xdead, b"file\0"), 0);
    assert_ne!(ask(&mut driver, LOOKUP, 1, b"file"), 0);
    assert_ne!(ask(&mut driver, LOOKUP, 1, b""), 0);
    assert_ne!(ask(&mut driver, 0xffff, 1, b""), 0);
    assert_eq!(ask(&mut driver, LOOKUP, 1, b"file\0"), 0);
}

#[test]
fn a_read_only_folder_says_so() {
    let (folder, mut driver) = share(true);
    let mut body = vec![0; 16];
    body.extend(b"new\0");
    assert_eq!(ask(&mut driver, CREATE, 1, &body), libc::EROFS);
    assert!(!folder.path().join("shared/new").exists());
    assert_eq!(ask(&mut driver, LOOKUP, 1, b"file\0"), 0);
}

#[test]
fn requests_that_are_none_are_given_back() {
    let (_folder, mut driver) = share(false);
    driver.request(REQUESTS, &[&[1; 39]], &[100]);
    driver.request(REQUESTS, &[&[1; 60]], &[]);
    driver.request(REQUESTS, &[&[0xff; 4000]], &[8]);
    driver.request(REQUESTS, &[&vec![1; 1 << 20], &vec![1; 1 << 16]], &[100]);
    assert_eq!(ask(&mut driver, LOOKUP, 1, b"file\0"), 0);
}

#[test]
fn what_cannot_be_shared_is_refused() {
    let folder = tempfile::tempdir().expect("a folder");
    assert!(matches!(Fs::new("", folder.path(), false), Err(ShareError::Tag(_))));
    assert!(matches!(Fs::new(&"x".repeat(37), folder.path(), false), Err(ShareError::Tag(_))));
    assert!(matches!(Fs::new("x", Path::new("/nowhere/at/all"), false), Err(ShareError::Folder(..))));
    assert!(matches!(Fs::new("x", Path::new("/dev/null"), false), Err(ShareError::NotFolder(_))));
}
