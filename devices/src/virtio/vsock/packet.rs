//! Headers of vsock packets (virtio 1.3 §5.10.6).

use crate::memory::Buffers;

/// Size of a header in bytes.
pub(super) const HEADER_BYTES: usize = 44;
/// `VIRTIO_VSOCK_TYPE_STREAM`, the only supported socket type.
pub(super) const TYPE_STREAM: u16 = 1;

// VIRTIO_VSOCK_OP_*.
pub(super) const OP_REQUEST: u16 = 1;
pub(super) const OP_RESPONSE: u16 = 2;
pub(super) const OP_RST: u16 = 3;
pub(super) const OP_SHUTDOWN: u16 = 4;
pub(super) const OP_RW: u16 = 5;
pub(super) const OP_CREDIT_UPDATE: u16 = 6;
pub(super) const OP_CREDIT_REQUEST: u16 = 7;

/// Flag of a shutdown: its sender does not receive any more.
pub(super) const SHUTDOWN_RECEIVE: u32 = 1;
/// Flag of a shutdown: its sender does not send any more.
pub(super) const SHUTDOWN_SEND: u32 = 2;

/// The header of a packet: struct `virtio_vsock_hdr` (virtio 1.3 §5.10.6).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) src_cid: u64,
    pub(super) dst_cid: u64,
    pub(super) src_port: u32,
    pub(super) dst_port: u32,
    pub(super) len: u32,
    /// The type of the socket (field `type`): [`TYPE_STREAM`].
    pub(super) kind: u16,
    pub(super) op: u16,
    pub(super) flags: u32,
    /// Size in bytes of the sender's receive buffer.
    pub(super) buf_alloc: u32,
    /// Number of bytes that the sender has taken out of its receive buffer, modulo 2³².
    pub(super) fwd_cnt: u32,
}

impl Header {
    /// Reads a header and consumes it. `None` where too few bytes are left.
    pub(super) fn read(from: &mut Buffers<'_>) -> Option<Self> {
        let mut bytes = [0; HEADER_BYTES];
        (from.read(&mut bytes) == HEADER_BYTES).then_some(())?;
        let word = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let short = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let long = |at: usize| u64::from(word(at + 4)) << 32 | u64::from(word(at));
        Some(Self {
            src_cid: long(0),
            dst_cid: long(8),
            src_port: word(16),
            dst_port: word(20),
            len: word(24),
            kind: short(28),
            op: short(30),
            flags: word(32),
            buf_alloc: word(36),
            fwd_cnt: word(40),
        })
    }

    pub(super) fn to_bytes(self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        let mut put = |at: usize, field: &[u8]| bytes[at..at + field.len()].copy_from_slice(field);
        put(0, &self.src_cid.to_le_bytes());
        put(8, &self.dst_cid.to_le_bytes());
        put(16, &self.src_port.to_le_bytes());
        put(20, &self.dst_port.to_le_bytes());
        put(24, &self.len.to_le_bytes());
        put(28, &self.kind.to_le_bytes());
        put(30, &self.op.to_le_bytes());
        put(32, &self.flags.to_le_bytes());
        put(36, &self.buf_alloc.to_le_bytes());
        put(40, &self.fwd_cnt.to_le_bytes());
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::Memory;
    use std::sync::Arc;
    use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

    #[test]
    fn a_header_survives_a_round_trip() {
        let memory =
            Memory::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 4096)]).expect("small"), Arc::new(()));
        let header = Header {
            src_cid: 0x1_0000_0003,
            dst_cid: 2,
            src_port: 5,
            dst_port: 6,
            len: 7,
            kind: TYPE_STREAM,
            op: OP_RW,
            flags: 8,
            buf_alloc: 9,
            fwd_cnt: 10,
        };
        memory.write_slice(&header.to_bytes(), GuestAddress(16)).expect("there");
        for (len, expected) in [(44, Some(header)), (43, None)] {
            let mut buffers = Buffers::default();
            buffers.push(&memory, GuestAddress(16), len).expect("there");
            assert_eq!(Header::read(&mut buffers), expected);
        }
    }
}
