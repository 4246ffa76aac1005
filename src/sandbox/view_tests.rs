//! What is left of the host's names, for root and for a user without rights; hosts that refuse a part of it
//! (`tests/command/confined.rs` has whole runs).

use super::fork::fork_in_test;
use super::share_mount::{MountError, ShareMount};
use super::sys::{Listener, install};
use super::test_mounts::{no_place_for_users, own_mounts, own_proc, skipped};
use super::test_process::{FOLDER, run, sandbox};
use super::view::View;
use super::{Access, Mode, OwnView, Reach};
use rustix::fs::{
    AtFlags, CWD, Mode as Bits, OFlags, StatVfsMountFlags, Timespec, Timestamps, chmodat, chownat, fstatvfs, openat,
    statat, utimensat,
};
use rustix::io::Errno;
use rustix::mount::{MountFlags, MountPropagationFlags, mount_bind, mount_bind_recursive, mount_change, mount_remount};
use rustix::process::{DumpableBehavior, Gid, Uid, chdir, chroot, getegid, geteuid, set_dumpable_behavior};
use rustix::thread::{CapabilitySet, capabilities, set_thread_groups, set_thread_res_gid, set_thread_res_uid};
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, TargetArch};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

const NEEDS_ROOT: &str = "it needs root";

fn set_mode(path: &Path, mode: u32) {
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).expect("changed");
}

/// Runs `work` in a copy of this process with one thread, and passes its failure on.
fn alone(work: impl FnOnce()) {
    let mut child = fork_in_test(|| {
        work();
        0
    });
    let status = child.as_mut().expect("a child").wait().expect("ended");
    assert_eq!(status.exit_status(), Some(0), "{status:?}");
}

/// Makes the calling process that of a user without rights.
fn become_nobody() {
    const NOBODY: u32 = 65534;
    set_thread_groups(&[]).expect("root may");
    set_thread_res_gid(Gid::from_raw(NOBODY), Gid::from_raw(NOBODY), Gid::from_raw(NOBODY)).expect("root may");
    set_thread_res_uid(Uid::from_raw(NOBODY), Uid::from_raw(NOBODY), Uid::from_raw(NOBODY)).expect("root may");
    assert!(capabilities(None).expect("readable").permitted.is_empty());
    // /proc/self belongs to root otherwise.
    set_dumpable_behavior(DumpableBehavior::Dumpable).expect("set");
}

/// A host on which a user may make a user namespace, but not map a user to it. (On Ubuntu 24.04 with
/// apparmor_restrict_unprivileged_userns it is AppArmor that refuses; here /proc cannot be written to.)
pub(super) fn unusable_user_namespace() {
    alone(|| {
        own_proc();
        mount_bind("/proc", "/proc").expect("root may");
        mount_remount("/proc", MountFlags::BIND | MountFlags::RDONLY, "").expect("root may");
        become_nobody();
        let now = || {
            let link = |name: &str| std::fs::read_link(format!("/proc/self/ns/{name}")).expect("readable");
            let map = std::fs::read_to_string("/proc/self/uid_map").expect("readable");
            (geteuid(), getegid(), map, link("user"), link("mnt"), capabilities(None).expect("readable").effective)
        };
        let before = now();
        let error = View::separate().err().expect("a user namespace is of no use");
        assert_eq!(now(), before, "{error}");
        assert_eq!(OwnView::try_out().expect_err("the same").to_string(), error.to_string());
    });
}

#[test]
fn a_user_namespace_that_cannot_be_used_is_not_entered() {
    match no_place_for_users() {
        Some(reason) => skipped("a user namespace that cannot be used", reason),
        None => passes_for_root("unusable"),
    }
}

