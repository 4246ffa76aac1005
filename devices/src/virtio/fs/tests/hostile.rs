//! A guest that tries to leave its shared directory, or to change one that is read-only.

use super::{REQUESTS, ask, folders, message, mount, mount_with, options, request, share, words};
use crate::virtio::fs::FsOptions;
use crate::virtio::mock::Driver;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};

const LOOKUP: u32 = 1;
const GETATTR: u32 = 3;
const SETATTR: u32 = 4;
const SYMLINK: u32 = 6;
const MKNOD: u32 = 8;
const MKDIR: u32 = 9;
const UNLINK: u32 = 10;
const RMDIR: u32 = 11;
const RENAME: u32 = 12;
const LINK: u32 = 13;
const OPEN: u32 = 14;
const WRITE: u32 = 16;
const OPENDIR: u32 = 27;
const CREATE: u32 = 35;
const FALLOCATE: u32 = 43;
const READDIRPLUS: u32 = 44;
const RENAME2: u32 = 45;

/// `O_TMPFILE` without the bits of `O_DIRECTORY` in it.
const TMPFILE: i32 = libc::O_TMPFILE & !libc::O_DIRECTORY;

/// Returns a body with `fixed` before the names, each with a terminating zero.
pub(super) fn named(fixed: &[u8], names: &[&str]) -> Vec<u8> {
    let names = names.iter().flat_map(|name| name.bytes().chain([0]));
    fixed.iter().copied().chain(names).collect()
}

pub(super) fn number(reply: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(reply[at..at + 8].try_into().expect("8 bytes"))
}

pub(super) fn lookup(driver: &mut Driver, parent: u64, name: &str) -> u64 {
    let (error, reply) = ask(driver, LOOKUP, parent, &named(&[], &[name]));
    assert_eq!(error, 0, "{name}");
    number(&reply, 0)
}

#[test]
fn a_directory_that_was_moved_out_does_not_lead_to_its_parent() {
    let (folder, mut driver) = share(true);
    fs::create_dir(folder.path().join("shared/dir")).expect("made");
    let dir = lookup(&mut driver, 1, "dir");
    fs::rename(folder.path().join("shared/dir"), folder.path().join("moved")).expect("moved");
    assert_eq!(request(&mut driver, LOOKUP, dir, b"..\0"), libc::EINVAL);
    assert_eq!(request(&mut driver, LOOKUP, dir, b"..\0secret\0"), libc::EINVAL);
    assert_eq!(request(&mut driver, LOOKUP, 1, b"..\0"), libc::EINVAL);
}

#[test]
fn a_nested_share_does_not_lead_to_the_parent() {
    let (folder, mut outer) = share(false);
    fs::create_dir_all(folder.path().join("shared/inner/dir")).expect("made");
    let mut inner = mount(&folder.path().join("shared/inner"), false);
    let dir = lookup(&mut inner, 1, "dir");
    let from = lookup(&mut outer, 1, "inner");
    assert_eq!(request(&mut outer, RENAME, from, &named(&1_u64.to_le_bytes(), &["dir", "moved"])), 0);
    assert_eq!(request(&mut inner, LOOKUP, dir, b"..\0"), libc::EINVAL);
}

#[test]
fn no_request_takes_a_name_that_is_not_one_component() {
    let (folder, mut driver) = share(false);
    let file = lookup(&mut driver, 1, "file");
    let before = fs::read_dir(folder.path()).expect("read").count();
    for bad in ["", ".", "..", "../new", "a/b", "/new", "file/"] {
        let requests = [
            (LOOKUP, named(&[], &[bad])),
            (UNLINK, named(&[], &[bad])),
            (RMDIR, named(&[], &[bad])),
            (SYMLINK, named(&[], &[bad, "target"])),
            (MKNOD, named(&words(&[libc::S_IFREG | 0o600, 0, 0, 0]), &[bad])),
            (MKDIR, named(&words(&[0o700, 0]), &[bad])),
            (RENAME, named(&1_u64.to_le_bytes(), &[bad, "new"])),
            (RENAME, named(&1_u64.to_le_bytes(), &["file", bad])),
            (RENAME2, named(&words(&[1, 0, 0, 0]), &[bad, "new"])),
            (RENAME2, named(&words(&[1, 0, 0, 0]), &["file", bad])),
            (LINK, named(&file.to_le_bytes(), &[bad])),
            (CREATE, named(&words(&[libc::O_RDWR.cast_unsigned(), 0o600, 0, 0]), &[bad])),
        ];
        for (opcode, body) in requests {
            assert_eq!(request(&mut driver, opcode, 1, &body), libc::EINVAL, "{opcode} {bad:?}");
        }
    }
    assert_eq!(fs::read_dir(folder.path()).expect("read").count(), before);
    // The target of a symbolic link is any text: the guest resolves it.
    assert_eq!(request(&mut driver, SYMLINK, 1, &named(&[], &["new", "../../etc"])), 0);
    assert_eq!(request(&mut driver, LOOKUP, 1, &named(&[], &["x".repeat(256).as_str()])), libc::ENAMETOOLONG);
}

