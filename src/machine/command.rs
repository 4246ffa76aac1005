//! The initramfs of a guest that runs one command, from the configuration.

use super::drivers::{drivers, links};
use super::image::DiskParts;
use crate::boot::image::{Root, RootUser};
use crate::boot::initramfs::{
    self, AgentLink, AgentTask, CommandSpec, GuestRoot, GuestUser, Initramfs, InitramfsError, InitramfsRequest,
    Instructions, ModuleSource, Put, Signatures, TerminalSize, Variable, WritableShare,
};
use crate::boot::{self, KernelFile};
use crate::bounded_read::{ReadError, read_text};
use crate::config::{ROOT_DISK, ROOT_TAG, RootChoice, RunConfig, UserChoice, rw_tag};
use crate::escape::escape;
use crate::tune::Lever;
use hwvmm_devices::path_text::PathText as _;
use rustix::fs::{MemfdFlags, memfd_create};
use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::Instant;
use thiserror::Error;

/// The largest /etc/passwd that is read.
const PASSWD_BYTES: u64 = 4 << 20;
/// The longest text of an image in a message, in bytes.
const SHOWN_BYTES: usize = 512;
/// A root file system has one of these.
const PARTS_OF_A_ROOT: [&str; 4] = ["bin", "usr/bin", "sbin", "etc"];
/// Programs find it there if the command runs as this user.
const HOME: &str = "HOME";

/// Why a command's guest cannot be prepared.
#[derive(Debug, Error)]
pub enum CommandError {
    /// The initramfs cannot be made.
    #[error(transparent)]
    Initramfs(#[from] InitramfsError),
    /// The folder of `--root` has no root file system.
    #[error(
        "--root {}: it is no root file system: it has none of {}", .0.shown(), PARTS_OF_A_ROOT.join(", ")
    )]
    NoRoot(PathBuf),
    /// The root is neither a folder nor a disk.
    #[error("--root {}: it is no folder", .0.shown())]
    RootIsFile(PathBuf),
    /// A folder cannot be opened.
    #[error("{option} {}: cannot open it", .path.shown())]
    Folder {
        /// The option that names it.
        option: &'static str,
        /// The folder on the host, as it was given.
        path: PathBuf,
        /// The error of the system call.
        source: io::Error,
    },
    /// `--workdir` is a relative path, and there is no current folder.
    #[error("--workdir {}: it is no absolute path", .0.shown())]
    Workdir(PathBuf),
    /// The root's list of users cannot be read.
    #[error("--user {name}: cannot read {}", .path.shown())]
    Passwd {
        /// The user's name, as it was given.
        name: String,
        /// The /etc/passwd of the root that the command gets, on the host.
        path: PathBuf,
        /// The error of the system call.
        source: ReadError,
    },
    /// The list of users in a disk's root cannot be read.
    #[error("--user {name}: cannot read /etc/passwd of the image ({why}): give numbers, as in --user 1000:1000")]
    ImagePasswd {
        /// The user's name, as it was given.
        name: String,
        /// What is wrong.
        why: String,
    },
    /// The root has no such user.
    #[error("--user {0}: there is no such user in the root's /etc/passwd: give numbers, as in --user 1000:1000")]
    NoUser(String),
    /// The initramfs cannot be kept in memory.
    #[error("cannot keep the initramfs in memory")]
    Memory(#[source] io::Error),
}

/// The initramfs of a command.
pub(super) struct CommandInitramfs {
    /// The archive (cpio, newc).
    pub(super) file: File,
    /// If the agent fails: what may have been missing.
    pub(super) hint: Option<String>,
    /// What the agent reaches the host by, where the kernel's modules say that.
    pub(super) link: Option<AgentLink>,
}

