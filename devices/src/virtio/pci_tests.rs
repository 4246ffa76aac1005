//! The PCI transport as a driver sees it: capabilities, the BAR, MSI-X messages.

use super::{BAR_BYTES, COMMON, COMMON_BYTES, DEVICE_CONFIG, ISR, MSIX_TABLE, NOTIFY, PciDevice};
use crate::bus::BusDevice;
use crate::memory::Memory;
use crate::pci::{MsiMessage, MsiRouter, MsiVector, PciFunction, RouteError};
use crate::virtio::device::VirtioDevice;
use crate::virtio::late_tests::{Handle, Late};
use crate::virtio::rng::Rng;
use crate::virtio::{ThreadStart, VirtioTransport};
use proptest::prelude::*;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

const BAR: u32 = 0xc000_0000;

#[derive(Default)]
struct Routes(Mutex<Vec<(u32, MsiMessage)>>);
impl MsiRouter for Routes {
    fn route(&self, gsi: u32, message: MsiMessage) -> Result<(), RouteError> {
        self.0.lock().expect("not poisoned").push((gsi, message));
        Ok(())
    }
    fn unroute(&self, _gsi: u32) -> Result<(), RouteError> {
        Ok(())
    }
}

struct Function {
    device: Arc<PciDevice>,
    routes: Arc<Routes>,
    events: Vec<Arc<EventFd>>,
    memory: Memory,
}

fn function() -> Function {
    function_of(Box::new(Rng::new(None).expect("a device")))
}

/// Returns a device with one queue.
fn function_of(device: Box<dyn VirtioDevice>) -> Function {
    let events: Vec<_> = (0..2).map(|_| Arc::new(EventFd::new(EFD_NONBLOCK).expect("an eventfd"))).collect();
    let vectors = (24..).zip(&events).map(|(gsi, event)| MsiVector { gsi, event: Arc::clone(event) }).collect();
    assert_eq!(PciDevice::vector_count(device.as_ref()), 2);
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).expect("memory");
    let memory = Memory::new(memory, Arc::new(()));
    let routes = Arc::new(Routes::default());
    let router: Arc<dyn MsiRouter> = Arc::clone(&routes) as Arc<dyn MsiRouter>;
    let device = PciDevice::new("rng", device, memory.clone(), BAR, vectors, router).expect("a device");
    device.start_threads(&(Arc::new(|_| Ok(())) as ThreadStart)).expect("threads");
    assert_eq!(device.pages().map(|(offset, _)| offset), [COMMON, MSIX_TABLE]);
    let function = Function { device, routes, events, memory };
    assert_eq!(function.config(4), 0x0010_0400, "memory space and INTx are off, and there are capabilities");
    function.device.write_config(4, &[6, 4]);
    function
}

impl Function {
    fn config(&self, at: usize) -> u32 {
        let mut data = [0; 4];
        self.device.read_config(at, &mut data);
        u32::from_le_bytes(data)
    }

    fn read(&self, at: u32, bytes: usize) -> u32 {
        let mut data = [0; 4];
        self.device.read(u64::from(at), &mut data[..bytes]);
        u32::from_le_bytes(data)
    }

    fn write(&self, at: u32, value: u32, bytes: usize) {
        self.device.write(u64::from(at), &value.to_le_bytes()[..bytes]);
    }

    /// Returns what a guest reads that reads the BAR's pages directly.
    fn shown(&self, at: u32, bytes: usize) -> u32 {
        let (start, page) = self.device.pages()[usize::from(at >= MSIX_TABLE)];
        let at = at - start;
        let word = u32::from_le(page.register((at & !3) as usize).load(Ordering::Relaxed));
        let value = word >> (at % 4 * 8);
        if bytes == 4 { value } else { value & ((1 << (bytes * 8)) - 1) }
    }

    /// Checks that the pages show what reads return.
    fn check_pages(&self) {
        let fields = (0..0x10).step_by(4).map(|at| (at, 4)).chain((0x20..COMMON_BYTES).step_by(4).map(|at| (at, 4)));
        let fields = fields.chain([(0x10, 2), (0x12, 2), (0x14, 1), (0x15, 1)]);
        let fields = fields.chain((0x16..0x20).step_by(2).map(|at| (at, 2)));
        let config = (DEVICE_CONFIG..DEVICE_CONFIG + 64).step_by(4).map(|at| (at, 4));
        let table = (MSIX_TABLE..MSIX_TABLE + 48).step_by(4).map(|at| (at, 4));
        for (at, bytes) in fields.chain(config).chain(table) {
            assert_eq!(self.shown(at, bytes), self.read(at, bytes), "{bytes} bytes at {at:#x}");
        }
    }

    /// Returns the offset of the virtio capability with the `cfg_type` `wanted`.
    fn capability(&self, wanted: u32) -> usize {
        let mut at = (self.config(0x34) & 0xff) as usize;
        while at != 0 {
            let header = self.config(at);
            if header & 0xff == 9 && header >> 24 == wanted {
                return at;
            }
            at = (header >> 8 & 0xff) as usize;
        }
        panic!("no capability {wanted}");
    }

