//! The PCI root: configuration accesses through memory (ECAM, PCI Express Base 4.0 §7.2.2) and through the ports 0xcf8 and
//! 0xcfc (PCI Local Bus 3.0 §3.2.2.3.2).

use super::config::{ConfigSpace, ConfigSpaceState, Identity};
use crate::bus::{Action, BusDevice};
use crate::page::{PageError, RegisterPage};
use serde::{Deserialize, Serialize};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use thiserror::Error;

/// Size in bytes of the ECAM region of one bus.
pub const ECAM_BUS_BYTES: u64 = 1 << 20;
/// Size in bytes of the virtio PCI configuration access capability (virtio 1.3 §4.1.4.9).
pub const PCI_CFG_CAPABILITY_BYTES: usize = 20;
/// Size in bytes of `pci_cfg_data`, at the end of that capability.
pub const PCI_CFG_DATA_BYTES: usize = 4;
/// Number of device numbers of a bus.
const SLOTS: usize = 32;
/// Class code of a host bridge.
const HOST_BRIDGE: u16 = 0x0600;

/// A PCI function as the root sees it.
pub trait PciFunction: Send + Sync {
    /// Copies the configuration space from byte `offset` on to `data`.
    fn read_config(&self, offset: usize, data: &mut [u8]);
    /// Handles a write to the configuration space at byte `offset`.
    fn write_config(&self, offset: usize, data: &[u8]);
    /// Returns the offset of the virtio PCI configuration access capability, where the function has one.
    fn pci_cfg_capability(&self) -> Option<usize> {
        None
    }
}

/// The bus has no device number left.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("a PCI bus has room for {} devices at most", SLOTS - 1)]
pub struct PciRootError;

/// Bus 0, whose device 0 is the host bridge or missing.
pub struct PciRoot {
    bridge: Arc<HostBridge>,
    functions: Vec<Option<Arc<dyn PciFunction>>>,
    /// The configuration spaces as pages, by device number; set by [`PciRoot::pages`].
    pages: OnceLock<Vec<RegisterPage>>,
    /// Serializes configuration writes, so that the pages are updated in the order of the writes.
    write_order: Mutex<()>,
}

/// The registers that a configuration access names.
#[derive(Clone, Copy)]
struct ConfigAddress {
    device: u32,
    function: u32,
    /// Byte offset in the configuration space.
    register: usize,
}

struct HostBridge(Mutex<ConfigSpace>);

impl HostBridge {
    fn config(&self) -> MutexGuard<'_, ConfigSpace> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl PciFunction for HostBridge {
    fn read_config(&self, offset: usize, data: &mut [u8]) {
        self.config().read(offset, data);
    }

    fn write_config(&self, offset: usize, data: &[u8]) {
        self.config().write(offset, data);
    }
}

impl Default for PciRoot {
    /// A bus with a host bridge.
    fn default() -> Self {
        // Red Hat's generic PCIe host bridge (QEMU: pcie-host), which no driver binds to.
        let identity = Identity {
            vendor: 0x1b36,
            device: 0x0008,
            revision: 0,
            class: HOST_BRIDGE,
            subsystem_vendor: 0x1af4,
            subsystem_device: 0x1100,
        };
        let bridge = Arc::new(HostBridge(Mutex::new(ConfigSpace::new(identity, None))));
        let functions = vec![Some(Arc::clone(&bridge) as Arc<dyn PciFunction>)];
        Self { bridge, functions, pages: OnceLock::new(), write_order: Mutex::default() }
    }
}

impl PciRoot {
    /// A bus whose host bridge is no function: the ACPI tables say where the bus is, and no driver binds to a bridge. A guest writes
    /// fourteen registers of each function to look for BARs.
    #[must_use]
    pub fn without_bridge() -> Self {
        Self { functions: vec![None], ..Self::default() }
    }

    /// Adds a function at the next device number.
    ///
    /// # Errors
    /// Returns [`PciRootError`] where all device numbers are taken.
    pub fn add(&mut self, function: Arc<dyn PciFunction>) -> Result<(), PciRootError> {
        if self.functions.len() >= SLOTS {
            return Err(PciRootError);
        }
        self.functions.push(Some(function));
        Ok(())
    }

    /// Returns the function at `address`; every device has function 0 only.
    fn function(&self, address: ConfigAddress) -> Option<&Arc<dyn PciFunction>> {
        usize::try_from(address.device)
            .ok()
            .filter(|_| address.function == 0)
            .and_then(|device| self.functions.get(device))
            .and_then(Option::as_ref)
    }

    /// Reads registers; all ones where there is no function.
    fn read(&self, address: ConfigAddress, data: &mut [u8]) {
        match self.function(address) {
            Some(function) => function.read_config(address.register, data),
            None => data.fill(0xff),
        }
    }

