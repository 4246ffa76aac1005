//! Mounts that a test makes, in a mount namespace of its own: also in a chroot, whose root is no mount point.

use super::sys::unshare;
use rustix::fs::{AtFlags, CWD, StatxAttributes, StatxFlags, statx};
use rustix::mount::{MountPropagationFlags, MoveMountFlags, OpenTreeFlags, mount_change, move_mount, open_tree};
use rustix::process::{chroot, fchdir};
use rustix::thread::UnshareFlags;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;

/// Returns true if the root is that of a mount. In a chroot that is not so: user_namespaces(7) refuses to make a user namespace
/// there, and mount_namespaces(7) has no way to change how mounts of the root propagate.
fn root_is_a_mount() -> bool {
    let root = statx(CWD, "/", AtFlags::empty(), StatxFlags::empty()).expect("there");
    root.stx_attributes.contains(StatxAttributes::MOUNT_ROOT)
}

/// Gives the calling thread a mount namespace of its own, whose root is a mount. Nothing that is mounted in it reaches the host.
pub(crate) fn own_mounts() {
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    unshare(UnshareFlags::NEWNS).expect("root may");
    if root_is_a_mount() {
        return mount_change("/", private).expect("root may");
    }
    // A copy of all that is below the root becomes the root. It needs a place that is a mount: that of /proc.
    mount_change("/proc", private).expect("root may");
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_RECURSIVE;
    let tree = open_tree(CWD, "/", flags).expect("root may");
    move_mount(&tree, "", CWD, "/proc", MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH).expect("root may");
    fchdir(&tree).expect("there");
    chroot(".").expect("root may");
    mount_change("/", private).expect("root may");
}

/// Gives the calling thread a mount namespace of its own, and a /proc in it that nothing on the host depends on.
pub(crate) fn own_proc() {
    unshare(UnshareFlags::NEWNS).expect("root may");
    mount_change("/proc", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC).expect("root may");
}

/// Why a user without rights can do nothing here that a test could look at.
pub(crate) fn no_place_for_users() -> Option<&'static str> {
    let mode = std::fs::metadata("/").expect("there").permissions().mode();
    if mode & 0o001 == 0 {
        Some("users other than root cannot enter /")
    } else if !root_is_a_mount() {
        Some("this is a chroot, in which the kernel makes no user namespace")
    } else {
        None
    }
}

/// Prints that a test was not run. (`eprintln` would be kept back by the test harness.)
pub(crate) fn skipped(test: &str, reason: &str) {
    writeln!(std::io::stderr(), "skipped {test}: {reason}").expect("written");
}
