//! The worker of a queue pair, which moves frames between the queues and the backend.

use super::backend::{Backend, BackendError, Offloads, QueueState, QueueSwitch};
use super::header::{FRAME_BYTES, HEADER_BYTES};
use super::link::Link;
use crate::error::chain as error_chain;
use crate::memory::Memory;
use crate::virtio::chain::Chain;
use crate::virtio::interrupt::DeviceInterrupt;
use crate::virtio::queue::Virtqueue;
use crate::virtio::slot::Slot;
use crate::virtio::worker::watch;
use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

/// Data of the event of the link's timer; the others have 0.
const LINK: u32 = 1;

/// The most frames received before frames are sent again.
const BATCH: usize = 64;

/// The receive buffers that the driver supports (virtio 1.3 §5.1.6.3.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum RxBuffers {
    /// A frame must fit into one chain.
    Single,
    /// A frame may be spread over several chains (`VIRTIO_NET_F_MRG_RXBUF`).
    Mergeable,
}

/// What a queue pair keeps over resets.
#[derive(Clone)]
pub(super) struct PairResources {
    pub(super) backend: Slot<Box<dyn Backend>>,
    /// A received frame, with its header, that waits for receive buffers over a pause.
    pub(super) waiting: Slot<Vec<u8>>,
    pub(super) switch: QueueSwitch,
    /// The state of the backend's queue until the driver enables queue pairs by a control command (virtio 1.3 §5.1.6.5.5).
    pub(super) initial_state: QueueState,
}

impl PairResources {
    /// Sets the offloads of the backend, which no worker uses.
    ///
    /// # Errors
    /// Returns the error of the host.
    pub(super) fn set_offloads(&self, offloads: Offloads) -> io::Result<()> {
        let mut backend = self.backend.take();
        let result = backend.as_mut().map_or(Ok(()), |backend| backend.set_offloads(offloads));
        self.backend.put(backend);
        result
    }

    /// Sets the backend's queue to its state before a driver starts.
    pub(super) fn reset_queue(&self) {
        if let Err(error) = (self.switch)(self.initial_state) {
            log::error!("net: cannot set a queue of the backend to {:?}: {error}", self.initial_state);
        }
    }
}

/// What the driver has negotiated.
#[derive(Clone, Copy)]
pub(super) struct Negotiated {
    pub(super) offloads: Offloads,
    pub(super) rx_buffers: RxBuffers,
}

pub(super) struct Pair {
    resources: PairResources,
    backend: Option<Box<dyn Backend>>,
    interrupt: Arc<DeviceInterrupt>,
    /// For one of the pairs: the link, which it watches.
    link: Option<Arc<Link>>,
    offloads: Offloads,
    receive: Virtqueue,
    transmit: Virtqueue,
    rx_buffers: RxBuffers,
    frame: Vec<u8>,
    /// Length in bytes of the received frame in `frame` that waits for receive buffers; 0 for none.
    pending_rx: usize,
    /// The backend accepts no frame now.
    tx_blocked: bool,
}

impl Pair {
    /// Takes the backend out of `resources` until the worker is dropped.
    pub(super) fn new(
        resources: PairResources,
        interrupt: Arc<DeviceInterrupt>,
        link: Option<Arc<Link>>,
        receive: Virtqueue,
        mut transmit: Virtqueue,
        negotiated: Negotiated,
    ) -> Self {
        let backend = resources.backend.take();
        // passt has its own TCP, which takes delayed acknowledgements for lost segments and retransmits (measured: 24 times
        // the data). The host's TCP behind a tap interface does not.
        if !backend.as_ref().is_some_and(|backend| backend.has_header()) {
            transmit.disable_coalescing();
        }
        let mut frame = resources.waiting.take().unwrap_or_default();
        let pending_rx = frame.len();
        frame.resize(FRAME_BYTES.max(pending_rx), 0);
        Self {
            resources,
            backend,
            interrupt,
            link,
            offloads: negotiated.offloads,
            receive,
            transmit,
            rx_buffers: negotiated.rx_buffers,
            frame,
            pending_rx,
            tx_blocked: false,
        }
    }

    /// Receives up to [`BATCH`] frames. Returns true if there may be more.
    fn receive_frames(&mut self, memory: &Memory) -> bool {
        let Some(backend) = self.backend.as_mut() else { return false };
        let start = if backend.has_header() { 0 } else { HEADER_BYTES };
        for _ in 0..BATCH {
            if self.pending_rx == 0 {
                match backend.receive(&mut self.frame[start..]) {
                    Ok(Some(len)) => self.pending_rx = start + len,
                    Ok(None) => return false,
                    Err(error) => {
                        log::warn!("net: cannot receive: {}", error_chain(&error));
                        return false;
                    }
                }
            }
            if self.pending_rx < HEADER_BYTES {
                self.pending_rx = 0;
                continue;
            }
            match deliver(&mut self.receive, memory, &mut self.frame[..self.pending_rx], self.rx_buffers) {
                Delivery::Done => self.pending_rx = 0,
                // The driver kicks when it adds buffers. Try again where it added some before it saw the request to kick.
                Delivery::NoBuffers if self.receive.enable_notification_beyond_available() => {}
                Delivery::NoBuffers => return false,
            }
        }
        true
    }

