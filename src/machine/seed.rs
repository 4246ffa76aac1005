//! The seed of cloud-init's data source NoCloud (`--seed`): a disk with the label `cidata`, made in memory of files of a folder.
//!
//! The folder is read when a start of the guest is prepared. It can be one that an earlier guest could write to: no link in it is
//! followed, and nothing in it is waited for.

use hwvmm_devices::path_text::PathText as _;
use hwvmm_devices::virtio::block::Image;
use rustix::fs::{AtFlags, FileType, MemfdFlags, Mode, OFlags, SealFlags};
use rustix::io::Errno;
use sha2::{Digest, Sha256};
use std::fs::File;
use std::io::{self, Cursor, Read, Write};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use thiserror::Error;

/// The label by which cloud-init finds the disk, padded as FAT has it.
const LABEL: [u8; 11] = *b"cidata     ";
/// The serial number of the file system: the same files make the same disk.
const VOLUME_ID: u32 = 0x6369_6461;
const USER_DATA: &str = "user-data";
const META_DATA: &str = "meta-data";
/// The files that are taken.
const NAMES: [&str; 4] = [USER_DATA, META_DATA, "vendor-data", "network-config"];
/// The largest size of all files together, in bytes.
const MAX_BYTES: u64 = 16 << 20;
/// What the disk has beside its files, in bytes: tables, the root folder, and the ends of clusters.
const SPARE_BYTES: u64 = 1 << 20;
/// The size of the disk is a multiple of this, in bytes.
const STEP_BYTES: u64 = 1 << 20;

/// Why there is no seed.
#[derive(Debug, Error)]
pub enum SeedError {
    /// The folder cannot be opened.
    #[error("--seed {}: cannot open the folder", .path.shown())]
    Folder {
        /// The folder, as it was given.
        path: PathBuf,
        /// The error of the system call.
        source: io::Error,
    },
    /// There is no user-data.
    #[error("--seed {}: it has no file {USER_DATA}, which cloud-init needs: make one (it may be empty)", .0.shown())]
    NoUserData(PathBuf),
    /// A file is a symbolic link.
    #[error("--seed: {} is a symbolic link: put the file itself there", .0.shown())]
    Link(PathBuf),
    /// A file is a folder, a FIFO, a socket or a device.
    #[error("--seed: {} is not a regular file", .0.shown())]
    Kind(PathBuf),
    /// A file cannot be read.
    #[error("--seed: cannot read {}", .path.shown())]
    Read {
        /// The path of the file that cannot be read.
        path: PathBuf,
        /// The error of the system call.
        source: io::Error,
    },
    /// The files are too large.
    #[error("--seed {}: its files have more than {} MiB together", .0.shown(), MAX_BYTES >> 20)]
    TooLarge(PathBuf),
    /// The disk cannot be made.
    #[error("cannot make the disk of --seed in memory")]
    Disk(#[source] io::Error),
}

/// A file of the seed.
struct SeedFile {
    name: &'static str,
    content: Vec<u8>,
}

/// Makes the disk of the files in the folder at `path`.
///
/// # Errors
/// [`SeedError`].
pub(super) fn open(path: &Path) -> Result<Image, SeedError> {
    let files = read(path)?;
    for SeedFile { name, content } in &files {
        log::info!("--seed: {name} has {} bytes", content.len());
    }
    let file = disk(&files).and_then(|bytes| in_memory(&bytes)).map_err(SeedError::Disk)?;
    Image::of_memory(file).map_err(SeedError::Disk)
}

/// Reads the files of a seed, and makes what it has to have besides user-data.
fn read(path: &Path) -> Result<Vec<SeedFile>, SeedError> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let folder = rustix::fs::open(path, flags, Mode::empty())
        .map_err(|errno| SeedError::Folder { path: path.to_owned(), source: errno.into() })?;
    let mut files = Vec::new();
    let mut left = MAX_BYTES;
    for name in NAMES {
        let Some(file) = open_file(&folder, path, name)? else { continue };
        let mut content = Vec::new();
        // The size that the file system tells is not asked for: the file may grow meanwhile.
        file.take(left + 1)
            .read_to_end(&mut content)
            .map_err(|source| SeedError::Read { path: path.join(name), source })?;
        left = left.checked_sub(content.len() as u64).ok_or_else(|| SeedError::TooLarge(path.to_owned()))?;
        files.push(SeedFile { name, content });
    }
    let has = |wanted| files.iter().any(|file: &SeedFile| file.name == wanted);
    if !has(USER_DATA) {
        return Err(SeedError::NoUserData(path.to_owned()));
    }
    if !has(META_DATA) {
        let content = made_meta_data(&files).into_bytes();
        files.push(SeedFile { name: META_DATA, content });
    }
    Ok(files)
}