/// `O_PATH` cancels `O_CREAT` and `O_EXCL`, without which an open follows symbolic links.
#[test]
fn create_does_not_follow_a_symbolic_link() {
    let (folder, mut driver) = share(false);
    fs::write(folder.path().join("secret"), "a secret of 24 bytes ...").expect("written");
    let link = lookup(&mut driver, 1, "link");
    for flags in [libc::O_PATH, libc::O_PATH | libc::O_DIRECTORY, libc::O_RDWR, libc::O_RDONLY] {
        let body = named(&words(&[flags.cast_unsigned(), 0o600, 0, 0]), &["link"]);
        let (error, reply) = ask(&mut driver, CREATE, 1, &body);
        if error == 0 {
            let mut body = words(&[1, 0]);
            body.extend(number(&reply, 128).to_le_bytes());
            let (error, attributes) = ask(&mut driver, GETATTR, link, &body);
            assert_ne!((error, number(&attributes, 24)), (0, 24), "the size of the secret, by {flags:#x}");
        }
        assert_ne!(error, 0, "{flags:#x}");
    }
}

#[test]
fn nothing_changes_a_read_only_directory() {
    let (folder, mut driver) = share(true);
    let (file, link) = (lookup(&mut driver, 1, "file"), lookup(&mut driver, 1, "link"));
    let (error, reply) = ask(&mut driver, OPEN, file, &words(&[0, 0]));
    assert_eq!(error, 0);
    let handle = number(&reply, 0).to_le_bytes();
    for (node, opcode) in [(file, OPEN), (1, OPENDIR), (1, OPEN)] {
        for flags in [libc::O_WRONLY, libc::O_RDWR, libc::O_RDWR | TMPFILE, libc::O_TRUNC, TMPFILE, libc::O_CREAT] {
            let body = words(&[flags.cast_unsigned(), 0]);
            assert_eq!(request(&mut driver, opcode, node, &body), libc::EROFS, "{opcode} {flags:#x}");
        }
    }
    // FATTR_MODE and FATTR_SIZE.
    let mut attributes = words(&[1 | 8, 0]);
    attributes.extend([0; 80]);
    let mut write = handle.to_vec();
    write.extend(words(&[0, 0, 1, 0, 0, 0, 0, 0]));
    write.push(b'x');
    let mut allocate = handle.to_vec();
    allocate.extend(words(&[0, 0, 10, 0, 0, 0]));
    let requests = [
        (SETATTR, attributes),
        (SYMLINK, named(&[], &["new", "target"])),
        (MKNOD, named(&words(&[libc::S_IFREG | 0o600, 0, 0, 0]), &["new"])),
        (MKDIR, named(&words(&[0o700, 0]), &["new"])),
        (UNLINK, named(&[], &["file"])),
        (RMDIR, named(&[], &["dir"])),
        (RENAME, named(&1_u64.to_le_bytes(), &["file", "new"])),
        (RENAME2, named(&words(&[1, 0, 0, 0]), &["file", "new"])),
        (LINK, named(&file.to_le_bytes(), &["new"])),
        (CREATE, named(&words(&[0, 0o600, 0, 0]), &["new"])),
    ];
    for (opcode, body) in requests {
        assert_eq!(request(&mut driver, opcode, 1, &body), libc::EROFS, "{opcode}");
    }
    for (opcode, body) in [(WRITE, write), (FALLOCATE, allocate)] {
        assert_eq!(request(&mut driver, opcode, file, &body), libc::EROFS, "{opcode}");
    }
    // SETXATTR, REMOVEXATTR, IOCTL, COPY_FILE_RANGE, TMPFILE, and what does not exist.
    for opcode in [21, 24, 39, 47, 51, 4096, u32::MAX] {
        assert_ne!(request(&mut driver, opcode, link, &[0; 64]), 0, "{opcode}");
    }
    assert_eq!(fs::read_to_string(folder.path().join("shared/file")).expect("read"), "inside");
    assert_eq!(fs::read_dir(folder.path().join("shared")).expect("read").count(), 2);
}

