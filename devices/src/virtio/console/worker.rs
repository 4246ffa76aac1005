//! The workers of the console's two queues.

use super::port::{PENDING_BYTES, Port};
use crate::virtio::queue::Virtqueue;
use crate::virtio::slot::Slot;
use crate::virtio::worker::watch;
use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use std::io::Write;
use std::sync::Arc;

/// Where the guest's output goes. `write` may block: the transmit queue then waits, and no byte is lost.
pub type ConsoleOutput = Box<dyn Write + Send>;

/// Copies input from the port to receive buffers.
pub(super) struct Receiver {
    pub(super) queue: Virtqueue,
    pub(super) port: Arc<Port>,
}

impl MutEventSubscriber for Receiver {
    fn process(&mut self, _events: Events, _ops: &mut EventOps<'_>) {
        let _ = self.port.input_available().read();
        let port = &self.port;
        let mut input = [0; PENDING_BYTES];
        let mut consumed = false;
        self.queue.serve(|chain| {
            // The lock is not held while the chain is written: the host's input waits for nothing that the guest does.
            let wanted = chain.writable.len().min(input.len());
            let count = port.take_pending(&mut input[..wanted])?;
            consumed |= count > 0;
            Some(u32::try_from(chain.writable.write(&input[..count])).unwrap_or(0))
        });
        if consumed {
            port.request_input();
        }
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        watch(ops, Events::new(self.queue.kick(), EventSet::IN));
        watch(ops, Events::new(self.port.input_available(), EventSet::IN));
    }
}

/// Writes transmit buffers to the output.
pub(super) struct Transmitter {
    queue: Virtqueue,
    /// `None` where the worker before this one has not returned it.
    output: Option<ConsoleOutput>,
    slot: Slot<ConsoleOutput>,
}

impl Transmitter {
    /// Takes the output out of `slot` until the worker is dropped.
    pub(super) fn new(queue: Virtqueue, slot: &Slot<ConsoleOutput>) -> Self {
        Self { queue, output: slot.take(), slot: slot.clone() }
    }
}

impl Drop for Transmitter {
    fn drop(&mut self) {
        self.slot.put(self.output.take());
    }
}

impl MutEventSubscriber for Transmitter {
    fn process(&mut self, _events: Events, _ops: &mut EventOps<'_>) {
        let Some(output) = &mut self.output else { return };
        let mut bytes = [0; 4096];
        self.queue.serve(|chain| {
            loop {
                let count = chain.readable.read(&mut bytes);
                if count == 0 {
                    return Some(0);
                }
                if let Err(error) = output.write_all(&bytes[..count]) {
                    log::error!("console: cannot write the output: {error}");
                    return Some(0);
                }
            }
        });
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        watch(ops, Events::new(self.queue.kick(), EventSet::IN));
    }
}
