//! Virtio devices: made from the configuration, put on their transport, connected to KVM.

use super::agent_ports::AGENT_PORTS;
use super::confine;
use super::disks::{Disks, disk_name};
use super::error::MachineError;
use super::files::Source;
use super::levers::options;
use super::net::{Card, Passt, card};
use super::paused::{PciBus, VirtioDevices, VirtioHandle};
use crate::boot::initramfs::AgentLink;
use crate::config::{ChangedDisk, DiskConfig, DiskIo, RunConfig, SEED_ID, Transport, VsockBackend, WriteError};
use crate::kvm::Vm;
use crate::memory::GuestRam;
use crate::sandbox::Sandbox;
use crate::tune::{Lever, Tune};
use hwvmm_arch::acpi::{IoApicPins, VirtioMmio};
use hwvmm_arch::layout::{
    GpaRange, PCI_ECAM, PCI_WINDOW, PCI_WINDOW_BYTES, VIRTIO_MMIO, VIRTIO_MMIO_GSIS, VMGENID_GSI,
};
use hwvmm_devices::memory::Memory;
use hwvmm_devices::pci::{ConfigPorts, ECAM_BUS_BYTES, Ecam, MsiMessage, MsiRouter, MsiVector, PciRoot, RouteError};
use hwvmm_devices::virtio::balloon::{Balloon, BalloonControl, FreePageReporting};
use hwvmm_devices::virtio::block::{Block, BlockOptions, Image, IoEngine, WhenChanged, WhenFull};
use hwvmm_devices::virtio::fs::{Fs, FsOptions};
use hwvmm_devices::virtio::mmio::{MmioDevice, REGION_BYTES};
use hwvmm_devices::virtio::pci::{BAR_BYTES, PciDevice};
use hwvmm_devices::virtio::ports::Ports;
use hwvmm_devices::virtio::rng::{Rate, Rng};
use hwvmm_devices::virtio::vsock::{Connector, KernelVsock, Vsock};
use hwvmm_devices::virtio::{Doorbell, TransportOptions, VirtioDevice, VirtioTransport};
use hwvmm_devices::{BusBuilder, BusDevice, RegisterPage};
use std::cell::OnceCell;
use std::sync::Arc;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// The pin behind those of the UARTs.
const FIRST_FREE_PIN: u32 = 5;

/// Where virtio devices go; known before they are made, for the ACPI tables.
pub(super) struct BusLayout {
    /// There is a PCI bus.
    pub(super) pci: bool,
    /// The virtio-mmio devices, in the order in which they are added.
    pub(super) mmio: Vec<VirtioMmio>,
    /// If true, the guest reads registers from read-only pages, without exits where the host can. Multiboot kernels use the PCI ports
    /// instead.
    pub(super) pages: bool,
    /// The GSI of the machine's generation identifier, if it has one.
    pub(super) vmgenid: Option<u32>,
}

/// Returns true if the machine has a generation identifier: where a snapshot can be made of it, or where the one that it goes on from has
/// one. No other machine has a use for it, and its interrupt takes the guest some exits.
fn has_generation_id(config: &RunConfig, source: &Source) -> bool {
    match source {
        Source::Kernel { .. } => config.can_be_saved(),
        Source::Snapshot { state, .. } => state.description.vmgenid,
    }
}

impl BusLayout {
    /// # Errors
    /// Where there are more devices than places.
    pub(super) fn new(config: &RunConfig, source: &Source) -> Result<Self, MachineError> {
        let count = config.virtio_devices();
        let vmgenid = has_generation_id(config, source).then_some(VMGENID_GSI);
        let pages = match source {
            Source::Kernel { kernel, .. } => config.tune.wants(Lever::ReadonlyRegisters) && !kernel.is_multiboot(),
            // The guest knows already where it finds them.
            Source::Snapshot { state, .. } => state.description.register_pages,
        };
        match config.transport {
            Transport::Pci => Ok(Self { pci: count > 0, mmio: Vec::new(), pages, vmgenid }),
            Transport::Mmio if count > VIRTIO_MMIO_GSIS.len() => {
                Err(MachineError::TooManyDevices { asked: count, max: VIRTIO_MMIO_GSIS.len(), bus: "virtio-mmio" })
            }
            Transport::Mmio => {
                let gpas = (VIRTIO_MMIO..).step_by(usize::try_from(REGION_BYTES).unwrap_or(4096));
                let place = |(start, gsi): (u64, &u32)| VirtioMmio {
                    range: GpaRange { start, bytes: REGION_BYTES },
                    gsi: *gsi,
                };
                Ok(Self {
                    pci: false,
                    mmio: gpas.zip(&VIRTIO_MMIO_GSIS).take(count).map(place).collect(),
                    pages,
                    vmgenid,
                })
            }
        }
    }
}

