//! A shared folder as a mount of its own, which belongs to no namespace: `..` does not leave it.

use super::landlock::Access;
use super::sys;
use super::trial::ViewError;
use rustix::fs::{CWD, Mode, OFlags, StatVfsMountFlags, fstatvfs, openat};
use rustix::mount::{
    MountAttrFlags, MountFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags, mount_remount, move_mount, open_tree,
    unmount,
};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;
use thiserror::Error;

/// The longest list of mounts that is read, in bytes.
const MOUNTS_BYTES: u64 = 16 << 20;

/// A mount of a folder, with what is mounted below it. It lasts as long as this is open.
pub(super) struct ShareMount {
    /// The detached mount (open_tree(2)).
    pub(super) mount: OwnedFd,
    /// What it has not, where the kernel refuses that.
    pub(super) lacks: Option<Lack>,
}

/// Attributes that mounts lack.
#[derive(Debug, Error)]
#[error("{mounts} lacks {}", self.attributes())]
pub(super) struct Lack {
    mounts: Lacking,
    /// What was to be permitted.
    access: Access,
    /// The error of mount_setattr(2), or of what was tried instead.
    source: io::Error,
}

impl Lack {
    fn attributes(&self) -> &'static str {
        match self.access {
            Access::Read => "ro, nosuid and nodev",
            Access::ReadWrite | Access::ReadWriteDevices => "nosuid and nodev",
        }
    }
}

/// Which mounts lack attributes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
enum Lacking {
    /// The folder and what is mounted below it.
    #[error("its mount")]
    All,
    /// What is mounted below the folder.
    #[error("what is mounted below it")]
    Below,
}

/// A folder is no mount of its own.
#[derive(Debug, Error)]
pub(super) enum MountError {
    /// The folder cannot be opened, as a mount or otherwise.
    #[error("cannot open the folder")]
    Folder(#[source] io::Error),
    /// open_tree(2) refuses.
    #[error("open_tree(2) fails (Linux 5.2)")]
    Clone(#[source] io::Error),
}

impl From<MountError> for ViewError {
    fn from(error: MountError) -> Self {
        let what = format!("have a shared folder as a mount of its own: {error}").into();
        let (MountError::Folder(source) | MountError::Clone(source)) = error;
        Self::Step { what, source }
    }
}

impl From<Lack> for ViewError {
    fn from(lack: Lack) -> Self {
        Self::Step {
            what: format!("set the attributes of a shared folder's mount: {lack}").into(),
            source: lack.source,
        }
    }
}

const CLONE: OpenTreeFlags =
    OpenTreeFlags::OPEN_TREE_CLONE.union(OpenTreeFlags::OPEN_TREE_CLOEXEC).union(OpenTreeFlags::AT_RECURSIVE);

impl ShareMount {
    /// Makes a mount of the folder `path`. Nothing in it is a device or a program with rights of its own. The process has a mount namespace
    /// of its own.
    ///
    /// # Errors
    /// [`MountError`]. Attributes that cannot be set are no error, but [`ShareMount::lacks`].
    pub(super) fn of(path: &Path, access: Access) -> Result<Self, MountError> {
        let mount = open_tree(CWD, path, CLONE).map_err(|error| {
            // The same error without a mount: the folder itself cannot be opened.
            match openat(CWD, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()) {
                Err(same) if same == error => MountError::Folder(error.into()),
                _ => MountError::Clone(error.into()),
            }
        })?;
        let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV;
        let attributes = match access {
            Access::Read => attributes | MountAttrFlags::MOUNT_ATTR_RDONLY,
            Access::ReadWrite | Access::ReadWriteDevices => attributes,
        };
        match sys::set_mount_attributes(mount.as_fd(), attributes) {
            Ok(()) => Ok(Self { mount, lacks: None }),
            Err(error) => Self::remounted(mount, access, error),
        }
    }

    /// Sets the attributes as mount(2) does: of one mount, in the namespace of the process. `error` is that of mount_setattr(2), which is
    /// missing before Linux 5.12.
    fn remounted(mount: OwnedFd, access: Access, error: io::Error) -> Result<Self, MountError> {
        let lack = |mounts, source| Some(Lack { mounts, access, source });
        // Over the root: nothing that is opened by its name is found there instead, as names begin below it.
        if move_mount(mount.as_fd(), "", CWD, "/", MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH).is_err() {
            return Ok(Self { mount, lacks: lack(Lacking::All, error) });
        }
        let name = format!("/proc/self/fd/{}", mount.as_raw_fd());
        let lacks = match remount(&mount, &name, access) {
            Ok(()) if is_alone(&mount).unwrap_or(false) => None,
            Ok(()) => lack(Lacking::Below, error),
            Err(error) => lack(Lacking::All, error),
        };
        let copy = open_tree(mount.as_fd(), "", CLONE | OpenTreeFlags::AT_EMPTY_PATH);
        unmount(name, UnmountFlags::DETACH).map_err(|error| MountError::Clone(error.into()))?;
        Ok(Self { mount: copy.map_err(|error| MountError::Clone(error.into()))?, lacks })
    }
}

/// Sets the attributes of the mount `name`, and keeps those that it has: a user may not take them away.
fn remount(mount: &OwnedFd, name: &str, access: Access) -> io::Result<()> {
    let has = fstatvfs(mount)?.f_flag;
    let mut flags = MountFlags::BIND | MountFlags::NOSUID | MountFlags::NODEV;
    flags.set(MountFlags::NOEXEC, has.contains(StatVfsMountFlags::NOEXEC));
    flags.set(MountFlags::RDONLY, access == Access::Read || has.contains(StatVfsMountFlags::RDONLY));
    Ok(mount_remount(name, flags, "")?)
}

/// Returns true if nothing is mounted below `mount`.
fn is_alone(mount: &OwnedFd) -> io::Result<bool> {
    let read = |path: &str| {
        let mut text = String::new();
        File::open(path)?.take(MOUNTS_BYTES).read_to_string(&mut text)?;
        Ok::<_, io::Error>(text)
    };
    let info = read(&format!("/proc/self/fdinfo/{}", mount.as_raw_fd()))?;
    let number = info.lines().find_map(|line| line.strip_prefix("mnt_id:")).ok_or(io::ErrorKind::InvalidData)?.trim();
    // The second word of each line is the mount above (proc_pid_mountinfo(5)).
    Ok(read("/proc/self/mountinfo")?.lines().all(|line| line.split(' ').nth(1) != Some(number)))
}
