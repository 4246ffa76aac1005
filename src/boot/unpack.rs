//! Unpacking of compressed kernels and initrds, with a library for each compression. What it takes is limited ([`Limits`]).

mod blocks;
mod limits;
mod process;

pub use limits::{Budget, Exceeded, Limits};
pub use process::{FailedTask, Task, run_all};

use crate::sandbox::ConfinedError;
use blocks::{Blocks, Lz4Legacy, Lzop};
use hwvmm_arch::boot::FileRange;
use hwvmm_arch::boot::bzimage::Compression;
use limits::{Meter, Pieces};
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use thiserror::Error;
use zstd::zstd_safe::zstd_sys::ZSTD_ErrorCode::ZSTD_error_frameParameter_windowTooLarge;

/// The granularity of holes, in bytes.
const BLOCK: usize = 4096;
/// The smallest hole, in bytes. To find a hole takes three system calls when the file is loaded, as long as reading this many zeros.
const HOLE: usize = 64 << 10;
/// The size of the buffer between decompressor and file, and of the pieces that are written, in bytes.
const BUFFER: usize = 256 << 10;
/// The smallest and the largest limit that the decoder of zstd takes (`ZSTD_d_windowLogMax`), as powers of two.
const ZSTD_WINDOW_LOGS: (u32, u32) = (10, 31);

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
    /// A limit was reached.
    #[error(transparent)]
    Limit(#[from] Exceeded),
    /// The process that unpacks did not end as it should.
    #[error("the process that unpacks it failed")]
    Process(#[source] ConfinedError),
}

impl From<io::Error> for UnpackError {
    fn from(error: io::Error) -> Self {
        Self::Write(error)
    }
}

/// Writes to a file, leaving holes for zeros: kernels have megabytes of them, and holes are not read when the file is
/// loaded.
///
/// It writes large aligned pieces: the kernel's page cache keeps each as one folio where the file system can (ext4, xfs, btrfs), and
/// copies large folios faster when the file is loaded.
struct SparseWriter<'a> {
    file: &'a File,
    /// What was written and skipped, in bytes.
    position: u64,
    /// The zeros before `position` that are not written yet.
    zeros: usize,
    /// What is before those zeros, and not written yet: it ends at `end`.
    piece: Vec<u8>,
    end: u64,
}

impl<'a> SparseWriter<'a> {
    fn new(file: &'a File) -> Self {
        Self { file, position: 0, zeros: 0, piece: Vec::with_capacity(BUFFER), end: 0 }
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        let is_zero = |block: &[u8]| block.iter().all(|byte| *byte == 0);
        let mut rest = bytes;
        while !rest.is_empty() {
            let zero = is_zero(&rest[..BLOCK.min(rest.len())]);
            let run = rest.chunks(BLOCK).take_while(|block| is_zero(block) == zero).map(<[u8]>::len).sum();
            let (front, back) = rest.split_at(run);
            if zero {
                self.skip(run);
            } else {
                self.data(front)?;
            }
            rest = back;
        }
        Ok(())
    }

    /// Moves the position by `bytes` zeros, which are not written if the run of zeros is at least [`HOLE`] long.
    fn skip(&mut self, bytes: usize) {
        self.position += bytes as u64;
        self.zeros += bytes;
    }

    fn data(&mut self, bytes: &[u8]) -> io::Result<()> {
        let zeros = std::mem::take(&mut self.zeros);
        if zeros < HOLE {
            self.append(&[0; HOLE][..zeros])?;
        } else {
            self.flush()?;
            self.end = self.position;
        }
        self.position += bytes.len() as u64;
        self.append(bytes)
    }

    /// Adds to the piece, and writes it where it ends at a multiple of its size in the file.
    fn append(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let room = BUFFER - usize::try_from(self.end % BUFFER as u64).unwrap_or(0);
            let (front, back) = bytes.split_at(room.min(bytes.len()));
            self.piece.extend_from_slice(front);
            self.end += front.len() as u64;
            if front.len() == room {
                self.flush()?;
            }
            bytes = back;
        }
        Ok(())
    }

    /// Writes the piece.
    fn flush(&mut self) -> io::Result<()> {
        self.file.write_all_at(&self.piece, self.end - self.piece.len() as u64)?;
        self.piece.clear();
        Ok(())
    }
}

/// What a packed range of a file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// One compressed stream: the payload of a bzImage.
    Stream,
    /// Compressed streams in a row: an initrd.
    Parts,
}

/// What is to be unpacked, as plain data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Job {
    /// The packed range of the file.
    pub range: FileRange,
    /// Says if the range is one compressed stream or several in a row.
    pub content: Content,
    /// What unpacking may take.
    pub limits: Limits,
}

impl Job {
    /// Returns an error if the packed range is larger than its limit.
    pub(super) fn check_packed(&self) -> Result<(), Exceeded> {
        let limit = self.limits.packed_bytes;
        if self.range.bytes > limit { Err(Exceeded { budget: Budget::Packed, limit }) } else { Ok(()) }
    }

    /// Unpacks the range of `packed` into the empty file `out`. Returns the unpacked size in bytes.
    ///
    /// # Errors
    /// [`UnpackError`].
    pub fn run(&self, packed: &File, out: &File) -> Result<u64, UnpackError> {
        self.check_packed()?;
        let mut bytes = vec![0; usize::try_from(self.range.bytes).unwrap_or(usize::MAX)];
        packed.read_exact_at(&mut bytes, self.range.offset).map_err(UnpackError::Read)?;
        match self.content {
            Content::Stream => unpack(&bytes, out, &self.limits),
            Content::Parts => unpack_parts(&bytes, out, &self.limits),
        }
    }
}

