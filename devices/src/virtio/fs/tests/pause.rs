//! Shared directories over a pause, and in a device that goes on from the state of another one.

use super::hostile::{lookup, named, number};
use super::{LOOKUP, REQUESTS, ask, folders, message, mount, options, request, share, words};
use crate::virtio::fs::{Fs, FsOptions};
use crate::virtio::mock::{Driver, NEEDS_RESET};
use crate::virtio::saved::{
    DeviceFault, DeviceState, NodePlace, PauseError, SaveFault, ShareNode, ShareState, StateFault, VirtioState,
};
use proptest::prelude::*;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};
use tempfile::TempDir;

const FORGET: u32 = 2;
const GETATTR: u32 = 3;
const OPEN: u32 = 14;
const READ: u32 = 15;
const RELEASE: u32 = 18;
const GETXATTR: u32 = 22;
const OPENDIR: u32 = 27;
const READDIR: u32 = 28;

/// The shared directory, read-only.
fn device(folder: &TempDir) -> Box<Fs> {
    let options = FsOptions { read_only: true, ..options("tag", &folder.path().join("shared")) };
    Box::new(Fs::new(options).expect("shared"))
}

fn tree() -> (TempDir, Driver) {
    let folder = folders();
    let shared = folder.path().join("shared");
    fs::create_dir_all(shared.join("a/b")).expect("made");
    fs::write(shared.join("a/b/c"), "content").expect("written");
    let driver = mount(&shared, true);
    (folder, driver)
}

/// A new device in the place of the old one, which is gone.
fn restore(folder: &TempDir, driver: &mut Driver) {
    driver.replace(device(folder)).expect("restored");
    assert!(driver.device().resume());
}

fn open(driver: &mut Driver, opcode: u32, node: u64) -> u64 {
    let (error, reply) = ask(driver, opcode, node, &words(&[0, 0]));
    assert_eq!(error, 0);
    number(&reply, 0)
}

/// Reads, or lists a directory.
fn read(driver: &mut Driver, opcode: u32, node: u64, handle: u64) -> (i32, Vec<u8>) {
    let mut body = handle.to_le_bytes().to_vec();
    body.extend(words(&[0, 0, 2048, 0, 0, 0, 0, 0]));
    ask(driver, opcode, node, &body)
}

/// FORGET has no reply.
fn forget(driver: &mut Driver, node: u64, count: u64) {
    driver.request(REQUESTS, &[&message(FORGET, node, &count.to_le_bytes())], &[16]);
}

fn getattr(driver: &mut Driver, node: u64) -> i32 {
    request(driver, GETATTR, node, &[0; 16])
}

/// The state of the share, whose device is paused.
fn state_of(driver: &Driver) -> (VirtioState, ShareState) {
    driver.device().pause(Instant::now() + Duration::from_secs(20)).expect("paused");
    let state = driver.device().save().expect("a state");
    let DeviceState::Share(share) = state.device.clone() else { panic!("the share's") };
    (state, share)
}

