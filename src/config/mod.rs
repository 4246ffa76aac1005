//! The configuration of a run: options of the command line and of TOML files, read and checked, as plain data.
//!
//! An option is a row of the table in `options`; a value with keys (a disk, a network card) is a row of `spec` for each key.

mod budget;
mod choices;
mod cmdline;
mod command;
mod console;
mod contradictions;
mod devices;
mod error;
mod file;
mod from;
mod given;
mod image;
mod limits;
mod machine;
mod module;
mod options;
mod quote;
mod snapshot_at;
mod spec;
mod task;
mod transport;
mod value;

pub use budget::{AddressSpace, Budget, Counter, Limit, Slack};
pub use choices::{
    BootProtocol, KernelCache, Levers, MmuChoice, OnReboot, ProfileLevel, SandboxMode, StatsFormat, Unpack,
    cache_folder,
};
pub use command::{EnvChoice, PutChoice, ROOT_TAG, Requirement, RootChoice, UserChoice, rw_tag};
pub use console::{ConsoleChoice, ConsoleTarget, Pattern, SerialChoice};
pub use contradictions::SEED_ID;
pub use devices::{
    BalloonConfig, ChangedDisk, DiskConfig, DiskFormat, DiskIo, Forward, MAX_QUEUES, MacAddress, NetBackend, NetConfig,
    Protocol, RngConfig, ShareConfig, Toggle, Transport, VsockBackend, VsockConfig, WriteError,
};
pub use error::{BudgetError, ConfigError, ValueError};
pub use file::{FileError, parse as parse_file, read as read_file};
pub use image::ROOT_DISK;
pub use limits::{MAX_CPUS, MAX_MEMORY_BYTES, MIN_MEMORY_BYTES};
pub use machine::{Cpus, Memory, Pages};
pub use module::ModuleConfig;
pub use options::{RunConfig, RunOptions};
pub use quote::{list_item, toml_escaped};
pub use snapshot_at::{Moment, SnapshotAt};
pub use value::{Value, parse_duration, parse_size};