/// On hosts that refuse what mounts of shares need.
pub(super) fn mounts_of_shares() {
    let folder = PathBuf::from(std::env::var(FOLDER).expect("a folder"));
    let below = folder.join("below");
    std::fs::create_dir(&below).expect("made");
    let flags = |mount: &ShareMount| fstatvfs(&mount.mount).expect("readable").f_flag;
    let wanted = StatVfsMountFlags::RDONLY | StatVfsMountFlags::NOSUID | StatVfsMountFlags::NODEV;
    let said = |mount: &ShareMount| mount.lacks.as_ref().map(ToString::to_string);
    let inode = |mount: &ShareMount, path: &str| statat(&mount.mount, path, AtFlags::empty()).expect("there").st_ino;
    let is_own = |mount: &ShareMount| inode(mount, ".") == inode(mount, "..");
    alone(|| {
        assert!(OwnView::try_out().expect("root may").shares.is_ok());
        let view = View::separate().expect("root may");
        let read = || view.mount_of(&folder, Access::Read).expect("a mount");
        let all = read();
        assert!(flags(&all).contains(wanted) && said(&all).is_none() && is_own(&all));
        refuse(libc::SYS_mount_setattr, Errno::NOSYS);
        let by_remount = read();
        assert!(flags(&by_remount).contains(wanted) && said(&by_remount).is_none() && is_own(&by_remount));
        let writable = view.mount_of(&folder, Access::ReadWrite).expect("a mount");
        assert_eq!(flags(&writable) & wanted, wanted & !StatVfsMountFlags::RDONLY);
        mount_bind("/etc", &below).expect("root may");
        let partly = read();
        assert!(flags(&partly).contains(wanted) && is_own(&partly));
        assert_eq!(said(&partly).as_deref(), Some("what is mounted below it lacks ro, nosuid and nodev"));
        assert!(statat(&partly.mount, "below/passwd", AtFlags::empty()).is_ok(), "what is mounted below is there");
        assert!(OwnView::try_out().expect("root may").shares.is_err());
        refuse(libc::SYS_mount, Errno::PERM);
        let bare = view.mount_of(&folder, Access::ReadWrite).expect("a mount");
        assert_eq!(said(&bare).as_deref(), Some("its mount lacks nosuid and nodev"));
        assert!(is_own(&bare), "it leads nowhere all the same");
        assert!(std::fs::metadata("/etc/passwd").is_ok(), "nothing is left over the root");
        assert!(matches!(view.mount_of(&folder.join("none"), Access::Read), Err(MountError::Folder(_))));
        refuse(libc::SYS_open_tree, Errno::ACCESS);
        assert!(matches!(view.mount_of(&folder, Access::Read), Err(MountError::Clone(_))));
    });
}

#[test]
fn a_share_is_a_mount_of_its_own_whatever_attributes_it_lacks() {
    passes_for_root("mounts");
}

/// What the hostile thread has.
struct Held {
    share: OwnedFd,
    readable: OwnedFd,
    open_files: OwnedFd,
    /// A file of the share.
    file: OwnedFd,
    outside: PathBuf,
}

/// Has the system call `number` fail in this process from here on.
fn refuse(number: i64, error: Errno) {
    let error = SeccompAction::Errno(error.raw_os_error().cast_unsigned());
    let rules = [(number, Vec::new())].into();
    let filter = SeccompFilter::new(rules, SeccompAction::Allow, error, TargetArch::x86_64).expect("a filter");
    let program: BpfProgram = filter.try_into().expect("a program");
    install(&program, Listener::None).expect("root may");
}

/// Enters a folder with a /proc and a file of the host, as chroot(1) does, where the host shares its mounts. Returns the list
/// of its mounts.
fn enter_chroot(folder: &Path) -> File {
    own_mounts();
    mount_change("/", MountPropagationFlags::SHARED | MountPropagationFlags::REC).expect("root may");
    for name in ["proc", "etc", "tmp"] {
        std::fs::create_dir(folder.join(name)).expect("made");
    }
    std::fs::write(folder.join("etc/passwd"), "text").expect("written");
    set_mode(folder, 0o755);
    mount_bind_recursive("/proc", folder.join("proc")).expect("root may");
    let mounts = File::open("/proc/self/mountinfo").expect("readable");
    chroot(folder).expect("root may");
    chdir("/").expect("there");
    mounts
}

