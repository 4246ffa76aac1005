//! The PCI transport (virtio 1.3 §4.1), without the legacy interface: one BAR, MSI-X, no INTx.

use super::device::VirtioDevice;
use super::device_thread::ThreadStart;
use super::interrupt::{InterruptSource, VirtioInterrupt};
use super::queue::QueueCounts;
use super::ring_area::QueueArea;
use super::saved::{PauseError, VirtioState, VirtioStateError};
use super::transport::{Doorbell, TransportError, TransportOptions, VirtioTransport};
use super::transport_state::TransportState;
use crate::bus::{Action, BusDevice};
use crate::half::Half;
use crate::memory::Memory;
use crate::pci::{
    BarLayout, Capability, ConfigSpace, Identity, MsiRouter, MsiVector, Msix, MsixControl, PCI_CFG_CAPABILITY_BYTES,
    PCI_CFG_DATA_BYTES, PciFunction,
};
use std::io;
use std::sync::atomic::{AtomicU8, AtomicU16, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;
use vmm_sys_util::eventfd::EventFd;

/// Size of a device's BAR in bytes.
pub const BAR_BYTES: u32 = 0x8000;

// Offsets in the BAR.
const COMMON: u32 = 0x0000;
const COMMON_BYTES: u32 = 0x40;
const ISR: u32 = 0x1000;
const DEVICE_CONFIG: u32 = 0x2000;
const NOTIFY: u32 = 0x3000;
const MSIX_TABLE: u32 = 0x4000;
const MSIX_PENDING: u32 = 0x5000;
/// Size in bytes of each of the structures above.
const STRUCTURE_BYTES: u32 = 0x1000;
/// `notify_off_multiplier` (virtio 1.3 §4.1.4.4): bytes between the kick addresses of two queues.
const NOTIFY_STRIDE: u32 = 4;

// PCI vendor and device IDs (virtio 1.3 §4.1.2).
const VENDOR: u16 = 0x1af4;
const FIRST_DEVICE_ID: u16 = 0x1040;
// Capability IDs, and bits of the upper byte of the MSI-X message control (PCI Local Bus 3.0 §6.8.2).
const CAP_VENDOR: u8 = 0x09;
const CAP_MSIX: u8 = 0x11;
const MSIX_ENABLE: u8 = 0x80;
const MSIX_MASK_ALL: u8 = 0x40;
/// The bit of the ISR status for a change of the configuration (virtio 1.3 §4.1.4.5).
const CONFIG_CHANGED: u8 = 2;
/// `VIRTIO_MSI_NO_VECTOR` (virtio 1.3 §4.1.5.1.2): no MSI-X vector is assigned.
const NO_VECTOR: u16 = 0xffff;

// `cfg_type` of struct virtio_pci_cap (virtio 1.3 §4.1.4).
const CFG_COMMON: u8 = 1;
const CFG_NOTIFY: u8 = 2;
const CFG_ISR: u8 = 3;
const CFG_DEVICE: u8 = 4;
const CFG_PCI: u8 = 5;

/// The MSI-X vectors that the driver assigned, and the ISR status.
struct PciInterrupt {
    msix: Msix,
    config_vector: AtomicU16,
    queue_vectors: Vec<AtomicU16>,
    isr_status: AtomicU8,
}

impl PciInterrupt {
    /// Removes all assignments, as a device reset does.
    fn reset(&self) {
        self.config_vector.store(NO_VECTOR, Ordering::Release);
        self.isr_status.store(0, Ordering::Release);
        for vector in &self.queue_vectors {
            vector.store(NO_VECTOR, Ordering::Release);
        }
    }
}

impl VirtioInterrupt for PciInterrupt {
    fn trigger(&self, source: InterruptSource) -> io::Result<()> {
        let (bit, vector) = match source {
            InterruptSource::Queue(queue) => (1, self.queue_vectors.get(usize::from(queue))),
            InterruptSource::Config => (CONFIG_CHANGED, Some(&self.config_vector)),
        };
        self.isr_status.fetch_or(bit, Ordering::AcqRel);
        match vector.map(|vector| vector.load(Ordering::Acquire)) {
            Some(vector) if vector != NO_VECTOR => self.msix.trigger(vector),
            _ => Ok(()),
        }
    }

    fn clear(&self) {
        self.isr_status.store(0, Ordering::Release);
    }

    fn repeat(&self) -> io::Result<()> {
        // Those of queues are sent to each of them. With MSI-X the driver need not read the ISR status: one too many is no harm.
        let changed = self.isr_status.load(Ordering::Acquire) & CONFIG_CHANGED != 0;
        if changed { self.trigger(InterruptSource::Config) } else { Ok(()) }
    }
}

/// A device on the PCI transport: a PCI function, and a BAR on the memory bus.
pub struct PciDevice {
    state: Mutex<TransportState>,
    config: Mutex<ConfigSpace>,
    interrupt: Arc<PciInterrupt>,
    /// Offset of the MSI-X capability in the configuration space.
    msix_capability: usize,
    /// Offset of the PCI configuration access capability (virtio 1.3 §4.1.4.9) in the configuration space.
    pci_cfg_capability: usize,
}

/// Where the PCI configuration access capability points.
#[derive(Clone, Copy)]
struct BarAccess {
    /// Offset in the BAR.
    offset: u32,
    /// Width in bytes: 1, 2 or 4.
    width: usize,
}

impl PciDevice {
    /// Returns how many MSI-X vectors a device needs: one for each queue, and one for configuration changes.
    #[must_use]
    pub fn vector_count(device: &dyn VirtioDevice) -> usize {
        device.queue_max_sizes().len() + 1
    }

    /// Puts `device` on the transport, with its BAR at guest physical address `bar` (a multiple of [`BAR_BYTES`]) and the
    /// MSI-X vectors `vectors`.
    ///
    /// # Errors
    /// Returns [`TransportError`] where the host has no file descriptors left, or where the device has more queues than the
    /// configuration space can describe.
    pub fn new(
        name: &str,
        device: Box<dyn VirtioDevice>,
        memory: Memory,
        bar: u32,
        vectors: Vec<MsiVector>,
        router: Arc<dyn MsiRouter>,
    ) -> Result<Self, TransportError> {
        let kind = device.kind();
        let interrupt = Arc::new(PciInterrupt {
            msix: Msix::new(vectors, router),
            config_vector: AtomicU16::new(NO_VECTOR),
            queue_vectors: device.queue_max_sizes().iter().map(|_| AtomicU16::new(NO_VECTOR)).collect(),
            isr_status: AtomicU8::new(0),
        });
        let identity = Identity {
            vendor: VENDOR,
            device: FIRST_DEVICE_ID + kind.id,
            revision: 1,
            class: kind.pci_class,
            subsystem_vendor: VENDOR,
            subsystem_device: FIRST_DEVICE_ID + kind.id,
        };
        let mut config = ConfigSpace::new(identity, Some(BarLayout { base: bar, bytes: BAR_BYTES }));
        let queues = interrupt.queue_vectors.len();
        let no_space = TransportError::NoCapabilitySpace { queues };
        let (Some(msix_capability), Some(pci_cfg_capability)) =
            (add_msix_capability(&mut config, interrupt.msix.len()), add_virtio_capabilities(&mut config, queues))
        else {
            return Err(no_space);
        };
        let state = TransportState::new(name, device, memory, Arc::clone(&interrupt) as Arc<dyn VirtioInterrupt>)?;
        Ok(Self {
            state: Mutex::new(state),
            config: Mutex::new(config),
            interrupt,
            msix_capability,
            pci_cfg_capability,
        })
    }

    /// Returns the kick addresses of all queues, for a BAR at guest physical address `bar`.
    #[must_use]
    pub fn doorbells(&self, bar: u32) -> Vec<Doorbell> {
        let doorbell = |(index, event): (u64, &Arc<EventFd>)| Doorbell {
            gpa: u64::from(bar + NOTIFY) + index * u64::from(NOTIFY_STRIDE),
            datamatch: None,
            event: Arc::clone(event),
        };
        (0_u64..).zip(self.state().kicks()).map(doorbell).collect()
    }

    fn state(&self) -> MutexGuard<'_, TransportState> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.continue_reset();
        state
    }

    fn config(&self) -> MutexGuard<'_, ConfigSpace> {
        self.config.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn read_bar(&self, offset: u32, data: &mut [u8]) {
        let (structure, at) = (offset & !(STRUCTURE_BYTES - 1), offset & (STRUCTURE_BYTES - 1));
        match structure {
            COMMON => self.read_common(at, data),
            ISR => {
                data.fill(0);
                if let (0, Some(first)) = (at, data.first_mut()) {
                    // A read clears the ISR status (virtio 1.3 §4.1.4.5.1).
                    *first = self.interrupt.isr_status.swap(0, Ordering::AcqRel);
                }
            }
            DEVICE_CONFIG => self.state().read_config(u64::from(at), data),
            MSIX_TABLE => self.interrupt.msix.read_table(u64::from(at), data),
            MSIX_PENDING => self.interrupt.msix.read_pending(u64::from(at), data),
            _ => data.fill(0),
        }
    }

    fn write_bar(&self, offset: u32, data: &[u8]) {
        let (structure, at) = (offset & !(STRUCTURE_BYTES - 1), offset & (STRUCTURE_BYTES - 1));
        match structure {
            COMMON => self.write_common(at, data),
            DEVICE_CONFIG => self.state().write_config(u64::from(at), data),
            NOTIFY => self.state().kick(at / NOTIFY_STRIDE),
            MSIX_TABLE => self.interrupt.msix.write_table(u64::from(at), data),
            _ => {}
        }
    }

    /// Reads struct virtio_pci_common_cfg (virtio 1.3 §4.1.4.3). Fields are read in their own width; the driver reads 64-bit
    /// fields as two 32-bit halves.
    fn read_common(&self, at: u32, data: &mut [u8]) {
        let state = self.state();
        let selected = usize::from(state.queue_select);
        let value: u32 = match at {
            0x00 => state.device_features_select,
            0x04 => state.device_features(),
            0x08 => state.driver_features_select,
            0x0c => state.driver_features(),
            0x10 => u32::from(self.interrupt.config_vector.load(Ordering::Acquire)),
            0x12 => u32::from(state.queue_count()),
            0x14 => u32::from(state.status()),
            0x15 => state.config_generation() & 0xff,
            0x16 => u32::from(state.queue_select),
            0x18 => state.queue().map_or(0, |queue| u32::from(queue.size)),
            0x1a => {
                let vector = self.interrupt.queue_vectors.get(selected).map(|vector| vector.load(Ordering::Acquire));
                u32::from(vector.unwrap_or(NO_VECTOR))
            }
            0x1c => state.queue().map_or(0, |queue| u32::from(queue.ready)),
            // queue_notify_off, in units of `NOTIFY_STRIDE`.
            0x1e => u32::from(state.queue_select),
            0x20 | 0x24 => half_at(at).get(state.queue_address(QueueArea::Descriptor)),
            0x28 | 0x2c => half_at(at).get(state.queue_address(QueueArea::Driver)),
            0x30 | 0x34 => half_at(at).get(state.queue_address(QueueArea::Device)),
            _ => 0,
        };
        data.fill(0);
        let bytes = value.to_le_bytes();
        let width = data.len().min(field_bytes(at));
        data[..width].copy_from_slice(&bytes[..width]);
    }

    fn write_common(&self, at: u32, data: &[u8]) {
        if let Ok([a, b, c, d, e, f, g, h]) = <[u8; 8]>::try_from(data) {
            // One access to a 64-bit field.
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
            0x10 => self.interrupt.config_vector.store(self.existing_vector(short), Ordering::Release),
            0x14 => {
                state.set_status(u8::try_from(value).unwrap_or(0));
                if value == 0 {
                    self.interrupt.reset();
                }
            }
            0x16 => state.queue_select = short,
            0x18 => state.set_queue_size(value),
            0x1a => {
                if let Some(vector) = self.interrupt.queue_vectors.get(usize::from(state.queue_select)) {
                    vector.store(self.existing_vector(short), Ordering::Release);
                }
            }
            0x1c => state.set_queue_ready(value),
            0x20 | 0x24 => state.set_queue_address(QueueArea::Descriptor, half_at(at), value),
            0x28 | 0x2c => state.set_queue_address(QueueArea::Driver, half_at(at), value),
            0x30 | 0x34 => state.set_queue_address(QueueArea::Device, half_at(at), value),
            _ => log::debug!(
                "virtio-pci: {value:#x} written to offset {at:#x} of the common configuration, which is not writable: ignored"
            ),
        }
    }

    /// Returns `vector`, or [`NO_VECTOR`] where the device has no such vector (virtio 1.3 §4.1.5.1.2).
    fn existing_vector(&self, vector: u16) -> u16 {
        if vector < self.interrupt.msix.len() { vector } else { NO_VECTOR }
    }

    /// Returns where the PCI configuration access capability points, or `None` where that is not a register of the BAR.
    fn pci_cfg_target(&self, config: &ConfigSpace) -> Option<BarAccess> {
        let bar = config.byte(self.pci_cfg_capability + 4);
        let offset = config.dword(self.pci_cfg_capability + 8);
        let width = usize::try_from(config.dword(self.pci_cfg_capability + 12)).ok()?;
        let aligned = offset.is_multiple_of(u32::try_from(width).ok().filter(|width| *width != 0)?);
        let valid = matches!(width, 1 | 2 | 4) && bar == 0 && offset < BAR_BYTES && aligned;
        valid.then_some(BarAccess { offset, width })
    }

    /// Offset of `pci_cfg_data`, whose accesses are accesses to the BAR.
    fn pci_cfg_data(&self) -> usize {
        self.pci_cfg_capability + PCI_CFG_CAPABILITY_BYTES - PCI_CFG_DATA_BYTES
    }

    fn is_pci_cfg_data(&self, offset: usize, len: usize) -> bool {
        offset >= self.pci_cfg_data() && offset + len <= self.pci_cfg_data() + PCI_CFG_DATA_BYTES
    }
}

