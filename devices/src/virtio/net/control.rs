//! The control queue (virtio 1.3 §5.1.6.5), with the command that sets the number of queue pairs.

use super::backend::{QueueState, QueueSwitch};
use crate::virtio::queue::Virtqueue;
use crate::virtio::worker::watch;
use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};

// VIRTIO_NET_CTRL_MQ and VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET; VIRTIO_NET_OK and VIRTIO_NET_ERR.
const CLASS_MQ: u8 = 4;
const MQ_VQ_PAIRS_SET: u8 = 0;
const OK: u8 = 0;
const ERR: u8 = 1;

pub(super) struct Control {
    queue: Virtqueue,
    switches: Vec<QueueSwitch>,
}

impl Control {
    pub(super) fn new(queue: Virtqueue, switches: Vec<QueueSwitch>) -> Self {
        Self { queue, switches }
    }
}

/// Attaches the first `pairs` queue pairs and detaches the others. Returns the `ack` of the command.
fn set_pairs(switches: &[QueueSwitch], pairs: usize) -> u8 {
    if pairs == 0 || pairs > switches.len() {
        return ERR;
    }
    for (index, switch) in switches.iter().enumerate() {
        let state = if index < pairs { QueueState::Attached } else { QueueState::Detached };
        if let Err(error) = switch(state) {
            log::warn!("net: cannot set queue pair {index} to {state:?}: {error}");
            return ERR;
        }
    }
    OK
}

impl MutEventSubscriber for Control {
    fn process(&mut self, _events: Events, _ops: &mut EventOps<'_>) {
        let switches = &self.switches;
        self.queue.serve(|chain| {
            let mut command = [0; 4];
            let len = chain.readable.read(&mut command);
            let [class, number, low, high] = command;
            let ack = match (class, number, len) {
                (CLASS_MQ, MQ_VQ_PAIRS_SET, 4) => set_pairs(switches, usize::from(u16::from_le_bytes([low, high]))),
                _ => ERR,
            };
            Some(u32::try_from(chain.writable.write(&[ack])).unwrap_or(0))
        });
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        watch(ops, Events::new(self.queue.kick(), EventSet::IN));
    }
}
