//! What both transports share: the device status, feature negotiation and queue configuration (virtio 1.3 §2.1, §2.2, §3.1).
//! A transport maps its registers to this.

use super::device::{ActivateError, Activation, DeviceKind, VirtioDevice};
use super::device_thread::ThreadStart;
use super::features::{F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1};
use super::interrupt::{DeviceInterrupt, VirtioInterrupt};
use super::position::{LastPosition, QueuePosition};
use super::queue::{QueueCounts, QueueSetup, RingAddresses, Virtqueue};
use super::ring_area::{EventFields, QueueArea, RingArea, areas, overlap};
use super::transport::{TransportError, TransportOptions};
use super::worker::WorkerError;
use super::worker_thread::{StartPlan, WorkerThread};
use crate::error::chain;
use crate::half::Half;
use crate::memory::Memory;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use virtio_queue::{Queue, QueueT};
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// The longest time that a reset waits for the workers to handle what was available before it. Then they handle no more.
pub(super) const RESET_WORK: Duration = Duration::from_millis(500);
/// The longest time that a reset waits after that. A worker that does not end then either waits for the host, and the device
/// status shows the end of the reset later (virtio 1.3 §2.4).
const RESET_WAIT: Duration = Duration::from_millis(500);
/// The longest time that the threads of a device may take to end when it is dropped.
const DROP_WAIT: Duration = Duration::from_secs(2);

// Bits of the device status (virtio 1.3 §2.1).
pub(super) const ACKNOWLEDGE: u8 = 1;
pub(super) const DRIVER: u8 = 2;
pub(super) const DRIVER_OK: u8 = 4;
pub(super) const FEATURES_OK: u8 = 8;
const DEVICE_NEEDS_RESET: u8 = 64;
pub(super) const FAILED: u8 = 128;

impl RingAddresses {
    fn area(&self, area: QueueArea) -> u64 {
        match area {
            QueueArea::Descriptor => self.descriptor_table,
            QueueArea::Driver => self.available_ring,
            QueueArea::Device => self.used_ring,
        }
    }

    fn area_mut(&mut self, area: QueueArea) -> &mut u64 {
        match area {
            QueueArea::Descriptor => &mut self.descriptor_table,
            QueueArea::Driver => &mut self.available_ring,
            QueueArea::Device => &mut self.used_ring,
        }
    }
}

/// A queue's configuration, as the driver has written it so far.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct QueueConfig {
    /// The largest size that the device supports, in descriptors.
    pub(super) max_size: u16,
    /// The size that the driver chose, in descriptors.
    pub(super) size: u16,
    /// The driver has enabled the queue.
    pub(super) ready: bool,
    pub(super) rings: RingAddresses,
}

impl QueueConfig {
    fn new(max_size: u16) -> Self {
        Self { max_size, size: max_size, ..Self::default() }
    }
}

/// A device with the state that its transport keeps for it.
pub(super) struct TransportState {
    pub(super) device: Box<dyn VirtioDevice>,
    pub(super) memory: Memory,
    pub(super) name: Arc<str>,
    pub(super) interrupt: Arc<DeviceInterrupt>,
    pub(super) kicks: Vec<Arc<EventFd>>,
    counts: Vec<Arc<QueueCounts>>,
    pub(super) queues: Vec<QueueConfig>,
    /// Where each queue was when its worker ended, and is to go on.
    pub(super) positions: Vec<Arc<LastPosition>>,
    pub(super) threads: Vec<WorkerThread>,
    /// The device has workers, or those that a pause has ended are to have successors.
    pub(super) is_active: bool,
    /// No workers have the queues, and the driver waits for that to end.
    pub(super) is_paused: bool,
    /// Set when the present workers are to do nothing more.
    pub(super) abort: Arc<AtomicBool>,
    /// The driver has reset the device, whose workers have not ended.
    pub(super) resetting: bool,
    pub(super) status: u8,
    options: TransportOptions,
    pub(super) driver_features: u64,
    /// Which 32 bits of the feature bits the feature registers access: 0 for bits 0 to 31, 1 for bits 32 to 63.
    pub(super) device_features_select: u32,
    pub(super) driver_features_select: u32,
    /// The queue that the queue registers access.
    pub(super) queue_select: u16,
}

