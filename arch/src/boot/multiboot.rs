//! Multiboot 1 (Multiboot specification 0.6.96): the header in a kernel, and the information structure for it.

use super::read::{ReadAt, u32_at};
use crate::layout::{EBDA_START, MULTIBOOT_INFO, MemoryRange, RangeKind, ram_banks};
use std::io;
use thiserror::Error;

const HEADER_MAGIC: u32 = 0x1bad_b002;
/// The header lies in the first 8 KiB of the file, at a multiple of 4 (§3.1).
const SEARCH_BYTES: usize = 8192;
const FLAG_PAGE_ALIGN: u32 = 1;
const FLAG_MEMORY_INFO: u32 = 1 << 1;
/// The header has load addresses of its own (§3.1.3, the "a.out kludge").
const FLAG_ADDRESSES: u32 = 1 << 16;
/// The requirement bits that hwvmm can meet. A loader must refuse a kernel with any other (§3.1.2); bit 2 asks for video.
const KNOWN_REQUIREMENTS: u32 = FLAG_PAGE_ALIGN | FLAG_MEMORY_INFO;

const INFO_MEMORY: u32 = 1;
const INFO_CMDLINE: u32 = 1 << 2;
const INFO_MODULES: u32 = 1 << 3;
const INFO_MEMORY_MAP: u32 = 1 << 6;
const INFO_LOADER_NAME: u32 = 1 << 9;
const INFO_BYTES: usize = 116;

/// Why a multiboot kernel cannot be used.
#[derive(Debug, Error)]
pub enum MultibootError {
    /// The kernel requires features that hwvmm does not have: the unknown bits of `flags`.
    #[error("this multiboot kernel requires features {0:#x} that hwvmm does not offer (video modes, for one)")]
    Requirement(u32),
    /// The kernel gives load addresses in the header instead of ELF segments.
    #[error("this multiboot kernel has load addresses in its header (a.out); only ELF kernels are supported")]
    NotElf,
    /// The information structure with its strings does not fit below the EBDA.
    #[error("the command line and the {modules} module names take {bytes} bytes, and there is room for {room}")]
    TooLarge {
        /// The number of modules.
        modules: usize,
        /// The size of the structure in bytes.
        bytes: usize,
        /// The bytes of guest memory for it.
        room: usize,
    },
    /// The file cannot be read.
    #[error("cannot read the kernel")]
    Read(#[from] io::Error),
}

/// Returns true if the kernel has a Multiboot header.
///
/// # Errors
/// [`MultibootError`] where the header asks for what hwvmm does not have, or the file cannot be read.
pub fn has_header<R: ReadAt + ?Sized>(image: &R) -> Result<bool, MultibootError> {
    let bytes = usize::try_from(image.len_bytes()?).unwrap_or(usize::MAX).min(SEARCH_BYTES);
    let mut start = vec![0_u8; bytes];
    image.read_exact_at(&mut start, 0)?;
    for at in (0..bytes).step_by(4) {
        let (Some(magic), Some(flags), Some(checksum)) =
            (u32_at(&start, at), u32_at(&start, at + 4), u32_at(&start, at + 8))
        else {
            break;
        };
        if magic != HEADER_MAGIC || magic.wrapping_add(flags).wrapping_add(checksum) != 0 {
            continue;
        }
        let unknown = flags & 0xffff & !KNOWN_REQUIREMENTS;
        if unknown != 0 {
            return Err(MultibootError::Requirement(unknown));
        }
        if flags & FLAG_ADDRESSES != 0 {
            return Err(MultibootError::NotElf);
        }
        return Ok(true);
    }
    Ok(false)
}

/// A boot module in guest memory (§3.3, `mods_addr`).
#[derive(Clone, Debug)]
pub struct Module {
    /// The gpa of the first byte.
    pub start: u64,
    /// The gpa behind the last byte.
    pub end: u64,
    /// The module's command line: its path and arguments.
    pub name: Vec<u8>,
}

/// Returns the bytes for guest memory from [`MULTIBOOT_INFO`] on: the information structure (§3.3), then the strings, the
/// module list and the memory map that it points to.
///
/// # Errors
/// [`MultibootError::TooLarge`] where they do not fit below the EBDA.
pub fn info(
    memory_bytes: u64,
    memory_map: &[MemoryRange],
    cmdline: &[u8],
    modules: &[Module],
) -> Result<Vec<u8>, MultibootError> {
    let mut area = Area { bytes: vec![0_u8; INFO_BYTES.next_multiple_of(16)] };
    let low = ram_banks(memory_bytes).first().map_or(0, |bank| bank.bytes);
    area.put(0, INFO_MEMORY | INFO_CMDLINE | INFO_MODULES | INFO_MEMORY_MAP | INFO_LOADER_NAME);
    area.put(4, kib(EBDA_START));
    area.put(8, kib(low.saturating_sub(1 << 20)));
    let cmdline = area.string(cmdline);
    area.put(16, cmdline);
    let loader = area.string(concat!("hwvmm ", env!("CARGO_PKG_VERSION")).as_bytes());
    area.put(64, loader);

    let names: Vec<u32> = modules.iter().map(|module| area.string(&module.name)).collect();
    let list = area.here();
    for (module, name) in modules.iter().zip(names) {
        for word in [word(module.start), word(module.end), name, 0] {
            area.bytes.extend_from_slice(&word.to_le_bytes());
        }
    }
    area.put(20, u32::try_from(modules.len()).unwrap_or(u32::MAX));
    area.put(24, list);

    let map = area.here();
    for range in memory_map {
        let kind: u32 = if range.kind == RangeKind::Ram { 1 } else { 2 };
        area.bytes.extend_from_slice(&20_u32.to_le_bytes());
        area.bytes.extend_from_slice(&range.range.start.to_le_bytes());
        area.bytes.extend_from_slice(&range.range.bytes.to_le_bytes());
        area.bytes.extend_from_slice(&kind.to_le_bytes());
    }
    area.put(44, area.here() - map);
    area.put(48, map);

    let room = usize::try_from(EBDA_START - MULTIBOOT_INFO).unwrap_or(0);
    let bytes = area.bytes.len();
    if bytes > room {
        return Err(MultibootError::TooLarge { modules: modules.len(), bytes, room });
    }
    Ok(area.bytes)
}

fn kib(bytes: u64) -> u32 {
    u32::try_from(bytes >> 10).unwrap_or(u32::MAX)
}

fn word(gpa: u64) -> u32 {
    u32::try_from(gpa).unwrap_or(u32::MAX)
}

/// The bytes of the structure so far.
struct Area {
    bytes: Vec<u8>,
}

impl Area {
    /// The gpa of the next byte to be appended.
    fn here(&self) -> u32 {
        word(MULTIBOOT_INFO + self.bytes.len() as u64)
    }

