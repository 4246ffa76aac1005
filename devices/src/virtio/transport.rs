//! What both transports share: the status machine, feature negotiation and the queues' set-up (virtio 1.3 §2.1, §2.2,
//! §3.1). A transport maps its registers to this.

use super::queue::{QueueCounts, Virtqueue};
use super::{
    Activation, DeviceKind, F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1, Signals, VirtioDevice, VirtioInterrupt,
};
use super::{WorkerThread, worker};
use crate::memory::Memory;
use std::io;
use std::sync::Arc;
use std::time::Duration;
use virtio_queue::{Queue, QueueT};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

pub(super) const ACKNOWLEDGE: u8 = 1;
pub(super) const DRIVER: u8 = 2;
pub(super) const DRIVER_OK: u8 = 4;
pub(super) const FEATURES_OK: u8 = 8;
pub(super) const NEEDS_RESET: u8 = 64;
pub(super) const FAILED: u8 = 128;

/// A guest address whose write is a kick: the transport asks for an ioeventfd there.
pub struct Doorbell {
    /// Guest physical address.
    pub gpa: u64,
    /// Only a write of this 32-bit value counts; `None`: any write.
    pub datamatch: Option<u32>,
    /// What is to be written.
    pub event: Arc<EventFd>,
}

/// What a transport may do to have fewer kicks and interrupts.
#[derive(Clone, Copy, Debug)]
pub struct TransportOptions {
    /// Offer VIRTIO_F_EVENT_IDX.
    pub event_idx: bool,
    /// Wait a moment for more before the driver is told, where that pays.
    pub coalesce_notifications: bool,
    /// Look for the next request oneself for up to so long, where that pays, in place of a kick.
    pub busy_poll: Option<Duration>,
}

impl Default for TransportOptions {
    fn default() -> Self {
        Self { event_idx: true, coalesce_notifications: true, busy_poll: None }
    }
}

/// Which of a queue's three addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Area {
    Descriptors,
    Driver,
    Device,
}

/// A queue as the driver sets it up.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Setup {
    pub(super) max: u16,
    pub(super) size: u16,
    pub(super) ready: bool,
    areas: [u64; 3],
}

impl Setup {
    fn new(max: u16) -> Self {
        Self { max, size: max, ..Self::default() }
    }
}

/// A device behind a transport.
pub(super) struct TransportState {
    device: Box<dyn VirtioDevice>,
    memory: Memory,
    name: Arc<str>,
    signals: Arc<Signals>,
    kicks: Vec<Arc<EventFd>>,
    counts: Vec<Arc<QueueCounts>>,
    queues: Vec<Setup>,
    workers: Vec<WorkerThread>,
    status: u8,
    options: TransportOptions,
    driver_features: u64,
    pub(super) device_features_select: u32,
    pub(super) driver_features_select: u32,
    pub(super) queue_select: u16,
}

impl TransportState {
    /// # Errors
    /// Where eventfds are not to be had.
    pub(super) fn new(
        name: &str,
        device: Box<dyn VirtioDevice>,
        memory: Memory,
        interrupt: Arc<dyn VirtioInterrupt>,
    ) -> io::Result<Self> {
        let queues: Vec<Setup> = device.queue_max_sizes().into_iter().map(Setup::new).collect();
        let kicks: io::Result<Vec<_>> = queues.iter().map(|_| EventFd::new(EFD_NONBLOCK).map(Arc::new)).collect();
        Ok(Self {
            device,
            memory,
            name: name.into(),
            signals: Signals::new(interrupt),
            kicks: kicks?,
            counts: queues.iter().map(|_| Arc::default()).collect(),
            queues,
            workers: Vec::new(),
            status: 0,
            options: TransportOptions::default(),
            driver_features: 0,
            device_features_select: 0,
            driver_features_select: 0,
            queue_select: 0,
        })
    }

    /// Before the guest sees the device.
    pub(super) fn set_options(&mut self, options: TransportOptions) {
        self.options = options;
    }

    pub(super) fn kind(&self) -> DeviceKind {
        self.device.kind()
    }

    pub(super) fn kicks(&self) -> &[Arc<EventFd>] {
        &self.kicks
    }

