//! Locks on the files of images, as QEMU takes them (block/file-posix.c, "raw_apply_lock_bytes"): so that QEMU, qemu-img,
//! libguestfs and this program see each other. A process holds a shared lock on a byte for each thing that it does with the
//! file, and on another for each thing that it does not let others do; then it looks whether others hold the bytes that exclude
//! it. The locks belong to the open file description: they end when its last descriptor is closed, at the latest.
//!
//! The whole file is locked by flock(2) too, for programs that use only that.

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use rustix::fs::FlockOperation;
use std::fmt;
use std::fs::File;
use std::io;
use thiserror::Error;

/// The byte that is locked for a permission that is used is this one, and the number of the permission (RAW_LOCK_PERM_BASE).
const USED: i64 = 100;
/// The same for a permission that others must not use (RAW_LOCK_SHARED_BASE).
const DENIED: i64 = 200;

// The numbers of permissions (BLK_PERM_CONSISTENT_READ and so on, as bits).
const READ: i64 = 0;
const WRITE: i64 = 1;
const RESIZE: i64 = 3;

/// What a file is opened for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Use {
    Reading,
    ReadingAndWriting,
}

impl Use {
    /// What is done with the file.
    fn used(self) -> &'static [i64] {
        match self {
            Self::Reading => &[READ],
            Self::ReadingAndWriting => &[READ, WRITE, RESIZE],
        }
    }
}

/// What others must not do with the file of a disk, or of its backing file: a guest does not expect its disk to change.
const DENIED_TO_OTHERS: [i64; 2] = [WRITE, RESIZE];

/// What the lock of another process excludes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Conflict {
    /// It writes to the file.
    Writes,
    /// It does not let others write to the file.
    DeniesWriting,
    /// It does not let others read the file.
    DeniesReading,
    /// It has locked the whole file, by flock(2) or fcntl(2).
    WholeFile,
}

/// Another process has locked a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LockConflict {
    /// What its lock excludes.
    pub conflict: Conflict,
    /// Its process id, where the kernel tells: not for locks of open file descriptions, which those of QEMU are.
    pub pid: Option<i32>,
}

impl fmt::Display for LockConflict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.pid {
            Some(pid) => write!(f, "process {pid}")?,
            None => f.write_str("another process")?,
        }
        f.write_str(match self.conflict {
            Conflict::Writes => " writes to it",
            Conflict::DeniesWriting => " uses it and does not let others write to it",
            Conflict::DeniesReading => " uses it and does not let others read it",
            Conflict::WholeFile => " has locked the whole file",
        })
    }
}

/// A file is not locked.
#[derive(Debug, Error)]
pub(super) enum LockError {
    /// Another process has locked it.
    #[error("{0}")]
    Conflict(LockConflict),
    /// The host cannot lock it.
    #[error(transparent)]
    Host(io::Error),
}

impl From<LockConflict> for LockError {
    fn from(conflict: LockConflict) -> Self {
        Self::Conflict(conflict)
    }
}

/// Locks `file`. Where that fails, some locks may be held.
fn lock(file: &File, used: Use) -> Result<(), LockError> {
    let whole = match used {
        Use::Reading => FlockOperation::NonBlockingLockShared,
        Use::ReadingAndWriting => FlockOperation::NonBlockingLockExclusive,
    };
    match rustix::fs::flock(file, whole) {
        Ok(()) => {}
        Err(rustix::io::Errno::WOULDBLOCK) => {
            // QEMU's locks say more, where the other process has them.
            check(file, used)?;
            return Err(LockConflict { conflict: Conflict::WholeFile, pid: None }.into());
        }
        Err(errno) => return Err(LockError::Host(errno.into())),
    }
    let bytes = used.used().iter().map(|number| USED + number);
    for byte in bytes.chain(DENIED_TO_OTHERS.map(|number| DENIED + number)) {
        match fcntl(file, FcntlArg::F_OFD_SETLK(&byte_lock(byte, libc::F_RDLCK))) {
            Ok(_) => {}
            Err(Errno::EAGAIN) => {
                // An exclusive lock, which QEMU does not take.
                let pid = holder(file, byte, libc::F_RDLCK)?.flatten();
                return Err(LockConflict { conflict: Conflict::WholeFile, pid }.into());
            }
            Err(errno) => return Err(LockError::Host(errno.into())),
        }
    }
    check(file, used)
}

