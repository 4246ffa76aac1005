//! The MMIO transport (virtio 1.3 §4.2), version 2. It needs fewer accesses at boot than PCI, and has one edge-triggered
//! interrupt for each device. The readable registers are kept in a page that the machine can map into the guest (see
//! [`MmioDevice::page`]).

use super::device::VirtioDevice;
use super::device_thread::ThreadStart;
use super::interrupt::{InterruptSource, VirtioInterrupt};
use super::queue::QueueCounts;
use super::ring_area::QueueArea;
use super::saved::{BusState, PauseError, StateFault, VirtioState, VirtioStateError};
use super::shown_state::{ShownState, ShowsState};
use super::transport::{Doorbell, TransportError, TransportOptions, VirtioTransport};
use super::transport_state::TransportState;
use crate::bus::{Action, BusDevice};
use crate::half::Half;
use crate::memory::Memory;
use crate::page::RegisterPage;
use std::io;
use std::sync::atomic::Ordering;
use std::sync::{Arc, OnceLock, Weak};
use std::time::Instant;
use vmm_sys_util::eventfd::EventFd;

/// Size in bytes of a device's register region, device configuration included.
pub const REGION_BYTES: u64 = 0x1000;

// Register offsets (virtio 1.3 §4.2.2, table 4.1).
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
/// Size in bytes of the device configuration in the register page; no device has more.
const CONFIG_BYTES: usize = 0x100;
/// The readable registers except InterruptStatus and ConfigGeneration, which are written to the page separately.
const READABLE: [u64; 12] = [
    MAGIC_VALUE,
    VERSION,
    DEVICE_ID,
    VENDOR_ID,
    DEVICE_FEATURES,
    QUEUE_SIZE_MAX,
    QUEUE_READY,
    STATUS,
    SHM_LEN_LOW,
    SHM_LEN_LOW + 4,
    SHM_BASE_HIGH - 4,
    SHM_BASE_HIGH,
];

// Bits of InterruptStatus (virtio 1.3 §4.2.2).
const USED_BUFFER: u32 = 1;
const CONFIG_CHANGED: u32 = 2;

/// A range of registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RegisterRange {
    /// Offset of the first register from the start of the region, in bytes.
    pub offset: u64,
    /// Size of the range in bytes.
    pub bytes: u32,
}

/// Converts a register's offset to its offset in the page.
fn page_offset(register: u64) -> usize {
    usize::try_from(register).unwrap_or(RegisterPage::BYTES)
}

/// The device's only interrupt line. InterruptStatus says what an interrupt was for.
struct InterruptLine {
    event: Arc<EventFd>,
    page: RegisterPage,
    device: OnceLock<Weak<MmioDevice>>,
}

impl InterruptLine {
    fn raise(&self, bit: u32) -> io::Result<()> {
        self.page.register(page_offset(INTERRUPT_STATUS)).fetch_or(bit.to_le(), Ordering::AcqRel);
        self.event.write(1)
    }
}

impl VirtioInterrupt for InterruptLine {
    fn trigger(&self, source: InterruptSource) -> io::Result<()> {
        match source {
            InterruptSource::Queue(_) => self.raise(USED_BUFFER),
            InterruptSource::Config => {
                if let Some(device) = self.device.get().and_then(Weak::upgrade) {
                    device.config_changed();
                }
                self.raise(CONFIG_CHANGED)
            }
        }
    }

    fn clear(&self) {
        self.page.write_register(page_offset(INTERRUPT_STATUS), 0);
    }

    fn repeat(&self) -> io::Result<()> {
        let raised = self.page.register(page_offset(INTERRUPT_STATUS)).load(Ordering::Acquire) != 0;
        if raised { self.event.write(1) } else { Ok(()) }
    }

    fn reset_ended(&self) {
        if let Some(device) = self.device.get().and_then(Weak::upgrade) {
            device.show_late_reset();
        }
    }
}

/// A device on the MMIO transport.
pub struct MmioDevice {
    state: ShownState,
    interrupt: Arc<InterruptLine>,
    page: RegisterPage,
}