    fn write(&self, address: ConfigAddress, data: &[u8]) {
        if let Some(function) = self.function(address) {
            let _guard = self.write_order.lock().unwrap_or_else(PoisonError::into_inner);
            function.write_config(address.register, data);
            if let Some(page) = self.pages.get().and_then(|pages| pages.get(usize::try_from(address.device).ok()?)) {
                update_page(function.as_ref(), page, address.register, data.len());
            }
        }
    }

    /// Returns pages with the configuration spaces of function 0 of all devices, by device number, for mapping at
    /// [`PciRoot::PAGE_STRIDE`] bytes of each other. Pages of missing devices are all ones. All functions must have been
    /// added before.
    ///
    /// # Errors
    /// Returns [`PageError`] where a page cannot be mapped.
    pub fn pages(&self) -> Result<&[RegisterPage], PageError> {
        let missing = RegisterPage::all_ones()?;
        let mut pages = Vec::with_capacity(SLOTS);
        for slot in 0..SLOTS {
            match self.functions.get(slot) {
                Some(Some(function)) => {
                    let page = RegisterPage::new()?;
                    update_page(function.as_ref(), &page, 0, RegisterPage::BYTES);
                    pages.push(page);
                }
                Some(None) | None => pages.push(missing.clone()),
            }
        }
        Ok(self.pages.get_or_init(|| pages))
    }

    /// Returns the state of the host bridge's configuration space.
    #[must_use]
    pub fn save_bridge(&self) -> ConfigSpaceState {
        self.bridge.config().save()
    }

    /// Sets the state of the host bridge. To be called once the functions have their states: the pages show them all then. Returns
    /// false where it is none of a configuration space.
    #[must_use]
    pub fn restore_bridge(&self, state: &ConfigSpaceState) -> bool {
        let fits = self.bridge.config().restore(state);
        let _guard = self.write_order.lock().unwrap_or_else(PoisonError::into_inner);
        for (function, page) in self.functions.iter().zip(self.pages.get().into_iter().flatten()) {
            if let Some(function) = function {
                update_page(function.as_ref(), page, 0, RegisterPage::BYTES);
            }
        }
        fits
    }

    /// Bytes of ECAM between two devices.
    pub const PAGE_STRIDE: u64 = 1 << 15;
}

/// Updates `page` after a write of `bytes` bytes at `offset`: the written registers, and `pci_cfg_data` where the write was to
/// the configuration access capability. (The page then has the value that the BAR's register had at the time of the write.)
fn update_page(function: &dyn PciFunction, page: &RegisterPage, offset: usize, bytes: usize) {
    let copy = |from: usize, count: usize| {
        let mut data = [0; RegisterPage::BYTES];
        function.read_config(from, &mut data[..count]);
        page.write(from, &data[..count]);
    };
    let (first, last) = (offset & !3, (offset + bytes).next_multiple_of(4).min(RegisterPage::BYTES));
    copy(first, last.saturating_sub(first));
    if let Some(capability) = function.pci_cfg_capability()
        && offset < capability + PCI_CFG_CAPABILITY_BYTES
        && offset + bytes > capability
    {
        copy(capability + PCI_CFG_CAPABILITY_BYTES - PCI_CFG_DATA_BYTES, PCI_CFG_DATA_BYTES);
    }
}

/// Configuration accesses through memory: the device number is in bits 15 to 19 of the offset, the function in bits 12 to 14,
/// the register in bits 0 to 11.
pub struct Ecam(pub Arc<PciRoot>);

impl Ecam {
    fn address(offset: u64) -> ConfigAddress {
        let field = |shift: u32, mask: u64| u32::try_from(offset >> shift & mask).unwrap_or(0);
        let register = usize::try_from(offset & 0xfff).unwrap_or(0);
        ConfigAddress { device: field(15, 0x1f), function: field(12, 7), register }
    }
}

impl BusDevice for Ecam {
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.0.read(Self::address(offset), data);
    }

    fn write(&self, offset: u64, data: &[u8]) -> Action {
        self.0.write(Self::address(offset), data);
        Action::None
    }
}

/// The state of a PCI bus besides its devices, for a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PciState {
    /// `CONFIG_ADDRESS`.
    pub address: u32,
    /// The host bridges: that of the ports, and that of ECAM.
    pub bridges: [ConfigSpaceState; 2],
}

/// Configuration accesses through ports, for guests without ECAM: `CONFIG_ADDRESS` at 0xcf8, `CONFIG_DATA` at 0xcfc.
pub struct ConfigPorts {
    root: Arc<PciRoot>,
    address: AtomicU32,
}

impl ConfigPorts {
    /// The port of `CONFIG_ADDRESS`, the first one of the device.
    pub const BASE: u16 = 0xcf8;
    /// The number of ports.
    pub const LEN: u64 = 8;

    /// Makes the ports for `root`.
    #[must_use]
    pub fn new(root: Arc<PciRoot>) -> Self {
        Self { root, address: AtomicU32::new(0) }
    }

    /// Returns the bus.
    #[must_use]
    pub fn root(&self) -> &PciRoot {
        &self.root
    }

