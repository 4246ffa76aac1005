//! The guest of the nanobenchmarks (guest.s beside this file), assembled with hwvmm, and the ELF file of it for other loaders.

/// The gpa at which the guest is loaded and entered.
pub(super) const LOAD: u32 = 0x10_0000;
/// The size of the guest's memory in bytes, from gpa 0 on.
pub(super) const MEMORY_BYTES: u64 = 16 << 20;

std::arch::global_asm!(
    ".pushsection .rodata.nano, \"a\"",
    ".balign 4096",
    include_str!("guest.s"),
    ".code64",
    ".popsection",
    options(att_syntax, raw)
);

/// The guest's bytes, for gpa [`LOAD`]. It is entered at the first of them, in 32-bit protected mode without paging.
#[must_use]
pub(super) fn guest() -> &'static [u8] {
    unsafe extern "C" {
        #[link_name = "nano_start"]
        static START: u8;
        #[link_name = "nano_end"]
        static END: u8;
    }
    // SAFETY: both labels are in one section, START before END, and between them are initialised bytes that are never written.
    unsafe {
        let start = &raw const START;
        let bytes = (&raw const END).offset_from_unsigned(start);
        std::slice::from_raw_parts(start, bytes)
    }
}

const MULTIBOOT_MAGIC: u32 = 0x1bad_b002;
const ELF_HEADER: u32 = 52;
const PROGRAM_HEADER: u32 = 32;
/// Where the segment starts in the file.
const SEGMENT: u32 = 0x1000;

/// The guest as a multiboot 1 kernel (ELF, 32 bits), for any loader of such: `qemu-system-x86_64 -kernel`, GRUB, hwvmm.
#[must_use]
pub fn elf() -> Vec<u8> {
    let code = guest();
    let bytes = u32::try_from(code.len()).unwrap_or(0);
    let words = |words: &[u32]| words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<u8>>();
    // ELFCLASS32, little endian, version 1.
    let mut file = b"\x7fELF\x01\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    // ET_EXEC, EM_386; version, entry, program headers, no sections, flags; sizes and counts.
    file.extend([2, 0, 3, 0]);
    file.extend(words(&[1, LOAD, ELF_HEADER, 0, 0]));
    file.extend([52, 0, 32, 0, 1, 0, 40, 0, 0, 0, 0, 0]);
    // PT_LOAD, offset, virtual and physical address, bytes in file and memory, RWX, alignment.
    file.extend(words(&[1, SEGMENT, LOAD, LOAD, bytes, bytes, 7, SEGMENT]));
    debug_assert_eq!(file.len(), (ELF_HEADER + PROGRAM_HEADER) as usize);
    file.resize(file.len().next_multiple_of(8), 0);
    file.extend(words(&[MULTIBOOT_MAGIC, 0, MULTIBOOT_MAGIC.wrapping_neg()]));
    file.resize(SEGMENT as usize, 0);
    file.extend_from_slice(code);
    file
}

#[cfg(test)]
mod tests {
    use super::*;
    use hwvmm_arch::boot::elf::ElfImage;

    #[test]
    fn the_file_is_one_that_hwvmm_itself_would_load() {
        let file = elf();
        let image = ElfImage::parse(file.as_slice());
        assert!(image.is_ok(), "{image:?}");
        assert_eq!(file.windows(4).position(|bytes| bytes == MULTIBOOT_MAGIC.to_le_bytes()), Some(88));
        assert_eq!(&file[SEGMENT as usize..], guest());
        assert_eq!(guest().first(), Some(&0xfa), "starts with cli");
    }
}
