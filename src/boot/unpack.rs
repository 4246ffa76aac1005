//! Unpacking of compressed kernels and initrds, with a library for each compression.

use hwvmm_arch::boot::bzimage::Compression;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use thiserror::Error;

/// The largest unpacked kernel or initrd, in bytes. More is taken for a decompression bomb.
const MAX_UNPACKED_BYTES: u64 = 1 << 30;
/// The granularity of holes, in bytes: a block of zeros is not written.
const BLOCK: usize = 4096;
/// The size of the buffer between decompressor and file, in bytes.
const BUFFER: usize = 256 << 10;

/// Why a payload cannot be unpacked.
#[derive(Debug, Error)]
pub enum UnpackError {
    /// The bzImage does not say where its payload is: its boot protocol is older than 2.08.
    #[error("it does not say where its compressed kernel is (it is older than Linux 2.6.26)")]
    NoPayload,
    /// The payload starts with the magic number of no compression that hwvmm knows.
    #[error("its compression is unknown (it starts with {0:02x?})")]
    Unknown(Vec<u8>),
    /// The payload cannot be read from its file.
    #[error("its payload cannot be read")]
    Read(#[source] io::Error),
    /// The compressed data are damaged or truncated.
    #[error("its {} data are damaged or cut off", .0.name())]
    Data(Compression, #[source] io::Error),
    /// The unpacked data cannot be written: the host's disk or memory is full.
    #[error("what it unpacks to cannot be written")]
    Write(#[source] io::Error),
    /// The unpacked data would be too large.
    #[error("it unpacks to more than {MAX_UNPACKED_BYTES} bytes")]
    TooLarge,
}

impl From<io::Error> for UnpackError {
    fn from(error: io::Error) -> Self {
        Self::Write(error)
    }
}

/// Writes to a file, leaving holes for blocks of zeros: kernels have megabytes of them, and holes are not read when the file
/// is loaded.
struct SparseWriter<'a> {
    file: &'a File,
    position: u64,
}

impl SparseWriter<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        for block in bytes.chunks(BLOCK) {
            if block.iter().any(|byte| *byte != 0) {
                self.file.write_all_at(block, self.position)?;
            }
            self.position += block.len() as u64;
        }
        Ok(())
    }
}

/// Unpacks `payload`, one compressed stream, into the empty file `out`. Returns the unpacked size in bytes.
///
/// # Errors
/// [`UnpackError`].
pub fn unpack(mut payload: &[u8], out: &File) -> Result<u64, UnpackError> {
    let mut writer = SparseWriter { file: out, position: 0 };
    unpack_one(&mut payload, &mut writer)?;
    out.set_len(writer.position).map_err(UnpackError::Write)?;
    Ok(writer.position)
}

/// Unpacks all parts of `archive` into the empty file `out`: compressed streams in a row, with zeros between them, as Linux
/// takes an initrd (Documentation/driver-api/early-userspace/buffer-format.rst). Each unpacked part starts at a multiple of
/// 4. Returns the unpacked size in bytes.
///
/// # Errors
/// [`UnpackError`]; a part that is not compressed is [`UnpackError::Unknown`].
pub fn unpack_parts(mut archive: &[u8], out: &File) -> Result<u64, UnpackError> {
    let mut writer = SparseWriter { file: out, position: 0 };
    while !archive.is_empty() {
        unpack_one(&mut archive, &mut writer)?;
        writer.position = writer.position.next_multiple_of(4);
        let zeros = archive.iter().take_while(|byte| **byte == 0).count();
        archive = &archive[zeros..];
    }
    out.set_len(writer.position).map_err(UnpackError::Write)?;
    Ok(writer.position)
}

