//! The process' view of the file system: a mount namespace of its own, in which no name of the host is left once the guest runs.
//!
//! Landlock does not look at chmod(2), chown(2) and utimensat(2), and older versions do not look at connect(2). Where there is nothing that
//! a path could name, none of them does anything. Shared folders are mounts of their own (mount_namespaces(7), open_tree(2)), which
//! belong to no namespace: `..` does not leave them.

use super::landlock::Access;
use super::share_mount::{MountError, ShareMount};
use super::sys;
use super::trial::{ViewError, failed, in_child};
use rustix::fs::{CWD, Mode, OFlags, openat};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, MoveMountFlags, UnmountFlags, fsconfig_create,
    fsconfig_set_string, fsmount, fsopen, mount_bind, mount_change, move_mount, unmount,
};
use rustix::process::{PidfdFlags, chdir, chroot, fchdir, getegid, geteuid, getpid, pidfd_open, pivot_root};
use rustix::thread::{
    CapabilitySet, CapabilitySets, ThreadNameSpaceType, UnshareFlags, capabilities, move_into_thread_name_spaces,
    set_capabilities,
};
use std::os::fd::AsFd;
use std::path::Path;

/// The folder that fuse-backend-rs keeps open, to open again what it has open already.
const OPEN_FILES: &str = "/proc/self/fd";

/// What gives a process a mount namespace of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ViewRight {
    /// The process has CAP_SYS_ADMIN.
    Own,
    /// A user namespace with one mapping: that of the process' user and group.
    UserNamespace,
}

impl std::fmt::Display for ViewRight {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Own => "CAP_SYS_ADMIN",
            Self::UserNamespace => "user namespace",
        })
    }
}

impl ViewRight {
    /// What the process has of these.
    ///
    /// # Errors
    /// [`ViewError`]; EPERM where it has some capabilities, which it would lose in a user namespace, but not CAP_SYS_ADMIN.
    pub(super) fn of_this_process() -> Result<Self, ViewError> {
        let now = capabilities(None).map_err(failed("read the capabilities"))?;
        if now.effective.contains(CapabilitySet::SYS_ADMIN) {
            Ok(Self::Own)
        } else if now.permitted.is_empty() {
            Ok(Self::UserNamespace)
        } else {
            Err(failed("make a mount namespace without CAP_SYS_ADMIN")(Errno::PERM))
        }
    }
}

/// A mount namespace of the process.
pub(super) struct View {
    right: ViewRight,
}

impl View {
    /// Gives the process a mount namespace of its own. Names are those of the host still. Without CAP_SYS_ADMIN it gets a user
    /// namespace too, in which it keeps the capabilities that [`View::empty`] needs until then, and no others: as before, it has no
    /// rights beyond those of its user. A process with other capabilities would lose them, so it is left as it is.
    ///
    /// A process cannot leave a user namespace, and some hosts let users make them, but do nothing with them (AppArmor on Ubuntu 24.04). So
    /// a child process tries all of it first; where that fails, nothing has happened to this one.
    ///
    /// # Errors
    /// [`ViewError`]; EINVAL where the process has threads.
    pub(super) fn separate() -> Result<Self, ViewError> {
        let right = ViewRight::of_this_process()?;
        match right {
            ViewRight::Own => Self::enter(right),
            ViewRight::UserNamespace => Self::enter(Self::try_out(|_| Ok(()))?),
        }
    }

    /// Tries in a child process to have a mount namespace, to do `more` in it, and to leave all names.
    ///
    /// # Errors
    /// [`ViewError`].
    pub(super) fn try_out(more: impl FnOnce(&Self) -> Result<(), ViewError>) -> Result<ViewRight, ViewError> {
        let right = ViewRight::of_this_process()?;
        in_child(|| {
            let view = Self::enter(right)?;
            more(&view)?;
            view.empty()
        })?;
        Ok(right)
    }

    fn enter(right: ViewRight) -> Result<Self, ViewError> {
        let view = Self { right };
        let entered = match right {
            ViewRight::Own => sys::unshare(UnshareFlags::NEWNS).map_err(failed("make a mount namespace")),
            ViewRight::UserNamespace => enter_user_namespace(),
        };
        match entered.and_then(|()| own_mounts()) {
            Ok(()) => Ok(view),
            Err(error) => {
                view.drop_right()?;
                Err(error)
            }
        }
    }

    /// Makes a mount of the folder `path`, with what is mounted below it, which is in no namespace.
    ///
    /// # Errors
    /// [`MountError`].
    #[allow(clippy::unused_self, reason = "there must be a mount namespace of the process' own")]
    pub(super) fn mount_of(&self, path: &Path, access: Access) -> Result<ShareMount, MountError> {
        ShareMount::of(path, access)
    }

    /// Leaves the process with an empty folder that cannot be written to, as its root. What is open stays open. Drops what the
    /// process has of rights by its user namespace.
    ///
    /// # Errors
    /// [`ViewError`].
    pub(super) fn empty(&self) -> Result<(), ViewError> {
        let emptied = leave_open_files().and_then(|()| change_root());
        self.drop_right()?;
        emptied
    }

