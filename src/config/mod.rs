//! What a run is made of, as plain data: from the command line, from a TOML file, checked. Knows nothing of the rest.

mod budget;
mod devices;
mod file;
mod keyvalue;
mod options;
mod values;

pub use budget::{AddressKind, Budget, BudgetError, Counter, Limit, Slack};
pub use devices::{
    BalloonConfig, DiskConfig, DiskFormat, Forward, NetBackend, NetConfig, RngConfig, ShareConfig, Transport,
    VsockConfig,
};
pub use file::{FileError, read as read_file};
pub use keyvalue::{KeyValueError, parse as parse_key_values};
pub use options::{RunOptions, cache_folder};
pub use values::{ConsoleTarget, Cpus, Memory, Pages, ValueError, parse_duration, parse_size};

use crate::tune::{Tune, TuneError};
use std::path::PathBuf;
use std::time::Duration;
use thiserror::Error;

/// A run's configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RunConfig {
    /// The kernel.
    pub kernel: PathBuf,
    /// The initial RAM disk.
    pub initrd: Option<PathBuf>,
    /// Multiboot modules: file and arguments.
    pub modules: Vec<(PathBuf, String)>,
    /// The kernel command line.
    pub cmdline: String,
    /// What was given of it: what a multiboot program gets, which knows nothing of Linux' parameters.
    pub arguments: String,
    /// Guest memory.
    pub memory: Memory,
    /// vCPUs.
    pub cpus: Cpus,
    /// The four UARTs.
    pub serial: [Option<ConsoleTarget>; 4],
    /// The virtio console, where there is one.
    pub console: Option<ConsoleTarget>,
    /// What carries virtio devices.
    pub transport: Transport,
    /// Disks.
    pub disks: Vec<DiskConfig>,
    /// Network cards.
    pub nets: Vec<NetConfig>,
    /// Entropy.
    pub rng: Option<RngConfig>,
    /// Streams between guest and host.
    pub vsock: Option<VsockConfig>,
    /// A memory balloon.
    pub balloon: Option<BalloonConfig>,
    /// Shared folders.
    pub shares: Vec<ShareConfig>,
    /// The socket by which the running machine is controlled.
    pub api: Option<PathBuf>,
    /// Where a bzImage is unpacked.
    pub unpack: Unpack,
    /// How the kernel is entered.
    pub boot: BootProtocol,
    /// Where unpacked kernels are kept; `None` keeps none.
    pub kernel_cache: Option<PathBuf>,
    /// isa-debug-exit at port 0xf4.
    pub debug_exit: bool,
    /// The test device of kvm-unit-tests.
    pub testdev: bool,
    /// Which MMU KVM must use.
    pub mmu: MmuChoice,
    /// The watchdog at ports 0x441 and 0x443.
    pub watchdog: bool,
    /// MSRs that KVM does not know come to user space.
    pub trap_msrs: bool,
    /// What a reset does.
    pub on_reboot: OnReboot,
    /// The longest that the run may take.
    pub timeout: Option<Duration>,
    /// A pattern that ends the run when it matches a line of the console.
    pub expect: Option<Pattern>,
    /// What is printed about exits after the run.
    pub stats: Option<StatsFormat>,
    /// Where the statistics go; `None`: stderr.
    pub stats_out: Option<PathBuf>,
    /// How much is told about exits.
    pub profile: Option<ProfileLevel>,
    /// Where the profile goes.
    pub profile_out: Option<PathBuf>,
    /// Limits of the numbers of exits.
    pub budget: Option<Budget>,
    /// A profile whose counts are limits as well.
    pub budget_from: Option<PathBuf>,
    /// By how much the counts of `budget_from` may be exceeded.
    pub slack: Slack,
    /// The guest's symbols, where they are not the kernel's own.
    pub symbols: Option<PathBuf>,
    /// What is done against exits.
    pub tune: Tune,
    /// KVM's device.
    pub kvm: PathBuf,
}

impl RunConfig {
    /// How many virtio devices there are to be.
    #[must_use]
    pub fn virtio_devices(&self) -> usize {
        let lists = self.disks.len() + self.nets.len() + self.shares.len();
        let single = [self.rng.is_some(), self.console.is_some(), self.vsock.is_some(), self.balloon.is_some()];
        lists + single.iter().filter(|there| **there).count()
    }
}

/// A regular expression for lines of the console.
#[derive(Clone, Debug)]
pub struct Pattern(pub regex::bytes::Regex);

impl PartialEq for Pattern {
    fn eq(&self, other: &Self) -> bool {
        self.0.as_str() == other.0.as_str()
    }
}

impl Eq for Pattern {}

/// Where a bzImage is unpacked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Unpack {
    /// By hwvmm: the guest enters the kernel itself.
    #[default]
    Host,
    /// By the kernel's own decompressor, in the guest.
    Guest,
}

/// How a kernel is entered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BootProtocol {
    /// PVH for an ELF kernel with its note; Linux' 64-bit protocol else, and for a bzImage.
    #[default]
    Auto,
    /// PVH.
    Pvh,
    /// Linux' 64-bit boot protocol.
    Linux64,
}

/// Which MMU is asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MmuChoice {
    /// What this host's KVM has.
    #[default]
    Auto,
    /// Nested paging: NPT on AMD, EPT on Intel.
    #[value(name = "npt", alias = "ept")]
    #[serde(rename = "npt", alias = "ept")]
    Nested,
    /// Shadow paging.
    Shadow,
}

/// What a guest's reset does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnReboot {
    /// Ends the run with status 32.
    #[default]
    Exit,
    /// Starts the guest again.
    Restart,
}

/// How much `--profile` looks at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ProfileLevel {
    /// Userspace exits: no privileges needed.
    User,
    /// VM exits too, by KVM's tracepoints, where this user may read them.
    Full,
}

/// How statistics are printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum StatsFormat {
    /// Tables.
    Text,
    /// One JSON object on one line.
    Json,
}

/// A configuration that cannot be.
#[derive(Debug, Error)]
pub enum ConfigError {
    /// No kernel.
    #[error("no kernel given: `hwvmm run KERNEL`, or `kernel = \"...\"` in the --config file")]
    NoKernel,
    /// An option's value.
    #[error("--{option} {value}: {source}")]
    Value {
        /// The option's name.
        option: &'static str,
        /// What was given.
        value: String,
        /// What is wrong.
        source: ValueError,
    },
    /// The levers.
    #[error("--tune {0}: {1}")]
    Tune(String, #[source] TuneError),
    /// The pattern is not a regular expression.
    #[error("--expect {0}: not a regular expression")]
    Expect(String, #[source] regex::Error),
    /// A budget.
    #[error("--{0} {1}")]
    Budget(&'static str, String, #[source] BudgetError),
}
