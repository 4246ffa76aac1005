//! The composition root: makes a machine out of a configuration, and runs it.

mod command;
mod confine;
mod disks;
mod error;
mod files;
mod levers;
mod net;
mod request;
mod run;
mod testdev;
mod virtio;

pub use disks::{Disks, detect_disk_formats};
pub use error::MachineError;
pub use files::{Files, FilesError};
pub use net::PASST;
pub use request::StopRequest;
pub use run::{Ran, RunError, run};

use crate::boot::{self, KernelError, Loaded};
use crate::config::{ConsoleTarget, Pages, RunConfig};
use crate::console::{Announcements, Input, Keys, Output, Sink, UnreadInput, Watch};
use crate::exit::{Handler, RunEnd};
use crate::kvm::{System, Vcpu, Vm};
use crate::measure::FlightRecorders;
use crate::memory::{Backing, GuestRam};
use crate::sandbox::Sandbox;
use crate::tune::{Lever, Tune};
use crate::vcpu::Control;
use hwvmm_arch::acpi::{IoApicPins, Platform};
use hwvmm_arch::boot::BootMethod;
use hwvmm_arch::cpuid::{self, CpuidOptions};
use hwvmm_arch::layout::{
    IOAPIC, KVM_IDENTITY_MAP, KVM_TSS, PORT_COMMAND_STATUS, PORT_MARK, PORT_POST, PORT_PVPANIC, PORT_SLEEP_CONTROL,
    RESET_VALUE, SLEEP_TYPE_S5, UARTS, Uart, memory_below, ram_banks,
};
use hwvmm_arch::{Topology, lapic, msr};
use hwvmm_devices::console::ConsoleInput;
use hwvmm_devices::irq::IrqLine;
use hwvmm_devices::legacy::{
    CommandPort, DebugExit, I8042, IoApic, MarkPort, PostPort, Power, PvPanic, SerialPort, Watchdog,
};
use hwvmm_devices::virtio::console::{Console, ConsoleSize, Port};
use hwvmm_devices::virtio::vsock::Connector;
use hwvmm_devices::{BusBuilder, BusDevice, BusError};
use kvm_bindings::kvm_cpuid_entry2;
use levers::{Irqchip, VirtioMmioRegisters};
use net::Passt;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
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
    /// What looks at the lines of the consoles.
    watches: Vec<Watch>,
    /// The virtio console that reports the size of the terminal to the guest.
    resized: Option<Arc<Port>>,
    watchdog: Option<Arc<Watchdog>>,
    ram: GuestRam,
    loaded: Loaded,
    passt: Vec<Passt>,
}

/// The kind of stdin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stdin {
    /// A terminal in raw mode.
    Terminal,
    /// A pipe, a file, or nothing.
    Bytes,
}

/// A start of the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Start {
    /// The first. Files of consoles begin anew.
    First,
    /// One after a reset by the guest (`--on-reboot restart`). Files of consoles go on.
    Again {
        /// What the guest before it had not read.
        unread: UnreadInput,
    },
}

/// A step of a machine, as it happens.
pub enum Event<'a> {
    /// Something that takes long begins: what, for the user.
    Progress(&'a str),
    /// The machine is complete, and its guest is about to run.
    Started {
        /// How the kernel was loaded and how it is entered.
        boot: BootMethod,
        /// CPU time of this process so far, in nanoseconds.
        startup_cpu_ns: u64,
    },
    /// The run has ended. Its threads have yet to be stopped, and its record is yet to be made.
    Ended(&'a RunEnd),
}

/// What a machine is made and run with.
pub struct Setup<'a> {
    /// The configuration of the machine.
    pub config: &'a RunConfig,
    /// The files that the guest is loaded from.
    pub files: &'a Files,
    /// The pattern of `--expect`.
    pub expect: Option<regex::bytes::Regex>,
    /// Where the kernel's log goes whose console is on [`ConsoleTarget::Log`].
    pub kernel_log: Option<BorrowedFd<'a>>,
    /// What the guest's kernel has announced on its consoles.
    pub announcements: Announcements,
    /// The kind of stdin.
    pub stdin: Stdin,
    /// Which start of the guest it is.
    pub start: &'a Start,
    /// A SOCK_SEQPACKET socket on which requests to end the run arrive: one [`StopRequest`] in JSON each.
    pub requests: Option<BorrowedFd<'a>>,
    /// Where the flight recorders are kept.
    pub flight_recorders: &'a FlightRecorders,
    /// Asks another process for connections to sockets of the host; a vsock device with Unix sockets needs it.
    pub connector: Option<Arc<Connector>>,
    /// What the machine's process is confined to, once everything is open and before the guest runs.
    pub sandbox: Arc<Sandbox>,
    /// Called at each step.
    pub on_event: &'a dyn Fn(Event<'_>),
}

