//! Files of the host that a guest could replace, by a shared folder that it can write to.
//!
//! What is opened before the guest first runs is what the user named. What hwvmm opens, connects to or removes by its path later must
//! not have a name in a writable share: there a guest can put a symbolic link, a FIFO or another socket in its place.
//!
//! Folders are compared by device and inode, and by their place in the file system (proc_pid_mountinfo(5)), which bind mounts do not
//! change. Nothing here is a race with a guest: it runs before the first start, and looks at each folder that the path leads through.

use crate::config::{ConsoleTarget, DiskFormat, OnReboot, RunConfig};
use hwvmm_devices::path_text::PathText as _;
use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, PROC_SUPER_MAGIC, fstat, fstatfs, openat, readlinkat, statat};
use rustix::io::Errno;
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Component, Path, PathBuf};
use thiserror::Error;

/// Symbolic links that are followed in a path, as in Linux.
const MAX_LINKS: usize = 40;
/// Folders between a folder and the root that are looked at.
const MAX_DEPTH: usize = 4096;

/// A path and a writable share exclude each other.
#[derive(Debug, Error, PartialEq, Eq)]
#[error(
    "{option} {}: it is in the folder of the writable --share tag={tag} ({}), where the guest could replace it by a link to any \
     file of the host, and hwvmm {use_}: choose a path outside of the share, or share the folder with readonly=on",
    path.shown(), share.shown()
)]
pub struct InWritableShare {
    option: &'static str,
    path: PathBuf,
    tag: String,
    share: PathBuf,
    use_: &'static str,
}

/// An option and a writable share exclude each other.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum WritableShareError {
    /// A path is in the share.
    #[error(transparent)]
    Path(#[from] InWritableShare),
    /// A qcow2 image may name files in the share.
    #[error(
        "--disk {} with format=qcow2: backing files that it names are opened again at each --on-reboot restart, and the guest could \
         replace one in the folder of the writable --share tag={tag}: share the folder with readonly=on, or use a disk of another format",
        disk.shown()
    )]
    Backing {
        /// Path of the disk.
        disk: PathBuf,
        /// Tag of the share.
        tag: String,
    },
}

/// A path that is used after the guest has run.
struct Later<'a> {
    option: &'static str,
    path: &'a Path,
    use_: &'static str,
}

const CONNECTS: &str = "connects to sockets there that the guest chooses";
const REMOVES: &str = "removes it after the guest has run";
const AGAIN: &str = "opens it again at each --on-reboot restart";

/// The paths of `config` that are used after the guest has run. `--symbols` is not one of them: that file is only read, by a process
/// without rights, and what is read is shown to the user alone. The files of `--stats-out` and `--profile-out` are open by then.
fn used_later(config: &RunConfig) -> Vec<Later<'_>> {
    let mut all = Vec::new();
    let mut add = |option, path, use_| all.push(Later { option, path, use_ });
    if let Some(path) = config.vsock_path() {
        add("--vsock uds=", path, CONNECTS);
    }
    if let Some(path) = &config.api {
        add("--api", path, REMOVES);
    }
    if config.on_reboot != OnReboot::Restart {
        return all;
    }
    add("kernel", &config.kernel, AGAIN);
    config.initrd.iter().for_each(|path| add("--initrd", path, AGAIN));
    config.module.iter().for_each(|module| add("--module", &module.path, AGAIN));
    for disk in &config.disk {
        add("--disk", &disk.path, AGAIN);
        disk.data_file.iter().for_each(|path| add("--disk data-file=", path, AGAIN));
    }
    config.share.iter().for_each(|share| add("--share path=", &share.path, AGAIN));
    let consoles = config.serial.iter().flatten().map(|target| ("--serial", target));
    for (option, target) in consoles.chain(config.console.iter().map(|target| ("--console", target))) {
        if let ConsoleTarget::File(path) = target {
            add(option, path, AGAIN);
        }
    }
    all
}

/// Returns an error if the guest of `config` could replace a file that hwvmm opens, connects to or removes after the guest has run.
/// What cannot be opened is left to the code that opens it.
///
/// # Errors
/// [`WritableShareError`].
pub fn check_writable_shares(config: &RunConfig) -> Result<(), WritableShareError> {
    check_paths(config)?;
    let share = config.share.iter().find(|share| !share.read_only);
    let disk = config.disk.iter().find(|disk| disk.format == DiskFormat::Qcow2);
    match (config.on_reboot, share, disk) {
        (OnReboot::Restart, Some(share), Some(disk)) => {
            Err(WritableShareError::Backing { disk: disk.path.clone(), tag: share.tag.clone() })
        }
        _ => Ok(()),
    }
}

