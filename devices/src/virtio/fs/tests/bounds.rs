//! The bounds of what a guest can keep open, and what it keeps over a reset.

use super::hostile::{lookup, named, number};
use super::{REQUESTS, ask, folders, init, message, mount, options, request, share, words};
use crate::virtio::fs::Fs;
use crate::virtio::fs::tables::Limits;
use crate::virtio::mock::Driver;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

const LOOKUP: u32 = 1;
const FORGET: u32 = 2;
const MKDIR: u32 = 9;
const OPEN: u32 = 14;
const RELEASE: u32 = 18;
const OPENDIR: u32 = 27;
const CREATE: u32 = 35;
const DESTROY: u32 = 38;
const READDIR: u32 = 28;
const READDIRPLUS: u32 = 44;

/// The open files of this process that are in `folder`.
fn open_files(folder: &Path) -> usize {
    let fds = fs::read_dir("/proc/self/fd").expect("there");
    fds.filter_map(|fd| fs::read_link(fd.ok()?.path()).ok()).filter(|path| path.starts_with(folder)).count()
}

/// Ends the session. The reply is empty.
fn destroy(driver: &mut Driver) {
    driver.request(REQUESTS, &[&message(DESTROY, 0, b"")], &[512]);
}

#[test]
fn the_shared_directory_is_opened_once() {
    let folder = folders();
    let mut driver = mount(&folder.path().join("shared"), false);
    fs::rename(folder.path().join("shared"), folder.path().join("moved")).expect("moved");
    fs::create_dir(folder.path().join("shared")).expect("made");
    fs::write(folder.path().join("shared/other"), "another directory").expect("written");
    for round in ["the same session", "DESTROY", "INIT", "a reset"] {
        match round {
            "DESTROY" => destroy(&mut driver),
            "INIT" => init(&mut driver),
            "a reset" => {
                driver.start(u64::MAX);
                init(&mut driver);
            }
            _ => {}
        }
        assert_eq!(request(&mut driver, LOOKUP, 1, b"file\0"), 0, "{round}");
        assert_eq!(request(&mut driver, LOOKUP, 1, b"other\0"), libc::ENOENT, "{round}");
    }
}

/// fuse-backend-rs remembers each inode for ever that it numbers itself. It does not number those that have the host's number.
#[test]
fn a_node_has_the_inode_number_of_the_host() {
    let (folder, mut driver) = share(false);
    let on_host = fs::metadata(folder.path().join("shared/file")).expect("there").ino();
    assert_eq!(lookup(&mut driver, 1, "file") & ((1 << 47) - 1), on_host);
}

#[test]
fn a_new_session_closes_the_files_of_the_last_one() {
    let (folder, mut driver) = share(false);
    for round in 0..3 {
        let file = lookup(&mut driver, 1, "file");
        lookup(&mut driver, 1, "link");
        let (error, reply) = ask(&mut driver, OPEN, file, &words(&[0, 0]));
        assert_eq!(error, 0);
        assert_eq!(open_files(folder.path()), 4, "{round}: the directory, two inodes, one open file");
        match round {
            0 => destroy(&mut driver),
            1 => init(&mut driver),
            // A reset alone closes them, without a new driver.
            _ => driver.write(0x70, 0),
        }
        assert_eq!(open_files(folder.path()), 1, "{round}: {}", number(&reply, 0));
        if round == 2 {
            driver.start(u64::MAX);
        }
        assert_eq!(request(&mut driver, LOOKUP, file, &named(&[], &["x"])), libc::EBADF);
    }
}

/// A share of a directory with the files 0 to 11 and the directory `dir`, with few inodes and open files.
fn limited() -> (tempfile::TempDir, Driver) {
    let folder = tempfile::tempdir().expect("a folder");
    (0..12).for_each(|name| fs::write(folder.path().join(name.to_string()), "x").expect("written"));
    fs::create_dir(folder.path().join("dir")).expect("made");
    let limits = Limits { inodes: INODES, handles: HANDLES };
    let directory = super::super::root::open(folder.path()).expect("opened");
    let device = Fs::with_limits(options("tag", folder.path()), &directory, limits).expect("shared");
    let mut driver = Driver::running(Box::new(device));
    init(&mut driver);
    (folder, driver)
}

const INODES: usize = 8;
const HANDLES: usize = 3;