impl Machine {
    /// Makes a machine with `disks`: memory, devices, vCPUs, kernel.
    ///
    /// # Errors
    /// [`MachineError`].
    pub fn new(setup: &Setup<'_>, system: &System, disks: Disks) -> Result<Self, MachineError> {
        let config = setup.config;
        let topology =
            Topology { sockets: config.cpus.sockets, cores: config.cpus.cores, threads: config.cpus.threads };
        let apic_ids: Vec<u32> = (0..topology.cpus()).map(|index| topology.apic_id(index)).collect();
        check_vcpus(system, &apic_ids)?;
        let supported = system.supported_cpuid()?;
        check_memory(config.memory.bytes, cpuid::address_bits(supported.as_slice()))?;
        let ram = GuestRam::new(&ram_banks(config.memory.bytes), backing(config))?;
        let uarts = uarts(config);
        let mut layout = BusLayout::new(config, &setup.files.kernel)?;
        let (vm, irqchip) = create_vm(setup, system, &ram)?;
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
        builder.add_configured(config, setup.connector.as_ref(), &setup.sandbox, disks)?;
        devices.add_virtio_console(setup, &control, &mut builder)?;
        let balloon = builder.balloon.take();
        let passt = std::mem::take(&mut builder.passt);
        let most = config.memory.max_balloon_bytes();
        let serve = |path| crate::control::Server::new(path, balloon, most, Arc::clone(&control));
        let api = config.api.as_deref().map(serve).transpose()?;
        let (virtio, pages) = builder.finish(&mut devices.pio)?;
        let vcpus = create_vcpus(system, &vm, supported.as_slice(), topology, &apic_ids, &loaded, &config.tune)?;
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
            watches: devices.watches,
            resized: devices.resized,
            watchdog: devices.watchdog,
            ram,
            loaded,
            passt,
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
    let Setup { config, files, .. } = setup;
    let request = boot::Request {
        kernel: &files.kernel,
        prepared: &files.prepared,
        modules: &config.module,
        cmdline: &config.kernel_cmdline(),
        arguments: &config.multiboot_cmdline(),
        memory_bytes: config.memory.bytes,
        boot: config.boot,
        platform,
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
    let irqchip = levers::create_irqchip(&vm, config, &setup.files.kernel)?;
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
    supported: &[kvm_cpuid_entry2],
    topology: Topology,
    apic_ids: &[u32],
    loaded: &Loaded,
    tune: &Tune,
) -> Result<Vec<Vcpu>, MachineError> {
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
        vcpu.set_cpuid(&cpuid::for_vcpu(supported, &options))?;
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
#[derive(Default)]
struct Devices {
    pio: BusBuilder,
    input: Option<Input>,
    watches: Vec<Watch>,
    /// The virtio console that reports the size of the terminal to the guest.
    resized: Option<Arc<Port>>,
    watchdog: Option<Arc<Watchdog>>,
}

impl Devices {
    fn new(setup: &Setup<'_>, vm: &Vm, control: &Arc<Control>) -> Result<Self, MachineError> {
        let mut devices = Self::default();
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
        if setup.config.has_command() {
            devices.add(PORT_COMMAND_STATUS, 2, "command status", CommandPort::default())?;
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
        let mut output = self.output(target, setup, control)?;
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
        let output = self.output(target, setup, control)?.on_a_device_thread();
        let on_stdio = *target == ConsoleTarget::Stdio;
        let (columns, rows) =
            if on_stdio && setup.stdin == Stdin::Terminal { crate::console::terminal_size() } else { (0, 0) };
        let console = Console::new(Box::new(output), Arc::clone(&wanted), ConsoleSize { columns, rows })?;
        if on_stdio {
            self.input = Some(input(setup, console.port(), wanted, control)?);
            self.resized = (setup.stdin == Stdin::Terminal).then(|| console.port());
        }
        builder.add("console".into(), Box::new(console))
    }

    fn output(
        &mut self,
        target: &ConsoleTarget,
        setup: &Setup<'_>,
        control: &Arc<Control>,
    ) -> Result<Output, MachineError> {
        let sink = match target {
            ConsoleTarget::Stdio => Sink::Stdout(File::from(io::stdout().as_fd().try_clone_to_owned()?)),
            ConsoleTarget::File(path) => Sink::File(
                console_file(path, setup.start).map_err(|error| MachineError::SerialFile(path.clone(), error))?,
            ),
            ConsoleTarget::Null => Sink::Null,
            ConsoleTarget::Log => match setup.kernel_log {
                Some(log) => Sink::File(File::from(log.try_clone_to_owned()?)),
                None => Sink::Null,
            },
        };
        let watch = Watch::new(setup.expect.clone(), setup.announcements.clone());
        self.watches.push(watch.clone());
        Ok(Output::new(sink, watch, Arc::clone(control)))
    }
}

/// Opens the file of a console: empty at the first start, and then with the output of each.
fn console_file(path: &Path, start: &Start) -> io::Result<File> {
    let file = File::options().append(true).create(true).open(path)?;
    match start {
        // Not at the open: with O_APPEND, two consoles with the same file do not overwrite each other. A pipe or a terminal has no
        // length to set.
        Start::First if file.metadata()?.is_file() => file.set_len(0)?,
        Start::First | Start::Again { .. } => {}
    }
    Ok(file)
}

fn input(
    setup: &Setup<'_>,
    port: Arc<dyn ConsoleInput>,
    wanted: Arc<EventFd>,
    control: &Arc<Control>,
) -> Result<Input, MachineError> {
    let stdin = File::from(io::stdin().as_fd().try_clone_to_owned()?);
    let keys = match setup.stdin {
        Stdin::Terminal => Keys::Escaped,
        Stdin::Bytes => Keys::Raw,
    };
    let unread = match setup.start {
        Start::First => UnreadInput::default(),
        Start::Again { unread } => unread.clone(),
    };
    Ok(Input::new(stdin, keys, unread, port, wanted, Arc::clone(control))?)
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
