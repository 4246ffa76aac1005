//! The console device (virtio 1.3 §5.3) with one port: hvc0 in a Linux guest. A line of output costs one kick, where a UART
//! costs at least one exit for each byte.

mod port;
#[cfg(test)]
mod tests;
mod worker;

pub use port::{ConsoleSize, Port};
pub use worker::ConsoleOutput;

use crate::virtio::device::{ActivateError, Activation, DeviceKind, VirtioDevice, read_config_bytes};
use crate::virtio::device_thread::DeviceThread;
use crate::virtio::saved::{DeviceFault, DeviceState, SaveFault};
use crate::virtio::slot::Slot;
use crate::virtio::worker::Worker;
use std::io;
use std::sync::Arc;
use vmm_sys_util::eventfd::EventFd;
use worker::{Receiver, Transmitter};

/// `VIRTIO_CONSOLE_F_SIZE` (virtio 1.3 §5.3.3).
const F_SIZE: u64 = 1;
/// Maximum size of a queue, in descriptors.
const QUEUE_SIZE: u16 = 64;
// Queue indices (virtio 1.3 §5.3.2).
const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;

/// The virtio console device with one port (virtio 1.3 §5.3).
pub struct Console {
    output: Slot<ConsoleOutput>,
    port: Arc<Port>,
}

impl Console {
    /// Makes a console that writes to `output`, and to the eventfd `input_wanted` when it can take more input. `size` is the
    /// size of the terminal.
    ///
    /// # Errors
    /// Returns an error where no eventfd can be created.
    pub fn new(output: ConsoleOutput, input_wanted: Arc<EventFd>, size: ConsoleSize) -> io::Result<Self> {
        let port = Port::new(input_wanted, size)?;
        Ok(Self { output: Slot::new(Some(output)), port: Arc::new(port) })
    }

    /// Returns the host's side of the console.
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

    fn thread_role(&self) -> DeviceThread {
        DeviceThread::Console
    }

    fn thread_count(&self) -> usize {
        2
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let size = self.port.size();
        let mut config = [0; 4];
        config[..2].copy_from_slice(&size.columns.to_le_bytes());
        config[2..].copy_from_slice(&size.rows.to_le_bytes());
        read_config_bytes(&config, offset, data);
    }

    fn save(&self) -> Result<Option<DeviceState>, SaveFault> {
        Ok(Some(DeviceState::Console))
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), DeviceFault> {
        if *state == DeviceState::Console { Ok(()) } else { Err(DeviceFault::Other) }
    }

    fn activate(&mut self, mut activation: Activation) -> Result<Vec<Worker>, ActivateError> {
        let receiver = Receiver { queue: activation.take_queue(RECEIVE)?, port: self.port() };
        let transmitter = Transmitter::new(activation.take_queue(TRANSMIT)?, &self.output);
        // Linux reads the size only after a configuration change notification.
        if self.port.size() != ConsoleSize::default() {
            activation.interrupt.signal_config_changed();
        }
        self.port.set_interrupt(Some(activation.interrupt));
        // Two threads, so that output that blocks does not delay input.
        Ok(vec![Box::new(receiver), Box::new(transmitter)])
    }

    fn reset(&mut self) {
        self.port.set_interrupt(None);
    }
}
