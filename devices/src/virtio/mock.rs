//! A driver for tests. It follows the specification, or violates it where a test asks for that.

use super::device::VirtioDevice;
use super::device_thread::ThreadStart;
use super::features::F_VERSION_1;
use super::mmio::MmioDevice;
use super::saved::{VirtioState, VirtioStateError};
use super::transport::VirtioTransport;
use crate::bus::BusDevice;
use crate::memory::Memory;
use std::error::Error;
use std::sync::Arc;
use std::time::{Duration, Instant};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use vmm_sys_util::poll::PollContext;

/// `VIRTQ_DESC_F_NEXT`: another descriptor follows in the chain.
pub const NEXT: u16 = 1;
/// `VIRTQ_DESC_F_WRITE`: the buffer is device-writable.
pub const WRITE: u16 = 2;
/// `VIRTQ_DESC_F_INDIRECT`: the buffer is an indirect descriptor table.
pub const INDIRECT: u16 = 4;

/// Size of guest memory in bytes.
pub const MEMORY_BYTES: u64 = 16 << 20;
/// Size in bytes of the region with the rings of a queue. The regions start at guest physical address 0.
pub const RING_BYTES: u64 = 0x1_0000;
/// Guest physical address of the first buffer.
const BUFFERS: u64 = 0x40_0000;
// Offsets of the available and the used ring in the region of a queue.
const AVAILABLE: u64 = 0x4000;
const USED: u64 = 0x8000;
/// The longest time that the driver waits for the device.
const TIMEOUT: Duration = Duration::from_secs(20);

/// `DEVICE_NEEDS_RESET` in the device status.
pub const NEEDS_RESET: u32 = 64;

/// The driver's state of a queue.
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
    /// Guest memory, which holds the rings and the buffers.
    pub memory: Memory,
    interrupt: Arc<EventFd>,
    rings: Vec<Ring>,
    next_buffer: u64,
}

/// A used ring entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Used {
    /// Head of the descriptor chain.
    pub head: u32,
    /// Number of bytes that the device wrote.
    pub len: u32,
}

/// A buffer in guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestBuffer {
    /// Guest physical address of the first byte.
    pub gpa: u64,
    /// Length of the buffer in bytes.
    pub len: u32,
}

/// A descriptor (virtio 1.3 §2.7.5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Descriptor {
    /// Guest physical address of the buffer.
    pub gpa: u64,
    /// Length of the buffer in bytes.
    pub len: u32,
    /// Flags of the descriptor: [`NEXT`], [`WRITE`] and [`INDIRECT`].
    pub flags: u16,
    /// Index of the next descriptor.
    pub next: u16,
}

impl Descriptor {
    /// Returns the descriptor as in guest memory.
    #[must_use]
    pub fn to_bytes(self) -> Vec<u8> {
        let mut bytes = self.gpa.to_le_bytes().to_vec();
        bytes.extend(self.len.to_le_bytes());
        bytes.extend(self.flags.to_le_bytes());
        bytes.extend(self.next.to_le_bytes());
        bytes
    }
}

/// A descriptor chain that was made available.
#[derive(Clone, Debug)]
pub struct Submitted {
    /// Index of the first descriptor.
    pub head: u16,
    /// The device-writable buffers of the chain, which hold the answer once it is used.
    pub writable: Vec<GuestBuffer>,
}

