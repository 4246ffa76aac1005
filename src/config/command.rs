//! The one command that a guest runs (`hwvmm run KERNEL -- COMMAND`), and what it finds there.

use super::choices::OnReboot;
use super::console::Pattern;
use super::devices::{ShareConfig, VsockBackend, VsockConfig};
use super::error::{ConfigError, ValueError};
use super::module::ModuleConfig;
use super::value::{Value, choices};
use hwvmm_devices::path_text::PathText as _;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// The tag of the share that is the guest's root.
pub const ROOT_TAG: &str = "hwvmm-root";
/// The tags of the folders of `--rw` begin with this; their number follows.
const RW_TAG: &str = "hwvmm-rw";
/// The context ID of a guest whose vsock device has the command's streams alone.
const CID: u32 = 3;

/// The root file system that a command finds (`--root`).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum RootChoice {
    /// That of the host.
    #[default]
    Host,
    /// The initramfs, with the files of `--put` alone.
    None,
    /// The disk image with the kernel. In a [`RunConfig`](super::RunConfig) it is an `Image`.
    KernelImage,
    /// A folder of the host.
    Folder(PathBuf),
    /// A disk image.
    Image(PathBuf),
}

impl Value for RootChoice {
    fn parse(text: &OsStr) -> Result<Self, ValueError> {
        match text.as_bytes() {
            b"host" => Ok(Self::Host),
            b"none" => Ok(Self::None),
            b"image" => Ok(Self::KernelImage),
            _ => PathBuf::parse(text).map(Self::Folder),
        }
    }
}

/// An environment variable of a command (`--env`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EnvChoice {
    /// The variable's name, without `=`.
    pub name: OsString,
    /// Its value; `None`: that of the host, if it has one.
    pub value: Option<OsString>,
}

impl Value for EnvChoice {
    fn parse(text: &OsStr) -> Result<Self, ValueError> {
        let bytes = text.as_bytes();
        let at = bytes.iter().position(|byte| *byte == b'=');
        let (name, value) = bytes.split_at(at.unwrap_or(bytes.len()));
        if name.is_empty() {
            return Err(ValueError::Needs("NAME or NAME=VALUE"));
        }
        let value = at.map(|_| OsStr::from_bytes(value.get(1..).unwrap_or_default()).to_owned());
        Ok(Self { name: OsStr::from_bytes(name).to_owned(), value })
    }
}

/// Who a command runs as (`--user`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum UserChoice {
    /// By numbers; without a group it is that with the user's number.
    Ids {
        /// The numeric user ID.
        uid: u32,
        /// The numeric group ID.
        gid: u32,
    },
    /// By the name in the root's /etc/passwd.
    Name(String),
}

impl Default for UserChoice {
    fn default() -> Self {
        Self::Ids { uid: 0, gid: 0 }
    }
}

impl Value for UserChoice {
    const NUMBER: bool = true;

    fn parse(text: &OsStr) -> Result<Self, ValueError> {
        let needs = ValueError::Needs("a NAME, or numbers: UID or UID:GID, each below 4294967295");
        let Some(text) = text.to_str().filter(|text| !text.is_empty()) else { return Err(needs) };
        let number = |digits: &str| {
            digits
                .bytes()
                .all(|byte| byte.is_ascii_digit())
                .then(|| digits.parse().ok())
                .flatten()
                // All ones mean no user (setresuid(2)).
                .filter(|id| *id != u32::MAX)
        };
        if !text.starts_with(|first: char| first.is_ascii_digit()) {
            return if text.contains([':', '\n', '\0']) { Err(needs) } else { Ok(Self::Name(text.to_owned())) };
        }
        let (uid, gid) = text.split_once(':').unwrap_or((text, text));
        number(uid).zip(number(gid)).map(|(uid, gid)| Self::Ids { uid, gid }).ok_or(needs)
    }
}

/// A file or a folder of the host that is put into the guest's initramfs (`--put`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PutChoice {
    /// The file or folder on the host.
    pub source: PathBuf,
    /// In the guest: an absolute path.
    pub target: PathBuf,
}

impl Value for PutChoice {
    fn parse(text: &OsStr) -> Result<Self, ValueError> {
        let bytes = text.as_bytes();
        let at = bytes.windows(2).rposition(|pair| pair == b":/");
        let (source, target) = bytes.split_at(at.ok_or(ValueError::Needs("SRC:DST, where DST begins with /"))?);
        let target = target.get(1..).unwrap_or_default();
        Ok(Self { source: PathBuf::parse(OsStr::from_bytes(source))?, target: OsStr::from_bytes(target).into() })
    }
}