/// Opens a file of the folder; `None` where there is none. The type is looked at first: opening a FIFO waits for its writer, and
/// opening a device can do anything. The flags hold where the file is replaced meanwhile.
fn open_file(folder: &OwnedFd, path: &Path, name: &str) -> Result<Option<File>, SeedError> {
    let failed = |errno: Errno| SeedError::Read { path: path.join(name), source: errno.into() };
    let check = |mode| match FileType::from_raw_mode(mode) {
        FileType::RegularFile => Ok(()),
        FileType::Symlink => Err(SeedError::Link(path.join(name))),
        _ => Err(SeedError::Kind(path.join(name))),
    };
    match rustix::fs::statat(folder, name, AtFlags::SYMLINK_NOFOLLOW) {
        Err(Errno::NOENT) => return Ok(None),
        stat => check(stat.map_err(failed)?.st_mode)?,
    }
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let file = match rustix::fs::openat(folder, name, flags, Mode::empty()) {
        Err(Errno::LOOP) => return Err(SeedError::Link(path.join(name))),
        file => file.map_err(failed)?,
    };
    check(rustix::fs::fstat(&file).map_err(failed)?.st_mode)?;
    Ok(Some(File::from(file)))
}

/// The meta-data of a seed that has none. cloud-init sets a system up again where the id is another one: the id follows from the files.
fn made_meta_data(files: &[SeedFile]) -> String {
    let mut hash = Sha256::new();
    for SeedFile { name, content } in files {
        hash.update(name.as_bytes());
        hash.update((content.len() as u64).to_le_bytes());
        hash.update(content);
    }
    let id: String = hash.finalize().iter().take(8).map(|byte| format!("{byte:02x}")).collect();
    format!("instance-id: hwvmm-{id}\n")
}

/// Makes a FAT file system with these files. The same files make the same bytes.
fn disk(files: &[SeedFile]) -> io::Result<Vec<u8>> {
    let content: u64 = files.iter().map(|file| file.content.len() as u64).sum();
    let bytes = content.saturating_add(SPARE_BYTES).next_multiple_of(STEP_BYTES);
    let mut disk = Cursor::new(vec![0; usize::try_from(bytes).map_err(io::Error::other)?]);
    let options = fatfs::FormatVolumeOptions::new().volume_label(LABEL).volume_id(VOLUME_ID);
    fatfs::format_volume(&mut disk, options)?;
    {
        let volume = fatfs::FileSystem::new(&mut disk, fatfs::FsOptions::new())?;
        for SeedFile { name, content } in files {
            volume.root_dir().create_file(name)?.write_all(content)?;
        }
        volume.unmount()?;
    }
    Ok(disk.into_inner())
}

