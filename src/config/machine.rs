//! Guest memory and vCPUs.

use super::error::ValueError;
use super::limits::{MAX_CPUS, MAX_MEMORY_BYTES, MIN_MEMORY_BYTES};
use super::spec::device_spec;
use super::value::{Items, Value, choices};
use std::ffi::OsStr;

const PAGE_BYTES: u64 = 4096;

/// Pages of the host that back guest memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Pages {
    /// Pages of 4 KiB; the kernel is asked for transparent huge pages.
    #[default]
    #[value(name = "thp", alias = "on")]
    Transparent,
    /// Pages of 4 KiB only.
    #[value(name = "off")]
    Small,
    /// hugetlbfs pages of 2 MiB.
    #[value(name = "2M", alias = "2m")]
    Huge2M,
    /// hugetlbfs pages of 1 GiB.
    #[value(name = "1G", alias = "1g")]
    Huge1G,
}

choices!(Pages);

impl Pages {
    /// Returns the size of a hugetlbfs page in bytes; `None` if memory is not taken from hugetlbfs.
    #[must_use]
    pub fn huge_bytes(self) -> Option<u64> {
        match self {
            Self::Transparent | Self::Small => None,
            Self::Huge2M => Some(2 << 20),
            Self::Huge1G => Some(1 << 30),
        }
    }
}

device_spec! {
    /// Size of guest memory, and the pages of the host that back it (`--memory`).
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Memory {
        /// Size in bytes, a multiple of 4096.
        bytes: u64 = "size" "SIZE", first bytes (512 << 20);
        /// Pages of the host that back it.
        pages: Pages = "hugepages" "thp|off|2M|1G", or (Pages::Transparent);
        /// True if all pages are filled before the guest runs.
        prefault: bool = "prefault" "on|off", switch;
    }
    check |memory| {
        let in_bounds = (MIN_MEMORY_BYTES..=MAX_MEMORY_BYTES).contains(&memory.bytes);
        if !in_bounds || !memory.bytes.is_multiple_of(PAGE_BYTES) {
            return Err(ValueError::MemorySize { bytes: memory.bytes });
        }
        Ok(memory)
    }
}

impl Memory {
    /// Returns the largest size of a balloon in it, in bytes: the smallest guest memory is left to the guest.
    #[must_use]
    pub fn max_balloon_bytes(&self) -> u64 {
        self.bytes.saturating_sub(MIN_MEMORY_BYTES)
    }
}

device_spec! {
    /// vCPUs as asked for; what is not given follows from the rest.
    #[derive(Clone, Copy)]
    struct CpusSpec {
        count: Option<u32> = "cpus" "N", first number (1..=MAX_CPUS);
        sockets: Option<u32> = "sockets" "S", number (1..=MAX_CPUS);
        cores: Option<u32> = "cores" "C", number (1..=MAX_CPUS);
        threads: Option<u32> = "threads" "T", number (1..=MAX_CPUS);
    }
}

/// vCPUs and their topology (`--cpus`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cpus {
    /// Number of processor sockets of the machine.
    pub sockets: u32,
    /// Number of cores of a socket.
    pub cores: u32,
    /// Number of threads of a core.
    pub threads: u32,
}

impl Cpus {
    /// Returns the number of vCPUs.
    #[must_use]
    pub fn count(&self) -> u32 {
        self.sockets * self.cores * self.threads
    }
}

impl TryFrom<CpusSpec> for Cpus {
    type Error = ValueError;

