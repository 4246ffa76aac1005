//! The block device (virtio 1.3 §5.2): a raw file, a block device or a qcow2 image of the host.

mod engine;
mod error;
mod file;
#[cfg(any(test, feature = "test-utils"))]
pub mod hostile;
mod image;
mod lock;
mod magic;
mod options;
mod qcow2;
#[cfg(test)]
mod qemu_tests;
mod request;
mod saved;
#[cfg(test)]
mod stall_tests;
#[cfg(test)]
mod tests;
mod uring;
mod worker;

pub use error::{FileRole, ImageError};
pub use image::Image;
pub use lock::{Conflict, LockConflict};
pub use magic::ForeignFormat;
pub use options::{BlockOptions, Format, ImageOptions, IoEngine, WhenChanged, WhenFull};
pub use qcow2::{CheckJob, CheckPlace, FeatureBit, NamedFileError, Qcow2Error, Table};

use crate::virtio::device::{ActivateError, Activation, DeviceKind, FlushWork, VirtioDevice, read_config_bytes};
use crate::virtio::device_thread::DeviceThread;
use crate::virtio::saved::{DeviceFault, DeviceState, SaveFault};
use crate::virtio::slot::Slot;
use crate::virtio::worker::Worker;
use engine::{Engine, new_ring};
use options::Durability;
use request::{ID_BYTES, MAX_ERASE_SECTORS, SECTOR_BYTES};
use std::io;
use std::sync::{Arc, Mutex};
use uring::Ring;
use vmm_sys_util::timerfd::TimerFd;
use worker::{QueueWorker, SharedTimer, WorkerSetup};

// Feature bits (virtio 1.3 §5.2.3).
const F_SEG_MAX: u64 = 1 << 2;
const F_RO: u64 = 1 << 5;
const F_BLK_SIZE: u64 = 1 << 6;
const F_FLUSH: u64 = 1 << 9;
const F_TOPOLOGY: u64 = 1 << 10;
const F_MQ: u64 = 1 << 12;
const F_DISCARD: u64 = 1 << 13;
const F_WRITE_ZEROES: u64 = 1 << 14;

/// Maximum size of a queue, in descriptors.
const QUEUE_SIZE: u16 = 512;
/// `seg_max`: data buffers of a request, which are the descriptors of a queue less header and status. A request of 1 MiB in
/// single pages fits.
const SEG_MAX: u32 = 510;

/// The virtio block device (virtio 1.3 §5.2).
pub struct Block {
    image: Arc<Image>,
    options: BlockOptions,
    when_changed: WhenChanged,
    queues: Vec<QueueResources>,
}

/// What a queue keeps over resets.
struct QueueResources {
    /// Empty where requests are handled by system calls.
    ring: Slot<Ring>,
    timer: SharedTimer,
}

impl Block {
    /// Makes a device for `image`.
    ///
    /// # Errors
    /// Returns the error of timerfd_create(2).
    pub fn new(image: impl Into<Arc<Image>>, options: BlockOptions) -> io::Result<Self> {
        let image = image.into();
        let resources = |_| {
            let ring = Slot::new(new_ring(&image, options.io_engine));
            Ok(QueueResources { ring, timer: Arc::new(Mutex::new(TimerFd::new()?)) })
        };
        let queues = (0..options.queues).map(resources).collect::<io::Result<_>>()?;
        Ok(Self { image, options, when_changed: WhenChanged::default(), queues })
    }

    /// Sets what [`VirtioDevice::restore`] does where the image may have been written since the state was saved.
    #[must_use]
    pub fn when_changed(self, when_changed: WhenChanged) -> Self {
        Self { when_changed, ..self }
    }

    /// Returns struct virtio_blk_config (virtio 1.3 §5.2.4), up to `write_zeroes_may_unmap`.
    fn config(&self) -> [u8; 60] {
        let mut config = [0; 60];
        let mut put = |at: usize, bytes: &[u8]| config[at..at + bytes.len()].copy_from_slice(bytes);
        let block = self.image.block_bytes();
        put(0, &(self.image.bytes() / SECTOR_BYTES).to_le_bytes());
        put(12, &SEG_MAX.to_le_bytes());
        put(20, &block.to_le_bytes());
        let physical = self.image.physical_block_bytes().max(block);
        put(24, &[u8::try_from((physical / block).trailing_zeros()).unwrap_or(0)]);
        put(26, &u16::try_from(physical / block).unwrap_or(1).to_le_bytes());
        put(34, &self.options.queues.to_le_bytes());
        let alignment = physical / 512;
        put(36, &MAX_ERASE_SECTORS.to_le_bytes());
        put(40, &1_u32.to_le_bytes());
        put(44, &alignment.to_le_bytes());
        put(48, &MAX_ERASE_SECTORS.to_le_bytes());
        put(52, &1_u32.to_le_bytes());
        put(56, &[1]);
        config
    }

    fn id(&self) -> [u8; ID_BYTES] {
        let mut id = [0; ID_BYTES];
        for (to, from) in id.iter_mut().zip(self.options.serial.bytes()) {
            *to = from;
        }
        id
    }
}

impl VirtioDevice for Block {
    fn kind(&self) -> DeviceKind {
        DeviceKind { id: 2, name: "block", pci_class: 0x0180 }
    }

    fn device_features(&self) -> u64 {
        let mut features = F_SEG_MAX | F_BLK_SIZE | F_FLUSH | F_TOPOLOGY;
        if self.options.queues > 1 {
            features |= F_MQ;
        }
        if self.image.is_read_only() { features | F_RO } else { features | F_DISCARD | F_WRITE_ZEROES }
    }

    fn queue_max_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; usize::from(self.options.queues)]
    }

    fn thread_role(&self) -> DeviceThread {
        DeviceThread::Block
    }

    fn thread_count(&self) -> usize {
        self.queues.len()
    }

    fn max_chain_bytes(&self) -> u32 {
        // A request that is too long is answered with an I/O error (see `request::MAX_DATA_BYTES`).
        u32::MAX
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&self.config(), offset, data);
    }

    fn flush(&self) -> Option<FlushWork> {
        let image = Arc::clone(&self.image);
        Some(Box::new(move || image.flush()) as FlushWork)
    }

    fn save(&self) -> Result<Option<DeviceState>, SaveFault> {
        Ok(Some(DeviceState::Block(saved::state(&self.image, &self.config())?)))
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), DeviceFault> {
        let DeviceState::Block(state) = state else { return Err(DeviceFault::Other) };
        saved::check(state, &self.image, &self.config(), self.when_changed)
    }

    fn activate(&mut self, mut activation: Activation) -> Result<Vec<Worker>, ActivateError> {
        let mut workers: Vec<Worker> = Vec::new();
        // A driver without FLUSH expects each write to be durable when it completes (virtio 1.3 §5.2.6.2).
        let durability = if activation.has_feature(F_FLUSH) { Durability::OnFlush } else { Durability::EachWrite };
        for (index, QueueResources { ring, timer }) in (0..).zip(&self.queues) {
            // A driver with fewer vCPUs than queues does not enable the last queues.
            let Ok(queue) = activation.take_queue(index) else { continue };
            workers.push(Box::new(QueueWorker::new(WorkerSetup {
                queue,
                image: Arc::clone(&self.image),
                engine: Engine::new(&self.image, ring.take(), durability),
                ring: ring.clone(),
                id: self.id(),
                when_full: self.options.when_full,
                size_watch: (index == 0).then(|| Arc::clone(&activation.interrupt)),
                timer: Arc::clone(timer),
            })));
        }
        Ok(workers)
    }
}
