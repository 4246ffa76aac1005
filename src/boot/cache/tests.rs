use super::*;
use crate::skip::skipped;
use hwvmm_arch::boot::FileRange;
use std::fs::Permissions;
use std::io::{Read, Write};
use std::os::unix::fs::{FileExt, PermissionsExt, symlink};

/// A packed file that was changed long ago.
fn packed(content: &[u8]) -> (File, Identity) {
    let mut file = tempfile::tempfile().expect("a temporary file");
    file.write_all(content).expect("written");
    let identity = identity(&file);
    (file, identity)
}

fn identity(file: &File) -> Identity {
    let range = FileRange { offset: 0, bytes: file.metadata().expect("metadata").len() };
    let later = SystemTime::now() + Duration::from_secs(10);
    Identity::of(file, range, later).expect("readable").expect("settled")
}

fn keep(cache: &Cache, identity: &Identity, content: &[u8]) -> File {
    let draft = cache.draft().expect("a draft");
    draft.file().write_all_at(content, 0).expect("written");
    draft.keep(FileRole::Kernel, identity).expect("kept")
}

fn names(folder: &Path) -> Vec<String> {
    let name = |entry: fs::DirEntry| entry.file_name().to_string_lossy().into_owned();
    let mut names: Vec<_> = fs::read_dir(folder).expect("listed").flatten().map(name).collect();
    names.sort();
    names
}

/// A folder that is ours alone.
fn folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("a temporary folder");
    fs::set_permissions(folder.path(), Permissions::from_mode(0o700)).expect("changed");
    folder
}

#[test]
fn a_cached_file_is_found_for_its_packed_file_only() {
    let folder = folder();
    let cache = Cache::new(&folder.path().join("new"));
    let ((_, one), (_, two)) = (packed(&[1; 200_000]), packed(&[2; 200_000]));
    assert!(cache.find(FileRole::Kernel, &one).is_none());
    keep(&cache, &one, b"unpacked");
    let mut content = String::new();
    cache.find(FileRole::Kernel, &one).expect("found").read_to_string(&mut content).expect("read");
    assert_eq!(content, "unpacked");
    assert!(cache.find(FileRole::Kernel, &two).is_none());
    assert!(cache.find(FileRole::Initrd, &one).is_none(), "an initrd is unpacked in another way");
    let made = folder.path().join("new");
    assert_eq!(fs::metadata(&made).expect("made").mode() & 0o777, 0o700);
    let entry = made.join(&names(&made)[0]);
    assert_eq!(fs::metadata(entry).expect("kept").mode() & 0o777, 0o600);
}

/// A hostile file of the same size, with the same time of modification and the same bytes at both ends and wherever a sampling key
/// looks.
#[test]
fn a_file_made_to_look_like_a_cached_one_is_not_taken_for_it() {
    let folder = folder();
    let cache = Cache::new(folder.path());
    let (path, size) = (folder.path().join("vmlinuz"), 4 << 20);
    fs::write(&path, vec![7; size]).expect("written");
    let trusted = File::open(&path).expect("there");
    let times = fs::FileTimes::new().set_modified(trusted.metadata().and_then(|data| data.modified()).expect("mtime"));
    keep(&cache, &identity(&trusted), b"trusted");
    let look_alike = File::create_new(folder.path().join("hostile")).expect("created");
    let mut content = vec![7; size];
    content[100_000] = 8;
    look_alike.write_all_at(&content, 0).expect("written");
    look_alike.set_times(times).expect("set");
    let look_alike = File::open(folder.path().join("hostile")).expect("there");
    assert!(cache.find(FileRole::Kernel, &identity(&look_alike)).is_none());
    assert!(cache.find(FileRole::Kernel, &identity(&trusted)).is_some());
    // The same inode, changed, with its old time of modification.
    std::thread::sleep(Duration::from_millis(20));
    let same = File::options().write(true).open(&path).expect("there");
    same.write_all_at(&[9], 100_000).expect("written");
    same.set_times(times).expect("set");
    assert!(cache.find(FileRole::Kernel, &identity(&trusted)).is_none());
}

#[test]
fn a_failed_unpacking_leaves_no_file() {
    let folder = folder();
    let cache = Cache::new(folder.path());
    let (_, one) = packed(b"short");
    drop(cache.draft().expect("a draft"));
    let mut unkept = cache.draft().expect("a draft").discard().expect("a handle");
    unkept.write_all(b"usable").expect("written");
    assert!(cache.find(FileRole::Kernel, &one).is_none());
    assert_eq!(names(folder.path()), [""; 0]);
}

