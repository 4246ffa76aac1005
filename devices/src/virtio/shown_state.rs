//! The state behind a transport whose registers are shown in pages that the guest reads without an access (see
//! [`crate::RegisterPage`]): what changes is written to the pages.

use super::transport_state::TransportState;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::Duration;

/// How often a device's thread tries to show the end of a reset, once a millisecond.
const LATE_RESET_TRIES: u32 = 100;

/// The state, and what the pages do not show yet.
pub(super) struct ShownState {
    state: Mutex<TransportState>,
    /// The device configuration changed while another thread held the lock; that thread updates the pages afterwards.
    outdated: AtomicBool,
    /// The configuration's generation that the pages show.
    generation: AtomicU32,
}

impl ShownState {
    pub(super) fn new(state: TransportState) -> Self {
        let generation = AtomicU32::new(state.config_generation());
        Self { state: Mutex::new(state), outdated: AtomicBool::new(false), generation }
    }

    fn try_lock(&self) -> Option<MutexGuard<'_, TransportState>> {
        match self.state.try_lock() {
            Ok(guard) => Some(guard),
            Err(TryLockError::Poisoned(error)) => Some(error.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }
}

/// A transport with such pages.
pub(super) trait ShowsState {
    fn shown(&self) -> &ShownState;

    /// Writes the current values of all readable registers to the pages. The configuration's generation is last.
    fn write_pages(&self, state: &TransportState);

    /// Writes `generation` to the pages in place of that of the configuration.
    fn write_generation(&self, state: &TransportState, generation: u32);

    /// Interrupts the driver for a change of the configuration.
    fn interrupt_for_config(&self) -> io::Result<()>;

    /// Returns the state, for an access of the driver. [`ShowsState::update_outdated_pages`] is to be called once it is released.
    fn state(&self) -> MutexGuard<'_, TransportState> {
        let mut state = self.shown().state.lock().unwrap_or_else(PoisonError::into_inner);
        state.continue_reset();
        state
    }

    /// Calls `call` with the lock held, and updates the pages afterwards where they became outdated meanwhile.
    fn with_state<T>(&self, call: impl FnOnce(&mut TransportState) -> T) -> T
    where
        Self: Sized,
    {
        let result = call(&mut self.state());
        self.update_outdated_pages();
        result
    }

    /// Shows `state`. A driver that reads the same generation before and after the configuration takes it for consistent (virtio 1.3
    /// §2.5.3): while a changed one is written, the pages have a generation that is neither the one before nor the one after.
    fn update_pages(&self, state: &TransportState) {
        self.shown().outdated.store(false, Ordering::SeqCst);
        let generation = state.config_generation();
        if self.shown().generation.swap(generation, Ordering::SeqCst) != generation {
            self.write_generation(state, generation.wrapping_sub(1));
        }
        self.write_pages(state);
    }

    /// Updates the pages after the device changed its configuration or its status. Must not wait for the lock: the thread that holds it may
    /// be waiting for the worker that calls this.
    fn config_changed(&self) {
        let shown = self.shown();
        shown.outdated.store(true, Ordering::SeqCst);
        if let Some(state) = shown.try_lock() {
            self.update_pages(&state);
            drop(state);
            self.update_outdated_pages();
        }
    }

    /// Updates the pages after a reset that ended late. An access of the driver at this moment has the lock, for a moment only.
    fn show_late_reset(&self) {
        for _ in 0..LATE_RESET_TRIES {
            if let Some(mut state) = self.shown().try_lock() {
                state.continue_reset();
                self.update_pages(&state);
                drop(state);
                self.update_outdated_pages();
                return;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Must be called after the lock was released. Updates the pages where the configuration changed meanwhile, and interrupts
    /// once more, as the driver may have read outdated ones after the first interrupt.
    fn update_outdated_pages(&self) {
        let shown = self.shown();
        while shown.outdated.load(Ordering::SeqCst) {
            let Some(state) = shown.try_lock() else { return };
            self.update_pages(&state);
            drop(state);
            if let Err(error) = self.interrupt_for_config() {
                log::error!("virtio: cannot raise the configuration change interrupt: {error}");
            }
        }
    }
}
