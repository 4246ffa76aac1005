//! `boot_params`, the "zero page" of the Linux boot protocol (Linux' Documentation/arch/x86/boot.rst and
//! zero-page.rst).

use crate::layout::{ACPI_RSDP, CMDLINE, GpaRange, MemoryRange, RangeKind};
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use vm_memory::ByteValued;

const BOOT_FLAG: u16 = 0xaa55;
const HEADER_MAGIC: u32 = 0x5372_6448;
/// `type_of_loader` for a boot loader without an assigned number.
const LOADER_UNDEFINED: u8 = 0xff;
/// `loadflags`: the protected-mode code is loaded at 1 MiB.
const LOADED_HIGH: u8 = 1;
const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;
/// The longest command line of a kernel on x86 (COMMAND_LINE_SIZE), in bytes without the NUL.
pub const CMDLINE_MAX_BYTES: usize = 2047;

fn low32(value: u64) -> u32 {
    u32::try_from(value & 0xffff_ffff).unwrap_or(0)
}

/// Returns the bytes of the zero page. `header` is the setup header of a bzImage, `None` for a vmlinux; `cmdline_bytes` is
/// the length of the command line without the NUL.
#[must_use]
pub fn zero_page(
    header: Option<&setup_header>,
    memory_map: &[MemoryRange],
    cmdline_bytes: usize,
    initrd: Option<GpaRange>,
) -> Vec<u8> {
    let mut params = boot_params::default();
    if let Some(header) = header {
        params.hdr = *header;
    } else {
        params.hdr.boot_flag = BOOT_FLAG;
        params.hdr.header = HEADER_MAGIC;
        params.hdr.kernel_alignment = 0x0100_0000;
    }
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    params.hdr.loadflags |= LOADED_HIGH;
    params.hdr.cmd_line_ptr = low32(CMDLINE);
    params.hdr.cmdline_size = u32::try_from(cmdline_bytes).unwrap_or(u32::MAX);
    if let Some(GpaRange { start: address, bytes: size }) = initrd {
        params.hdr.ramdisk_image = low32(address);
        params.ext_ramdisk_image = low32(address >> 32);
        params.hdr.ramdisk_size = low32(size);
        params.ext_ramdisk_size = low32(size >> 32);
    }
    params.acpi_rsdp_addr = ACPI_RSDP;
    for (entry, range) in params.e820_table.iter_mut().zip(memory_map) {
        let r#type = match range.kind {
            RangeKind::Ram => E820_RAM,
            RangeKind::Reserved => E820_RESERVED,
        };
        *entry = boot_e820_entry { addr: range.range.start, size: range.range.bytes, r#type };
        params.e820_entries += 1;
    }
    params.as_slice().to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::boot::read::{u32_at, u64_at};
    use crate::layout::memory_map;

    #[test]
    fn fields_have_their_documented_offsets() {
        let bytes = zero_page(None, &memory_map(5 << 30), 7, Some(GpaRange { start: 0x1_2345_6000, bytes: 99 }));
        assert_eq!(bytes.len(), 4096);
        assert_eq!(u32_at(&bytes, 0x202), Some(HEADER_MAGIC));
        assert_eq!(bytes[0x1e8], 5);
        assert_eq!(u64_at(&bytes, 0x70), Some(ACPI_RSDP));
        assert_eq!((u32_at(&bytes, 0x218), u32_at(&bytes, 0xc0)), (Some(0x2345_6000), Some(1)));
        assert_eq!(u32_at(&bytes, 0x228), Some(0x2_0000));
    }
}