    /// Sends the available frames, until the backend accepts no more.
    fn send_frames(&mut self) {
        let Some(backend) = self.backend.as_mut().filter(|_| !self.tx_blocked) else { return };
        let header = backend.has_header();
        let mut blocked = false;
        self.transmit.serve(|chain| {
            if !header {
                chain.readable.skip(HEADER_BYTES);
            }
            match backend.send(&mut chain.readable) {
                Ok(()) => Some(0),
                Err(BackendError::WouldBlock) => {
                    blocked = true;
                    None
                }
                Err(error) => {
                    log::debug!("net: frame dropped: {}", error_chain(&error));
                    Some(0)
                }
            }
        });
        self.tx_blocked = blocked;
    }
}

enum Delivery {
    /// The frame was written to receive buffers, or dropped as it can never fit.
    Done,
    /// The available receive buffers are too small for the frame.
    NoBuffers,
}

/// Writes a frame with its header to one chain, or to several where buffers are mergeable (virtio 1.3 §5.1.6.4).
fn deliver(queue: &mut Virtqueue, memory: &Memory, frame: &mut [u8], rx_buffers: RxBuffers) -> Delivery {
    let mut chains: Vec<Chain<'_>> = Vec::new();
    let mut capacity = 0;
    while capacity < frame.len() && (rx_buffers == RxBuffers::Mergeable || chains.is_empty()) {
        let Some(chain) = queue.pop(memory) else {
            undo_pops(queue, chains.len());
            return Delivery::NoBuffers;
        };
        capacity += chain.writable.len();
        chains.push(chain);
        // All buffers of the queue together are too small.
        if chains.len() == usize::from(queue.size()) {
            break;
        }
    }
    if capacity < frame.len() {
        log::debug!("net: frame dropped: its {} bytes do not fit into the receive buffers", frame.len());
        undo_pops(queue, chains.len());
        return Delivery::Done;
    }
    let count = u16::try_from(chains.len()).unwrap_or(u16::MAX);
    frame[HEADER_BYTES - 2..HEADER_BYTES].copy_from_slice(&count.to_le_bytes());
    let mut rest = &frame[..];
    for chain in &mut chains {
        let written = chain.writable.write(rest);
        rest = &rest[written..];
        queue.push(chain.head, u32::try_from(written).unwrap_or(0));
    }
    Delivery::Done
}

fn undo_pops(queue: &mut Virtqueue, count: usize) {
    for _ in 0..count {
        queue.undo_pop();
    }
}

impl MutEventSubscriber for Pair {
    fn process(&mut self, events: Events, _ops: &mut EventOps<'_>) {
        if events.data() == LINK {
            self.link.iter().for_each(|link| link.timer_expired(&self.interrupt));
            return;
        }
        let fd = self.backend.as_ref().map(|backend| backend.fd().as_raw_fd());
        if Some(events.fd()) == fd && events.event_set().contains(EventSet::OUT) {
            let flushed = self.backend.as_mut().is_none_or(|backend| backend.flush().is_ok());
            self.tx_blocked &= !flushed;
        }
        self.receive.take_kicks();
        self.transmit.take_kicks();
        let memory = self.receive.memory();
        // The events of the file descriptor are edge-triggered: continue until there is no frame, or no buffer for it.
        loop {
            self.receive.disable_notification();
            let more = self.receive_frames(&memory);
            self.receive.notify();
            self.send_frames();
            if !more {
                break;
            }
        }
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        let Some(backend) = &mut self.backend else { return };
        if let Err(error) = backend.set_offloads(self.offloads) {
            log::error!("net: the device needs a reset: cannot set the offloads of the backend: {error}");
            self.interrupt.set_needs_reset();
            return;
        }
        watch(ops, Events::new(self.receive.kick(), EventSet::IN));
        watch(ops, Events::new(self.transmit.kick(), EventSet::IN));
        watch(ops, Events::new(&backend.fd(), EventSet::IN | EventSet::OUT | EventSet::EDGE_TRIGGERED));
        if let Some(link) = &self.link {
            link.start(&self.interrupt);
            watch(ops, Events::with_data(&*link.timer(), LINK, EventSet::IN));
        }
    }
}

impl Drop for Pair {
    fn drop(&mut self) {
        self.resources.reset_queue();
        self.resources.backend.put(self.backend.take());
        self.frame.truncate(self.pending_rx);
        let waits = self.pending_rx > 0;
        self.resources.waiting.put(waits.then(|| std::mem::take(&mut self.frame)));
    }
}