impl TransportState {
    /// # Errors
    /// Returns an error where the host is out of file descriptors.
    pub(super) fn new(
        name: &str,
        device: Box<dyn VirtioDevice>,
        memory: Memory,
        interrupt: Arc<dyn VirtioInterrupt>,
    ) -> Result<Self, TransportError> {
        let queues: Vec<QueueConfig> = device.queue_max_sizes().into_iter().map(QueueConfig::new).collect();
        let kicks: io::Result<Vec<_>> = queues.iter().map(|_| EventFd::new(EFD_NONBLOCK).map(Arc::new)).collect();
        let threads = (0..device.thread_count()).map(|index| WorkerThread::new(format!("{name}.{index}")));
        Ok(Self {
            threads: threads.collect::<Result<_, _>>()?,
            device,
            memory,
            name: name.into(),
            interrupt: DeviceInterrupt::new(interrupt),
            kicks: kicks?,
            positions: queues.iter().map(|_| Arc::default()).collect(),
            is_active: false,
            is_paused: false,
            counts: queues.iter().map(|_| Arc::default()).collect(),
            queues,
            abort: Arc::default(),
            resetting: false,
            status: 0,
            options: TransportOptions::default(),
            driver_features: 0,
            device_features_select: 0,
            driver_features_select: 0,
            queue_select: 0,
        })
    }

    /// Must be called before the guest accesses the device.
    pub(super) fn set_options(&mut self, options: TransportOptions) {
        self.options = options;
    }

    /// Starts the device's threads.
    pub(super) fn start_threads(&mut self, start: &ThreadStart) -> Result<(), WorkerError> {
        let role = self.device.thread_role();
        let plan = StartPlan {
            role,
            preparation: self.device.thread_preparation(),
            start: Arc::clone(start),
            interrupt: Arc::clone(&self.interrupt),
        };
        self.threads.iter_mut().try_for_each(|thread| thread.start(plan.clone()))?;
        self.threads.iter().try_for_each(|thread| thread.wait_started(role))
    }

    pub(super) fn kind(&self) -> DeviceKind {
        self.device.kind()
    }

    /// Returns the eventfd of each queue's kicks.
    pub(super) fn kicks(&self) -> &[Arc<EventFd>] {
        &self.kicks
    }

    pub(super) fn counts(&self) -> Vec<Arc<QueueCounts>> {
        self.counts.clone()
    }

    pub(super) fn queue_count(&self) -> u16 {
        u16::try_from(self.queues.len()).unwrap_or(u16::MAX)
    }

    /// Passes a kick on that exited to userspace, where no ioeventfd is registered.
    pub(super) fn kick(&self, queue: u32) {
        let Some(kick) = usize::try_from(queue).ok().and_then(|queue| self.kicks.get(queue)) else { return };
        if let Err(error) = kick.write(1) {
            log::warn!("{}: a kick of queue {queue} was lost: {error}", self.name);
        }
    }

    pub(super) fn status(&self) -> u8 {
        if self.interrupt.needs_reset() { self.status | DEVICE_NEEDS_RESET } else { self.status }
    }

    pub(super) fn config_generation(&self) -> u32 {
        self.interrupt.config_generation()
    }

    pub(super) fn offered_features(&self) -> u64 {
        let event_idx = if self.options.event_idx { F_EVENT_IDX } else { 0 };
        self.device.device_features() | F_VERSION_1 | F_INDIRECT_DESC | event_idx
    }

    /// Returns the selected 32 bits of the offered feature bits; 0 where the selector is out of range.
    pub(super) fn device_features(&self) -> u32 {
        let offered = self.offered_features();
        Half::from_selector(self.device_features_select).map_or(0, |half| half.get(offered))
    }

    /// Returns the selected 32 bits of the feature bits that the driver accepted.
    pub(super) fn driver_features(&self) -> u32 {
        Half::from_selector(self.driver_features_select).map_or(0, |half| half.get(self.driver_features))
    }

    /// Sets the selected 32 bits of the driver's feature bits; ignored before DRIVER and after `FEATURES_OK`.
    pub(super) fn set_driver_features(&mut self, value: u32) {
        if self.status & (FEATURES_OK | DRIVER) != DRIVER {
            log::debug!("{}: driver features written at device status {:#x}: ignored", self.name, self.status);
            return;
        }
        if let Some(half) = Half::from_selector(self.driver_features_select) {
            half.set(&mut self.driver_features, value);
        }
    }

    /// Returns the selected queue's configuration.
    pub(super) fn queue(&self) -> Option<&QueueConfig> {
        self.queues.get(usize::from(self.queue_select))
    }

    /// Returns the selected queue's configuration where it may be changed: between `FEATURES_OK` and `DRIVER_OK`, before
    /// the queue is enabled.
    fn queue_mut(&mut self) -> Option<&mut QueueConfig> {
        if self.status & (FEATURES_OK | DRIVER_OK) != FEATURES_OK {
            log::debug!("{}: queue configured at device status {:#x}: ignored", self.name, self.status);
            return None;
        }
        self.queues.get_mut(usize::from(self.queue_select)).filter(|queue| !queue.ready)
    }