    fn put(&mut self, offset: usize, value: u32) {
        self.bytes[offset..offset + 4].copy_from_slice(&value.to_le_bytes());
    }

    /// Appends a NUL-terminated string, padded to 4 bytes. Returns its gpa.
    fn string(&mut self, text: &[u8]) -> u32 {
        let at = self.here();
        self.bytes.extend_from_slice(text);
        self.bytes.push(0);
        let padded = self.bytes.len().next_multiple_of(4);
        self.bytes.resize(padded, 0);
        at
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::memory_map;

    fn header(flags: u32) -> Vec<u8> {
        let mut file = vec![0_u8; 0xb0];
        for word in [HEADER_MAGIC, flags, 0_u32.wrapping_sub(HEADER_MAGIC).wrapping_sub(flags)] {
            file.extend(word.to_le_bytes());
        }
        file
    }

    #[test]
    fn the_header_is_found_only_with_its_checksum() {
        assert!(has_header(header(0).as_slice()).expect("readable"));
        let mut damaged = header(0);
        damaged[0xb8] ^= 1;
        assert!(!has_header(damaged.as_slice()).expect("readable"));
        assert!(!has_header([0_u8; 3].as_slice()).expect("readable"));
        assert!(matches!(has_header(header(4).as_slice()), Err(MultibootError::Requirement(4))));
        assert!(matches!(has_header(header(1 << 16).as_slice()), Err(MultibootError::NotElf)));
    }

    #[test]
    fn the_information_has_command_line_modules_and_map() {
        let module = Module { start: 0x200_0000, end: 0x200_0010, name: b"env".to_vec() };
        let map = memory_map(128 << 20);
        let bytes = info(128 << 20, &map, b"test a b", &[module]).expect("fits");
        let at = |gpa: u32| usize::try_from(u64::from(gpa) - MULTIBOOT_INFO).expect("near");
        let cmdline = at(u32_at(&bytes, 16).expect("cmdline"));
        assert_eq!(&bytes[cmdline..cmdline + 9], b"test a b\0");
        assert_eq!(u32_at(&bytes, 8), Some(127 * 1024));
        let list = at(u32_at(&bytes, 24).expect("modules"));
        assert_eq!(u32_at(&bytes, list), Some(0x200_0000));
        assert_eq!(u32_at(&bytes, 44), Some(24 * 4));
        let memory = at(u32_at(&bytes, 48).expect("map"));
        assert_eq!(u32_at(&bytes, memory), Some(20));
    }

    #[test]
    fn information_that_does_not_fit_is_an_error() {
        let long = "x".repeat(0x1_0000);
        assert!(matches!(info(1 << 27, &[], long.as_bytes(), &[]), Err(MultibootError::TooLarge { .. })));
    }
}
