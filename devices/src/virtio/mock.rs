//! A driver for tests: it does what the specification says, or whatever else a test wants.

use super::mmio::MmioDevice;
use super::{F_VERSION_1, VirtioDevice, VirtioTransport};
use crate::bus::BusDevice;
use crate::memory::Memory;
use std::sync::Arc;
use std::time::{Duration, Instant};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// VRING_DESC_F_NEXT.
pub const NEXT: u16 = 1;
/// VRING_DESC_F_WRITE.
pub const WRITE: u16 = 2;
/// VRING_DESC_F_INDIRECT.
pub const INDIRECT: u16 = 4;

/// Bytes of guest memory.
pub const MEMORY_BYTES: u64 = 16 << 20;
/// Each queue has its rings in a region of this size, from the start of memory.
pub const RING_BYTES: u64 = 0x1_0000;
/// Buffers from here on.
const BUFFERS: u64 = 0x40_0000;
const AVAILABLE: u64 = 0x4000;
const USED: u64 = 0x8000;
const PATIENCE: Duration = Duration::from_secs(20);

/// DEVICE_NEEDS_RESET.
pub const NEEDS_RESET: u32 = 64;

/// One of the driver's queues.
#[derive(Clone, Copy, Default)]
struct Ring {
    size: u16,
    next_descriptor: u16,
    available: u16,
    used: u16,
}

/// A device on the MMIO transport, and its driver.
pub struct Driver {
    device: Arc<MmioDevice>,
    /// Guest memory.
    pub memory: Memory,
    interrupt: Arc<EventFd>,
    rings: Vec<Ring>,
    next_buffer: u64,
}

/// What a chain was made of: its head and where its writable buffers are.
#[derive(Clone, Debug)]
pub struct Submitted {
    /// First descriptor.
    pub head: u16,
    /// gpa and length of each writable buffer.
    pub writable: Vec<(u64, u32)>,
}