#[test]
fn what_the_guest_knows_and_has_open_goes_on() {
    let (folder, mut driver) = tree();
    let a = lookup(&mut driver, 1, "a");
    let b = lookup(&mut driver, a, "b");
    let c = lookup(&mut driver, b, "c");
    assert_eq!(lookup(&mut driver, b, "c"), c);
    let link = lookup(&mut driver, 1, "link");
    let (file, list) = (open(&mut driver, OPEN, c), open(&mut driver, OPENDIR, b));
    let closed = open(&mut driver, OPEN, c);
    assert_eq!(request(&mut driver, RELEASE, c, &[&closed.to_le_bytes()[..], &[0; 16]].concat()), 0);
    let listed = read(&mut driver, READDIR, b, list);
    let attribute = |driver: &mut Driver| ask(driver, GETXATTR, c, &named(&words(&[16, 0]), &["user.none"])).0;
    let before = attribute(&mut driver);
    assert_ne!(before, libc::ENOSYS);
    for round in 0..4 {
        match round {
            // The same device, and another one.
            0 => {
                driver.device().pause(Instant::now() + Duration::from_secs(20)).expect("paused");
                assert!(driver.device().resume());
            }
            _ => restore(&folder, &mut driver),
        }
        assert_eq!(read(&mut driver, READ, c, file), (0, b"content".to_vec()), "{round}");
        assert_eq!(read(&mut driver, READDIR, b, list), listed);
        assert_eq!(read(&mut driver, READ, c, closed).0, libc::EBADF);
        for node in [1, a, b, c, link] {
            assert_eq!(getattr(&mut driver, node), 0, "{round}: {node}");
        }
        assert_eq!(attribute(&mut driver), before, "no new INIT is needed");
        assert_eq!((lookup(&mut driver, 1, "a"), lookup(&mut driver, b, "c")), (a, c), "the same numbers");
    }
    // Each lookup counts: two of the file at first, and one in each round.
    let another = open(&mut driver, OPEN, c);
    assert!(another > file.max(list), "a new number");
    forget(&mut driver, c, 5);
    assert_eq!(getattr(&mut driver, c), 0);
    forget(&mut driver, c, 1);
    assert_eq!(getattr(&mut driver, c), libc::EBADF);
    assert_eq!(request(&mut driver, RELEASE, c, &[&file.to_le_bytes()[..], &[0; 16]].concat()), 0);
    assert_eq!(lookup(&mut driver, b, "c"), c);
    // A reset forgets all.
    driver.start(u64::MAX);
    super::init(&mut driver);
    assert_eq!(getattr(&mut driver, a), libc::EBADF);
    assert_eq!(read(&mut driver, READDIR, b, list).0, libc::EBADF);
    assert_eq!(lookup(&mut driver, 1, "a"), a);
}

/// The host has replaced and removed files that the guest knew, as a package manager does.
#[test]
fn files_that_are_others_now_are_stale_until_they_are_looked_up() {
    let (folder, mut driver) = tree();
    let shared = folder.path().join("shared");
    fs::write(shared.join("same"), "old").expect("written");
    let names = ["file", "link", "same", "a"];
    let [file, link, same, a] = names.map(|name| lookup(&mut driver, 1, name));
    let b = lookup(&mut driver, a, "b");
    let c = lookup(&mut driver, b, "c");
    driver.device().pause(Instant::now() + Duration::from_secs(20)).expect("paused");
    // So that no number is used again on the host.
    fs::hard_link(shared.join("file"), folder.path().join("kept")).expect("linked");
    fs::remove_file(shared.join("file")).expect("removed");
    fs::write(shared.join("file"), "new").expect("written");
    fs::rename(shared.join("link"), folder.path().join("link")).expect("moved");
    fs::write(shared.join("same"), "new content").expect("written");
    fs::rename(shared.join("a"), shared.join("d")).expect("moved");
    restore(&folder, &mut driver);
    for node in [file, link, a, b, c] {
        assert_eq!(getattr(&mut driver, node), libc::ESTALE);
        assert_eq!(request(&mut driver, OPEN, node, &words(&[0, 0])), libc::ESTALE);
        assert_eq!(request(&mut driver, LOOKUP, node, b"b\0"), libc::ESTALE);
    }
    // As another machine sees a file that was written: at its next look.
    assert_eq!(getattr(&mut driver, same), 0);
    let handle = open(&mut driver, OPEN, same);
    assert_eq!(read(&mut driver, READ, same, handle), (0, b"new content".to_vec()));
    // What is there now has a number of its own.
    let new = lookup(&mut driver, 1, "file");
    assert_ne!(new, file);
    let handle = open(&mut driver, OPEN, new);
    assert_eq!(read(&mut driver, READ, new, handle), (0, b"new".to_vec()));
    assert_eq!(request(&mut driver, LOOKUP, 1, b"a\0"), libc::ENOENT);
    let d = lookup(&mut driver, 1, "d");
    assert!(getattr(&mut driver, d) == 0 && getattr(&mut driver, a) == libc::ESTALE);
    // They are stale in the next run as well, until they are forgotten.
    restore(&folder, &mut driver);
    assert_eq!(
        (getattr(&mut driver, file), getattr(&mut driver, c), getattr(&mut driver, d)),
        (libc::ESTALE, libc::ESTALE, 0)
    );
    forget(&mut driver, file, 1);
    assert_eq!(getattr(&mut driver, file), libc::EBADF);
}

