//! Extended attributes, and files that are opened with `O_DIRECT`.

use super::hostile::{lookup, named, number};
use super::{INIT, REQUESTS, ask, message, mount_with, options, request, share, words};
use crate::virtio::fs::FsOptions;
use crate::virtio::mock::Driver;
use rustix::fs::{XattrFlags, getxattr, setxattr};
use std::fs;
use std::path::Path;

const OPEN: u32 = 14;
const READ: u32 = 15;
const WRITE: u32 = 16;
const SETXATTR: u32 = 21;
const GETXATTR: u32 = 22;
const LISTXATTR: u32 = 23;
const REMOVEXATTR: u32 = 24;
const CREATE: u32 = 35;

/// Returns false where the file system of the tests has no such attributes.
fn has_attributes(file: &Path) -> bool {
    setxattr(file, c"user.host", b"value of the host", XattrFlags::empty()).is_ok()
}

fn set(driver: &mut Driver, node: u64, name: &str, value: &[u8], flags: u32) -> i32 {
    let mut body = named(&words(&[u32::try_from(value.len()).expect("short"), flags]), &[name]);
    body.extend(value);
    request(driver, SETXATTR, node, &body)
}

fn get(driver: &mut Driver, node: u64, name: &str, size: u32) -> (i32, Vec<u8>) {
    ask(driver, GETXATTR, node, &named(&words(&[size, 0]), &[name]))
}

#[test]
fn attributes_of_users_are_set_read_listed_and_removed() {
    let (folder, mut driver) = share(false);
    let path = folder.path().join("shared/file");
    if !has_attributes(&path) {
        return;
    }
    let node = lookup(&mut driver, 1, "file");
    assert_eq!(get(&mut driver, node, "user.host", 100), (0, b"value of the host".to_vec()));
    assert_eq!(get(&mut driver, node, "user.host", 0), (0, words(&[17, 0])));
    assert_eq!(get(&mut driver, node, "user.host", 16).0, libc::ERANGE);
    assert_eq!(get(&mut driver, node, "user.none", 16).0, libc::ENODATA);
    for node in [node, 1] {
        assert_eq!(set(&mut driver, node, "user.a", b"1", 0), 0);
        assert_eq!(set(&mut driver, node, "user.a", b"2", 1), libc::EEXIST);
        assert_eq!(set(&mut driver, node, "user.b", b"2", 2), libc::ENODATA);
        assert_eq!(set(&mut driver, node, "user.a", b"", 2), 0);
        assert_eq!(get(&mut driver, node, "user.a", 16), (0, Vec::new()));
    }
    let mut value = [0; 10];
    assert_eq!(getxattr(&path, c"user.a", &mut value).expect("on the host"), 0);
    let (error, names) = ask(&mut driver, LISTXATTR, node, &words(&[100, 0]));
    let mut names: Vec<&[u8]> = names.split_inclusive(|byte| *byte == 0).collect();
    names.sort_unstable();
    assert_eq!((error, names), (0, vec![&b"user.a\0"[..], b"user.host\0"]));
    assert_eq!(ask(&mut driver, LISTXATTR, node, &words(&[0, 0])), (0, words(&[17, 0])));
    assert_eq!(ask(&mut driver, LISTXATTR, node, &words(&[5, 0])).0, libc::ERANGE);
    assert_eq!(request(&mut driver, REMOVEXATTR, node, b"user.a\0"), 0);
    assert_eq!(request(&mut driver, REMOVEXATTR, node, b"user.a\0"), libc::ENODATA);
}

#[test]
fn other_attributes_and_files_are_out_of_reach() {
    let (folder, mut driver) = share(false);
    let path = folder.path().join("shared/file");
    let node = lookup(&mut driver, 1, "file");
    let long = format!("user.{}", "x".repeat(251));
    for (name, error) in [
        ("security.capability", libc::EOPNOTSUPP),
        ("trusted.overlay.opaque", libc::EOPNOTSUPP),
        ("system.posix_acl_access", libc::EOPNOTSUPP),
        ("User.a", libc::EOPNOTSUPP),
        ("user", libc::EOPNOTSUPP),
        ("", libc::EOPNOTSUPP),
        ("user.", libc::EINVAL),
        (&long, libc::ERANGE),
    ] {
        assert_eq!(set(&mut driver, node, name, b"1", 0), error, "{name}");
        assert_eq!(get(&mut driver, node, name, 16).0, error, "{name}");
        assert_eq!(request(&mut driver, REMOVEXATTR, node, &named(&[], &[name])), error, "{name}");
    }
    assert_eq!(set(&mut driver, node, "user.a", &vec![0; 65537], 0), libc::E2BIG);
    assert_eq!(set(&mut driver, node, "user.a", b"1", 4), libc::EINVAL);
    if !has_attributes(&path) {
        return;
    }
    // A link names nothing but itself, and has no attributes.
    let secret = folder.path().join("secret");
    assert!(has_attributes(&secret));
    let link = lookup(&mut driver, 1, "link");
    assert_eq!(set(&mut driver, link, "user.host", b"guest", 0), libc::EPERM);
    assert_eq!(get(&mut driver, link, "user.host", 100).0, libc::ENODATA);
    assert_eq!(ask(&mut driver, LISTXATTR, link, &words(&[100, 0])), (0, Vec::new()));
    assert_eq!(request(&mut driver, REMOVEXATTR, link, b"user.host\0"), libc::EPERM);
    let mut value = [0; 100];
    assert_eq!(getxattr(&secret, c"user.host", &mut value).expect("there"), 17);
}