#[allow(clippy::missing_panics_doc, reason = "all methods panic where a test fails")]
impl Driver {
    /// Puts a device on the MMIO transport. Nothing is negotiated.
    #[must_use]
    pub fn new(device: Box<dyn VirtioDevice>) -> Self {
        let queues = device.queue_max_sizes().len();
        let bytes = usize::try_from(MEMORY_BYTES).expect("small");
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), bytes)]).expect("memory");
        let memory = Memory::new(memory, Arc::new(()));
        let interrupt = Arc::new(EventFd::new(EFD_NONBLOCK).expect("an eventfd"));
        let device = MmioDevice::new("mock", device, memory.clone(), Arc::clone(&interrupt)).expect("a device");
        device.start_threads(&(Arc::new(|_| Ok(())) as ThreadStart)).expect("threads");
        Self { device, memory, interrupt, rings: vec![Ring::default(); queues], next_buffer: BUFFERS }
    }

    /// Pauses the device, and puts `device` in its place with its state, in the same guest memory. The driver does not notice; what it
    /// made available meanwhile waits for [`VirtioTransport::resume`].
    ///
    /// # Errors
    /// Returns the error of the restore; the driver still has the old device then, which is paused.
    pub fn replace(&mut self, device: Box<dyn VirtioDevice>) -> Result<(), VirtioStateError> {
        self.device.pause(Instant::now() + TIMEOUT).expect("paused");
        let state = self.device.save().expect("a state");
        self.replace_with(device, &state)
    }

    /// As [`Driver::replace`], with `state`.
    ///
    /// # Errors
    /// As [`Driver::replace`].
    pub fn replace_with(&mut self, device: Box<dyn VirtioDevice>, state: &VirtioState) -> Result<(), VirtioStateError> {
        let new = MmioDevice::new("mock", device, self.memory.clone(), Arc::clone(&self.interrupt)).expect("a device");
        new.restore(state)?;
        new.start_threads(&(Arc::new(|_| Ok(())) as ThreadStart)).expect("threads");
        self.device = new;
        Ok(())
    }

    /// As [`Driver::replace_with`], for a device whose threads may find that the host is another one.
    ///
    /// # Errors
    /// Returns the error of the restore, or that of a thread.
    pub fn try_replace_with(
        &mut self,
        device: Box<dyn VirtioDevice>,
        state: &VirtioState,
    ) -> Result<(), Box<dyn Error + Send + Sync>> {
        let new = MmioDevice::new("mock", device, self.memory.clone(), Arc::clone(&self.interrupt))?;
        new.restore(state)?;
        new.start_threads(&(Arc::new(|_| Ok(())) as ThreadStart))?;
        self.device = new;
        Ok(())
    }

    /// As [`Driver::new`], and starts the device with all its features.
    #[must_use]
    pub fn running(device: Box<dyn VirtioDevice>) -> Self {
        let mut driver = Self::new(device);
        driver.start(u64::MAX);
        driver
    }

    /// Reads a register. Checks that the register page has the same value, for registers that the device does not change by
    /// itself.
    #[must_use]
    pub fn read(&self, register: u64) -> u32 {
        let mut data = [0xff; 4];
        self.device.read(register, &mut data);
        let value = u32::from_le_bytes(data);
        if register < 0x100 && register.is_multiple_of(4) && ![0x60, 0x70, 0xfc].contains(&register) {
            assert_eq!(self.read_page(register), value, "register {register:#x} in the page");
        }
        value
    }

    /// Reads a register from the register page, as a guest does that has it mapped.
    #[must_use]
    pub fn read_page(&self, register: u64) -> u32 {
        let offset = usize::try_from(register).expect("small");
        u32::from_le(self.device.page().register(offset).load(std::sync::atomic::Ordering::Acquire))
    }

    /// Writes a 32-bit register of the MMIO transport at byte offset `register` (virtio 1.3 §4.2.2).
    pub fn write(&self, register: u64, value: u32) {
        self.device.write(register, &value.to_le_bytes());
    }

    /// Writes `data` at byte `offset` with one access.
    pub fn write_bytes(&self, offset: u64, data: &[u8]) {
        self.device.write(offset, data);
    }

    /// Reads `data` at byte `offset` with one access.
    pub fn read_bytes(&self, offset: u64, data: &mut [u8]) {
        self.device.read(offset, data);
    }

    /// Reads the device status.
    #[must_use]
    pub fn status(&self) -> u32 {
        self.read(0x70)
    }

    /// Reads the offered feature bits.
    #[must_use]
    pub fn device_features(&self) -> u64 {
        self.write(0x14, 0);
        let low = u64::from(self.read(0x10));
        self.write(0x14, 1);
        low | u64::from(self.read(0x10)) << 32
    }

    /// Resets the device, accepts the offered bits of `features`, and sets FEATURES_OK.
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

    /// Negotiates as [`Driver::negotiate`], enables all queues, and sets `DRIVER_OK`.
    pub fn start(&mut self, features: u64) {
        self.start_sized(features, 256);
    }

    /// As [`Driver::start`], with queues of up to `most` descriptors, at most 512.
    pub fn start_sized(&mut self, features: u64, most: u32) {
        self.negotiate(features);
        self.next_buffer = BUFFERS;
        let zeroes = vec![0; usize::try_from(RING_BYTES).expect("small")];
        for index in 0..self.rings.len() {
            let base = index as u64 * RING_BYTES;
            self.memory.write_slice(&zeroes, GuestAddress(base)).expect("memory");
            self.write(0x30, u32::try_from(index).expect("few"));
            let size = self.read(0x34).min(most);
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

    /// Allocates `bytes` bytes of guest memory for a buffer and returns their guest physical address. Old buffers are reused.
    pub fn buffer(&mut self, bytes: u64) -> u64 {
        if self.next_buffer + bytes > MEMORY_BYTES {
            self.next_buffer = BUFFERS;
        }
        let at = self.next_buffer;
        self.next_buffer = (at + bytes).next_multiple_of(512);
        at
    }

    /// Writes the descriptor with index `index` of a queue.
    pub fn put_descriptor(&self, queue: usize, index: u16, descriptor: Descriptor) {
        let at = queue as u64 * RING_BYTES + u64::from(index) * 16;
        self.memory.write_slice(&descriptor.to_bytes(), GuestAddress(at)).expect("memory");
    }

    /// Adds a chain to the available ring, without a kick.
    pub fn make_available(&mut self, queue: usize, head: u16) {
        let ring = &mut self.rings[queue];
        let base = queue as u64 * RING_BYTES + AVAILABLE;
        // The size is 0 where the driver has not enabled the queue.
        let slot = u64::from(ring.available % ring.size.max(1));
        self.memory.write_obj(head, GuestAddress(base + 4 + slot * 2)).expect("memory");
        ring.available = ring.available.wrapping_add(1);
        self.memory.write_obj(ring.available, GuestAddress(base + 2)).expect("memory");
    }

    /// Sets the index of the available ring to any value.
    pub fn set_available_index(&self, queue: usize, index: u16) {
        let at = queue as u64 * RING_BYTES + AVAILABLE + 2;
        self.memory.write_obj(index, GuestAddress(at)).expect("memory");
    }

    /// Kicks a queue: writes its index to `QueueNotify` (virtio 1.3 §4.2.2).
    pub fn kick(&self, queue: usize) {
        self.write(0x50, u32::try_from(queue).expect("few"));
    }

    /// Makes a chain with buffers for the contents `readable` and buffers of the lengths `writable` available, and kicks.
    pub fn submit(&mut self, queue: usize, readable: &[&[u8]], writable: &[u32]) -> Submitted {
        let mut descriptors: Vec<Descriptor> = Vec::new();
        for content in readable {
            let at = self.buffer(content.len() as u64);
            self.memory.write_slice(content, GuestAddress(at)).expect("memory");
            let len = u32::try_from(content.len()).expect("short");
            descriptors.push(Descriptor { gpa: at, len, flags: 0, next: 0 });
        }
        for len in writable {
            descriptors.push(Descriptor { gpa: self.buffer(u64::from(*len)), len: *len, flags: WRITE, next: 0 });
        }
        let size = self.rings[queue].size.max(1);
        let first = self.rings[queue].next_descriptor;
        let index = |offset: usize| (first + u16::try_from(offset).expect("few")) % size;
        for (offset, descriptor) in descriptors.iter().enumerate() {
            let more = if offset + 1 < descriptors.len() { NEXT } else { 0 };
            let descriptor = Descriptor { flags: descriptor.flags | more, next: index(offset + 1), ..*descriptor };
            self.put_descriptor(queue, index(offset), descriptor);
        }
        self.rings[queue].next_descriptor = index(descriptors.len());
        self.make_available(queue, first);
        self.kick(queue);
        let is_writable = |descriptor: &&Descriptor| descriptor.flags == WRITE;
        let buffer = |descriptor: &Descriptor| GuestBuffer { gpa: descriptor.gpa, len: descriptor.len };
        let writable = descriptors.iter().filter(is_writable).map(buffer).collect();
        Submitted { head: first, writable }
    }

    /// Returns the next entry of the used ring, or `None` where there is none.
    pub fn poll_used(&mut self, queue: usize) -> Option<Used> {
        let base = queue as u64 * RING_BYTES + USED;
        let index: u16 = self.memory.read_obj(GuestAddress(base + 2)).expect("memory");
        let ring = &mut self.rings[queue];
        if index == ring.used {
            return None;
        }
        let at = base + 4 + u64::from(ring.used % ring.size) * 8;
        ring.used = ring.used.wrapping_add(1);
        let head = self.memory.read_obj(GuestAddress(at)).expect("memory");
        Some(Used { head, len: self.memory.read_obj(GuestAddress(at + 4)).expect("memory") })
    }

    /// Returns the index of the used ring: the number of chains that the device has used.
    #[must_use]
    pub fn used_index(&self, queue: usize) -> u16 {
        self.memory.read_obj(GuestAddress(queue as u64 * RING_BYTES + USED + 2)).expect("memory")
    }

    /// Waits for the next entry of the used ring.
    pub fn wait_used(&mut self, queue: usize) -> Used {
        let start = Instant::now();
        loop {
            if let Some(used) = self.poll_used(queue) {
                return used;
            }
            assert!(start.elapsed() < TIMEOUT, "queue {queue}: nothing used; status {:#x}", self.status());
            std::thread::sleep(Duration::from_micros(200));
        }
    }

    /// Waits until the device sets `DEVICE_NEEDS_RESET`.
    pub fn wait_needs_reset(&self) {
        let start = Instant::now();
        while self.status() & NEEDS_RESET == 0 {
            assert!(start.elapsed() < TIMEOUT, "the device does not set DEVICE_NEEDS_RESET");
            std::thread::sleep(Duration::from_micros(200));
        }
    }

    /// Submits a chain as [`Driver::submit`], waits until it is used, and returns the bytes that the device wrote.
    pub fn request(&mut self, queue: usize, readable: &[&[u8]], writable: &[u32]) -> Vec<u8> {
        let submitted = self.submit(queue, readable, writable);
        let used = self.wait_used(queue);
        assert_eq!(used.head, u32::from(submitted.head));
        self.contents(&submitted, used.len)
    }

    /// Returns the first `len` bytes of a chain's device-writable buffers.
    #[must_use]
    pub fn contents(&self, submitted: &Submitted, len: u32) -> Vec<u8> {
        let mut all = Vec::new();
        for GuestBuffer { gpa, len } in &submitted.writable {
            let mut part = vec![0; *len as usize];
            self.memory.read_slice(&mut part, GuestAddress(*gpa)).expect("memory");
            all.extend(part);
        }
        all.truncate(len as usize);
        all
    }

    /// Returns how many interrupts the device sent since the last call.
    #[must_use]
    pub fn interrupts(&self) -> u64 {
        self.interrupt.read().unwrap_or(0)
    }

    /// Waits for an interrupt, which may come a moment after the buffers were used.
    pub fn wait_interrupt(&self) {
        let start = Instant::now();
        while self.interrupts() == 0 {
            assert!(start.elapsed() < TIMEOUT, "no interrupt");
            std::thread::sleep(Duration::from_micros(200));
        }
    }

    /// Sleeps until the device has sent an interrupt or `other` is signalled, and takes no notice of either; 100 ms at most.
    pub fn wait_interrupt_or(&self, other: &EventFd) {
        let events = PollContext::<u32>::new().expect("an epoll instance");
        events.add(&*self.interrupt, 0).and_then(|()| events.add(other, 1)).expect("added");
        events.wait_timeout(Duration::from_millis(100)).expect("waited");
    }

    /// Returns the number of queues.
    #[must_use]
    pub fn queues(&self) -> usize {
        self.rings.len()
    }

    /// Returns the device's transport.
    #[must_use]
    pub fn device(&self) -> &dyn VirtioTransport {
        &*self.device
    }
}
