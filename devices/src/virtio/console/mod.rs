//! The console device (virtio 1.3 §5.3), one port: hvc0 in a Linux guest. A whole line costs one kick, where a UART
//! costs an exit or more a byte.

#[cfg(test)]
mod tests;

use super::worker::watch;
use super::{ActivateError, Activation, DeviceKind, Signals, VirtioDevice, Virtqueue, Worker, read_config_bytes};
use crate::console::ConsoleInput;
use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// VIRTIO_CONSOLE_F_SIZE.
const F_SIZE: u64 = 1;
const QUEUE_SIZE: u16 = 64;
const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;
/// Input kept for a guest that has no buffers out, in bytes.
const PENDING_BYTES: usize = 4096;

/// Where the guest's output goes. Its `write` may wait: the guest then waits too, and no byte is lost.
pub type ConsoleOutput = Box<dyn Write + Send>;

/// The host's side of the port: input and size.
pub struct Port {
    pending: Mutex<VecDeque<u8>>,
    arrived: EventFd,
    wanted: Arc<EventFd>,
    size: Mutex<(u16, u16)>,
    signals: Mutex<Option<Arc<Signals>>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Port {
    /// Tells the guest the terminal's size.
    pub fn resize(&self, columns: u16, rows: u16) {
        *lock(&self.size) = (columns, rows);
        if let Some(signals) = lock(&self.signals).as_ref() {
            signals.config_changed();
        }
    }
}

impl ConsoleInput for Port {
    fn enqueue(&self, input: &[u8]) -> io::Result<usize> {
        let mut pending = lock(&self.pending);
        let count = input.len().min(PENDING_BYTES.saturating_sub(pending.len()));
        pending.extend(&input[..count]);
        drop(pending);
        if count > 0 {
            self.arrived.write(1)?;
        }
        Ok(count)
    }
}

/// The device.
pub struct Console {
    output: Arc<Mutex<ConsoleOutput>>,
    port: Arc<Port>,
}

impl Console {
    /// Writes to `output`; writes to the eventfd `wanted` when it can take more input. `size` is the terminal's, in
    /// columns and rows; 0 is unknown.
    ///
    /// # Errors
    /// Where no eventfd is to be had.
    pub fn new(output: ConsoleOutput, wanted: Arc<EventFd>, size: (u16, u16)) -> io::Result<Self> {
        let port = Port {
            pending: Mutex::default(),
            arrived: EventFd::new(EFD_NONBLOCK)?,
            wanted,
            size: Mutex::new(size),
            signals: Mutex::default(),
        };
        Ok(Self { output: Arc::new(Mutex::new(output)), port: Arc::new(port) })
    }

    /// The host's side.
    #[must_use]
    pub fn port(&self) -> Arc<Port> {
        Arc::clone(&self.port)
    }
}

impl VirtioDevice for Console {
    fn kind(&self) -> DeviceKind {
        DeviceKind { id: 3, name: "console", pci_class: 0x0780 }
    }

    fn device_features(&self) -> u64 {
        F_SIZE
    }

    fn queue_max_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; 2]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let (columns, rows) = *lock(&self.port.size);
        let mut config = [0; 4];
        config[..2].copy_from_slice(&columns.to_le_bytes());
        config[2..].copy_from_slice(&rows.to_le_bytes());
        read_config_bytes(&config, offset, data);
    }

    fn activate(&mut self, mut activation: Activation) -> Result<Vec<Worker>, ActivateError> {
        let receiver = Receiver { queue: activation.queue(RECEIVE)?, port: self.port() };
        let transmitter = Transmitter { queue: activation.queue(TRANSMIT)?, output: Arc::clone(&self.output) };
        // Linux reads the size only when it is told of a change.
        if *lock(&self.port.size) != (0, 0) {
            activation.signals.config_changed();
        }
        *lock(&self.port.signals) = Some(activation.signals);
        // Two threads: output that waits for the terminal must not hold up input.
        Ok(vec![Box::new(receiver), Box::new(transmitter)])
    }

    fn reset(&mut self) {
        *lock(&self.port.signals) = None;
    }
}

/// Input, to the guest.
struct Receiver {
    queue: Virtqueue,
    port: Arc<Port>,
}

impl MutEventSubscriber for Receiver {
    fn process(&mut self, _events: Events, _ops: &mut EventOps<'_>) {
        let _ = self.port.arrived.read();
        let mut pending = lock(&self.port.pending);
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
        let taken = before > pending.len();
        drop(pending);
        if taken && let Err(error) = self.port.wanted.write(1) {
            log::error!("console: {error}");
        }
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        watch(ops, Events::new(self.queue.kick(), EventSet::IN));
        watch(ops, Events::new(&self.port.arrived, EventSet::IN));
    }
}

/// Output, from the guest.
struct Transmitter {
    queue: Virtqueue,
    output: Arc<Mutex<ConsoleOutput>>,
}

impl MutEventSubscriber for Transmitter {
    fn process(&mut self, _events: Events, _ops: &mut EventOps<'_>) {
        let mut output = lock(&self.output);
        let mut bytes = [0; 4096];
        self.queue.serve(|chain| {
            loop {
                let count = chain.readable.read(&mut bytes);
                if count == 0 {
                    return Some(0);
                }
                if let Err(error) = output.write_all(&bytes[..count]) {
                    log::error!("console: {error}");
                    return Some(0);
                }
            }
        });
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        watch(ops, Events::new(self.queue.kick(), EventSet::IN));
    }
}
