//! What a packed file is recognized by when it is found again.

use hwvmm_arch::boot::FileRange;
use rustix::fs::{MemfdFlags, memfd_create};
use sha2::{Digest, Sha256};
use std::fmt;
use std::fs::{File, Metadata};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// A file that was changed less than this before it is read is not kept: file systems count ctime in steps (of 2 s on FAT), and
/// a change within the same step would not show. git treats its index in the same way (racy-git.txt).
const RACY: Duration = Duration::from_secs(2);
/// `f_type` of FUSE (Linux, include/uapi/linux/magic.h).
const FUSE_SUPER_MAGIC: i64 = 0x6573_5546;
/// `ST_NOSUID` in `f_flags` (statfs(2)).
const NOSUID: i64 = 2;
/// The write permissions of group and others.
pub(super) const WRITABLE_BY_OTHERS: u32 = 0o022;
/// The size of the pieces in which content is copied, in bytes.
const PIECE: usize = 256 << 10;

/// The inode of a file and its last change (stat(2)).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stamp {
    device: u64,
    inode: u64,
    /// The last change of the inode (`st_ctime`), in seconds since 1970.
    ctime: i64,
    ctime_ns: i64,
    /// The size of the file in bytes (`st_size`).
    size: u64,
}

impl Stamp {
    fn new(metadata: &Metadata) -> Self {
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            ctime: metadata.ctime(),
            ctime_ns: metadata.ctime_nsec(),
            size: metadata.len(),
        }
    }

    /// Returns true if the last change was long enough before `now` for the next one to show.
    fn is_settled(&self, now: SystemTime) -> bool {
        let Ok(now) = now.duration_since(UNIX_EPOCH) else { return false };
        let (Ok(seconds), Ok(ns)) = (u64::try_from(self.ctime), u32::try_from(self.ctime_ns)) else { return false };
        now.checked_sub(Duration::new(seconds, ns)).is_some_and(|age| age > RACY)
    }
}

/// What a range of a packed file is recognized by.
#[derive(Debug)]
pub enum Identity {
    /// The inode and its last change, where no other user can forge them or write to the file.
    Inode(InodeIdentity),
    /// A hash of the content.
    Content(ContentIdentity),
}

/// A range of a file that only its owner changes.
#[derive(Debug)]
pub struct InodeIdentity {
    stamp: Stamp,
    range: FileRange,
}

/// The SHA-256 of a range of a file, and the copy that it was computed from. The file itself may have changed since.
#[derive(Debug)]
pub struct ContentIdentity {
    sha256: [u8; 32],
    copy: File,
    bytes: u64,
}

/// Returns true if only this user and root can have chosen the file's ctime, inode or content. On a FUSE
/// mount its server chooses them, and on a mounted file system image the image's author. Such mounts of users have `nosuid`:
/// on a mount without it, who chooses the metadata can make files set-user-ID root, and so is root already.
///
/// A file without a name (memfd_create(2)) is not found again by its inode, whose number goes to another file.
fn is_trusted(file: &File, metadata: &Metadata) -> io::Result<bool> {
    if metadata.nlink() == 0 {
        return Ok(false);
    }
    let owner = metadata.uid();
    let ours = owner == 0 || owner == rustix::process::geteuid().as_raw();
    if !ours || metadata.mode() & WRITABLE_BY_OTHERS != 0 {
        return Ok(false);
    }
    let file_system = rustix::fs::fstatfs(file)?;
    Ok(file_system.f_type != FUSE_SUPER_MAGIC && file_system.f_flags & NOSUID == 0)
}

impl Identity {
    /// The identity of `range` of `file` at the time `now`. `None` if the file was changed too shortly before.
    ///
    /// # Errors
    /// Where the file cannot be read, or ends before the range does.
    pub fn of(file: &File, range: FileRange, now: SystemTime) -> io::Result<Option<Self>> {
        let metadata = file.metadata()?;
        if is_trusted(file, &metadata)? {
            let stamp = Stamp::new(&metadata);
            return Ok(stamp.is_settled(now).then_some(Self::Inode(InodeIdentity { stamp, range })));
        }
        ContentIdentity::of(file, range).map(|identity| Some(Self::Content(identity)))
    }

