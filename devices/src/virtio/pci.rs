//! The PCI transport (virtio 1.3 §4.1), without the legacy interface: one BAR, MSI-X, no INTx. What is read of the BAR when a driver
//! starts is kept in pages that the machine can map into the guest (see [`PciDevice::pages`]).

use self::capabilities::{add_msix_capability, add_virtio_capabilities};
use self::interrupt::PciInterrupt;
use super::device::{InterruptVectors, VirtioDevice};
use super::device_thread::ThreadStart;
use super::interrupt::{InterruptSource, VirtioInterrupt};
use super::queue::QueueCounts;
use super::ring_area::QueueArea;
use super::saved::{PauseError, VirtioState, VirtioStateError};
use super::shown_state::{ShownState, ShowsState};
use super::transport::{Doorbell, TransportError, TransportOptions, VirtioTransport};
use super::transport_state::TransportState;
use crate::bus::{Action, BusDevice};
use crate::half::Half;
use crate::memory::Memory;
use crate::page::RegisterPage;
use crate::pci::{
    BarLayout, ConfigSpace, Identity, MsiRouter, MsiVector, Msix, MsixControl, PCI_CFG_CAPABILITY_BYTES,
    PCI_CFG_DATA_BYTES, PciFunction,
};
use std::io;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;
use vmm_sys_util::eventfd::EventFd;

/// Size of a device's BAR in bytes.
pub const BAR_BYTES: u32 = 0x8000;

// Offsets in the BAR.
const COMMON: u32 = 0x0000;
const COMMON_BYTES: u32 = 0x40;
/// In the page of the common configuration: one page shows both.
const DEVICE_CONFIG: u32 = 0x0800;
const DEVICE_CONFIG_BYTES: u32 = 0x0800;
const ISR: u32 = 0x1000;
const NOTIFY: u32 = 0x3000;
const MSIX_TABLE: u32 = 0x4000;
const MSIX_PENDING: u32 = 0x5000;
/// Each of the pages above has one structure, but for the first.
const PAGE_BYTES: u32 = 0x1000;
/// Size in bytes of the device configuration in its page; no device has more.
const SHOWN_CONFIG_BYTES: usize = 0x100;
/// Offset of the device status and the configuration's generation in the common configuration.
const STATUS_AND_GENERATION: u32 = 0x14;
/// `notify_off_multiplier` (virtio 1.3 §4.1.4.4): bytes between the kick addresses of two queues.
const NOTIFY_STRIDE: u32 = 4;

// PCI vendor and device IDs (virtio 1.3 §4.1.2).
const VENDOR: u16 = 0x1af4;
const FIRST_DEVICE_ID: u16 = 0x1040;
// Bits of the upper byte of the MSI-X message control (PCI Local Bus 3.0 §6.8.2).
const MSIX_ENABLE: u8 = 0x80;
const MSIX_MASK_ALL: u8 = 0x40;
/// `VIRTIO_MSI_NO_VECTOR` (virtio 1.3 §4.1.5.1.2): no MSI-X vector is assigned.
const NO_VECTOR: u16 = 0xffff;

/// A device on the PCI transport: a PCI function, and a BAR on the memory bus.
pub struct PciDevice {
    state: ShownState,
    /// The common configuration and the device configuration.
    page: RegisterPage,
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
    /// Returns how many MSI-X vectors a device needs: one for each queue or one for all of them, and one for configuration changes.
    /// Linux uses the same two where there are no more: it writes some nine registers for each vector.
    #[must_use]
    pub fn vector_count(device: &dyn VirtioDevice) -> usize {
        match device.interrupt_vectors() {
            InterruptVectors::PerQueue => device.queue_max_sizes().len() + 1,
            InterruptVectors::Shared => 2,
        }
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
    ) -> Result<Arc<Self>, TransportError> {
        let kind = device.kind();
        let queues = device.queue_max_sizes().len();
        let interrupt = Arc::new(PciInterrupt::new(Msix::new(vectors, router)?, queues));
        let identity = Identity {
            vendor: VENDOR,
            device: FIRST_DEVICE_ID + kind.id,
            revision: 1,
            class: kind.pci_class,
            subsystem_vendor: VENDOR,
            subsystem_device: FIRST_DEVICE_ID + kind.id,
        };
        let mut config = ConfigSpace::new(identity, Some(BarLayout { base: bar, bytes: BAR_BYTES }));
        let no_space = TransportError::NoCapabilitySpace { queues };
        let (Some(msix_capability), Some(pci_cfg_capability)) =
            (add_msix_capability(&mut config, interrupt.msix.len()), add_virtio_capabilities(&mut config, queues))
        else {
            return Err(no_space);
        };
        let state = TransportState::new(name, device, memory, Arc::clone(&interrupt) as Arc<dyn VirtioInterrupt>)?;
        let device = Arc::new(Self {
            state: ShownState::new(state),
            page: RegisterPage::new()?,
            config: Mutex::new(config),
            interrupt,
            msix_capability,
            pci_cfg_capability,
        });
        device.interrupt.set_device(Arc::downgrade(&device));
        device.update_pages(&device.state());
        Ok(device)
    }

