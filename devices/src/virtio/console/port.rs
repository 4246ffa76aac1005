//! The host's side of the console port: input and terminal size.

use crate::console::{ConsoleInput, InputError};
use crate::virtio::interrupt::DeviceInterrupt;
use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// The most bytes of input that wait for receive buffers of the guest.
pub(super) const PENDING_BYTES: usize = 4096;

/// The size of a terminal in characters. 0 means that a dimension is not known.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ConsoleSize {
    /// Width in characters (`cols`, virtio 1.3 §5.3.4).
    pub columns: u16,
    /// Height in characters (`rows`, virtio 1.3 §5.3.4).
    pub rows: u16,
}

/// The host's side of a console port.
pub struct Port {
    pending: Mutex<VecDeque<u8>>,
    /// Signalled when there is input for the guest.
    input_available: EventFd,
    /// Signalled when the port can take more input.
    input_wanted: Arc<EventFd>,
    size: Mutex<ConsoleSize>,
    interrupt: Mutex<Option<Arc<DeviceInterrupt>>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Port {
    pub(super) fn new(input_wanted: Arc<EventFd>, size: ConsoleSize) -> io::Result<Self> {
        Ok(Self {
            pending: Mutex::default(),
            input_available: EventFd::new(EFD_NONBLOCK)?,
            input_wanted,
            size: Mutex::new(size),
            interrupt: Mutex::default(),
        })
    }

    /// Changes the terminal size and notifies the guest.
    pub fn resize(&self, size: ConsoleSize) {
        *lock(&self.size) = size;
        if let Some(interrupt) = lock(&self.interrupt).as_ref() {
            interrupt.signal_config_changed();
        }
    }

    pub(super) fn size(&self) -> ConsoleSize {
        *lock(&self.size)
    }

    /// Sets how the driver is notified; `None` while there is no driver.
    pub(super) fn set_interrupt(&self, interrupt: Option<Arc<DeviceInterrupt>>) {
        *lock(&self.interrupt) = interrupt;
    }

    /// Returns the eventfd that is readable when there is input for the guest.
    pub(super) fn input_available(&self) -> &EventFd {
        &self.input_available
    }

    /// Takes input that waits for receive buffers, as much as `input` has room for, and returns its length in bytes. `None`
    /// where no input waits.
    pub(super) fn take_pending(&self, input: &mut [u8]) -> Option<usize> {
        let mut pending = lock(&self.pending);
        if pending.is_empty() {
            return None;
        }
        let count = pending.len().min(input.len());
        for (to, from) in input.iter_mut().zip(pending.drain(..count)) {
            *to = from;
        }
        Some(count)
    }

    /// Signals that the port can take more input.
    pub(super) fn request_input(&self) {
        if let Err(error) = self.input_wanted.write(1) {
            log::error!("console: cannot wake the event loop for input: {error}");
        }
    }
}

impl ConsoleInput for Port {
    fn enqueue(&self, input: &[u8]) -> Result<usize, InputError> {
        let mut pending = lock(&self.pending);
        let count = input.len().min(PENDING_BYTES.saturating_sub(pending.len()));
        pending.extend(&input[..count]);
        drop(pending);
        if count > 0 {
            self.input_available.write(1).map_err(InputError::Signal)?;
        }
        Ok(count)
    }

    fn unread(&self) -> Vec<u8> {
        lock(&self.pending).iter().copied().collect()
    }
}
