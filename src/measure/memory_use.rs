//! Memory that hwvmm takes besides its guest's (Linux Documentation/filesystems/proc.rst, smaps and smaps_rollup).

use crate::memory::HvaRange;
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::{self, Read};

/// Resident memory of this process, in KiB.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryUse {
    /// Guest memory that is resident: what the guest has touched.
    pub guest_kib: u64,
    /// Part of `guest_kib` that was written: pages of a snapshot that were not are in the page cache, for all of its clones.
    #[serde(default)]
    pub guest_own_kib: u64,
    /// Everything else: code, heap, stacks, libraries.
    pub vmm_kib: u64,
    /// Part of `vmm_kib` that no other process shares.
    pub vmm_private_kib: u64,
    /// What only this run has: anonymous memory of the guest and of hwvmm, which takes none from files. A page that two processes of
    /// the run share counts half in each. `None` where the kernel does not tell (before Linux 5.4).
    #[serde(default)]
    pub own_kib: Option<u64>,
}

/// The open files of /proc that tell the memory of this process. A process that is confined opens them before.
pub struct MemoryFiles {
    smaps: File,
    rollup: Option<File>,
}

impl MemoryFiles {
    /// Opens the files of this process.
    ///
    /// # Errors
    /// Returns an error if /proc/self/smaps cannot be opened.
    pub fn open() -> io::Result<Self> {
        Ok(Self { smaps: File::open("/proc/self/smaps")?, rollup: File::open("/proc/self/smaps_rollup").ok() })
    }

    /// Measures this process, whose guest memory lies at `guest`. Once.
    ///
    /// # Errors
    /// Returns an error if a file cannot be read.
    pub fn read(mut self, guest: &[HvaRange]) -> io::Result<MemoryUse> {
        let mut text = String::new();
        if let Some(rollup) = &mut self.rollup {
            rollup.read_to_string(&mut text)?;
        }
        let own_kib = own(&text);
        text.clear();
        self.smaps.read_to_string(&mut text)?;
        Ok(MemoryUse { own_kib, ..MemoryUse::parse(&text, guest) })
    }
}

/// The anonymous memory in smaps_rollup: written pages of private mappings, shared ones by parts.
fn own(rollup: &str) -> Option<u64> {
    rollup.lines().find_map(|line| line.strip_prefix("Pss_Anon:")).and_then(kib)
}

fn kib(value: &str) -> Option<u64> {
    value.trim().trim_end_matches(" kB").parse().ok()
}

impl MemoryUse {
    /// Measures this process, whose guest memory lies at `guest`.
    ///
    /// # Errors
    /// Returns an error if /proc/self/smaps cannot be read.
    pub fn now(guest: &[HvaRange]) -> io::Result<Self> {
        MemoryFiles::open()?.read(guest)
    }

    /// Adds what another process of hwvmm takes for itself. Pages that both share are counted already.
    pub fn add_process(&mut self, other: &Self) {
        self.vmm_kib = self.vmm_kib.saturating_add(other.vmm_private_kib);
        self.vmm_private_kib = self.vmm_private_kib.saturating_add(other.vmm_private_kib);
        self.own_kib = self.own_kib.zip(other.own_kib).map(|(mine, theirs)| mine.saturating_add(theirs));
    }

    fn parse(smaps: &str, guest: &[HvaRange]) -> Self {
        let mut found = Self::default();
        let mut in_guest = false;
        for line in smaps.lines() {
            let (field, rest) = line.split_once(' ').unwrap_or((line, ""));
            if let Some((start, _)) = field.split_once('-')
                && let Ok(start) = u64::from_str_radix(start, 16)
            {
                in_guest = guest.iter().any(|range| (range.start..range.start + range.bytes).contains(&start));
                continue;
            }
            let kib = || kib(rest).unwrap_or(0);
            match (field, in_guest) {
                ("Rss:", true) => found.guest_kib += kib(),
                ("Anonymous:", true) => found.guest_own_kib += kib(),
                ("Rss:", false) => found.vmm_kib += kib(),
                ("Private_Clean:" | "Private_Dirty:", false) => found.vmm_private_kib += kib(),
                _ => {}
            }
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_guest_is_told_from_the_rest() {
        let smaps = "5500-5600 r-xp 0 00:00 1 /hwvmm\nRss:  100 kB\nPrivate_Clean:  40 kB\nAnonymous:  8 kB\n\
                     200000-400000 rw-p 0 00:00 0\nRss: 2048 kB\nPrivate_Dirty: 2048 kB\nAnonymous: 1000 kB\n\
                     7f00-7fff rw-p 0 00:00 0 [stack]\nRss: 12 kB\nPrivate_Dirty: 12 kB\n";
        let found = MemoryUse::parse(smaps, &[HvaRange { start: 0x20_0000, bytes: 0x20_0000 }]);
        let expected =
            MemoryUse { guest_kib: 2048, guest_own_kib: 1000, vmm_kib: 112, vmm_private_kib: 52, own_kib: None };
        assert_eq!(found, expected);
    }

    #[test]
    fn own_memory_is_anonymous_memory_of_both_processes() {
        let rollup = "5500-7fff ---p 0 00:00 0 [rollup]\nRss: 20 kB\nPss_Anon:   1234 kB\nPss_File:  5 kB\n";
        assert_eq!((own(rollup), own("Rss: 20 kB\n")), (Some(1234), None));
        let mut sum = MemoryUse { own_kib: Some(1234), ..MemoryUse::default() };
        sum.add_process(&MemoryUse { own_kib: Some(66), ..MemoryUse::default() });
        assert_eq!(sum.own_kib, Some(1300));
        sum.add_process(&MemoryUse::default());
        assert_eq!(sum.own_kib, None, "a part of it is not known");
    }

    #[test]
    fn what_is_written_becomes_own_memory() {
        let written = std::hint::black_box(vec![1_u8; 8 << 20]);
        let after = MemoryUse::now(&[]).expect("/proc");
        assert!(after.vmm_kib > 0);
        assert!(after.own_kib.is_none_or(|own| own >= written.len() as u64 >> 10), "{:?}", after.own_kib);
    }
}