/// Makes the initramfs for the command of `config`; `parts` is what it has from disks, and `terminal` is the size of the user's, if the
/// command gets one.
pub(super) fn make(
    config: &RunConfig,
    kernel: &KernelFile,
    parts: &DiskParts,
    terminal: Option<TerminalSize>,
) -> Result<CommandInitramfs, CommandError> {
    let began = Instant::now();
    let instructions = instructions(config, parts.root.as_ref(), terminal)?;
    let put: Vec<Put> =
        config.put.iter().map(|put| Put { source: put.source.clone(), target: put.target.clone() }).collect();
    let made = initramfs::build(&InitramfsRequest {
        kernel,
        modules: match &parts.modules {
            Some(copied) => ModuleSource::Copied(copied),
            None => ModuleSource::Host(config.modules.as_deref()),
        },
        drivers: &drivers(config),
        links: links(config),
        instructions: &instructions,
        put: &put,
        isolation: boot::isolation(config.sandbox),
    })?;
    let file = memfd_create("initramfs", MemfdFlags::CLOEXEC).map(File::from);
    let mut file = file.map_err(|error| CommandError::Memory(error.into()))?;
    file.write_all(&made.archive).map_err(CommandError::Memory)?;
    let from = made.modules_folder.as_deref().map_or_else(|| "none".into(), |folder| folder.shown().to_string());
    // scripts/check-figures reads the time.
    let ms = began.elapsed().as_secs_f64() * 1e3;
    log::info!("initramfs: {} bytes in {ms:.1} ms; modules: {} from {from}", made.archive.len(), made.modules.len());
    Ok(CommandInitramfs { file, hint: hint(&made, kernel, parts), link: made.link })
}

/// The message with the command of `config`, for the agent of a guest that waits for it; `terminal` is the size of the user's, if the command
/// gets one.
///
/// # Errors
/// [`CommandError`], such as for a user whom the root does not have.
pub fn late_command(config: &RunConfig, terminal: Option<TerminalSize>) -> Result<Vec<u8>, CommandError> {
    let host_root = root_folder(&config.root)?;
    let of_image = RootUser::Unreadable("a run from a template does not read it".into());
    let (user, home) = match config.root {
        RootChoice::Image(_) => user_of(&config.user, &of_image)?,
        _ => user(&config.user, host_root)?,
    };
    Ok(command_spec(config, host_root, GuestIdentity { user, home }, terminal)?.message()?)
}

/// Who a command runs as.
struct GuestIdentity {
    user: GuestUser,
    /// The home folder, where the root's /etc/passwd was read.
    home: Option<OsString>,
}

fn command_spec(
    config: &RunConfig,
    host_root: Option<&Path>,
    identity: GuestIdentity,
    terminal: Option<TerminalSize>,
) -> Result<CommandSpec, CommandError> {
    Ok(CommandSpec {
        command: config.command.clone(),
        environment: environment(config, identity.home, terminal),
        workdir: workdir(config, host_root)?,
        user: identity.user,
        hostname: None,
        terminal,
    })
}

/// What to do about a driver that is missing.
fn hint(made: &Initramfs, kernel: &KernelFile, parts: &DiskParts) -> Option<String> {
    if made.modules_folder.is_some() {
        return None;
    }
    if parts.no_modules.is_some() {
        return parts.no_modules.clone();
    }
    let release = initramfs::kernel_release(kernel).ok()??;
    Some(format!(
        "no modules of kernel {release} were found beside it or in /lib/modules: if its drivers are modules, name their \
         folder with --modules DIR"
    ))
}