#[test]
fn what_is_not_a_private_file_is_not_taken() {
    let folder = folder();
    let cache = Cache::new(folder.path());
    let (_, one) = packed(b"packed");
    let path = folder.path().join(name(FileRole::Kernel, &one));
    let found = || cache.find(FileRole::Kernel, &one).is_some();
    let target = folder.path().join("target");
    fs::write(&target, "elsewhere").expect("written");
    symlink(&target, &path).expect("linked");
    assert!(!found(), "a symbolic link");
    fs::remove_file(&path).expect("removed");
    let fifo = std::process::Command::new("mkfifo").arg(&path).status().expect("mkfifo");
    assert!(fifo.success() && !found(), "a FIFO");
    fs::remove_file(&path).expect("removed");
    keep(&cache, &one, b"");
    assert!(!found(), "an empty file");
    keep(&cache, &one, b"unpacked");
    assert!(found());
    for mode in [0o620, 0o602] {
        fs::set_permissions(&path, Permissions::from_mode(mode)).expect("changed");
        assert!(!found(), "mode {mode:o}");
    }
    if user() == 0 {
        fs::set_permissions(&path, Permissions::from_mode(0o600)).expect("changed");
        std::os::unix::fs::chown(&path, Some(1), None).expect("given away");
        assert!(!found(), "a file of another user");
    }
}

#[test]
fn a_folder_that_others_can_write_is_not_used() {
    let parent = folder();
    let path = parent.path().join("cache");
    for mode in [0o777, 0o1777, 0o770] {
        fs::create_dir(&path).expect("made");
        fs::set_permissions(&path, Permissions::from_mode(mode)).expect("changed");
        assert!(Cache::new(&path).draft().is_err(), "mode {mode:o}");
        let error = open_folder(&path).expect_err("refused").to_string();
        assert!(error.contains("chmod go-w") && error.contains(&format!("{mode:04o}")), "{error}");
        fs::remove_dir(&path).expect("empty");
    }
    fs::create_dir(parent.path().join("real")).expect("made");
    symlink(parent.path().join("real"), &path).expect("linked");
    assert!(Cache::new(&path).draft().is_err(), "a symbolic link");
    if user() == 0 {
        let theirs = parent.path().join("theirs");
        fs::create_dir(&theirs).expect("made");
        std::os::unix::fs::chown(&theirs, Some(1), None).expect("given away");
        let error = open_folder(&theirs).expect_err("refused").to_string();
        assert!(error.contains("belongs to user 1"), "{error}");
    }
}

#[test]
fn the_cache_keeps_a_limited_number_of_files() {
    let folder = folder();
    let cache = Cache::new(folder.path());
    for size in 1..50 {
        keep(&cache, &packed(&vec![1; size]).1, b"x");
    }
    assert_eq!(names(folder.path()).len(), KEPT);
}

const NO_ROOM: &str = "the file system of the temporary folder has no fallocate, or no room";

#[test]
fn the_cache_keeps_a_limited_number_of_bytes() {
    let folder = folder();
    let cache = Cache::new(folder.path());
    let of_size = |bytes: u64| {
        let draft = cache.draft().expect("a draft");
        rustix::fs::fallocate(draft.file(), rustix::fs::FallocateFlags::empty(), 0, bytes).map(|()| draft)
    };
    let Ok(draft) = of_size(FILE_BYTES + 4096) else { return skipped(NO_ROOM) };
    draft.keep(FileRole::Initrd, &packed(b"large").1).expect("a file");
    assert_eq!(names(folder.path()), [""; 0], "larger than a kept file may be");
    let mut last = None;
    for size in 1..=6 {
        let Ok(draft) = of_size(FILE_BYTES - (1 << 20)) else { return skipped(NO_ROOM) };
        let (_, identity) = packed(&vec![1; size]);
        draft.keep(FileRole::Initrd, &identity).expect("kept");
        last = Some(identity);
    }
    assert_eq!(names(folder.path()).len(), 4, "1 GiB has room for four");
    assert!(last.is_some_and(|identity| cache.find(FileRole::Initrd, &identity).is_some()), "the newest one stays");
}

#[test]
fn what_a_killed_run_left_is_removed() {
    let folder = folder();
    let cache = Cache::new(folder.path());
    let leave = |name: &str, seconds: u64| {
        let file = File::create_new(folder.path().join(name)).expect("created");
        file.set_times(fs::FileTimes::new().set_modified(SystemTime::now() - Duration::from_secs(seconds)))
            .expect("set");
    };
    leave("0123456789abcdef.unpacked-tmp", 3600);
    leave("fedcba9876543210.unpacked-tmp", 5);
    leave("other.tmp", 3600);
    keep(&cache, &packed(b"packed").1, b"x");
    let left = names(folder.path());
    assert!(left.len() == 3 && left.contains(&"fedcba9876543210.unpacked-tmp".to_owned()), "{left:?}");
    assert!(left.contains(&"other.tmp".to_owned()), "{left:?}");
}