/// Unpacks the stream at the front of `rest`, and moves `rest` behind it.
fn unpack_one(rest: &mut &[u8], writer: &mut SparseWriter<'_>) -> Result<(), UnpackError> {
    let start = rest.get(..16.min(rest.len())).unwrap_or_default();
    let kind = Compression::detect(start).ok_or_else(|| UnpackError::Unknown(start.to_vec()))?;
    let mut reader = reader(kind, rest).map_err(|error| UnpackError::Data(kind, error))?;
    let mut buffer = vec![0; BUFFER];
    loop {
        let filled = fill(&mut *reader, &mut buffer).map_err(|error| UnpackError::Data(kind, error))?;
        writer.write(&buffer[..filled]).map_err(UnpackError::Write)?;
        if writer.position > MAX_UNPACKED_BYTES {
            return Err(UnpackError::TooLarge);
        }
        if filled < buffer.len() {
            return Ok(());
        }
    }
}

/// Reads until `buffer` is full or the stream ends. Returns the number of bytes.
fn fill(reader: &mut dyn Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match reader.read(&mut buffer[filled..]) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

/// A reader of the unpacked bytes of the first stream in `payload`. It stops at the end of that stream: the kernel's build
/// appends the unpacked size (4 bytes) to most payloads (scripts/Makefile.lib, `size_append`).
fn reader<'a, 'b: 'a>(kind: Compression, payload: &'a mut &'b [u8]) -> io::Result<Box<dyn Read + 'a>> {
    Ok(match kind {
        Compression::Gzip => Box::new(flate2::bufread::GzDecoder::new(payload)),
        Compression::Xz => Box::new(liblzma::bufread::XzDecoder::new(payload)),
        Compression::Lzma => {
            let stream = liblzma::stream::Stream::new_lzma_decoder(u64::MAX)?;
            Box::new(liblzma::bufread::XzDecoder::new_stream(payload, stream))
        }
        Compression::Zstd => Box::new(zstd::stream::read::Decoder::with_buffer(payload)?.single_frame()),
        Compression::Bzip2 => Box::new(bzip2::bufread::BzDecoder::new(payload)),
        Compression::Lz4 => Box::new(Blocks::new(Lz4Legacy::new(payload))),
        Compression::Lzo => Box::new(Blocks::new(Lzop::new(payload)?)),
        Compression::None => Box::new(std::mem::take(payload)),
    })
}

/// A container of separately compressed blocks.
trait BlockSource {
    /// Unpacks the next block into `out`. Returns false at the end of the container.
    fn next_block(&mut self, out: &mut Vec<u8>) -> io::Result<bool>;
}

/// Reads a container as one stream.
struct Blocks<S> {
    source: S,
    block: Vec<u8>,
    taken: usize,
}

impl<S: BlockSource> Blocks<S> {
    fn new(source: S) -> Self {
        Self { source, block: Vec::new(), taken: 0 }
    }
}

impl<S: BlockSource> Read for Blocks<S> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.taken == self.block.len() {
            self.block.clear();
            self.taken = 0;
            if !self.source.next_block(&mut self.block)? {
                return Ok(0);
            }
        }
        let count = (self.block.len() - self.taken).min(buffer.len());
        buffer[..count].copy_from_slice(&self.block[self.taken..self.taken + count]);
        self.taken += count;
        Ok(count)
    }
}

fn damaged(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.to_owned())
}

/// Splits `count` bytes off the front of `rest`.
fn take<'a>(rest: &mut &'a [u8], count: usize) -> io::Result<&'a [u8]> {
    let (front, back) = rest.split_at_checked(count).ok_or(io::ErrorKind::UnexpectedEof)?;
    *rest = back;
    Ok(front)
}

/// The legacy LZ4 frame (lz4_Frame_format.md, "Legacy frame"): blocks of at most 8 MiB unpacked, each behind its compressed
/// size.
struct Lz4Legacy<'a, 'b> {
    rest: &'a mut &'b [u8],
}

impl<'a, 'b> Lz4Legacy<'a, 'b> {
    fn new(rest: &'a mut &'b [u8]) -> Self {
        *rest = rest.get(4..).unwrap_or_default();
        Self { rest }
    }
}

/// The largest unpacked size of a block of the legacy LZ4 frame, in bytes.
const LZ4_BLOCK: usize = 8 << 20;