impl BusLayout {
    /// For an I/O APIC of hwvmm's own: moves the virtio-mmio devices and the generation identifier to pins next to those of the UARTs
    /// (GSIs `uarts`).
    /// Returns the pins that the I/O APIC needs, or `None` where no pin is connected.
    pub(super) fn pack_pins(&mut self, uarts: impl Iterator<Item = u32>) -> Option<IoApicPins> {
        let gsis = self.mmio.iter_mut().map(|place| &mut place.gsi).chain(&mut self.vmgenid);
        gsis.zip(FIRST_FREE_PIN..).for_each(|(gsi, pin)| *gsi = pin);
        let wired: Vec<u32> = uarts.chain(self.mmio.iter().map(|place| place.gsi)).chain(self.vmgenid).collect();
        let (first, last) = (*wired.iter().min()?, *wired.iter().max()?);
        Some(IoApicPins { first_gsi: first, count: last - first + 1 })
    }
}

/// Sets MSI routes in KVM (KVM_SET_GSI_ROUTING).
pub(super) struct Router(pub(super) Arc<Vm>);

impl MsiRouter for Router {
    fn route(&self, gsi: u32, message: MsiMessage) -> Result<(), RouteError> {
        let MsiMessage { address, data } = message;
        self.0.route_message(gsi, address, data).map_err(|error| RouteError { gsi, source: error.into() })
    }

    fn unroute(&self, gsi: u32) -> Result<(), RouteError> {
        self.0.unroute(gsi).map_err(|error| RouteError { gsi, source: error.into() })
    }
}

/// The virtio devices of a machine that has all of them.
pub(super) struct BuiltVirtio {
    pub(super) devices: VirtioDevices,
    /// If true, the guest reads the devices' registers from read-only pages, without exits.
    pub(super) readonly_pages: bool,
}

/// Puts devices on the machine.
pub(super) struct VirtioBuilder<'a> {
    vm: &'a Arc<Vm>,
    memory: Memory,
    layout: &'a BusLayout,
    tune: Tune,
    vcpus: u32,
    /// Made for the first device: to count the host's processors takes a dozen system calls.
    options: OnceCell<TransportOptions>,
    mmio: &'a mut BusBuilder,
    router: Arc<dyn MsiRouter>,
    root: PciRoot,
    next_message: u32,
    handles: Vec<VirtioHandle>,
    /// True while the registers of all devices so far could be mapped as read-only pages.
    pages: bool,
    /// The balloon's handle, once there is one.
    pub(super) balloon: Option<Arc<BalloonControl>>,
    /// The processes behind network cards.
    pub(super) passt: Vec<Passt>,
}

impl<'a> VirtioBuilder<'a> {
    pub(super) fn new(
        vm: &'a Arc<Vm>,
        ram: &GuestRam,
        layout: &'a BusLayout,
        config: &RunConfig,
        mmio: &'a mut BusBuilder,
    ) -> Self {
        let tune = config.tune;
        let memory = Memory::new(ram.get().clone(), Arc::new(ram.clone()));
        let router = Arc::new(Router(Arc::clone(vm)));
        let next_message = Vm::FIRST_MESSAGE_GSI;
        Self {
            vm,
            memory,
            layout,
            tune,
            vcpus: config.cpus.count(),
            options: OnceCell::new(),
            mmio,
            router,
            root: PciRoot::default(),
            next_message,
            handles: Vec::new(),
            pages: layout.pages && tune.wants(Lever::ReadonlyRegisters),
            balloon: None,
            passt: Vec::new(),
        }
    }

