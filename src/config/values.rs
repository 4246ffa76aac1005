//! Values of options: sizes, times, memory, vCPUs, serial ports.

use super::keyvalue::{self, KeyValueError};
use std::path::PathBuf;
use std::time::Duration;
use thiserror::Error;

/// The smallest guest memory, in bytes.
pub(super) const MIN_MEMORY_BYTES: u64 = 16 << 20;
/// The largest, in bytes.
pub(super) const MAX_MEMORY_BYTES: u64 = 1 << 42;
/// The most vCPUs.
pub(super) const MAX_CPUS: u32 = 254;
const PAGE_BYTES: u64 = 4096;

/// A value that cannot be.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum ValueError {
    /// A malformed list.
    #[error(transparent)]
    List(#[from] KeyValueError),
    /// Not a size.
    #[error("'{0}' is not a size: a whole number with K, M, G or T behind it, such as 512M")]
    Size(String),
    /// Memory out of bounds.
    #[error("guest memory must be 16M to 4T in whole pages of 4K, and {0} bytes is not")]
    MemorySize(u64),
    /// Not one of the words it can be.
    #[error("{key} is one of {choices}, not '{value}'")]
    Choice {
        /// The key.
        key: &'static str,
        /// What it can be.
        choices: &'static str,
        /// What was given.
        value: String,
    },
    /// Not a number of vCPUs.
    #[error("the number of vCPUs must be 1 to {MAX_CPUS}, not '{0}'")]
    Cpus(String),
    /// The topology does not multiply.
    #[error("{sockets} sockets × {cores} cores × {threads} threads is not {cpus} vCPUs")]
    Topology {
        /// Sockets.
        sockets: u32,
        /// Cores in a socket.
        cores: u32,
        /// Threads in a core.
        threads: u32,
        /// vCPUs asked for.
        cpus: u32,
    },
    /// Not a time.
    #[error("'{0}' is not a time: a number with ms, s, m or h behind it, such as 30s")]
    Time(String),
    /// A number out of bounds.
    #[error("{key} must be {from} to {to}, not '{value}'")]
    Number {
        /// The key.
        key: &'static str,
        /// The smallest.
        from: u32,
        /// The largest.
        to: u32,
        /// What was given.
        value: String,
    },
    /// Something is missing.
    #[error("it needs {0}")]
    Needs(&'static str),
    /// Not a MAC address.
    #[error("'{0}' is not a MAC address of one card, such as 52:54:00:12:34:56")]
    Mac(String),
    /// Not an interface's name.
    #[error("'{0}' is not the name of an interface: 1 to 15 characters")]
    Interface(String),
    /// Not a forwarded port.
    #[error("'{0}' is not a forwarded port, such as hostfwd=tcp:127.0.0.1:2222-:22")]
    Forward(String),
    /// Not a console.
    #[error("'{0}' is not a console: serial, virtio, virtio=stdio, virtio=file:PATH or virtio=null")]
    Console(String),
    /// Not a serial port.
    #[error("'{0}' is not a serial port: N=stdio, N=file:PATH or N=null, with N from 1 to 4; or none")]
    Serial(String),
    /// Two ports on one terminal.
    #[error("serial ports {0} and {1} cannot both be stdio")]
    TwoOnStdio(usize, usize),
    /// The terminal has the virtio console already.
    #[error(
        "serial port {0} cannot be stdio: the virtio console is; give that a file, as in --console virtio=file:PATH"
    )]
    ConsoleTaken(usize),
}

/// How guest memory is backed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Pages {
    /// Small pages, and transparent huge pages asked for.
    #[default]
    Transparent,
    /// Small pages only.
    Small,
    /// hugetlbfs pages of 2 MiB.
    Huge2M,
    /// hugetlbfs pages of 1 GiB.
    Huge1G,
}

impl Pages {
    /// The size of an explicit huge page in bytes.
    #[must_use]
    pub fn huge_bytes(self) -> Option<u64> {
        match self {
            Self::Transparent | Self::Small => None,
            Self::Huge2M => Some(2 << 20),
            Self::Huge1G => Some(1 << 30),
        }
    }
}

/// Guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memory {
    /// Size in bytes.
    pub bytes: u64,
    /// Backing.
    pub pages: Pages,
    /// Fill all pages before the guest runs.
    pub prefault: bool,
}

impl Default for Memory {
    fn default() -> Self {
        Self { bytes: 512 << 20, pages: Pages::Transparent, prefault: false }
    }
}

impl Memory {
    /// Reads `SIZE[,hugepages=thp|off|2M|1G][,prefault=on|off]`.
    ///
    /// # Errors
    /// Where it is malformed or out of bounds.
    pub fn parse(text: &str) -> Result<Self, ValueError> {
        let mut memory = Self::default();
        for (key, value) in keyvalue::parse(text, Some("size"), &["size", "hugepages", "prefault"])? {
            match key {
                "size" => memory.bytes = parse_size(value)?,
                "hugepages" => memory.pages = parse_pages(value)?,
                _ => memory.prefault = parse_switch("prefault", value)?,
            }
        }
        let in_bounds = (MIN_MEMORY_BYTES..=MAX_MEMORY_BYTES).contains(&memory.bytes);
        if !in_bounds || !memory.bytes.is_multiple_of(PAGE_BYTES) {
            return Err(ValueError::MemorySize(memory.bytes));
        }
        Ok(memory)
    }
}

fn parse_pages(value: &str) -> Result<Pages, ValueError> {
    Ok(match value {
        "thp" | "on" => Pages::Transparent,
        "off" => Pages::Small,
        "2M" | "2m" => Pages::Huge2M,
        "1G" | "1g" => Pages::Huge1G,
        _ => {
            return Err(ValueError::Choice {
                key: "hugepages",
                choices: "thp (the default), off, 2M, 1G",
                value: value.to_owned(),
            });
        }
    })
}

pub(super) fn parse_switch(key: &'static str, value: &str) -> Result<bool, ValueError> {
    match value {
        "on" => Ok(true),
        "off" => Ok(false),
        _ => Err(ValueError::Choice { key, choices: "on, off", value: value.to_owned() }),
    }
}

/// Reads a size in bytes: `1G`, `512M`, `512MiB`, `65536`.
///
/// # Errors
/// Where it is not a size or does not fit into 64 bits.
pub fn parse_size(text: &str) -> Result<u64, ValueError> {
    let error = || ValueError::Size(text.to_owned());
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let shift = match unit.to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kib" => 10,
        "m" | "mib" => 20,
        "g" | "gib" => 30,
        "t" | "tib" => 40,
        _ => return Err(error()),
    };
    let number: u64 = number.parse().map_err(|_| error())?;
    number.checked_mul(1 << shift).ok_or_else(error)
}

/// Reads a time: `30s`, `500ms`, `2m`, `1h`; a bare number is seconds.
///
/// # Errors
/// Where it is not a time.
pub fn parse_duration(text: &str) -> Result<Duration, ValueError> {
    let error = || ValueError::Time(text.to_owned());
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let seconds = match unit {
        "ms" => 0.001,
        "" | "s" => 1.0,
        "m" | "min" => 60.0,
        "h" => 3600.0,
        _ => return Err(error()),
    };
    let number: f64 = number.parse().map_err(|_| error())?;
    Duration::try_from_secs_f64(number * seconds).ok().filter(|time| !time.is_zero()).ok_or_else(error)
}

/// vCPUs and how they are spread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cpus {
    /// Sockets.
    pub sockets: u32,
    /// Cores in a socket.
    pub cores: u32,
    /// Threads in a core.
    pub threads: u32,
}

impl Default for Cpus {
    fn default() -> Self {
        Self { sockets: 1, cores: 1, threads: 1 }
    }
}

impl Cpus {
    /// The number of vCPUs.
    #[must_use]
    pub fn count(&self) -> u32 {
        self.sockets * self.cores * self.threads
    }