    pub(super) fn counts(&self) -> Vec<Arc<QueueCounts>> {
        self.counts.clone()
    }

    pub(super) fn queue_count(&self) -> u16 {
        u16::try_from(self.queues.len()).unwrap_or(u16::MAX)
    }

    /// A kick that came by a register, where no ioeventfd took it.
    pub(super) fn kick(&self, queue: u32) {
        let Some(kick) = usize::try_from(queue).ok().and_then(|queue| self.kicks.get(queue)) else { return };
        if let Err(error) = kick.write(1) {
            log::warn!("{}: a kick of queue {queue} is lost: {error}", self.name);
        }
    }

    pub(super) fn status(&self) -> u8 {
        if self.signals.is_broken() { self.status | NEEDS_RESET } else { self.status }
    }

    pub(super) fn generation(&self) -> u32 {
        self.signals.generation()
    }

    fn offered(&self) -> u64 {
        let event_idx = if self.options.event_idx { F_EVENT_IDX } else { 0 };
        self.device.device_features() | F_VERSION_1 | F_INDIRECT_DESC | event_idx
    }

    pub(super) fn device_features(&self) -> u32 {
        half(self.offered(), self.device_features_select)
    }

    pub(super) fn driver_features(&self) -> u32 {
        half(self.driver_features, self.driver_features_select)
    }

    pub(super) fn set_driver_features(&mut self, value: u32) {
        if self.status & (FEATURES_OK | DRIVER) != DRIVER {
            log::debug!("{}: features are written at status {:#x}: ignored", self.name, self.status);
            return;
        }
        match self.driver_features_select {
            0 => self.driver_features = self.driver_features >> 32 << 32 | u64::from(value),
            1 => self.driver_features = self.driver_features & 0xffff_ffff | u64::from(value) << 32,
            _ => {}
        }
    }

    /// The queue that the driver selected.
    pub(super) fn queue(&self) -> Option<&Setup> {
        self.queues.get(usize::from(self.queue_select))
    }

    /// The same, for changing it: only before it is ready, and before DRIVER_OK.
    fn queue_mut(&mut self) -> Option<&mut Setup> {
        if self.status & (FEATURES_OK | DRIVER_OK) != FEATURES_OK {
            log::debug!("{}: a queue is set up at status {:#x}: ignored", self.name, self.status);
            return None;
        }
        self.queues.get_mut(usize::from(self.queue_select)).filter(|queue| !queue.ready)
    }

    /// Sizes that cannot be (0, no power of two, above the largest) are not taken.
    pub(super) fn set_queue_size(&mut self, size: u32) {
        if let Some(queue) = self.queue_mut()
            && let Ok(size) = u16::try_from(size)
            && size.is_power_of_two()
            && size <= queue.max
        {
            queue.size = size;
        }
    }

    pub(super) fn set_queue_ready(&mut self, value: u32) {
        if value == 1
            && let Some(queue) = self.queue_mut()
        {
            queue.ready = true;
        }
    }

    /// One half of an address: `high` is the upper.
    pub(super) fn set_queue_address(&mut self, area: Area, high: bool, value: u32) {
        if let Some(queue) = self.queue_mut() {
            let address = &mut queue.areas[area as usize];
            *address = if high {
                *address & 0xffff_ffff | u64::from(value) << 32
            } else {
                *address >> 32 << 32 | u64::from(value)
            };
        }
    }

    pub(super) fn queue_address(&self, area: Area) -> u64 {
        self.queue().map_or(0, |queue| queue.areas[area as usize])
    }

    /// The driver writes the status (virtio 1.3 §2.1, §3.1.1).
    pub(super) fn set_status(&mut self, value: u8) {
        if value == 0 {
            self.reset();
            return;
        }
        let known = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK | FAILED;
        if value & self.status != self.status || value & !(known | NEEDS_RESET) != 0 {
            log::debug!("{}: status {value:#x} after {:#x}: ignored", self.name, self.status);
            return;
        }
        let new = value & known & !self.status;
        self.status |= new & (ACKNOWLEDGE | DRIVER | FAILED);
        if new & FEATURES_OK != 0 && self.status & DRIVER != 0 {
            let extra = self.driver_features & !self.offered();
            if extra == 0 && self.driver_features & F_VERSION_1 != 0 {
                self.status |= FEATURES_OK;
            } else {
                log::warn!("{}: the driver wants features {:#x}: refused", self.name, self.driver_features);
            }
        }
        if new & DRIVER_OK != 0 && self.status & FEATURES_OK != 0 {
            self.status |= DRIVER_OK;
            self.activate();
        }
    }

