//! The guest physical address map and the port map. All addresses are gpas.

/// 1 MiB: the end of the area that a PC reserves for firmware. RAM for kernels starts here.
pub const HIGH_RAM_START: u64 = 0x10_0000;
/// The end of usable RAM below 1 MiB: the extended BIOS data area (EBDA) of a PC starts here.
pub const EBDA_START: u64 = 0x9_fc00;

/// The boot GDT (see [`crate::gdt`]).
pub const BOOT_GDT: u64 = 0x500;
/// The PVH start info, followed by its module list and memory map (see [`crate::boot::pvh`]).
pub const PVH_START_INFO: u64 = 0x6000;
/// The Linux boot protocol's `boot_params` (see [`crate::boot::zero_page`]).
pub const ZERO_PAGE: u64 = 0x7000;
/// The root of the boot page tables (see [`crate::page_table`]): one PML4, one PDPT, four page directories.
pub const BOOT_PML4: u64 = 0x9000;
/// The kernel command line, with its terminating NUL.
pub const CMDLINE: u64 = 0x2_0000;
/// The size of the area for the command line, in bytes.
pub const CMDLINE_MAX_BYTES: usize = 0x1_0000;
/// The multiboot information structure, followed by its memory map, module list and strings, up to [`EBDA_START`].
pub const MULTIBOOT_INFO: u64 = 0x9_0000;
/// The generation identifier of the virtual machine (see [`crate::acpi`]), in the area that the memory map reserves.
pub const VMGENID: u64 = 0xd_f000;
/// The length of the identifier at [`VMGENID`] in bytes.
pub const VMGENID_BYTES: usize = 16;
/// The ACPI root pointer (RSDP), followed by the tables. It lies in the area that the guest scans for it (ACPI 6.5
/// §5.2.5.1).
pub const ACPI_RSDP: u64 = 0xe_0000;
/// The end of the ACPI area.
pub const ACPI_END: u64 = RESET_VECTOR;
/// The entry point of a PC's firmware after a reset, as real mode code reaches it: F000:FFF0.
pub const RESET_VECTOR: u64 = 0xf_fff0;
/// The load address of a bzImage's protected-mode code (boot.rst, `code32_start`), used where the guest unpacks the kernel.
pub const BZIMAGE_LOAD: u64 = HIGH_RAM_START;

/// The start of the hole below 4 GiB, which holds APICs, PCI windows and virtio-mmio devices. RAM continues at 4 GiB.
pub const HOLE_START: u64 = 0xc000_0000;
/// The end of the hole.
pub const HOLE_END: u64 = 0x1_0000_0000;

/// The start of the window for the BARs of PCI devices.
pub const PCI_WINDOW: u32 = 0xc000_0000;
/// The length of the window at [`PCI_WINDOW`] in bytes.
pub const PCI_WINDOW_BYTES: u32 = 0x1000_0000;
/// The registers of the first virtio-mmio device; the other devices follow.
pub const VIRTIO_MMIO: u64 = 0xd000_0000;
/// The memory-mapped PCI configuration space (ECAM) of one bus.
pub const PCI_ECAM: u64 = 0xe000_0000;
/// The length of the window at [`PCI_ECAM`] in bytes: 32 devices of 8 functions, with 4 KiB of registers each.
pub const PCI_ECAM_BYTES: u64 = 1 << 20;
/// The GSIs for virtio-mmio devices, in the order in which they are given out: first those that no ISA device uses.
pub const VIRTIO_MMIO_GSIS: [u32; 17] = [16, 17, 18, 19, 20, 21, 22, 23, 5, 6, 7, 9, 10, 11, 13, 14, 15];

/// The GSI that says that the generation identifier has changed: that of a PS/2 mouse, which no machine has.
pub const VMGENID_GSI: u32 = 12;

/// The I/O APIC's registers, at their customary address.
pub const IOAPIC: u32 = 0xfec0_0000;
/// The local APIC's registers in xAPIC mode (SDM vol. 3A §11.4.1).
pub const LAPIC: u32 = 0xfee0_0000;
/// Three pages that KVM needs on Intel processors without unrestricted guest mode (KVM API, KVM_SET_TSS_ADDR).
pub const KVM_TSS: u64 = 0xfffb_d000;
/// One page below [`KVM_TSS`] that KVM needs on the same processors (KVM API, KVM_SET_IDENTITY_MAP_ADDR).
pub const KVM_IDENTITY_MAP: u64 = 0xfffb_c000;

/// The ACPI sleep control register (ACPI 6.5 §4.8.3.7), one byte wide.
pub const PORT_SLEEP_CONTROL: u16 = 0x600;
/// The ACPI sleep status register, one byte wide.
pub const PORT_SLEEP_STATUS: u16 = 0x601;
/// The ACPI reset register (§4.8.3.6), one byte wide.
pub const PORT_RESET: u16 = 0x602;
/// The value that resets the machine when it is written to [`PORT_RESET`].
pub const RESET_VALUE: u8 = 1;
/// The sleep type of the soft-off state S5, as in the DSDT's `_S5` object.
pub const SLEEP_TYPE_S5: u8 = 5;
/// Real-mode code for [`RESET_VECTOR`] that resets the machine; the only firmware. Linux on a hardware-reduced ACPI
/// platform resets by UEFI, and where there is none it jumps to the BIOS, which is this code.
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
/// The paravirtual panic port (QEMU's docs/specs/pvpanic.rst).
pub const PORT_PVPANIC: u16 = 0x505;

