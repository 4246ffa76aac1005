//! The i8042 keyboard controller, with one command only: 0xfe, which pulses the processor's reset line.

use crate::bus::{Action, BusDevice};
use std::convert::Infallible;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use vm_superio::{I8042Device, Trigger};

#[derive(Default)]
struct ResetLine(AtomicBool);

impl Trigger for ResetLine {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        self.0.store(true, Ordering::Relaxed);
        Ok(())
    }
}

/// The controller. Clones share it; its two ports are [`I8042Port`]s.
#[derive(Clone)]
pub struct I8042(Arc<Mutex<I8042Device<ResetLine>>>);

impl Default for I8042 {
    fn default() -> Self {
        Self(Arc::new(Mutex::new(I8042Device::new(ResetLine::default()))))
    }
}

/// One port of the controller.
pub struct I8042Port {
    controller: I8042,
    register: u8,
}

impl I8042 {
    /// Returns the data port, 0x60 on a PC.
    #[must_use]
    pub fn data_port(&self) -> I8042Port {
        I8042Port { controller: self.clone(), register: 0 }
    }

    /// Returns the command and status port, 0x64 on a PC.
    #[must_use]
    pub fn command_port(&self) -> I8042Port {
        I8042Port { controller: self.clone(), register: 4 }
    }
}

impl BusDevice for I8042Port {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        let mut device = self.controller.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let [value] = data {
            *value = device.read(self.register);
        }
    }

    fn write(&self, _offset: u64, data: &[u8]) -> Action {
        let mut device = self.controller.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let [value] = data {
            match device.write(self.register, *value) {
                Ok(()) => {}
                Err(never) => match never {},
            }
        }
        if device.reset_evt().0.swap(false, Ordering::Relaxed) { Action::Reset } else { Action::None }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_command_fe_resets() {
        let controller = I8042::default();
        assert_eq!(controller.command_port().write(0, &[0xfe, 0]), Action::None);
        assert_eq!(controller.data_port().write(0, &[0xfe]), Action::None);
        assert_eq!(controller.command_port().write(0, &[0xfe]), Action::Reset);
        let mut status = [0xff];
        controller.command_port().read(0, &mut status);
        assert_eq!(status, [0], "both buffers are empty, so that the guest does not wait");
    }
}
