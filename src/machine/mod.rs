//! The composition root: makes a machine out of a configuration, and runs it.

mod error;
mod levers;
mod net;
mod run;
mod testdev;
mod virtio;

pub use error::MachineError;
pub use run::{RunError, run};

use crate::boot::cache::Cache;
use crate::boot::{self, KernelError, Loaded};
use crate::config::{ConsoleTarget, Pages, RunConfig};
use crate::console::{Announcements, Input, Keys, Output, Sink, Watch};
use crate::exit::Handler;
use crate::kvm::{System, Vcpu, Vm};
use crate::memory::{Backing, GuestRam};
use crate::tune::{Lever, Tune};
use crate::vcpu::Control;
use hwvmm_arch::acpi::{IoApicPins, Platform};
use hwvmm_arch::cpuid::{self, CpuidOptions};
use hwvmm_arch::layout::{
    IOAPIC, KVM_IDENTITY_MAP, KVM_TSS, PORT_MARK, PORT_POST, PORT_PVPANIC, PORT_SLEEP_CONTROL, RESET_VALUE,
    SLEEP_TYPE_S5, UARTS, Uart, ram_banks,
};
use hwvmm_arch::{Topology, lapic, msr};
use hwvmm_devices::console::ConsoleInput;
use hwvmm_devices::irq::IrqLine;
use hwvmm_devices::legacy::{DebugExit, I8042, IoApic, MarkPort, PostPort, Power, PvPanic, SerialPort, Watchdog};
use hwvmm_devices::virtio::console::{Console, ConsoleSize, Port};
use hwvmm_devices::{BusBuilder, BusDevice, BusError};
use levers::{Irqchip, VirtioMmioRegisters};
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use virtio::{BusLayout, VirtioBuilder, VirtioHandle};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// A machine that is ready to run.
pub struct Machine {
    /// Dropped first: vCPUs keep guest memory mapped, and are closed before the machine.
    vcpus: Vec<Vcpu>,
    vm: Arc<Vm>,
    virtio: Vec<VirtioHandle>,
    api: Option<crate::control::Server>,
    handler: Arc<Handler>,
    control: Arc<Control>,
    input: Option<Input>,
    /// The virtio console that reports the size of the terminal to the guest.
    resized: Option<Arc<Port>>,
    watchdog: Option<Arc<Watchdog>>,
    ram: GuestRam,
    loaded: Loaded,
}

/// What is the same in every start of a machine.
pub struct Setup<'a> {
    /// The configuration of the machine.
    pub config: &'a RunConfig,
    /// The pattern of `--expect`.
    pub expect: Option<regex::bytes::Regex>,
    /// What the guest's kernel has announced on its consoles.
    pub announcements: Announcements,
    /// True if stdin is a terminal in raw mode.
    pub terminal: bool,
    /// Called with a message before anything that takes long.
    pub progress: &'a dyn Fn(&str),
}

impl Machine {
    /// Makes a machine: memory, devices, vCPUs, kernel.
    ///
    /// # Errors
    /// [`MachineError`].
    pub fn new(setup: &Setup<'_>, system: &System) -> Result<Self, MachineError> {
        let config = setup.config;
        let topology =
            Topology { sockets: config.cpus.sockets, cores: config.cpus.cores, threads: config.cpus.threads };
        let apic_ids: Vec<u32> = (0..topology.cpus()).map(|index| topology.apic_id(index)).collect();
        check_vcpus(system, &apic_ids)?;
        let ram = GuestRam::new(&ram_banks(config.memory.bytes), backing(config))?;
        let uarts = uarts(config);
        let mut layout = BusLayout::new(config)?;
        let (vm, irqchip) = create_vm(config, system, &ram)?;
        let pins = match irqchip {
            Irqchip::Split => layout.pack_pins(uarts.iter().map(|uart| uart.gsi)),
            Irqchip::Kernel => Some(IoApicPins { first_gsi: 0, count: Vm::FIRST_MESSAGE_GSI }),
        };
        let platform = Platform {
            apic_ids: &apic_ids,
            uarts: &uarts,
            legacy_free: config.tune.wants(Lever::LegacyFree),
            pins,
            pci: layout.pci.then_some(u8::from(layout.pages)),
            virtio_mmio: &layout.mmio,
        };
        let loaded = load(setup, &platform, &ram)?;
        let control = Arc::new(Control::new()?);
        let mut devices = Devices::new(setup, &vm, &control)?;
        let mut mmio = BusBuilder::default();
        if irqchip == Irqchip::Split {
            add_io_apic(&vm, pins, &mut mmio)?;
        }
        if config.testdev {
            testdev::add(config, &vm, &ram, &mut devices.pio, &mut mmio)?;
        }
        let mut builder = VirtioBuilder::new(&vm, &ram, &layout, config, &mut mmio);
        builder.add_configured(config)?;
        devices.add_virtio_console(setup, &control, &mut builder)?;
        let balloon = builder.balloon.take();
        let serve = |path| crate::control::Server::new(path, balloon, Arc::clone(&control));
        let api = config.api.as_deref().map(serve).transpose()?;
        let (virtio, pages) = builder.finish(&mut devices.pio)?;
        let vcpus = create_vcpus(system, &vm, topology, &apic_ids, &loaded, &config.tune)?;
        if config.memory.prefault || config.tune.wants(Lever::Prefault) {
            prefault(&ram, &vcpus, config.memory.bytes)?;
        }
        let registers = VirtioMmioRegisters { devices: &layout.mmio, readonly_pages: pages };
        let ring = vcpus.first().and_then(|vcpu| levers::coalesced_io(&vm, vcpu, config, irqchip, &registers));
        let handler = Handler { pio: devices.pio.freeze(), mmio: mmio.freeze(), ring };
        Ok(Self {
            vcpus,
            vm,
            virtio,
            api,
            handler: Arc::new(handler),
            control,
            input: devices.input,
            resized: devices.resized,
            watchdog: devices.watchdog,
            ram,
            loaded,
        })
    }
}