/// Returns the size in bytes of the field of the common configuration at offset `at`.
fn field_bytes(at: u32) -> usize {
    match at {
        0x14 | 0x15 => 1,
        0x10 | 0x12 | 0x16..=0x1e => 2,
        _ => 4,
    }
}

/// Returns which half of a 64-bit field the offset `at` in the common configuration accesses.
fn half_at(at: u32) -> Half {
    if at & 4 == 0 { Half::Low } else { Half::High }
}

/// Adds the MSI-X capability and returns its offset. `None` where it does not fit.
fn add_msix_capability(config: &mut ConfigSpace, vectors: u16) -> Option<usize> {
    let mut body = [0; 10];
    body[0..2].copy_from_slice(&(vectors.saturating_sub(1)).to_le_bytes());
    body[2..6].copy_from_slice(&MSIX_TABLE.to_le_bytes());
    body[6..10].copy_from_slice(&MSIX_PENDING.to_le_bytes());
    let writable = [0, MSIX_ENABLE | MSIX_MASK_ALL];
    config.add_capability(&Capability { id: CAP_MSIX, body: &body, writable: &writable })
}

/// Adds the five virtio capabilities and returns the offset of the last, the PCI configuration access capability. `None`
/// where they do not fit.
fn add_virtio_capabilities(config: &mut ConfigSpace, queues: usize) -> Option<usize> {
    let notify_bytes = u32::try_from(queues).ok()?.checked_mul(NOTIFY_STRIDE)?;
    let mut add = |kind: u8, offset: u32, length: u32, extra: &[u8], writable: &[u8]| {
        // struct virtio_pci_cap without its first two bytes (cap_vndr, cap_next): cap_len, cfg_type, bar, id, padding, offset, length.
        let mut body = vec![u8::try_from(16 + extra.len()).unwrap_or(0), kind, 0, 0, 0, 0];
        body.extend(offset.to_le_bytes());
        body.extend(length.to_le_bytes());
        body.extend(extra);
        config.add_capability(&Capability { id: CAP_VENDOR, body: &body, writable })
    };
    add(CFG_COMMON, COMMON, COMMON_BYTES, &[], &[])?;
    add(CFG_NOTIFY, NOTIFY, notify_bytes, &NOTIFY_STRIDE.to_le_bytes(), &[])?;
    add(CFG_ISR, ISR, 1, &[], &[])?;
    add(CFG_DEVICE, DEVICE_CONFIG, STRUCTURE_BYTES, &[], &[])?;
    let mut writable = [0; 18];
    writable[2] = 0xff; // bar
    writable[6..14].fill(0xff); // offset, length
    add(CFG_PCI, 0, 0, &[0; 4], &writable)
}