impl BlockSource for Lz4Legacy<'_, '_> {
    fn next_block(&mut self, out: &mut Vec<u8>) -> io::Result<bool> {
        // Behind the last block is nothing, or the unpacked size that the kernel's build appends.
        let Ok(size) = take(self.rest, 4) else { return Ok(false) };
        let size = u32::from_le_bytes(size.try_into().unwrap_or_default()) as usize;
        // Zeros are the padding between two parts of an initrd.
        if self.rest.is_empty() || size == 0 {
            return Ok(false);
        }
        let packed = take(self.rest, size)?;
        out.resize(LZ4_BLOCK, 0);
        let count = lz4_flex::block::decompress_into(packed, out).map_err(|error| damaged(&error.to_string()))?;
        out.truncate(count);
        Ok(true)
    }
}

/// The file format of lzop, as Linux' lib/decompress_unlzo.c reads it. All numbers are big-endian.
struct Lzop<'a, 'b> {
    rest: &'a mut &'b [u8],
    flags: u32,
}

const LZOP_ADLER32_UNPACKED: u32 = 1;
const LZOP_ADLER32_PACKED: u32 = 1 << 1;
const LZOP_CRC32_UNPACKED: u32 = 1 << 8;
const LZOP_CRC32_PACKED: u32 = 1 << 9;
const LZOP_FILTER: u32 = 1 << 11;
/// The largest accepted unpacked size of a block of lzop, in bytes.
const LZOP_BLOCK_MAX: usize = 64 << 20;

impl<'a, 'b> Lzop<'a, 'b> {
    fn new(payload: &'a mut &'b [u8]) -> io::Result<Self> {
        let mut rest = payload.get(9..).unwrap_or_default();
        let version = u16::from_be_bytes(take(&mut rest, 2)?.try_into().unwrap_or_default());
        take(&mut rest, 2)?; // library version
        let method = if version >= 0x940 {
            take(&mut rest, 2)?; // version needed
            take(&mut rest, 2)?[0] // method, level
        } else {
            take(&mut rest, 1)?[0]
        };
        if !(1..=3).contains(&method) {
            return Err(damaged("an unknown LZO method"));
        }
        let flags = be32(&mut rest)?;
        if flags & LZOP_FILTER != 0 {
            be32(&mut rest)?;
        }
        // Mode, time, and with newer versions the upper half of the time.
        take(&mut rest, if version >= 0x940 { 12 } else { 8 })?;
        let name = usize::from(take(&mut rest, 1)?[0]);
        take(&mut rest, name + 4)?; // name, checksum of the header
        *payload = rest;
        Ok(Self { rest: payload, flags })
    }

    /// The size in bytes of the checksums that `flags` says a block has.
    fn checksum_bytes(&self, flags: [u32; 2]) -> usize {
        flags.into_iter().filter(|flag| self.flags & flag != 0).count() * 4
    }
}

fn be32(rest: &mut &[u8]) -> io::Result<u32> {
    Ok(u32::from_be_bytes(take(rest, 4)?.try_into().unwrap_or_default()))
}

impl BlockSource for Lzop<'_, '_> {
    fn next_block(&mut self, out: &mut Vec<u8>) -> io::Result<bool> {
        let unpacked = be32(self.rest)? as usize;
        if unpacked == 0 {
            return Ok(false);
        }
        let packed = be32(self.rest)? as usize;
        if unpacked > LZOP_BLOCK_MAX || packed > unpacked {
            return Err(damaged("a block of an impossible size"));
        }
        let mut checksums = self.checksum_bytes([LZOP_ADLER32_UNPACKED, LZOP_CRC32_UNPACKED]);
        // A block that is stored uncompressed has no checksums of compressed data.
        if packed < unpacked {
            checksums += self.checksum_bytes([LZOP_ADLER32_PACKED, LZOP_CRC32_PACKED]);
        }
        take(self.rest, checksums)?;
        let data = take(self.rest, packed)?;
        if packed == unpacked {
            out.extend_from_slice(data);
            return Ok(true);
        }
        out.resize(unpacked, 0);
        let count = lzokay::decompress::decompress(data, out).map_err(|error| damaged(&format!("{error:?}")))?;
        if count != unpacked {
            return Err(damaged("a block shorter than it says"));
        }
        Ok(true)
    }
}

#[cfg(test)]
mod tests;
