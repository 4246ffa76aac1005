//! 32- and 64-bit ELF kernels: their segments and their notes (System V ABI, chapters 4 and 5; Xen's public/elfnote.h;
//! Linux' include/linux/elfnote-lto.h and build-salt.h).

use super::read::{ReadAt, u16_at, u32_at, u64_at};
use std::io;
use thiserror::Error;

const MAGIC: &[u8] = b"\x7fELF";
const CLASS_32: u8 = 1;
const CLASS_64: u8 = 2;
const LITTLE_ENDIAN: u8 = 1;
const EM_386: u16 = 3;
const EM_X86_64: u16 = 62;
const ET_EXEC: u16 = 2;
const ET_DYN: u16 = 3;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
/// The largest accepted number of program headers: far more than any kernel has.
const MAX_PROGRAM_HEADERS: u16 = 256;
/// The largest accepted note segment, in bytes: far more than any kernel has.
const MAX_NOTE_BYTES: u64 = 1 << 20;
/// The type of the note that holds the PVH entry point: XEN_ELFNOTE_PHYS32_ENTRY.
const XEN_PHYS32_ENTRY: u32 = 18;
/// The type of the note that names the operating system: XEN_ELFNOTE_GUEST_OS. Linux has it with CONFIG_XEN.
const XEN_GUEST_OS: u32 = 6;
/// The types of the notes that every Linux since 4.18 has: LINUX_ELFNOTE_BUILD_SALT and LINUX_ELFNOTE_LTO_INFO. Type 0 is
/// left out: programs for Linux have it, too.
const LINUX_NOTES: [u32; 2] = [0x100, 0x101];

/// Why an ELF file cannot be used.
#[derive(Debug, Error)]
pub enum ElfError {
    /// The file is for another machine, or is no program; the text says which.
    #[error("not an x86 ELF kernel: {0}")]
    NotKernel(String),
    /// The headers contradict the size of the file; the text has the figures.
    #[error("damaged ELF file: {0}")]
    Damaged(String),
    /// The file cannot be read.
    #[error("cannot read the ELF file")]
    Read(#[from] io::Error),
}

/// The class of an ELF file (`EI_CLASS`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ElfClass {
    /// A 32-bit file (`ELFCLASS32`).
    Elf32,
    /// A 64-bit file (`ELFCLASS64`).
    Elf64,
}

/// One segment of type PT_LOAD.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// File offset of the segment's bytes (`p_offset`).
    pub offset: u64,
    /// The gpa at which the segment is loaded (`p_paddr`).
    pub address: u64,
    /// The number of bytes in the file (`p_filesz`).
    pub file_bytes: u64,
    /// The number of bytes in memory (`p_memsz`); those beyond `file_bytes` are zero.
    pub memory_bytes: u64,
}

/// The parsed headers of an ELF kernel.
#[derive(Clone, Debug)]
pub struct ElfImage {
    /// The file's class: 32-bit or 64-bit.
    pub class: ElfClass,
    /// The gpa of the entry point (`e_entry`).
    pub entry: u64,
    /// The segments to load, in the order of the file, none of them empty.
    pub segments: Vec<Segment>,
    /// What the notes say.
    pub notes: Notes,
}

/// What the notes of a kernel say.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Notes {
    /// The gpa of the PVH entry point, where a note gives it.
    pub pvh_entry: Option<u32>,
    /// True if a note says that the kernel is Linux. Each Linux with a PVH entry has such a note.
    pub is_linux: bool,
}

/// The fields of a program header that are used here.
struct ProgramHeader {
    kind: u32,
    segment: Segment,
}

impl ElfImage {
    /// Returns true if `start` begins with the ELF magic number.
    #[must_use]
    pub fn is_elf(start: &[u8]) -> bool {
        start.starts_with(MAGIC)
    }

