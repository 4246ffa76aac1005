//! The MMIO transport (virtio 1.3 §4.2), version 2: fewest accesses at boot, one edge-triggered interrupt a device. What a
//! read of its registers gives lies in a page that the guest can be given (see [`MmioDevice::page`]).

use super::transport::{Area, Doorbell, TransportState};
use super::{InterruptSource, QueueCounts, VirtioDevice, VirtioInterrupt, VirtioTransport};
use crate::bus::{Action, BusDevice};
use crate::memory::Memory;
use crate::page::RegisterPage;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, TryLockError, Weak};
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
/// Bytes of the configuration space that are shown; no device has more.
const CONFIG_BYTES: usize = 0x100;
/// Registers that can be read, but for the interrupt's status and the generation.
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

/// A register's place in the page.
fn at(offset: u64) -> usize {
    usize::try_from(offset).unwrap_or(RegisterPage::BYTES)
}

/// One line for everything; a status register says what it was.
struct Line {
    event: Arc<EventFd>,
    page: RegisterPage,
    device: OnceLock<Weak<MmioDevice>>,
}

impl Line {
    fn raise(&self, bit: u32) -> io::Result<()> {
        self.page.word(at(INTERRUPT_STATUS)).fetch_or(bit.to_le(), Ordering::AcqRel);
        self.event.write(1)
    }
}

const QUEUE_USED: u32 = 1;
const CONFIG_CHANGED: u32 = 2;

impl VirtioInterrupt for Line {
    fn trigger(&self, source: InterruptSource) -> io::Result<()> {
        match source {
            InterruptSource::Queue(_) => self.raise(QUEUE_USED),
            InterruptSource::Config => {
                if let Some(device) = self.device.get().and_then(Weak::upgrade) {
                    device.changed();
                }
                self.raise(CONFIG_CHANGED)
            }
        }
    }
}

/// A device on the MMIO transport.
pub struct MmioDevice {
    state: Mutex<TransportState>,
    line: Arc<Line>,
    page: RegisterPage,
    /// The device changed while somebody held its lock: who gives it back shows the change.
    stale: AtomicBool,
}

impl MmioDevice {
    /// `device`, interrupting by writes to `event` (an edge).
    ///
    /// # Errors
    /// Where eventfds are not to be had.
    pub fn new(
        name: &str,
        device: Box<dyn VirtioDevice>,
        memory: Memory,
        event: Arc<EventFd>,
    ) -> io::Result<Arc<Self>> {
        let page = RegisterPage::new()?;
        let line = Arc::new(Line { event, page: page.clone(), device: OnceLock::new() });
        let interrupt: Arc<dyn VirtioInterrupt> = Arc::clone(&line) as Arc<dyn VirtioInterrupt>;
        let state = Mutex::new(TransportState::new(name, device, memory, interrupt)?);
        let made = Arc::new(Self { state, line, page, stale: AtomicBool::new(false) });
        // Nobody else has set it: the line is new.
        let _ = made.line.device.set(Arc::downgrade(&made));
        made.show(&made.state());
        Ok(made)
    }

    /// The registers as the guest may read them by itself. Its writes must come here at once then, for all that says what
    /// the next read gives: [`MmioDevice::COALESCIBLE`] is the rest.
    #[must_use]
    pub fn page(&self) -> &RegisterPage {
        &self.page
    }

    /// Registers whose writes may come late, up to the next of any other register: (offset, bytes). They set what counts
    /// from the next status on, and change nothing that is read before: QueueReady, which can be, reads as it was until then,
    /// but drivers look at it before they set it, and behind a write of another register.
    pub const COALESCIBLE: [(u64, u32); 4] =
        [(DRIVER_FEATURES, 8), (QUEUE_SIZE, 4), (QUEUE_READY, 4), (QUEUE_DESC_LOW, 0x28)];

    /// The same where the guest cannot read by itself: a read brings what was written before.
    pub const COALESCIBLE_WITHOUT_PAGE: [(u64, u32); 2] = [(DEVICE_FEATURES_SEL, 0x34), (QUEUE_DESC_LOW, 0x28)];

    /// Shows what the registers are now. The configuration's generation comes last.
    fn show(&self, state: &TransportState) {
        self.stale.store(false, Ordering::SeqCst);
        let mut config = [0; CONFIG_BYTES];
        state.read_config(0, &mut config);
        self.page.show(at(CONFIG), &config);
        for register in READABLE {
            self.page.show_u32(at(register), self.register(state, register));
        }
        self.page.show_u32(at(CONFIG_GENERATION), state.generation());
    }