impl MmioDevice {
    /// Puts `device` on the transport. It interrupts its driver by writes to `event`, an irqfd of an edge-triggered line.
    ///
    /// # Errors
    /// Returns [`TransportError`] where the host has no memory or file descriptors left.
    pub fn new(
        name: &str,
        device: Box<dyn VirtioDevice>,
        memory: Memory,
        event: Arc<EventFd>,
    ) -> Result<Arc<Self>, TransportError> {
        let page = RegisterPage::new()?;
        let interrupt = Arc::new(InterruptLine { event, page: page.clone(), device: OnceLock::new() });
        let state = TransportState::new(name, device, memory, Arc::clone(&interrupt) as Arc<dyn VirtioInterrupt>)?;
        let mmio = Arc::new(Self { state: ShownState::new(state), interrupt, page });
        // This is the first set of a new `OnceLock`, which cannot fail.
        let _ = mmio.interrupt.device.set(Arc::downgrade(&mmio));
        mmio.update_pages(&mmio.state());
        Ok(mmio)
    }

    /// Returns the page of readable registers. Where the guest reads it directly, writes to registers outside
    /// [`MmioDevice::COALESCIBLE`] must exit at once, as they change what the next read returns.
    #[must_use]
    pub fn page(&self) -> &RegisterPage {
        &self.page
    }

    /// Registers whose writes may be delayed until the next exit by an access to any other register (KVM API §4.116,
    /// `KVM_REGISTER_COALESCED_MMIO`), where the guest reads the page directly. They take effect with the next write of the
    /// device status. Of them only QueueReady can be read, and drivers read it before they write it.
    pub const COALESCIBLE: [RegisterRange; 4] = [
        RegisterRange { offset: DRIVER_FEATURES, bytes: 8 },
        RegisterRange { offset: QUEUE_SIZE, bytes: 4 },
        RegisterRange { offset: QUEUE_READY, bytes: 4 },
        RegisterRange { offset: QUEUE_DESC_LOW, bytes: 0x28 },
    ];

    /// The same where reads exit: the exit of a read delivers the delayed writes first, so that selectors may be delayed too.
    pub const COALESCIBLE_WITHOUT_PAGE: [RegisterRange; 2] = [
        RegisterRange { offset: DEVICE_FEATURES_SEL, bytes: 0x34 },
        RegisterRange { offset: QUEUE_DESC_LOW, bytes: 0x28 },
    ];

    fn interrupt_status(&self) -> u32 {
        u32::from_le(self.page.register(page_offset(INTERRUPT_STATUS)).load(Ordering::Acquire))
    }

    /// Returns the kick addresses of all queues, for a register region at guest physical address `base`.
    #[must_use]
    pub fn doorbells(&self, base: u64) -> Vec<Doorbell> {
        let doorbell = |(index, event): (u32, &Arc<EventFd>)| Doorbell {
            gpa: base + QUEUE_NOTIFY,
            datamatch: Some(index),
            event: Arc::clone(event),
        };
        (0_u32..).zip(self.state().kicks()).map(doorbell).collect()
    }

    fn register(&self, state: &TransportState, offset: u64) -> u32 {
        match offset {
            MAGIC_VALUE => u32::from_le_bytes(*b"virt"),
            VERSION => 2,
            DEVICE_ID => u32::from(state.kind().id),
            VENDOR_ID => u32::from_le_bytes(*b"hwvm"),
            DEVICE_FEATURES => state.device_features(),
            QUEUE_SIZE_MAX => state.queue().map_or(0, |queue| u32::from(queue.max_size)),
            QUEUE_READY => state.queue().map_or(0, |queue| u32::from(queue.ready)),
            INTERRUPT_STATUS => self.interrupt_status(),
            STATUS => u32::from(state.status()),
            // Shared memory regions (virtio 1.3 §4.2.2): a length of all ones says that there is none.
            SHM_LEN_LOW..=SHM_BASE_HIGH => u32::MAX,
            CONFIG_GENERATION => state.config_generation(),
            _ => 0,
        }
    }