fn instructions(
    config: &RunConfig,
    root: Option<&Root>,
    terminal: Option<TerminalSize>,
) -> Result<Instructions, CommandError> {
    let host_root = root_folder(&config.root)?;
    let absolute = |option: &'static str, path: &Path| {
        std::path::absolute(path).map_err(|source| CommandError::Folder { option, path: path.to_owned(), source })
    };
    let mut writable = Vec::new();
    for (number, path) in config.rw.iter().enumerate() {
        let path = absolute("--rw", path)?;
        std::fs::read_dir(&path).map_err(|source| CommandError::Folder {
            option: "--rw",
            path: path.clone(),
            source,
        })?;
        writable.push(WritableShare { tag: rw_tag(number).into(), path });
    }
    let (user, home) = match root {
        Some(root) => user_of(&config.user, &root.user)?,
        None => user(&config.user, host_root)?,
    };
    let guest_root = match (host_root, root) {
        (Some(_), _) => GuestRoot::Share(ROOT_TAG.into()),
        (None, Some(root)) => {
            GuestRoot::Disk { serial: ROOT_DISK.into(), partition: root.partition.unwrap_or_default() }
        }
        (None, None) => GuestRoot::Initramfs,
    };
    let unchecked = config.tune.wants(Lever::UncheckedModules);
    Ok(Instructions {
        signatures: if unchecked { Signatures::LeftOut } else { Signatures::Checked },
        root: guest_root,
        writable,
        task: match &config.template {
            Some(_) => AgentTask::Wait,
            None => AgentTask::Run(command_spec(config, host_root, GuestIdentity { user, home }, terminal)?),
        },
    })
}

/// The folder of this host that is the guest's root; `None` where a disk or the initramfs is.
fn root_folder(root: &RootChoice) -> Result<Option<&Path>, CommandError> {
    let folder = match root {
        RootChoice::Host => return Ok(Some(Path::new("/"))),
        RootChoice::None | RootChoice::KernelImage | RootChoice::Image(_) => return Ok(None),
        RootChoice::Folder(folder) => folder,
    };
    let metadata = std::fs::metadata(folder).map_err(|source| CommandError::Folder {
        option: "--root",
        path: folder.clone(),
        source,
    })?;
    if !metadata.is_dir() {
        return Err(CommandError::RootIsFile(folder.clone()));
    }
    if !PARTS_OF_A_ROOT.iter().any(|part| folder.join(part).is_dir()) {
        return Err(CommandError::NoRoot(folder.clone()));
    }
    Ok(Some(folder))
}

/// The folder that the command starts in: the current one goes along where the root has it.
fn workdir(config: &RunConfig, root: Option<&Path>) -> Result<PathBuf, CommandError> {
    if let Some(given) = &config.workdir {
        return if given.is_absolute() { Ok(given.clone()) } else { Err(CommandError::Workdir(given.clone())) };
    }
    let current = std::env::current_dir().ok();
    let is_there = |current: &PathBuf| {
        let writable =
            config.rw.iter().any(|path| std::path::absolute(path).is_ok_and(|path| current.starts_with(path)));
        let below = current.strip_prefix("/").unwrap_or(current);
        writable || root.is_some_and(|root| root.join(below).is_dir())
    };
    Ok(current.filter(is_there).unwrap_or_else(|| PathBuf::from("/")))
}

fn environment(config: &RunConfig, home: Option<OsString>, terminal: Option<TerminalSize>) -> Vec<Variable> {
    let host = |name: &OsString| std::env::var_os(name).map(|value| Variable { name: name.clone(), value });
    let given = config.env.iter().filter_map(|env| match &env.value {
        Some(value) => Some(Variable { name: env.name.clone(), value: value.clone() }),
        None => host(&env.name),
    });
    let mut variables: Vec<Variable> = Vec::new();
    // The last one of a name wins.
    for variable in given {
        variables.retain(|before| before.name != variable.name);
        variables.push(variable);
    }
    let has = |variables: &[Variable], name: &str| variables.iter().any(|variable| variable.name == name);
    if terminal.is_some() && !has(&variables, "TERM") {
        variables.extend(host(&"TERM".into()));
    }
    if !has(&variables, HOME) {
        variables.extend(home.map(|value| Variable { name: HOME.into(), value }));
    }
    variables
}

