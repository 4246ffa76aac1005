//! What the guest may ask of the host's file system: rules for names, flags and modes.

use rustix::io::Errno;
use std::ffi::CStr;
use std::io;

/// The longest name of a directory entry in bytes (Linux: `NAME_MAX`).
const MAX_NAME: usize = 255;
/// The bits with which a program runs as the owner or the group of its file.
const SET_ID_BITS: u32 = libc::S_ISUID | libc::S_ISGID;
/// `O_TMPFILE` without the `O_DIRECTORY` in it.
const TMPFILE: i32 = libc::O_TMPFILE & !libc::O_DIRECTORY;
/// The flags of open(2) that reach the host. Not among them: `O_CREAT` and `O_TMPFILE`, as there is CREATE for new files;
/// `O_PATH`, with which an open of a name would follow a symbolic link; `O_DIRECT`, as the buffers here are not aligned;
/// `O_ASYNC`, which sends signals; and `O_NOATIME`, which only the file's owner may use (open(2)): overlayfs, for one, opens
/// all files of its lower layer with it, and would find none that it may open.
pub const OPEN_FLAGS: i32 = libc::O_ACCMODE
    | libc::O_APPEND
    | libc::O_TRUNC
    | libc::O_EXCL
    | libc::O_NONBLOCK
    | libc::O_DSYNC
    | libc::O_SYNC
    | libc::O_DIRECTORY
    | libc::O_NOFOLLOW;

/// What the guest may do with a shared directory.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rules {
    pub(super) access: Access,
    pub(super) privileged_files: PrivilegedFiles,
    pub(super) users: Users,
}

/// Who owns what the users of the guest make.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Users {
    /// The user of the host with the same number.
    Same,
    /// The user that runs hwvmm.
    AsHwvmm,
}

impl Users {
    /// Returns what this process can do.
    pub(super) fn of_this_process() -> Self {
        if rustix::process::geteuid().is_root() { Self::Same } else { Self::AsHwvmm }
    }
}

/// The access that the guest has to the shared files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Access {
    ReadWrite,
    ReadOnly,
}

/// The rule for files that are a privilege on the host: device nodes, and files with a set-user-ID or set-group-ID bit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum PrivilegedFiles {
    Refused,
    Allowed,
}

impl PrivilegedFiles {
    fn allow_if(self, harmless: bool) -> io::Result<()> {
        if harmless || self == Self::Allowed { Ok(()) } else { Err(Errno::PERM.into()) }
    }

    /// Checks the mode of a new file or directory.
    ///
    /// # Errors
    /// Returns EPERM.
    pub(super) fn check_mode(self, mode: u32) -> io::Result<()> {
        self.allow_if(mode & SET_ID_BITS == 0)
    }

    /// Checks the mode of a file that has the mode `now`. A directory can keep its set-group-ID bit, which is a privilege
    /// with files only.
    ///
    /// # Errors
    /// Returns EPERM.
    pub(super) fn check_change(self, now: u32, mode: u32) -> io::Result<()> {
        let kept = if now & libc::S_IFMT == libc::S_IFDIR { now & libc::S_ISGID } else { 0 };
        self.check_mode(mode & !kept)
    }

    /// Checks the mode of MKNOD, with its type.
    ///
    /// # Errors
    /// Returns EPERM.
    pub(super) fn check_node(self, mode: u32) -> io::Result<()> {
        self.allow_if(matches!(mode & libc::S_IFMT, 0 | libc::S_IFREG | libc::S_IFIFO | libc::S_IFSOCK))?;
        self.check_mode(mode)
    }

    /// Checks the flags of RENAME2. A whiteout is a device node.
    ///
    /// # Errors
    /// Returns EPERM.
    pub(super) fn check_rename(self, flags: u32) -> io::Result<()> {
        self.allow_if(flags & libc::RENAME_WHITEOUT == 0)
    }
}

/// Checks the name of a directory entry. It must be one component, and not a way to the parent directory, which can be
/// outside of the shared directory: the host, or the guest by a second share, can move a directory that the guest knows.
///
/// # Errors
/// Returns EINVAL, or ENAMETOOLONG.
pub(super) fn check_name(name: &CStr) -> io::Result<()> {
    let name = name.to_bytes();
    if matches!(name, b"" | b"." | b"..") || name.contains(&b'/') {
        return Err(Errno::INVAL.into());
    }
    if name.len() > MAX_NAME { Err(Errno::NAMETOOLONG.into()) } else { Ok(()) }
}

/// Returns the flags for open(2) and for fcntl(2) `F_SETFL` on the host.
pub(super) fn host_flags(flags: u32) -> u32 {
    flags & OPEN_FLAGS.cast_unsigned() | libc::O_CLOEXEC.cast_unsigned()
}

/// Returns [`host_flags`] of the flags of OPEN and OPENDIR.
///
/// # Errors
/// Returns EROFS for flags other than those for reading where the directory is read-only.
pub(super) fn open_flags(flags: u32, access: Access) -> io::Result<u32> {
    let guest = flags.cast_signed();
    let reads = guest & libc::O_ACCMODE == libc::O_RDONLY && guest & (libc::O_TRUNC | libc::O_CREAT | TMPFILE) == 0;
    if access == Access::ReadOnly && !reads { Err(Errno::ROFS.into()) } else { Ok(host_flags(flags)) }
}

/// Returns the permission bits of a umask. Other bits would change the type of a new file after it was checked.
pub(super) fn umask(umask: u32) -> u32 {
    umask & 0o777
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_single_components_are_names() {
        for good in [c"a", c"...", c".a", c"a.", c"..a", c"a b", c"\\", c"\xff"] {
            assert!(check_name(good).is_ok(), "{good:?}");
        }
        for bad in [c"", c".", c"..", c"/", c"a/", c"/a", c"../a", c"a/..", c"a/b"] {
            assert!(check_name(bad).is_err(), "{bad:?}");
        }
        let name = |len| std::ffi::CString::new(vec![b'x'; len]).expect("no zero");
        assert!(check_name(&name(255)).is_ok());
        assert!(check_name(&name(256)).is_err());
    }

    #[test]
    fn only_flags_for_reading_open_files_of_a_read_only_directory() {
        let read_only = |flags: i32| open_flags(flags.cast_unsigned(), Access::ReadOnly);
        for flags in [libc::O_RDONLY, libc::O_DIRECTORY, libc::O_NONBLOCK | libc::O_NOFOLLOW] {
            assert!(read_only(flags).is_ok(), "{flags:#x}");
        }
        for flags in [libc::O_WRONLY, libc::O_RDWR, 3, libc::O_TRUNC, libc::O_CREAT, libc::O_TMPFILE, TMPFILE] {
            assert!(read_only(flags).is_err(), "{flags:#x}");
        }
    }

    #[test]
    fn flags_that_create_or_follow_do_not_reach_the_host() {
        let all = open_flags(u32::MAX, Access::ReadWrite).expect("allowed").cast_signed();
        for flag in [libc::O_CREAT, TMPFILE, libc::O_PATH, libc::O_DIRECT, libc::O_ASYNC, libc::O_NOATIME] {
            assert_eq!(all & flag, 0, "{flag:#x}");
        }
        assert_eq!(all & libc::O_CLOEXEC, libc::O_CLOEXEC);
    }
}