fn check_paths(config: &RunConfig) -> Result<(), InWritableShare> {
    let mut writable = config.share.iter().filter(|share| !share.read_only).peekable();
    if writable.peek().is_none() {
        return Ok(());
    }
    let later = used_later(config);
    if later.is_empty() {
        return Ok(());
    }
    let mounts = Mounts::read();
    for share in writable {
        let Some(tree) = Tree::of(&share.path, &mounts) else { continue };
        for Later { option, path, use_ } in &later {
            if tree.names(path, &mounts) {
                let (path, tag, share) = (path.to_path_buf(), share.tag.clone(), share.path.clone());
                return Err(InWritableShare { option, path, tag, share, use_ });
            }
        }
    }
    Ok(())
}

/// A mount of this process' namespace.
struct Mount {
    id: u64,
    /// Device numbers, as text.
    device: Vec<u8>,
    /// What of the file system is mounted.
    root: PathBuf,
    point: PathBuf,
}

/// The mounts of this process' namespace.
struct Mounts(Vec<Mount>);

impl Mounts {
    fn read() -> Self {
        let text = std::fs::read("/proc/thread-self/mountinfo").unwrap_or_default();
        Self(text.split(|byte| *byte == b'\n').filter_map(Mount::parse).collect())
    }

    /// Returns the device of the file system of the open folder, and its path in that file system.
    fn place(&self, folder: &OwnedFd) -> Option<Place> {
        let number = folder.as_raw_fd();
        let info = std::fs::read_to_string(format!("/proc/thread-self/fdinfo/{number}")).ok()?;
        let id = info.lines().find_map(|line| line.strip_prefix("mnt_id:"))?.trim().parse::<u64>().ok()?;
        let mount = self.0.iter().find(|mount| mount.id == id)?;
        let path = std::fs::read_link(format!("/proc/thread-self/fd/{number}")).ok()?;
        let below = path.strip_prefix(&mount.point).ok()?;
        Some(Place { device: mount.device.clone(), path: mount.root.join(below) })
    }
}

impl Mount {
    /// Reads a line of mountinfo.
    fn parse(line: &[u8]) -> Option<Self> {
        let mut words = line.split(|byte| *byte == b' ');
        let id = std::str::from_utf8(words.next()?).ok()?.parse().ok()?;
        let device = words.nth(1)?.to_vec();
        let mut path = || words.next().map(unescape);
        Some(Self { id, device, root: path()?, point: path()? })
    }
}

/// Returns a path of mountinfo, where a space, for example, is `\040`.
fn unescape(mut text: &[u8]) -> PathBuf {
    let mut bytes = Vec::new();
    while let Some((&first, rest)) = text.split_first() {
        let octal = rest.get(..3).and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok());
        match (first, octal) {
            (b'\\', Some(byte)) => {
                bytes.push(byte);
                text = rest.get(3..).unwrap_or_default();
            }
            _ => {
                bytes.push(first);
                text = rest;
            }
        }
    }
    OsString::from_vec(bytes).into()
}

/// A folder by its place in a file system.
struct Place {
    device: Vec<u8>,
    path: PathBuf,
}

/// A folder that a guest can write to, with all that is below it.
struct Tree {
    /// Device and inode.
    file: (u64, u64),
    /// The folder, and what is mounted below it.
    places: Vec<Place>,
}

