//! The PVH boot protocol's start info, module list and memory map (Xen's public/arch-x86/hvm/start_info.h, version 1).

use crate::layout::{ACPI_RSDP, GpaRange, MemoryRange, PVH_START_INFO, RangeKind};
use linux_loader::loader::elf::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};
use vm_memory::ByteValued;

const MAGIC: u32 = 0x336e_c578; // "xEn3", bit 7 of the first byte set
const TYPE_RAM: u32 = 1;
const TYPE_RESERVED: u32 = 2;
/// The gpa of the module list.
const MODULES: u64 = PVH_START_INFO + 64;
/// The gpa of the memory map.
const MEMORY_MAP: u64 = MODULES + 64;

/// Returns the bytes for guest memory from [`PVH_START_INFO`] on. `cmdline` is the gpa of the command line.
#[must_use]
pub fn start_info(memory_map: &[MemoryRange], cmdline: u64, initrd: Option<GpaRange>) -> Vec<u8> {
    let mut bytes = vec![0_u8; 128];
    let mut info = hvm_start_info {
        magic: MAGIC,
        version: 1,
        cmdline_paddr: cmdline,
        rsdp_paddr: ACPI_RSDP,
        memmap_paddr: MEMORY_MAP,
        memmap_entries: u32::try_from(memory_map.len()).unwrap_or(u32::MAX),
        ..Default::default()
    };
    if let Some(GpaRange { start: paddr, bytes: size }) = initrd {
        info.nr_modules = 1;
        info.modlist_paddr = MODULES;
        let module = hvm_modlist_entry { paddr, size, ..Default::default() };
        bytes[64..64 + module.as_slice().len()].copy_from_slice(module.as_slice());
    }
    bytes[..info.as_slice().len()].copy_from_slice(info.as_slice());
    for range in memory_map {
        let type_ = match range.kind {
            RangeKind::Ram => TYPE_RAM,
            RangeKind::Reserved => TYPE_RESERVED,
        };
        let entry = hvm_memmap_table_entry { addr: range.range.start, size: range.range.bytes, type_, reserved: 0 };
        bytes.extend_from_slice(entry.as_slice());
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::boot::read::{u32_at, u64_at};
    use crate::layout::memory_map;

    #[test]
    fn the_start_info_points_at_what_follows_it() {
        let map = memory_map(1 << 30);
        let bytes = start_info(&map, 0x2_0000, Some(GpaRange { start: 0x300_0000, bytes: 123 }));
        assert_eq!(u32_at(&bytes, 0), Some(MAGIC));
        let at = |gpa: u64| usize::try_from(gpa - PVH_START_INFO).expect("near");
        let module = at(u64_at(&bytes, 16).expect("modlist"));
        assert_eq!((u64_at(&bytes, module), u64_at(&bytes, module + 8)), (Some(0x300_0000), Some(123)));
        let entries = at(u64_at(&bytes, 40).expect("memmap"));
        assert_eq!(bytes.len(), entries + map.len() * 24);
        assert_eq!(u64_at(&bytes, entries + 8), Some(map[0].range.bytes));
    }
}