    /// Starts the device, with MSI-X vector 0 for configuration changes and vector 1 for the queue.
    fn start(&self) {
        // Enable MSI-X.
        let msix = (self.config(0x34) & 0xff) as usize;
        self.device.write_config(msix + 2, &0x8000_u16.to_le_bytes());
        for entry in 0..2 {
            self.write(MSIX_TABLE + entry * 16, 0xfee0_0000, 4);
            self.write(MSIX_TABLE + entry * 16 + 8, 0x40 + entry, 4);
            self.write(MSIX_TABLE + entry * 16 + 12, 0, 4);
        }
        for status in [0, 1, 3] {
            self.write(COMMON + 0x14, status, 1);
        }
        self.write(COMMON + 0x08, 1, 4);
        self.write(COMMON + 0x0c, 1, 4);
        self.write(COMMON + 0x14, 11, 1);
        self.write(COMMON + 0x10, 0, 2);
        self.write(COMMON + 0x16, 0, 2);
        self.write(COMMON + 0x18, 8, 2);
        self.write(COMMON + 0x1a, 1, 2);
        self.write(COMMON + 0x20, 0x1000, 4);
        self.write(COMMON + 0x28, 0x2000, 4);
        self.write(COMMON + 0x30, 0x3000, 4);
        self.write(COMMON + 0x1c, 1, 2);
        self.write(COMMON + 0x14, 15, 1);
    }
}

#[test]
fn the_function_has_its_ids_and_capabilities() {
    let function = function();
    assert_eq!(function.config(0), 0x1044_1af4);
    assert_eq!(function.config(0x10), BAR);
    assert_eq!([1, 2, 3, 4, 5].map(|kind| function.capability(kind) > 0), [true; 5]);
    // The offsets in the capabilities.
    let offset = |kind| function.config(function.capability(kind) + 8);
    assert_eq!((offset(1), offset(2), offset(4)), (COMMON, NOTIFY, DEVICE_CONFIG));
    assert_eq!(function.device.doorbells(BAR)[0].gpa, u64::from(BAR + NOTIFY));
}

