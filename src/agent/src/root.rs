//! The file systems that the command finds.

use crate::instructions::{CommandSpec, Instructions, Root, Task};
use crate::report::{Failure, Stage, kernel_log};
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags, mount, mount_move, unmount};
use std::ffi::{CStr, OsStr, OsString};
use std::fs::{self, DirBuilder, Permissions};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::Path;

/// Where the read-only share is mounted, then the tmpfs that takes what is written, and the overlay of both.
const LOWER: &str = "/hwvmm/lower";
const UPPER: &str = "/hwvmm/upper";
const NEW_ROOT: &str = "/hwvmm/root";
/// What Linux reads ahead of a virtiofs share, in KiB. It would be 128: the programs and libraries that a command maps are larger, and
/// each read is a request to the host.
const READ_AHEAD_KIB: &str = "512";
/// Links that programs expect in /dev, and devtmpfs does not have.
const LINKS: &[(&str, &str)] = &[
    ("/proc/self/fd", "/dev/fd"),
    ("/proc/self/fd/0", "/dev/stdin"),
    ("/proc/self/fd/1", "/dev/stdout"),
    ("/proc/self/fd/2", "/dev/stderr"),
];

/// A file system that is mounted over a folder.
struct Mount<'a> {
    what: &'a str,
    source: &'a OsStr,
    target: &'a Path,
    flags: MountFlags,
    data: Option<&'a CStr>,
}

impl<'a> Mount<'a> {
    fn new(what: &'a str, target: &'a str) -> Self {
        Self { what, source: OsStr::new(what), target: Path::new(target), flags: MountFlags::empty(), data: None }
    }

    fn of(self, source: &'a OsStr) -> Self {
        Self { source, ..self }
    }

    fn with(self, flags: MountFlags, data: Option<&'a CStr>) -> Self {
        Self { flags, data, ..self }
    }

    /// Makes the folder where it is missing, and mounts.
    fn mount(&self) -> Result<(), Failure> {
        let failed = |error: &dyn std::fmt::Display, remedy: &str| {
            Stage::Root
                .failed(format_args!("{} on {}", self.what, self.target.display()), format_args!("{error}{remedy}"))
        };
        make_folder(self.target).map_err(|error| failed(&error, ""))?;
        mount(self.source, self.target, self.what, self.flags, self.data).map_err(|error| {
            let remedy = match (error, self.what) {
                (Errno::NODEV, "virtiofs") => " (the kernel has no driver for it: CONFIG_VIRTIO_FS)",
                (Errno::NODEV, "ext4") => " (the kernel has no driver for it: CONFIG_EXT4_FS)",
                (Errno::NODEV, "overlay") => " (the kernel has no driver for it: CONFIG_OVERLAY_FS)",
                (Errno::NODEV, "devtmpfs") => " (the kernel has no driver for it: CONFIG_DEVTMPFS)",
                (Errno::NODEV, "devpts") => " (the kernel has no driver for it: CONFIG_UNIX98_PTYS)",
                (Errno::NODEV, _) => " (the kernel has no driver for it)",
                (Errno::INVAL | Errno::NOENT, "virtiofs") => {
                    " (no device has this tag: the kernel has no driver for virtio-mmio or virtio-pci: CONFIG_VIRTIO_MMIO, CONFIG_VIRTIO_PCI)"
                }
                _ => "",
            };
            failed(&error, remedy)
        })
    }
}

fn make_folder(path: &Path) -> std::io::Result<()> {
    if path.is_dir() { Ok(()) } else { DirBuilder::new().recursive(true).mode(0o755).create(path) }
}

/// Mounts what the agent itself needs: /proc, /sys and /dev.
pub(crate) fn early_mounts() -> Result<(), Failure> {
    let safe = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    let stage = |failure: Failure| Failure { stage: Stage::Mounts, ..failure };
    Mount::new("devtmpfs", "/dev").with(MountFlags::NOSUID, None).mount().map_err(stage)?;
    Mount::new("proc", "/proc").with(safe, None).mount().map_err(stage)?;
    Mount::new("sysfs", "/sys").with(safe, None).mount().map_err(stage)
}

/// Makes the new root, enters it, and mounts in it what a command expects.
pub(crate) fn enter(instructions: &Instructions) -> Result<(), Failure> {
    match &instructions.root {
        Root::Initramfs => {}
        Root::Share(tag) => mount_share(tag, Path::new(LOWER), MountFlags::RDONLY)?,
        Root::Disk { serial, partition } => mount_disk(serial, *partition)?,
    }
    if instructions.root != Root::Initramfs {
        Mount::new("tmpfs", UPPER).with(MountFlags::empty(), Some(c"mode=0755")).mount()?;
        for folder in ["/hwvmm/upper/files", "/hwvmm/upper/work"] {
            make_folder(Path::new(folder)).map_err(|error| Stage::Root.failed(folder, error))?;
        }
        let data = c"lowerdir=/hwvmm/lower,upperdir=/hwvmm/upper/files,workdir=/hwvmm/upper/work";
        Mount::new("overlay", NEW_ROOT).with(MountFlags::empty(), Some(data)).mount()?;
        change_root()?;
    }
    Mount::new("devpts", "/dev/pts")
        .with(MountFlags::NOSUID | MountFlags::NOEXEC, Some(c"mode=0620,gid=5,ptmxmode=0666"))
        .mount()?;
    let workdir = match &instructions.task {
        Task::Run(spec) => Some(&spec.workdir),
        Task::Wait => None,
    };
    for target in ["/dev/shm", "/tmp", "/run"] {
        // A folder below that the command shall start in, and that the root has, stays in sight.
        if workdir.is_some_and(|workdir| workdir.starts_with(target) && workdir.is_dir()) {
            continue;
        }
        mount_scratch(target)?;
    }
    for share in &instructions.writable {
        mount_share(&share.tag, &share.path, MountFlags::empty())?;
    }
    for (target, link) in LINKS {
        if let Err(error) = rustix::fs::symlink(*target, *link)
            && error != Errno::EXIST
        {
            kernel_log(&format!("{link}: {error}"));
        }
    }
    loopback();
    match &instructions.task {
        Task::Run(spec) => settle(spec),
        Task::Wait => Ok(()),
    }
}