/// A program may have mapped what is open: it gets the same content, or does not run on.
#[test]
fn open_files_are_as_they_were_or_refused_by_name() {
    for case in ["written", "replaced", "removed", "as it was"] {
        let (folder, mut driver) = tree();
        let path = folder.path().join("shared/a/b/c");
        let a = lookup(&mut driver, 1, "a");
        let b = lookup(&mut driver, a, "b");
        let c = lookup(&mut driver, b, "c");
        let handle = open(&mut driver, OPEN, c);
        let (state, _) = state_of(&driver);
        match case {
            "written" => fs::write(&path, "another content").expect("written"),
            "replaced" => {
                fs::rename(&path, folder.path().join("old")).expect("moved");
                assert!(
                    Command::new("cp")
                        .arg("-p")
                        .args([&folder.path().join("old"), &path])
                        .status()
                        .expect("run")
                        .success()
                );
            }
            "removed" => fs::remove_file(&path).expect("removed"),
            _ => fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o400)).expect("set"),
        }
        match driver.try_replace_with(device(&folder), &state) {
            Ok(()) => {
                assert_eq!(case, "as it was");
                assert!(driver.device().resume());
                assert_eq!(read(&mut driver, READ, c, handle), (0, b"content".to_vec()));
            }
            Err(error) => {
                assert_ne!(case, "as it was");
                let error = crate::error::chain(&*error);
                assert!(error.contains("the file a/b/c open"), "{case}: {error}");
            }
        }
    }
}

/// No run could open it again: there is no snapshot, and the guest goes on.
#[test]
fn an_open_file_without_a_name_makes_no_snapshot() {
    let (folder, mut driver) = tree();
    let file = lookup(&mut driver, 1, "file");
    let handle = open(&mut driver, OPEN, file);
    fs::remove_file(folder.path().join("shared/file")).expect("removed");
    driver.device().pause(Instant::now() + Duration::from_secs(20)).expect("paused");
    let error = driver.device().save().expect_err("refused");
    let PauseError::State { source: SaveFault::OpenFile { path }, .. } = &error else { panic!("{error:?}") };
    assert_eq!(path, "file");
    assert!(driver.device().resume());
    assert_eq!(read(&mut driver, READ, file, handle), (0, b"inside".to_vec()));
    assert_eq!(request(&mut driver, RELEASE, file, &[&handle.to_le_bytes()[..], &[0; 16]].concat()), 0);
    restore(&folder, &mut driver);
    assert_eq!(getattr(&mut driver, file), libc::ESTALE);
}

/// A directory of which the guest has forgotten that it is there, and knows what is in it.
#[test]
fn a_file_in_a_forgotten_directory_is_stale() {
    let (folder, mut driver) = tree();
    let a = lookup(&mut driver, 1, "a");
    let b = lookup(&mut driver, a, "b");
    forget(&mut driver, a, 1);
    let (_, share) = state_of(&driver);
    assert_eq!(share.nodes.iter().map(|node| (node.number, node.place.clone())).collect::<Vec<_>>(), [(b, None)]);
    restore(&folder, &mut driver);
    assert_eq!(getattr(&mut driver, b), libc::ESTALE);
    let a = lookup(&mut driver, 1, "a");
    let again = lookup(&mut driver, a, "b");
    assert!(again != b && getattr(&mut driver, again) == 0);
}

struct Mounted<'a>(&'a Path);

impl Drop for Mounted<'_> {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.0).output();
    }
}

fn mount_tmpfs(path: &Path) -> Option<Mounted<'_>> {
    fs::create_dir(path).expect("made");
    let out = Command::new("mount").args(["-t", "tmpfs", "-o", "size=64k", "small"]).arg(path).output();
    out.is_ok_and(|out| out.status.success()).then_some(Mounted(path))
}

