//! The workers of the console's two queues.

use super::port::Port;
use crate::virtio::queue::Virtqueue;
use crate::virtio::worker::watch;
use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use std::io::Write;
use std::sync::{Arc, Mutex, PoisonError};

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
        let mut pending = self.port.pending();
        let before = pending.len();
        self.queue.serve(|chain| {
            if pending.is_empty() {
                return None;
            }
            let (first, second) = pending.as_slices();
            let count = chain.writable.write(first);
            let count = if count == first.len() { count + chain.writable.write(second) } else { count };
            pending.drain(..count);
            Some(u32::try_from(count).unwrap_or(0))
        });
        let consumed = before > pending.len();
        drop(pending);
        if consumed {
            self.port.request_input();
        }
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        watch(ops, Events::new(self.queue.kick(), EventSet::IN));
        watch(ops, Events::new(self.port.input_available(), EventSet::IN));
    }
}

/// Writes transmit buffers to the output.
pub(super) struct Transmitter {
    pub(super) queue: Virtqueue,
    pub(super) output: Arc<Mutex<ConsoleOutput>>,
}

impl MutEventSubscriber for Transmitter {
    fn process(&mut self, _events: Events, _ops: &mut EventOps<'_>) {
        let mut output = self.output.lock().unwrap_or_else(PoisonError::into_inner);
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
