//! The boot page tables: an identity map of the first 4 GiB with 2 MiB pages (SDM vol. 3A §4.5). The 64-bit boot protocol
//! asks that kernel, zero page and command line be identity-mapped (boot.rst, "64-bit boot protocol").

use crate::layout::BOOT_PML4;

const PRESENT: u64 = 1;
const WRITABLE: u64 = 1 << 1;
const LARGE: u64 = 1 << 7;
const PAGE: u64 = 4096;
const DIRECTORIES: u64 = 4;

/// An entry of a page table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The gpa of the entry, a multiple of 8.
    pub gpa: u64,
    /// The 64-bit value of the entry: the gpa it maps or of the next table, and its flags.
    pub value: u64,
}

/// The present entries of the tables: the PML4 at [`BOOT_PML4`], then one PDPT, then four page directories.
pub fn identity_4gib() -> impl Iterator<Item = Entry> {
    let pdpt = BOOT_PML4 + PAGE;
    let directory = pdpt + PAGE;
    let links = PRESENT | WRITABLE;
    std::iter::once((BOOT_PML4, pdpt | links))
        .chain((0..DIRECTORIES).map(move |i| (pdpt + i * 8, (directory + i * PAGE) | links)))
        .chain((0..DIRECTORIES * 512).map(move |i| (directory + i * 8, i << 21 | LARGE | links)))
        .map(|(gpa, value)| Entry { gpa, value })
}

/// The size of the tables in bytes, from [`BOOT_PML4`] on.
pub const SIZE_BYTES: u64 = (2 + DIRECTORIES) * PAGE;

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;

    #[test]
    fn every_address_below_4_gib_maps_to_itself() {
        let entries: HashMap<u64, u64> = identity_4gib().map(|entry| (entry.gpa, entry.value)).collect();
        let next = |table: u64, index: u64| entries[&(table + index * 8)];
        for address in [0, 0x7000, 0x10_0000, 0x7fff_ffff, 0xffff_f000_u64] {
            let pdpt = next(BOOT_PML4, address >> 39) & !0xfff;
            let directory = next(pdpt, address >> 30 & 0x1ff) & !0xfff;
            let page = next(directory, address >> 21 & 0x1ff);
            assert_eq!(page & 0x83, 0x83);
            assert_eq!((page & !0x1f_ffff) | (address & 0x1f_ffff), address);
        }
        assert!(entries.keys().all(|gpa| (BOOT_PML4..BOOT_PML4 + SIZE_BYTES).contains(gpa)));
    }
}