/// Attacks from a process on a host that `host` describes: words for what it refuses, and for who runs it.
pub(super) fn case(host: &[&str]) {
    let folder = PathBuf::from(std::env::var(FOLDER).expect("a folder"));
    set_mode(&folder, 0o777);
    alone(|| {
        let (mut folder, mut mounts) = (folder, None);
        for word in host {
            match *word {
                "user" => become_nobody(),
                "no-pivot" => refuse(libc::SYS_pivot_root, Errno::INVAL),
                "no-setattr" => refuse(libc::SYS_mount_setattr, Errno::NOSYS),
                "chroot" => {
                    mounts = Some(enter_chroot(&folder));
                    folder = "/tmp".into();
                }
                other => panic!("no word {other}"),
            }
        }
        let read = |mut file: &File| {
            let mut text = String::new();
            file.seek(SeekFrom::Start(0)).and_then(|_| file.read_to_string(&mut text)).map(|_| text).expect("readable")
        };
        let before = mounts.as_ref().map(read);
        attacked(&folder.join("host"));
        assert_eq!(mounts.as_ref().map(read), before, "the host has the mounts that it had");
    });
}

fn attacked(folder: &Path) {
    let (shared, readable) = (folder.join("shared"), folder.join("readable"));
    for path in [folder, &shared, &readable] {
        std::fs::create_dir_all(path).expect("made");
        set_mode(path, 0o777);
    }
    let outside = folder.join("outside");
    for path in [&outside, &shared.join("file"), &readable.join("file")] {
        std::fs::write(path, "text").expect("written");
        set_mode(path, 0o666);
    }
    OwnView::try_out().expect("what a run gets");
    let me = (geteuid(), capabilities(None).expect("readable").permitted);
    let sandbox = sandbox(Mode::On).with_own_view();
    let reach = [
        Reach { path: shared, access: Access::ReadWrite },
        Reach { path: readable, access: Access::Read },
        Reach { path: folder.join("missing"), access: Access::Read },
    ];
    let mount = |reach| sandbox.mount_of(reach).expect("a mount");
    let [share, readable] = [mount(&reach[0]), mount(&reach[1])];
    assert!(sandbox.mount_of(&reach[2]).is_none());
    let path_only = OFlags::PATH | OFlags::CLOEXEC;
    let open_files = openat(CWD, "/proc/self/fd", path_only | OFlags::NOFOLLOW, Bits::empty()).expect("opened");
    let file = openat(&share, "file", path_only, Bits::empty()).expect("opened");
    sandbox.confine_process(&reach[..2]).expect("confined");
    assert_eq!((geteuid(), capabilities(None).expect("readable").permitted), me, "rights are as before");
    let held = Held { share, readable, open_files, file, outside };
    std::thread::spawn(move || attack(&held)).join().expect("no panic");
}