    /// Sets the selected queue's size. Invalid sizes (0, not a power of two, above the maximum) are ignored.
    pub(super) fn set_queue_size(&mut self, size: u32) {
        if let Some(queue) = self.queue_mut()
            && let Ok(size) = u16::try_from(size)
            && size.is_power_of_two()
            && size <= queue.max_size
        {
            queue.size = size;
        }
    }

    /// Enables the selected queue where `value` is 1. A queue is disabled by a device reset only.
    pub(super) fn set_queue_ready(&mut self, value: u32) {
        if value == 1
            && let Some(queue) = self.queue_mut()
        {
            queue.ready = true;
        }
    }

    /// Sets one half of the guest physical address of one of the selected queue's areas.
    pub(super) fn set_queue_address(&mut self, area: QueueArea, half: Half, value: u32) {
        if let Some(queue) = self.queue_mut() {
            half.set(queue.rings.area_mut(area), value);
        }
    }

    pub(super) fn queue_address(&self, area: QueueArea) -> u64 {
        self.queue().map_or(0, |queue| queue.rings.area(area))
    }

    /// Handles the driver's write of the device status (virtio 1.3 §2.1.1, §3.1.1).
    pub(super) fn set_status(&mut self, value: u8) {
        if value == 0 {
            self.reset();
            return;
        }
        if self.resetting {
            log::debug!("{}: device status {value:#x} written during a reset: ignored", self.name);
            return;
        }
        let known = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK | FAILED;
        if value & self.status != self.status || value & !(known | DEVICE_NEEDS_RESET) != 0 {
            log::debug!("{}: device status {value:#x} written after {:#x}: ignored", self.name, self.status);
            return;
        }
        let new = value & known & !self.status;
        self.status |= new & (ACKNOWLEDGE | DRIVER | FAILED);
        if new & FEATURES_OK != 0 && self.status & DRIVER != 0 {
            self.check_features();
        }
        if new & DRIVER_OK != 0 && self.status & FEATURES_OK != 0 {
            self.status |= DRIVER_OK;
            if let Err(error) = self.activate() {
                log::warn!("{}: the device cannot start and needs a reset: {}", self.name, chain(&error));
                self.interrupt.set_needs_reset();
            }
        }
    }

    /// Sets `FEATURES_OK` where the driver accepted `VERSION_1` and nothing that was not offered (virtio 1.3 §2.2.2).
    fn check_features(&mut self) {
        let not_offered = self.driver_features & !self.offered_features();
        if not_offered == 0 && self.driver_features & F_VERSION_1 != 0 {
            self.status |= FEATURES_OK;
        } else {
            log::warn!(
                "{}: FEATURES_OK refused: the driver accepted the feature bits {:#x} of {:#x}",
                self.name,
                self.driver_features,
                self.offered_features()
            );
        }
    }

    pub(super) fn activate(&mut self) -> Result<(), ActivateError> {
        self.abort = Arc::default();
        let activation = Activation {
            features: self.driver_features,
            memory: self.memory.clone(),
            interrupt: Arc::clone(&self.interrupt),
            queues: self.virtqueues()?,
        };
        for (index, worker) in self.device.activate(activation)?.into_iter().enumerate() {
            self.threads.get(index).ok_or(WorkerError::NoThread(index))?.activate(worker)?;
        }
        self.is_active = true;
        Ok(())
    }

    /// Makes the queues that the driver enabled; `None` for the others. They start at [`Self::positions`].
    pub(super) fn virtqueues(&self) -> Result<Vec<Option<Virtqueue>>, ActivateError> {
        if let Some((first, second)) = overlap(&mut self.ring_areas()) {
            return Err(ActivateError::OverlappingRings { first, second });
        }
        let mut virtqueues = Vec::new();
        let queues = self.queues.iter().zip(&self.positions).zip(self.kicks.iter().zip(&self.counts));
        for (index, ((config, last), (kick, counts))) in (0_u16..).zip(queues) {
            if !config.ready {
                virtqueues.push(None);
                continue;
            }
            let mut queue = Virtqueue::new(QueueSetup {
                index,
                queue: self.ring(index, config)?,
                memory: self.memory.clone(),
                kick: Arc::clone(kick),
                interrupt: Arc::clone(&self.interrupt),
                counts: Arc::clone(counts),
                name: Arc::clone(&self.name),
                max_chain_bytes: self.device.max_chain_bytes(),
                abort: Arc::clone(&self.abort),
                last: Arc::clone(last),
            });
            if !self.options.coalesce_notifications {
                queue.disable_coalescing();
            }
            if let Some(limit) = self.options.busy_poll {
                queue.set_busy_poll(limit);
            }
            virtqueues.push(Some(queue));
        }
        Ok(virtqueues)
    }