    /// Returns `CONFIG_ADDRESS`.
    #[must_use]
    pub fn address(&self) -> u32 {
        self.address.load(Ordering::Acquire)
    }

    /// Sets `CONFIG_ADDRESS`.
    pub fn set_address(&self, address: u32) {
        self.address.store(address, Ordering::Release);
    }

    /// Returns the address that an access at `offset` from the first port is for, where `CONFIG_ADDRESS` is enabled and names
    /// bus 0.
    fn target(&self, offset: u64) -> Option<ConfigAddress> {
        let address = self.address.load(Ordering::Acquire);
        let low = usize::try_from(offset.checked_sub(4)?).ok()?;
        if address & 0x8000_0000 == 0 || address >> 16 & 0xff != 0 {
            return None;
        }
        let register = usize::try_from(address & 0xfc).ok()? + low;
        Some(ConfigAddress { device: address >> 11 & 0x1f, function: address >> 8 & 7, register })
    }
}

impl BusDevice for ConfigPorts {
    fn read(&self, offset: u64, data: &mut [u8]) {
        if offset == 0 && data.len() == 4 {
            data.copy_from_slice(&self.address.load(Ordering::Acquire).to_le_bytes());
        } else if let Some(target) = self.target(offset) {
            self.root.read(target, data);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) -> Action {
        if let (0, Ok(address)) = (offset, <[u8; 4]>::try_from(data)) {
            self.address.store(u32::from_le_bytes(address), Ordering::Release);
        } else if let Some(target) = self.target(offset) {
            self.root.write(target, data);
        }
        Action::None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read_by_ports(ports: &ConfigPorts, address: u32) -> u32 {
        ports.write(0, &address.to_le_bytes());
        let mut data = [0xff; 4];
        ports.read(4, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn ports_and_ecam_access_the_same_registers() {
        let root = Arc::new(PciRoot::default());
        let ports = ConfigPorts::new(Arc::clone(&root));
        assert_eq!(read_by_ports(&ports, 0x8000_0000), 0x0008_1b36);
        assert_eq!(read_by_ports(&ports, 0x8000_0800), u32::MAX, "there is no device 1");
        assert_eq!(read_by_ports(&ports, 0x8000_0100), u32::MAX, "function 1");
        assert_eq!(read_by_ports(&ports, 0x8001_0000), u32::MAX, "bus 1");
        assert_eq!(read_by_ports(&ports, 0x0000_0000), u32::MAX, "not enabled");
        let ecam = Ecam(root);
        let mut data = [0; 2];
        ecam.read(0xa, &mut data);
        assert_eq!(u16::from_le_bytes(data), HOST_BRIDGE);
        ecam.read(1 << 15, &mut data);
        assert_eq!(data, [0xff; 2]);
    }

    #[test]
    fn pages_hold_what_reads_return_also_after_writes() {
        let root = Arc::new(PciRoot::default());
        let pages = root.pages().expect("pages").to_vec();
        assert_eq!(pages.len(), SLOTS);
        let in_page =
            |device: usize, register: usize| u32::from_le(pages[device].register(register).load(Ordering::Relaxed));
        let ecam = Ecam(Arc::clone(&root));
        let read = |register: u64| {
            let mut data = [0; 4];
            ecam.read(register, &mut data);
            u32::from_le_bytes(data)
        };
        assert_eq!(in_page(0, 0), 0x0008_1b36);
        assert_eq!(in_page(31, 0), u32::MAX, "no device");
        ecam.write(5, &[4]);
        assert_eq!(in_page(0, 4), read(4));
        assert_ne!(read(4) & 0x400, 0, "Interrupt Disable can be read back");
        for register in (0..0x1000).step_by(4) {
            assert_eq!(in_page(0, register), read(register as u64), "{register:#x}");
        }
    }

    #[test]
    fn a_bus_without_a_bridge_has_the_same_numbers() {
        let mut root = PciRoot::without_bridge();
        root.add(Arc::clone(&root.bridge) as Arc<dyn PciFunction>).expect("room");
        let pages = root.pages().expect("pages").to_vec();
        let ecam = Ecam(Arc::new(root));
        for (device, identity) in [(0, u32::MAX), (1, 0x0008_1b36), (2, u32::MAX)] {
            let mut data = [0; 4];
            ecam.read(device << 15, &mut data);
            assert_eq!(u32::from_le_bytes(data), identity, "device {device}");
            let page = &pages[usize::try_from(device).expect("small")];
            assert_eq!(u32::from_le(page.register(0).load(Ordering::Relaxed)), identity, "device {device}");
        }
        ecam.write(4, &[6]);
        assert!(ecam.0.restore_bridge(&ecam.0.save_bridge()));
    }

    #[test]
    fn a_full_bus_refuses_devices() {
        let mut root = PciRoot::default();
        let bridge = || Arc::clone(&PciRoot::default().bridge) as Arc<dyn PciFunction>;
        assert!((1..SLOTS).all(|_| root.add(bridge()).is_ok()));
        assert_eq!(root.add(bridge()), Err(PciRootError));
    }
}