    fn try_from(spec: CpusSpec) -> Result<Self, ValueError> {
        let threads = spec.threads.unwrap_or(1);
        // Each is at most 254, so that a product fits.
        let wanted = spec.count.unwrap_or(spec.sockets.unwrap_or(1) * spec.cores.unwrap_or(1) * threads);
        // What remains is cores; with the cores given, sockets.
        let (sockets, cores) = match (spec.sockets, spec.cores) {
            (Some(sockets), Some(cores)) => (sockets, cores),
            (None, Some(cores)) => ((wanted / (cores * threads)).max(1), cores),
            (sockets, None) => {
                let sockets = sockets.unwrap_or(1);
                (sockets, (wanted / (sockets * threads)).max(1))
            }
        };
        if sockets * cores * threads != wanted {
            return Err(ValueError::Topology { sockets, cores, threads, cpus: wanted });
        }
        if wanted > MAX_CPUS {
            return Err(ValueError::Cpus(wanted.to_string()));
        }
        Ok(Self { sockets, cores, threads })
    }
}

impl Value for Cpus {
    const NUMBER: bool = true;

    fn parse(text: &OsStr) -> Result<Self, ValueError> {
        CpusSpec::parse(text)?.try_into()
    }

    fn from_items(items: Items) -> Result<Self, ValueError> {
        CpusSpec::from_items(items)?.try_into()
    }

    fn usage() -> Option<String> {
        CpusSpec::usage()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn memory(text: &str) -> Result<Memory, String> {
        Memory::parse(OsStr::new(text)).map_err(|error| error.to_string())
    }

    fn cpus(text: &str) -> Result<Cpus, ValueError> {
        Cpus::parse(OsStr::new(text))
    }

    #[test]
    fn memory_sizes_and_pages() {
        let whole = Memory { bytes: 1 << 30, pages: Pages::Huge2M, prefault: true };
        assert_eq!(memory("1G,hugepages=2M,prefault=on"), Ok(whole));
        assert_eq!(memory("16M").map(|memory| memory.bytes), Ok(16 << 20));
        assert_eq!(
            memory("prefault").map(|memory| (memory.bytes, memory.prefault)),
            Err("size: 'prefault' is not a size: a whole number with K, M, G or T behind it, such as 512M".into())
        );
        for (bad, words) in [
            ("1M", "16M to 4T"),
            ("512", "16M to 4T in whole pages of 4K, and 512 bytes is not; 512 MiB are written 512M"),
            ("16777217", "whole pages"),
            ("1G,hugepages=4M", "'4M' is not one of thp, off, 2M, 1G"),
            ("1G,huge=on", "hugepages="),
        ] {
            let error = memory(bad).expect_err("wrong");
            assert!(error.contains(words), "{error}");
        }
    }

    #[test]
    fn cpus_are_spread() {
        let spread = |text: &str| cpus(text).map(|c| (c.sockets, c.cores, c.threads)).expect("valid");
        assert_eq!(spread("4"), (1, 4, 1));
        assert_eq!(spread("4,sockets=1,cores=2,threads=2"), (1, 2, 2));
        assert_eq!(spread("8,threads=2"), (1, 4, 2));
        assert_eq!(spread("8,cores=2"), (4, 2, 1));
        assert_eq!(spread("sockets=2,cores=3"), (2, 3, 1));
        assert_eq!(spread("64"), (1, 64, 1));
        assert!(matches!(cpus("4,cores=3"), Err(ValueError::Topology { .. })));
        for bad in ["0", "100000", "x", "", "4,cores=0"] {
            assert!(cpus(bad).expect_err("wrong").to_string().contains("1 to 254"), "{bad}");
        }
        assert!(matches!(cpus("sockets=100,cores=100"), Err(ValueError::Cpus(_))));
    }

    proptest! {
        #[test]
        fn no_text_panics(text in ".*") {
            let _ = (memory(&text), cpus(&text));
        }

        #[test]
        fn accepted_cpus_multiply_to_what_was_asked(n in 1_u32..300, c in 1_u32..20, t in 1_u32..5) {
            if let Ok(cpus) = cpus(&format!("{n},cores={c},threads={t}")) {
                prop_assert_eq!(cpus.count(), n);
                prop_assert_eq!((cpus.cores, cpus.threads), (c, t));
            }
        }
    }
}
