//! Pauses of a device, for snapshots: its workers end as they do at a reset, and what the driver sees stays as it is. New workers go
//! on from where the old ones were, in this run or in another one.

use super::features::F_VERSION_1;
use super::position::QueuePosition;
use super::queue::RingAddresses;
use super::saved::{
    BusState, DeviceState, MAX_QUEUES, PauseError, QueueState, StateFault, VirtioState, VirtioStateError,
};
use super::transport_state::{ACKNOWLEDGE, DRIVER, DRIVER_OK, FAILED, FEATURES_OK, RESET_WORK, TransportState};
use super::worker_thread::WorkerThread;
use crate::error::chain;
use std::io;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

impl TransportState {
    /// Ends the workers once they have handled what is available, and flushes what was written, by `deadline`. [`Self::resume`] is to
    /// be called afterwards, whatever this returns.
    pub(super) fn pause(&mut self, deadline: Instant) -> Result<(), PauseError> {
        if self.resetting {
            return Err(PauseError::Resetting { name: Arc::clone(&self.name) });
        }
        if self.is_active {
            self.is_paused = true;
            self.device.prepare_pause();
            self.threads.iter().for_each(WorkerThread::request_reset);
            if !self.all_idle((Instant::now() + RESET_WORK).min(deadline)) {
                self.abort.store(true, Ordering::Relaxed);
            }
        }
        if !self.all_idle(deadline) {
            return Err(PauseError::Late { name: Arc::clone(&self.name) });
        }
        if self.positions.iter().any(|last| last.get().is_abandoned) {
            return Err(PauseError::Abandoned { name: Arc::clone(&self.name) });
        }
        self.put_chains_back();
        self.flush(deadline)
    }

    fn all_idle(&self, deadline: Instant) -> bool {
        self.threads.iter().all(|thread| thread.wait_idle(deadline))
    }

    /// Makes chains available again that the old workers had taken and not used. The used ring stays as it is: they are used once.
    fn put_chains_back(&self) {
        for (config, last) in self.queues.iter().zip(&self.positions).filter(|(config, _)| config.ready) {
            let mut position = last.get();
            position.put_back(&self.memory, config.rings.available_ring, config.size);
            last.set(position);
        }
    }

    /// Has a thread of the device bring to stable storage what was written.
    fn flush(&self, deadline: Instant) -> Result<(), PauseError> {
        let (Some(work), Some(thread)) = (self.device.flush(), self.threads.first()) else { return Ok(()) };
        let name = || Arc::clone(&self.name);
        let result: Arc<Mutex<Option<io::Result<()>>>> = Arc::default();
        let to = Arc::clone(&result);
        let job = Box::new(move || *to.lock().unwrap_or_else(PoisonError::into_inner) = Some(work()));
        thread.run(job).map_err(|error| PauseError::Flush { name: name(), source: io::Error::other(error) })?;
        if !self.all_idle(deadline) {
            return Err(PauseError::Late { name: name() });
        }
        let result = result.lock().unwrap_or_else(PoisonError::into_inner).take();
        // The thread may have ended.
        let result = result.unwrap_or_else(|| Err(io::Error::other("the thread of the device did not do it")));
        result.map_err(|source| PauseError::Flush { name: name(), source })
    }

    /// Gives the queues to new workers. Returns false where the old ones wait for the host: it is to be called again.
    pub(super) fn resume(&mut self) -> bool {
        if !self.is_paused || self.resetting {
            return true;
        }
        if !self.all_idle(Instant::now()) {
            return false;
        }
        self.is_paused = false;
        self.put_chains_back();
        if !std::mem::take(&mut self.is_active) || self.interrupt.needs_reset() {
            self.interrupt.repeat();
            return true;
        }
        if let Err(error) = self.activate() {
            log::warn!("{}: the device cannot go on and needs a reset: {}", self.name, chain(&error));
            self.interrupt.set_needs_reset();
            return true;
        }
        for (index, (queue, kick)) in (0_u16..).zip(self.queues.iter().zip(&self.kicks)) {
            if !queue.ready {
                continue;
            }
            // What the driver made available meanwhile, or before without the kick having been seen.
            if let Err(error) = kick.write(1) {
                log::warn!("{}: queue {index} is not looked at: {error}", self.name);
            }
            // An interrupt may have been lost on its way; one too many is no harm (virtio 1.3 §2.7.7.1).
            self.interrupt.signal_used_queue(index);
        }
        self.interrupt.repeat();
        true
    }

