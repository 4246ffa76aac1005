//! The composition root: makes a machine out of a configuration, and runs it.

mod agent_ports;
mod command;
mod confine;
mod devices;
mod disks;
mod drain;
mod drivers;
mod error;
mod fault;
mod files;
mod generation;
mod halt;
mod image;
mod levers;
mod limits;
mod net;
mod paused;
mod request;
mod restore;
mod run;
mod save;
mod saving;
mod saving_mark;
mod seed;
mod setup;
mod testdev;
mod virtio;
mod working_set;

pub use agent_ports::FIRST_AGENT_PORT;
pub use command::{CommandError, late_command};
pub use disks::{Disks, detect_disk_formats, is_disk_image};
pub use error::MachineError;
pub use fault::is_fault_of_kernel;
pub use files::{Files, FilesError};
pub use image::{DiskParts, FromImage, ImageError, entry_text};
pub use net::PASST;
pub use request::StopRequest;
pub use restore::{Mismatch, configure};
pub use run::{Ran, RunError, run};
pub use seed::SeedError;
pub use setup::{Event, Setup, Start, Stdin};

use crate::boot::{self, KernelError, Loaded};
use crate::cluster::Follow;
use crate::config::{Pages, RunConfig};
use crate::console::{Input, Watch};
use crate::exit::Handler;
use crate::kvm::{System, Vcpu, Vm};
use crate::memory::{Backing, GuestRam};
use crate::snapshot::{Irqchip, State};
use crate::tune::Lever;
use crate::vcpu::Control;
use devices::Devices;
use files::Source;
use generation::GenerationId;
use hwvmm_arch::acpi::{IoApicPins, Platform};
use hwvmm_arch::boot::BootMethod;
use hwvmm_arch::cpuid::{self, CpuidOptions};
use hwvmm_arch::layout::{IOAPIC, KVM_IDENTITY_MAP, KVM_TSS, UARTS, Uart, memory_below, ram_banks};
use hwvmm_arch::{Topology, lapic, msr};
use hwvmm_devices::legacy::IoApic;
use hwvmm_devices::virtio::console::Port;
use hwvmm_devices::{BusBuilder, BusError};
use kvm_bindings::CpuId;
use levers::VirtioMmioRegisters;
use net::Passt;
use paused::VirtioDevices;
use save::SavedDevices;
use std::sync::Arc;
use virtio::{BuiltVirtio, BusLayout, VirtioBuilder};

/// A machine that is ready to run.
pub struct Machine {
    /// Dropped first: vCPUs keep guest memory mapped, and are closed before the machine.
    vcpus: Vec<Vcpu>,
    vm: Arc<Vm>,
    virtio: Arc<VirtioDevices>,
    api: Option<crate::control::Server>,
    handler: Arc<Handler>,
    control: Arc<Control>,
    input: Option<Input>,
    /// What looks at the lines of the consoles.
    watches: Vec<Watch>,
    /// The virtio console that reports the size of the terminal to the guest.
    resized: Option<Arc<Port>>,
    /// The devices whose state a snapshot has.
    saved: SavedDevices,
    /// The MSRs that make up the state of a vCPU; none where no snapshot can be asked for.
    msrs: Arc<[u32]>,
    ram: GuestRam,
    boot: BootMethod,
    /// Which exits are followed by the interpreter.
    follow: Option<Follow>,
    /// The guest was told to find registers in memory.
    register_pages: bool,
    passt: Vec<Passt>,
}