impl PciFunction for PciDevice {
    fn pci_cfg_capability(&self) -> Option<usize> {
        Some(self.pci_cfg_capability)
    }

    fn read_config(&self, offset: usize, data: &mut [u8]) {
        let config = self.config();
        config.read(offset, data);
        if self.is_pci_cfg_data(offset, data.len())
            && let Some(target) = self.pci_cfg_target(&config)
        {
            drop(config);
            let mut value = [0; PCI_CFG_DATA_BYTES];
            self.read_bar(target.offset, &mut value[..target.width]);
            let skip = offset - self.pci_cfg_data();
            let len = data.len();
            data.copy_from_slice(&value[skip..skip + len]);
        }
    }

    fn write_config(&self, offset: usize, data: &[u8]) {
        let mut config = self.config();
        config.write(offset, data);
        let msix_control = self.msix_capability + 3;
        let control = config.byte(msix_control);
        let writes_msix_control = offset <= msix_control && offset + data.len() > msix_control;
        let target = self.pci_cfg_target(&config).filter(|_| self.is_pci_cfg_data(offset, data.len()));
        drop(config);
        if writes_msix_control {
            self.interrupt.msix.set_control(MsixControl {
                enabled: control & MSIX_ENABLE != 0,
                function_masked: control & MSIX_MASK_ALL != 0,
            });
        }
        if let Some(target) = target
            && let Some(data) = data.get(..target.width)
        {
            self.write_bar(target.offset, data);
        }
    }
}

impl VirtioTransport for PciDevice {
    fn counts(&self) -> Vec<Arc<QueueCounts>> {
        self.state().counts()
    }

    fn set_options(&self, options: TransportOptions) {
        self.state().set_options(options);
    }

    fn start_threads(&self, start: &ThreadStart) -> Result<(), TransportError> {
        Ok(self.state().start_threads(start)?)
    }

    fn pause(&self, deadline: Instant) -> Result<(), PauseError> {
        self.state().pause(deadline)
    }

    fn save(&self) -> Result<VirtioState, PauseError> {
        self.state().save(self.save_bus())
    }

    fn restore(&self, saved: &VirtioState) -> Result<(), VirtioStateError> {
        let mut state = self.state();
        let fault = |source| VirtioStateError { name: Arc::clone(&state.name), source };
        self.restore_bus(&saved.bus).map_err(fault)?;
        state.restore(saved)
    }

    fn resume(&self) -> bool {
        self.state().resume()
    }

    fn request_stop(&self) {
        self.state().request_stop();
    }

    fn wait_stopped(&self, deadline: Instant) {
        self.state().wait_stopped(deadline);
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

#[path = "pci_saved.rs"]
mod saved;
#[cfg(test)]
#[path = "pci_tests.rs"]
mod tests;
