//! Memory that hwvmm takes besides its guest's (Linux Documentation/filesystems/proc.rst, smaps).

use crate::memory::HvaRange;
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::{self, Read};

/// Resident memory of this process, in KiB.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryUse {
    /// Guest memory that is resident: what the guest has touched.
    pub guest_kib: u64,
    /// Part of `guest_kib` that only this process has: pages that were written.
    #[serde(default)]
    pub guest_own_kib: u64,
    /// Everything else: code, heap, stacks, libraries.
    pub vmm_kib: u64,
    /// Part of `vmm_kib` that no other process shares.
    pub vmm_private_kib: u64,
}

impl MemoryUse {
    /// Measures this process, whose guest memory lies at `guest`.
    ///
    /// # Errors
    /// Returns an error if /proc/self/smaps cannot be read.
    pub fn now(guest: &[HvaRange]) -> io::Result<Self> {
        Self::read(&File::open(Self::FILE)?, guest)
    }

    /// The file that [`MemoryUse::read`] takes. A process that is confined opens it before.
    pub const FILE: &str = "/proc/self/smaps";

    /// As [`MemoryUse::now`], with [`MemoryUse::FILE`] open at its start.
    ///
    /// # Errors
    /// Returns an error if the file cannot be read.
    pub fn read(mut smaps: &File, guest: &[HvaRange]) -> io::Result<Self> {
        let mut text = String::new();
        smaps.read_to_string(&mut text)?;
        Ok(Self::parse(&text, guest))
    }

    /// Adds what another process of hwvmm takes for itself. Pages that both share are counted already.
    pub fn add_process(&mut self, other: &Self) {
        self.vmm_kib = self.vmm_kib.saturating_add(other.vmm_private_kib);
        self.vmm_private_kib = self.vmm_private_kib.saturating_add(other.vmm_private_kib);
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
            let kib = || rest.trim().trim_end_matches(" kB").parse::<u64>().unwrap_or(0);
            match (field, in_guest) {
                ("Rss:", true) => found.guest_kib += kib(),
                ("Private_Dirty:", true) => found.guest_own_kib += kib(),
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
        let smaps = "5500-5600 r-xp 0 00:00 1 /hwvmm\nRss:  100 kB\nPrivate_Clean:  40 kB\n\
                     200000-400000 rw-p 0 00:00 0\nRss: 2048 kB\nPrivate_Dirty: 2048 kB\n\
                     7f00-7fff rw-p 0 00:00 0 [stack]\nRss: 12 kB\nPrivate_Dirty: 12 kB\n";
        let found = MemoryUse::parse(smaps, &[HvaRange { start: 0x20_0000, bytes: 0x20_0000 }]);
        assert_eq!(found, MemoryUse { guest_kib: 2048, guest_own_kib: 2048, vmm_kib: 112, vmm_private_kib: 52 });
        assert!(MemoryUse::now(&[]).expect("/proc").vmm_kib > 0);
    }
}