fn attack(held: &Held) {
    let missing = |result: Result<(), Errno>, what: &str| assert_eq!(result, Err(Errno::NOENT), "{what}");
    let epoch = Timespec { tv_sec: 0, tv_nsec: 0 };
    let times = Timestamps { last_access: epoch, last_modification: epoch };
    for folder in [CWD, held.share.as_fd(), held.open_files.as_fd()] {
        for path in
            [held.outside.clone(), "/etc/passwd".into(), "../outside".into(), "../../../../../../etc/passwd".into()]
        {
            let what = format!("{} from {folder:?}", path.display());
            missing(chmodat(folder, &path, Bits::RWXU, AtFlags::empty()), &what);
            missing(chownat(folder, &path, Some(geteuid()), None, AtFlags::empty()), &what);
            missing(utimensat(folder, &path, &times, AtFlags::empty()), &what);
            missing(statat(folder, &path, AtFlags::empty()).map(drop), &what);
        }
    }
    missing(statat(&held.open_files, "../status", AtFlags::empty()).map(drop), "/proc by ..");
    let connected = std::os::unix::net::UnixStream::connect(held.outside.with_file_name("socket"));
    assert_eq!(connected.expect_err("refused").kind(), std::io::ErrorKind::NotFound, "a socket of the host");
    assert_eq!(statat(CWD, "/proc", AtFlags::empty()).map(drop), Err(Errno::NOENT));
    let made = openat(CWD, "/new", OFlags::CREATE | OFlags::WRONLY, Bits::RWXU).map(drop);
    assert!(matches!(made, Err(Errno::ROFS | Errno::ACCESS)), "{made:?}");
    let root = |file: &OwnedFd, path| statat(file, path, AtFlags::empty()).map(|file| file.st_ino).expect("there");
    assert_eq!(root(&held.share, "."), root(&held.share, ".."), "the share has nothing above it");
    assert_eq!(root(&held.open_files, "."), root(&held.open_files, ".."));
    // What a share is for goes on: files are made, opened again by /proc/self/fd, and changed.
    let number = held.file.as_raw_fd().to_string();
    let mut text = String::new();
    File::from(openat(&held.open_files, &number, OFlags::RDWR, Bits::empty()).expect("opened again"))
        .read_to_string(&mut text)
        .expect("readable");
    assert_eq!(text, "text");
    chmodat(&held.open_files, &number, Bits::RUSR | Bits::WUSR, AtFlags::empty()).expect("its own file");
    utimensat(&held.open_files, &number, &times, AtFlags::empty()).expect("its own file");
    drop(openat(&held.share, "new", OFlags::CREATE | OFlags::WRONLY, Bits::RUSR).expect("made"));
    let new = statat(&held.share, "new", AtFlags::empty()).expect("there");
    assert_eq!(new.st_uid, geteuid().as_raw());
    let refused = openat(&held.readable, "file", OFlags::WRONLY, Bits::empty()).map(drop);
    assert!(matches!(refused, Err(Errno::ROFS | Errno::ACCESS)), "{refused:?}");
    assert_eq!(chmodat(&held.readable, "file", Bits::RWXU, AtFlags::empty()), Err(Errno::ROFS), "a read-only share");
}

fn is_root() -> bool {
    capabilities(None).expect("readable").effective.contains(CapabilitySet::SYS_ADMIN)
}

fn passes_for_root(case: &str) {
    if !is_root() {
        return skipped(case, NEEDS_ROOT);
    }
    let folder = tempfile::tempdir().expect("a folder");
    let output = run(case, folder.path());
    assert!(output.status.success(), "{case}: {output:?}");
}

/// Runs the attack on a host that `host` describes.
fn no_name_is_left(host: &str) {
    if !is_root() {
        return skipped(&format!("no name is left on the host{host}"), NEEDS_ROOT);
    }
    if let Some(reason) = no_place_for_users().filter(|_| host.contains("user")) {
        return skipped(&format!("no name is left on the host{host}"), reason);
    }
    let mounts = || std::fs::read_to_string("/proc/self/mountinfo").expect("readable");
    let before = mounts();
    let folder = tempfile::tempdir().expect("a folder");
    let output = run(&format!("view{host}"), folder.path());
    assert!(output.status.success(), "{host}: {output:?}");
    let place = folder.path().join(if host.contains("chroot") { "tmp/host" } else { "host" });
    let outside = std::fs::metadata(place.join("outside")).expect("there");
    assert_eq!((outside.mode() & 0o7777, outside.mtime() != 0), (0o666, true), "a file outside");
    let inside = std::fs::metadata(place.join("shared/file")).expect("there");
    assert_eq!((inside.mode() & 0o7777, inside.mtime()), (0o600, 0), "a file of the share");
    assert_eq!(mounts(), before, "the host has the mounts that it had");
}

#[test]
fn no_name_of_the_host_is_left_to_the_process() {
    no_name_is_left("");
    no_name_is_left(" user");
}

/// The root of an initramfs cannot be changed by pivot_root(2).
#[test]
fn no_name_is_left_in_an_initramfs() {
    no_name_is_left(" no-pivot");
    no_name_is_left(" no-pivot user");
}

#[test]
fn no_name_is_left_in_a_chroot() {
    no_name_is_left(" chroot");
}

#[test]
fn no_name_is_left_on_an_old_kernel() {
    no_name_is_left(" no-setattr");
    no_name_is_left(" no-setattr user");
}
