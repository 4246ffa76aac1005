//! Where things lie in guest physical memory and on the ports. All addresses are gpas, in bytes.

/// 1 MiB: the end of the area that PCs keep for firmware; RAM for kernels starts here.
pub const HIGH_RAM_START: u64 = 0x10_0000;
/// The end of usable RAM below 1 MiB: where PCs keep the extended BIOS data area.
pub const EBDA_START: u64 = 0x9_fc00;

/// The boot GDT (see [`crate::gdt`]).
pub const BOOT_GDT: u64 = 0x500;
/// The PVH start info; its module list and memory map follow.
pub const PVH_START_INFO: u64 = 0x6000;
/// The Linux boot protocol's `boot_params`.
pub const ZERO_PAGE: u64 = 0x7000;
/// The root of the boot page tables (see [`crate::page_table`]): one PML4, one PDPT, four page directories.
pub const BOOT_PML4: u64 = 0x9000;
/// The kernel command line, with its terminating NUL.
pub const CMDLINE: u64 = 0x2_0000;
/// Room for the command line, in bytes.
pub const CMDLINE_MAX_BYTES: usize = 0x1_0000;
/// The multiboot information structure; its memory map, module list and strings follow, up to [`EBDA_START`].
pub const MULTIBOOT_INFO: u64 = 0x9_0000;
/// The ACPI root pointer: in the area that ACPI 6.5 §5.2.5.1 has the guest scan; the tables follow.
pub const ACPI_RSDP: u64 = 0xe_0000;
/// The end of the ACPI area.
pub const ACPI_END: u64 = RESET_VECTOR;
/// Where a PC's firmware starts after a reset, as real mode reaches it (F000:FFF0).
pub const RESET_VECTOR: u64 = 0xf_fff0;
/// Where a bzImage's protected-mode code is loaded when the guest unpacks itself (`code32_start`).
pub const BZIMAGE_LOAD: u64 = HIGH_RAM_START;

/// The hole below 4 GiB: APICs, PCI windows, firmware. RAM beyond it continues at 4 GiB.
pub const HOLE_START: u64 = 0xc000_0000;
/// The end of the hole.
pub const HOLE_END: u64 = 0x1_0000_0000;

/// PCI devices' BARs.
pub const PCI_WINDOW: u32 = 0xc000_0000;
/// Bytes of [`PCI_WINDOW`].
pub const PCI_WINDOW_BYTES: u32 = 0x1000_0000;
/// The registers of virtio-mmio devices, one after the other.
pub const VIRTIO_MMIO: u64 = 0xd000_0000;
/// PCI configuration space in memory (ECAM), one bus.
pub const PCI_ECAM: u64 = 0xe000_0000;
/// Bytes of [`PCI_ECAM`].
pub const PCI_ECAM_BYTES: u64 = 1 << 20;
/// The I/O APIC's pins that virtio-mmio devices get: first those that no ISA device knows.
pub const VIRTIO_MMIO_GSIS: [u32; 17] = [16, 17, 18, 19, 20, 21, 22, 23, 5, 6, 7, 9, 10, 11, 13, 14, 15];

/// The I/O APIC's registers.
pub const IOAPIC: u32 = 0xfec0_0000;
/// The local APICs' registers (xAPIC mode).
pub const LAPIC: u32 = 0xfee0_0000;
/// One page that Intel hosts need for real-mode emulation (KVM API 4.13 KVM_SET_TSS_ADDR: three pages).
pub const KVM_TSS: u64 = 0xfffb_d000;
/// One page below it for the identity map (KVM API 4.21 KVM_SET_IDENTITY_MAP_ADDR).
pub const KVM_IDENTITY_MAP: u64 = 0xfffb_c000;

