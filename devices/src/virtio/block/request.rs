//! Requests (virtio 1.3 §5.2.6): what the driver wants, checked.

use crate::memory::Buffers;
use crate::virtio::Chain;

/// The unit of everything in the protocol.
pub(super) const SECTOR_BYTES: u64 = 512;

const T_IN: u32 = 0;
const T_OUT: u32 = 1;
const T_FLUSH: u32 = 4;
const T_GET_ID: u32 = 8;
const T_DISCARD: u32 = 11;
const T_WRITE_ZEROES: u32 = 13;

/// The unmap flag of a write-zeroes segment.
const UNMAP: u32 = 1;

/// VIRTIO_BLK_S_*.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Status {
    Ok = 0,
    IoError = 1,
    Unsupported = 2,
}

/// What is to be done. Offsets and lengths in bytes, within the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Operation {
    Read { at: u64 },
    Write { at: u64 },
    Flush,
    Id,
    Discard { at: u64, len: u64 },
    WriteZeroes { at: u64, len: u64, unmap: bool },
}

/// A request with its data and the place for its status.
pub(super) struct Request<'m> {
    pub(super) operation: Operation,
    pub(super) data: Buffers<'m>,
    pub(super) status: Buffers<'m>,
}

/// What cannot be done: the status to give, where there is a place for it.
pub(super) struct Refused<'m> {
    pub(super) status: Status,
    pub(super) place: Option<Buffers<'m>>,
}

/// What the disk allows.
#[derive(Clone, Copy)]
pub(super) struct Limits {
    pub(super) bytes: u64,
    pub(super) read_only: bool,
    pub(super) max_erase_sectors: u32,
    pub(super) block_bytes: u64,
}

impl Limits {
    /// `sectors` from `sector` in bytes, where they lie on the disk, in whole blocks.
    fn range(&self, sector: u64, len: u64) -> Option<u64> {
        let at = sector.checked_mul(SECTOR_BYTES)?;
        let end = at.checked_add(len)?;
        let whole = at.is_multiple_of(self.block_bytes) && len.is_multiple_of(self.block_bytes);
        (end <= self.bytes && whole).then_some(at)
    }
}

/// Takes a chain apart: header, data, status.
pub(super) fn parse<'m>(chain: &mut Chain<'m>, limits: Limits) -> Result<Request<'m>, Refused<'m>> {
    // The last writable byte is the status (§5.2.6.2).
    let Some(data_bytes) = chain.writable.len().checked_sub(1) else {
        return Err(Refused { status: Status::IoError, place: None });
    };
    let mut readable = std::mem::take(&mut chain.readable);
    let into = chain.writable.split_to(data_bytes);
    let status = std::mem::take(&mut chain.writable);
    match operation(&mut readable, &into, limits) {
        Ok(operation) => {
            let data = if matches!(operation, Operation::Write { .. }) { readable } else { into };
            Ok(Request { operation, data, status })
        }
        Err(refused) => Err(Refused { status: refused, place: Some(status) }),
    }
}

fn operation(readable: &mut Buffers<'_>, into: &Buffers<'_>, limits: Limits) -> Result<Operation, Status> {
    let header: [u32; 4] = read_words(readable)?;
    let sector = u64::from(header[3]) << 32 | u64::from(header[2]);
    match header[0] {
        T_IN => limits.range(sector, into.len() as u64).map(|at| Operation::Read { at }).ok_or(Status::IoError),
        T_OUT if limits.read_only => Err(Status::IoError),
        T_OUT => limits.range(sector, readable.len() as u64).map(|at| Operation::Write { at }).ok_or(Status::IoError),
        T_FLUSH => Ok(Operation::Flush),
        T_GET_ID => Ok(Operation::Id),
        T_DISCARD | T_WRITE_ZEROES if limits.read_only => Err(Status::IoError),
        T_DISCARD => erase(readable, limits).and_then(|(at, len, flags)| match flags {
            0 => Ok(Operation::Discard { at, len }),
            _ => Err(Status::Unsupported),
        }),
        T_WRITE_ZEROES => erase(readable, limits).and_then(|(at, len, flags)| match flags {
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

/// The one segment that max_discard_seg and max_write_zeroes_seg allow.
fn erase(readable: &mut Buffers<'_>, limits: Limits) -> Result<(u64, u64, u32), Status> {
    if readable.len() != 16 {
        return Err(Status::Unsupported);
    }
    let words = read_words(readable)?;
    let sector = u64::from(words[1]) << 32 | u64::from(words[0]);
    if words[2] > limits.max_erase_sectors {
        return Err(Status::IoError);
    }
    let len = u64::from(words[2]) * SECTOR_BYTES;
    limits.range(sector, len).map(|at| (at, len, words[3])).ok_or(Status::IoError)
}