fn open_folder(at: impl AsFd, name: &Path) -> rustix::io::Result<OwnedFd> {
    openat(at, name, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
}

fn file(folder: &OwnedFd) -> rustix::io::Result<(u64, u64)> {
    fstat(folder).map(|stat| (stat.st_dev, stat.st_ino))
}

impl Tree {
    fn of(path: &Path, mounts: &Mounts) -> Option<Self> {
        let folder = open_folder(CWD, path).ok()?;
        let shown = std::fs::read_link(format!("/proc/thread-self/fd/{}", folder.as_raw_fd())).ok();
        let below = mounts.0.iter().filter(|mount| shown.as_ref().is_some_and(|shown| mount.point.starts_with(shown)));
        let below = below.map(|mount| Place { device: mount.device.clone(), path: mount.root.clone() });
        Some(Self { file: file(&folder).ok()?, places: mounts.place(&folder).into_iter().chain(below).collect() })
    }

    /// Returns true if the folder is in this tree.
    fn has(&self, folder: &OwnedFd, mounts: &Mounts) -> bool {
        self.is_above(folder).unwrap_or(false)
            || mounts.place(folder).is_some_and(|place| {
                self.places.iter().any(|tree| tree.device == place.device && place.path.starts_with(&tree.path))
            })
    }

    /// Returns true if a parent of the folder, or the folder itself, is this one.
    fn is_above(&self, folder: &OwnedFd) -> rustix::io::Result<bool> {
        let mut now = file(folder)?;
        let mut parent = folder.try_clone().map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))?;
        for _ in 0..MAX_DEPTH {
            if now == self.file {
                return Ok(true);
            }
            parent = open_folder(&parent, Path::new(".."))?;
            let above = file(&parent)?;
            if above == now {
                break;
            }
            now = above;
        }
        Ok(false)
    }

    /// Returns true if a name that `path` leads through, or its last one, is looked up in a folder of this tree.
    fn names(&self, path: &Path, mounts: &Mounts) -> bool {
        self.walk(path, mounts).unwrap_or(false)
    }

    /// As [`Tree::names`]; an error where the path cannot be followed, such as a file that does not exist yet, in a folder that is
    /// not there.
    fn walk(&self, path: &Path, mounts: &Mounts) -> io::Result<bool> {
        let mut left = names_of(path);
        let mut links = 0;
        let mut folder = open_folder(CWD, Path::new("."))?;
        while let Some(name) = left.pop() {
            if name == "/" {
                folder = open_folder(CWD, Path::new("/"))?;
                continue;
            }
            // The guest cannot move the root of the share, so it does not choose what is above.
            let above_root = name == ".." && file(&folder)? == self.file;
            if !above_root && self.has(&folder, mounts) {
                return Ok(true);
            }
            let kind = match statat(&folder, &name, AtFlags::SYMLINK_NOFOLLOW) {
                Ok(stat) => FileType::from_raw_mode(stat.st_mode),
                Err(Errno::NOENT) if left.is_empty() => return Ok(false),
                Err(error) => return Err(error.into()),
            };
            match kind {
                FileType::Symlink if fstatfs(&folder)?.f_type == PROC_SUPER_MAGIC => {
                    // It may be an open file (/proc/self/fd), for which no name is looked up.
                    match open_folder(&folder, Path::new(&name)) {
                        Ok(next) => folder = next,
                        Err(Errno::NOTDIR) => return Ok(false),
                        Err(error) => return Err(error.into()),
                    }
                }
                FileType::Symlink => {
                    links += 1;
                    if links > MAX_LINKS {
                        return Err(Errno::LOOP.into());
                    }
                    let target = readlinkat(&folder, &name, Vec::new())?;
                    left.extend(names_of(Path::new(OsStr::from_bytes(target.as_bytes()))));
                }
                FileType::Directory => folder = open_folder(&folder, Path::new(&name))?,
                _ => return Ok(false),
            }
        }
        Ok(false)
    }
}