/// The ids of the command's user, and its home where the root's /etc/passwd was read.
fn user(choice: &UserChoice, root: Option<&Path>) -> Result<(GuestUser, Option<OsString>), CommandError> {
    let name = match choice {
        UserChoice::Ids { uid, gid } => return Ok((GuestUser { uid: *uid, gid: *gid }, None)),
        UserChoice::Name(name) => name,
    };
    let path = root.ok_or_else(|| CommandError::NoUser(name.clone()))?.join("etc/passwd");
    let text =
        read_text(&path, PASSWD_BYTES).map_err(|source| CommandError::Passwd { name: name.clone(), path, source })?;
    passwd_entry(&text, name).ok_or_else(|| CommandError::NoUser(name.clone()))
}

/// As [`user`], with what the root of a disk has for the user.
fn user_of(choice: &UserChoice, found: &RootUser) -> Result<(GuestUser, Option<OsString>), CommandError> {
    let name = match choice {
        UserChoice::Ids { uid, gid } => return Ok((GuestUser { uid: *uid, gid: *gid }, None)),
        UserChoice::Name(name) => name,
    };
    match found {
        RootUser::Line(line) => passwd_entry(line, name).ok_or_else(|| CommandError::NoUser(name.clone())),
        RootUser::None | RootUser::NotAsked => Err(CommandError::NoUser(name.clone())),
        RootUser::Unreadable(why) => {
            Err(CommandError::ImagePasswd { name: name.clone(), why: escape(why, SHOWN_BYTES) })
        }
    }
}