    /// The device has changed by itself. Never waits: whoever holds the lock may wait for the thread that says so.
    fn changed(&self) {
        self.stale.store(true, Ordering::SeqCst);
        if let Some(state) = self.try_state() {
            self.show(&state);
        }
    }

    /// After the lock has been given back: shows what the device changed meanwhile, and says so once more, since the
    /// driver may have looked in between.
    fn unlocked(&self) {
        while self.stale.load(Ordering::SeqCst) {
            let Some(state) = self.try_state() else { return };
            self.show(&state);
            drop(state);
            if let Err(error) = self.line.raise(CONFIG_CHANGED) {
                log::error!("cannot interrupt the guest: {error}");
            }
        }
    }

    fn try_state(&self) -> Option<MutexGuard<'_, TransportState>> {
        match self.state.try_lock() {
            Ok(guard) => Some(guard),
            Err(TryLockError::Poisoned(error)) => Some(error.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    fn interrupt_status(&self) -> u32 {
        u32::from_le(self.page.word(at(INTERRUPT_STATUS)).load(Ordering::Acquire))
    }

    /// What to make an ioeventfd of, for a device whose registers start at `base`.
    #[must_use]
    pub fn doorbells(&self, base: u64) -> Vec<Doorbell> {
        let bell = |(index, event): (u32, &Arc<EventFd>)| Doorbell {
            gpa: base + QUEUE_NOTIFY,
            datamatch: Some(index),
            event: Arc::clone(event),
        };
        (0_u32..).zip(self.state().kicks()).map(bell).collect()
    }

    fn state(&self) -> MutexGuard<'_, TransportState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn register(&self, state: &TransportState, offset: u64) -> u32 {
        match offset {
            MAGIC_VALUE => u32::from_le_bytes(*b"virt"),
            VERSION => 2,
            DEVICE_ID => u32::from(state.kind().id),
            VENDOR_ID => u32::from_le_bytes(*b"hwvm"),
            DEVICE_FEATURES => state.device_features(),
            QUEUE_SIZE_MAX => state.queue().map_or(0, |queue| u32::from(queue.max)),
            QUEUE_READY => state.queue().map_or(0, |queue| u32::from(queue.ready)),
            INTERRUPT_STATUS => self.interrupt_status(),
            STATUS => u32::from(state.status()),
            // No shared memory (§4.2.2): a length of all ones.
            SHM_LEN_LOW..=SHM_BASE_HIGH => u32::MAX,
            CONFIG_GENERATION => state.generation(),
            _ => 0,
        }
    }

    fn set_register(&self, state: &mut TransportState, offset: u64, value: u32) {
        match offset {
            DEVICE_FEATURES_SEL => state.device_features_select = value,
            DRIVER_FEATURES => state.set_driver_features(value),
            DRIVER_FEATURES_SEL => state.driver_features_select = value,
            // A number beyond all queues selects none.
            QUEUE_SEL => state.queue_select = u16::try_from(value).unwrap_or(u16::MAX),
            QUEUE_SIZE => state.set_queue_size(value),
            QUEUE_READY => state.set_queue_ready(value),
            QUEUE_NOTIFY => state.kick(value),
            INTERRUPT_ACK => {
                self.page.word(at(INTERRUPT_STATUS)).fetch_and(!value.to_le(), Ordering::AcqRel);
            }
            STATUS => {
                if let Ok(status) = u8::try_from(value) {
                    state.set_status(status);
                }
                if value == 0 {
                    self.page.show_u32(at(INTERRUPT_STATUS), 0);
                }
            }
            QUEUE_DESC_LOW => state.set_queue_address(Area::Descriptors, false, value),
            QUEUE_DESC_HIGH => state.set_queue_address(Area::Descriptors, true, value),
            QUEUE_DRIVER_LOW => state.set_queue_address(Area::Driver, false, value),
            QUEUE_DRIVER_HIGH => state.set_queue_address(Area::Driver, true, value),
            QUEUE_DEVICE_LOW => state.set_queue_address(Area::Device, false, value),
            QUEUE_DEVICE_HIGH => state.set_queue_address(Area::Device, true, value),
            _ => log::debug!("virtio-mmio: write of {value:#x} to register {offset:#x}: ignored"),
        }
    }
}

impl VirtioTransport for MmioDevice {
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

impl BusDevice for MmioDevice {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let state = self.state();
        if offset >= CONFIG {
            state.read_config(offset - CONFIG, data);
        } else if data.len() == 4 && offset.is_multiple_of(4) {
            // §4.2.2.2: registers are read in 32 bits, aligned. Else: all ones.
            data.copy_from_slice(&self.register(&state, offset).to_le_bytes());
        }
        drop(state);
        self.unlocked();
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
        self.show(&state);
        drop(state);
        self.unlocked();
        Action::None
    }
}