    /// The first gpa behind all segments.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.segments.iter().map(|s| s.address.saturating_add(s.memory_bytes)).max().unwrap_or(0)
    }

    /// Returns true if `gpa` lies in a segment.
    #[must_use]
    pub fn contains(&self, gpa: u64) -> bool {
        self.segments.iter().any(|s| gpa.checked_sub(s.address).is_some_and(|offset| offset < s.memory_bytes))
    }

    /// Reads headers and notes, and checks them against the size of the file.
    ///
    /// # Errors
    /// [`ElfError`] where the file is not an x86 kernel, is damaged or cannot be read.
    pub fn parse<R: ReadAt + ?Sized>(image: &R) -> Result<Self, ElfError> {
        let file_bytes = image.len_bytes()?;
        let mut header = [0_u8; 64];
        let available = usize::try_from(file_bytes.min(64)).unwrap_or(64);
        image.read_exact_at(&mut header[..available], 0)?;
        let class = check_ident(&header[..available])?;
        let short = || ElfError::Damaged(format!("its header is cut off: the file has {file_bytes} bytes"));
        let header = &header[..available];
        let (entry, offset, entry_bytes, count) = match class {
            ElfClass::Elf64 => (u64_at(header, 24), u64_at(header, 32), u16_at(header, 54), u16_at(header, 56)),
            ElfClass::Elf32 => {
                let wide = |offset| u32_at(header, offset).map(u64::from);
                (wide(24), wide(28), u16_at(header, 42), u16_at(header, 44))
            }
        };
        let (Some(entry), Some(offset), Some(entry_bytes), Some(count)) = (entry, offset, entry_bytes, count) else {
            return Err(short());
        };
        let table = HeaderTable { class, offset, entry_bytes, count };
        let headers = program_headers(image, &table, file_bytes)?;
        let mut parsed = Self { class, entry, segments: Vec::new(), notes: Notes::default() };
        for header in headers {
            match header.kind {
                PT_LOAD if header.segment.memory_bytes > 0 => parsed.segments.push(header.segment),
                PT_NOTE => parsed.notes.add(image, &header.segment)?,
                _ => {}
            }
        }
        if parsed.segments.is_empty() {
            return Err(ElfError::NotKernel("it has nothing to load (no PT_LOAD segment)".into()));
        }
        Ok(parsed)
    }
}

/// Checks `e_ident`, `e_type` and `e_machine`. Returns the file's class.
fn check_ident(header: &[u8]) -> Result<ElfClass, ElfError> {
    if !ElfImage::is_elf(header) {
        return Err(ElfError::NotKernel("no ELF magic number".into()));
    }
    let (Some(&class), Some(&order), Some(kind), Some(machine)) =
        (header.get(4), header.get(5), u16_at(header, 16), u16_at(header, 18))
    else {
        return Err(ElfError::Damaged("its header is cut off".into()));
    };
    if order != LITTLE_ENDIAN {
        return Err(ElfError::NotKernel("it is big-endian".into()));
    }
    if kind != ET_EXEC && kind != ET_DYN {
        return Err(ElfError::NotKernel(format!("its type is {kind}: an object file or a core, not a program")));
    }
    match (class, machine) {
        (CLASS_64, EM_X86_64) => Ok(ElfClass::Elf64),
        (CLASS_32, EM_386) => Ok(ElfClass::Elf32),
        _ => Err(ElfError::NotKernel(format!("it is for machine {machine} (class {class}), not for x86"))),
    }
}

/// Where the program headers are: `e_phoff`, `e_phentsize`, `e_phnum`.
struct HeaderTable {
    class: ElfClass,
    offset: u64,
    entry_bytes: u16,
    count: u16,
}

