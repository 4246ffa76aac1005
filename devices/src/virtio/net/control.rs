//! The control queue (virtio 1.3 §5.1.6.5), with the command that sets the number of queue pairs.

use super::backend::QueueState;
use super::pair::PairResources;
use crate::virtio::queue::Virtqueue;
use crate::virtio::worker::watch;
use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};

// VIRTIO_NET_CTRL_MQ and VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET; VIRTIO_NET_OK and VIRTIO_NET_ERR.
const CLASS_MQ: u8 = 4;
const MQ_VQ_PAIRS_SET: u8 = 0;
const OK: u8 = 0;
const ERR: u8 = 1;

pub(super) struct Control {
    queue: Virtqueue,
    /// The queue pairs that the driver enabled.
    pairs: Vec<PairResources>,
    active: ActivePairs,
}

/// The number of queue pairs that the driver uses: one until it says otherwise. It is the same over pauses.
#[derive(Clone)]
pub(super) struct ActivePairs(Arc<AtomicU16>);

impl Default for ActivePairs {
    fn default() -> Self {
        Self(Arc::new(AtomicU16::new(1)))
    }
}

impl ActivePairs {
    pub(super) fn get(&self) -> u16 {
        self.0.load(Ordering::Acquire)
    }

    pub(super) fn set(&self, count: u16) {
        self.0.store(count, Ordering::Release);
    }
}

impl Control {
    pub(super) fn new(queue: Virtqueue, pairs: Vec<PairResources>, active: ActivePairs) -> Self {
        Self { queue, pairs, active }
    }
}

impl Drop for Control {
    /// Takes the commands back, the last of which may have been handled after the reset of its queue pair.
    fn drop(&mut self) {
        self.pairs.iter().for_each(PairResources::reset_queue);
    }
}

/// Attaches the first `wanted` queue pairs and detaches the others. Returns the `ack` of the command.
fn set_pairs(pairs: &[PairResources], active: &ActivePairs, count: u16) -> u8 {
    let wanted = usize::from(count);
    if wanted == 0 || wanted > pairs.len() {
        return ERR;
    }
    for (index, pair) in pairs.iter().enumerate() {
        let state = if index < wanted { QueueState::Attached } else { QueueState::Detached };
        if let Err(error) = (pair.switch)(state) {
            log::warn!("net: cannot set queue pair {index} to {state:?}: {error}");
            return ERR;
        }
    }
    active.set(count);
    OK
}

impl MutEventSubscriber for Control {
    fn process(&mut self, _events: Events, _ops: &mut EventOps<'_>) {
        let (pairs, active) = (&self.pairs, &self.active);
        self.queue.serve(|chain| {
            let mut command = [0; 4];
            let len = chain.readable.read(&mut command);
            let [class, number, low, high] = command;
            let ack = match (class, number, len) {
                (CLASS_MQ, MQ_VQ_PAIRS_SET, 4) => set_pairs(pairs, active, u16::from_le_bytes([low, high])),
                _ => ERR,
            };
            Some(u32::try_from(chain.writable.write(&[ack])).unwrap_or(0))
        });
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        // As before a pause.
        if self.active.get() > 1 && set_pairs(&self.pairs, &self.active, self.active.get()) == ERR {
            log::warn!("net: the card has one queue pair now");
        }
        watch(ops, Events::new(self.queue.kick(), EventSet::IN));
    }
}
