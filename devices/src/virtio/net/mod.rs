//! The network device (virtio 1.3 §5.1), with a tap interface of the host or a program on a socket as its backend.

mod backend;
mod control;
mod header;
mod pair;
mod stream;
mod tap;
#[cfg(test)]
mod tests;
mod vhost;

pub use backend::{Backend, BackendError, Offloads, QueueState, QueueSwitch};
pub use stream::Stream;
pub use tap::{Tap, TapError};
pub use vhost::VhostNetError;

use crate::virtio::device::{ActivateError, Activation, DeviceKind, VirtioDevice, read_config_bytes};
use crate::virtio::worker::Worker;
use backend::Slot;
use control::Control;
use pair::{Pair, RxBuffers};
use std::sync::{Arc, Mutex, PoisonError};

// Feature bits (virtio 1.3 §5.1.3).
const F_CSUM: u64 = 1 << 0;
const F_GUEST_CSUM: u64 = 1 << 1;
const F_MAC: u64 = 1 << 5;
const F_GUEST_TSO4: u64 = 1 << 7;
const F_GUEST_TSO6: u64 = 1 << 8;
const F_GUEST_UFO: u64 = 1 << 10;
const F_HOST_TSO4: u64 = 1 << 11;
const F_HOST_TSO6: u64 = 1 << 12;
const F_HOST_UFO: u64 = 1 << 14;
const F_MRG_RXBUF: u64 = 1 << 15;
const F_STATUS: u64 = 1 << 16;
const F_CTRL_VQ: u64 = 1 << 17;
const F_MQ: u64 = 1 << 22;

/// The offload features that are offered where the backend supports offloads.
const OFFLOADS: u64 =
    F_CSUM | F_GUEST_CSUM | F_GUEST_TSO4 | F_GUEST_TSO6 | F_GUEST_UFO | F_HOST_TSO4 | F_HOST_TSO6 | F_HOST_UFO;

/// Maximum size of a queue, in descriptors.
const QUEUE_SIZE: u16 = 256;
/// `VIRTIO_NET_S_LINK_UP`.
const LINK_UP: u16 = 1;

/// The network device.
pub struct Net {
    mac: [u8; 6],
    offloads: bool,
    /// The backend of each queue pair.
    pairs: Vec<Slot>,
    /// vhost-net processes the queues.
    vhost: bool,
}

impl Net {
    /// Makes a device with the MAC address `mac` and one backend for each queue pair, at least one.
    #[must_use]
    pub fn new(mac: [u8; 6], backends: Vec<Box<dyn Backend>>) -> Self {
        let offloads = backends.iter().all(|backend| backend.has_header());
        let pairs = backends.into_iter().map(|backend| Arc::new(Mutex::new(Some(backend)))).collect();
        Self { mac, offloads, pairs, vhost: false }
    }

    /// Lets vhost-net in the host's kernel process the queues. The backends must be tap interfaces.
    ///
    /// # Errors
    /// Returns an error where the host has no vhost-net.
    pub fn with_vhost(self) -> Result<Self, VhostNetError> {
        vhost::probe()?;
        Ok(Self { vhost: true, ..self })
    }

    fn pair_count(&self) -> u16 {
        u16::try_from(self.pairs.len()).unwrap_or(1)
    }
}

impl VirtioDevice for Net {
    fn kind(&self) -> DeviceKind {
        DeviceKind { id: 1, name: "net", pci_class: 0x0200 }
    }

    fn device_features(&self) -> u64 {
        let mut features = F_MAC | F_STATUS | F_MRG_RXBUF;
        if self.offloads {
            features |= OFFLOADS;
        }
        if self.pairs.len() > 1 {
            features |= F_CTRL_VQ | F_MQ;
        }
        features
    }

    fn queue_max_sizes(&self) -> Vec<u16> {
        let control = usize::from(self.pairs.len() > 1);
        vec![QUEUE_SIZE; self.pairs.len() * 2 + control]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut config = [0; 10];
        config[..6].copy_from_slice(&self.mac);
        config[6..8].copy_from_slice(&LINK_UP.to_le_bytes());
        config[8..].copy_from_slice(&self.pair_count().to_le_bytes());
        read_config_bytes(&config, offset, data);
    }

    fn activate(&mut self, mut activation: Activation) -> Result<Vec<Worker>, ActivateError> {
        let offloads = Offloads {
            checksum: activation.has_feature(F_GUEST_CSUM),
            tso4: activation.has_feature(F_GUEST_TSO4),
            tso6: activation.has_feature(F_GUEST_TSO6),
            ufo: activation.has_feature(F_GUEST_UFO),
        };
        let buffers = if activation.has_feature(F_MRG_RXBUF) { RxBuffers::Mergeable } else { RxBuffers::Single };
        let backend_error = ActivateError::io("set up the network backend");
        let mut workers: Vec<Worker> = Vec::new();
        let mut switches = Vec::new();
        for (index, slot) in (0_u16..).zip(&self.pairs) {
            let queues =
                activation.take_queue(index * 2).and_then(|rx| Ok((rx, activation.take_queue(index * 2 + 1)?)));
            let (receive, transmit) = match queues {
                Ok(queues) => queues,
                // A driver with fewer vCPUs than queue pairs does not enable the last pairs.
                Err(_) if index > 0 => break,
                Err(error) => return Err(error),
            };
            let mut backend = slot.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(backend) = backend.as_mut() {
                backend.set_offloads(offloads).map_err(backend_error)?;
                // The driver enables more than one queue pair by a control command (virtio 1.3 §5.1.6.5.5).
                let state = if index == 0 { QueueState::Attached } else { QueueState::Detached };
                backend.set_queue_state(state).map_err(backend_error)?;
                switches.push(backend.queue_switch().map_err(backend_error)?);
            }
            if self.vhost {
                let worker = vhost::start(backend.as_deref(), receive, transmit, &activation)?;
                workers.push(Box::new(worker));
                continue;
            }
            drop(backend);
            if let Some(pair) = Pair::new(Arc::clone(slot), receive, transmit, buffers) {
                workers.push(Box::new(pair));
            }
        }
        if activation.has_feature(F_MQ)
            && let Ok(queue) = activation.take_queue(self.pair_count() * 2)
        {
            workers.push(Box::new(Control::new(queue, switches)));
        }
        Ok(workers)
    }
}
