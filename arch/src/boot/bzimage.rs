//! The bzImage: setup header, protected-mode code, and the compressed kernel in it ("boot.rst" below is Linux'
//! Documentation/arch/x86/boot.rst).

use super::read::{FileRange, ReadAt, u16_at, u32_at};
use crate::layout::GpaRange;
use linux_loader::loader::bootparam::setup_header;
use serde::{Deserialize, Serialize};
use std::io;
use thiserror::Error;
use vm_memory::ByteValued;

/// "HdrS", the field `header` at file offset 0x202.
const HEADER_MAGIC: u32 = 0x5372_6448;
const BOOT_FLAG: u16 = 0xaa55;
/// The file offset of the setup header, in bytes.
const HEADER_OFFSET: usize = 0x1f1;
/// `setup_sects` counts in these, in bytes.
const SECTOR: u64 = 512;
/// The protocol version that has `xloadflags`: 2.12.
const VERSION_XLOADFLAGS: u16 = 0x020c;
/// The protocol version that has `payload_offset` and `payload_length`: 2.08.
const VERSION_PAYLOAD: u16 = 0x0208;
/// `xloadflags`: the kernel has the 64-bit entry point.
const XLF_KERNEL_64: u16 = 1;
/// The offset of the 64-bit entry point from the start of the protected-mode code, in bytes (boot.rst, "64-bit boot
/// protocol").
pub const ENTRY_64_OFFSET: u64 = 0x200;

/// Why a file is not a usable bzImage.
#[derive(Debug, Error)]
pub enum BzImageError {
    /// The file has no setup header; the text says what is missing.
    #[error("not a bzImage: {0}")]
    NotBzImage(&'static str),
    /// The header contradicts the size of the file; the text has the figures.
    #[error("damaged bzImage: {0}")]
    Damaged(String),
    /// The file cannot be read.
    #[error("cannot read the bzImage")]
    Read(#[from] io::Error),
}

/// The compression of a kernel or an initrd (Linux' usr/Kconfig and init/Kconfig list them).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Compression {
    /// The gzip format (RFC 1952).
    Gzip,
    /// The .xz format of XZ Utils.
    Xz,
    /// The Zstandard format (RFC 8878).
    Zstd,
    /// The legacy LZ4 frame (lz4_Frame_format.md, "Legacy frame").
    Lz4,
    /// The .lzma format ("LZMA alone").
    Lzma,
    /// The .bz2 format of bzip2.
    Bzip2,
    /// The file format of lzop.
    Lzo,
    /// No compression: the payload is an ELF file.
    None,
}

impl Compression {
    /// Returns the compression whose magic number `start` begins with.
    #[must_use]
    pub fn detect(start: &[u8]) -> Option<Self> {
        let table: [(&[u8], Self); 8] = [
            (b"\x1f\x8b", Self::Gzip),
            (b"\xfd7zXZ\0", Self::Xz),
            (b"\x28\xb5\x2f\xfd", Self::Zstd),
            (b"\x02\x21\x4c\x18", Self::Lz4),
            (b"\x5d\0\0", Self::Lzma),
            (b"BZh", Self::Bzip2),
            (b"\x89LZO\0\r\n\x1a\n", Self::Lzo),
            (b"\x7fELF", Self::None),
        ];
        table.into_iter().find(|(magic, _)| start.starts_with(magic)).map(|(_, kind)| kind)
    }

    /// The name for messages.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Gzip => "gzip",
            Self::Xz => "xz",
            Self::Zstd => "zstd",
            Self::Lz4 => "lz4",
            Self::Lzma => "lzma",
            Self::Bzip2 => "bzip2",
            Self::Lzo => "lzo",
            Self::None => "uncompressed",
        }
    }
}

/// The parsed headers of a bzImage.
#[derive(Clone, Debug)]
pub struct BzImage {
    /// The setup header as it is in the file; fields that it is too short for are 0.
    pub header: setup_header,
    /// The protected-mode code: all of the file behind the setup sectors.
    pub code: FileRange,
    /// The compressed kernel. `None` where the protocol is older than 2.08.
    pub payload: Option<FileRange>,
}

impl BzImage {
    /// Returns true if `start`, the first KiB of a file, has the magic numbers of a setup header.
    #[must_use]
    pub fn is_bzimage(start: &[u8]) -> bool {
        u16_at(start, 0x1fe) == Some(BOOT_FLAG) && u32_at(start, 0x202) == Some(HEADER_MAGIC)
    }