/// Lists the directory and returns the names, each with its node.
fn list(driver: &mut Driver, opcode: u32) -> Vec<(String, u64)> {
    let (error, reply) = ask(driver, OPENDIR, 1, &words(&[0, 0]));
    assert_eq!(error, 0);
    let handle = reply[..8].to_vec();
    let body = [handle.clone(), words(&[0, 0, 3800, 0, 0, 0, 0, 0])].concat();
    let (error, reply) = ask(driver, opcode, 1, &body);
    assert_eq!(error, 0);
    let release = [handle, words(&[0, 0, 0, 0])].concat();
    assert_eq!(request(driver, RELEASE, 1, &release), 0);
    // struct fuse_direntplus begins with a struct fuse_entry_out of 128 bytes; then ino, off, namelen, type, name.
    let entry = if opcode == READDIRPLUS { 128 } else { 0 };
    let mut names = Vec::new();
    let mut at = 0;
    while at < reply.len() {
        let node = if entry > 0 { number(&reply, at) } else { 0 };
        let start = at + entry + 24;
        let len = usize::try_from(number(&reply, at + entry + 16) & 0xffff_ffff).expect("short");
        names.push((String::from_utf8(reply[start..start + len].to_vec()).expect("a name"), node));
        at = (start + len).next_multiple_of(8);
    }
    names
}

#[test]
fn the_inodes_that_a_guest_knows_are_bounded() {
    let (folder, mut driver) = limited();
    let first = lookup(&mut driver, 1, "0");
    for name in 1..INODES {
        lookup(&mut driver, 1, &name.to_string());
    }
    assert_eq!(request(&mut driver, LOOKUP, 1, b"8\0"), libc::ENFILE);
    lookup(&mut driver, 1, "0");
    assert_eq!(open_files(folder.path()), 1 + INODES);
    // Nothing is made that could not be told to the guest.
    let create = named(&words(&[2, 0o600, 0, 0]), &["new"]);
    assert_eq!(request(&mut driver, CREATE, 1, &create), libc::ENFILE);
    assert_eq!(request(&mut driver, MKDIR, 1, &named(&words(&[0o700, 0]), &["new"])), libc::ENFILE);
    assert!(!folder.path().join("new").exists());
    // Both lists are complete; no new node is in one.
    assert_eq!(list(&mut driver, READDIR).len(), 13);
    let names = list(&mut driver, READDIRPLUS);
    assert_eq!((names.len(), names.iter().filter(|(_, node)| *node != 0).count()), (13, INODES));
    assert_eq!(open_files(folder.path()), 1 + INODES);
    // Three lookups of the file, the list included.
    for (count, expected) in [(2_u64, libc::ENFILE), (1, 0)] {
        driver.request(REQUESTS, &[&message(FORGET, first, &count.to_le_bytes())], &[16]);
        assert_eq!(request(&mut driver, LOOKUP, 1, b"8\0"), expected, "{count}");
    }
    assert_eq!(open_files(folder.path()), 1 + INODES);
}

#[test]
fn the_files_that_a_guest_has_open_are_bounded() {
    let (folder, mut driver) = limited();
    let file = lookup(&mut driver, 1, "0");
    let mut handles = Vec::new();
    for (node, opcode) in [(file, OPEN), (1, OPENDIR), (file, OPEN)] {
        let (error, reply) = ask(&mut driver, opcode, node, &words(&[0, 0]));
        assert_eq!(error, 0);
        handles.push(reply[..8].to_vec());
    }
    for (node, opcode) in [(file, OPEN), (1, OPENDIR)] {
        assert_eq!(request(&mut driver, opcode, node, &words(&[0, 0])), libc::ENFILE);
    }
    let create = named(&words(&[2, 0o600, 0, 0]), &["new"]);
    assert_eq!(request(&mut driver, CREATE, 1, &create), libc::ENFILE);
    assert!(!folder.path().join("new").exists());
    assert_eq!(open_files(folder.path()), 1 + 1 + HANDLES);
    let release = [handles[0].clone(), words(&[0, 0, 0, 0])].concat();
    assert_eq!(request(&mut driver, RELEASE, file, &release), 0);
    assert_ne!(request(&mut driver, RELEASE, file, &release), 0);
    assert_eq!(request(&mut driver, CREATE, 1, &create), 0);
    assert_eq!(request(&mut driver, OPEN, file, &words(&[0, 0])), libc::ENFILE);
}

/// A CREATE of a file that is there opens it. Where it cannot be opened, nothing is kept.
#[test]
fn create_of_a_file_that_is_there_keeps_no_more_than_it_tells() {
    let (folder, mut driver) = limited();
    let create = |flags: i32, name: &str| named(&words(&[flags.cast_unsigned(), 0o600, 0, 0]), &[name]);
    assert_eq!(request(&mut driver, CREATE, 1, &create(libc::O_RDWR, "dir")), libc::EISDIR);
    assert_eq!(request(&mut driver, CREATE, 1, &create(libc::O_RDWR | libc::O_EXCL, "0")), libc::EEXIST);
    assert_eq!(open_files(folder.path()), 1);
    let (error, reply) = ask(&mut driver, CREATE, 1, &create(libc::O_RDWR, "0"));
    assert_eq!((error, number(&reply, 0)), (0, lookup(&mut driver, 1, "0")));
    assert_eq!(open_files(folder.path()), 3);
    assert_eq!(fs::read_to_string(folder.path().join("0")).expect("read"), "x");
}

