//! Sizes of frames and their header.

/// Size in bytes of struct `virtio_net_hdr`, with `num_buffers` (virtio 1.3 §5.1.6).
pub(super) const HEADER_BYTES: usize = 12;
/// Size in bytes of the longest frame with its header: 64 KiB of payload by segmentation offload, and the Ethernet header.
pub(super) const FRAME_BYTES: usize = 65536 + 64 + HEADER_BYTES;