/// The ACPI sleep control register (ACPI 6.5 §4.8.3.7), one byte wide.
pub const PORT_SLEEP_CONTROL: u16 = 0x600;
/// The ACPI sleep status register, one byte wide.
pub const PORT_SLEEP_STATUS: u16 = 0x601;
/// The ACPI reset register (§4.8.3.6), one byte wide.
pub const PORT_RESET: u16 = 0x602;
/// What the guest writes to [`PORT_RESET`].
pub const RESET_VALUE: u8 = 1;
/// The sleep type of the soft-off state S5, as the DSDT's `_S5` tells it.
pub const SLEEP_TYPE_S5: u8 = 5;
/// All the firmware there is: real-mode code for [`RESET_VECTOR`] that resets the machine. A kernel on a
/// hardware-reduced ACPI platform expects UEFI to reset it; without UEFI it jumps to the BIOS, which is this.
pub const RESET_CODE: [u8; 9] = [
    0xba,
    PORT_RESET.to_le_bytes()[0],
    PORT_RESET.to_le_bytes()[1], // mov $PORT_RESET,%dx
    0xb0,
    RESET_VALUE, // mov $RESET_VALUE,%al
    0xee,        // out %al,(%dx)
    0xf4,        // hlt
    0xeb,
    0xfd, // jmp to the hlt
];
/// The paravirtual panic port (the same as QEMU's).
pub const PORT_PVPANIC: u16 = 0x505;

/// The power-on self-test code.
pub const PORT_POST: u16 = 0x80;
/// A guest's write here puts a mark on the profile's time line (1 to 4 bytes, its number). Reads give all ones.
pub const PORT_MARK: u16 = 0x508;

/// The four classic UARTs: (first port, interrupt line).
pub const UARTS: [(u16, u32); 4] = [(0x3f8, 4), (0x2f8, 3), (0x3e8, 4), (0x2e8, 3)];

/// One kind of guest physical range, as the boot protocols' memory maps tell it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RangeKind {
    /// Usable memory.
    Ram,
    /// Not to be used.
    Reserved,
}

/// One entry of the guest's memory map, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryRange {
    /// First gpa.
    pub start: u64,
    /// Length in bytes, not 0.
    pub size: u64,
    /// What it is.
    pub kind: RangeKind,
}

/// The RAM banks for `memory_bytes` of guest memory: (gpa, size), below the hole and, what does not fit there, from
/// 4 GiB.
#[must_use]
pub fn ram_banks(memory_bytes: u64) -> Vec<(u64, u64)> {
    if memory_bytes <= HOLE_START {
        return vec![(0, memory_bytes)];
    }
    vec![(0, HOLE_START), (HOLE_END, memory_bytes - HOLE_START)]
}

/// The memory map told to the guest for `memory_bytes` of RAM: low RAM, the firmware area, RAM from 1 MiB, PCI's
/// configuration space (Linux uses none that is not reserved), RAM from 4 GiB.
#[must_use]
pub fn memory_map(memory_bytes: u64) -> Vec<MemoryRange> {
    let ram = |start, end: u64| MemoryRange { start, size: end - start, kind: RangeKind::Ram };
    let mut map = vec![
        ram(0, EBDA_START),
        MemoryRange { start: EBDA_START, size: HIGH_RAM_START - EBDA_START, kind: RangeKind::Reserved },
    ];
    for (start, size) in ram_banks(memory_bytes) {
        let first = start.max(HIGH_RAM_START);
        if start + size > first {
            map.push(ram(first, start + size));
        }
    }
    map.push(MemoryRange { start: PCI_ECAM, size: PCI_ECAM_BYTES, kind: RangeKind::Reserved });
    map.sort_by_key(|range| range.start);
    map
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_beyond_the_hole_continues_at_4_gib() {
        assert_eq!(ram_banks(1 << 30), [(0, 1 << 30)]);
        assert_eq!(ram_banks(HOLE_START), [(0, HOLE_START)]);
        assert_eq!(ram_banks(5 << 30), [(0, HOLE_START), (HOLE_END, (5 << 30) - HOLE_START)]);
    }

    #[test]
    fn the_memory_map_has_all_ram_but_the_firmware_area_and_no_overlap() {
        for memory in [16 << 20, 1 << 30, HOLE_START, HOLE_START + 4096, 5 << 30] {
            let map = memory_map(memory);
            for pair in map.windows(2) {
                assert!(pair[0].start + pair[0].size <= pair[1].start, "{pair:?}");
            }
            let ram: u64 = map.iter().filter(|r| r.kind == RangeKind::Ram).map(|r| r.size).sum();
            assert_eq!(ram, memory - (HIGH_RAM_START - EBDA_START));
        }
    }
}
