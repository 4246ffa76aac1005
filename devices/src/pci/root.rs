//! The root of the bus: configuration accesses by memory (ECAM, PCI Express Base 4.0 §7.2.2) and by the ports 0xcf8 and
//! 0xcfc (PCI Local Bus 3.0 §3.2.2.3.2).

use super::config::{ConfigSpace, Identity};
use crate::bus::{Action, BusDevice};
use crate::page::RegisterPage;
use std::io;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use thiserror::Error;

/// Bytes of ECAM that one bus takes.
pub const ECAM_BUS_BYTES: u64 = 1 << 20;
/// Device numbers of a bus.
const SLOTS: usize = 32;
/// Class of a host bridge.
const HOST_BRIDGE: u16 = 0x0600;

/// A function's side of configuration accesses.
pub trait PciFunction: Send + Sync {
    /// Fills `data` from the configuration space at `offset`.
    fn read_config(&self, offset: usize, data: &mut [u8]);
    /// Takes a write to it.
    fn write_config(&self, offset: usize, data: &[u8]);
    /// Where a capability starts whose last four bytes of twenty are a window to registers elsewhere, if there is one.
    fn window(&self) -> Option<usize> {
        None
    }
}

/// More devices than a bus has numbers.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("a PCI bus takes at most {} devices", SLOTS - 1)]
pub struct RootError;

/// The bus. Slot 0 is the host bridge.
pub struct Root {
    functions: Vec<Arc<dyn PciFunction>>,
    /// What the guest reads by itself, by slot, once that is asked for.
    pages: OnceLock<Vec<RegisterPage>>,
    /// One write at a time, so that none is shown behind a later one.
    showing: Mutex<()>,
}

/// Bytes of a window's capability, and of the data at its end.
const WINDOW: (usize, usize) = (20, 4);

struct HostBridge(Mutex<ConfigSpace>);

impl PciFunction for HostBridge {
    fn read_config(&self, offset: usize, data: &mut [u8]) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).read(offset, data);
    }

    fn write_config(&self, offset: usize, data: &[u8]) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).write(offset, data);
    }
}

impl Default for Root {
    fn default() -> Self {
        // Red Hat's generic PCIe host bridge, which every driver leaves alone.
        let identity =
            Identity { vendor: 0x1b36, device: 0x0008, revision: 0, class: HOST_BRIDGE, subsystem: (0x1af4, 0x1100) };
        let bridge: Arc<dyn PciFunction> = Arc::new(HostBridge(Mutex::new(ConfigSpace::new(identity, None))));
        Self { functions: vec![bridge], pages: OnceLock::new(), showing: Mutex::default() }
    }
}

impl Root {
    /// Puts a function in the next free slot.
    ///
    /// # Errors
    /// [`RootError`] where the bus is full.
    pub fn add(&mut self, function: Arc<dyn PciFunction>) -> Result<(), RootError> {
        if self.functions.len() >= SLOTS {
            return Err(RootError);
        }
        self.functions.push(function);
        Ok(())
    }

    /// The slot of bus 0; other functions than 0 do not exist.
    fn at(&self, slot: u32, function: u32) -> Option<&Arc<dyn PciFunction>> {
        usize::try_from(slot).ok().filter(|_| function == 0).and_then(|slot| self.functions.get(slot))
    }

    /// Nobody there: all ones.
    fn read(&self, slot: u32, function: u32, register: usize, data: &mut [u8]) {
        match self.at(slot, function) {
            Some(found) => found.read_config(register, data),
            None => data.fill(0xff),
        }
    }

    fn write(&self, slot: u32, function: u32, register: usize, data: &[u8]) {
        if let Some(found) = self.at(slot, function) {
            let _guard = self.showing.lock().unwrap_or_else(PoisonError::into_inner);
            found.write_config(register, data);
            if let Some(page) = self.pages.get().and_then(|pages| pages.get(usize::try_from(slot).ok()?)) {
                show(found.as_ref(), page, register, data.len());
            }
        }
    }

    /// The configuration spaces as the guest may read them by itself: of function 0 of each slot, in order, at
    /// [`Root::PAGE_STRIDE`] bytes of each other; those of empty slots are all ones. Functions must have been added before.
    ///
    /// # Errors
    /// Where a page cannot be mapped.
    pub fn pages(&self) -> io::Result<&[RegisterPage]> {
        let nobody = RegisterPage::ones()?;
        let mut pages = Vec::with_capacity(SLOTS);
        for slot in 0..SLOTS {
            match self.functions.get(slot) {
                Some(function) => {
                    let page = RegisterPage::new()?;
                    show(function.as_ref(), &page, 0, RegisterPage::BYTES);
                    pages.push(page);
                }
                None => pages.push(nobody.clone()),
            }
        }
        Ok(self.pages.get_or_init(|| pages))
    }

    /// Bytes of ECAM between two slots.
    pub const PAGE_STRIDE: u64 = 1 << 15;
}

/// Shows what the registers at `offset` read as after a write of `bytes` bytes to them; what a window shows too, where the
/// write was to it. (A window to a register that changes by itself shows it as it was then.)
fn show(function: &dyn PciFunction, page: &RegisterPage, offset: usize, bytes: usize) {
    let copy = |from: usize, count: usize| {
        let mut data = [0; RegisterPage::BYTES];
        function.read_config(from, &mut data[..count]);
        page.show(from, &data[..count]);
    };
    let (first, last) = (offset & !3, (offset + bytes).next_multiple_of(4).min(RegisterPage::BYTES));
    copy(first, last.saturating_sub(first));
    if let Some(window) = function.window()
        && offset < window + WINDOW.0
        && offset + bytes > window
    {
        copy(window + WINDOW.0 - WINDOW.1, WINDOW.1);
    }
}