#[test]
fn a_list_of_a_directory_does_not_name_its_parent() {
    let (folder, mut driver) = share(true);
    fs::create_dir(folder.path().join("shared/dir")).expect("made");
    let dir = lookup(&mut driver, 1, "dir");
    let (error, reply) = ask(&mut driver, OPENDIR, dir, &words(&[0, 0]));
    assert_eq!(error, 0);
    let mut body = reply[..8].to_vec();
    body.extend(words(&[0, 0, 2048, 0, 0, 0, 0, 0]));
    assert_eq!(ask(&mut driver, READDIRPLUS, dir, &body), (0, vec![]));
}

/// The mode of a file in the shared directory, with its type.
fn mode(folder: &tempfile::TempDir, name: &str) -> u32 {
    fs::symlink_metadata(folder.path().join("shared").join(name)).expect("there").mode()
}

/// The requests that would make set-user-ID and set-group-ID files, and device nodes.
fn privileged_requests() -> Vec<(u32, Vec<u8>)> {
    let mknod = |mode: u32, umask: u32| (MKNOD, named(&words(&[mode, 0x103, umask, 0]), &["new"]));
    let mut requests = vec![
        mknod(libc::S_IFCHR | 0o666, 0),
        mknod(libc::S_IFBLK | 0o666, 0),
        // This umask makes a character device of the type S_IFLNK, if it is applied to all bits.
        mknod(libc::S_IFLNK | 0o666, libc::S_IFREG),
        (RENAME2, named(&words(&[1, 0, libc::RENAME_WHITEOUT, 0]), &["file", "moved"])),
        (MKDIR, named(&words(&[0o2777, 0]), &["new"])),
    ];
    for bit in [libc::S_ISUID, libc::S_ISGID] {
        requests.push(mknod(libc::S_IFREG | bit | 0o755, 0));
        requests.push((CREATE, named(&words(&[libc::O_RDWR.cast_unsigned(), bit | 0o755, 0, 0]), &["new"])));
    }
    requests
}

/// The body of SETATTR with a mode.
fn set_mode(mode: u32) -> Vec<u8> {
    let mut body = words(&[1, 0]);
    body.extend([0; 60]);
    body.extend(words(&[mode, 0, 0, 0, 0]));
    body
}

#[test]
fn privileged_files_are_refused() {
    let (folder, mut driver) = share(false);
    for (opcode, body) in privileged_requests() {
        assert_eq!(request(&mut driver, opcode, 1, &body), libc::EPERM, "{opcode} {body:?}");
        assert!(!folder.path().join("shared/new").exists(), "{opcode} {body:?}");
    }
    let file = lookup(&mut driver, 1, "file");
    for bits in [libc::S_ISUID, libc::S_ISGID, libc::S_ISUID | libc::S_ISGID] {
        assert_eq!(request(&mut driver, SETATTR, file, &set_mode(bits | 0o755)), libc::EPERM);
    }
    assert_eq!(mode(&folder, "file") & 0o6000, 0);
    // Files, pipes and sockets, and the sticky bit, are not privileged.
    assert_eq!(request(&mut driver, SETATTR, file, &set_mode(libc::S_ISVTX | 0o640)), 0);
    assert_eq!(mode(&folder, "file") & 0o7777, 0o1640);
    for (kind, name) in [(libc::S_IFREG, "plain"), (libc::S_IFIFO, "pipe"), (libc::S_IFSOCK, "socket")] {
        let body = named(&words(&[kind | 0o777, 0, 0o027, 0]), &[name]);
        assert_eq!(request(&mut driver, MKNOD, 1, &body), 0, "{name}");
        assert_eq!(mode(&folder, name), kind | 0o750, "{name}");
    }
}

#[test]
fn privileged_files_can_be_allowed() {
    let folder = folders();
    let directory = folder.path().join("shared");
    let mut driver = mount_with(FsOptions { privileged_files: true, ..options("tag", &directory) });
    let file = lookup(&mut driver, 1, "file");
    assert_eq!(request(&mut driver, SETATTR, file, &set_mode(0o6755)), 0);
    assert_eq!(mode(&folder, "file") & 0o7777, 0o6755);
    let body = named(&words(&[libc::S_IFCHR | 0o600, 0x103, 0, 0]), &["null"]);
    // Only root makes device nodes.
    let expected = if rustix::process::geteuid().is_root() { 0 } else { libc::EPERM };
    assert_eq!(request(&mut driver, MKNOD, 1, &body), expected);
}

