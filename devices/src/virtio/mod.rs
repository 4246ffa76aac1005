//! Virtio devices and their transports (virtio 1.3).
//!
//! A device ([`VirtioDevice`]) knows no registers and no transport. A transport ([`pci`], [`mmio`]) knows no device type.
//! README.md beside this file describes how a request is handled and how to add a device.

pub mod balloon;
pub mod block;
mod busy_poll;
mod chain;
pub mod console;
mod device;
mod device_thread;
mod features;
pub mod fs;
#[cfg(any(test, feature = "test-utils"))]
pub mod hostile;
mod interrupt;
#[cfg(test)]
mod late_tests;
pub mod mmio;
#[cfg(any(test, feature = "test-utils"))]
pub mod mock;
pub mod net;
mod notify_coalescer;
#[cfg(test)]
mod notify_tests;
#[cfg(test)]
mod pause_tests;
pub mod pci;
pub mod ports;
mod position;
mod queue;
mod ring_area;
#[cfg(test)]
mod ring_tests;
pub mod rng;
mod round;
mod saved;
mod shown_state;
mod slot;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod thread_tests;
mod transport;
mod transport_pause;
mod transport_state;
mod vhost;
pub mod vsock;
mod worker;
mod worker_thread;

pub use chain::Chain;
pub use device::{
    ActivateError, Activation, DEFAULT_MAX_CHAIN_BYTES, DeviceKind, FlushWork, InterruptVectors, VirtioDevice,
};
pub use device_thread::{DeviceThread, ThreadPreparation, ThreadStart};
pub use features::{F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1};
pub use interrupt::{DeviceInterrupt, InterruptSource, VirtioInterrupt};
pub use queue::{QueueCounts, RingAddresses, Virtqueue};
pub use ring_area::{QueueArea, RingArea};
pub use saved::{
    BusState, DeviceFault, DeviceState, DiskState, FileContent, FileId, FileMark, MAX_QUEUES, NodePlace, PauseError,
    PortPair, PortState, PortsState, QueueState, SaveFault, ShareHandle, ShareNode, ShareState, StateFault,
    VirtioState, VirtioStateError, VsockState,
};
pub use transport::{Doorbell, TransportError, TransportOptions, VirtioTransport};
pub use worker::{Worker, WorkerError};