impl Machine {
    /// Makes a machine with `disks`: memory, devices, vCPUs, kernel.
    ///
    /// # Errors
    /// [`MachineError`].
    pub fn new(setup: &Setup<'_>, system: &System, disks: Disks) -> Result<Self, MachineError> {
        let config = setup.config;
        let processors = Processors::new(config, system)?;
        let banks = ram_banks(config.memory.bytes);
        let ram = match &setup.files.source {
            Source::Kernel { .. } => GuestRam::new(&banks, backing(config))?,
            Source::Snapshot { memory, working_set, .. } => {
                let ram = GuestRam::of_file(&banks, memory)?;
                if let Some(set) = working_set {
                    working_set::prepare(set, &ram, memory, config, system)?;
                }
                ram
            }
        };
        let uarts = uarts(config);
        let mut layout = BusLayout::new(config, &setup.files.source)?;
        let (vm, irqchip) = create_vm(setup, system, &ram)?;
        let pins = match irqchip {
            Irqchip::Split => layout.pack_pins(uarts.iter().map(|uart| uart.gsi)),
            Irqchip::Kernel => Some(IoApicPins { first_gsi: 0, count: Vm::FIRST_MESSAGE_GSI }),
        };
        let loaded = load(setup, &platform(config, &processors.apic_ids, &uarts, pins, &layout), &ram)?;
        let control = Arc::new(Control::new()?);
        let mut devices = Devices::new(setup, &vm, &control)?;
        let mut mmio = BusBuilder::default();
        if irqchip == Irqchip::Split {
            devices.saved.io_apic = add_io_apic(&vm, pins, &mut mmio)?;
        }
        let generation = layout.vmgenid.map(|gsi| GenerationId::new(&vm, gsi)).transpose()?;
        if generation.is_some() {
            GenerationId::renew(&ram)?;
        }
        devices.saved.has_generation_id = generation.is_some();
        if config.testdev {
            testdev::add(config, &vm, &ram, &mut devices.pio, &mut mmio)?;
        }
        let mut builder = VirtioBuilder::new(&vm, &ram, &layout, config, &mut mmio);
        builder.add_configured(config, setup.connector.as_ref(), &setup.sandbox, disks, setup.files.link)?;
        devices.add_virtio_console(setup, &control, &mut builder)?;
        let balloon = builder.balloon.take();
        let passt = std::mem::take(&mut builder.passt);
        let most = config.memory.max_balloon_bytes();
        let serve = |path| crate::control::Server::new(path, balloon, most, Arc::clone(&control));
        let api = config.api.as_deref().map(serve).transpose()?;
        let BuiltVirtio { devices: virtio, readonly_pages } = builder.finish(&mut devices.pio)?;
        let follow = levers::follow(config, setup.mmu, processors.apic_ids.len());
        let vcpus = match &loaded {
            From::Kernel(loaded) => create_vcpus(system, &vm, &processors, loaded, config, follow)?,
            From::Snapshot(state) => {
                let vcpus = restore::vcpus(&vm, state, processors.supported.as_slice(), &processors.apic_ids)?;
                restore::devices(&vm, state, &devices.saved)?;
                virtio.restore(state)?;
                generation.map_or(Ok(()), |generation| generation.announce())?;
                vcpus
            }
        };
        if config.memory.prefault || config.tune.wants(Lever::Prefault) {
            prefault(&ram, &vcpus, config.memory.bytes)?;
        }
        if let (Source::Snapshot { working_set: Some(set), .. }, Some(vcpu)) = (&setup.files.source, vcpus.first()) {
            working_set::map(set, vcpu, config.memory.bytes);
        }
        let registers = VirtioMmioRegisters { devices: &layout.mmio, readonly_pages };
        let ring = vcpus.first().and_then(|vcpu| levers::coalesced_io(&vm, vcpu, config, irqchip, &registers));
        if ring.is_some() {
            // The thread that drains the ring has the UARTs flushed, too.
            devices.saved.uarts.iter().for_each(|uart| uart.batch_output());
        }
        let handler = Handler { pio: devices.pio.freeze(), mmio: mmio.freeze(), ring };
        Ok(Self {
            vcpus,
            follow,
            vm,
            virtio: Arc::new(virtio),
            register_pages: layout.pages,
            api,
            handler: Arc::new(handler),
            control,
            input: devices.input,
            watches: devices.watches,
            resized: devices.resized,
            saved: devices.saved,
            msrs: if config.may_be_saved() { system.msrs()?.into() } else { Arc::default() },
            ram,
            boot: loaded.method(),
            passt,
        })
    }
}

/// The vCPUs that a machine is to have, and what KVM supports of a processor.
struct Processors {
    topology: Topology,
    /// In the order of the vCPUs.
    apic_ids: Vec<u32>,
    supported: CpuId,
}