/// fuse-backend-rs numbers file systems in the order in which it sees them. The guest keeps the numbers that it knows.
#[test]
fn file_systems_that_are_seen_in_another_order_have_the_numbers_that_they_had() {
    let folder = folders();
    let paths = ["one", "two"].map(|name| folder.path().join("shared").join(name));
    let (Some(_one), Some(_two)) = (mount_tmpfs(&paths[0]), mount_tmpfs(&paths[1])) else {
        println!("skipped: no file system can be mounted here");
        return;
    };
    for path in &paths {
        fs::write(path.join("x"), path.as_os_str().as_encoded_bytes()).expect("written");
    }
    let mut driver = mount(&folder.path().join("shared"), true);
    let one = lookup(&mut driver, 1, "one");
    let two = lookup(&mut driver, 1, "two");
    let (one_x, two_x) = (lookup(&mut driver, one, "x"), lookup(&mut driver, two, "x"));
    assert_eq!(one_x & ((1 << 47) - 1), two_x & ((1 << 47) - 1), "the same number on both file systems");
    let handle = open(&mut driver, OPEN, two_x);
    // In the next run, the second file system is the first that is seen.
    forget(&mut driver, one_x, 1);
    forget(&mut driver, one, 1);
    restore(&folder, &mut driver);
    let content = |path: &Path| (0, path.as_os_str().as_encoded_bytes().to_vec());
    assert_eq!(read(&mut driver, READ, two_x, handle), content(&paths[1]));
    assert_eq!((lookup(&mut driver, 1, "two"), lookup(&mut driver, two, "x")), (two, two_x));
    // And the first one has its numbers at fuse-backend-rs, which the guest knows as others.
    let one = lookup(&mut driver, 1, "one");
    let x = lookup(&mut driver, one, "x");
    assert_eq!([one, x].iter().filter(|node| [two, two_x].contains(node)).count(), 0);
    let handle = open(&mut driver, OPEN, x);
    assert_eq!(read(&mut driver, READ, x, handle), content(&paths[0]));
    restore(&folder, &mut driver);
    assert_eq!(read(&mut driver, READ, x, handle), content(&paths[0]));
    assert_eq!((lookup(&mut driver, 1, "one"), lookup(&mut driver, one, "x")), (one, x));
    forget(&mut driver, x, 2);
    assert_eq!(getattr(&mut driver, x), libc::EBADF);
    assert_eq!(getattr(&mut driver, two_x), 0);
}

#[test]
fn a_directory_that_the_guest_can_write_has_no_state() {
    let (_folder, mut driver) = share(false);
    let file = lookup(&mut driver, 1, "file");
    driver.device().pause(Instant::now() + Duration::from_secs(20)).expect("paused");
    assert!(matches!(driver.device().save(), Err(PauseError::Unsaved { .. })));
    assert!(driver.device().resume());
    assert_eq!(getattr(&mut driver, file), 0);
}

#[test]
fn another_directory_is_refused() {
    let (_folder, mut driver) = tree();
    let other = folders();
    let error = driver.replace(device(&other)).expect_err("refused");
    assert!(matches!(error.source, StateFault::Device(DeviceFault::OtherShare)), "{error}");
}

