//! What can be wrong with an option.

use super::limits::{MAX_CPUS, MAX_MEMORY_BYTES, MIN_MEMORY_BYTES};
use crate::bounded_read::ReadError;
use crate::tune::TuneError;
use hwvmm_arch::exit_code::Class;
use hwvmm_devices::path_text::PathText as _;
use std::path::PathBuf;
use thiserror::Error;

/// A budget or a slack that cannot be read.
#[derive(Debug, Error)]
pub enum BudgetError {
    /// The name of a limit is not known.
    #[error(
        "unknown budget '{name}'; known are: total, userspace, {}, userspace.REASON (as in userspace.pio_out), and port.N, \
         gpa.N, msr.N, leaf.N, hypercall.N, vector.N, cr.N, dr.N for one port, address, MSR, CPUID leaf, hypercall, vector or register",
        Class::ALL.map(Class::name).join(", ")
    )]
    Name {
        /// The name that was given, which is none of the known ones.
        name: String,
    },
    /// The value of a limit is not a whole number.
    #[error("budget {name}={value}: not a whole number")]
    Value {
        /// Name of the limit.
        name: String,
        /// The value given for it.
        value: String,
    },
    /// The text or the file has no limits.
    #[error("the budget '{0}' has no limits: give NAME=COUNT,..., or a file with such lines")]
    Empty(String),
    /// The file with the limits cannot be read.
    #[error("cannot read the budget {}: {error} (or give NAME=COUNT,...)", .path.shown())]
    Read {
        /// Path of the file.
        path: PathBuf,
        /// Why it cannot be read.
        error: ReadError,
    },
    /// The slack is not a percentage from 0 to 1000.
    #[error("'{0}' is not a percentage from 0% to 1000%, such as 2% or 0.5%")]
    Slack(String),
}

/// A value that an option or one of its keys does not take.
///
/// Each message is complete, with what the source says: the parsers of command line and TOML show no sources.
#[derive(Debug, Error)]
pub enum ValueError {
    /// The value of a key is wrong.
    #[error("{key}: {reason}")]
    Key {
        /// Name of the key.
        key: &'static str,
        /// What is wrong with its value.
        reason: Box<ValueError>,
    },
    /// There is no such key.
    #[error("unknown key '{key}'; the keys are {known}; a comma that belongs to a value is written twice")]
    UnknownKey {
        /// The key that was given.
        key: String,
        /// All keys of the option.
        known: String,
    },
    /// The first item of a list has a key that does not exist, or is a path with an `=`.
    #[error("unknown key '{key}'; the keys are {known}; a path with = is given as {remedy}")]
    KeyOrPath {
        /// The key that was given.
        key: String,
        /// All keys of the option.
        known: String,
        /// The item as the path that it would be.
        remedy: String,
    },
    /// A key without a value.
    #[error("'{0}' is not key=value")]
    NoValue(String),
    /// The key can be given once only.
    #[error("'{0}' is given twice")]
    Twice(&'static str),
    /// A key is missing without which the value has no meaning.
    #[error("it needs {0}")]
    Needs(&'static str),
    /// TOML has a table where the option takes a single value.
    #[error("a table: this option takes a single value, or {{ escaped = \"...\" }}")]
    Table,
    /// The text of `{ escaped = "..." }` in TOML has an escape that does not exist.
    #[error("'{0}' has a backslash that is neither \\xNN, a byte in hexadecimal, nor \\\\, a backslash")]
    Escape(String),
    /// TOML has a number or a boolean where the option takes a string.
    #[error("{0} is not a string: write it in quotes")]
    NotText(String),
    /// The value is not UTF-8, and is no path either.
    #[error("'{0}' is not UTF-8")]
    NotUtf8(String),
    /// The path has no characters.
    #[error("the path is empty")]
    EmptyPath,
    /// The value is none of the words that the key takes.
    #[error("'{value}' is not one of {choices}")]
    Choice {
        /// The value that was given, which is none of the words.
        value: String,
        /// All words, with commas between.
        choices: String,
    },
    /// The value is neither true nor false.
    #[error("'{0}' is not on, off, true or false")]
    Switch(String),
    /// The value is no whole number, or too small or too large.
    #[error("'{value}' is not a whole number from {min} to {max}")]
    Number {
        /// The value as it was given.
        value: String,
        /// The smallest value allowed.
        min: u64,
        /// The largest value allowed.
        max: u64,
    },
    /// The value is not a size.
    #[error("'{0}' is not a size: a whole number with K, M, G or T behind it, such as 512M")]
    Size(String),
    /// The value is not a time.
    #[error("'{0}' is not a time: a number with ms, s, m or h behind it, such as 30s")]
    Time(String),
    /// The size of guest memory is out of bounds.
    #[error(
        "guest memory must be {}M to {}T in whole pages of 4K, and {bytes} bytes is not{}",
        MIN_MEMORY_BYTES >> 20,
        MAX_MEMORY_BYTES >> 40,
        hint_of_unit(*bytes)
    )]
    MemorySize {
        /// The size given, in bytes.
        bytes: u64,
    },
    /// The number of vCPUs is out of bounds.
    #[error("the number of vCPUs must be 1 to {MAX_CPUS}, not '{0}'")]
    Cpus(String),
    /// The topology has another number of threads than there are vCPUs.
    #[error("{sockets} sockets × {cores} cores × {threads} threads is not {cpus} vCPUs")]
    Topology {
        /// Sockets of the machine.
        sockets: u32,
        /// Cores of a socket.
        cores: u32,
        /// Threads of a core.
        threads: u32,
        /// The number of vCPUs that was asked for (`--cpus`).
        cpus: u32,
    },
    /// A device that may pass on nothing.
    #[error("a rate of 0 is not valid: leave it out for no limit")]
    NoRate,
    /// The value is not the MAC address of one card.
    #[error("'{0}' is not a MAC address of one card, such as 52:54:00:12:34:56")]
    Mac(String),
    /// The value cannot be the name of a network interface.
    #[error("'{0}' is not the name of an interface: 1 to 15 characters")]
    Interface(String),
    /// The value does not describe a forwarded port.
    #[error("'{0}' is not a forwarded port, such as hostfwd=tcp:127.0.0.1:2222-:22")]
    Forward(String),
    /// The value does not describe a console.
    #[error("'{0}' is not a console: serial, virtio, virtio=stdio, virtio=file:PATH or virtio=null")]
    Console(String),
    /// The value does not describe a UART.
    #[error("'{0}' is not a serial port: N=stdio, N=file:PATH or N=null, with N from 1 to 4; or none")]
    Serial(String),
    /// The value is not a regular expression.
    #[error("not a regular expression: {0}")]
    Pattern(regex::Error),
    /// The value is not a budget or a slack.
    #[error("{0}")]
    Budget(BudgetError),
    /// The value is not a list of levers.
    #[error("{0}")]
    Tune(TuneError),
}

