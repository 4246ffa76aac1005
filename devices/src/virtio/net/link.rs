//! The state of the link. A card of a machine that goes on from a snapshot has a network that is made anew: its link goes down for a
//! moment, so that the guest asks for an address again and says on the network where it is.

use crate::virtio::interrupt::DeviceInterrupt;
use std::io;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use vmm_sys_util::timerfd::TimerFd;

/// How long the link is down: long enough for a guest to see it.
const DOWN: Duration = Duration::from_secs(1);

const UP: u8 = 0;
/// Up, and to go down when the device goes on.
const TO_GO_DOWN: u8 = 1;
const IS_DOWN: u8 = 2;

/// The link of a card.
pub(super) struct Link {
    state: AtomicU8,
    /// Expires when the link is to be up again.
    timer: Mutex<TimerFd>,
}

impl Link {
    /// # Errors
    /// Returns the error of timerfd_create(2).
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self { state: AtomicU8::new(UP), timer: Mutex::new(TimerFd::new()?) })
    }

    pub(super) fn is_up(&self) -> bool {
        self.state.load(Ordering::Acquire) != IS_DOWN
    }

    pub(super) fn timer(&self) -> MutexGuard<'_, TimerFd> {
        self.timer.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has the link go down for a moment once the device goes on.
    pub(super) fn announce(&self) {
        self.state.store(TO_GO_DOWN, Ordering::Release);
    }

    /// Takes the link down where it is to go down. To be called when the worker starts that watches the timer.
    pub(super) fn start(&self, interrupt: &DeviceInterrupt) {
        // Down already: the worker before this one ended meanwhile.
        if self.state.load(Ordering::Acquire) == UP {
            return;
        }
        if let Err(error) = self.timer().reset(DOWN, None) {
            log::error!("net: cannot set the timer of the link: {error}");
            return;
        }
        self.state.store(IS_DOWN, Ordering::Release);
        interrupt.signal_config_changed();
    }

    /// The timer has expired: the link is up.
    pub(super) fn timer_expired(&self, interrupt: &DeviceInterrupt) {
        let _ = self.timer().wait();
        if self.state.swap(UP, Ordering::AcqRel) == IS_DOWN {
            interrupt.signal_config_changed();
        }
    }
}