impl Processors {
    /// The processors of `config`, which KVM can create and which can address all of the memory.
    fn new(config: &RunConfig, system: &System) -> Result<Self, MachineError> {
        let topology =
            Topology { sockets: config.cpus.sockets, cores: config.cpus.cores, threads: config.cpus.threads };
        let apic_ids: Vec<u32> = (0..topology.cpus()).map(|index| topology.apic_id(index)).collect();
        check_vcpus(system, &apic_ids)?;
        let supported = system.supported_cpuid()?;
        check_memory(config.memory.bytes, cpuid::address_bits(supported.as_slice()))?;
        Ok(Self { topology, apic_ids, supported })
    }
}

/// The hardware that ACPI's tables describe.
fn platform<'a>(
    config: &RunConfig,
    apic_ids: &'a [u32],
    uarts: &'a [Uart],
    pins: Option<IoApicPins>,
    layout: &'a BusLayout,
) -> Platform<'a> {
    Platform {
        apic_ids,
        uarts,
        legacy_free: config.tune.wants(Lever::LegacyFree),
        pins,
        pci: layout.pci.then_some(u8::from(layout.pages)),
        virtio_mmio: &layout.mmio,
        vmgenid: layout.vmgenid,
    }
}

/// Adds hwvmm's I/O APIC with `pins`; none where no pin is connected.
fn add_io_apic(vm: &Arc<Vm>, pins: Option<IoApicPins>, mmio: &mut BusBuilder) -> Result<Option<Arc<IoApic>>, BusError> {
    let Some(pins) = pins else { return Ok(None) };
    let io_apic = Arc::new(IoApic::new(pins.first_gsi, pins.count, Arc::new(virtio::Router(Arc::clone(vm)))));
    mmio.insert(IOAPIC.into(), IoApic::BYTES, "I/O APIC", Arc::clone(&io_apic) as _)?;
    Ok(Some(io_apic))
}

/// What the guest goes on from.
enum From<'a> {
    /// A kernel in guest memory.
    Kernel(Loaded),
    /// A snapshot.
    Snapshot(&'a State),
}

impl From<'_> {
    fn method(&self) -> BootMethod {
        match self {
            Self::Kernel(loaded) => loaded.method,
            Self::Snapshot(state) => state.description.boot,
        }
    }
}

/// The UARTs that the configuration has.
fn uarts(config: &RunConfig) -> Vec<Uart> {
    UARTS.iter().zip(&config.serial).filter(|(_, port)| port.is_some()).map(|(uart, _)| *uart).collect()
}

/// Loads the configured kernel for a machine with the hardware of `platform`. A snapshot has all of that in its memory.
fn load<'a>(setup: &'a Setup<'_>, platform: &Platform<'_>, ram: &GuestRam) -> Result<From<'a>, KernelError> {
    let Setup { config, files, .. } = setup;
    let (kernel, prepared) = match &files.source {
        Source::Kernel { kernel, prepared } => (kernel, prepared),
        Source::Snapshot { state, .. } => return Ok(From::Snapshot(state)),
    };
    let request = boot::Request {
        kernel,
        prepared,
        modules: &config.module,
        cmdline: &config.kernel_cmdline_with(files.cmdline.as_deref()),
        arguments: &config.multiboot_cmdline(),
        memory_bytes: config.memory.bytes,
        boot: config.boot,
        platform,
    };
    boot::load(&request, ram).map(From::Kernel)
}

fn backing(config: &RunConfig) -> Backing {
    let pages = config.memory.pages;
    match pages.huge_bytes() {
        Some(page_bytes) => Backing::HugeTlb { page_bytes },
        None if pages == Pages::Transparent && config.tune.wants(Lever::HugePages) => Backing::TransparentHugePages,
        None => Backing::SmallPages,
    }
}

fn check_vcpus(system: &System, apic_ids: &[u32]) -> Result<(), MachineError> {
    let asked = u32::try_from(apic_ids.len()).unwrap_or(u32::MAX);
    let largest = apic_ids.last().copied().unwrap_or(0) as usize;
    let max = system.max_vcpus();
    if apic_ids.len() > max || largest >= system.max_vcpu_id() {
        return Err(MachineError::TooManyVcpus { asked, max });
    }
    Ok(())
}

