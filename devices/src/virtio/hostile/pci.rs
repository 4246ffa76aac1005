//! A hostile driver on the PCI transport: configuration space, BAR, MSI-X table.

use super::super::device::VirtioDevice;
use super::super::device_thread::ThreadStart;
use super::super::mock::{Driver, MEMORY_BYTES};
use super::super::pci::{BAR_BYTES, PciDevice};
use super::super::saved::{BusState, DeviceState, VirtioState};
use super::super::transport::VirtioTransport;
use super::{DEVICES, Source, device, pause};
use crate::bus::BusDevice;
use crate::memory::Memory;
use crate::pci::{MsiMessage, MsiRouter, MsiVector, PciFunction, RouteError};
use std::error::Error;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

const BAR: u32 = 0xc000_0000;
// Offsets in the BAR (virtio 1.3 §4.1.4.3) and in the common configuration.
/// The command register of configuration space (PCI 3.0 6.2.2), and its bits for the BARs and for DMA.
const COMMAND: usize = 4;
const COMMAND_MEMORY_MASTER: [u8; 2] = [6, 0];
/// How long a reset may take.
const RESET: Duration = Duration::from_secs(10);
const STATUS: u64 = 0x14;
const FEATURES: u64 = 0x0c;
const FEATURES_SELECT: u64 = 0x08;
const QUEUE_SELECT: u64 = 0x16;
const QUEUE_SIZE: u64 = 0x18;
const QUEUE_VECTOR: u64 = 0x1a;
const QUEUE_ENABLE: u64 = 0x1c;
const QUEUE_ADDRESSES: u64 = 0x20;
const NOTIFY: u64 = 0x3000;
const MSIX_TABLE: u64 = 0x4000;

/// A router that accepts every message and routes nothing.
struct AnyRoute;

impl MsiRouter for AnyRoute {
    fn route(&self, _gsi: u32, _message: MsiMessage) -> Result<(), RouteError> {
        Ok(())
    }

    fn unroute(&self, _gsi: u32) -> Result<(), RouteError> {
        Ok(())
    }
}

struct Function {
    device: PciDevice,
    memory: Memory,
    queues: u8,
}

impl Function {
    fn new(device: Box<dyn VirtioDevice>) -> Result<Self, Box<dyn Error>> {
        let queues = u8::try_from(device.queue_max_sizes().len())?;
        let mut vectors = Vec::new();
        for gsi in 0..u32::try_from(PciDevice::vector_count(device.as_ref()))? {
            vectors.push(MsiVector { gsi: 24 + gsi, event: Arc::new(EventFd::new(EFD_NONBLOCK)?) });
        }
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), usize::try_from(MEMORY_BYTES)?)])?;
        let memory = Memory::new(memory, Arc::new(()));
        let device = PciDevice::new("hostile", device, memory.clone(), BAR, vectors, Arc::new(AnyRoute))?;
        device.start_threads(&(Arc::new(|_| Ok(())) as ThreadStart))?;
        Ok(Self { device, memory, queues })
    }

    fn write(&self, offset: u64, value: u32, bytes: usize) {
        self.device.write(offset, &value.to_le_bytes()[..bytes]);
    }

    fn status(&self) -> u8 {
        let mut status = [0];
        self.device.read(STATUS, &mut status);
        status[0]
    }

    /// Resets the device and starts it with VIRTIO_F_VERSION_1 alone, each queue in 64 KiB of its own. Its BAR must be reachable for
    /// that, and a reset may take a moment (virtio 1.3 4.1.4.3.2).
    fn start(&self) {
        self.device.write_config(COMMAND, &COMMAND_MEMORY_MASTER);
        self.write(STATUS, 0, 1);
        let deadline = Instant::now() + RESET;
        while self.status() != 0 && Instant::now() < deadline {
            std::thread::sleep(Duration::from_micros(100));
        }
        for status in [1, 3] {
            self.write(STATUS, status, 1);
        }
        for (select, features) in [(0, 0), (1, 1)] {
            self.write(FEATURES_SELECT, select, 4);
            self.write(FEATURES, features, 4);
        }
        self.write(STATUS, 11, 1);
        for queue in 0..u32::from(self.queues) {
            let base = queue << 16;
            self.write(QUEUE_SELECT, queue, 2);
            self.write(QUEUE_SIZE, 16, 2);
            self.write(QUEUE_VECTOR, queue, 2);
            for (offset, address) in (QUEUE_ADDRESSES..).step_by(8).zip([base, base + 0x1000, base + 0x2000]) {
                self.write(offset, address, 4);
                self.write(offset + 4, 0, 4);
            }
            // The rings of an earlier start have any content.
            let _ = self.memory.write_slice(&[0; 0x3000], GuestAddress(base.into()));
            self.write(QUEUE_ENABLE, 1, 2);
        }
        self.write(STATUS, 15, 1);
    }
}