/// Finds a user in the text of passwd(5).
fn passwd_entry(text: &str, name: &str) -> Option<(GuestUser, Option<OsString>)> {
    let fields = text.lines().map(|line| line.split(':').collect::<Vec<_>>());
    let entry = fields.into_iter().find(|fields| fields.first() == Some(&name))?;
    let id = |index: usize| entry.get(index)?.parse().ok();
    let home = entry.get(5).filter(|home| home.starts_with('/')).map(OsString::from);
    Some((GuestUser { uid: id(2)?, gid: id(3)? }, home))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::boot::image::ChosenBy;
    use crate::config::RunOptions;

    fn config(text: &str) -> RunConfig {
        let options: RunOptions = toml::from_str(&format!("kernel = 'k'\ncommand = ['a']\n{text}")).expect("TOML");
        options.into_config().expect("valid")
    }

    /// What the command of the instructions is.
    fn command_of(made: Instructions) -> CommandSpec {
        match made.task {
            AgentTask::Run(command) => command,
            AgentTask::Wait => panic!("no command"),
        }
    }

    fn failure(text: &str) -> String {
        instructions(&config(text), None, None).expect_err("refused").to_string()
    }

    #[test]
    fn a_root_on_a_disk_is_found_by_its_serial_number() {
        let image = RunConfig { root: RootChoice::Image("i".into()), ..config("") };
        let line = RootUser::Line("mail:x:8:12::/var/mail:/bin/false".into());
        let root = Root {
            partition: Some(2),
            others: Vec::new(),
            chosen_by: ChosenBy::Order,
            needs_recovery: false,
            user: line,
        };
        let named = RunConfig { user: UserChoice::Name("mail".into()), ..image };
        let made = instructions(&named, Some(&root), None).expect("made");
        assert_eq!(made.root, GuestRoot::Disk { serial: ROOT_DISK.into(), partition: 2 });
        let command = command_of(made);
        assert_eq!((command.user, command.workdir.as_path()), (GuestUser { uid: 8, gid: 12 }, Path::new("/")));
        let with =
            |user| instructions(&named, Some(&Root { user, ..root.clone() }), None).expect_err("refused").to_string();
        assert!(with(RootUser::None).contains("no such user"));
        let unread = with(RootUser::Unreadable("it has 9999999 bytes\u{1b}".into()));
        assert!(unread.contains("it has 9999999 bytes") && !unread.contains('\u{1b}'), "{unread}");
    }

    #[test]
    fn a_root_that_is_none_is_refused() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().display().to_string();
        assert!(failure(&format!("root = '{path}'")).contains("no root file system"));
        assert!(failure(&format!("root = '{path}/missing'")).contains("missing: cannot open it"));
        std::fs::write(folder.path().join("image"), "").expect("written");
        assert!(failure(&format!("root = '{path}/image'")).contains("no folder"));
        std::fs::create_dir(folder.path().join("bin")).expect("made");
        let made = instructions(&config(&format!("root = '{path}'")), None, None).expect("a root");
        assert_eq!(made.root, GuestRoot::Share(ROOT_TAG.into()));
        assert_eq!(command_of(made).workdir, Path::new("/"), "the root has no such folder");
        assert!(failure("rw = ['/missing']").contains("--rw /missing"));
    }

    #[test]
    fn the_current_folder_goes_along_where_the_root_has_it() {
        let current = std::env::current_dir().expect("a folder");
        let workdir = |config: &RunConfig| command_of(instructions(config, None, None).expect("made")).workdir;
        assert_eq!(workdir(&config("")), current);
        assert_eq!(workdir(&config("root = 'none'")), Path::new("/"));
        let shared = config(&format!("root = 'none'\nrw = ['{}']", current.display()));
        assert_eq!(workdir(&shared), current);
        assert_eq!(workdir(&config("workdir = '/srv'")), Path::new("/srv"));
        assert!(failure("workdir = 'srv'").contains("absolute"));
    }

    #[test]
    fn a_command_for_a_template_is_the_same_as_that_of_a_boot() {
        let text = "command = ['sh', '-c', 'x']\nenv = ['A=1']\nworkdir = '/srv'\nuser = '5:6'";
        let read = |first: &str| toml::from_str::<RunOptions>(&format!("{first}\n{text}")).expect("TOML");
        let (late, boots) = (read("from = 't'").into_config(), read("kernel = 'k'").into_config());
        let size = Some(TerminalSize { rows: 24, columns: 80 });
        let booted = command_of(instructions(&boots.expect("valid"), None, size).expect("made"));
        let late = late.expect("valid");
        assert_eq!(late_command(&late, size).expect("made"), booted.message().expect("bytes"));
        let waits = toml::from_str::<RunOptions>("kernel = 'k'\ntemplate = 't'").expect("TOML").into_config();
        let waits = instructions(&waits.expect("valid"), None, None).expect("made");
        assert_eq!((waits.task, waits.root), (AgentTask::Wait, GuestRoot::Share(ROOT_TAG.into())));
        let named = RunConfig { user: UserChoice::Name("mail".into()), root: RootChoice::Image("i".into()), ..late };
        assert!(late_command(&named, None).expect_err("refused").to_string().contains("give numbers"));
    }

    #[test]
    fn users_are_found_by_name() {
        let text = "root:x:0:0:root:/root:/bin/sh\nmail:x:8:12:mail:/var/mail:/bin/false\nbad:x:y:z\n";
        let (found, home) = passwd_entry(text, "mail").expect("there");
        assert_eq!((found, home), (GuestUser { uid: 8, gid: 12 }, Some("/var/mail".into())));
        assert!(passwd_entry(text, "bad").is_none() && passwd_entry(text, "missing").is_none());
        assert!(failure("root = 'none'\nuser = 'mail'").contains("give numbers"));
    }

    #[test]
    fn the_last_variable_of_a_name_wins() {
        let made = instructions(&config("env = ['A=1', 'A=2', 'HWVMM_NOT_THERE', 'PATH']"), None, None).expect("made");
        let made = command_of(made);
        let of = |name: &'static str| -> Vec<OsString> {
            made.environment.iter().filter(|one| one.name == name).map(|one| one.value.clone()).collect()
        };
        assert_eq!(of("A"), ["2"]);
        assert_eq!(of("PATH"), [std::env::var_os("PATH").expect("there")]);
        assert!(of("HWVMM_NOT_THERE").is_empty());
    }
}