    /// Returns the state of the device, which is paused; `bus` is what its transport has besides.
    pub(super) fn save(&self, bus: BusState) -> Result<VirtioState, PauseError> {
        let name = || Arc::clone(&self.name);
        let device = self.device.save().map_err(|source| PauseError::State { name: name(), source })?;
        let device = device.ok_or_else(|| PauseError::Unsaved { name: name() })?;
        let queues = self.queues.iter().zip(&self.positions).map(|(config, last)| {
            let QueuePosition { next_available, next_used, .. } = last.get();
            QueueState { size: config.size, ready: config.ready, rings: config.rings, next_available, next_used }
        });
        Ok(VirtioState {
            kind: self.kind().id,
            status: self.status,
            needs_reset: self.interrupt.needs_reset(),
            config_generation: self.config_generation(),
            driver_features: self.driver_features,
            feature_selectors: [self.device_features_select, self.driver_features_select],
            queue_select: self.queue_select,
            queues: queues.collect(),
            device,
            bus,
        })
    }

    /// Sets the state of a device that no driver has accessed. It is paused then.
    pub(super) fn restore(&mut self, state: &VirtioState) -> Result<(), VirtioStateError> {
        self.try_restore(state).map_err(|source| VirtioStateError { name: Arc::clone(&self.name), source })
    }

    fn try_restore(&mut self, state: &VirtioState) -> Result<(), StateFault> {
        let (found, expected) = (state.kind, self.kind().id);
        if found != expected {
            return Err(StateFault::Kind { found, expected });
        }
        check_status(state.status)?;
        if state.status & FEATURES_OK != 0 {
            let refused = state.driver_features & !self.offered_features();
            if refused != 0 || state.driver_features & F_VERSION_1 == 0 {
                return Err(StateFault::Features(refused));
            }
        }
        check_progress(state, self.queues.iter().map(|queue| queue.max_size))?;
        if state.queues.len() != self.queues.len() || state.queues.len() > MAX_QUEUES {
            return Err(StateFault::Queues);
        }
        for (index, (queue, config)) in state.queues.iter().zip(&mut self.queues).enumerate() {
            let (size, max) = (queue.size, config.max_size);
            if !size.is_power_of_two() || size > max {
                return Err(StateFault::QueueSize { index, size, max });
            }
            (config.size, config.ready, config.rings) = (size, queue.ready, queue.rings);
        }
        for (queue, last) in state.queues.iter().zip(&self.positions) {
            let QueueState { next_available, next_used, .. } = *queue;
            last.set(QueuePosition { next_available, next_used, ..QueuePosition::default() });
        }
        self.restore_device(&state.device)?;
        self.status = state.status;
        self.driver_features = state.driver_features;
        [self.device_features_select, self.driver_features_select] = state.feature_selectors;
        self.queue_select = state.queue_select;
        self.interrupt.restore(state.config_generation, state.needs_reset);
        let runs = state.status & DRIVER_OK != 0 && !state.needs_reset;
        if runs {
            // As at DRIVER_OK, but now: a driver cannot be told of it.
            self.virtqueues().map_err(|error| StateFault::Rings(Box::new(error)))?;
        }
        (self.is_active, self.is_paused) = (runs, true);
        Ok(())
    }

    fn restore_device(&mut self, state: &DeviceState) -> Result<(), StateFault> {
        Ok(self.device.restore(state)?)
    }
}

/// Checks that a driver can have set the rest at this device status: feature bits from DRIVER on, queues from FEATURES_OK on
/// (virtio 1.3 §3.1.1). Queues move on from DRIVER_OK on.
fn check_progress(state: &VirtioState, max_sizes: impl Iterator<Item = u16>) -> Result<(), StateFault> {
    let has = |bit| state.status & bit != 0;
    if state.driver_features != 0 && !has(DRIVER) {
        return Err(StateFault::Early("feature bits"));
    }
    for (queue, max_size) in state.queues.iter().zip(max_sizes) {
        let configured = queue.ready || queue.rings != RingAddresses::default() || queue.size != max_size;
        if configured && !has(FEATURES_OK) {
            return Err(StateFault::Early("a queue"));
        }
        if (queue.next_available, queue.next_used) != (0, 0) && !(has(DRIVER_OK) && queue.ready) {
            return Err(StateFault::Early("requests"));
        }
    }
    Ok(())
}

/// Checks that a driver can have set the device status (virtio 1.3 §2.1, §3.1.1).
fn check_status(status: u8) -> Result<(), StateFault> {
    let known = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK | FAILED;
    let without = |bit, needed| status & bit != 0 && status & needed == 0;
    if status & !known != 0 || without(FEATURES_OK, DRIVER) || without(DRIVER_OK, FEATURES_OK) {
        return Err(StateFault::Status(status));
    }
    Ok(())
}
