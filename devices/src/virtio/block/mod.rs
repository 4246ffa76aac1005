//! The block device (virtio 1.3 §5.2): a raw file, a block device or a qcow2 image of the host.

mod engine;
mod image;
mod request;
#[cfg(test)]
mod tests;
mod uring;
mod worker;

pub use image::{Format, Image, ImageError, ImageOptions};

use super::{ActivateError, Activation, DeviceKind, VirtioDevice, Worker, read_config_bytes};
use engine::Engine;
use request::SECTOR_BYTES;
use std::sync::Arc;
use worker::QueueWorker;

/// VIRTIO_BLK_F_SEG_MAX.
const F_SEG_MAX: u64 = 1 << 2;
const F_RO: u64 = 1 << 5;
const F_BLK_SIZE: u64 = 1 << 6;
const F_FLUSH: u64 = 1 << 9;
const F_TOPOLOGY: u64 = 1 << 10;
const F_MQ: u64 = 1 << 12;
const F_DISCARD: u64 = 1 << 13;
const F_WRITE_ZEROES: u64 = 1 << 14;

/// Entries of a queue.
const QUEUE_SIZE: u16 = 512;
/// Data segments of a request: the queue's entries less header and status. 1 MiB in single pages fits into one request.
const SEG_MAX: u32 = 510;
/// The most sectors of one discard or write-zeroes: 2 GiB.
const MAX_ERASE_SECTORS: u32 = 1 << 22;
/// Bytes of the serial number (§5.2.6.1).
const ID_BYTES: usize = 20;

/// What to do when the host's disk is full.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum WhenFull {
    /// The guest gets an I/O error.
    #[default]
    Report,
    /// The request waits until there is room.
    Stop,
}

/// How the device is made.
#[derive(Clone, Debug)]
pub struct BlockOptions {
    /// Queues, 1 to 64.
    pub queues: u16,
    /// The serial number: the first 20 bytes count.
    pub serial: String,
    /// When the host's disk is full.
    pub when_full: WhenFull,
    /// No io_uring, even where the host has it.
    pub plain_io: bool,
}

/// The device.
pub struct Block {
    image: Arc<Image>,
    options: BlockOptions,
}

impl Block {
    /// A device over `image`.
    #[must_use]
    pub fn new(image: Image, options: BlockOptions) -> Self {
        Self { image: Arc::new(image), options }
    }

    /// struct virtio_blk_config (§5.2.4).
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

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&self.config(), offset, data);
    }

    fn activate(&mut self, mut activation: Activation) -> Result<Vec<Worker>, ActivateError> {
        let mut workers: Vec<Worker> = Vec::new();
        let flushes = activation.has(F_FLUSH);
        for index in 0..self.options.queues {
            // Drivers with fewer processors than queues leave the last ones alone.
            let Ok(queue) = activation.queue(index) else { continue };
            let engine = Engine::new(&self.image, !flushes, self.options.plain_io);
            let watch_size = (index == 0).then(|| Arc::clone(&activation.signals));
            let worker =
                QueueWorker::new(queue, Arc::clone(&self.image), engine, self.id(), self.options.when_full, watch_size);
            workers.push(Box::new(worker.map_err(|error| ActivateError::Io("make a timer", error))?));
        }
        Ok(workers)
    }
}
