//! Options that are one of a few words.

use super::error::ValueError;
use super::value::{Digits, Items, Value, choices, utf8};
use crate::tune::Tune;
use std::ffi::OsStr;
use std::path::PathBuf;

/// Who unpacks a bzImage.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Unpack {
    /// hwvmm: the guest enters the unpacked kernel.
    #[default]
    Host,
    /// The kernel's own decompressor, in the guest.
    Guest,
}

/// How a kernel is entered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum BootProtocol {
    /// The 64-bit protocol for a 64-bit Linux; PVH for a 32-bit kernel, or another ELF kernel, that has a PVH note.
    #[default]
    Auto,
    /// PVH (Xen's x86/HVM direct boot ABI).
    Pvh,
    /// The 64-bit boot protocol of Linux.
    Linux64,
}

/// The MMU that KVM must use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum MmuChoice {
    /// The one that this host's KVM uses.
    #[default]
    Auto,
    /// Nested paging: NPT on AMD, EPT on Intel.
    #[value(name = "npt", alias = "ept")]
    Nested,
    /// Shadow paging: KVM itself translates guest virtual addresses (`ept=0` or `npt=0` of its module).
    Shadow,
}

/// How the machine's process is confined while the guest runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum SandboxMode {
    /// A system call that is not permitted ends the run.
    #[default]
    On,
    /// System calls that are not permitted are printed, and allowed.
    Log,
    /// The process is not confined.
    Off,
}

/// What a reset by the guest does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum OnReboot {
    /// The run ends with status 32.
    #[default]
    Exit,
    /// The guest is started again.
    Restart,
}

/// The exits that `--profile` records.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum ProfileLevel {
    /// Userspace exits; needs no privileges.
    User,
    /// VM exits as well, by KVM's tracepoints, if this user may read them.
    Full,
}

/// How statistics are printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum StatsFormat {
    /// Tables for a terminal.
    Text,
    /// One JSON object on one line.
    Json,
}

choices!(Unpack, BootProtocol, MmuChoice, SandboxMode, OnReboot, ProfileLevel, StatsFormat);

/// Where unpacked kernels are kept.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum KernelCache {
    /// In the user's cache folder.
    #[default]
    User,
    /// In this folder, which is made if it does not exist.
    Folder(PathBuf),
    /// Unpacked kernels are not kept.
    Off,
}

impl KernelCache {
    /// Returns the folder; `None` if kernels are not kept.
    #[must_use]
    pub fn folder(self) -> Option<PathBuf> {
        match self {
            Self::User => cache_folder(),
            Self::Folder(path) => Some(path),
            Self::Off => None,
        }
    }
}

impl Value for KernelCache {
    fn parse(text: &OsStr) -> Result<Self, ValueError> {
        if text == "off" { Ok(Self::Off) } else { PathBuf::parse(text).map(Self::Folder) }
    }
}

/// Returns the folder of hwvmm in the user's cache folder (XDG base directory specification); `None` if the environment names
/// no home.
#[must_use]
pub fn cache_folder() -> Option<PathBuf> {
    let set = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let base = set("XDG_CACHE_HOME").or_else(|| set("HOME").map(|home| home.join(".cache")))?;
    Some(base.join("hwvmm"))
}

/// A list of levers (`--tune`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Levers {
    /// The list of all levers is to be printed.
    Help,
    /// Levers and what is asked of them, as `NAME=on|off|auto,...`.
    Set(String),
}

impl Levers {
    /// Sets the levers in `tune`.
    pub(super) fn apply(&self, tune: &mut Tune) -> Result<(), ValueError> {
        match self {
            Self::Help => Ok(()),
            Self::Set(text) => tune.set(text).map_err(ValueError::Tune),
        }
    }
}

/// In TOML also a table: `[tune] busy-poll = "off"`.
impl Value for Levers {
    fn parse(text: &OsStr) -> Result<Self, ValueError> {
        let text = utf8(text)?;
        if text == "help" {
            return Ok(Self::Help);
        }
        Tune::default().set(text).map_err(ValueError::Tune)?;
        Ok(Self::Set(text.to_owned()))
    }

    fn from_items(items: Items) -> Result<Self, ValueError> {
        let mut levers: Vec<(String, Digits)> = items.into_pairs()?;
        // A table has no order: `all` is the base for the others.
        levers.sort_by_key(|(name, _)| name != "all");
        let text: Vec<String> = levers.into_iter().map(|(name, Digits(value))| format!("{name}={value}")).collect();
        Self::parse(OsStr::new(&text.join(",")))
    }

    fn usage() -> Option<String> {
        Some("NAME=on|off|auto,...".into())
    }
}