    /// Reads `N[,sockets=S][,cores=C][,threads=T]`; what is not given follows from the rest.
    ///
    /// # Errors
    /// Where it is malformed, out of bounds, or does not multiply.
    pub fn parse(text: &str) -> Result<Self, ValueError> {
        let (mut cpus, mut sockets, mut cores, mut threads) = (None, None, None, None);
        for (key, value) in keyvalue::parse(text, Some("cpus"), &["cpus", "sockets", "cores", "threads"])? {
            let number = value.parse().ok().filter(|n| (1..=MAX_CPUS).contains(n));
            let number = Some(number.ok_or_else(|| ValueError::Cpus(value.to_owned()))?);
            match key {
                "cpus" => cpus = number,
                "sockets" => sockets = number,
                "cores" => cores = number,
                _ => threads = number,
            }
        }
        let threads = threads.unwrap_or(1);
        let wanted = cpus.unwrap_or(sockets.unwrap_or(1) * cores.unwrap_or(1) * threads);
        // What remains is cores; with the cores given, sockets.
        let (sockets, cores) = match (sockets, cores) {
            (Some(sockets), Some(cores)) => (sockets, cores),
            (None, Some(cores)) => ((wanted / (cores * threads)).max(1), cores),
            (sockets, None) => {
                let sockets = sockets.unwrap_or(1);
                (sockets, (wanted / (sockets * threads)).max(1))
            }
        };
        let product = u64::from(sockets) * u64::from(cores) * u64::from(threads);
        if product != u64::from(wanted) {
            return Err(ValueError::Topology { sockets, cores, threads, cpus: wanted });
        }
        if wanted > MAX_CPUS {
            return Err(ValueError::Cpus(wanted.to_string()));
        }
        Ok(Self { sockets, cores, threads })
    }
}

/// What a console is connected to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ConsoleTarget {
    /// The terminal: stdin and stdout.
    Stdio,
    /// A file for its output.
    File(PathBuf),
    /// Nothing.
    Null,
}

impl ConsoleTarget {
    fn parse(text: &str) -> Option<Self> {
        match text {
            "stdio" => Some(Self::Stdio),
            "null" => Some(Self::Null),
            _ => text.strip_prefix("file:").filter(|path| !path.is_empty()).map(|path| Self::File(path.into())),
        }
    }
}

/// Reads `--console`: the virtio console's target, if there is to be one.
///
/// # Errors
/// Where it is malformed.
pub(super) fn parse_console(text: &str) -> Result<Option<ConsoleTarget>, ValueError> {
    match text.split_once('=') {
        None if text == "serial" => Ok(None),
        None if text == "virtio" => Ok(Some(ConsoleTarget::Stdio)),
        Some(("virtio", target)) => {
            ConsoleTarget::parse(target).map(Some).ok_or_else(|| ValueError::Console(text.to_owned()))
        }
        _ => Err(ValueError::Console(text.to_owned())),
    }
}

/// Reads the `--serial` options. Without any, the first port is the terminal, unless `taken` says that another
/// console has it.
///
/// # Errors
/// Where one is malformed.
pub(super) fn parse_serial(
    options: &[String],
    taken: bool,
) -> Result<[Option<ConsoleTarget>; 4], (String, ValueError)> {
    let first = if taken { None } else { Some(ConsoleTarget::Stdio) };
    let mut ports = [first, None, None, None];
    for text in options {
        let error = || (text.clone(), ValueError::Serial(text.clone()));
        if text == "none" {
            ports[0] = None;
            continue;
        }
        let (number, target) = text.split_once('=').ok_or_else(error)?;
        let slot = number.parse::<usize>().ok().and_then(|n| ports.get_mut(n.checked_sub(1)?)).ok_or_else(error)?;
        *slot = Some(ConsoleTarget::parse(target).ok_or_else(error)?);
    }
    let mut stdio = (1..).zip(&ports).filter(|(_, port)| **port == Some(ConsoleTarget::Stdio)).map(|(n, _)| n);
    let stdio_port = stdio.next();
    if let (Some(one), Some(two)) = (stdio_port, stdio.next()) {
        return Err((options.join(" "), ValueError::TwoOnStdio(one, two)));
    }
    if let Some(port) = stdio_port.filter(|_| taken) {
        return Err((options.join(" "), ValueError::ConsoleTaken(port)));
    }
    Ok(ports)
}

#[cfg(test)]
mod tests;
