//! The console device with several ports (virtio 1.3 §5.3, `VIRTIO_CONSOLE_F_MULTIPORT`), none of which is a console: each is a stream of
//! bytes to this host, /dev/vportNpM in a Linux guest. A connection of the host stands behind each, which is asked for when the guest
//! opens the port.

mod control;
#[cfg(any(test, feature = "test-utils"))]
pub(in crate::virtio) mod mock;
#[cfg(test)]
mod pause_tests;
mod stream;
#[cfg(test)]
mod tests;
mod worker;

pub use stream::{Flow, PortSpec};

use crate::virtio::device::{ActivateError, Activation, DeviceKind, InterruptVectors, VirtioDevice, read_config_bytes};
use crate::virtio::device_thread::DeviceThread;
use crate::virtio::saved::{DeviceFault, DeviceState, SaveFault};
use crate::virtio::slot::Slot;
use crate::virtio::vsock::Connector;
use crate::virtio::worker::Worker as DeviceWorker;
use std::sync::Arc;
use stream::MAX_CHAIN_BYTES;
use worker::{Kept, Worker, WorkerSetup};

/// `VIRTIO_CONSOLE_F_MULTIPORT` (virtio 1.3 §5.3.3).
const F_MULTIPORT: u64 = 1 << 1;
/// Maximum size of a queue, in descriptors. Linux puts a page into each descriptor of the queues that it receives from.
const QUEUE_SIZE: u16 = 16;
// Queue indices (virtio 1.3 §5.3.2): port 0 has the first two, then come those for control, and two for each other port.
const CONTROL_RECEIVE: u16 = 2;
const CONTROL_TRANSMIT: u16 = 3;

/// The indices of the receive and the transmit queue of the port with number `port`.
fn queues(port: u16) -> (u16, u16) {
    let first = if port == 0 { 0 } else { 2 * port + 2 };
    (first, first + 1)
}

/// The console device with ports alone.
pub struct Ports {
    connector: Arc<Connector>,
    /// The ports; their numbers are their places.
    specs: &'static [PortSpec],
    /// What no worker has at the moment.
    slot: Slot<Kept>,
}

impl Ports {
    /// Makes a device with the ports `specs`, whose connections `connector` asks for.
    #[must_use]
    pub fn new(connector: Arc<Connector>, specs: &'static [PortSpec]) -> Self {
        Self { connector, specs, slot: Slot::new(None) }
    }

    fn numbers(&self) -> std::ops::Range<u16> {
        0..u16::try_from(self.specs.len()).unwrap_or(0)
    }
}

impl VirtioDevice for Ports {
    fn kind(&self) -> DeviceKind {
        DeviceKind { id: 3, name: "ports", pci_class: 0x0780 }
    }

    fn device_features(&self) -> u64 {
        F_MULTIPORT
    }

    fn queue_max_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; 2 * self.specs.len() + 2]
    }

    fn interrupt_vectors(&self) -> InterruptVectors {
        InterruptVectors::Shared
    }

    fn max_chain_bytes(&self) -> u32 {
        MAX_CHAIN_BYTES
    }

    /// It moves bytes between queues and sockets, as the vsock device does.
    fn thread_role(&self) -> DeviceThread {
        DeviceThread::Vsock
    }

    /// `struct virtio_console_config` (virtio 1.3 §5.3.4): no size, and the number of ports.
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let ports = u64::from(self.numbers().end);
        read_config_bytes(&(ports << 32).to_le_bytes(), offset, data);
    }

    /// A driver without `VIRTIO_CONSOLE_F_MULTIPORT` enables no control queues, and can do nothing with the device.
    fn activate(&mut self, mut activation: Activation) -> Result<Vec<DeviceWorker>, ActivateError> {
        let (receive, transmit) = (activation.take_queue(CONTROL_RECEIVE)?, activation.take_queue(CONTROL_TRANSMIT)?);
        let mut ports = Vec::new();
        for (number, spec) in self.numbers().zip(self.specs) {
            let (from_host, to_host) = queues(number);
            ports.push((*spec, activation.take_queue(from_host)?, activation.take_queue(to_host)?));
        }
        let (connector, slot) = (Arc::clone(&self.connector), self.slot.clone());
        Ok(vec![Box::new(Worker::new(WorkerSetup { connector, ports, receive, transmit, slot }))])
    }

    fn save(&self) -> Result<Option<DeviceState>, SaveFault> {
        let kept = self.slot.take().unwrap_or_default();
        let unsent = kept.links.iter().zip(self.specs).find(|(link, _)| link.has_unsent);
        let result = match unsent {
            Some((_, spec)) => Err(SaveFault::UnsentBytes { port: spec.name }),
            None => Ok(Some(DeviceState::Ports(kept.save(self.specs.len())))),
        };
        self.slot.put(Some(kept));
        result
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), DeviceFault> {
        let DeviceState::Ports(state) = state else { return Err(DeviceFault::Other) };
        self.slot.put(Some(Kept::restored(state, self.specs)?));
        Ok(())
    }

    fn reset(&mut self) {
        drop(self.slot.take());
    }
}