/// The port of a command's exit status, or of the number of the signal that ended it. At the next port the guest writes the kind of the
/// end: 1 exited, 2 ended by a signal, 3 not run. They are there where the guest runs one command.
pub const PORT_COMMAND_STATUS: u16 = 0x5e8;

/// The port of the power-on self-test code.
pub const PORT_POST: u16 = 0x80;
/// The mark port: a guest's write (1 to 4 bytes, the number of the mark) puts a mark on the profile's timeline. Reads
/// return all ones.
pub const PORT_MARK: u16 = 0x508;

/// A 16550A UART: eight ports and an interrupt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Uart {
    /// The first of its eight ports.
    pub port: u16,
    /// The GSI that it raises.
    pub gsi: u32,
}

/// The UARTs of a PC, COM1 to COM4.
pub const UARTS: [Uart; 4] = [
    Uart { port: 0x3f8, gsi: 4 },
    Uart { port: 0x2f8, gsi: 3 },
    Uart { port: 0x3e8, gsi: 4 },
    Uart { port: 0x2e8, gsi: 3 },
];

/// A range of guest physical addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GpaRange {
    /// The first gpa of the range.
    pub start: u64,
    /// The length in bytes.
    pub bytes: u64,
}

impl GpaRange {
    /// The first gpa behind the range; `u64::MAX` where the range ends beyond the address space.
    #[must_use]
    pub fn end(self) -> u64 {
        self.start.saturating_add(self.bytes)
    }

    /// Returns true if `gpa` is in the range.
    #[must_use]
    pub fn contains(self, gpa: u64) -> bool {
        gpa.checked_sub(self.start).is_some_and(|offset| offset < self.bytes)
    }
}

/// The type of a range in the memory map of a boot protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RangeKind {
    /// Memory that the guest may use.
    Ram,
    /// Addresses that the guest must not use.
    Reserved,
}

/// One entry of the guest's memory map (boot.rst calls it e820 entry).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryRange {
    /// The addresses, not empty.
    pub range: GpaRange,
    /// What the guest may do with them.
    pub kind: RangeKind,
}

/// The RAM banks for `memory_bytes` of guest memory: one below the hole, and one from 4 GiB on for what does not fit there.
#[must_use]
pub fn ram_banks(memory_bytes: u64) -> Vec<GpaRange> {
    if memory_bytes <= HOLE_START {
        return vec![GpaRange { start: 0, bytes: memory_bytes }];
    }
    vec![GpaRange { start: 0, bytes: HOLE_START }, GpaRange { start: HOLE_END, bytes: memory_bytes - HOLE_START }]
}

/// Returns the most guest memory, in bytes, of which all banks end at or below gpa `end`.
#[must_use]
pub fn memory_below(end: u64) -> u64 {
    end.min(HOLE_START) + end.saturating_sub(HOLE_END)
}

/// The memory map for a guest with `memory_bytes` of RAM: low RAM, the firmware area, RAM from 1 MiB, PCI configuration space
/// (Linux uses ECAM only where the memory map reserves it), RAM from 4 GiB.
#[must_use]
pub fn memory_map(memory_bytes: u64) -> Vec<MemoryRange> {
    let entry = |start, end: u64, kind| MemoryRange { range: GpaRange { start, bytes: end - start }, kind };
    let mut map = vec![
        entry(0, EBDA_START, RangeKind::Ram),
        entry(EBDA_START, HIGH_RAM_START, RangeKind::Reserved),
        entry(PCI_ECAM, PCI_ECAM + PCI_ECAM_BYTES, RangeKind::Reserved),
    ];
    for bank in ram_banks(memory_bytes) {
        let first = bank.start.max(HIGH_RAM_START);
        if bank.end() > first {
            map.push(entry(first, bank.end(), RangeKind::Ram));
        }
    }
    map.sort_by_key(|entry| entry.range.start);
    map
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_beyond_the_hole_continues_at_4_gib() {
        assert_eq!(ram_banks(1 << 30), [GpaRange { start: 0, bytes: 1 << 30 }]);
        let low = GpaRange { start: 0, bytes: HOLE_START };
        assert_eq!(ram_banks(HOLE_START), [low]);
        assert_eq!(ram_banks(5 << 30), [low, GpaRange { start: HOLE_END, bytes: (5 << 30) - HOLE_START }]);
    }

    #[test]
    fn the_most_memory_fills_the_address_space() {
        assert_eq!(memory_below(1 << 30), 1 << 30);
        for end in [HOLE_START, HOLE_END, 1 << 36, 1 << 40, 1 << 52] {
            let most = memory_below(end);
            assert!(ram_banks(most).iter().all(|bank| bank.end() <= end), "{end:#x}");
            assert!(ram_banks(most + 4096).iter().any(|bank| bank.end() > end), "{end:#x}");
        }
        assert_eq!(memory_below(1 << 40), (1 << 40) - (1 << 30));
    }

    #[test]
    fn the_memory_map_has_all_ram_but_the_firmware_area_and_no_overlap() {
        for memory in [16 << 20, 1 << 30, HOLE_START, HOLE_START + 4096, 5 << 30] {
            let map = memory_map(memory);
            for pair in map.windows(2) {
                assert!(pair[0].range.end() <= pair[1].range.start, "{pair:?}");
            }
            let ram: u64 = map.iter().filter(|r| r.kind == RangeKind::Ram).map(|r| r.range.bytes).sum();
            assert_eq!(ram, memory - (HIGH_RAM_START - EBDA_START));
        }
    }
}
