//! The MMIO transport (virtio 1.3 §4.2), version 2: fewest accesses at boot, one edge-triggered interrupt a device.

use super::transport::{Area, Core, Doorbell};
use super::{Carrier, InterruptSource, QueueCounts, VirtioDevice, VirtioInterrupt};
use crate::bus::{Action, BusDevice};
use crate::memory::Memory;
use std::io;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use vmm_sys_util::eventfd::EventFd;

/// Bytes of a device's registers, its configuration space included.
pub const REGION_BYTES: u64 = 0x1000;

const MAGIC_VALUE: u64 = 0x00;
const VERSION: u64 = 0x04;
const DEVICE_ID: u64 = 0x08;
const VENDOR_ID: u64 = 0x0c;
const DEVICE_FEATURES: u64 = 0x10;
const DEVICE_FEATURES_SEL: u64 = 0x14;
const DRIVER_FEATURES: u64 = 0x20;
const DRIVER_FEATURES_SEL: u64 = 0x24;
const QUEUE_SEL: u64 = 0x30;
const QUEUE_SIZE_MAX: u64 = 0x34;
const QUEUE_SIZE: u64 = 0x38;
const QUEUE_READY: u64 = 0x44;
const QUEUE_NOTIFY: u64 = 0x50;
const INTERRUPT_STATUS: u64 = 0x60;
const INTERRUPT_ACK: u64 = 0x64;
const STATUS: u64 = 0x70;
const QUEUE_DESC_LOW: u64 = 0x80;
const QUEUE_DESC_HIGH: u64 = 0x84;
const QUEUE_DRIVER_LOW: u64 = 0x90;
const QUEUE_DRIVER_HIGH: u64 = 0x94;
const QUEUE_DEVICE_LOW: u64 = 0xa0;
const QUEUE_DEVICE_HIGH: u64 = 0xa4;
const SHM_LEN_LOW: u64 = 0xb0;
const SHM_BASE_HIGH: u64 = 0xbc;
const CONFIG_GENERATION: u64 = 0xfc;
const CONFIG: u64 = 0x100;

/// One line for everything; a status register says what it was.
struct Line {
    event: Arc<EventFd>,
    status: AtomicU32,
}

impl VirtioInterrupt for Line {
    fn trigger(&self, source: InterruptSource) -> io::Result<()> {
        let bit = match source {
            InterruptSource::Queue(_) => 1,
            InterruptSource::Config => 2,
        };
        self.status.fetch_or(bit, Ordering::AcqRel);
        self.event.write(1)
    }
}

/// A device on the MMIO transport.
pub struct MmioDevice {
    core: Mutex<Core>,
    line: Arc<Line>,
}

impl MmioDevice {
    /// `device`, interrupting by writes to `event` (an edge).
    ///
    /// # Errors
    /// Where eventfds are not to be had.
    pub fn new(name: &str, device: Box<dyn VirtioDevice>, memory: Memory, event: Arc<EventFd>) -> io::Result<Self> {
        let line = Arc::new(Line { event, status: AtomicU32::new(0) });
        let interrupt: Arc<dyn VirtioInterrupt> = Arc::clone(&line) as Arc<dyn VirtioInterrupt>;
        Ok(Self { core: Mutex::new(Core::new(name, device, memory, interrupt)?), line })
    }

    /// What to make an ioeventfd of, for a device whose registers start at `base`.
    #[must_use]
    pub fn doorbells(&self, base: u64) -> Vec<Doorbell> {
        let bell = |(index, event): (u32, &Arc<EventFd>)| Doorbell {
            gpa: base + QUEUE_NOTIFY,
            datamatch: Some(index),
            event: Arc::clone(event),
        };
        (0_u32..).zip(self.core().kicks()).map(bell).collect()
    }

    fn core(&self) -> MutexGuard<'_, Core> {
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn register(&self, core: &Core, offset: u64) -> u32 {
        match offset {
            MAGIC_VALUE => u32::from_le_bytes(*b"virt"),
            VERSION => 2,
            DEVICE_ID => u32::from(core.kind().id),
            VENDOR_ID => u32::from_le_bytes(*b"hwvm"),
            DEVICE_FEATURES => core.device_features(),
            QUEUE_SIZE_MAX => core.queue().map_or(0, |queue| u32::from(queue.max)),
            QUEUE_READY => core.queue().map_or(0, |queue| u32::from(queue.ready)),
            INTERRUPT_STATUS => self.line.status.load(Ordering::Acquire),
            STATUS => u32::from(core.status()),
            // No shared memory (§4.2.2): a length of all ones.
            SHM_LEN_LOW..=SHM_BASE_HIGH => u32::MAX,
            CONFIG_GENERATION => core.generation(),
            _ => 0,
        }
    }

    fn set_register(&self, core: &mut Core, offset: u64, value: u32) {
        match offset {
            DEVICE_FEATURES_SEL => core.device_features_select = value,
            DRIVER_FEATURES => core.set_driver_features(value),
            DRIVER_FEATURES_SEL => core.driver_features_select = value,
            // A number beyond all queues selects none.
            QUEUE_SEL => core.queue_select = u16::try_from(value).unwrap_or(u16::MAX),
            QUEUE_SIZE => core.set_queue_size(value),
            QUEUE_READY => core.set_queue_ready(value),
            QUEUE_NOTIFY => core.kick(value),
            INTERRUPT_ACK => {
                self.line.status.fetch_and(!value, Ordering::AcqRel);
            }
            STATUS => {
                if let Ok(status) = u8::try_from(value) {
                    core.set_status(status);
                }
                if value == 0 {
                    self.line.status.store(0, Ordering::Release);
                }
            }
            QUEUE_DESC_LOW => core.set_queue_address(Area::Descriptors, false, value),
            QUEUE_DESC_HIGH => core.set_queue_address(Area::Descriptors, true, value),
            QUEUE_DRIVER_LOW => core.set_queue_address(Area::Driver, false, value),
            QUEUE_DRIVER_HIGH => core.set_queue_address(Area::Driver, true, value),
            QUEUE_DEVICE_LOW => core.set_queue_address(Area::Device, false, value),
            QUEUE_DEVICE_HIGH => core.set_queue_address(Area::Device, true, value),
            _ => log::debug!("virtio-mmio: write of {value:#x} to register {offset:#x}: ignored"),
        }
    }
}

impl Carrier for MmioDevice {
    fn counts(&self) -> Vec<Arc<QueueCounts>> {
        self.core().counts()
    }

    fn set_switches(&self, switches: super::Switches) {
        self.core().set_switches(switches);
    }

    fn stop(&self) {
        self.core().stop();
    }
}

impl BusDevice for MmioDevice {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let core = self.core();
        if offset >= CONFIG {
            core.read_config(offset - CONFIG, data);
        } else if data.len() == 4 && offset.is_multiple_of(4) {
            // §4.2.2.2: registers are read in 32 bits, aligned. Else: all ones.
            data.copy_from_slice(&self.register(&core, offset).to_le_bytes());
        }
    }

    fn write(&self, offset: u64, data: &[u8]) -> Action {
        let mut core = self.core();
        if offset >= CONFIG {
            core.write_config(offset - CONFIG, data);
        } else if let Ok(value) = <[u8; 4]>::try_from(data)
            && offset.is_multiple_of(4)
        {
            self.set_register(&mut core, offset, u32::from_le_bytes(value));
        }
        Action::None
    }
}