    /// The devices that need nothing else of the machine.
    pub(super) fn add_configured(
        &mut self,
        config: &RunConfig,
        connector: Option<&Arc<Connector>>,
        sandbox: &Sandbox,
        disks: Disks,
        link: AgentLink,
    ) -> Result<(), MachineError> {
        for (index, (disk, image)) in config.disk.iter().zip(disks.images).enumerate() {
            self.add(disk_name(index, disk), Box::new(block(disk, image)?))?;
        }
        if let Some(image) = disks.seed {
            self.add(SEED_ID.into(), Box::new(seed(image)?))?;
        }
        for (index, net) in config.net.iter().enumerate() {
            let Card { device, passt } = card(net, &self.memory)?;
            self.passt.extend(passt);
            self.add(format!("net{index}"), device)?;
        }
        if let Some(rng) = &config.rng {
            let rate = rng.bytes_per_second.map(|bytes_per_second| Rate { bytes_per_second });
            self.add("rng".into(), Box::new(Rng::new(rate)?))?;
        }
        if let Some(vsock) = &config.vsock {
            let device: Box<dyn VirtioDevice> = match &vsock.backend {
                VsockBackend::Unix(path) => {
                    let connector = connector.ok_or(MachineError::NoConnector)?;
                    Box::new(Vsock::new(vsock.cid, Some(path), Arc::clone(connector))?)
                }
                VsockBackend::Streams => {
                    let connector = Arc::clone(connector.ok_or(MachineError::NoConnector)?);
                    match link {
                        AgentLink::Vsock => Box::new(Vsock::new(vsock.cid, None, connector)?),
                        AgentLink::Ports => Box::new(Ports::new(connector, AGENT_PORTS)),
                    }
                }
                VsockBackend::Vhost => {
                    let device = KernelVsock::new(vsock.cid, &self.memory).map_err(MachineError::VhostVsock)?;
                    Box::new(device)
                }
            };
            let name = match link {
                AgentLink::Vsock => "vsock",
                AgentLink::Ports => "ports",
            };
            self.add(name.into(), device)?;
        }
        for share in &config.share {
            let options = FsOptions {
                tag: share.tag.clone(),
                directory: share.path.clone(),
                read_only: share.read_only,
                privileged_files: share.privileged_files,
            };
            let device = match sandbox.mount_of(&confine::folder(share)) {
                Some(mount) => Fs::of_mount(options, mount)?,
                None => Fs::new(options)?,
            };
            self.add(format!("share {}", share.tag), Box::new(device))?;
        }
        if let Some(balloon) = &config.balloon {
            let wanted = self.tune.wants(Lever::FreePages);
            let reporting = if wanted { FreePageReporting::On } else { FreePageReporting::Off };
            let device = Balloon::new(balloon.bytes, reporting)?.at_most(config.memory.max_balloon_bytes());
            self.balloon = Some(device.control());
            self.add("balloon".into(), Box::new(device))?;
        }
        Ok(())
    }

    /// Puts a device in the next place.
    pub(super) fn add(&mut self, name: String, device: Box<dyn VirtioDevice>) -> Result<(), MachineError> {
        let place = self.handles.len();
        let (base, bytes, transport, bells) = match self.layout.mmio.get(place) {
            Some(&VirtioMmio { range: GpaRange { start: gpa, bytes }, gsi }) => {
                let event = Arc::new(EventFd::new(EFD_NONBLOCK)?);
                self.vm.register_irqfd(&event, gsi)?;
                let made = MmioDevice::new(&name, device, self.memory.clone(), event)?;
                let bells = made.doorbells(gpa);
                self.show(std::iter::once((gpa, made.page())));
                (gpa, bytes, made as Arc<dyn VirtioTransport>, bells)
            }
            None => {
                let index = u32::try_from(place).unwrap_or(u32::MAX);
                let bar = PCI_WINDOW + index.min(PCI_WINDOW_BYTES / BAR_BYTES - 1) * BAR_BYTES;
                let vectors = self.vectors(PciDevice::vector_count(device.as_ref()))?;
                let router = Arc::clone(&self.router);
                let made = Arc::new(PciDevice::new(&name, device, self.memory.clone(), bar, vectors, router)?);
                let full = |_| MachineError::TooManyDevices { asked: place + 1, max: place, bus: "PCI" };
                self.root.add(Arc::clone(&made) as _).map_err(full)?;
                let bells = made.doorbells(bar);
                (u64::from(bar), u64::from(BAR_BYTES), made as Arc<dyn VirtioTransport>, bells)
            }
        };
        transport.set_options(*self.options.get_or_init(|| options(&self.tune, self.vcpus)));
        if self.tune.wants(Lever::Ioeventfd) {
            for Doorbell { gpa, datamatch, event } in bells {
                self.vm.register_ioeventfd(&event, gpa, datamatch)?;
            }
        }
        self.mmio.insert(base, bytes, format!("virtio {name}"), Arc::clone(&transport) as Arc<dyn BusDevice>)?;
        self.handles.push(VirtioHandle::new(name, transport));
        Ok(())
    }