/// A file that is unlocked when this is dropped, also where a child process that is being started has a copy of the
/// descriptor for a moment.
#[derive(Debug)]
pub(super) struct LockedFile(pub(super) File);

impl LockedFile {
    /// Locks `file`.
    ///
    /// # Errors
    /// [`LockError`]. No lock is held then.
    pub(super) fn new(file: File, used: Use) -> Result<Self, LockError> {
        // Dropped, it unlocks what was locked before the failure.
        let locked = Self(file);
        lock(&locked.0, used)?;
        Ok(locked)
    }
}

impl Drop for LockedFile {
    fn drop(&mut self) {
        let all = libc::flock { l_len: 0, ..byte_lock(0, libc::F_UNLCK) };
        let bytes = fcntl(&self.0, FcntlArg::F_OFD_SETLK(&all)).map_err(io::Error::from);
        let whole = rustix::fs::flock(&self.0, FlockOperation::Unlock).map_err(io::Error::from);
        if let Err(error) = bytes.and(whole.map(|()| 0)) {
            log::debug!("block: cannot unlock an image: {error}");
        }
    }
}

/// Looks for locks of others that exclude this use of the file.
fn check(file: &File, used: Use) -> Result<(), LockError> {
    let others_do = DENIED_TO_OTHERS.map(|number| (USED + number, Conflict::Writes));
    let others_deny = used.used().iter().map(|number| {
        (DENIED + number, if *number == READ { Conflict::DeniesReading } else { Conflict::DeniesWriting })
    });
    for (byte, conflict) in others_do.into_iter().chain(others_deny) {
        if let Some(pid) = holder(file, byte, libc::F_WRLCK)? {
            return Err(LockConflict { conflict, pid }.into());
        }
    }
    Ok(())
}

/// Returns the process id of one that holds a lock on `byte` that excludes one of `kind`, where there is one; `None` in
/// it where the kernel does not tell.
fn holder(file: &File, byte: i64, kind: i32) -> Result<Option<Option<i32>>, LockError> {
    let mut found = byte_lock(byte, kind);
    fcntl(file, FcntlArg::F_OFD_GETLK(&mut found)).map_err(|errno| LockError::Host(errno.into()))?;
    let free = i32::from(found.l_type) == libc::F_UNLCK;
    Ok((!free).then(|| Some(found.l_pid).filter(|pid| *pid > 0)))
}

fn byte_lock(byte: i64, kind: i32) -> libc::flock {
    let [kind, whence] = [kind, libc::SEEK_SET].map(|value| i16::try_from(value).unwrap_or(0));
    // The kernel refuses locks of open file descriptions with a process id.
    libc::flock { l_type: kind, l_whence: whence, l_start: byte, l_len: 1, l_pid: 0 }
}