    fn set_register(&self, state: &mut TransportState, offset: u64, value: u32) {
        match offset {
            DEVICE_FEATURES_SEL => state.device_features_select = value,
            DRIVER_FEATURES => state.set_driver_features(value),
            DRIVER_FEATURES_SEL => state.driver_features_select = value,
            // An index out of range selects no queue.
            QUEUE_SEL => state.queue_select = u16::try_from(value).unwrap_or(u16::MAX),
            QUEUE_SIZE => state.set_queue_size(value),
            QUEUE_READY => state.set_queue_ready(value),
            QUEUE_NOTIFY => state.kick(value),
            INTERRUPT_ACK => {
                self.page.register(page_offset(INTERRUPT_STATUS)).fetch_and(!value.to_le(), Ordering::AcqRel);
            }
            STATUS => {
                if let Ok(status) = u8::try_from(value) {
                    state.set_status(status);
                }
            }
            QUEUE_DESC_LOW => state.set_queue_address(QueueArea::Descriptor, Half::Low, value),
            QUEUE_DESC_HIGH => state.set_queue_address(QueueArea::Descriptor, Half::High, value),
            QUEUE_DRIVER_LOW => state.set_queue_address(QueueArea::Driver, Half::Low, value),
            QUEUE_DRIVER_HIGH => state.set_queue_address(QueueArea::Driver, Half::High, value),
            QUEUE_DEVICE_LOW => state.set_queue_address(QueueArea::Device, Half::Low, value),
            QUEUE_DEVICE_HIGH => state.set_queue_address(QueueArea::Device, Half::High, value),
            _ => log::debug!("virtio-mmio: {value:#x} written to register {offset:#x}, which is not writable: ignored"),
        }
    }
}

impl ShowsState for MmioDevice {
    fn shown(&self) -> &ShownState {
        &self.state
    }

    fn write_pages(&self, state: &TransportState) {
        let mut config = [0; CONFIG_BYTES];
        state.read_config(0, &mut config);
        self.page.write(page_offset(CONFIG), &config);
        for register in READABLE {
            self.page.write_register(page_offset(register), self.register(state, register));
        }
        self.page.write_register(page_offset(CONFIG_GENERATION), state.config_generation());
    }

    fn write_generation(&self, _state: &TransportState, generation: u32) {
        self.page.write_register(page_offset(CONFIG_GENERATION), generation);
    }

    fn interrupt_for_config(&self) -> io::Result<()> {
        self.interrupt.raise(CONFIG_CHANGED)
    }
}

impl VirtioTransport for MmioDevice {
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
        let bus = BusState::Mmio { interrupt_status: self.interrupt_status() };
        self.with_state(|state| state.save(bus))
    }

    fn restore(&self, saved: &VirtioState) -> Result<(), VirtioStateError> {
        self.with_state(|state| {
            let BusState::Mmio { interrupt_status } = saved.bus else {
                return Err(VirtioStateError { name: state.name.clone(), source: StateFault::Bus });
            };
            state.restore(saved)?;
            let status = interrupt_status & (USED_BUFFER | CONFIG_CHANGED);
            self.page.write_register(page_offset(INTERRUPT_STATUS), status);
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

impl BusDevice for MmioDevice {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let state = self.state();
        if offset >= CONFIG {
            state.read_config(offset - CONFIG, data);
        } else if data.len() == 4 && offset.is_multiple_of(4) {
            // Registers are accessed in 32 bits, aligned (virtio 1.3 §4.2.2.2). Other reads return all ones.
            data.copy_from_slice(&self.register(&state, offset).to_le_bytes());
        }
        drop(state);
        self.update_outdated_pages();
    }

    fn write(&self, offset: u64, data: &[u8]) -> Action {
        let mut state = self.state();
        if offset >= CONFIG {
            state.write_config(offset - CONFIG, data);
        } else if let Ok(value) = <[u8; 4]>::try_from(data)
            && offset.is_multiple_of(4)
        {
            self.set_register(&mut state, offset, u32::from_le_bytes(value));
        }
        self.update_pages(&state);
        drop(state);
        self.update_outdated_pages();
        Action::None
    }
}