    /// Reads the setup header and checks it against the size of the file.
    ///
    /// # Errors
    /// [`BzImageError`] where the file is no bzImage, is damaged or cannot be read.
    pub fn parse<R: ReadAt + ?Sized>(image: &R) -> Result<Self, BzImageError> {
        let file_bytes = image.len_bytes()?;
        let mut start = [0_u8; 0x290];
        if file_bytes < start.len() as u64 {
            return Err(BzImageError::NotBzImage("the file is shorter than a setup header"));
        }
        image.read_exact_at(&mut start, 0)?;
        if !Self::is_bzimage(&start) {
            return Err(BzImageError::NotBzImage("no \"HdrS\" header"));
        }
        // The header ends at the target of the jump at 0x200 (boot.rst); what lies beyond is not part of it.
        let end = (0x202 + usize::from(start[0x201])).clamp(HEADER_OFFSET, start.len());
        let mut header = setup_header::default();
        let bytes = header.as_mut_slice();
        let count = bytes.len().min(end - HEADER_OFFSET);
        bytes[..count].copy_from_slice(&start[HEADER_OFFSET..HEADER_OFFSET + count]);

        let sectors = if header.setup_sects == 0 { 4 } else { u64::from(header.setup_sects) };
        let code_offset = (sectors + 1) * SECTOR;
        let Some(code_bytes) = file_bytes.checked_sub(code_offset).filter(|bytes| *bytes > 0) else {
            return Err(BzImageError::Damaged(format!(
                "its setup code alone takes {code_offset} bytes, the file has {file_bytes}: is it truncated?"
            )));
        };
        let code = FileRange { offset: code_offset, bytes: code_bytes };
        let image = Self { header, code, payload: None };
        let payload = image.find_payload()?;
        Ok(Self { payload, ..image })
    }

    fn find_payload(&self) -> Result<Option<FileRange>, BzImageError> {
        let (version, offset, bytes) = (self.header.version, self.header.payload_offset, self.header.payload_length);
        if version < VERSION_PAYLOAD || bytes == 0 {
            return Ok(None);
        }
        if u64::from(offset) + u64::from(bytes) > self.code.bytes {
            return Err(BzImageError::Damaged(format!(
                "the compressed kernel should take bytes {offset} to {} of the code, which has {} bytes: is the file \
                 truncated?",
                u64::from(offset) + u64::from(bytes),
                self.code.bytes
            )));
        }
        Ok(Some(FileRange { offset: self.code.offset + u64::from(offset), bytes: bytes.into() }))
    }

    /// Returns true if the kernel has the 64-bit entry point (`XLF_KERNEL_64`).
    #[must_use]
    pub fn has_64bit_entry(&self) -> bool {
        self.header.version >= VERSION_XLOADFLAGS && self.header.xloadflags & XLF_KERNEL_64 != 0
    }

    /// The longest command line that the kernel takes (`cmdline_size`), in bytes without the NUL.
    #[must_use]
    pub fn cmdline_max_bytes(&self) -> usize {
        if self.header.cmdline_size == 0 { 255 } else { self.header.cmdline_size as usize }
    }

    /// The guest memory that the kernel's own decompressor needs: `init_size` bytes from `pref_address`.
    #[must_use]
    pub fn guest_unpack_range(&self) -> GpaRange {
        GpaRange { start: self.header.pref_address, bytes: self.header.init_size.into() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn image() -> Vec<u8> {
        let mut file = vec![0_u8; 4096];
        file[0x1f1] = 1;
        file[0x1fe..0x200].copy_from_slice(&BOOT_FLAG.to_le_bytes());
        file[0x200..0x202].copy_from_slice(&[0xeb, 0x66]);
        file[0x202..0x206].copy_from_slice(&HEADER_MAGIC.to_le_bytes());
        file[0x206..0x208].copy_from_slice(&0x020f_u16.to_le_bytes());
        file[0x236] = 1;
        file[0x248..0x24c].copy_from_slice(&0x100_u32.to_le_bytes());
        file[0x24c..0x250].copy_from_slice(&0x200_u32.to_le_bytes());
        file
    }

    #[test]
    fn the_payload_is_found() {
        let parsed = BzImage::parse(image().as_slice()).expect("a bzImage");
        assert_eq!(parsed.code, FileRange { offset: 1024, bytes: 3072 });
        assert_eq!(parsed.payload, Some(FileRange { offset: 1024 + 0x100, bytes: 0x200 }));
        assert!(parsed.has_64bit_entry());
    }

    #[test]
    fn a_truncated_file_is_reported_as_truncated() {
        let file = image();
        for length in [0, 1, 0x201, 0x28f] {
            assert!(matches!(BzImage::parse(&file[..length]), Err(BzImageError::NotBzImage(_))), "{length}");
        }
        for length in [0x290, 1024, 1024 + 0x2ff] {
            let error = BzImage::parse(&file[..length]).expect_err("truncated").to_string();
            assert!(error.contains("truncated"), "{length}: {error}");
        }
    }

    #[test]
    fn compressions_are_detected_by_their_magic_number() {
        assert_eq!(Compression::detect(b"\xfd7zXZ\0\0\x01"), Some(Compression::Xz));
        assert_eq!(Compression::detect(b"\x7fELF"), Some(Compression::None));
        assert_eq!(Compression::detect(b""), None);
    }

    proptest! {
        #[test]
        fn a_random_header_gives_an_error_or_a_payload_inside_the_file(header in proptest::collection::vec(any::<u8>(), 0x290 - 0x1f1)) {
            let mut file = image();
            file[0x1f1..0x290].copy_from_slice(&header);
            file[0x1fe..0x200].copy_from_slice(&BOOT_FLAG.to_le_bytes());
            file[0x202..0x206].copy_from_slice(&HEADER_MAGIC.to_le_bytes());
            let payload = BzImage::parse(file.as_slice()).ok().and_then(|parsed| parsed.payload);
            if let Some(payload) = payload {
                prop_assert!(payload.offset + payload.bytes <= file.len() as u64);
            }
        }
    }
}
