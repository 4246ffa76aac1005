//! Block requests (virtio 1.3 §5.2.6): parsing a descriptor chain and checking it against the disk.

use crate::memory::Buffers;
use crate::virtio::chain::Chain;

/// Size of a sector in bytes, the unit of the protocol whatever the block size.
pub(super) const SECTOR_BYTES: u64 = 512;
/// The most sectors of one discard or write zeroes request: 2 GiB.
pub(super) const MAX_ERASE_SECTORS: u32 = 1 << 22;
/// The most bytes that one request reads or writes: 64 MiB. Linux sends 4 MiB at most, unless `max_sectors_kb` is raised.
pub(super) const MAX_DATA_BYTES: u64 = 64 << 20;
/// Size in bytes of the serial number (virtio 1.3 §5.2.6.1).
pub(super) const ID_BYTES: usize = 20;

// VIRTIO_BLK_T_*, the request types.
const T_IN: u32 = 0;
const T_OUT: u32 = 1;
const T_FLUSH: u32 = 4;
const T_GET_ID: u32 = 8;
const T_DISCARD: u32 = 11;
const T_WRITE_ZEROES: u32 = 13;

/// The unmap flag of a write zeroes segment.
const UNMAP: u32 = 1;

/// `VIRTIO_BLK_S_*`, the status of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Status {
    Ok = 0,
    IoError = 1,
    Unsupported = 2,
}

/// The operation of a request. Offsets (`at`) and lengths are in bytes and within the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Operation {
    Read { at: u64 },
    Write { at: u64 },
    Flush,
    Id,
    Discard { at: u64, len: u64 },
    WriteZeroes { at: u64, len: u64, unmap: bool },
}

/// A request that passed all checks, and can be started.
pub(super) struct Request<'m> {
    pub(super) operation: Operation,
    /// The data to write, or the buffers for the data to read.
    pub(super) data: Buffers<'m>,
    /// The byte for the status.
    pub(super) status: Buffers<'m>,
}

/// A request that is not carried out: the driver gets `status` for it.
pub(super) struct InvalidRequest<'m> {
    pub(super) status: Status,
    /// The byte for the status; `None` where the chain has no writable byte.
    pub(super) status_buffer: Option<Buffers<'m>>,
}

/// What the disk allows.
#[derive(Clone, Copy)]
pub(super) struct Limits {
    /// Size of the disk in bytes.
    pub(super) bytes: u64,
    pub(super) read_only: bool,
    /// Size of a logical block in bytes.
    pub(super) block_bytes: u64,
}

/// A segment of a discard or write zeroes request, in bytes.
struct EraseSegment {
    at: u64,
    len: u64,
    flags: u32,
}

impl Limits {
    /// Returns the offset of `sector` in bytes, where the `len` bytes from there on are whole blocks of the disk.
    fn offset(self, sector: u64, len: u64) -> Option<u64> {
        let at = sector.checked_mul(SECTOR_BYTES)?;
        let end = at.checked_add(len)?;
        let whole = at.is_multiple_of(self.block_bytes) && len.is_multiple_of(self.block_bytes);
        (end <= self.bytes && whole).then_some(at)
    }

    /// As [`Limits::offset`], for `data` to read or write, at most [`MAX_DATA_BYTES`].
    fn data(self, sector: u64, data: &Buffers<'_>) -> Option<u64> {
        let len = data.len() as u64;
        self.offset(sector, len).filter(|_| len <= MAX_DATA_BYTES)
    }
}

/// Splits a chain into header, data and status, and checks the request.
pub(super) fn parse<'m>(chain: &mut Chain<'m>, limits: Limits) -> Result<Request<'m>, InvalidRequest<'m>> {
    // The last writable byte is the status (virtio 1.3 §5.2.6).
    let Some(data_bytes) = chain.writable.len().checked_sub(1) else {
        return Err(InvalidRequest { status: Status::IoError, status_buffer: None });
    };
    let mut readable = std::mem::take(&mut chain.readable);
    let writable = chain.writable.split_to(data_bytes);
    let status = std::mem::take(&mut chain.writable);
    match operation(&mut readable, &writable, limits) {
        Ok(operation) => {
            let data = if matches!(operation, Operation::Write { .. }) { readable } else { writable };
            Ok(Request { operation, data, status })
        }
        Err(error) => Err(InvalidRequest { status: error, status_buffer: Some(status) }),
    }
}

fn operation(readable: &mut Buffers<'_>, writable: &Buffers<'_>, limits: Limits) -> Result<Operation, Status> {
    let header: [u32; 4] = read_words(readable)?;
    let sector = u64::from(header[3]) << 32 | u64::from(header[2]);
    match header[0] {
        T_IN => limits.data(sector, writable).map(|at| Operation::Read { at }).ok_or(Status::IoError),
        T_OUT if limits.read_only => Err(Status::IoError),
        T_OUT => limits.data(sector, readable).map(|at| Operation::Write { at }).ok_or(Status::IoError),
        T_FLUSH => Ok(Operation::Flush),
        T_GET_ID => Ok(Operation::Id),
        T_DISCARD | T_WRITE_ZEROES if limits.read_only => Err(Status::IoError),
        T_DISCARD => erase_segment(readable, limits).and_then(|EraseSegment { at, len, flags }| match flags {
            0 => Ok(Operation::Discard { at, len }),
            _ => Err(Status::Unsupported),
        }),
        T_WRITE_ZEROES => erase_segment(readable, limits).and_then(|EraseSegment { at, len, flags }| match flags {
            0 | UNMAP => Ok(Operation::WriteZeroes { at, len, unmap: flags == UNMAP }),
            _ => Err(Status::Unsupported),
        }),
        _ => Err(Status::Unsupported),
    }
}

fn read_words(readable: &mut Buffers<'_>) -> Result<[u32; 4], Status> {
    let mut bytes = [0; 16];
    if readable.read(&mut bytes) != bytes.len() {
        return Err(Status::IoError);
    }
    Ok([0, 4, 8, 12].map(|at| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])))
}

/// Reads the only segment, as max_discard_seg and max_write_zeroes_seg are 1.
fn erase_segment(readable: &mut Buffers<'_>, limits: Limits) -> Result<EraseSegment, Status> {
    if readable.len() != 16 {
        return Err(Status::Unsupported);
    }
    let words = read_words(readable)?;
    let sector = u64::from(words[1]) << 32 | u64::from(words[0]);
    if words[2] > MAX_ERASE_SECTORS {
        return Err(Status::IoError);
    }
    let len = u64::from(words[2]) * SECTOR_BYTES;
    limits.offset(sector, len).map(|at| EraseSegment { at, len, flags: words[3] }).ok_or(Status::IoError)
}