/// A file in memory with these bytes, which nobody can change.
fn in_memory(bytes: &[u8]) -> io::Result<File> {
    let file = rustix::fs::memfd_create("seed", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    let mut file = File::from(file);
    file.write_all(bytes)?;
    rustix::fs::fcntl_add_seals(&file, SealFlags::SEAL | SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE)?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::fs;
    use std::os::unix::fs::symlink;
    use std::time::Duration;

    fn folder(files: &[(&str, &[u8])]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().expect("a folder");
        files.iter().for_each(|(name, content)| fs::write(folder.path().join(name), content).expect("written"));
        folder
    }

    /// The bytes of the disk, as a guest reads them.
    fn bytes_of(image: &Image) -> Vec<u8> {
        let mut bytes = vec![0; usize::try_from(image.bytes()).expect("small")];
        image.read_exact_at(&mut bytes, 0).expect("read");
        bytes
    }

    /// Label, names and contents of the disk that a folder makes.
    fn seed(path: &Path) -> (String, Vec<(String, Vec<u8>)>) {
        let image = open(path).expect("a seed");
        assert!(image.is_read_only());
        let mut disk = Cursor::new(bytes_of(&image));
        let volume = fatfs::FileSystem::new(&mut disk, fatfs::FsOptions::new()).expect("FAT");
        let label = volume.read_volume_label_from_root_dir().expect("read").expect("a label");
        assert_eq!(volume.volume_label(), label, "the boot sector has it, too");
        let mut files = Vec::new();
        for entry in volume.root_dir().iter() {
            let entry = entry.expect("an entry");
            let mut content = Vec::new();
            entry.to_file().read_to_end(&mut content).expect("read");
            files.push((entry.file_name(), content));
        }
        (label, files)
    }

    fn refused(path: &Path) -> String {
        let path = path.to_owned();
        let (done, wait) = std::sync::mpsc::channel();
        std::thread::spawn(move || done.send(open(&path).err().map(|error| crate::error::chain(&error))));
        wait.recv_timeout(Duration::from_secs(20)).expect("it does not wait").expect("refused")
    }

    #[test]
    fn a_disk_has_the_files_of_its_folder() {
        let all: Vec<(&str, &[u8])> = vec![
            ("user-data", b"#cloud-config\n"),
            ("meta-data", b"instance-id: a\n"),
            ("vendor-data", b""),
            ("network-config", &[0xff; 5000]),
        ];
        let given = folder(&all);
        fs::write(given.path().join("other"), "of the user").expect("written");
        let (label, files) = seed(given.path());
        assert_eq!(label, "cidata");
        let expected: Vec<_> = all.iter().map(|(name, content)| ((*name).to_owned(), content.to_vec())).collect();
        assert_eq!(files, expected);
        let bytes = |path| bytes_of(&open(path).expect("a seed"));
        assert!(bytes(given.path()) == bytes(given.path()), "the same files make the same disk");
    }

    #[test]
    fn meta_data_is_made_where_there_is_none() {
        let id = |user: &[u8]| {
            let (_, files) = seed(folder(&[("user-data", user)]).path());
            assert_eq!(files.len(), 2);
            let (name, content) = &files[1];
            let text = String::from_utf8(content.clone()).expect("text");
            assert!(name == "meta-data" && text.starts_with("instance-id: hwvmm-") && text.ends_with('\n'), "{text}");
            text
        };
        assert_eq!(id(b"a"), id(b"a"));
        assert_ne!(id(b"a"), id(b""));
    }

    #[test]
    fn disks_of_all_sizes_are_read_back() {
        let mib = 1 << 20;
        for bytes in [1, 511, mib, 3 * mib - 1, 3 * mib, 4 * mib, 15 * mib, 16 * mib] {
            let content = vec![7; bytes];
            let (_, files) = seed(folder(&[("user-data", &content), ("meta-data", b"")]).path());
            assert!(files[0].1 == content, "{bytes} bytes");
        }
    }

    #[test]
    fn a_folder_without_user_data_is_refused() {
        let error = refused(folder(&[("meta-data", b"")]).path());
        assert!(error.contains("no file user-data"), "{error}");
        let given = folder(&[("file", b"")]);
        for name in ["missing", "file"] {
            let error = refused(&given.path().join(name));
            assert!(error.contains(name) && error.contains("cannot open the folder"), "{error}");
        }
        assert!(refused(Path::new("/dev/null")).contains("--seed /dev/null"));
    }

    #[test]
    fn what_is_no_regular_file_is_refused() {
        for name in NAMES {
            let given = folder(&[(USER_DATA, b"")]);
            let path = given.path().join(name);
            let replace = || {
                let _ = fs::remove_file(&path);
            };
            replace();
            symlink("/etc/passwd", &path).expect("linked");
            let error = refused(given.path());
            assert!(error.contains("is a symbolic link") && error.contains(name), "{error}");
            replace();
            symlink("nowhere", &path).expect("linked");
            assert!(refused(given.path()).contains("is a symbolic link"), "{name}");
            replace();
            rustix::fs::mkfifoat(rustix::fs::CWD, &path, Mode::RUSR | Mode::WUSR).expect("a FIFO");
            assert!(refused(given.path()).contains("is not a regular file"), "{name}");
            replace();
            let _socket = std::os::unix::net::UnixListener::bind(&path).expect("a socket");
            assert!(refused(given.path()).contains("is not a regular file"), "{name}");
            replace();
            fs::create_dir(&path).expect("made");
            assert!(refused(given.path()).contains("is not a regular file"), "{name}");
        }
    }

    #[test]
    fn all_files_together_are_bounded() {
        let given = folder(&[("user-data", b"x")]);
        let huge = |name: &str, bytes| {
            let file = File::create(given.path().join(name)).expect("made");
            file.set_len(bytes).expect("a hole");
        };
        huge("vendor-data", MAX_BYTES);
        assert!(refused(given.path()).contains("more than 16 MiB together"));
        huge("vendor-data", MAX_BYTES - 1);
        assert_eq!(seed(given.path()).1.len(), 3);
        huge("user-data", 1 << 40);
        assert!(refused(given.path()).contains("more than 16 MiB together"));
    }

    #[test]
    fn the_file_in_memory_cannot_be_changed() {
        let file = in_memory(&[1; 512]).expect("a file");
        assert!((&file).write_all(b"x").is_err() && file.set_len(0).is_err() && file.set_len(1024).is_err());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(16))]
        #[test]
        fn any_content_is_read_back(user in any::<Vec<u8>>(), vendor in proptest::collection::vec(any::<u8>(), 0..70_000)) {
            let (_, files) = seed(folder(&[("user-data", &user), ("vendor-data", &vendor)]).path());
            prop_assert_eq!((&files[0].1, &files[1].1), (&user, &vendor));
        }
    }
}