/// Returns advice on a file that cannot be locked, to append to a message; empty where there is none.
pub(super) fn lock_remedy(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::ENOLCK) => " (the server of its file system gives no locks: see lock and local_lock in nfs(5))",
        Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::EINVAL) => {
            " (its file system has no locks, without which two writers could corrupt it: move it to another)"
        }
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(path: &std::path::Path) -> File {
        File::options().read(true).write(true).open(path).expect("there")
    }

    /// What another process that holds `bytes` excludes.
    fn conflict(bytes: &[i64], used: Use) -> Option<Conflict> {
        let file = tempfile::NamedTempFile::new().expect("a file");
        let other = open(file.path());
        for byte in bytes {
            fcntl(&other, FcntlArg::F_OFD_SETLK(&byte_lock(*byte, libc::F_RDLCK))).expect("locked");
        }
        match LockedFile::new(open(file.path()), used) {
            Ok(_) => None,
            Err(LockError::Conflict(LockConflict { conflict, pid: None })) => Some(conflict),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_locks_of_qemu_are_seen() {
        use Use::{Reading, ReadingAndWriting};
        // A machine that writes, one that reads, `qemu-img info`, a machine with share-rw=on that only reads.
        let cases: [(&[i64], Option<Conflict>, Option<Conflict>); 8] = [
            (&[100, 101, 103, 201, 203], Some(Conflict::Writes), Some(Conflict::Writes)),
            (&[100, 201, 203], None, Some(Conflict::DeniesWriting)),
            (&[201], None, Some(Conflict::DeniesWriting)),
            (&[203], None, Some(Conflict::DeniesWriting)),
            (&[103], Some(Conflict::Writes), Some(Conflict::Writes)),
            (&[200], Some(Conflict::DeniesReading), Some(Conflict::DeniesReading)),
            (&[100, 102, 202, 104, 204], None, None),
            (&[], None, None),
        ];
        for (bytes, reading, writing) in cases {
            assert_eq!((conflict(bytes, Reading), conflict(bytes, ReadingAndWriting)), (reading, writing), "{bytes:?}");
        }
    }

    #[test]
    fn others_see_the_locks() {
        for (used, bytes) in
            [(Use::Reading, &[100, 201, 203][..]), (Use::ReadingAndWriting, &[100, 101, 103, 201, 203])]
        {
            let file = tempfile::NamedTempFile::new().expect("a file");
            let (one, other) = (open(file.path()), open(file.path()));
            let one = LockedFile::new(one, used).expect("locked");
            let held: Vec<i64> =
                (0..300).filter(|byte| holder(&other, *byte, libc::F_WRLCK).expect("asked").is_some()).collect();
            assert_eq!(held, bytes);
            drop(one);
            assert!((0..300).all(|byte| holder(&other, byte, libc::F_WRLCK).expect("asked").is_none()));
        }
    }

    /// A process that another thread has just forked has copies of all descriptors until its exec.
    #[test]
    fn a_copy_of_the_descriptor_keeps_no_lock() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        let free = || {
            // Unlocked, and not only closed: other tests start processes, which have copies for a moment.
            let other = LockedFile(open(file.path()));
            rustix::fs::flock(&other.0, FlockOperation::NonBlockingLockExclusive).is_ok()
                && (0..300).all(|byte| holder(&other.0, byte, libc::F_WRLCK).expect("asked").is_none())
        };
        let one = open(file.path());
        let copy = one.try_clone().expect("a copy");
        let locked = LockedFile::new(one, Use::ReadingAndWriting).expect("locked");
        assert!(!free());
        drop(locked);
        assert!(free(), "it was unlocked");
        // One that is refused after it has taken some of its locks.
        let reader = LockedFile(open(file.path()));
        fcntl(&reader.0, FcntlArg::F_OFD_SETLK(&byte_lock(DENIED + WRITE, libc::F_RDLCK))).expect("locked");
        LockedFile::new(copy.try_clone().expect("a copy"), Use::ReadingAndWriting).expect_err("a reader");
        drop(reader);
        assert!(free(), "it keeps none");
        drop(copy);
    }

    #[test]
    fn locks_of_the_whole_file_exclude_and_name_their_process() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        let other = open(file.path());
        rustix::fs::flock(&other, FlockOperation::LockExclusive).expect("locked");
        let refused = LockedFile::new(open(file.path()), Use::Reading).expect_err("locked");
        assert!(matches!(refused, LockError::Conflict(LockConflict { conflict: Conflict::WholeFile, pid: None })));
        rustix::fs::flock(&other, FlockOperation::Unlock).expect("unlocked");
        // A process' own lock, as lockf(3) takes it: it excludes an open file description of the same process too.
        let whole = libc::flock { l_len: 0, ..byte_lock(0, libc::F_WRLCK) };
        fcntl(&other, FcntlArg::F_SETLK(&whole)).expect("locked");
        let refused = LockedFile::new(open(file.path()), Use::Reading).expect_err("locked").to_string();
        assert_eq!(refused, format!("process {} has locked the whole file", std::process::id()));
    }

    #[test]
    fn what_is_no_conflict_is_said() {
        // A descriptor that only names its file cannot be locked.
        let file = tempfile::NamedTempFile::new().expect("a file");
        let flags = rustix::fs::OFlags::PATH | rustix::fs::OFlags::CLOEXEC;
        let named = File::from(rustix::fs::open(file.path(), flags, rustix::fs::Mode::empty()).expect("there"));
        let refused = LockedFile::new(named, Use::Reading).expect_err("not open");
        assert!(matches!(&refused, LockError::Host(error) if error.raw_os_error() == Some(libc::EBADF)), "{refused:?}");
    }
}
