//! Containers of separately compressed blocks: the legacy frame of LZ4, and lzop.

use super::limits::Meter;
use std::io::{self, Read};
use std::ops::Range;

/// A container of separately compressed blocks.
pub(super) trait BlockSource {
    /// Unpacks the next block to the front of `out`. Returns its size in bytes, `None` at the end of the container.
    fn next_block(&mut self, out: &mut Vec<u8>) -> io::Result<Option<usize>>;
}

/// Reads a container as one stream.
pub(super) struct Blocks<'m, S> {
    source: S,
    meter: &'m Meter,
    /// Room for a block, and the part of it that is to be read.
    block: Vec<u8>,
    unread: Range<usize>,
}

impl<'m, S: BlockSource> Blocks<'m, S> {
    pub(super) fn new(source: S, meter: &'m Meter) -> Self {
        Self { source, meter, block: Vec::new(), unread: 0..0 }
    }
}

impl<S: BlockSource> Read for Blocks<'_, S> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.unread.is_empty() {
            self.meter.count_block()?;
            let Some(count) = self.source.next_block(&mut self.block)? else { return Ok(0) };
            self.unread = 0..count;
        }
        let unread = self.block.get(self.unread.clone()).unwrap_or_default();
        let count = unread.len().min(buffer.len());
        buffer[..count].copy_from_slice(&unread[..count]);
        self.unread.start += count;
        Ok(count)
    }
}

/// Makes room for a block of `bytes`. Room that is there already is not written again: a block of a few packed bytes would
/// otherwise cost as much as a full one.
fn room(block: &mut Vec<u8>, bytes: usize) -> &mut [u8] {
    if block.len() < bytes {
        block.resize(bytes, 0);
    }
    &mut block[..bytes]
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
pub(super) struct Lz4Legacy<'a, 'b> {
    rest: &'a mut &'b [u8],
}

impl<'a, 'b> Lz4Legacy<'a, 'b> {
    pub(super) fn new(rest: &'a mut &'b [u8]) -> Self {
        *rest = rest.get(4..).unwrap_or_default();
        Self { rest }
    }
}

/// The largest unpacked size of a block of the legacy LZ4 frame, in bytes.
pub(super) const LZ4_BLOCK: usize = 8 << 20;

impl BlockSource for Lz4Legacy<'_, '_> {
    fn next_block(&mut self, out: &mut Vec<u8>) -> io::Result<Option<usize>> {
        // Behind the last block is nothing, or the unpacked size that the kernel's build appends.
        let Ok(size) = take(self.rest, 4) else { return Ok(None) };
        let size = u32::from_le_bytes(size.try_into().unwrap_or_default()) as usize;
        // Zeros are the padding between two parts of an initrd.
        if self.rest.is_empty() || size == 0 {
            return Ok(None);
        }
        let packed = take(self.rest, size)?;
        let count = lz4_flex::block::decompress_into(packed, room(out, LZ4_BLOCK));
        count.map(Some).map_err(|error| damaged(&error.to_string()))
    }
}

/// The file format of lzop, as Linux' lib/decompress_unlzo.c reads it. All numbers are big-endian.
pub(super) struct Lzop<'a, 'b> {
    rest: &'a mut &'b [u8],
    flags: u32,
}

pub(super) const LZOP_ADLER32_UNPACKED: u32 = 1;
const LZOP_ADLER32_PACKED: u32 = 1 << 1;
const LZOP_CRC32_UNPACKED: u32 = 1 << 8;
const LZOP_CRC32_PACKED: u32 = 1 << 9;
const LZOP_FILTER: u32 = 1 << 11;
/// The largest accepted unpacked size of a block of lzop, in bytes: `LZO_BLOCK_SIZE` of Linux.
const LZOP_BLOCK_MAX: usize = 256 << 10;

impl<'a, 'b> Lzop<'a, 'b> {
    pub(super) fn new(payload: &'a mut &'b [u8]) -> io::Result<Self> {
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
    fn next_block(&mut self, out: &mut Vec<u8>) -> io::Result<Option<usize>> {
        let unpacked = be32(self.rest)? as usize;
        if unpacked == 0 {
            return Ok(None);
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
        let out = room(out, unpacked);
        if packed == unpacked {
            out.copy_from_slice(data);
            return Ok(Some(unpacked));
        }
        let count = lzokay::decompress::decompress(data, out).map_err(|error| damaged(&format!("{error:?}")))?;
        if count != unpacked {
            return Err(damaged("a block shorter than it says"));
        }
        Ok(Some(unpacked))
    }
}