fn program_headers<R: ReadAt + ?Sized>(
    image: &R,
    table: &HeaderTable,
    file_bytes: u64,
) -> Result<Vec<ProgramHeader>, ElfError> {
    let &HeaderTable { class, offset, entry_bytes, count } = table;
    let least = match class {
        ElfClass::Elf64 => 56,
        ElfClass::Elf32 => 32,
    };
    if count == 0 || count > MAX_PROGRAM_HEADERS || entry_bytes < least || entry_bytes > 256 {
        return Err(ElfError::Damaged(format!("{count} program headers of {entry_bytes} bytes each")));
    }
    let bytes = usize::from(count) * usize::from(entry_bytes);
    let fits = offset.checked_add(bytes as u64).is_some_and(|end| end <= file_bytes);
    if !fits {
        return Err(ElfError::Damaged(format!(
            "its program headers ({bytes} bytes at {offset:#x}) lie beyond the end of the file ({file_bytes} bytes): is it \
             truncated?"
        )));
    }
    let mut data = vec![0_u8; bytes];
    image.read_exact_at(&mut data, offset)?;
    data.chunks_exact(usize::from(entry_bytes)).map(|entry| program_header(entry, class, file_bytes)).collect()
}

fn program_header(entry: &[u8], class: ElfClass, file_bytes: u64) -> Result<ProgramHeader, ElfError> {
    let field = |offset_64: usize, offset_32: usize| {
        match class {
            ElfClass::Elf64 => u64_at(entry, offset_64),
            ElfClass::Elf32 => u32_at(entry, offset_32).map(u64::from),
        }
        .unwrap_or(0)
    };
    let kind = u32_at(entry, 0).unwrap_or(0);
    let segment =
        Segment { offset: field(8, 4), address: field(24, 12), file_bytes: field(32, 16), memory_bytes: field(40, 20) };
    if kind != PT_LOAD && kind != PT_NOTE {
        return Ok(ProgramHeader { kind, segment });
    }
    let in_file = segment.offset.checked_add(segment.file_bytes).is_some_and(|end| end <= file_bytes);
    if !in_file {
        return Err(ElfError::Damaged(format!(
            "a segment takes {} bytes at {:#x}, beyond the end of the file ({file_bytes} bytes): is it truncated?",
            segment.file_bytes, segment.offset
        )));
    }
    let in_space = segment.address.checked_add(segment.memory_bytes).is_some();
    if kind == PT_LOAD && (!in_space || segment.file_bytes > segment.memory_bytes) {
        return Err(ElfError::Damaged(format!(
            "a segment of {} bytes for {} bytes of memory at {:#x}",
            segment.file_bytes, segment.memory_bytes, segment.address
        )));
    }
    Ok(ProgramHeader { kind, segment })
}

impl Notes {
    /// Adds what the notes of a segment say; of several PVH entries the first counts. A note is: name size, description size,
    /// type, name, description, the last two padded to 4 bytes (System V ABI, chapter 5, "Note Section").
    fn add<R: ReadAt + ?Sized>(&mut self, image: &R, segment: &Segment) -> Result<(), ElfError> {
        if segment.file_bytes > MAX_NOTE_BYTES {
            return Err(ElfError::Damaged(format!("a note segment of {} bytes", segment.file_bytes)));
        }
        let mut data = vec![0_u8; usize::try_from(segment.file_bytes).unwrap_or(0)];
        image.read_exact_at(&mut data, segment.offset)?;
        let mut at = 0_usize;
        while let (Some(name_bytes), Some(bytes), Some(kind)) =
            (u32_at(&data, at), u32_at(&data, at + 4), u32_at(&data, at + 8))
        {
            let part = |start: usize, bytes: u32| {
                let end = start.checked_add(bytes as usize)?;
                Some((data.get(start..end)?, end.checked_next_multiple_of(4)?))
            };
            let Some((name, description_at)) = part(at + 12, name_bytes) else { break };
            let Some((description, next)) = part(description_at, bytes) else { break };
            match (name, kind) {
                (b"Xen\0", XEN_PHYS32_ENTRY) if self.pvh_entry.is_none() => self.pvh_entry = u32_at(description, 0),
                (b"Xen\0", XEN_GUEST_OS) => self.is_linux |= description.strip_suffix(b"\0") == Some(b"linux"),
                (b"Linux\0", kind) => self.is_linux |= LINUX_NOTES.contains(&kind),
                _ => {}
            }
            at = next;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
