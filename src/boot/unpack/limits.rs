//! What unpacking may take. A packed file of some bytes can ask for gigabytes and minutes.

use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};
use std::cell::Cell;
use std::fmt;
use std::io::{self, BufRead, Read};
use std::time::Duration;
use thiserror::Error;

const MIB: u64 = 1 << 20;
/// A larger unpacked kernel or initrd is taken for a decompression bomb.
const OUTPUT_BYTES: u64 = 1 << 30;
/// A kernel's file has more than its memory: padding, relocations, notes.
const KERNEL_SLACK_BYTES: u64 = 64 * MIB;
/// Kernels have megabytes, initrds hundreds of them.
const PACKED_BYTES: u64 = 512 * MIB;
/// An initrd has one part, or a microcode archive and one more.
const PARTS: u64 = 1024;
/// 1 GiB in blocks of LZO (256 KiB, as lzop writes them and Linux takes them) are 4096.
const BLOCKS: u64 = 65_536;
/// Linux takes windows of zstd up to 128 MiB (lib/decompress_unzstd.c), and is packed by xz with a dictionary of that size
/// (scripts/xz_wrap.sh). The rest of a decoder takes less than 32 MiB.
const DECODER_BYTES: u64 = 160 * MIB;
/// The slowest decompressor makes 1 GiB in about half of this.
const CPU: Duration = Duration::from_secs(120);
/// The CPU time is checked after this many packed bytes.
const PIECE: usize = 64 << 10;

/// What unpacking may take, as plain data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// The packed size in bytes.
    pub packed_bytes: u64,
    /// The unpacked size in bytes.
    pub output_bytes: u64,
    /// The number of compressed streams in a row.
    pub parts: u64,
    /// The number of separately compressed blocks of LZ4 and LZO, in all parts.
    pub blocks: u64,
    /// The memory of a decompressor in bytes.
    pub decoder_bytes: u64,
    /// The CPU time of the unpacking thread.
    pub cpu: Duration,
}

impl Limits {
    /// The limits of an archive that unpacks to at most `output_bytes`.
    #[must_use]
    pub fn of(output_bytes: u64) -> Self {
        Self {
            packed_bytes: PACKED_BYTES.min(output_bytes),
            output_bytes: output_bytes.min(OUTPUT_BYTES),
            parts: PARTS,
            blocks: BLOCKS,
            decoder_bytes: DECODER_BYTES,
            cpu: CPU,
        }
    }

    /// The limits of a kernel for a guest with `memory_bytes`.
    #[must_use]
    pub fn kernel(memory_bytes: u64) -> Self {
        Self::of(memory_bytes.saturating_add(KERNEL_SLACK_BYTES))
    }
}

/// A limit, as errors name it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Budget {
    /// The bytes of the packed range: [`Limits::packed_bytes`].
    Packed,
    /// The bytes that are unpacked: [`Limits::output_bytes`].
    Output,
    /// The number of compressed streams in a row: [`Limits::parts`].
    Parts,
    /// The number of compressed blocks: [`Limits::blocks`].
    Blocks,
    /// The bytes of memory that the decompressor uses: [`Limits::decoder_bytes`].
    Decoder,
    /// The CPU time in milliseconds: [`Limits::cpu`].
    Cpu,
}

/// A limit was reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error, Serialize, Deserialize)]
pub struct Exceeded {
    /// The limit that was reached.
    pub budget: Budget,
    /// The most that was allowed, in the unit that the limit's name has.
    pub limit: u64,
}

impl fmt::Display for Exceeded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let limit = self.limit;
        match self.budget {
            Budget::Packed => write!(f, "it has more than {limit} packed bytes"),
            Budget::Output => write!(f, "it unpacks to more than {limit} bytes"),
            Budget::Parts => write!(f, "it has more than {limit} compressed parts"),
            Budget::Blocks => write!(f, "it has more than {limit} compressed blocks"),
            Budget::Decoder => {
                write!(f, "its decompressor needs more than {limit} bytes of memory, which that of Linux does not")
            }
            Budget::Cpu => write!(f, "it takes more than {limit} ms of CPU time to unpack"),
        }
    }
}

/// [`Read`] and [`BufRead`] allow no other error. Who called the decompressor finds the limit as the inner error.
impl From<Exceeded> for io::Error {
    fn from(exceeded: Exceeded) -> Self {
        Self::new(io::ErrorKind::QuotaExceeded, exceeded)
    }
}

fn thread_cpu() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    Duration::from_secs(seconds) + Duration::from_nanos(u64::try_from(time.tv_nsec).unwrap_or(0))
}

/// Counts what the unpacking of a file takes, and ends it at the limits.
pub(super) struct Meter {
    pub(super) limits: Limits,
    parts: Cell<u64>,
    blocks: Cell<u64>,
    started: Duration,
}

impl Meter {
    pub(super) fn new(limits: &Limits) -> Self {
        Self { limits: *limits, parts: Cell::new(0), blocks: Cell::new(0), started: thread_cpu() }
    }

    fn count(counter: &Cell<u64>, budget: Budget, limit: u64) -> Result<(), Exceeded> {
        counter.set(counter.get() + 1);
        if counter.get() > limit { Err(Exceeded { budget, limit }) } else { Ok(()) }
    }

    pub(super) fn count_part(&self) -> Result<(), Exceeded> {
        Self::count(&self.parts, Budget::Parts, self.limits.parts)
    }

    /// The error is an [`Exceeded`] in an [`io::Error`], as those of [`Read`] have to be.
    pub(super) fn count_block(&self) -> io::Result<()> {
        Ok(Self::count(&self.blocks, Budget::Blocks, self.limits.blocks)?)
    }

    /// Returns an error if `bytes` are more than the output may have.
    pub(super) fn check_output(&self, bytes: u64) -> Result<(), Exceeded> {
        let limit = self.limits.output_bytes;
        if bytes > limit { Err(Exceeded { budget: Budget::Output, limit }) } else { Ok(()) }
    }

    pub(super) fn check_cpu(&self) -> Result<(), Exceeded> {
        if thread_cpu().saturating_sub(self.started) <= self.limits.cpu {
            return Ok(());
        }
        let limit = u64::try_from(self.limits.cpu.as_millis()).unwrap_or(u64::MAX);
        Err(Exceeded { budget: Budget::Cpu, limit })
    }
}

/// The packed bytes, handed to a decompressor in pieces, with a check of the CPU time before each of them.
pub(super) struct Pieces<'a, 'b> {
    rest: &'a mut &'b [u8],
    meter: &'a Meter,
    /// Bytes of the current piece that are not consumed.
    left: usize,
}

impl<'a, 'b> Pieces<'a, 'b> {
    pub(super) fn new(rest: &'a mut &'b [u8], meter: &'a Meter) -> Self {
        Self { rest, meter, left: 0 }
    }
}

impl BufRead for Pieces<'_, '_> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if self.left == 0 {
            self.meter.check_cpu()?;
            self.left = self.rest.len().min(PIECE);
        }
        Ok(self.rest.get(..self.left).unwrap_or_default())
    }

    fn consume(&mut self, count: usize) {
        let count = count.min(self.left);
        *self.rest = self.rest.get(count..).unwrap_or_default();
        self.left -= count;
    }
}

impl Read for Pieces<'_, '_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let piece = self.fill_buf()?;
        let count = piece.len().min(buffer.len());
        buffer[..count].copy_from_slice(&piece[..count]);
        self.consume(count);
        Ok(count)
    }
}