/// Checks that the guest's processor can address all of its memory, with `address_bits` bits.
fn check_memory(asked: u64, address_bits: u32) -> Result<(), MachineError> {
    let end = ram_banks(asked).last().map_or(0, |bank| bank.end());
    let space = 1_u64.checked_shl(address_bits).unwrap_or(u64::MAX);
    if end > space {
        let most = memory_below(space);
        return Err(MachineError::TooMuchMemory { asked, address_bits, most_mib: most >> 20 });
    }
    Ok(())
}

/// Creates the VM with its memory and interrupt controllers.
fn create_vm(setup: &Setup<'_>, system: &System, ram: &GuestRam) -> Result<(Arc<Vm>, Irqchip), MachineError> {
    let config = setup.config;
    let mut vm = system.create_vm()?;
    vm.set_real_mode_pages(KVM_TSS, KVM_IDENTITY_MAP)?;
    vm.set_memory(ram.clone())?;
    let irqchip = levers::create_irqchip(&vm, config, setup.files)?;
    levers::set_vm(&vm, system, &config.tune);
    if config.trap_msrs {
        vm.trap_unknown_msrs().map_err(|_| MachineError::Missing {
            capability: "X86_USER_SPACE_MSR (Linux 5.10)",
            option: "trap-msrs",
        })?;
    }
    Ok((Arc::new(vm), irqchip))
}

fn create_vcpus(
    system: &System,
    vm: &Vm,
    processors: &Processors,
    loaded: &Loaded,
    config: &RunConfig,
    follow: Option<Follow>,
) -> Result<Vec<Vcpu>, MachineError> {
    let tune = &config.tune;
    let hidden_features = levers::hidden_features(tune, follow);
    let tsc_deadline = system.has_tsc_deadline() && levers::wants_tsc_deadline(tune);
    let mut vcpus = Vec::with_capacity(processors.apic_ids.len());
    for (index, &apic_id) in processors.apic_ids.iter().enumerate() {
        let vcpu = vm.create_vcpu(apic_id)?;
        let options = CpuidOptions {
            topology: processors.topology,
            apic_id,
            tsc_khz: vcpu.tsc_khz(),
            tsc_deadline,
            x2apic: tune.wants(Lever::X2Apic),
            tsc_frequency: tune.wants(Lever::CpuidTsc),
            hidden_features,
            mtrr: !tune.wants(Lever::HideMtrr),
        };
        vcpu.set_cpuid(&cpuid::for_vcpu(processors.supported.as_slice(), &options))?;
        if tune.wants(Lever::MceBanks)
            && let Err(error) = vcpu.set_machine_check_banks(1)
        {
            tune.cannot(Lever::MceBanks, &format!("{error}: {}", error.source));
        }
        vcpu.set_msrs(&msr::boot_msrs())?;
        vcpu.update_lapic(lapic::set_boot_lints)?;
        if index == 0 {
            vcpu.update_sregs(|sregs| loaded.entry.apply(sregs))?;
            vcpu.set_regs(&loaded.entry.regs())?;
        }
        vcpus.push(vcpu);
    }
    Ok(vcpus)
}

/// Fills guest memory and, where KVM can, the nested page tables too.
fn prefault(ram: &GuestRam, vcpus: &[Vcpu], memory_bytes: u64) -> Result<(), MachineError> {
    ram.populate()?;
    let Some(vcpu) = vcpus.first() else { return Ok(()) };
    for bank in ram_banks(memory_bytes) {
        if let Err(error) = vcpu.pre_fault(bank) {
            log::info!("prefault: {error}: {}; the guest's first touches still exit", error.source);
            break;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_beyond_the_address_space_is_refused_with_the_most_that_fits() {
        for bits in [32, 36, 40, 46, 48, 52] {
            let most = memory_below(1 << bits);
            assert!(check_memory(most, bits).is_ok(), "{bits} bits");
            let error = check_memory(most + 4096, bits).expect_err("a page too much").to_string();
            for words in [&format!("{bits} bits"), &format!("{} bytes", most + 4096), &format!("-m {}M", most >> 20)] {
                assert!(error.contains(words), "{words}: {error}");
            }
        }
        assert!(check_memory(1 << 42, 64).is_ok());
        let error = check_memory(1 << 40, 40).expect_err("1 TiB and the hole").to_string();
        assert!(error.contains("-m 1047552M"), "{error}");
    }
}
