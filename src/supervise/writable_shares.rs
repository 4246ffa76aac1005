//! Files of the host that a guest could replace, or has made, in a shared folder that it can write to.
//!
//! Nothing that a guest wrote decides what hwvmm opens. In a writable share this guest, or one before it, can put a symbolic link, a
//! FIFO or another socket in place of any file. So what hwvmm opens, connects to or removes by its path after the guest has run must
//! have no name in such a share, and what it opens before may lead through no link there. A file that itself names files to open
//! must not be in one at all.
//!
//! Folders are compared by device and inode, and by their place in the file system (proc_pid_mountinfo(5)), which bind mounts do not
//! change. This guest does not run yet when all of this is checked; another one that has the same folder meanwhile could still win a
//! race with the check.

use super::mounts::Mounts;
use super::share_tree::{Found, Tree};
use crate::config::{ConsoleTarget, DiskFormat, NetBackend, OnReboot, RunConfig, ShareConfig};
use crate::machine::{Disks, PASST};
use hwvmm_devices::path_text::PathText as _;
use rustix::fs::{Access, access};
use std::path::{Path, PathBuf};
use thiserror::Error;

/// A path and a writable share exclude each other.
#[derive(Debug, Error, PartialEq, Eq)]
#[error(
    "{option} {}: in the folder of the writable --share tag={tag} ({}) {why}: choose a path outside of the share, or share the folder \
     with readonly=on",
    path.shown(), share.shown()
)]
pub struct InWritableShare {
    option: &'static str,
    path: PathBuf,
    tag: String,
    share: PathBuf,
    why: Why,
}

