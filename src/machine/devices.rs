//! The devices that are not virtio: UARTs and their consoles, legacy ports, and the virtio console, which has a console's output too.

use super::error::MachineError;
use super::save::SavedDevices;
use super::saving_mark::SavingMark;
use super::setup::{Setup, Start, Stdin};
use super::virtio::VirtioBuilder;
use crate::config::{ConsoleTarget, Moment};
use crate::console::{Input, Keys, Output, Sink, UnreadInput, Watch};
use crate::kvm::Vm;
use crate::tune::Lever;
use crate::vcpu::Control;
use hwvmm_arch::layout::{
    PORT_COMMAND_STATUS, PORT_MARK, PORT_POST, PORT_PVPANIC, PORT_SLEEP_CONTROL, RESET_VALUE, SLEEP_TYPE_S5, UARTS,
    Uart,
};
use hwvmm_devices::console::ConsoleInput;
use hwvmm_devices::irq::IrqLine;
use hwvmm_devices::legacy::{CommandPort, DebugExit, I8042, MarkPort, PostPort, Power, PvPanic, SerialPort, Watchdog};
use hwvmm_devices::virtio::console::{Console, ConsoleSize, Port};
use hwvmm_devices::{BusBuilder, BusDevice, BusError};
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// The devices, before the bus is frozen.
#[derive(Default)]
pub(super) struct Devices {
    pub(super) pio: BusBuilder,
    /// Those whose state a snapshot has.
    pub(super) saved: SavedDevices,
    pub(super) input: Option<Input>,
    pub(super) watches: Vec<Watch>,
    /// The virtio console that reports the size of the terminal to the guest.
    pub(super) resized: Option<Arc<Port>>,
}

impl Devices {
    pub(super) fn new(setup: &Setup<'_>, vm: &Vm, control: &Arc<Control>) -> Result<Self, MachineError> {
        let mut devices = Self::default();
        for (index, target) in setup.config.serial.iter().enumerate() {
            if let Some(target) = target {
                devices.add_uart(index, target, setup, vm, control)?;
            }
        }
        let i8042 = I8042::default();
        devices.add(0x60, 1, "i8042 data", i8042.data_port())?;
        devices.add(0x64, 1, "i8042 command", i8042.command_port())?;
        let post: Arc<PostPort> = Arc::clone(&devices.saved.post);
        devices.pio.insert(PORT_POST.into(), 1, "POST code", post)?;
        match setup.config.snapshot_at.as_ref().map(|at| &at.moment) {
            Some(Moment::Mark(number)) => devices.add(PORT_MARK, 4, "mark", SavingMark::new(*number, control))?,
            Some(Moment::Line(_)) => {
                control.save_at_line();
                devices.add(PORT_MARK, 4, "mark", MarkPort)?;
            }
            None => devices.add(PORT_MARK, 4, "mark", MarkPort)?,
        }
        devices.add(PORT_PVPANIC, 1, "pvpanic", PvPanic)?;
        devices.add(PORT_SLEEP_CONTROL, 3, "ACPI power", Power::new(SLEEP_TYPE_S5, RESET_VALUE))?;
        if setup.config.debug_exit {
            devices.add(0xf4, 4, "debug exit", DebugExit)?;
        }
        if setup.config.has_agent() {
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
            devices.saved.watchdog = Some(watchdog);
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
        self.saved.uarts.push(Arc::clone(&uart));
        self.pio.insert(u64::from(port), 8, format!("UART {}", index + 1), uart)?;
        Ok(())
    }

    pub(super) fn add_virtio_console(
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