    /// The file and the range in it that hold the content: for [`Identity::Content`] those of the copy.
    #[must_use]
    pub fn content<'a>(&'a self, file: &'a File) -> (&'a File, FileRange) {
        match self {
            Self::Inode(identity) => (file, identity.range),
            Self::Content(identity) => (&identity.copy, FileRange { offset: 0, bytes: identity.bytes }),
        }
    }

    /// Returns true if `file` still has this identity: what was read from [`Identity::content`] is what the identity names.
    #[must_use]
    pub fn holds(&self, file: &File) -> bool {
        match self {
            Self::Inode(identity) => file.metadata().is_ok_and(|metadata| Stamp::new(&metadata) == identity.stamp),
            Self::Content(_) => true,
        }
    }
}

impl ContentIdentity {
    fn of(file: &File, range: FileRange) -> io::Result<Self> {
        let copy = File::from(memfd_create("packed", MemfdFlags::CLOEXEC)?);
        let (mut hash, mut buffer, mut done) = (Sha256::new(), vec![0; PIECE], 0);
        while done < range.bytes {
            let count = usize::try_from(range.bytes - done).unwrap_or(PIECE).min(PIECE);
            let piece = &mut buffer[..count];
            file.read_exact_at(piece, range.offset.saturating_add(done))?;
            copy.write_all_at(piece, done)?;
            hash.update(&*piece);
            done += count as u64;
        }
        Ok(Self { sha256: hash.finalize().into(), copy, bytes: range.bytes })
    }
}

/// The identity as part of a file name.
impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Inode(InodeIdentity { stamp, range }) => {
                let Stamp { device, inode, ctime, ctime_ns, size } = stamp;
                write!(f, "{device:x}-{inode}-{ctime}.{ctime_ns:09}-{size}-{}-{}", range.offset, range.bytes)
            }
            Self::Content(ContentIdentity { sha256, .. }) => {
                f.write_str("sha256-")?;
                sha256.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::Permissions;
    use std::io::Write;
    use std::os::unix::fs::PermissionsExt;
    use tempfile::{NamedTempFile, TempPath};

    fn later() -> SystemTime {
        SystemTime::now() + RACY + Duration::from_secs(1)
    }

    /// A file and its name, which goes with it.
    fn file(mode: u32, content: &[u8]) -> (File, TempPath) {
        let mut file = NamedTempFile::new().expect("a file");
        file.write_all(content).expect("written");
        file.as_file().set_permissions(Permissions::from_mode(mode)).expect("changed");
        file.into_parts()
    }

    fn of(file: &File, bytes: u64) -> Identity {
        Identity::of(file, FileRange { offset: 0, bytes }, later()).expect("readable").expect("settled")
    }

    #[test]
    fn a_file_that_others_can_write_is_known_by_its_content() {
        let identity = of(&file(0o666, b"content").0, 7);
        let sha256 = "ed7002b439e9ac845f22357d822bac1444730fbdb6016d3ec9432297b9ec9f73";
        assert_eq!(identity.to_string(), format!("sha256-{sha256}"));
        let (other, _name) = file(0o600, b"");
        let (copy, range) = identity.content(&other);
        let mut content = vec![0; usize::try_from(range.bytes).expect("small")];
        copy.read_exact_at(&mut content, range.offset).expect("readable");
        assert_eq!(content, b"content");
    }

    #[test]
    fn a_recent_change_gives_no_identity() {
        let (file, _name) = file(0o600, b"content");
        let range = FileRange { offset: 0, bytes: 7 };
        let now = SystemTime::now();
        assert!(Identity::of(&file, range, now).expect("readable").is_none(), "changed just now");
        assert!(
            Identity::of(&file, range, now - Duration::from_secs(60)).expect("readable").is_none(),
            "in the future"
        );
        let shorter = FileRange { offset: 0, bytes: 6 };
        let other = Identity::of(&file, shorter, later()).expect("readable").expect("settled");
        assert_ne!(of(&file, 7).to_string(), other.to_string());
    }

    #[test]
    fn a_file_without_a_name_is_known_by_its_content() {
        let (file, name) = file(0o600, b"content");
        drop(name);
        assert!(matches!(of(&file, 7), Identity::Content(_)), "another file gets its inode number");
    }

    #[test]
    fn a_change_while_it_is_read_shows() {
        let (mut file, _name) = file(0o600, b"content");
        let identity = of(&file, 7);
        if matches!(identity, Identity::Content(_)) {
            return crate::skip::skipped("the temporary folder is mounted nosuid");
        }
        assert!(identity.holds(&file));
        std::thread::sleep(Duration::from_millis(20));
        file.write_all(b"more").expect("written");
        assert!(!identity.holds(&file));
    }
}