    /// Returns pages of the BAR with their offsets: what a read of them returns. Where the guest reads them directly, writes must exit at
    /// once, as they change what the next read returns.
    #[must_use]
    pub fn pages(&self) -> [(u32, &RegisterPage); 2] {
        [(COMMON, &self.page), (MSIX_TABLE, self.interrupt.msix.page())]
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

    fn config(&self) -> MutexGuard<'_, ConfigSpace> {
        self.config.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn read_bar(&self, offset: u32, data: &mut [u8]) {
        let (page, at) = (offset & !(PAGE_BYTES - 1), offset & (PAGE_BYTES - 1));
        match page {
            COMMON if at >= DEVICE_CONFIG => self.state().read_config(u64::from(at - DEVICE_CONFIG), data),
            COMMON => read_common(&self.interrupt, &self.state(), at, data),
            ISR => {
                data.fill(0);
                if let (0, Some(first)) = (at, data.first_mut()) {
                    // A read clears the ISR status (virtio 1.3 §4.1.4.5.1).
                    *first = self.interrupt.isr_status.swap(0, Ordering::AcqRel);
                }
            }
            MSIX_TABLE => self.interrupt.msix.read_table(u64::from(at), data),
            MSIX_PENDING => self.interrupt.msix.read_pending(u64::from(at), data),
            _ => data.fill(0),
        }
        self.update_outdated_pages();
    }

    fn write_bar(&self, offset: u32, data: &[u8]) {
        let (page, at) = (offset & !(PAGE_BYTES - 1), offset & (PAGE_BYTES - 1));
        match page {
            COMMON => {
                let mut state = self.state();
                match at.checked_sub(DEVICE_CONFIG) {
                    Some(at) => state.write_config(u64::from(at), data),
                    None => self.write_common(&mut state, at, data),
                }
                self.update_pages(&state);
            }
            NOTIFY => self.state().kick(at / NOTIFY_STRIDE),
            MSIX_TABLE => self.interrupt.msix.write_table(u64::from(at), data),
            _ => {}
        }
        self.update_outdated_pages();
    }

    fn write_common(&self, state: &mut TransportState, at: u32, data: &[u8]) {
        if let Ok([a, b, c, d, e, f, g, h]) = <[u8; 8]>::try_from(data) {
            // One access to a 64-bit field.
            self.write_common(state, at, &[a, b, c, d]);
            self.write_common(state, at + 4, &[e, f, g, h]);
            return;
        }
        let mut bytes = [0; 4];
        let width = data.len().min(field_bytes(at));
        bytes[..width].copy_from_slice(&data[..width]);
        let value = u32::from_le_bytes(bytes);
        let short = u16::try_from(value).unwrap_or(NO_VECTOR);
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

/// Reads a field of struct virtio_pci_common_cfg (virtio 1.3 §4.1.4.3). Fields are read in their own width; the driver reads 64-bit
/// fields as two 32-bit halves.
fn common_field(interrupt: &PciInterrupt, state: &TransportState, at: u32) -> u32 {
    let selected = usize::from(state.queue_select);
    match at {
        0x00 => state.device_features_select,
        0x04 => state.device_features(),
        0x08 => state.driver_features_select,
        0x0c => state.driver_features(),
        0x10 => u32::from(interrupt.config_vector.load(Ordering::Acquire)),
        0x12 => u32::from(state.queue_count()),
        0x14 => u32::from(state.status()),
        0x15 => state.config_generation() & 0xff,
        0x16 => u32::from(state.queue_select),
        0x18 => state.queue().map_or(0, |queue| u32::from(queue.size)),
        0x1a => {
            let vector = interrupt.queue_vectors.get(selected).map(|vector| vector.load(Ordering::Acquire));
            u32::from(vector.unwrap_or(NO_VECTOR))
        }
        0x1c => state.queue().map_or(0, |queue| u32::from(queue.ready)),
        // queue_notify_off, in units of `NOTIFY_STRIDE`.
        0x1e => u32::from(state.queue_select),
        0x20 | 0x24 => half_at(at).get(state.queue_address(QueueArea::Descriptor)),
        0x28 | 0x2c => half_at(at).get(state.queue_address(QueueArea::Driver)),
        0x30 | 0x34 => half_at(at).get(state.queue_address(QueueArea::Device)),
        _ => 0,
    }
}

fn read_common(interrupt: &PciInterrupt, state: &TransportState, at: u32, data: &mut [u8]) {
    data.fill(0);
    let bytes = common_field(interrupt, state, at).to_le_bytes();
    let width = data.len().min(field_bytes(at));
    data[..width].copy_from_slice(&bytes[..width]);
}

/// Returns the size in bytes of the field of the common configuration at offset `at`.
fn field_bytes(at: u32) -> usize {
    match at {
        0x14 | 0x15 => 1,
        0x10 | 0x12 | 0x16..=0x1e => 2,
        _ => 4,
    }
}

/// Returns the fields in the four bytes of the common configuration at offset `at`, a multiple of 4.
fn common_word(interrupt: &PciInterrupt, state: &TransportState, at: u32) -> u32 {
    let (mut word, mut shift) = (0, 0);
    while shift < 32 {
        let field = at + shift / 8;
        word |= common_field(interrupt, state, field) << shift;
        shift += u32::try_from(field_bytes(field) * 8).unwrap_or(32);
    }
    word
}

/// Converts an offset in the first page of the BAR.
fn in_page(offset: u32) -> usize {
    usize::try_from(offset).unwrap_or(RegisterPage::BYTES)
}

/// Returns which half of a 64-bit field the offset `at` in the common configuration accesses.
fn half_at(at: u32) -> Half {
    if at & 4 == 0 { Half::Low } else { Half::High }
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

impl ShowsState for PciDevice {
    fn shown(&self) -> &ShownState {
        &self.state
    }

    fn write_pages(&self, state: &TransportState) {
        let mut config = [0; SHOWN_CONFIG_BYTES];
        state.read_config(0, &mut config);
        self.page.write(in_page(DEVICE_CONFIG), &config);
        // The configuration's generation is last.
        let words = (0..COMMON_BYTES).step_by(4).filter(|at| *at != STATUS_AND_GENERATION);
        for at in words.chain([STATUS_AND_GENERATION]) {
            self.page.write_register(in_page(at), common_word(&self.interrupt, state, at));
        }
    }

    fn write_generation(&self, state: &TransportState, generation: u32) {
        let word = common_word(&self.interrupt, state, STATUS_AND_GENERATION);
        self.page.write_register(in_page(STATUS_AND_GENERATION), word & !0xff00 | (generation & 0xff) << 8);
    }

    fn interrupt_for_config(&self) -> io::Result<()> {
        self.interrupt.send(InterruptSource::Config)
    }
}

impl VirtioTransport for PciDevice {
    fn counts(&self) -> Vec<Arc<QueueCounts>> {
        self.with_state(|state| state.counts())
    }

    fn set_options(&self, options: TransportOptions) {
        self.with_state(|state| state.set_options(options));
    }

    fn start_threads(&self, start: &ThreadStart) -> Result<(), TransportError> {
        Ok(self.with_state(|state| state.start_threads(start))?)
    }

    fn pause(&self, deadline: Instant) -> Result<(), PauseError> {
        self.with_state(|state| state.pause(deadline))
    }

    fn save(&self) -> Result<VirtioState, PauseError> {
        self.with_state(|state| state.save(self.save_bus()))
    }

    fn restore(&self, saved: &VirtioState) -> Result<(), VirtioStateError> {
        self.with_state(|state| {
            let fault = |source| VirtioStateError { name: Arc::clone(&state.name), source };
            self.restore_bus(&saved.bus).map_err(fault)?;
            state.restore(saved)?;
            self.update_pages(state);
            Ok(())
        })
    }

    fn resume(&self) -> bool {
        self.with_state(TransportState::resume)
    }

    fn request_stop(&self) {
        self.with_state(|state| state.request_stop());
    }

    fn wait_stopped(&self, deadline: Instant) {
        self.with_state(|state| state.wait_stopped(deadline));
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

#[path = "pci_capabilities.rs"]
mod capabilities;
#[path = "pci_interrupt.rs"]
mod interrupt;
#[path = "pci_saved.rs"]
mod saved;
#[cfg(test)]
#[path = "pci_tests.rs"]
mod tests;