/// The names in a path, the first one last.
fn names_of(path: &Path) -> Vec<OsString> {
    let names = path.components().filter(|component| *component != Component::CurDir);
    names.map(|component| component.as_os_str().to_owned()).rev().collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::RunOptions;
    use crate::sandbox::test_mounts::{own_mounts, skipped};
    use std::fs;
    use std::os::unix::fs::symlink;

    /// A folder with `outside`, `shared/below` and a link `link` to `shared/below`.
    fn tree() -> tempfile::TempDir {
        let folder = tempfile::tempdir().expect("a folder");
        for name in ["outside", "shared/below"] {
            fs::create_dir_all(folder.path().join(name)).expect("made");
        }
        symlink("shared/below", folder.path().join("link")).expect("linked");
        folder
    }

    fn config(root: &Path, options: &str) -> RunConfig {
        let text = format!("kernel = '@/outside/kernel'\n{options}").replace('@', root.to_str().expect("UTF-8"));
        toml::from_str::<RunOptions>(&text).expect("TOML").into_config().expect("valid")
    }

    fn check(root: &Path, options: &str) -> Result<(), InWritableShare> {
        check_paths(&config(root, options))
    }

    const SHARE: &str = "share = 'tag=a,path=@/shared'\n";

    fn refused(root: &Path, options: &str, option: &str) {
        let error = check(root, &format!("{SHARE}{options}")).expect_err(options);
        assert_eq!(error.option, option);
        let text = error.to_string();
        assert!(text.starts_with(option) && text.contains("--share tag=a") && text.contains("readonly=on"), "{text}");
        check(root, &format!("share = 'tag=a,path=@/shared,readonly=on'\n{options}")).expect("a read-only share");
        check(root, options).expect("no share");
    }

    #[test]
    fn what_is_used_after_the_guest_ran_is_refused() {
        let folder = tree();
        for place in ["shared/x", "shared/below/x", "link/x", "outside/../shared/x", "outside/../link/../x"] {
            refused(folder.path(), &format!("api = '@/{place}'"), "--api");
            refused(folder.path(), &format!("vsock = 'cid=3,uds=@/{place}'"), "--vsock uds=");
        }
        symlink("../shared/x", folder.path().join("outside/file")).expect("linked");
        refused(folder.path(), "api = '@/outside/file'", "--api");
    }

    #[test]
    fn a_link_in_the_share_that_leads_out_of_it_is_in_the_share() {
        let folder = tree();
        symlink("../outside", folder.path().join("shared/out")).expect("linked");
        refused(folder.path(), "api = '@/shared/out/file'", "--api");
    }

    #[test]
    fn what_is_opened_again_is_refused_with_restarts_only() {
        let folder = tree();
        fs::create_dir(folder.path().join("shared/inner")).expect("made");
        for (options, option) in [
            ("initrd = '@/shared/x'", "--initrd"),
            ("module = '@/shared/x'", "--module"),
            ("disk = '@/shared/x'", "--disk"),
            ("disk = '@/outside/x,format=qcow2,data-file=@/shared/x'", "--disk data-file="),
            ("serial = '1=file:@/shared/x'", "--serial"),
            ("console = 'virtio=file:@/shared/x'", "--console"),
        ] {
            refused(folder.path(), &format!("{options}\non-reboot = 'restart'"), option);
            check(folder.path(), &format!("{SHARE}{options}")).expect("opened once");
        }
        let nested = "share = ['tag=a,path=@/shared', 'tag=b,path=@/shared/inner,readonly=on']\n";
        check(folder.path(), nested).expect("opened once");
        let error = check(folder.path(), &format!("{nested}on-reboot = 'restart'")).expect_err("nested");
        assert_eq!(error.option, "--share path=");
    }

    #[test]
    fn backing_files_are_not_opened_again_beside_a_writable_share() {
        let folder = tree();
        let check = |options: &str| check_writable_shares(&config(folder.path(), options));
        let (disk, restart) = ("disk = '@/outside/x,format=qcow2'\n", "on-reboot = 'restart'\n");
        let error = check(&format!("{SHARE}{disk}{restart}")).expect_err("refused").to_string();
        assert!(error.contains("/outside/x") && error.contains("tag=a") && error.contains("readonly=on"), "{error}");
        for options in [
            format!("{SHARE}{disk}"),
            format!("{disk}{restart}"),
            format!("{SHARE}{restart}disk = '@/outside/x'"),
            format!("share = 'tag=a,path=@/shared,readonly=on'\n{disk}{restart}"),
        ] {
            check(&options).expect(&options);
        }
    }

    #[test]
    fn what_is_outside_is_allowed() {
        let folder = tree();
        fs::write(folder.path().join("shared-not"), "").expect("written");
        for options in [
            "api = '@/outside/x'",
            "stats-out = '@/shared/x'",
            "api = '@/shared/../outside/x'",
            "api = '@/shared-not'",
            "api = '/dev/stderr'",
            "api = '/proc/self/fd/2'",
            "api = '@/x'\nvsock = 'cid=3,uds=@/outside/x'",
            "symbols = '@/shared/System.map'\ndisk = '@/shared/x'",
            "disk = '@/outside/x'\nserial = '1=file:@/outside/x'\non-reboot = 'restart'",
        ] {
            check(folder.path(), &format!("{SHARE}{options}")).expect(options);
        }
    }

    #[test]
    fn a_share_of_the_root_has_everything() {
        let folder = tree();
        let error = check(folder.path(), "share = 'tag=a,path=/'\napi = '@/outside/x'").expect_err("in it");
        assert_eq!(error.option, "--api");
        check(folder.path(), "share = 'tag=a,path=/,readonly=on'\napi = '@/outside/x'").expect("read-only");
    }

    #[test]
    fn bind_mounts_are_seen_through() {
        if !rustix::process::geteuid().is_root() {
            return skipped("bind mounts are seen through", "it needs root");
        }
        std::thread::scope(|scope| scope.spawn(with_bind_mounts).join().expect("no panic"));
    }

    /// In a thread with a mount namespace of its own.
    fn with_bind_mounts() {
        use rustix::mount::mount_bind;
        let folder = tree();
        let path = |name: &str| folder.path().join(name);
        for name in ["bound", "outside/data", "outside/more", "shared/mounted"] {
            fs::create_dir(path(name)).expect("made");
        }
        own_mounts();
        // A folder of the share under another name, and a folder that the guest sees in the share.
        mount_bind(path("shared/below"), path("bound")).expect("mounted");
        mount_bind(path("outside/data"), path("shared/mounted")).expect("mounted");
        for place in ["bound/x", "outside/data/x"] {
            refused(folder.path(), &format!("api = '@/{place}'"), "--api");
        }
        check(folder.path(), &format!("{SHARE}api = '@/outside/more/x'")).expect("outside");
    }

    #[test]
    fn paths_of_mountinfo_are_read() {
        let line = br"36 35 98:0 /mnt1\040x /mnt2\134y rw,noatime master:1 - ext3 /dev/root rw";
        let mount = Mount::parse(line).expect("a mount");
        assert_eq!((mount.id, &mount.device[..]), (36, &b"98:0"[..]));
        assert_eq!((mount.root, mount.point), ("/mnt1 x".into(), r"/mnt2\y".into()));
    }
}
