//! Where a kernel ends in guest memory, and where its initrd may lie.

use crate::config::BootProtocol;
use hwvmm_arch::boot::bzimage::BzImage;
use hwvmm_arch::boot::elf::{ElfClass, ElfImage};
use hwvmm_arch::layout::{self, BZIMAGE_LOAD, GpaRange};

/// The highest gpa of an initrd for a kernel whose header does not say (boot.rst, `initrd_addr_max`).
const INITRD_LIMIT: u64 = 0x7fff_ffff;
const PAGE: u64 = 4096;

/// What a kernel leaves for its initrd.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct KernelPlacement {
    /// The gpa behind the kernel's last byte.
    pub(super) kernel_end: u64,
    /// The highest gpa that the kernel takes for a byte of its initrd.
    initrd_limit: u64,
}

/// Returns the gpa behind the last byte of memory below the hole.
pub(super) fn low_end(memory_bytes: u64) -> u64 {
    layout::ram_banks(memory_bytes).first().map_or(0, |bank| bank.end())
}

fn initrd_limit(image: &BzImage) -> u64 {
    match image.header.initrd_addr_max {
        0 => INITRD_LIMIT,
        limit => u64::from(limit).min(INITRD_LIMIT),
    }
}

impl KernelPlacement {
    /// Of an ELF kernel; `image` is the bzImage that an unpacked kernel comes from.
    pub(super) fn of_elf(elf: &ElfImage, image: Option<&BzImage>, boot: BootProtocol) -> Self {
        // PVH has no setup header.
        let linux64 = image.filter(|_| match boot {
            BootProtocol::Auto => elf.class == ElfClass::Elf64,
            BootProtocol::Linux64 => true,
            BootProtocol::Pvh => false,
        });
        Self { kernel_end: elf.end(), initrd_limit: linux64.map_or(INITRD_LIMIT, initrd_limit) }
    }

    /// Of a bzImage that the guest unpacks.
    pub(super) fn of_guest_unpacked(image: &BzImage) -> Self {
        let kernel_end = image.guest_unpack_range().end().max(BZIMAGE_LOAD + image.code.bytes);
        Self { kernel_end, initrd_limit: initrd_limit(image) }
    }

    /// Where the initrd may lie, in a guest with `memory_bytes`; empty where there is no room.
    pub(super) fn initrd_room(self, memory_bytes: u64) -> GpaRange {
        let end = low_end(memory_bytes).min(self.initrd_limit + 1);
        let start = self.kernel_end.checked_next_multiple_of(PAGE).unwrap_or(u64::MAX);
        GpaRange { start, bytes: end.saturating_sub(start) }
    }
}
