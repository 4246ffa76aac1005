//! Descriptor chains (virtio 1.3 §2.7.5), checked before a device gets them.

use crate::memory::{BufferError, Buffers, Memory};
use thiserror::Error;

/// A descriptor chain (virtio 1.3 §2.7.5): device-readable buffers, then device-writable ones.
pub struct Chain<'m> {
    /// Index of the first descriptor, which identifies the chain in the used ring.
    pub head: u16,
    /// The device-readable buffers, which the driver has filled.
    pub readable: Buffers<'m>,
    /// The device-writable buffers, which come after the readable ones.
    pub writable: Buffers<'m>,
}

/// What a chain may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ChainLimits {
    /// The most descriptors, those of an indirect table included: the queue's size (virtio 1.3 §2.7.5.3.1).
    pub(super) descriptors: u16,
    /// The most bytes of all buffers together.
    pub(super) bytes: u32,
}

/// A descriptor chain does not follow virtio 1.3 §2.7, or has more bytes than its device takes.
#[derive(Debug, Error)]
pub(super) enum ChainError {
    #[error("a device-readable descriptor follows a device-writable one")]
    ReadableAfterWritable,
    #[error("a descriptor chain has a loop, an index out of range or a nested indirect table")]
    Unterminated,
    #[error("a descriptor chain has more descriptors than its queue, which has {0}")]
    TooManyDescriptors(u16),
    #[error("the buffers of a descriptor chain have {bytes} bytes, this device takes {max}")]
    TooManyBytes { bytes: usize, max: u32 },
    #[error(transparent)]
    Buffer(#[from] BufferError),
}

pub(super) type Descriptors<'m> = virtio_queue::DescriptorChain<&'m vm_memory::GuestMemoryMmap>;

/// Collects the buffers of a chain. virtio-queue ends its iteration without an error at a loop, at an index out of range and
/// at a nested indirect table; the last descriptor then still has `VIRTQ_DESC_F_NEXT` set. It lets an indirect table have
/// 65535 entries, whatever the size of the queue.
pub(super) fn read_chain<'m>(
    descriptors: Descriptors<'m>,
    memory: &'m Memory,
    limits: ChainLimits,
) -> Result<Chain<'m>, ChainError> {
    let mut chain =
        Chain { head: descriptors.head_index(), readable: Buffers::default(), writable: Buffers::default() };
    let mut ended = false;
    let mut seen_writable = false;
    for (index, descriptor) in descriptors.enumerate() {
        if index >= usize::from(limits.descriptors) {
            return Err(ChainError::TooManyDescriptors(limits.descriptors));
        }
        ended = !descriptor.has_next();
        if descriptor.is_write_only() {
            seen_writable = true;
            chain.writable.push(memory, descriptor.addr(), descriptor.len())?;
        } else if seen_writable {
            return Err(ChainError::ReadableAfterWritable);
        } else {
            chain.readable.push(memory, descriptor.addr(), descriptor.len())?;
        }
        let bytes = chain.readable.len() + chain.writable.len();
        if bytes > limits.bytes as usize {
            return Err(ChainError::TooManyBytes { bytes, max: limits.bytes });
        }
    }
    if ended { Ok(chain) } else { Err(ChainError::Unterminated) }
}