#[test]
fn a_read_only_directory_keeps_its_attributes() {
    let (folder, mut driver) = share(true);
    let node = lookup(&mut driver, 1, "file");
    assert_eq!(set(&mut driver, node, "user.a", b"1", 0), libc::EROFS);
    assert_eq!(request(&mut driver, REMOVEXATTR, node, b"user.host\0"), libc::EROFS);
    if has_attributes(&folder.path().join("shared/file")) {
        assert_eq!(get(&mut driver, node, "user.host", 100), (0, b"value of the host".to_vec()));
    }
}

/// Linux before 5.11 would ask for an attribute before each write, and any Linux where set-user-ID files are allowed.
#[test]
fn a_guest_that_would_ask_before_each_write_has_no_attributes() {
    let (folder, mut driver) = share(false);
    let node = lookup(&mut driver, 1, "file");
    assert_ne!(get(&mut driver, node, "user.a", 16).0, libc::ENOSYS);
    assert_eq!(request(&mut driver, INIT, 0, &words(&[7, 31, 0, 0])), 0);
    let shared = folder.path().join("shared");
    let privileged = mount_with(FsOptions { privileged_files: true, ..options("tag", &shared) });
    for mut driver in [driver, privileged] {
        let node = lookup(&mut driver, 1, "file");
        assert_eq!(get(&mut driver, node, "user.a", 16).0, libc::ENOSYS);
        assert_eq!(set(&mut driver, node, "user.a", b"1", 0), libc::ENOSYS);
        assert_eq!(ask(&mut driver, LISTXATTR, node, &words(&[100, 0])).0, libc::ENOSYS);
        assert_eq!(request(&mut driver, REMOVEXATTR, node, b"user.a\0"), libc::ENOSYS);
    }
}

/// Returns the paths below `folder` that this process has open with `O_DIRECT`.
fn open_with_direct(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir("/proc/self/fd").expect("procfs").flatten();
    let files = entries.filter(|entry| fs::read_link(entry.path()).is_ok_and(|path| path.starts_with(folder)));
    let infos =
        files.filter_map(|entry| fs::read_to_string(Path::new("/proc/self/fdinfo").join(entry.file_name())).ok());
    let direct = |info: &String| {
        let flags = info.lines().find_map(|line| line.strip_prefix("flags:")).expect("flags");
        let flags = i32::from_str_radix(flags.trim(), 8).expect("octal");
        flags & libc::O_DIRECT != 0
    };
    infos.filter(direct).collect()
}

/// Databases, dd and fio open with `O_DIRECT` in the guest, whose requests then have any alignment here.
#[test]
fn files_opened_with_o_direct_are_read_and_written_at_any_alignment() {
    let (folder, mut driver) = share(false);
    let flags = (libc::O_RDWR | libc::O_DIRECT).cast_unsigned();
    let (error, reply) = ask(&mut driver, CREATE, 1, &named(&words(&[flags, 0o600, 0, 0]), &["new"]));
    assert_eq!(error, 0);
    // struct fuse_entry_out has 128 bytes; then the handle.
    let created = (number(&reply, 0), number(&reply, 128));
    let file = lookup(&mut driver, 1, "file");
    let (error, reply) = ask(&mut driver, OPEN, file, &words(&[flags, 0]));
    assert_eq!(error, 0);
    for (node, handle) in [created, (file, number(&reply, 0))] {
        let mut expected = vec![0; 20_000];
        for (at, len) in [(0_u64, 4096_u32), (4096, 512), (1, 511), (5000, 7), (4095, 4098), (13, 12_345)] {
            let data: Vec<u8> = (0..len).map(|byte| (byte % 255) as u8 + 1).collect();
            // struct fuse_write_in: handle, offset, size, write flags, lock owner, open flags, padding.
            let mut body = handle.to_le_bytes().to_vec();
            body.extend(at.to_le_bytes());
            body.extend(words(&[len, 0, 0, 0, flags, 0]));
            body.extend(&data);
            let (error, reply) = ask(&mut driver, WRITE, node, &body);
            assert_eq!((error, &reply[..4]), (0, &len.to_le_bytes()[..]), "write of {len} at {at}");
            expected[at as usize..][..len as usize].copy_from_slice(&data);
            let mut body = handle.to_le_bytes().to_vec();
            body.extend(at.to_le_bytes());
            body.extend(words(&[len, 0, 0, 0, flags, 0]));
            let reply = driver.request(REQUESTS, &[&message(READ, node, &body)], &[3, 77, 20_000]);
            assert_eq!(&reply[16..], data, "read of {len} at {at}");
        }
        assert_eq!(open_with_direct(folder.path()), Vec::<String>::new());
    }
    let written = fs::read(folder.path().join("shared/new")).expect("there");
    assert_eq!(written.len(), 13 + 12_345);
}