/// Mounts a tmpfs over a folder that every guest has of its own.
fn mount_scratch(target: &str) -> Result<(), Failure> {
    let safe = MountFlags::NOSUID | MountFlags::NODEV;
    let mode = if target == "/run" { c"mode=0755" } else { c"mode=1777" };
    Mount::new("tmpfs", target).with(safe, Some(mode)).mount()
}

/// Makes of the root that of a command which came after [`enter`].
pub(crate) fn settle_late(spec: &CommandSpec) -> Result<(), Failure> {
    for target in ["/tmp", "/run"] {
        // As in `enter`: nothing was written to the tmpfs yet.
        if spec.workdir.starts_with(target) && unmount(target, UnmountFlags::DETACH).is_ok() && !spec.workdir.is_dir() {
            mount_scratch(target)?;
        }
    }
    settle(spec)
}

/// Names the guest, and checks that the command can start in its folder.
fn settle(spec: &CommandSpec) -> Result<(), Failure> {
    // A command may not need the name, so a failure is only logged.
    if let Some(name) = &spec.hostname
        && let Err(error) = rustix::system::sethostname(name.as_encoded_bytes())
    {
        kernel_log(&format!("host name: {error}"));
    }
    if !spec.workdir.is_dir() {
        return Err(Stage::Workdir.failed(spec.workdir.display(), "it is no folder in the guest"));
    }
    Ok(())
}

/// Mounts a virtiofs share, from which Linux then reads ahead more than it would.
fn mount_share(tag: &OsStr, target: &Path, flags: MountFlags) -> Result<(), Failure> {
    Mount { target, ..Mount::new("virtiofs", "") }.of(tag).with(flags, None).mount()?;
    let set = fs::metadata(target).and_then(|root| {
        let (major, minor) = (rustix::fs::major(root.dev()), rustix::fs::minor(root.dev()));
        fs::write(format!("/sys/class/bdi/{major}:{minor}/read_ahead_kb"), READ_AHEAD_KIB)
    });
    // It is slower then.
    if let Err(error) = set {
        kernel_log(&format!("read-ahead of {}: {error}", target.display()));
    }
    Ok(())
}

/// Mounts the file system of a disk, which cannot be written.
fn mount_disk(serial: &OsStr, partition: u32) -> Result<(), Failure> {
    let disk = find_disk(serial).ok_or_else(|| {
        Stage::Root.failed(
            "disk",
            format_args!(
                "none has the serial number {}: the kernel has no driver for it (CONFIG_VIRTIO_BLK)",
                serial.display()
            ),
        )
    })?;
    let mut device = OsString::from("/dev/");
    device.push(disk);
    if partition > 0 {
        device.push(partition.to_string());
    }
    let mount = |data| Mount::new("ext4", LOWER).of(&device).with(MountFlags::RDONLY, data).mount();
    // With a journal that is not empty, which cannot be replayed on a disk that is read-only, only noload mounts it.
    mount(None).or_else(|_| mount(Some(c"noload")))
}

/// The name of the disk with this serial number.
fn find_disk(serial: &OsStr) -> Option<OsString> {
    let disks = fs::read_dir("/sys/block").ok()?.flatten();
    disks.map(|disk| disk.file_name()).find(|name| {
        let read = fs::read(Path::new("/sys/block").join(name).join("serial")).unwrap_or_default();
        read.trim_ascii_end() == serial.as_encoded_bytes()
    })
}

/// Moves /dev, /proc and /sys into the new root, and makes it the root. A root on the initramfs cannot be pivoted
/// (Documentation/filesystems/ramfs-rootfs-initramfs.rst).
fn change_root() -> Result<(), Failure> {
    for from in ["/dev", "/proc", "/sys"] {
        let to = format!("{NEW_ROOT}{from}");
        make_folder(Path::new(&to)).map_err(|error| Stage::Root.failed(&to, error))?;
        mount_move(from, &to).map_err(|error| Stage::Root.failed(&to, error))?;
    }
    let failed = |error: Errno| Stage::Root.failed(NEW_ROOT, error);
    rustix::process::chdir(NEW_ROOT).map_err(failed)?;
    mount_move(".", "/").map_err(failed)?;
    rustix::process::chroot(".").map_err(failed)?;
    rustix::process::chdir("/").map_err(failed)
}

/// Takes the loopback interface up. A command may not need it, so a failure is only logged.
fn loopback() {
    // IFF_UP and IFF_LOOPBACK; a kernel without networks has no such file.
    match fs::write("/sys/class/net/lo/flags", "0x9") {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => kernel_log(&format!("lo: {error}")),
        _ => {}
    }
}

/// Lets every user write to a terminal that the agent made.
pub(crate) fn open_to_all(path: &Path) -> Result<(), Failure> {
    fs::set_permissions(path, Permissions::from_mode(0o666))
        .map_err(|error| Stage::Terminal.failed(path.display(), error))
}