/// What this host must have (`--require`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Requirement {
    /// A KVM that uses the processor's virtualization extensions, and does not emulate the guest's instructions.
    Hardware,
}

choices!(Requirement);

/// An absolute path, as the guest has to have it. A relative one is of the current folder.
fn absolute(path: &Path) -> Result<PathBuf, ConfigError> {
    std::path::absolute(path).map_err(|_| ConfigError::NoCurrentFolder(path.shown().to_string()))
}

/// What the agent in a guest is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum AgentTask {
    /// There is no agent.
    None,
    /// It runs a command.
    Command,
    /// It waits for the commands of later runs (`--template`).
    Template,
}

/// The options that are about a command, as given.
pub(super) struct CommandOptions<'a> {
    pub(super) task: AgentTask,
    pub(super) root: Option<&'a RootChoice>,
    pub(super) rw: &'a [PathBuf],
}

impl CommandOptions<'_> {
    /// The shares of the machine: those that were given, and those of the command.
    pub(super) fn shares(&self, given: &[ShareConfig]) -> Result<Vec<ShareConfig>, ConfigError> {
        let mut shares = given.to_vec();
        if self.task == AgentTask::None {
            return Ok(shares);
        }
        let root = match self.root.unwrap_or(&RootChoice::Host) {
            RootChoice::Host => Some(PathBuf::from("/")),
            RootChoice::None | RootChoice::KernelImage | RootChoice::Image(_) => None,
            RootChoice::Folder(path) => Some(path.clone()),
        };
        let share = |tag: String, path, read_only| ShareConfig { tag, path, read_only, privileged_files: false };
        shares.extend(root.map(|path| share(ROOT_TAG.to_owned(), path, true)));
        for (number, path) in self.rw.iter().enumerate() {
            shares.push(share(rw_tag(number), absolute(path)?, false));
        }
        Ok(shares)
    }

    /// The vsock device: that which was given, or one with the command's streams alone.
    pub(super) fn vsock(&self, given: Option<&VsockConfig>) -> Option<VsockConfig> {
        let own = || VsockConfig { cid: CID, backend: VsockBackend::Streams };
        given.cloned().or_else(|| (self.task != AgentTask::None).then(own))
    }
}

/// The tag of the folder of `--rw` with this number.
#[must_use]
pub fn rw_tag(number: usize) -> String {
    format!("{RW_TAG}{number}")
}

/// The options that mean nothing without a command, or nothing with one.
pub(super) struct CommandRelated<'a> {
    pub(super) task: AgentTask,
    pub(super) command: &'a [OsString],
    pub(super) from: Option<&'a Path>,
    pub(super) expect: Option<&'a Pattern>,
    pub(super) api: Option<&'a Path>,
    pub(super) root: &'a RootChoice,
    pub(super) rw: &'a [PathBuf],
    pub(super) env: &'a [EnvChoice],
    pub(super) workdir: Option<&'a Path>,
    pub(super) user: &'a UserChoice,
    pub(super) put: &'a [PutChoice],
    pub(super) modules: Option<&'a Path>,
    pub(super) tty: bool,
    pub(super) kernel_log: Option<&'a Path>,
    pub(super) initrd: Option<&'a Path>,
    pub(super) on_reboot: OnReboot,
    pub(super) vsock: Option<&'a VsockConfig>,
    pub(super) module: &'a [ModuleConfig],
}

/// Refuses options that mean nothing without a command, or nothing with one.
pub(super) fn check(config: &CommandRelated<'_>) -> Result<(), ConfigError> {
    if config.task == AgentTask::None {
        let given = [
            ("--root", *config.root != RootChoice::default()),
            ("--rw", !config.rw.is_empty()),
            ("--env", !config.env.is_empty()),
            ("--workdir", config.workdir.is_some()),
            ("--user", *config.user != UserChoice::default()),
            ("--put", !config.put.is_empty()),
            ("--modules", config.modules.is_some()),
            ("--tty", config.tty),
            ("--kernel-log", config.kernel_log.is_some()),
        ];
        return match given.into_iter().find(|(_, given)| *given) {
            Some((option, _)) => Err(ConfigError::NeedsCommand(option)),
            None => Ok(()),
        };
    }
    let refused = [
        ("--initrd", config.initrd.is_some(), "hwvmm makes the initramfs; --put SRC:DST adds files to it"),
        ("--on-reboot restart", config.on_reboot == OnReboot::Restart, "a command has one status, and runs once"),
        (
            "--vsock vhost=on",
            config.vsock.is_some_and(|vsock| vsock.backend == VsockBackend::Vhost),
            "the command's streams go by hwvmm's own vsock device: use uds=PATH",
        ),
        ("--module", !config.module.is_empty(), "modules of multiboot kernels are no part of it"),
    ];
    if let Some((option, _, why)) = refused.into_iter().find(|(_, given, _)| *given) {
        return Err(ConfigError::NotWithCommand { option, why });
    }
    match config.task {
        AgentTask::Template => check_template(config),
        AgentTask::Command if config.from.is_some() => check_late(config),
        AgentTask::Command | AgentTask::None => Ok(()),
    }
}