    /// Returns the areas of all queues that the driver enabled.
    fn ring_areas(&self) -> Vec<RingArea> {
        let negotiated = self.driver_features & F_EVENT_IDX != 0;
        let events = if negotiated { EventFields::Present } else { EventFields::Absent };
        let enabled = (0_u16..).zip(&self.queues).filter(|(_, queue)| queue.ready);
        enabled.flat_map(|(index, queue)| areas(index, queue.size, queue.rings, events)).collect()
    }

    fn ring(&self, index: u16, config: &QueueConfig) -> Result<Queue, ActivateError> {
        let invalid = |source| ActivateError::InvalidQueue { index, source };
        let rings = config.rings;
        let mut queue = Queue::new(config.max_size).map_err(invalid)?;
        queue.try_set_size(config.size).map_err(invalid)?;
        queue.try_set_desc_table_address(GuestAddress(rings.descriptor_table)).map_err(invalid)?;
        queue.try_set_avail_ring_address(GuestAddress(rings.available_ring)).map_err(invalid)?;
        queue.try_set_used_ring_address(GuestAddress(rings.used_ring)).map_err(invalid)?;
        queue.set_event_idx(self.driver_features & F_EVENT_IDX != 0);
        let position = self.positions.get(usize::from(index)).map(|last| last.get()).unwrap_or_default();
        queue.set_next_avail(position.next_available);
        queue.set_next_used(position.next_used);
        queue.set_ready(true);
        if !queue.is_valid(&*self.memory) {
            return Err(ActivateError::RingsOutsideMemory { index, rings });
        }
        Ok(queue)
    }

    /// Resets the device (virtio 1.3 §2.4). The workers have ended when this returns, unless they wait for the host for longer
    /// than [`RESET_WORK`] and [`RESET_WAIT`]; the device status is not 0 until they have.
    fn reset(&mut self) {
        if !self.resetting {
            self.resetting = true;
            self.threads.iter().for_each(WorkerThread::request_reset);
            let deadline = Instant::now() + RESET_WORK;
            if !self.threads.iter().all(|thread| thread.wait_idle(deadline)) {
                self.abort.store(true, Ordering::Relaxed);
                let deadline = Instant::now() + RESET_WAIT;
                if !self.threads.iter().all(|thread| thread.wait_idle(deadline)) {
                    log::warn!("{}: the reset of the device waits for the host", self.name);
                    self.threads.iter().for_each(WorkerThread::note_late_reset);
                }
            }
        }
        self.continue_reset();
    }

    /// Completes a reset that waits for workers, where they have ended. To be called before each access of the driver.
    pub(super) fn continue_reset(&mut self) {
        let now = Instant::now;
        if !self.resetting || !self.threads.iter().all(|thread| thread.wait_idle(now())) {
            return;
        }
        self.resetting = false;
        if self.status & DRIVER_OK != 0 {
            self.device.reset();
        }
        self.status = 0;
        self.driver_features = 0;
        self.device_features_select = 0;
        self.driver_features_select = 0;
        self.queue_select = 0;
        (self.is_active, self.is_paused) = (false, false);
        for (queue, last) in self.queues.iter_mut().zip(&self.positions) {
            *queue = QueueConfig::new(queue.max_size);
            last.set(QueuePosition::default());
        }
        for kick in &self.kicks {
            // Kicks from before the reset must not reach the next workers.
            let _ = kick.read();
        }
        self.interrupt.clear();
    }

    /// Has the threads end once the workers have handled the available buffers.
    pub(super) fn request_stop(&self) {
        self.threads.iter().for_each(WorkerThread::request_stop);
    }

    /// Waits until the threads have ended, or until `deadline`.
    pub(super) fn wait_stopped(&mut self, deadline: Instant) {
        for thread in &mut self.threads {
            thread.wait_ended(deadline, || self.abort.store(true, Ordering::Relaxed));
        }
    }

    /// Copies the device configuration from byte `offset` on to `data`; zeros beyond its end.
    pub(super) fn read_config(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        self.device.read_config(offset, data);
    }

    /// Passes a write to the device configuration on; ignored before DRIVER (virtio 1.3 §3.1.1).
    pub(super) fn write_config(&mut self, offset: u64, data: &[u8]) {
        if self.status & DRIVER == 0 {
            log::debug!("{}: device configuration written before DRIVER: ignored", self.name);
            return;
        }
        self.device.write_config(offset, data);
    }
}

impl Drop for TransportState {
    fn drop(&mut self) {
        self.request_stop();
        self.wait_stopped(Instant::now() + DROP_WAIT);
    }
}