/// Gives `state` to an entropy device and to a console, on both transports. What one takes it has then.
///
/// # Errors
/// Returns an error where a device cannot be made.
///
/// # Panics
/// Panics where a device does not have the state that it has taken, or the rings of a driver that runs are not in its memory.
pub fn restore(state: &VirtioState, folder: &Path) -> Result<(), Box<dyn Error>> {
    for kind in [0, 3] {
        let function = Function::new(device(kind, folder)?)?;
        let mut driver = Driver::new(device(kind, folder)?);
        if function.device.restore(state).is_err() && driver.replace_with(device(kind, folder)?, state).is_err() {
            continue;
        }
        let on_pci = matches!(state.bus, BusState::Pci { .. });
        let device: &dyn VirtioTransport = if on_pci { &function.device } else { driver.device() };
        let saved = device.save()?;
        assert_eq!((&saved.queues, saved.status, &saved.device), (&state.queues, state.status, &state.device));
        pause(device);
        driver.start(u64::MAX);
        function.start();
        assert_eq!((function.status(), driver.status()), (15, 15), "a reset and a start");
    }
    restore_connected(state, folder)
}

/// The devices that have something of the host: the socket device, ports, and a shared directory. A state that they take need not be
/// theirs in all: the host may have other files.
fn restore_connected(state: &VirtioState, folder: &Path) -> Result<(), Box<dyn Error>> {
    let [old, new] = &["old", "new"].map(|name| folder.join(name));
    [old, &new.join("shared/a/b")].into_iter().try_for_each(std::fs::create_dir_all)?;
    for kind in [5, 8, 9] {
        let mut driver = Driver::new(device(kind, old)?);
        if state.kind != driver.read(8).try_into().unwrap_or(0) {
            continue;
        }
        let new = device(kind, new)?;
        let mut state = state.clone();
        if let DeviceState::Share(share) = &mut state.device {
            // As if it were of this directory.
            let root = std::fs::metadata(folder.join("new/shared"))?;
            share.root.device = root.dev();
            share.root.inode = root.ino();
        }
        if driver.try_replace_with(new, &state).is_ok() {
            pause(driver.device());
        }
        driver.start(u64::MAX);
        assert_eq!(driver.status(), 15, "a reset and a start");
    }
    Ok(())
}

/// As [`drive`](super::drive), on the PCI transport.
///
/// # Errors
/// Returns an error where the device cannot be made.
///
/// # Panics
/// Panics where the device does not start again.
pub fn drive_pci(bytes: &[u8], folder: &Path) -> Result<(), Box<dyn Error>> {
    let mut source = Source(bytes);
    let function = Function::new(device(source.byte() % DEVICES, folder)?)?;
    function.start();
    while !source.0.is_empty() {
        step(&function, &mut source);
    }
    function.start();
    assert_eq!(function.status(), 15, "a reset and a start");
    Ok(())
}

fn step(function: &Function, source: &mut Source<'_>) {
    let mut data = [0; 8];
    match source.byte() % 9 {
        0 => {
            let (at, len) = (usize::from(source.short() % 4200), usize::from(source.byte() % 9));
            function.device.read_config(at, &mut data[..len]);
            data.iter_mut().for_each(|byte| *byte = source.byte());
            function.device.write_config(at, &data[..len]);
        }
        1 => {
            let (at, len) = (u64::from(source.word() % (BAR_BYTES + 16)), usize::from(source.byte() % 9));
            function.device.read(at, &mut data[..len]);
            data.iter_mut().for_each(|byte| *byte = source.byte());
            function.device.write(at, &data[..len]);
        }
        2 => function.write(u64::from(source.byte() % 0x40), source.word(), usize::from(source.byte() % 5)),
        3 => {
            let (entry, field) = (u64::from(source.byte() % 12), u64::from(source.byte() % 4));
            function.write(MSIX_TABLE + entry * 16 + field * 4, source.word(), 4);
        }
        4 => {
            function.write(QUEUE_SELECT, (source.byte() % (function.queues + 1)).into(), 2);
            function.write(QUEUE_SIZE, source.short().into(), 2);
            function.write(QUEUE_VECTOR, source.short().into(), 2);
            for offset in (QUEUE_ADDRESSES..).step_by(8).take(3) {
                let gpa = source.gpa().to_le_bytes();
                function.device.write(offset, &gpa);
            }
            function.write(QUEUE_ENABLE, (source.byte() % 3).into(), 2);
        }
        5 => function.write(STATUS, source.byte().into(), 1),
        6 => function.start(),
        7 => {
            let gpa = source.gpa().min(MEMORY_BYTES - 8);
            data.iter_mut().for_each(|byte| *byte = source.byte());
            let _ = function.memory.write_slice(&data, GuestAddress(gpa));
        }
        _ => match source.byte() {
            0xe0.. => pause(&function.device),
            queue => function.write(NOTIFY + u64::from(queue % 32) * 4, source.word(), usize::from(source.byte() % 5)),
        },
    }
}