/// The bus by memory: device in bits 15 to 19, function in 12 to 14, register in 0 to 11.
pub struct Ecam(pub Arc<Root>);

impl Ecam {
    fn split(offset: u64) -> (u32, u32, usize) {
        let field = |shift: u32, mask: u64| u32::try_from(offset >> shift & mask).unwrap_or(0);
        (field(15, 0x1f), field(12, 7), usize::try_from(offset & 0xfff).unwrap_or(0))
    }
}

impl BusDevice for Ecam {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let (slot, function, register) = Self::split(offset);
        self.0.read(slot, function, register, data);
    }

    fn write(&self, offset: u64, data: &[u8]) -> Action {
        let (slot, function, register) = Self::split(offset);
        self.0.write(slot, function, register, data);
        Action::None
    }
}

/// The bus by ports, for guests without ECAM: 0xcf8 takes the address, 0xcfc to 0xcff are the data. Offsets from 0xcf8.
pub struct ConfigPorts {
    root: Arc<Root>,
    address: AtomicU32,
}

impl ConfigPorts {
    /// The first port and how many there are.
    pub const PORTS: (u16, u64) = (0xcf8, 8);

    /// Ports for `root`.
    #[must_use]
    pub fn new(root: Arc<Root>) -> Self {
        Self { root, address: AtomicU32::new(0) }
    }

    /// Slot, function and register, where the address names bus 0 and is enabled.
    fn target(&self, offset: u64) -> Option<(u32, u32, usize)> {
        let address = self.address.load(Ordering::Acquire);
        let low = usize::try_from(offset.checked_sub(4)?).ok()?;
        if address & 0x8000_0000 == 0 || address >> 16 & 0xff != 0 {
            return None;
        }
        let register = usize::try_from(address & 0xfc).ok()?;
        Some((address >> 11 & 0x1f, address >> 8 & 7, register + low))
    }
}

impl BusDevice for ConfigPorts {
    fn read(&self, offset: u64, data: &mut [u8]) {
        if offset == 0 && data.len() == 4 {
            data.copy_from_slice(&self.address.load(Ordering::Acquire).to_le_bytes());
        } else if let Some((slot, function, register)) = self.target(offset) {
            self.root.read(slot, function, register, data);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) -> Action {
        if let (0, Ok(address)) = (offset, <[u8; 4]>::try_from(data)) {
            self.address.store(u32::from_le_bytes(address), Ordering::Release);
        } else if let Some((slot, function, register)) = self.target(offset) {
            self.root.write(slot, function, register, data);
        }
        Action::None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn by_ports(ports: &ConfigPorts, address: u32) -> u32 {
        ports.write(0, &address.to_le_bytes());
        let mut data = [0xff; 4];
        ports.read(4, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn both_ways_lead_to_the_same_registers() {
        let root = Arc::new(Root::default());
        let ports = ConfigPorts::new(Arc::clone(&root));
        assert_eq!(by_ports(&ports, 0x8000_0000), 0x0008_1b36);
        assert_eq!(by_ports(&ports, 0x8000_0800), u32::MAX, "slot 1 is empty");
        assert_eq!(by_ports(&ports, 0x8000_0100), u32::MAX, "function 1");
        assert_eq!(by_ports(&ports, 0x8001_0000), u32::MAX, "bus 1");
        assert_eq!(by_ports(&ports, 0x0000_0000), u32::MAX, "not enabled");
        let ecam = Ecam(root);
        let mut data = [0; 2];
        ecam.read(0xa, &mut data);
        assert_eq!(u16::from_le_bytes(data), HOST_BRIDGE);
        ecam.read(1 << 15, &mut data);
        assert_eq!(data, [0xff; 2]);
    }

    #[test]
    fn pages_show_what_reads_give_also_after_writes() {
        let root = Arc::new(Root::default());
        let pages = root.pages().expect("pages").to_vec();
        assert_eq!(pages.len(), SLOTS);
        let shown = |slot: usize, register: usize| u32::from_le(pages[slot].word(register).load(Ordering::Relaxed));
        let ecam = Ecam(Arc::clone(&root));
        let read = |register: u64| {
            let mut data = [0; 4];
            ecam.read(register, &mut data);
            u32::from_le_bytes(data)
        };
        assert_eq!(shown(0, 0), 0x0008_1b36);
        assert_eq!(shown(31, 0), u32::MAX, "nobody");
        ecam.write(5, &[4]);
        assert_eq!(shown(0, 4), read(4));
        assert_ne!(read(4) & 0x400, 0, "INTx is off, and it is to be read");
        for register in (0..0x1000).step_by(4) {
            assert_eq!(shown(0, register), read(register as u64), "{register:#x}");
        }
    }

    #[test]
    fn a_bus_gets_full() {
        let mut root = Root::default();
        let bridge = || Arc::clone(&Root::default().functions[0]);
        assert!((1..SLOTS).all(|_| root.add(bridge()).is_ok()));
        assert_eq!(root.add(bridge()), Err(RootError));
    }
}