/// A directory of the host keeps its set-group-ID bit where the guest changes other bits. The guest cannot set it.
#[test]
fn a_directory_keeps_its_set_group_id_bit() {
    let (folder, mut driver) = share(false);
    let path = folder.path().join("shared/dir");
    fs::create_dir(&path).expect("made");
    let dir = lookup(&mut driver, 1, "dir");
    assert_eq!(request(&mut driver, SETATTR, dir, &set_mode(0o2755)), libc::EPERM);
    fs::set_permissions(&path, fs::Permissions::from_mode(0o2755)).expect("set");
    assert_eq!(request(&mut driver, SETATTR, dir, &set_mode(0o2775)), 0);
    assert_eq!(mode(&folder, "dir") & 0o7777, 0o2775);
    assert_eq!(request(&mut driver, SETATTR, dir, &set_mode(0o4775)), libc::EPERM);
}

/// A set-user-ID program that the host put into the share must not run what the guest wrote.
#[test]
fn a_set_user_id_file_loses_the_bit_where_the_guest_writes_it() {
    let (folder, mut driver) = share(false);
    let path = folder.path().join("shared/program");
    for by_truncation in [false, true] {
        fs::write(&path, "a program").expect("written");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o6755)).expect("set");
        let program = lookup(&mut driver, 1, "program");
        let flags = libc::O_WRONLY | if by_truncation { libc::O_TRUNC } else { 0 };
        let (error, reply) = ask(&mut driver, OPEN, program, &words(&[flags.cast_unsigned(), 0]));
        assert_eq!(error, 0);
        if !by_truncation {
            let mut write = reply[..8].to_vec();
            write.extend(words(&[0, 0, 1, 0, 0, 0, flags.cast_unsigned(), 0]));
            write.push(b'x');
            assert_eq!(request(&mut driver, WRITE, program, &write), 0);
        }
        assert_eq!(mode(&folder, "program") & 0o6000, 0, "by truncation: {by_truncation}");
    }
}

/// Root can make files for each user of the guest. Another user of the host owns all of them itself.
#[test]
fn each_user_of_the_guest_can_make_files() {
    const USER: u32 = 12_345;
    let (folder, mut driver) = share(false);
    let world = fs::Permissions::from_mode(0o777);
    fs::set_permissions(folder.path().join("shared"), world).expect("set");
    let requests = [
        (MKDIR, named(&words(&[0o700, 0]), &["a"])),
        (CREATE, named(&words(&[libc::O_RDWR.cast_unsigned(), 0o600, 0, 0]), &["b"])),
        (MKNOD, named(&words(&[libc::S_IFREG | 0o600, 0, 0, 0]), &["c"])),
        (SYMLINK, named(&[], &["d", "target"])),
    ];
    for (opcode, body) in requests {
        let mut bytes = message(opcode, 1, &body);
        bytes[24..28].copy_from_slice(&USER.to_le_bytes());
        bytes[28..32].copy_from_slice(&USER.to_le_bytes());
        let reply = driver.request(REQUESTS, &[&bytes], &[512]);
        assert_eq!(reply[4..8], [0; 4], "{opcode}");
    }
    let hwvmm = (rustix::process::geteuid(), rustix::process::getegid());
    let owner = if hwvmm.0.is_root() { (USER, USER) } else { (hwvmm.0.as_raw(), hwvmm.1.as_raw()) };
    for name in ["a", "b", "c", "d"] {
        let file = fs::symlink_metadata(folder.path().join("shared").join(name)).expect("made");
        assert_eq!((file.uid(), file.gid()), owner, "{name}");
    }
}

/// The attributes of a symbolic link are set by a path in /proc, which must not lead to its target.
#[test]
fn the_target_of_a_symbolic_link_is_not_changed() {
    let (folder, mut driver) = share(false);
    let secret = folder.path().join("secret");
    let attributes = || {
        let now = fs::metadata(&secret).expect("there");
        (now.mode(), now.size(), now.uid(), now.gid(), now.mtime())
    };
    let before = attributes();
    let link = lookup(&mut driver, 1, "link");
    // FATTR_MODE, UID, GID, SIZE, ATIME, MTIME, and all of them.
    for valid in [1, 2, 4, 8, 16, 32, 63] {
        let mut body = words(&[valid, 0]);
        body.extend([0; 60]);
        body.extend(words(&[0o777, 0, 123, 123, 0]));
        request(&mut driver, SETATTR, link, &body);
        assert_eq!(attributes(), before, "{valid}");
    }
    for flags in [libc::O_RDONLY, libc::O_RDWR, libc::O_PATH, libc::O_TRUNC | libc::O_WRONLY] {
        assert_ne!(request(&mut driver, OPEN, link, &words(&[flags.cast_unsigned(), 0])), 0, "{flags:#x}");
        assert_ne!(request(&mut driver, OPENDIR, link, &words(&[flags.cast_unsigned(), 0])), 0, "{flags:#x}");
    }
    assert_ne!(request(&mut driver, LOOKUP, link, b"x\0"), 0);
    assert_eq!(attributes(), before);
}