    fn vectors(&mut self, count: usize) -> Result<Vec<MsiVector>, MachineError> {
        let mut vectors = Vec::with_capacity(count);
        for _ in 0..count {
            let (gsi, event) = (self.next_message, Arc::new(EventFd::new(EFD_NONBLOCK)?));
            self.vm.register_irqfd(&event, gsi)?;
            self.next_message += 1;
            vectors.push(MsiVector { gsi, event });
        }
        Ok(vectors)
    }

    /// Has the guest read `pages` by itself, where this host's KVM can.
    fn show<'p>(&mut self, pages: impl Iterator<Item = (u64, &'p RegisterPage)>) {
        for (gpa, page) in pages {
            if !self.pages {
                return;
            }
            if let Err(error) = self.vm.map_register_page(gpa, page) {
                self.tune.cannot(Lever::ReadonlyRegisters, &format!("{error}: {}", error.source));
                self.pages = false;
            }
        }
    }

    /// Puts the PCI bus itself in its place, where there is one.
    ///
    /// # Errors
    /// Returns an error where a page for registers cannot be had, or an address is taken.
    pub(super) fn finish(mut self, pio: &mut BusBuilder) -> Result<BuiltVirtio, MachineError> {
        let root = Arc::new(std::mem::take(&mut self.root));
        if self.layout.pci && self.pages {
            let pages = root.pages()?;
            self.show((PCI_ECAM..).step_by(usize::try_from(PciRoot::PAGE_STRIDE).unwrap_or(0x8000)).zip(pages));
        }
        // The ports are those of segment 0, which has just its host bridge where the devices are in another: Linux looks for
        // one before it believes in the ports. Without devices too: it complains on its console where it finds no way to ask.
        let by_ports = if self.layout.pages { Arc::new(PciRoot::default()) } else { Arc::clone(&root) };
        let ports = Arc::new(ConfigPorts::new(by_ports));
        let bus = PciBus { ports: Arc::clone(&ports), root: Arc::clone(&root) };
        pio.insert(ConfigPorts::BASE.into(), ConfigPorts::LEN, "PCI configuration", ports)?;
        if self.layout.pci {
            self.mmio.insert(PCI_ECAM, ECAM_BUS_BYTES, "PCI configuration", Arc::new(Ecam(root)))?;
        }
        Ok(BuiltVirtio { devices: VirtioDevices::new(self.handles, bus), readonly_pages: self.pages })
    }
}

fn block(disk: &DiskConfig, image: Arc<Image>) -> Result<Block, MachineError> {
    let when_full = match disk.write_error {
        WriteError::Report => WhenFull::Report,
        WriteError::Stop => WhenFull::Stop,
    };
    let io_engine = match disk.io {
        DiskIo::Auto => IoEngine::Async,
        DiskIo::Plain => IoEngine::Sync,
    };
    let options = BlockOptions { queues: disk.queues, serial: disk.serial.clone(), when_full, io_engine };
    let when_changed = match disk.changed {
        ChangedDisk::Refuse => WhenChanged::Refuse,
        ChangedDisk::Accept => WhenChanged::Accept,
    };
    Ok(Block::new(image, options)?.when_changed(when_changed))
}

/// The disk of `--seed`. Its file is in memory: there is nothing to wait for.
fn seed(image: Arc<Image>) -> Result<Block, MachineError> {
    let (when_full, io_engine) = (WhenFull::Report, IoEngine::Sync);
    Ok(Block::new(image, BlockOptions { queues: 1, serial: SEED_ID.into(), when_full, io_engine })?)
}