#[test]
fn the_umask_of_the_process_stays() {
    let umask = || {
        let status = fs::read_to_string("/proc/self/status").expect("there");
        status.lines().find(|line| line.starts_with("Umask")).map(str::to_owned)
    };
    let before = umask();
    let (_folder, mut driver) = share(false);
    destroy(&mut driver);
    assert_eq!(umask(), before);
    assert!(before.is_some());
}

/// What a list of a directory has told.
#[derive(Debug, Default, PartialEq, Eq)]
struct Listed {
    names: usize,
    /// Those of them that the guest knows as nodes now.
    nodes: usize,
}

/// Lists the directory `node` with READDIRPLUS, which looks each name up.
fn list_all(driver: &mut Driver, node: u64) -> Listed {
    /// Size in bytes of struct `fuse_entry_out`, and of struct `fuse_dirent` without its name.
    const ENTRY: usize = 128;
    const DIRENT: usize = 24;
    let (error, reply) = ask(driver, OPENDIR, node, &words(&[0, 0]));
    assert_eq!(error, 0);
    let (handle, mut offset, mut listed) = (number(&reply, 0), 0, Listed::default());
    loop {
        let mut body = handle.to_le_bytes().to_vec();
        body.extend(u64::to_le_bytes(offset));
        body.extend(words(&[60_000, 0, 0, 0, 0, 0]));
        let reply = driver.request(REQUESTS, &[&message(READDIRPLUS, node, &body)], &[61_000]);
        assert_eq!(reply[4..8], [0; 4], "no error");
        let mut rest = &reply[16..];
        if rest.is_empty() {
            return listed;
        }
        while !rest.is_empty() {
            listed.names += 1;
            listed.nodes += usize::from(number(rest, 0) != 0);
            offset = number(rest, ENTRY + 8);
            let name = u32::from_le_bytes(rest[ENTRY + 16..ENTRY + 20].try_into().expect("4 bytes"));
            rest = &rest[(ENTRY + DIRENT + name as usize).next_multiple_of(8).min(rest.len())..];
        }
    }
}

/// The real bounds, as far as the host's limit of open files reaches, in a process of its own: it has as many files open.
#[test]
fn a_share_holds_as_many_files_as_it_says() {
    const CHILD: &str = "HWVMM_SHARE_TEST_CHILD";
    if std::env::var_os(CHILD).is_none() {
        let name = "virtio::fs::tests::bounds::a_share_holds_as_many_files_as_it_says";
        let mut command = std::process::Command::new(std::env::current_exe().expect("this program"));
        let output = command.args(["--exact", name, "--nocapture"]).env(CHILD, "1").output().expect("started");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        return;
    }
    let limits = Limits::reserve();
    // In memory, where that is possible: a disk takes long to make so many files.
    let folder = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).expect("a folder");
    let many = folder.path().join("many");
    fs::create_dir(&many).expect("made");
    let files = limits.inodes + 100;
    (0..files).for_each(|number| drop(fs::File::create(many.join(number.to_string())).expect("made")));
    let directory = super::super::root::open(folder.path()).expect("opened");
    let device = Fs::with_limits(options("tag", folder.path()), &directory, limits).expect("shared");
    drop(directory);
    let mut driver = Driver::running(Box::new(device));
    init(&mut driver);
    let node = lookup(&mut driver, 1, "many");
    assert_eq!(list_all(&mut driver, node), Listed { names: files, nodes: limits.inodes - 1 });
    let open = open_files(folder.path());
    assert_eq!(open, 1 + limits.inodes + 1, "the directory, the nodes, and the list");
    driver.write(0x70, 0);
    assert_eq!(open_files(folder.path()), 1);

    driver.start(u64::MAX);
    init(&mut driver);
    let file = lookup(&mut driver, 1, "many");
    for number in 0..limits.handles {
        assert_eq!(request(&mut driver, OPEN, file, &words(&[0, 0])), 0, "file {number}");
    }
    assert_eq!(request(&mut driver, OPEN, file, &words(&[0, 0])), libc::ENFILE);
    assert_eq!(request(&mut driver, OPENDIR, file, &words(&[0, 0])), libc::ENFILE);
    assert_eq!(open_files(folder.path()), 2 + limits.handles);
    driver.write(0x70, 0);
    assert_eq!(open_files(folder.path()), 1);
}