/// Options that cannot be used together, or without one another.
#[derive(Debug, Error)]
pub enum ConfigError {
    /// No kernel was given.
    #[error(
        "no kernel given: `hwvmm run KERNEL`, `hwvmm run --from SNAPSHOT`, or `kernel = \"...\"` in the --config file"
    )]
    NoKernel,
    /// An option that a snapshot settles.
    #[error("{0} cannot be given with --from: the machine is that of the snapshot; leave it out")]
    NotWithFrom(&'static str),
    /// A run that ends with its snapshot waits for nothing else.
    #[error(
        "{0} cannot be given with --snapshot-at, which ends the run when it has saved the machine: leave one of them out"
    )]
    NotWithSnapshotAt(&'static str),
    /// An option that only a run from a snapshot has.
    #[error("{0} is for a run from a snapshot: give --from DIR, too, or leave it out")]
    OnlyWithFrom(&'static str),
    /// A kernel and an image with one were given.
    #[error("--kernel-from cannot be given with a KERNEL: leave one of them out, or give the image with --disk")]
    TwoKernels,
    /// Something of the image with the kernel was asked for, and the kernel is a file.
    #[error(
        "{option} is for a kernel from a disk image (hwvmm run IMAGE, or --kernel-from IMAGE): {kernel} is none, or cannot be read"
    )]
    NoImage {
        /// The option as it is written, with its hyphens.
        option: &'static str,
        /// The path of the kernel, as shown.
        kernel: String,
    },
    /// An option is about the command that the guest runs, and there is none.
    #[error("{0} is for a guest that runs a command: hwvmm run KERNEL {0} ... -- COMMAND")]
    NeedsCommand(&'static str),
    /// An option and a command exclude each other.
    #[error("{option} cannot be given with a COMMAND: {why}")]
    NotWithCommand {
        /// The option as it is written, with its hyphens.
        option: &'static str,
        /// Why, or what to do.
        why: &'static str,
    },
    /// An option and a template exclude each other.
    #[error("{option} cannot be given with --template: {why}")]
    NotWithTemplate {
        /// The option as it is written, with its hyphens.
        option: &'static str,
        /// Why, or what to do.
        why: &'static str,
    },
    /// A relative path cannot be made absolute.
    #[error("{0}: there is no current folder: give an absolute path")]
    NoCurrentFolder(String),
    /// Two UARTs are connected to the terminal.
    #[error("--serial: ports {0} and {1} cannot both be stdio")]
    TwoOnStdio(usize, usize),
    /// A UART and the virtio console are connected to the terminal.
    #[error(
        "--serial: port {0} cannot be stdio: the virtio console is; give that a file, as in --console virtio=file:PATH"
    )]
    ConsoleTaken(usize),
    /// Two devices, sockets or files have the same name, and one of them would not be found.
    #[error("{what} '{name}' is given twice: {remedy}")]
    Same {
        /// What has the name.
        what: &'static str,
        /// The name that is given twice.
        name: String,
        /// What to do about it.
        remedy: &'static str,
    },
    /// The balloon would leave the guest less than any guest needs.
    #[error(
        "--balloon: {bytes} bytes are more than {max_bytes}, the guest's memory without the {}M that it needs",
        MIN_MEMORY_BYTES >> 20
    )]
    Balloon {
        /// The size given, in bytes.
        bytes: u64,
        /// The largest size for this guest, in bytes.
        max_bytes: u64,
    },
    /// The default of an option cannot be read.
    #[error("the default of an option is wrong: {0}")]
    Default(#[from] ValueError),
}

/// For those who are used to options in MiB: what they meant, if `bytes` is a plausible number of MiB.
fn hint_of_unit(bytes: u64) -> String {
    let plausible = (MIN_MEMORY_BYTES >> 20)..1 << 20;
    if plausible.contains(&bytes) { format!("; {bytes} MiB are written {bytes}M") } else { String::new() }
}