    fn activate(&mut self) {
        let result = self.virtqueues().and_then(|queues| {
            let activation = Activation {
                features: self.driver_features,
                memory: self.memory.clone(),
                signals: Arc::clone(&self.signals),
                queues,
            };
            let workers = self.device.activate(activation).map_err(io::Error::other)?;
            for (index, worker) in workers.into_iter().enumerate() {
                self.workers.push(worker::WorkerThread::start(&format!("{}.{index}", self.name), worker)?);
            }
            Ok(())
        });
        if let Err(error) = result {
            log::warn!("{}: {error}", self.name);
            self.workers.clear();
            self.signals.needs_reset();
        }
    }

    fn virtqueues(&self) -> io::Result<Vec<Option<Virtqueue>>> {
        let mut made = Vec::new();
        for (index, (setup, (kick, counts))) in
            (0_u16..).zip(self.queues.iter().zip(self.kicks.iter().zip(&self.counts)))
        {
            if !setup.ready {
                made.push(None);
                continue;
            }
            let queue = self.ring(setup).map_err(|error| io::Error::other(format!("queue {index}: {error}")))?;
            let mut queue = Virtqueue::new(
                index,
                queue,
                self.memory.clone(),
                Arc::clone(kick),
                Arc::clone(&self.signals),
                Arc::clone(counts),
                Arc::clone(&self.name),
            );
            if !self.options.coalesce_notifications {
                queue.disable_coalescing();
            }
            if let Some(limit) = self.options.busy_poll {
                queue.set_busy_poll(limit);
            }
            made.push(Some(queue));
        }
        Ok(made)
    }

    fn ring(&self, setup: &Setup) -> io::Result<Queue> {
        let bad = |error: virtio_queue::Error| io::Error::other(error.to_string());
        let mut queue = Queue::new(setup.max).map_err(bad)?;
        queue.try_set_size(setup.size).map_err(bad)?;
        let [descriptors, driver, device] = setup.areas.map(vm_memory::GuestAddress);
        queue.try_set_desc_table_address(descriptors).map_err(bad)?;
        queue.try_set_avail_ring_address(driver).map_err(bad)?;
        queue.try_set_used_ring_address(device).map_err(bad)?;
        queue.set_event_idx(self.driver_features & F_EVENT_IDX != 0);
        queue.set_ready(true);
        if !queue.is_valid(&*self.memory) {
            return Err(io::Error::other(format!("its rings {:#x?} are not in guest memory", setup.areas)));
        }
        Ok(queue)
    }

    /// Back to the start (virtio 1.3 §2.4): the workers have ended when this returns.
    pub(super) fn reset(&mut self) {
        self.workers.clear();
        if self.status & DRIVER_OK != 0 {
            self.device.reset();
        }
        self.status = 0;
        self.driver_features = 0;
        self.device_features_select = 0;
        self.driver_features_select = 0;
        self.queue_select = 0;
        for queue in &mut self.queues {
            *queue = Setup::new(queue.max);
        }
        for kick in &self.kicks {
            // A kick of before is nobody's.
            let _ = kick.read();
        }
        self.signals.clear();
    }

    /// Ends the workers.
    pub(super) fn stop(&mut self) {
        self.workers.clear();
    }

    pub(super) fn read_config(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        self.device.read_config(offset, data);
    }

    pub(super) fn write_config(&mut self, offset: u64, data: &[u8]) {
        if self.status & DRIVER == 0 {
            log::debug!("{}: configuration written before DRIVER: ignored", self.name);
            return;
        }
        self.device.write_config(offset, data);
    }
}

/// The lower or upper 32 bits; nothing beyond.
fn half(value: u64, select: u32) -> u32 {
    let shifted = match select {
        0 => value,
        1 => value >> 32,
        _ => 0,
    };
    u32::try_from(shifted & 0xffff_ffff).unwrap_or(0)
}