/// Adds hwvmm's I/O APIC with `pins`; none where no pin is connected.
fn add_io_apic(vm: &Arc<Vm>, pins: Option<IoApicPins>, mmio: &mut BusBuilder) -> Result<(), BusError> {
    let Some(pins) = pins else { return Ok(()) };
    let io_apic = IoApic::new(pins.first_gsi, pins.count, Arc::new(virtio::Router(Arc::clone(vm))));
    mmio.insert(IOAPIC.into(), IoApic::BYTES, "I/O APIC", Arc::new(io_apic))
}

/// The UARTs that the configuration has.
fn uarts(config: &RunConfig) -> Vec<Uart> {
    UARTS.iter().zip(&config.serial).filter(|(_, port)| port.is_some()).map(|(uart, _)| *uart).collect()
}

/// Loads the configured kernel for a machine with the hardware of `platform`.
fn load(setup: &Setup<'_>, platform: &Platform<'_>, ram: &GuestRam) -> Result<Loaded, KernelError> {
    let config = setup.config;
    let cache = config.kernel_cache.as_deref().map(Cache::new);
    let request = boot::Request {
        kernel: &config.kernel,
        initrd: config.initrd.as_deref(),
        modules: &config.module,
        cmdline: &config.kernel_cmdline(),
        arguments: &config.multiboot_cmdline(),
        memory_bytes: config.memory.bytes,
        unpack: config.unpack,
        boot: config.boot,
        cache: cache.as_ref(),
        platform,
        progress: setup.progress,
    };
    boot::load(&request, ram)
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

/// Creates the VM with its memory and interrupt controllers.
fn create_vm(config: &RunConfig, system: &System, ram: &GuestRam) -> Result<(Arc<Vm>, Irqchip), MachineError> {
    let mut vm = system.create_vm()?;
    vm.set_real_mode_pages(KVM_TSS, KVM_IDENTITY_MAP)?;
    vm.set_memory(ram.clone())?;
    let irqchip = levers::create_irqchip(&vm, config)?;
    levers::set_vm(&vm, system, &config.tune);
    if config.trap_msrs {
        vm.trap_unknown_msrs().map_err(|_| MachineError::Missing("X86_USER_SPACE_MSR (Linux 5.10)", "trap-msrs"))?;
    }
    Ok((Arc::new(vm), irqchip))
}

fn create_vcpus(
    system: &System,
    vm: &Vm,
    topology: Topology,
    apic_ids: &[u32],
    loaded: &Loaded,
    tune: &Tune,
) -> Result<Vec<Vcpu>, MachineError> {
    let supported = system.supported_cpuid()?;
    let tsc_deadline = system.has_tsc_deadline() && tune.wants(Lever::TscDeadline);
    let mut vcpus = Vec::with_capacity(apic_ids.len());
    for (index, &apic_id) in apic_ids.iter().enumerate() {
        let vcpu = vm.create_vcpu(apic_id)?;
        let options = CpuidOptions {
            topology,
            apic_id,
            tsc_khz: vcpu.tsc_khz(),
            tsc_deadline,
            x2apic: tune.wants(Lever::X2Apic),
            tsc_frequency: tune.wants(Lever::CpuidTsc),
            hidden_features: levers::hidden_features(tune),
            mtrr: !tune.wants(Lever::HideMtrr),
        };
        vcpu.set_cpuid(&cpuid::for_vcpu(supported.as_slice(), &options))?;
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

/// The devices, before the bus is frozen.
struct Devices {
    pio: BusBuilder,
    input: Option<Input>,
    /// The virtio console that reports the size of the terminal to the guest.
    resized: Option<Arc<Port>>,
    watchdog: Option<Arc<Watchdog>>,
}

impl Devices {
    fn new(setup: &Setup<'_>, vm: &Vm, control: &Arc<Control>) -> Result<Self, MachineError> {
        let mut devices = Self { pio: BusBuilder::default(), input: None, resized: None, watchdog: None };
        for (index, target) in setup.config.serial.iter().enumerate() {
            if let Some(target) = target {
                devices.add_uart(index, target, setup, vm, control)?;
            }
        }
        let i8042 = I8042::default();
        devices.add(0x60, 1, "i8042 data", i8042.data_port())?;
        devices.add(0x64, 1, "i8042 command", i8042.command_port())?;
        devices.add(PORT_POST, 1, "POST code", PostPort::default())?;
        devices.add(PORT_MARK, 4, "mark", MarkPort)?;
        devices.add(PORT_PVPANIC, 1, "pvpanic", PvPanic)?;
        devices.add(PORT_SLEEP_CONTROL, 3, "ACPI power", Power::new(SLEEP_TYPE_S5, RESET_VALUE))?;
        if setup.config.debug_exit {
            devices.add(0xf4, 4, "debug exit", DebugExit)?;
        }
        if setup.config.watchdog {
            let watchdog = Arc::new(Watchdog::default());
            devices.pio.insert(
                Watchdog::BASE,
                Watchdog::LEN,
                "watchdog",
                Arc::clone(&watchdog) as Arc<dyn BusDevice>,
            )?;
            devices.watchdog = Some(watchdog);
        }
        Ok(devices)
    }

    fn add(&mut self, port: u16, len: u64, name: &str, device: impl BusDevice + 'static) -> Result<(), BusError> {
        self.pio.insert(u64::from(port), len, name, Arc::new(device))
    }

    fn add_uart(
        &mut self,
        index: usize,
        target: &ConsoleTarget,
        setup: &Setup<'_>,
        vm: &Vm,
        control: &Arc<Control>,
    ) -> Result<(), MachineError> {
        let Some(&Uart { port, gsi }) = UARTS.get(index) else { return Ok(()) };
        let interrupt = Arc::new(EventFd::new(EFD_NONBLOCK)?);
        vm.register_irqfd(&interrupt, gsi)?;
        let wanted = Arc::new(EventFd::new(EFD_NONBLOCK)?);
        let mut output = output(target, setup, control)?;
        if setup.config.tune.wants(Lever::CoalescedIo) {
            output = output.on_a_device_thread();
        }
        let uart = Arc::new(SerialPort::new(IrqLine::new(interrupt), Box::new(output), Arc::clone(&wanted)));
        if *target == ConsoleTarget::Stdio {
            self.input = Some(input(setup, Arc::clone(&uart) as _, wanted, control)?);
        }
        self.pio.insert(u64::from(port), 8, format!("UART {}", index + 1), uart)?;
        Ok(())
    }

    fn add_virtio_console(
        &mut self,
        setup: &Setup<'_>,
        control: &Arc<Control>,
        builder: &mut VirtioBuilder<'_>,
    ) -> Result<(), MachineError> {
        let Some(target) = &setup.config.console else { return Ok(()) };
        let wanted = Arc::new(EventFd::new(EFD_NONBLOCK)?);
        let output = output(target, setup, control)?.on_a_device_thread();
        let on_stdio = *target == ConsoleTarget::Stdio;
        let (columns, rows) = if on_stdio && setup.terminal { crate::console::terminal_size() } else { (0, 0) };
        let console = Console::new(Box::new(output), Arc::clone(&wanted), ConsoleSize { columns, rows })?;
        if on_stdio {
            self.input = Some(input(setup, console.port(), wanted, control)?);
            self.resized = setup.terminal.then(|| console.port());
        }
        builder.add("console".into(), Box::new(console))
    }
}

fn output(target: &ConsoleTarget, setup: &Setup<'_>, control: &Arc<Control>) -> Result<Output, MachineError> {
    let sink = match target {
        ConsoleTarget::Stdio => Sink::Stdout(File::from(io::stdout().as_fd().try_clone_to_owned()?)),
        ConsoleTarget::File(path) => {
            Sink::File(File::create(path).map_err(|error| MachineError::SerialFile(path.clone(), error))?)
        }
        ConsoleTarget::Null => Sink::Null,
    };
    let watch = Watch::new(setup.expect.clone(), setup.announcements.clone());
    Ok(Output::new(sink, watch, Arc::clone(control)))
}

fn input(
    setup: &Setup<'_>,
    port: Arc<dyn ConsoleInput>,
    wanted: Arc<EventFd>,
    control: &Arc<Control>,
) -> Result<Input, MachineError> {
    let stdin = File::from(io::stdin().as_fd().try_clone_to_owned()?);
    let keys = if setup.terminal { Keys::Escaped } else { Keys::Raw };
    Ok(Input::new(stdin, keys, port, wanted, Arc::clone(control)))
}
