//! Virtio devices and their transports (virtio 1.3).
//!
//! A device ([`VirtioDevice`]) knows no registers and no transport. A transport ([`pci`], [`mmio`]) knows no device type.
//! README.md beside this file describes how a request is handled and how to add a device.

pub mod balloon;
pub mod block;
mod busy_poll;
pub mod console;
mod device;
mod features;
pub mod fs;
#[cfg(any(test, feature = "test-utils"))]
pub mod hostile;
mod interrupt;
pub mod mmio;
#[cfg(any(test, feature = "test-utils"))]
pub mod mock;
pub mod net;
mod notify_coalescer;
pub mod pci;
mod queue;
pub mod rng;
#[cfg(test)]
mod tests;
mod transport;
mod transport_state;
mod vhost;
pub mod vsock;
mod worker;

pub use device::{ActivateError, Activation, DeviceKind, VirtioDevice};
pub use features::{F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1};
pub use interrupt::{DeviceInterrupt, InterruptSource, VirtioInterrupt};
pub use queue::{Chain, QueueCounts, RingAddresses, Virtqueue};
pub use transport::{Doorbell, TransportError, TransportOptions, VirtioTransport};
pub use worker::{Worker, WorkerError, WorkerThread};
