//! The network device (virtio 1.3 §5.1), with a tap interface of the host or a program on a socket as its backend.

mod backend;
mod control;
mod header;
mod link;
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

use crate::memory::Memory;
use crate::virtio::device::{ActivateError, Activation, DeviceKind, VirtioDevice, read_config_bytes};
use crate::virtio::device_thread::DeviceThread;
use crate::virtio::saved::{DeviceFault, DeviceState, SaveFault};
use crate::virtio::slot::Slot;
use crate::virtio::worker::Worker;
use control::{ActivePairs, Control};
use link::Link;
use pair::{Negotiated, Pair, PairResources, RxBuffers};
use std::io;
use std::sync::Arc;
use vhost::VhostPair;

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
/// The most bytes of a chain: a driver without mergeable buffers receives frames of [`header::FRAME_BYTES`] to chains of whole
/// pages.
const MAX_CHAIN_BYTES: u32 = 256 << 10;
/// Bit of `status` in the configuration: the link is up (virtio 1.3 §5.1.4, `VIRTIO_NET_S_LINK_UP`).
const LINK_UP: u16 = 1;

/// The virtio network device (virtio 1.3 §5.1).
pub struct Net {
    mac: [u8; 6],
    offloads: bool,
    pairs: Vec<PairResources>,
    /// vhost-net for each queue pair, where it processes the queues.
    vhost: Vec<VhostPair>,
    /// The number of queue pairs that the driver uses.
    active_pairs: ActivePairs,
    link: Arc<Link>,
}

impl Net {
    /// Makes a device with the MAC address `mac` and one backend for each queue pair, at least one.
    ///
    /// # Errors
    /// Returns the error of a backend whose queue cannot be switched on and off.
    pub fn new(mac: [u8; 6], backends: Vec<Box<dyn Backend>>) -> io::Result<Self> {
        let offloads = backends.iter().all(|backend| backend.has_header());
        let mut pairs = Vec::new();
        for backend in backends {
            let switch = backend.queue_switch()?;
            let initial_state = if pairs.is_empty() { QueueState::Attached } else { QueueState::Detached };
            switch(initial_state)?;
            let (backend, waiting) = (Slot::new(Some(backend)), Slot::new(None));
            pairs.push(PairResources { backend, waiting, switch, initial_state });
        }
        let (active_pairs, link) = (ActivePairs::default(), Arc::new(Link::new()?));
        Ok(Self { mac, offloads, pairs, vhost: Vec::new(), active_pairs, link })
    }

    /// Lets vhost-net in the host's kernel process the queues, which are in `memory`. The backends must be tap interfaces.
    ///
    /// # Errors
    /// Returns an error where the host has no vhost-net.
    pub fn with_vhost(self, memory: &Memory) -> Result<Self, VhostNetError> {
        let open = |pair: &PairResources| VhostPair::open(memory, &pair.backend);
        let vhost = self.pairs.iter().map(open).collect::<Result<_, _>>()?;
        Ok(Self { vhost, ..self })
    }

    fn control_queues(&self) -> usize {
        usize::from(self.pairs.len() > 1)
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
        vec![QUEUE_SIZE; self.pairs.len() * 2 + self.control_queues()]
    }

    fn thread_role(&self) -> DeviceThread {
        if self.vhost.is_empty() { DeviceThread::Net } else { DeviceThread::Vhost }
    }

    fn thread_count(&self) -> usize {
        self.pairs.len() + self.control_queues()
    }

    fn max_chain_bytes(&self) -> u32 {
        MAX_CHAIN_BYTES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut config = [0; 10];
        config[..6].copy_from_slice(&self.mac);
        let status = if self.link.is_up() { LINK_UP } else { 0 };
        config[6..8].copy_from_slice(&status.to_le_bytes());
        config[8..].copy_from_slice(&self.pair_count().to_le_bytes());
        read_config_bytes(&config, offset, data);
    }

    fn save(&self) -> Result<Option<DeviceState>, SaveFault> {
        // Where the host's kernel has the queues, it has their state, too.
        let state = DeviceState::Net { mac: self.mac, active_pairs: self.active_pairs.get() };
        Ok(self.vhost.is_empty().then_some(state))
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), DeviceFault> {
        let DeviceState::Net { mac, active_pairs } = *state else { return Err(DeviceFault::Other) };
        if !self.vhost.is_empty() || !(1..=self.pair_count()).contains(&active_pairs) {
            return Err(DeviceFault::Other);
        }
        self.mac = mac;
        self.active_pairs.set(active_pairs);
        self.link.announce();
        Ok(())
    }

    fn reset(&mut self) {
        self.active_pairs.set(1);
        self.pairs.iter().for_each(|pair| drop(pair.waiting.take()));
    }

    fn activate(&mut self, mut activation: Activation) -> Result<Vec<Worker>, ActivateError> {
        let offloads = Offloads {
            checksum: activation.has_feature(F_GUEST_CSUM),
            tso4: activation.has_feature(F_GUEST_TSO4),
            tso6: activation.has_feature(F_GUEST_TSO6),
            ufo: activation.has_feature(F_GUEST_UFO),
        };
        let rx_buffers = if activation.has_feature(F_MRG_RXBUF) { RxBuffers::Mergeable } else { RxBuffers::Single };
        let negotiated = Negotiated { offloads, rx_buffers };
        let mut workers: Vec<Worker> = Vec::new();
        for (index, pair) in (0_u16..).zip(&self.pairs) {
            let queues =
                activation.take_queue(index * 2).and_then(|rx| Ok((rx, activation.take_queue(index * 2 + 1)?)));
            let (receive, transmit) = match queues {
                Ok(queues) => queues,
                // A driver with fewer vCPUs than queue pairs does not enable the last pairs.
                Err(_) if index > 0 => break,
                Err(error) => return Err(error),
            };
            workers.push(match self.vhost.get(usize::from(index)) {
                Some(vhost) => Box::new(vhost.worker(pair, offloads, vec![receive, transmit], &activation)),
                None => {
                    let interrupt = Arc::clone(&activation.interrupt);
                    let link = (index == 0).then(|| Arc::clone(&self.link));
                    Box::new(Pair::new(pair.clone(), interrupt, link, receive, transmit, negotiated))
                }
            });
        }
        if activation.has_feature(F_MQ)
            && let Ok(queue) = activation.take_queue(self.pair_count() * 2)
        {
            let pairs = self.pairs.iter().take(workers.len()).cloned().collect();
            workers.push(Box::new(Control::new(queue, pairs, self.active_pairs.clone())));
        }
        Ok(workers)
    }
}