#[test]
fn states_that_no_guest_can_have_are_refused() {
    let (folder, mut driver) = tree();
    let a = lookup(&mut driver, 1, "a");
    let file = lookup(&mut driver, 1, "file");
    let link = lookup(&mut driver, 1, "link");
    open(&mut driver, OPEN, file);
    let (state, good) = state_of(&driver);
    let at = |number| good.nodes.iter().position(|node| node.number == number).expect("known");
    let (a, file, link) = (at(a), at(file), at(link));
    let mut refused = |what: &str, change: &dyn Fn(&mut ShareState)| {
        let (mut state, mut share) = (state.clone(), good.clone());
        change(&mut share);
        state.device = DeviceState::Share(share);
        let error = driver.replace_with(device(&folder), &state).expect_err(what);
        assert!(matches!(error.source, StateFault::Device(DeviceFault::NoShare)), "{what}: {error}");
    };
    let names = [&b""[..], b".", b"..", b"a/b", b"/etc/passwd", b"file\0", b"../secret", &[b'x'; 256]];
    for name in names {
        refused("a name", &|share| share.nodes[a].place.as_mut().expect("there").name = name.to_vec());
    }
    refused("a parent that is not there", &|share| share.nodes[a].place.as_mut().expect("there").parent = 99);
    refused("a file in a file", &|share| {
        share.nodes[2].place.as_mut().expect("there").parent = share.nodes[file.min(link)].number;
    });
    refused("a directory in itself", &|share| {
        share.nodes[a].place.as_mut().expect("there").parent = share.nodes[a].number;
    });
    refused("a circle", &|share| {
        let (first, last) = (share.nodes[0].number, share.nodes[2].number);
        (share.nodes[0].file.kind, share.nodes[2].file.kind) = (libc::S_IFDIR, libc::S_IFDIR);
        share.nodes[0].place.as_mut().expect("there").parent = last;
        share.nodes[2].place.as_mut().expect("there").parent = first;
    });
    for number in [0, 1, 1 << 62, u64::MAX] {
        refused("a number", &|share| share.nodes[link].number = number);
        if number != 1 {
            refused("a number of an open file", &|share| share.handles[0].number = number);
        }
    }
    refused("a number twice", &|share| share.nodes[a].number = share.nodes[file].number);
    refused("no lookups", &|share| share.nodes[a].lookups = 0);
    refused("an open file twice", &|share| share.handles.push(share.handles[0]));
    refused("an open link", &|share| share.handles[0].node = share.nodes[link].number);
    refused("an open file that is not there", &|share| share.handles[0].node = 77);
    for flags in [libc::O_RDWR, libc::O_WRONLY, libc::O_TRUNC, libc::O_CREAT, libc::O_TMPFILE] {
        refused("flags", &|share| share.handles[0].flags = flags.cast_unsigned());
    }
    driver.replace_with(device(&folder), &state).expect("the good one");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Whatever names and numbers a state has: what is found is in the directory, and is what the state says that it is.
    #[test]
    fn no_state_leads_out_of_the_directory(
        nodes in prop::collection::vec((1_u64..6, 0_u64..5, prop_oneof![
            Just("a"), Just("b"), Just("c"), Just("file"), Just("link"), Just(".."), Just("secret"), Just("../secret")
        ], any::<bool>()), 0..6),
        handles in prop::collection::vec((1_u64..4, 1_u64..6, prop_oneof![Just(0_u32), any::<u32>()]), 0..3),
    ) {
        use std::os::unix::fs::MetadataExt as _;
        let (folder, mut driver) = tree();
        lookup(&mut driver, 1, "a");
        let (mut state, mut share) = state_of(&driver);
        let id = |path: &Path| {
            let file = fs::symlink_metadata(path).expect("there");
            let kind = file.mode() & libc::S_IFMT;
            crate::virtio::saved::FileId { device: file.dev(), inode: file.ino(), kind, link_made_ns: 0 }
        };
        let paths = ["shared/a", "shared/a/b", "shared/a/b/c", "shared/file", "secret"].map(|name| id(&folder.path().join(name)));
        share.nodes = nodes.iter().map(|(number, parent, name, right)| {
            let at = ["a", "b", "c", "file"].iter().position(|known| known == name).unwrap_or(4);
            let file = if *right { paths[at] } else { paths[4] };
            let place = (*parent > 0).then(|| NodePlace { parent: *parent, name: name.as_bytes().to_vec() });
            ShareNode { number: number + 1, lookups: 1, file, place }
        }).collect();
        share.handles = handles.iter().map(|(number, node, flags)| {
            let content = crate::virtio::saved::FileContent::default();
            crate::virtio::saved::ShareHandle { number: *number, node: *node, flags: *flags, content }
        }).collect();
        state.device = DeviceState::Share(share);
        if driver.try_replace_with(device(&folder), &state).is_ok() {
            driver.device().resume();
            for (number, ..) in &nodes {
                for (opcode, body) in [(GETATTR, vec![0; 16]), (OPEN, words(&[0, 0])), (LOOKUP, b"c\0".to_vec())] {
                    let (error, reply) = ask(&mut driver, opcode, number + 1, &body);
                    if (opcode, error) == (GETATTR, 0) {
                        prop_assert_ne!(number_of(&reply), paths[4].inode, "not what is outside");
                    }
                }
            }
            for (handle, node, _) in &handles {
                prop_assert_ne!(read(&mut driver, READ, *node, *handle).1, b"outside".to_vec());
            }
            prop_assert_eq!(driver.status() & NEEDS_RESET, 0);
            let (_, again) = state_of(&driver);
            prop_assert!(again.nodes.len() <= nodes.len() + 3);
        }
    }
}

/// The inode number of a reply to GETATTR (struct `fuse_attr_out`: 16 bytes of times first).
fn number_of(reply: &[u8]) -> u64 {
    number(reply, 16)
}