#[test]
fn a_request_ends_with_its_msix_message() {
    let function = function();
    function.start();
    assert_eq!(function.read(COMMON + 0x14, 1), 15);
    let mut descriptor = 0x8000_u64.to_le_bytes().to_vec();
    descriptor.extend([100, 0, 0, 0, 2, 0, 0, 0]);
    function.memory.write_slice(&descriptor, GuestAddress(0x1000)).expect("memory");
    function.memory.write_slice(&[0, 0, 1, 0, 0, 0], GuestAddress(0x2000)).expect("memory");
    function.write(NOTIFY, 0, 2);
    let start = Instant::now();
    while function.events[1].read().is_err() {
        assert!(start.elapsed() < Duration::from_secs(10), "no message");
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(function.memory.read_obj::<u32>(GuestAddress(0x3008)).expect("memory"), 100);
    let message = |data| MsiMessage { address: 0xfee0_0000, data };
    assert_eq!(*function.routes.0.lock().expect("not poisoned"), [(24, message(0x40)), (25, message(0x41))]);
    assert!(function.events[0].read().is_err());
    // Vectors that do not exist read back as VIRTIO_MSI_NO_VECTOR.
    function.write(COMMON + 0x1a, 2, 2);
    assert_eq!(function.read(COMMON + 0x1a, 2), 0xffff);
}

#[test]
fn a_reset_that_ends_late_leaves_no_isr_status() {
    let handle = Handle::default();
    let function = function_of(Box::new(Late(handle.clone())));
    function.start();
    function.write(COMMON + 0x14, 0, 1);
    assert_eq!(function.read(COMMON + 0x14, 1), 15, "the reset has not ended");
    handle.interrupt().signal_config_changed();
    handle.interrupt().signal_used_queue(0);
    assert_eq!(function.shown(COMMON + 0x14, 2), 0x20f, "the generation is shown");
    handle.end.open();
    let start = Instant::now();
    while function.shown(COMMON + 0x14, 1) != 0 {
        assert!(start.elapsed() < Duration::from_secs(10), "the end of the reset is not shown");
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(function.read(ISR, 1), 0);
}

#[test]
fn the_configuration_access_capability_accesses_the_bar() {
    let function = function();
    let capability = function.capability(5);
    let set_target = |offset: u32, length: u32| {
        function.device.write_config(capability + 8, &offset.to_le_bytes());
        function.device.write_config(capability + 12, &length.to_le_bytes());
    };
    set_target(COMMON + 0x12, 2);
    assert_eq!(function.config(capability + 16) & 0xffff, 1, "one queue");
    set_target(COMMON + 0x14, 1);
    function.device.write_config(capability + 16, &[1]);
    assert_eq!(function.read(COMMON + 0x14, 1), 1);
    // Targets beyond the BAR, of an invalid width or not aligned: no access.
    for (offset, length) in [(BAR_BYTES, 4), (u32::MAX, 1), (0, 3), (1, 4), (0, 0), (0, 8)] {
        set_target(offset, length);
        function.device.write_config(capability + 16, &[0; 4]);
        let _ = function.config(capability + 16);
    }
    assert_eq!(function.read(COMMON + 0x14, 1), 1);
}

#[test]
fn with_memory_space_disabled_the_bar_does_not_respond() {
    let function = function();
    function.device.write_config(4, &[0, 0]);
    let mut data = [0xff; 4];
    function.device.read(0, &mut data);
    assert_eq!(data, [0xff; 4], "all ones, as for an unmapped address");
    function.write(COMMON + 0x14, 1, 1);
    function.device.write_config(4, &[6, 0]);
    assert_eq!(function.read(COMMON + 0x14, 1), 0);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn any_access_is_survived(accesses in proptest::collection::vec((0_u32..0x9000, any::<u32>(), 0_usize..5, any::<bool>()), 0..80)) {
        let function = function();
        for (at, value, bytes, config) in accesses {
            if config {
                function.device.write_config(at as usize % 300, &value.to_le_bytes()[..bytes.min(4)]);
                function.device.read_config(at as usize % 300, &mut vec![0; bytes]);
            } else {
                function.device.write(u64::from(at), &value.to_le_bytes()[..bytes.min(4)]);
                function.device.read(u64::from(at), &mut vec![0; bytes * 2]);
            }
        }
        function.device.write_config(4, &[6, 0]);
        function.check_pages();
        function.start();
        prop_assert_eq!(function.read(COMMON + 0x14, 1), 15);
        function.check_pages();
    }
}

/// Another device with the state of the first sends the same messages, and shows the same registers.
#[test]
fn a_new_device_has_the_registers_and_messages_of_the_old_one() {
    let (old, mut new) = (function(), function());
    old.start();
    // The vector of the queue is masked, and its message pending.
    old.write(MSIX_TABLE + 16 + 12, 1, 4);
    old.device.write_config(0x3c, &[9]);
    old.memory.write_obj(0x1_0000_u64, GuestAddress(0x1000)).expect("memory");
    old.memory.write_obj(16_u32, GuestAddress(0x1008)).expect("memory");
    old.memory.write_obj(2_u16, GuestAddress(0x100c)).expect("memory");
    old.memory.write_obj(1_u16, GuestAddress(0x2002)).expect("memory");
    old.write(NOTIFY, 0, 2);
    old.device.pause(Instant::now() + Duration::from_secs(20)).expect("paused");
    let used: u16 = old.memory.read_obj(GuestAddress(0x3002)).expect("memory");
    assert_eq!(used, 1, "what was available is used before");
    let saved = old.device.save().expect("a state");
    new.memory = old.memory.clone();
    let device = Box::new(Rng::new(None).expect("a device"));
    let vectors = (24..).zip(&new.events).map(|(gsi, event)| MsiVector { gsi, event: Arc::clone(event) }).collect();
    let router: Arc<dyn MsiRouter> = Arc::clone(&new.routes) as Arc<dyn MsiRouter>;
    new.device = PciDevice::new("rng", device, new.memory.clone(), BAR, vectors, router).expect("a device");
    new.device.restore(&saved).expect("of the same device");
    assert_eq!(new.device.save().expect("a state"), saved);
    let registers = |function: &Function| -> Vec<u32> {
        let config = (0..64).map(|word| function.config(word * 4));
        let common = (0..16).map(|word| function.read(COMMON + word * 4, 4));
        config.chain(common).chain((0..8).map(|word| function.read(MSIX_TABLE + word * 4, 4))).collect()
    };
    assert_eq!(registers(&new), registers(&old));
    new.check_pages();
    new.device.start_threads(&(Arc::new(|_| Ok(())) as ThreadStart)).expect("threads");
    assert!(new.device.resume());
    assert_eq!(new.events[1].read().unwrap_or(0), 0, "it is masked");
    new.write(MSIX_TABLE + 16 + 12, 0, 4);
    assert_eq!(new.events[1].read().unwrap_or(0), 1, "the pending message is sent");
    assert!(
        new.routes.0.lock().expect("not poisoned").contains(&(25, MsiMessage { address: 0xfee0_0000, data: 0x41 }))
    );
    // The next request.
    new.memory.write_obj(2_u16, GuestAddress(0x2002)).expect("memory");
    new.write(NOTIFY, 0, 2);
    let start = Instant::now();
    while new.events[1].read().is_err() {
        assert!(start.elapsed() < Duration::from_secs(20), "no message");
        std::thread::yield_now();
    }
    let used: u16 = new.memory.read_obj(GuestAddress(0x3002)).expect("memory");
    assert_eq!(used, 2);
    // One that does not fit.
    let mut other = saved.clone();
    other.bus = crate::virtio::BusState::Mmio { interrupt_status: 0 };
    assert!(function().device.restore(&other).is_err());
    let mut other = saved;
    if let crate::virtio::BusState::Pci { queue_vectors, .. } = &mut other.bus {
        queue_vectors.push(0);
    }
    assert!(function().device.restore(&other).is_err());
}
