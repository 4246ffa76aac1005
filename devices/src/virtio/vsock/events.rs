//! The event queue (virtio 1.3 §5.10.6.7), with the event of a device whose connections are gone.

use crate::virtio::queue::Virtqueue;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// `VIRTIO_VSOCK_EVENT_TRANSPORT_RESET`.
const TRANSPORT_RESET: u32 = 0;

/// Tells a guest that goes on from a snapshot that its connections are closed, once there is a buffer for it.
pub(super) struct Events {
    queue: Virtqueue,
    /// The guest has not been told.
    reset_due: Arc<AtomicBool>,
}

impl Events {
    pub(super) fn new(queue: Virtqueue, reset_due: Arc<AtomicBool>) -> Self {
        Self { queue, reset_due }
    }

    pub(super) fn queue(&self) -> &Virtqueue {
        &self.queue
    }

    /// To be called at each kick, and when the worker starts.
    pub(super) fn send(&mut self) {
        self.queue.take_kicks();
        let memory = self.queue.memory();
        while self.reset_due.load(Ordering::Acquire) {
            if let Some(mut chain) = self.queue.pop(&memory) {
                let count = chain.writable.write(&TRANSPORT_RESET.to_le_bytes());
                self.queue.push(chain.head, u32::try_from(count).unwrap_or(0));
                self.reset_due.store(false, Ordering::Release);
            } else if !self.queue.enable_notification() {
                return;
            }
        }
        self.queue.notify();
    }
}
