//! The PCI transport (virtio 1.3 §4.1), modern only: one BAR, MSI-X, no INTx.

use super::transport::{Area, Doorbell, TransportState};
use super::{InterruptSource, QueueCounts, VirtioDevice, VirtioInterrupt, VirtioTransport};
use crate::bus::{Action, BusDevice};
use crate::memory::Memory;
use crate::pci::{BarLayout, Capability, ConfigSpace, Identity, MsiRouter, MsiVector, Msix, PciFunction};
use std::io;
use std::sync::atomic::{AtomicU8, AtomicU16, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use vmm_sys_util::eventfd::EventFd;

/// Bytes of the BAR.
pub const BAR_BYTES: u32 = 0x8000;

// The BAR's parts.
const COMMON: u32 = 0x0000;
const COMMON_BYTES: u32 = 0x40;
const ISR: u32 = 0x1000;
const DEVICE_CONFIG: u32 = 0x2000;
const NOTIFY: u32 = 0x3000;
const MSIX_TABLE: u32 = 0x4000;
const MSIX_PENDING: u32 = 0x5000;
const PART_BYTES: u32 = 0x1000;
/// Bytes between two queues' doorbells.
const NOTIFY_STRIDE: u32 = 4;

const VENDOR: u16 = 0x1af4;
const FIRST_DEVICE_ID: u16 = 0x1040;
const CAP_VENDOR: u8 = 0x09;
const CAP_MSIX: u8 = 0x11;
const MSIX_ENABLE: u8 = 0x80;
const MSIX_MASK_ALL: u8 = 0x40;
/// VIRTIO_MSI_NO_VECTOR.
const NO_VECTOR: u16 = 0xffff;

// cfg_type of virtio_pci_cap (§4.1.4).
const CFG_COMMON: u8 = 1;
const CFG_NOTIFY: u8 = 2;
const CFG_ISR: u8 = 3;
const CFG_DEVICE: u8 = 4;
const CFG_PCI: u8 = 5;

/// Messages, by what the driver assigned.
struct Messages {
    msix: Msix,
    config: AtomicU16,
    queues: Vec<AtomicU16>,
    isr: AtomicU8,
}

impl Messages {
    fn clear(&self) {
        self.config.store(NO_VECTOR, Ordering::Release);
        self.isr.store(0, Ordering::Release);
        for vector in &self.queues {
            vector.store(NO_VECTOR, Ordering::Release);
        }
    }
}

impl VirtioInterrupt for Messages {
    fn trigger(&self, source: InterruptSource) -> io::Result<()> {
        let (bit, vector) = match source {
            InterruptSource::Queue(queue) => (1, self.queues.get(usize::from(queue))),
            InterruptSource::Config => (2, Some(&self.config)),
        };
        self.isr.fetch_or(bit, Ordering::AcqRel);
        match vector.map(|vector| vector.load(Ordering::Acquire)) {
            Some(vector) if vector != NO_VECTOR => self.msix.trigger(vector),
            _ => Ok(()),
        }
    }
}

/// A device on the PCI transport: a function of the bus, and a BAR in memory.
pub struct PciDevice {
    state: Mutex<TransportState>,
    config: Mutex<ConfigSpace>,
    messages: Arc<Messages>,
    msix_at: usize,
    window_at: usize,
}

impl PciDevice {
    /// How many MSI-X vectors a device wants: one a queue, one for its configuration.
    #[must_use]
    pub fn vectors_wanted(device: &dyn VirtioDevice) -> usize {
        device.queue_max_sizes().len() + 1
    }

    /// `device` with its BAR at gpa `bar` (a multiple of [`BAR_BYTES`]) and `vectors` to interrupt with.
    ///
    /// # Errors
    /// Where eventfds are not to be had.
    pub fn new(
        name: &str,
        device: Box<dyn VirtioDevice>,
        memory: Memory,
        bar: u32,
        vectors: Vec<MsiVector>,
        router: Arc<dyn MsiRouter>,
    ) -> io::Result<Self> {
        let kind = device.kind();
        let messages = Arc::new(Messages {
            msix: Msix::new(vectors, router),
            config: AtomicU16::new(NO_VECTOR),
            queues: device.queue_max_sizes().iter().map(|_| AtomicU16::new(NO_VECTOR)).collect(),
            isr: AtomicU8::new(0),
        });
        let interrupt: Arc<dyn VirtioInterrupt> = Arc::clone(&messages) as Arc<dyn VirtioInterrupt>;
        let identity = Identity {
            vendor: VENDOR,
            device: FIRST_DEVICE_ID + kind.id,
            revision: 1,
            class: kind.pci_class,
            subsystem: (VENDOR, FIRST_DEVICE_ID + kind.id),
        };
        let mut config = ConfigSpace::new(identity, Some(BarLayout { base: bar, bytes: BAR_BYTES }));
        let no_room = || io::Error::other("no room for a PCI capability");
        let msix_at = add_msix(&mut config, messages.msix.len()).ok_or_else(no_room)?;
        let window_at = add_virtio(&mut config, messages.queues.len()).ok_or_else(no_room)?;
        let state = TransportState::new(name, device, memory, interrupt)?;
        Ok(Self { state: Mutex::new(state), config: Mutex::new(config), messages, msix_at, window_at })
    }

    /// What to make an ioeventfd of, for a BAR at `bar`.
    #[must_use]
    pub fn doorbells(&self, bar: u32) -> Vec<Doorbell> {
        let bell = |(index, event): (u64, &Arc<EventFd>)| Doorbell {
            gpa: u64::from(bar + NOTIFY) + index * u64::from(NOTIFY_STRIDE),
            datamatch: None,
            event: Arc::clone(event),
        };
        (0_u64..).zip(self.state().kicks()).map(bell).collect()
    }

    fn state(&self) -> MutexGuard<'_, TransportState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn config(&self) -> MutexGuard<'_, ConfigSpace> {
        self.config.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn read_bar(&self, offset: u32, data: &mut [u8]) {
        let (part, at) = (offset & !(PART_BYTES - 1), offset & (PART_BYTES - 1));
        match part {
            COMMON => self.read_common(at, data),
            ISR => {
                data.fill(0);
                if let (0, Some(first)) = (at, data.first_mut()) {
                    // Reading acknowledges (§4.1.4.5.1).
                    *first = self.messages.isr.swap(0, Ordering::AcqRel);
                }
            }
            DEVICE_CONFIG => self.state().read_config(u64::from(at), data),
            MSIX_TABLE => self.messages.msix.read_table(u64::from(at), data),
            MSIX_PENDING => self.messages.msix.read_pending(u64::from(at), data),
            _ => data.fill(0),
        }
    }

    fn write_bar(&self, offset: u32, data: &[u8]) {
        let (part, at) = (offset & !(PART_BYTES - 1), offset & (PART_BYTES - 1));
        match part {
            COMMON => self.write_common(at, data),
            DEVICE_CONFIG => self.state().write_config(u64::from(at), data),
            NOTIFY => self.state().kick(at / NOTIFY_STRIDE),
            MSIX_TABLE => self.messages.msix.write_table(u64::from(at), data),
            _ => {}
        }
    }

    /// virtio_pci_common_cfg (§4.1.4.3). Fields are read in their own width or, the 64-bit ones, by halves.
    fn read_common(&self, at: u32, data: &mut [u8]) {
        let state = self.state();
        let selected = usize::from(state.queue_select);
        let value: u32 = match at {
            0x00 => state.device_features_select,
            0x04 => state.device_features(),
            0x08 => state.driver_features_select,
            0x0c => state.driver_features(),
            0x10 => u32::from(self.messages.config.load(Ordering::Acquire)),
            0x12 => u32::from(state.queue_count()),
            0x14 => u32::from(state.status()),
            0x15 => state.generation() & 0xff,
            0x16 => u32::from(state.queue_select),
            0x18 => state.queue().map_or(0, |queue| u32::from(queue.size)),
            0x1a => {
                let vector = self.messages.queues.get(selected).map(|vector| vector.load(Ordering::Acquire));
                u32::from(vector.unwrap_or(NO_VECTOR))
            }
            0x1c => state.queue().map_or(0, |queue| u32::from(queue.ready)),
            // queue_notify_off: in units of the stride.
            0x1e => u32::from(state.queue_select),
            0x20 | 0x24 => address_half(state.queue_address(Area::Descriptors), at),
            0x28 | 0x2c => address_half(state.queue_address(Area::Driver), at),
            0x30 | 0x34 => address_half(state.queue_address(Area::Device), at),
            _ => 0,
        };
        data.fill(0);
        let bytes = value.to_le_bytes();
        let width = data.len().min(field_bytes(at));
        data[..width].copy_from_slice(&bytes[..width]);
    }

    fn write_common(&self, at: u32, data: &[u8]) {
        if let Ok([a, b, c, d, e, f, g, h]) = <[u8; 8]>::try_from(data) {
            // A 64-bit field at once.
            self.write_common(at, &[a, b, c, d]);
            self.write_common(at + 4, &[e, f, g, h]);
            return;
        }
        let mut bytes = [0; 4];
        let width = data.len().min(field_bytes(at));
        bytes[..width].copy_from_slice(&data[..width]);
        let value = u32::from_le_bytes(bytes);
        let short = u16::try_from(value).unwrap_or(NO_VECTOR);
        let mut state = self.state();
        match at {
            0x00 => state.device_features_select = value,
            0x08 => state.driver_features_select = value,
            0x0c => state.set_driver_features(value),
            0x10 => self.messages.config.store(self.vector(short), Ordering::Release),
            0x14 => {
                state.set_status(u8::try_from(value).unwrap_or(0));
                if value == 0 {
                    self.messages.clear();
                }
            }
            0x16 => state.queue_select = short,
            0x18 => state.set_queue_size(value),
            0x1a => {
                if let Some(vector) = self.messages.queues.get(usize::from(state.queue_select)) {
                    vector.store(self.vector(short), Ordering::Release);
                }
            }
            0x1c => state.set_queue_ready(value),
            0x20 | 0x24 => state.set_queue_address(Area::Descriptors, at & 4 != 0, value),
            0x28 | 0x2c => state.set_queue_address(Area::Driver, at & 4 != 0, value),
            0x30 | 0x34 => state.set_queue_address(Area::Device, at & 4 != 0, value),
            _ => log::debug!("virtio-pci: write of {value:#x} to common configuration {at:#x}: ignored"),
        }
    }

    /// A vector that does not exist reads back as none (§4.1.5.1.2).
    fn vector(&self, asked: u16) -> u16 {
        if asked < self.messages.msix.len() { asked } else { NO_VECTOR }
    }

    /// Where the PCI configuration access capability (§4.1.4.9) points: an offset in the BAR and a width.
    fn window(&self, config: &ConfigSpace) -> Option<(u32, usize)> {
        let bar = config.byte(self.window_at + 4);
        let offset = config.dword(self.window_at + 8);
        let length = usize::try_from(config.dword(self.window_at + 12)).ok()?;
        let aligned = offset.is_multiple_of(u32::try_from(length).ok().filter(|length| *length != 0)?);
        let fits = matches!(length, 1 | 2 | 4) && bar == 0 && offset < BAR_BYTES && aligned;
        fits.then_some((offset, length))
    }

    fn is_window(&self, offset: usize, len: usize) -> bool {
        let data = self.window_at + 16;
        offset >= data && offset + len <= data + 4
    }
}

/// Bytes of the field of the common configuration that starts at `at`.
fn field_bytes(at: u32) -> usize {
    match at {
        0x14 | 0x15 => 1,
        0x10 | 0x12 | 0x16..=0x1e => 2,
        _ => 4,
    }
}

fn address_half(address: u64, at: u32) -> u32 {
    let half = if at & 4 == 0 { address } else { address >> 32 };
    u32::try_from(half & 0xffff_ffff).unwrap_or(0)
}

fn add_msix(config: &mut ConfigSpace, vectors: u16) -> Option<usize> {
    let mut body = [0; 10];
    body[0..2].copy_from_slice(&(vectors.saturating_sub(1)).to_le_bytes());
    body[2..6].copy_from_slice(&MSIX_TABLE.to_le_bytes());
    body[6..10].copy_from_slice(&MSIX_PENDING.to_le_bytes());
    let writable = [0, MSIX_ENABLE | MSIX_MASK_ALL];
    config.add_capability(&Capability { id: CAP_MSIX, body: &body, writable: &writable })
}

/// The five virtio structures; returns where the last, the access window, starts.
fn add_virtio(config: &mut ConfigSpace, queues: usize) -> Option<usize> {
    let notify_bytes = u32::try_from(queues).ok()?.checked_mul(NOTIFY_STRIDE)?;
    let mut add = |kind: u8, offset: u32, length: u32, extra: &[u8], writable: &[u8]| {
        // struct virtio_pci_cap without its first two bytes: cap_len, cfg_type, bar, id, padding, offset, length.
        let mut body = vec![u8::try_from(16 + extra.len()).unwrap_or(0), kind, 0, 0, 0, 0];
        body.extend(offset.to_le_bytes());
        body.extend(length.to_le_bytes());
        body.extend(extra);
        config.add_capability(&Capability { id: CAP_VENDOR, body: &body, writable })
    };
    add(CFG_COMMON, COMMON, COMMON_BYTES, &[], &[])?;
    add(CFG_NOTIFY, NOTIFY, notify_bytes, &NOTIFY_STRIDE.to_le_bytes(), &[])?;
    add(CFG_ISR, ISR, 1, &[], &[])?;
    add(CFG_DEVICE, DEVICE_CONFIG, PART_BYTES, &[], &[])?;
    let mut writable = [0; 18];
    writable[2] = 0xff; // bar
    writable[6..14].fill(0xff); // offset, length
    add(CFG_PCI, 0, 0, &[0; 4], &writable)
}

impl PciFunction for PciDevice {
    fn window(&self) -> Option<usize> {
        Some(self.window_at)
    }

    fn read_config(&self, offset: usize, data: &mut [u8]) {
        let config = self.config();
        config.read(offset, data);
        if self.is_window(offset, data.len())
            && let Some((at, length)) = self.window(&config)
        {
            drop(config);
            let mut value = [0; 4];
            self.read_bar(at, &mut value[..length]);
            let skip = offset - self.window_at - 16;
            let len = data.len();
            data.copy_from_slice(&value[skip..skip + len]);
        }
    }

    fn write_config(&self, offset: usize, data: &[u8]) {
        let mut config = self.config();
        config.write(offset, data);
        let control = config.byte(self.msix_at + 3);
        let touches_msix = offset <= self.msix_at + 3 && offset + data.len() > self.msix_at + 3;
        let window = self.window(&config).filter(|_| self.is_window(offset, data.len()));
        drop(config);
        if touches_msix {
            self.messages.msix.set_control(control & MSIX_ENABLE != 0, control & MSIX_MASK_ALL != 0);
        }
        if let Some((at, length)) = window
            && let Some(data) = data.get(..length)
        {
            self.write_bar(at, data);
        }
    }
}

impl VirtioTransport for PciDevice {
    fn counts(&self) -> Vec<Arc<QueueCounts>> {
        self.state().counts()
    }

    fn set_options(&self, options: super::TransportOptions) {
        self.state().set_options(options);
    }

    fn stop(&self) {
        self.state().stop();
    }
}

impl BusDevice for PciDevice {
    fn read(&self, offset: u64, data: &mut [u8]) {
        if self.config().memory_enabled()
            && let Ok(offset) = u32::try_from(offset)
        {
            self.read_bar(offset, data);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) -> Action {
        if self.config().memory_enabled()
            && let Ok(offset) = u32::try_from(offset)
        {
            self.write_bar(offset, data);
        }
        Action::None
    }
}

#[cfg(test)]
#[path = "pci_tests.rs"]
mod tests;