/// Unpacks `payload`, one compressed stream, into the empty file `out`. Returns the unpacked size in bytes.
///
/// # Errors
/// [`UnpackError`].
pub fn unpack(payload: &[u8], out: &File, limits: &Limits) -> Result<u64, UnpackError> {
    Unpacker::new(payload, out, limits).stream()
}

/// Unpacks all parts of `archive` into the empty file `out`: compressed streams in a row, with zeros between them, as Linux
/// takes an initrd (Documentation/driver-api/early-userspace/buffer-format.rst). Each unpacked part starts at a multiple of
/// 4. Returns the unpacked size in bytes.
///
/// # Errors
/// [`UnpackError`]; a part that is not compressed is [`UnpackError::Unknown`].
pub fn unpack_parts(archive: &[u8], out: &File, limits: &Limits) -> Result<u64, UnpackError> {
    Unpacker::new(archive, out, limits).parts()
}

struct Unpacker<'a, 'b> {
    /// What is not unpacked yet.
    rest: &'b [u8],
    writer: SparseWriter<'a>,
    meter: Meter,
    buffer: Vec<u8>,
}

impl<'a, 'b> Unpacker<'a, 'b> {
    fn new(rest: &'b [u8], file: &'a File, limits: &Limits) -> Self {
        Self { rest, writer: SparseWriter::new(file), meter: Meter::new(limits), buffer: vec![0; BUFFER] }
    }

    fn stream(mut self) -> Result<u64, UnpackError> {
        self.one()?;
        self.end()
    }

    fn parts(mut self) -> Result<u64, UnpackError> {
        while !self.rest.is_empty() {
            self.meter.count_part()?;
            self.one()?;
            while !self.writer.position.is_multiple_of(4) {
                self.writer.skip(1);
            }
            let zeros = self.rest.iter().take_while(|byte| **byte == 0).count();
            self.rest = &self.rest[zeros..];
        }
        self.end()
    }

    fn end(mut self) -> Result<u64, UnpackError> {
        let bytes = self.writer.position;
        self.meter.check_output(bytes)?;
        self.writer.flush().map_err(UnpackError::Write)?;
        self.writer.file.set_len(bytes).map_err(UnpackError::Write)?;
        Ok(bytes)
    }

    /// Unpacks the stream at the front of `rest`, and moves `rest` behind it.
    fn one(&mut self) -> Result<(), UnpackError> {
        let start = self.rest.get(..16.min(self.rest.len())).unwrap_or_default();
        let kind = Compression::detect(start).ok_or_else(|| UnpackError::Unknown(start.to_vec()))?;
        let failed = |error| why(kind, error, &self.meter.limits);
        let mut reader = reader(kind, &mut self.rest, &self.meter).map_err(failed)?;
        loop {
            let filled = fill(&mut *reader, &mut self.buffer).map_err(failed)?;
            self.meter.check_output(self.writer.position.saturating_add(filled as u64))?;
            self.meter.check_cpu()?;
            self.writer.write(&self.buffer[..filled]).map_err(UnpackError::Write)?;
            if filled < self.buffer.len() {
                return Ok(());
            }
        }
    }
}

/// What an error of a decompressor means: that a limit was reached, or that the data are damaged.
fn why(kind: Compression, error: io::Error, limits: &Limits) -> UnpackError {
    let cause = error.get_ref();
    if let Some(exceeded) = cause.and_then(|cause| cause.downcast_ref::<Exceeded>()) {
        return UnpackError::Limit(*exceeded);
    }
    let xz = cause.and_then(|cause| cause.downcast_ref::<liblzma::stream::Error>());
    let zstd = cause.and_then(|cause| cause.downcast_ref::<zstd::Error>());
    if xz == Some(&liblzma::stream::Error::MemLimit)
        || zstd.is_some_and(|error| error.is(ZSTD_error_frameParameter_windowTooLarge))
    {
        return Exceeded { budget: Budget::Decoder, limit: limits.decoder_bytes }.into();
    }
    UnpackError::Data(kind, error)
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
fn reader<'a, 'b: 'a>(
    kind: Compression,
    payload: &'a mut &'b [u8],
    meter: &'a Meter,
) -> io::Result<Box<dyn Read + 'a>> {
    let memory = meter.limits.decoder_bytes;
    Ok(match kind {
        Compression::Gzip => Box::new(flate2::bufread::GzDecoder::new(Pieces::new(payload, meter))),
        Compression::Xz => {
            let stream = liblzma::stream::Stream::new_stream_decoder(memory, 0)?;
            Box::new(liblzma::bufread::XzDecoder::new_stream(Pieces::new(payload, meter), stream))
        }
        Compression::Lzma => {
            let stream = liblzma::stream::Stream::new_lzma_decoder(memory)?;
            Box::new(liblzma::bufread::XzDecoder::new_stream(Pieces::new(payload, meter), stream))
        }
        Compression::Zstd => {
            let mut decoder = zstd::stream::read::Decoder::with_buffer(Pieces::new(payload, meter))?;
            decoder.window_log_max(memory.max(1).ilog2().clamp(ZSTD_WINDOW_LOGS.0, ZSTD_WINDOW_LOGS.1))?;
            Box::new(decoder.single_frame())
        }
        Compression::Bzip2 => Box::new(bzip2::bufread::BzDecoder::new(Pieces::new(payload, meter))),
        Compression::Lz4 => Box::new(Blocks::new(Lz4Legacy::new(payload), meter)),
        Compression::Lzo => Box::new(Blocks::new(Lzop::new(payload)?, meter)),
        Compression::None => Box::new(std::mem::take(payload)),
    })
}

#[cfg(test)]
mod tests;
