//! The network device (virtio 1.3 §5.1): frames to and from a tap interface of the host, or a program on a socket.

mod backend;
mod control;
mod pair;
mod stream;
mod tap;
#[cfg(test)]
mod tests;
mod vhost;

pub use backend::{Backend, Offloads};
pub use stream::Stream;
pub use tap::{Tap, TapError};

use super::{ActivateError, Activation, DeviceKind, VirtioDevice, Worker, read_config_bytes};
use control::Control;
use pair::Pair;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

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

/// What a backend with offloads lets the driver leave to it.
const OFFLOADS: u64 =
    F_CSUM | F_GUEST_CSUM | F_GUEST_TSO4 | F_GUEST_TSO6 | F_GUEST_UFO | F_HOST_TSO4 | F_HOST_TSO6 | F_HOST_UFO;

/// struct virtio_net_hdr_v1 (§5.1.6).
const HEADER_BYTES: usize = 12;
/// The longest frame with its header: 64 KiB of payload by segmentation offload, and room for the Ethernet header.
const FRAME_BYTES: usize = 65536 + 64 + HEADER_BYTES;
const QUEUE_SIZE: u16 = 256;
const LINK_UP: u16 = 1;

/// A backend for one queue pair; the device has it while no worker does.
type Slot = Arc<Mutex<Option<Box<dyn Backend>>>>;

/// The device.
pub struct Net {
    mac: [u8; 6],
    offloads: bool,
    pairs: Vec<Slot>,
    vhost: bool,
}

impl Net {
    /// A card with the address `mac`, and one backend for each queue pair (one at least).
    #[must_use]
    pub fn new(mac: [u8; 6], backends: Vec<Box<dyn Backend>>) -> Self {
        let offloads = backends.iter().all(|backend| backend.has_header());
        let pairs = backends.into_iter().map(|backend| Arc::new(Mutex::new(Some(backend)))).collect();
        Self { mac, offloads, pairs, vhost: false }
    }

    /// The same, with the work done by the host's kernel (vhost-net).
    ///
    /// # Errors
    /// Where the host has no vhost-net.
    pub fn by_vhost(self) -> io::Result<Self> {
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
            checksum: activation.has(F_GUEST_CSUM),
            tso4: activation.has(F_GUEST_TSO4),
            tso6: activation.has(F_GUEST_TSO6),
            ufo: activation.has(F_GUEST_UFO),
        };
        let mergeable = activation.has(F_MRG_RXBUF);
        let mut workers: Vec<Worker> = Vec::new();
        let mut switches = Vec::new();
        for (index, slot) in (0_u16..).zip(&self.pairs) {
            let queues = activation.queue(index * 2).and_then(|rx| Ok((rx, activation.queue(index * 2 + 1)?)));
            let (receive, transmit) = match queues {
                Ok(queues) => queues,
                // Drivers with fewer processors than pairs leave the last ones alone.
                Err(_) if index > 0 => break,
                Err(error) => return Err(error),
            };
            let mut backend = slot.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(backend) = backend.as_mut() {
                let what = "set up the network backend";
                backend.set_offloads(offloads).map_err(|error| ActivateError::Io(what, error))?;
                // Until the driver says that it wants more, it has one pair.
                backend.set_enabled(index == 0).map_err(|error| ActivateError::Io(what, error))?;
                switches.push(backend.switch().map_err(|error| ActivateError::Io(what, error))?);
            }
            if self.vhost {
                let worker = vhost::start(backend.as_deref(), receive, transmit, &activation)?;
                workers.push(Box::new(worker));
                continue;
            }
            drop(backend);
            if let Some(pair) = Pair::new(Arc::clone(slot), receive, transmit, mergeable) {
                workers.push(Box::new(pair));
            }
        }
        if activation.has(F_MQ)
            && let Ok(queue) = activation.queue(self.pair_count() * 2)
        {
            workers.push(Box::new(Control::new(queue, switches)));
        }
        Ok(workers)
    }
}