/// Refuses what is for the runs from a template, and what a template cannot have.
fn check_template(config: &CommandRelated<'_>) -> Result<(), ConfigError> {
    let later = "it is for the runs from the template, as in hwvmm run --from DIR ... -- COMMAND";
    let refused = [
        ("a COMMAND", !config.command.is_empty(), later),
        ("--env", !config.env.is_empty(), later),
        ("--workdir", config.workdir.is_some(), later),
        ("--user", *config.user != UserChoice::default(), later),
        ("--tty", config.tty, later),
        ("--rw", !config.rw.is_empty(), "what a guest has open in a folder that can be written is not saved"),
        (
            "--api",
            config.api.is_some(),
            "the run ends by itself, and a snapshot from before that would have a guest without a command",
        ),
        ("--expect", config.expect.is_some(), "the run ends when the guest is ready for a command"),
    ];
    match refused.into_iter().find(|(_, given, _)| *given) {
        Some((option, _, why)) => Err(ConfigError::NotWithTemplate { option, why }),
        None => Ok(()),
    }
}

/// Refuses what a guest that has booted already cannot get any more.
fn check_late(config: &CommandRelated<'_>) -> Result<(), ConfigError> {
    let refused =
        [("--rw", !config.rw.is_empty()), ("--put", !config.put.is_empty()), ("--modules", config.modules.is_some())];
    match refused.into_iter().find(|(_, given)| *given) {
        Some((option, _)) => Err(ConfigError::NotWithFrom(option)),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{ConsoleTarget, RunConfig, RunOptions};

    fn parse<T: Value>(text: &str) -> Result<T, ValueError> {
        T::parse(OsStr::new(text))
    }

    fn config(text: &str) -> Result<RunConfig, ConfigError> {
        let options: RunOptions = toml::from_str(&format!("kernel = 'k'\n{text}")).expect("valid TOML");
        options.into_config()
    }

    #[test]
    fn variables_have_a_name() {
        let of = |text| parse::<EnvChoice>(text).map(|env| (env.name, env.value));
        assert_eq!(of("A").expect("a name"), ("A".into(), None));
        assert_eq!(of("A=b=c").expect("both"), ("A".into(), Some("b=c".into())));
        assert_eq!(of("A=").expect("both"), ("A".into(), Some("".into())));
        assert!(of("").is_err() && of("=b").is_err());
    }

    #[test]
    fn users_are_names_or_numbers() {
        assert_eq!(parse::<UserChoice>("1000").expect("a number"), UserChoice::Ids { uid: 1000, gid: 1000 });
        assert_eq!(parse::<UserChoice>("0:5").expect("two"), UserChoice::Ids { uid: 0, gid: 5 });
        assert_eq!(parse::<UserChoice>("mail").expect("a name"), UserChoice::Name("mail".into()));
        for bad in ["", "1:", "1:x", "1x", "4294967295", "4294967296", "a:b", "1:2:3"] {
            assert!(parse::<UserChoice>(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn files_to_put_have_an_absolute_target() {
        let put = parse::<PutChoice>("a:b:/c").expect("both");
        assert_eq!((put.source, put.target), ("a:b".into(), "/c".into()));
        for bad in ["a", "a:b", ":/b", ""] {
            assert!(parse::<PutChoice>(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_command_brings_its_devices() {
        let with = config("command = ['sh', '-c', 'x']\nrw = ['/srv']\nshare = ['tag=a,path=b']").expect("valid");
        let shares: Vec<_> = with.share.iter().map(|share| (share.tag.as_str(), share.read_only)).collect();
        assert_eq!(shares, [("a", false), (ROOT_TAG, true), ("hwvmm-rw0", false)]);
        assert_eq!(with.vsock, Some(VsockConfig { cid: CID, backend: VsockBackend::Streams }));
        let own = config("command = 'sh'\nroot = 'none'\nvsock = 'cid=9,uds=v'").expect("valid");
        assert_eq!(own.vsock.map(|vsock| vsock.cid), Some(9));
        assert!(own.share.is_empty());
        let without = config("").expect("valid");
        assert!(without.share.is_empty() && without.vsock.is_none());
    }

    #[test]
    fn options_that_mean_nothing_are_refused() {
        for text in ["rw = ['/srv']", "root = 'none'", "tty = true", "user = 5", "put = ['a:/b']", "kernel-log = 'f'"] {
            let error = config(text).expect_err("no command").to_string();
            assert!(error.contains("-- COMMAND"), "{error}");
            config(&format!("command = 'sh'\n{text}")).expect("with a command");
        }
        for text in ["initrd = 'i'", "on-reboot = 'restart'", "vsock = 'cid=3,vhost=on'", "serial = ['1=stdio']"] {
            let error = config(&format!("command = 'sh'\n{text}")).expect_err("with a command").to_string();
            assert!(error.contains("COMMAND"), "{error}");
        }
    }

    #[test]
    fn a_template_is_a_machine_for_commands_without_one() {
        let made =
            config("template = 't'\nput = ['a:/b']\nmodules = 'm'\nroot = '/srv'\nkernel-log = 'l'").expect("valid");
        assert!(made.has_agent() && !made.has_command());
        assert_eq!(made.share.iter().map(|share| share.tag.as_str()).collect::<Vec<_>>(), [ROOT_TAG]);
        assert_eq!(made.vsock, Some(VsockConfig { cid: CID, backend: VsockBackend::Streams }));
        assert_eq!(made.serial[0], Some(ConsoleTarget::Log));
        for text in [
            "env = ['A=1']",
            "workdir = '/'",
            "user = 5",
            "tty = true",
            "rw = ['/srv']",
            "expect = 'x'",
            "command = 'sh'",
            "initrd = 'i'",
            "on-reboot = 'restart'",
            "api = 's'",
        ] {
            let error = config(&format!("template = 't'\n{text}")).expect_err("refused").to_string();
            let option = text.split(' ').next().unwrap_or_default();
            assert!(error.contains("--template") || error.contains(option), "{text}: {error}");
        }
        let from = toml::from_str::<RunOptions>("from = 's'\ntemplate = 't'").expect("TOML").into_config();
        assert!(from.expect_err("refused").to_string().contains("--template"));
    }

    #[test]
    fn a_run_from_a_template_has_a_command() {
        let config = |text: &str| {
            toml::from_str::<RunOptions>(&format!("from = 's'\ncommand = ['sh']\n{text}")).expect("TOML").into_config()
        };
        let late = config("env = ['A=1']\nworkdir = '/'\nuser = 5\ntty = true\nroot = '/srv'").expect("valid");
        assert!(late.has_command() && late.has_agent() && late.share.len() == 1);
        for text in ["rw = ['/srv']", "put = ['a:/b']", "modules = 'm'", "kernel = 'k'"] {
            let error = config(text).expect_err("refused").to_string();
            assert!(error.contains("--from"), "{text}: {error}");
        }
    }

    #[test]
    fn a_command_of_the_command_line_replaces_that_of_the_file() {
        let read = |text: &str| toml::from_str::<RunOptions>(text).expect("TOML");
        let file = read("kernel = 'k'\ncommand = ['sh', '-c', 'x']");
        let joined = read("command = ['true']").or(file.clone()).into_config().expect("valid");
        assert_eq!(joined.command, ["true"]);
        let joined = RunOptions::default().or(file).into_config().expect("valid");
        assert_eq!(joined.command, ["sh", "-c", "x"]);
    }

    #[test]
    fn the_log_of_the_kernel_is_not_on_stdout() {
        let plain = config("command = 'sh'").expect("valid");
        assert_eq!(plain.serial[0], Some(ConsoleTarget::Log));
        assert!(plain.kernel_cmdline().contains("console=ttyS0") && plain.kernel_cmdline().ends_with(" quiet"));
        let file = config("command = 'sh'\nkernel-log = 'f'").expect("valid");
        assert!(!file.kernel_cmdline().contains("quiet"), "the file has all of it");
        let virtio = config("command = 'sh'\nconsole = 'virtio'").expect("valid");
        assert_eq!((virtio.console, &virtio.serial[0]), (Some(ConsoleTarget::Log), &None));
    }
}
