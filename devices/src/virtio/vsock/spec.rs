//! Constants of the socket device that both implementations share (virtio 1.3 §5.10).

use crate::virtio::device::DeviceKind;

/// The lowest context ID (CID) that a guest can have: 0 to 2 are reserved (virtio 1.3 §5.10.4).
pub const FIRST_CID: u32 = 3;
/// The CID of the host.
pub(super) const HOST_CID: u64 = 2;
/// Maximum size of a queue, in descriptors.
pub(super) const QUEUE_SIZE: u16 = 256;
/// Number of queues: receive, transmit, event.
pub(super) const QUEUES: usize = 3;
/// The socket device: its virtio device ID, its name, and its PCI class (other communication device).
pub(super) const KIND: DeviceKind = DeviceKind { id: 19, name: "vsock", pci_class: 0x0780 };