/// Why a path is refused.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
enum Why {
    #[error("the guest could replace it by a link to any file of the host, and hwvmm {0}")]
    Replaced(&'static str),
    #[error("a guest can have written it, and {0}")]
    Written(&'static str),
    #[error("it leads through a symbolic link that a guest can have made, to any file of the host")]
    Link,
    #[error("it is a FIFO, a socket or a device, which a guest can have made")]
    Special,
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

/// What a path must not lead to.
#[derive(Clone, Copy)]
enum Rule {
    /// Anywhere in a writable share.
    Outside(Why),
    /// Through a link in one, or to a special file.
    NoLinks,
}

/// A path that hwvmm uses.
struct Used<'a> {
    option: &'static str,
    path: &'a Path,
    rule: Rule,
}

const CONNECTS: Rule = Rule::Outside(Why::Replaced("connects to sockets there that the guest chooses"));
const REMOVES: Rule = Rule::Outside(Why::Replaced("removes it after the guest has run"));
const AGAIN: Rule = Rule::Outside(Why::Replaced("opens it again at each --on-reboot restart"));
const DECIDES: Rule = Rule::Outside(Why::Written("it decides which files of the host are opened"));
const NAMES_BACKING: Rule = Rule::Outside(Why::Written("it can name any file of the host as its backing file"));
const BACKING: Rule = Rule::Outside(Why::Written("it, or a link in its place, can lead to any file of the host"));
const EXECUTED: Rule = Rule::Outside(Why::Written("hwvmm executes it on the host"));

/// The paths of `config` that are used. The kernel cache is not one of them ([`is_in_writable_share`]), and neither is `--kvm`.
fn used<'a>(config: &'a RunConfig, file: Option<&'a Path>) -> Vec<Used<'a>> {
    let mut all = Vec::new();
    let mut add = |option, path, rule| all.push(Used { option, path, rule });
    let first = if config.on_reboot == OnReboot::Restart { AGAIN } else { Rule::NoLinks };
    file.into_iter().for_each(|path| add("--config", path, DECIDES));
    config.vsock_path().into_iter().for_each(|path| add("--vsock uds=", path, CONNECTS));
    config.api.iter().for_each(|path| add("--api", path, REMOVES));
    add("kernel", &config.kernel, first);
    config.initrd.iter().for_each(|path| add("--initrd", path, first));
    config.module.iter().for_each(|module| add("--module", &module.path, first));
    for disk in &config.disk {
        let names_files = disk.format == DiskFormat::Qcow2;
        add("--disk", &disk.path, if names_files { NAMES_BACKING } else { first });
        disk.data_file.iter().for_each(|path| add("--disk data-file=", path, first));
    }
    config.seed.iter().for_each(|path| add("--seed", path, first));
    config.share.iter().for_each(|share| add("--share path=", &share.path, first));
    let consoles = config.serial.iter().flatten().map(|target| ("--serial", target));
    for (option, target) in consoles.chain(config.console.iter().map(|target| ("--console", target))) {
        if let ConsoleTarget::File(path) = target {
            add(option, path, first);
        }
    }
    // The files of results are open when the guest runs, and those that are read after it can do no harm.
    config.stats_out.iter().for_each(|path| add("--stats-out", path, Rule::NoLinks));
    config.profile_out.iter().for_each(|path| add("--profile-out", path, Rule::NoLinks));
    config.status_file.iter().for_each(|path| add("--status-file", path, Rule::NoLinks));
    config.kernel_log.iter().for_each(|path| add("--kernel-log", path, Rule::NoLinks));
    config.template.iter().for_each(|path| add("--template", path, Rule::NoLinks));
    config.snapshot_at.iter().for_each(|at| add("--snapshot-at dir=", &at.dir, Rule::NoLinks));
    config.put.iter().for_each(|put| add("--put", &put.source, Rule::NoLinks));
    config.modules.iter().for_each(|path| add("--modules", path, Rule::NoLinks));
    config.budget_from.iter().for_each(|path| add("--budget-from", path, Rule::NoLinks));
    config.symbols.iter().for_each(|path| add("--symbols", path, Rule::NoLinks));
    all
}

/// Returns an error if a guest could decide which files of the host the run of `config`, whose options are in `file`, opens, connects
/// to, removes or executes. What cannot be opened is left to the code that opens it.
///
/// # Errors
/// [`WritableShareError`].
pub fn check_writable_shares(config: &RunConfig, file: Option<&Path>) -> Result<(), WritableShareError> {
    let passt = passt(config);
    let passt = passt.iter().map(|path| Used { option: "passt", path, rule: EXECUTED });
    check_paths(config, used(config, file).into_iter().chain(passt))?;
    let disk = config.disk.iter().find(|disk| disk.format == DiskFormat::Qcow2);
    match (config.on_reboot, writable(config).next(), disk) {
        (OnReboot::Restart, Some(share), Some(disk)) => {
            Err(WritableShareError::Backing { disk: disk.path.clone(), tag: share.tag.clone() })
        }
        _ => Ok(()),
    }
}

/// Returns an error if a backing file of an open disk is in a writable share: its header could name any other file.
///
/// # Errors
/// [`WritableShareError::Path`].
pub(super) fn check_backing_files(config: &RunConfig, disks: &Disks) -> Result<(), WritableShareError> {
    let used = disks.backing_files().map(|path| Used { option: "backing file", path, rule: BACKING });
    Ok(check_paths(config, used)?)
}

/// Returns true if files in `folder` can be those of a guest of `config`.
#[must_use]
pub fn is_in_writable_share(config: &RunConfig, folder: &Path) -> bool {
    let inside = folder.join("file");
    check_paths(config, [Used { option: "", path: &inside, rule: DECIDES }].into_iter()).is_err()
}

/// The files that may be executed as passt, as execvp(3) looks for them: those in `PATH` up to the first that can be. At a restart all of
/// them are looked for again.
fn passt(config: &RunConfig) -> Vec<PathBuf> {
    if !config.net.iter().any(|net| matches!(net.backend, NetBackend::User(_))) {
        return Vec::new();
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    passt_in(std::env::split_paths(&path), config.on_reboot)
}

fn passt_in(folders: impl Iterator<Item = PathBuf>, on_reboot: OnReboot) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for path in folders.map(|folder| folder.join(PASST)) {
        let is_last = access(&path, Access::EXEC_OK).is_ok() && path.is_file();
        if is_last || on_reboot == OnReboot::Restart {
            found.push(path);
        }
        if is_last {
            break;
        }
    }
    found
}

fn writable(config: &RunConfig) -> impl Iterator<Item = &ShareConfig> {
    config.share.iter().filter(|share| !share.read_only)
}

fn check_paths<'a>(config: &RunConfig, used: impl Iterator<Item = Used<'a>>) -> Result<(), InWritableShare> {
    if writable(config).next().is_none() {
        return Ok(());
    }
    let mounts = Mounts::read();
    let trees: Vec<_> = writable(config).filter_map(|share| Some((share, Tree::of(&share.path, &mounts)?))).collect();
    for Used { option, path, rule } in used {
        for (share, tree) in &trees {
            let why = match (rule, tree.find(path, &mounts)) {
                (_, Found::Outside) | (Rule::NoLinks, Found::Plain) => continue,
                (Rule::Outside(why), _) => why,
                (Rule::NoLinks, Found::Link) => Why::Link,
                (Rule::NoLinks, Found::Special) => Why::Special,
            };
            let (path, tag, share) = (path.to_path_buf(), share.tag.clone(), share.path.clone());
            return Err(InWritableShare { option, path, tag, share, why });
        }
    }
    Ok(())
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
        let config = config(root, options);
        check_paths(&config, used(&config, None).into_iter())
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
            ("seed = '@/shared/x'", "--seed"),
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
    fn no_link_that_an_earlier_guest_has_left_is_followed() {
        let folder = tree();
        fs::write(folder.path().join("outside/of-the-user"), "").expect("written");
        symlink("../outside/of-the-user", folder.path().join("shared/link")).expect("linked");
        symlink("../outside", folder.path().join("shared/out")).expect("linked");
        fs::write(folder.path().join("shared/plain"), "").expect("written");
        for (options, option) in [
            ("initrd = '@/shared/NAME'", "--initrd"),
            ("module = '@/shared/NAME'", "--module"),
            ("disk = '@/shared/NAME'", "--disk"),
            ("seed = '@/shared/NAME'", "--seed"),
            ("disk = '@/shared/NAME,format=raw'", "--disk"),
            ("disk = '@/outside/x,format=qcow2,data-file=@/shared/NAME'", "--disk data-file="),
            ("serial = '1=file:@/shared/NAME'", "--serial"),
            ("console = 'virtio=file:@/shared/NAME'", "--console"),
            ("stats-out = '@/shared/NAME'", "--stats-out"),
            ("profile-out = '@/shared/NAME'", "--profile-out"),
            ("budget-from = '@/shared/NAME'", "--budget-from"),
            ("symbols = '@/shared/NAME'", "--symbols"),
            ("snapshot-at = 'mark=1,dir=@/shared/NAME'", "--snapshot-at dir="),
        ] {
            for name in ["link", "out/of-the-user", "below/../link"] {
                refused(folder.path(), &options.replace("NAME", name), option);
            }
            for name in ["plain", "new", "below/new"] {
                check(folder.path(), &format!("{SHARE}{}", options.replace("NAME", name))).expect(options);
            }
        }
        let nested = "share = ['tag=a,path=@/shared', 'tag=b,path=@/shared/out,readonly=on']\n";
        let error = check(folder.path(), nested).expect_err("a link");
        assert_eq!((error.option, error.why), ("--share path=", Why::Link));
        let fifo = folder.path().join("shared/fifo");
        rustix::fs::mkfifoat(rustix::fs::CWD, &fifo, rustix::fs::Mode::RUSR).expect("made");
        let error = check(folder.path(), &format!("{SHARE}serial = '1=file:@/shared/fifo'")).expect_err("a FIFO");
        assert_eq!(error.why, Why::Special);
    }

    #[test]
    fn a_kernel_is_not_found_through_a_link_in_the_share() {
        let folder = tree();
        symlink("../outside/kernel", folder.path().join("shared/kernel")).expect("linked");
        let kernel = |share: &str| {
            let mut config = config(folder.path(), share);
            config.kernel = folder.path().join("shared/kernel");
            check_writable_shares(&config, None)
        };
        let error = kernel(SHARE).expect_err("a link").to_string();
        assert!(error.starts_with("kernel ") && error.contains("symbolic link"), "{error}");
        kernel("share = 'tag=a,path=@/shared,readonly=on'\n").expect("a read-only share");
    }

    #[test]
    fn what_decides_about_files_is_not_in_the_share() {
        let folder = tree();
        refused(folder.path(), "disk = '@/shared/x,format=qcow2'", "--disk");
        let file = folder.path().join("shared/config.toml");
        let check = |share: &str| check_writable_shares(&config(folder.path(), share), Some(&file));
        let error = check(SHARE).expect_err("refused").to_string();
        assert!(error.starts_with("--config") && error.contains("decides which files"), "{error}");
        check("share = 'tag=a,path=@/shared,readonly=on'\n").expect("a read-only share");
    }

    #[test]
    fn no_kernel_cache_is_in_the_share() {
        let folder = tree();
        fs::create_dir(folder.path().join("shared/cache")).expect("made");
        let config = config(folder.path(), SHARE);
        for (place, expected) in [
            ("shared", true),
            ("shared/cache", true),
            ("shared/new", true),
            ("link", true),
            ("outside", false),
            ("outside/new", false),
            ("new/cache", false),
        ] {
            assert_eq!(is_in_writable_share(&config, &folder.path().join(place)), expected, "{place}");
        }
    }

    #[test]
    fn passt_is_found_as_execvp_does() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tree();
        let folders = || ["shared", "outside", "more"].map(|name| folder.path().join(name)).into_iter();
        let found = |on_reboot| passt_in(folders(), on_reboot);
        let place = |name: &str| folder.path().join(name).join(PASST);
        assert!(found(OnReboot::Exit).is_empty(), "there is none");
        fs::write(place("shared"), "no program").expect("written");
        fs::write(place("outside"), "").expect("written");
        fs::set_permissions(place("outside"), fs::Permissions::from_mode(0o755)).expect("changed");
        assert_eq!(found(OnReboot::Exit), [place("outside")]);
        assert_eq!(found(OnReboot::Restart), [place("shared"), place("outside")]);
    }

    #[test]
    fn backing_files_are_not_opened_again_beside_a_writable_share() {
        let folder = tree();
        let check = |options: &str| check_writable_shares(&config(folder.path(), options), None);
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
}