#[allow(clippy::missing_panics_doc, reason = "a test's")]
impl Driver {
    /// Puts a device on the bus; nothing is negotiated yet.
    #[must_use]
    pub fn new(device: Box<dyn VirtioDevice>) -> Self {
        let queues = device.queue_max_sizes().len();
        let bytes = usize::try_from(MEMORY_BYTES).expect("small");
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), bytes)]).expect("memory");
        let memory = Memory::new(memory, Arc::new(()));
        let interrupt = Arc::new(EventFd::new(EFD_NONBLOCK).expect("an eventfd"));
        let device = MmioDevice::new("mock", device, memory.clone(), Arc::clone(&interrupt)).expect("a device");
        Self { device, memory, interrupt, rings: vec![Ring::default(); queues], next_buffer: BUFFERS }
    }

    /// The same, negotiated and running with all features.
    #[must_use]
    pub fn running(device: Box<dyn VirtioDevice>) -> Self {
        let mut driver = Self::new(device);
        driver.start(u64::MAX);
        driver
    }

    /// A register. What the page shows must be the same, where the device does not change it by itself.
    #[must_use]
    pub fn read(&self, register: u64) -> u32 {
        let mut data = [0xff; 4];
        self.device.read(register, &mut data);
        let value = u32::from_le_bytes(data);
        if register < 0x100 && register.is_multiple_of(4) && ![0x60, 0x70, 0xfc].contains(&register) {
            assert_eq!(self.shown(register), value, "register {register:#x} as memory");
        }
        value
    }

    /// A register as the guest reads it by itself.
    #[must_use]
    pub fn shown(&self, register: u64) -> u32 {
        let offset = usize::try_from(register).expect("small");
        u32::from_le(self.device.page().word(offset).load(std::sync::atomic::Ordering::Acquire))
    }

    /// Writes a register.
    pub fn write(&self, register: u64, value: u32) {
        self.device.write(register, &value.to_le_bytes());
    }

    /// Any access.
    pub fn write_bytes(&self, offset: u64, data: &[u8]) {
        self.device.write(offset, data);
    }

    /// Any access.
    pub fn read_bytes(&self, offset: u64, data: &mut [u8]) {
        self.device.read(offset, data);
    }

    /// The status register.
    #[must_use]
    pub fn status(&self) -> u32 {
        self.read(0x70)
    }

    /// What the device offers.
    #[must_use]
    pub fn device_features(&self) -> u64 {
        self.write(0x14, 0);
        let low = u64::from(self.read(0x10));
        self.write(0x14, 1);
        low | u64::from(self.read(0x10)) << 32
    }

    /// Resets, negotiates what is offered of `features`, and up to FEATURES_OK.
    pub fn negotiate(&mut self, features: u64) {
        self.write(0x70, 0);
        self.write(0x70, 1);
        self.write(0x70, 3);
        let features = self.device_features() & features | F_VERSION_1;
        for (select, half) in [(0, features & 0xffff_ffff), (1, features >> 32)] {
            self.write(0x24, select);
            self.write(0x20, u32::try_from(half).expect("32 bits"));
        }
        self.write(0x70, 11);
    }

    /// Negotiates, sets all queues up, and says DRIVER_OK.
    pub fn start(&mut self, features: u64) {
        self.negotiate(features);
        self.next_buffer = BUFFERS;
        let zeroes = vec![0; usize::try_from(RING_BYTES).expect("small")];
        for index in 0..self.rings.len() {
            let base = index as u64 * RING_BYTES;
            self.memory.write_slice(&zeroes, GuestAddress(base)).expect("memory");
            self.write(0x30, u32::try_from(index).expect("few"));
            let size = self.read(0x34).min(256);
            self.write(0x38, size);
            for (register, offset) in [(0x80, 0), (0x90, AVAILABLE), (0xa0, USED)] {
                self.write(register, u32::try_from(base + offset).expect("low"));
                self.write(register + 4, 0);
            }
            self.write(0x44, 1);
            self.rings[index] = Ring { size: u16::try_from(size).expect("small"), ..Ring::default() };
        }
        self.write(0x70, 15);
    }

    /// Room for a buffer.
    pub fn buffer(&mut self, bytes: u64) -> u64 {
        if self.next_buffer + bytes > MEMORY_BYTES {
            self.next_buffer = BUFFERS;
        }
        let at = self.next_buffer;
        self.next_buffer = (at + bytes).next_multiple_of(512);
        at
    }

    /// Writes a descriptor of a queue.
    pub fn put_descriptor(&self, queue: usize, index: u16, gpa: u64, len: u32, flags: u16, next: u16) {
        let at = queue as u64 * RING_BYTES + u64::from(index) * 16;
        let mut bytes = gpa.to_le_bytes().to_vec();
        bytes.extend(len.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(next.to_le_bytes());
        self.memory.write_slice(&bytes, GuestAddress(at)).expect("memory");
    }

    /// Makes a chain available, without a kick.
    pub fn make_available(&mut self, queue: usize, head: u16) {
        let ring = &mut self.rings[queue];
        let base = queue as u64 * RING_BYTES + AVAILABLE;
        // A driver that set nothing up has no ring.
        let slot = u64::from(ring.available % ring.size.max(1));
        self.memory.write_obj(head, GuestAddress(base + 4 + slot * 2)).expect("memory");
        ring.available = ring.available.wrapping_add(1);
        self.memory.write_obj(ring.available, GuestAddress(base + 2)).expect("memory");
    }

    /// Says that so many chains are available, whatever there is.
    pub fn set_available_index(&self, queue: usize, index: u16) {
        let at = queue as u64 * RING_BYTES + AVAILABLE + 2;
        self.memory.write_obj(index, GuestAddress(at)).expect("memory");
    }

    /// Kicks a queue.
    pub fn kick(&self, queue: usize) {
        self.write(0x50, u32::try_from(queue).expect("few"));
    }

    /// Makes a chain of `readable` contents and `writable` room, makes it available and kicks.
    pub fn submit(&mut self, queue: usize, readable: &[&[u8]], writable: &[u32]) -> Submitted {
        let mut parts: Vec<(u64, u32, u16)> = Vec::new();
        for content in readable {
            let at = self.buffer(content.len() as u64);
            self.memory.write_slice(content, GuestAddress(at)).expect("memory");
            parts.push((at, u32::try_from(content.len()).expect("short"), 0));
        }
        for len in writable {
            parts.push((self.buffer(u64::from(*len)), *len, WRITE));
        }
        let size = self.rings[queue].size.max(1);
        let first = self.rings[queue].next_descriptor;
        let index = |offset: usize| (first + u16::try_from(offset).expect("few")) % size;
        for (offset, (gpa, len, flags)) in parts.iter().enumerate() {
            let more = if offset + 1 < parts.len() { NEXT } else { 0 };
            self.put_descriptor(queue, index(offset), *gpa, *len, flags | more, index(offset + 1));
        }
        self.rings[queue].next_descriptor = index(parts.len());
        self.make_available(queue, first);
        self.kick(queue);
        let writable = parts.iter().filter(|part| part.2 == WRITE).map(|part| (part.0, part.1)).collect();
        Submitted { head: first, writable }
    }

    /// The next used chain, if there is one: head and bytes written.
    pub fn poll_used(&mut self, queue: usize) -> Option<(u32, u32)> {
        let base = queue as u64 * RING_BYTES + USED;
        let index: u16 = self.memory.read_obj(GuestAddress(base + 2)).expect("memory");
        let ring = &mut self.rings[queue];
        if index == ring.used {
            return None;
        }
        let at = base + 4 + u64::from(ring.used % ring.size) * 8;
        ring.used = ring.used.wrapping_add(1);
        let id = self.memory.read_obj(GuestAddress(at)).expect("memory");
        Some((id, self.memory.read_obj(GuestAddress(at + 4)).expect("memory")))
    }

    /// Waits for the next used chain.
    pub fn wait_used(&mut self, queue: usize) -> (u32, u32) {
        let start = Instant::now();
        loop {
            if let Some(used) = self.poll_used(queue) {
                return used;
            }
            assert!(start.elapsed() < PATIENCE, "queue {queue}: nothing used; status {:#x}", self.status());
            std::thread::sleep(Duration::from_micros(200));
        }
    }

    /// Waits until the device says that it needs a reset.
    pub fn wait_needs_reset(&self) {
        let start = Instant::now();
        while self.status() & NEEDS_RESET == 0 {
            assert!(start.elapsed() < PATIENCE, "the device does not mind");
            std::thread::sleep(Duration::from_micros(200));
        }
    }

    /// Submits, waits, and gives what was written.
    pub fn request(&mut self, queue: usize, readable: &[&[u8]], writable: &[u32]) -> Vec<u8> {
        let submitted = self.submit(queue, readable, writable);
        let (id, len) = self.wait_used(queue);
        assert_eq!(id, u32::from(submitted.head));
        self.contents(&submitted, len)
    }

    /// The first `len` bytes of a chain's writable buffers.
    #[must_use]
    pub fn contents(&self, submitted: &Submitted, len: u32) -> Vec<u8> {
        let mut all = Vec::new();
        for (gpa, len) in &submitted.writable {
            let mut part = vec![0; *len as usize];
            self.memory.read_slice(&mut part, GuestAddress(*gpa)).expect("memory");
            all.extend(part);
        }
        all.truncate(len as usize);
        all
    }

    /// How often the device interrupted since the last call.
    #[must_use]
    pub fn interrupts(&self) -> u64 {
        self.interrupt.read().unwrap_or(0)
    }

    /// Waits for an interrupt: it may come a moment after the buffers are used.
    pub fn wait_interrupt(&self) {
        let start = Instant::now();
        while self.interrupts() == 0 {
            assert!(start.elapsed() < PATIENCE, "no interrupt");
            std::thread::sleep(Duration::from_micros(200));
        }
    }

    /// How many queues the device has.
    #[must_use]
    pub fn queues(&self) -> usize {
        self.rings.len()
    }

    /// The device on its transport.
    #[must_use]
    pub fn device(&self) -> &dyn VirtioTransport {
        &*self.device
    }
}