    /// Drops what the process has of rights by its user namespace.
    fn drop_right(&self) -> Result<(), ViewError> {
        if self.right == ViewRight::Own {
            return Ok(());
        }
        let none = CapabilitySet::empty();
        let sets = CapabilitySets { effective: none, permitted: none, inheritable: none };
        set_capabilities(None, sets).map_err(failed("drop the capabilities of the user namespace"))
    }
}

fn own_mounts() -> Result<(), ViewError> {
    // Nothing that is mounted here is mounted for the host; what the host mounts below a shared folder appears there.
    match keep_mounts() {
        // "/" is no mount in a chroot.
        Err(Errno::INVAL) => {
            // What fails half way would leave the process outside of it.
            in_child(keep_mounts_around_chroot)?;
            keep_mounts_around_chroot()?;
        }
        kept => kept.map_err(failed("keep mounts from the host's namespace"))?,
    }
    // A path that is opened from here on leads to this mount, which View::empty takes out of the namespace.
    mount_bind(OPEN_FILES, OPEN_FILES).map_err(failed("mount /proc/self/fd"))
}

fn keep_mounts() -> Result<(), Errno> {
    mount_change("/", MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC)
}

/// As [`keep_mounts`], for a process in a chroot: setns(2) leads out of it, to the root of the mount namespace.
fn keep_mounts_around_chroot() -> Result<(), ViewError> {
    let open = |path| openat(CWD, path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty());
    let (root, folder) = open("/").and_then(|root| Ok((root, open(".")?))).map_err(failed("open the root"))?;
    let process = pidfd_open(getpid(), PidfdFlags::empty()).map_err(failed("open the process"))?;
    move_into_thread_name_spaces(process.as_fd(), ThreadNameSpaceType::MOUNT)
        .map_err(failed("enter the root of the mount namespace (setns, Linux 5.8)"))?;
    let kept = keep_mounts();
    fchdir(&root).and_then(|()| chroot(".")).and_then(|()| fchdir(&folder)).map_err(failed("go back to the root"))?;
    kept.map_err(failed("keep mounts from the host's namespace"))
}

fn enter_user_namespace() -> Result<(), ViewError> {
    let (user, group) = (geteuid().as_raw(), getegid().as_raw());
    sys::unshare(UnshareFlags::NEWUSER | UnshareFlags::NEWNS).map_err(failed("make a user namespace"))?;
    for (file, text) in [
        ("/proc/self/setgroups", "deny".to_owned()),
        ("/proc/self/uid_map", format!("{user} {user} 1")),
        ("/proc/self/gid_map", format!("{group} {group} 1")),
    ] {
        std::fs::write(file, text).map_err(failed("map the user to the user namespace"))?;
    }
    let needed = CapabilitySet::SYS_ADMIN | CapabilitySet::SYS_CHROOT;
    let sets = CapabilitySets { effective: needed, permitted: needed, inheritable: CapabilitySet::empty() };
    set_capabilities(None, sets).map_err(failed("drop capabilities of the user namespace"))
}

/// Has `..` of /proc/self/fd, where it is open, lead nowhere. The namespace itself can outlive this: passt may be in it still, and
/// fuse-backend-rs has its list of mounts open.
fn leave_open_files() -> Result<(), ViewError> {
    unmount(OPEN_FILES, UnmountFlags::DETACH).map_err(failed("unmount /proc/self/fd"))
}

fn change_root() -> Result<(), ViewError> {
    let file_system = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC).map_err(failed("make a tmpfs"))?;
    fsconfig_set_string(file_system.as_fd(), "nr_inodes", "1").map_err(failed("limit a tmpfs"))?;
    fsconfig_set_string(file_system.as_fd(), "mode", "0555").map_err(failed("limit a tmpfs"))?;
    fsconfig_create(file_system.as_fd()).map_err(failed("make a tmpfs"))?;
    let attributes = MountAttrFlags::MOUNT_ATTR_RDONLY
        | MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    let root =
        fsmount(file_system.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, attributes).map_err(failed("mount a tmpfs"))?;
    // pivot_root(2) changes the root of every process in the namespace: passt must keep its own.
    sys::unshare(UnshareFlags::NEWNS).map_err(failed("make a mount namespace"))?;
    move_mount(root.as_fd(), "", CWD, "/", MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH).map_err(failed("mount a tmpfs"))?;
    fchdir(&root).map_err(failed("enter a tmpfs"))?;
    match pivot_root(".", ".") {
        // The old root is mounted over the new one (pivot_root(2), "pivot_root(".", ".")").
        Ok(()) => unmount(".", UnmountFlags::DETACH).map_err(failed("unmount the old root"))?,
        // An initramfs cannot be unmounted, and the root in a chroot is no mount. It stays below the new root, where no name leads: the
        // process has no folder of it open, and loses the capability to change its root again.
        Err(Errno::INVAL) => chroot(".").map_err(failed("change the root"))?,
        Err(error) => return Err(failed("change the root")(error)),
    }
    chdir("/").map_err(failed("enter the new root"))
}
