//! The state of a running machine, written to the files of a snapshot.

use super::disks::disk_name;
use super::net::{is_vhost, mac_of};
use super::paused::VirtioDevices;
use crate::boot::initramfs::AgentLink;
use crate::config::{
    DiskConfig, DiskFormat, NetBackend, NetConfig, RootChoice, RunConfig, ShareConfig, VsockBackend, VsockConfig,
};
use crate::control::{RequestError, Saved, Saver};
use crate::error::chain;
use crate::exit::{Handler, Outcome};
use crate::kvm::Vm;
use crate::kvm::state::VcpuState;
use crate::memory::GuestRam;
use crate::snapshot::{
    AgentDescription, Description, DiskDescription, Files, ImageFormat, Irqchip, MAX_DESCRIPTION_BYTES, NetDescription,
    RngDescription, RootKind, STATE_VERSION, ShareDescription, SocketsDescription, State, bytes_of_banks, encode,
    write_memory,
};
use crate::vcpu::Inspector;
use hwvmm_arch::boot::BootMethod;
use hwvmm_devices::legacy::{IoApic, PostPort, SerialPort, Watchdog};
use hwvmm_devices::path_text::PathText as _;
use std::error::Error;
use std::io::Write;
use std::sync::Arc;
use std::time::Instant;

/// The devices whose state a snapshot has.
#[derive(Clone, Default)]
pub(super) struct SavedDevices {
    /// In the order of their places.
    pub(super) uarts: Vec<Arc<SerialPort>>,
    pub(super) watchdog: Option<Arc<Watchdog>>,
    pub(super) io_apic: Option<Arc<IoApic>>,
    pub(super) post: Arc<PostPort>,
    pub(super) has_generation_id: bool,
}

/// What a snapshot is made from.
pub(super) struct Parts {
    pub(super) vm: Arc<Vm>,
    pub(super) ram: GuestRam,
    pub(super) handler: Arc<Handler>,
    pub(super) devices: SavedDevices,
    pub(super) virtio: Arc<VirtioDevices>,
    pub(super) boot: BootMethod,
    /// The guest was told to find registers in memory.
    pub(super) register_pages: bool,
    /// What the agent of a command reaches the host by.
    pub(super) link: AgentLink,
    /// The MSRs that make up the state of a vCPU.
    pub(super) msrs: Arc<[u32]>,
}

/// The options of devices whose state cannot be saved.
pub(super) fn unsaved(config: &RunConfig) -> Vec<&'static str> {
    // Those of --rw among them.
    let writable = config.share.iter().filter(|share| !share.read_only).count();
    let options = [
        ("a command (-- COMMAND; see --template)", config.has_command()),
        ("--seed", config.seed.is_some()),
        ("--net with vhost=on", config.net.iter().any(is_vhost)),
        ("--rw", !config.rw.is_empty()),
        ("--share without readonly=on", writable > config.rw.len()),
        ("--vsock with vhost=on", config.vsock.as_ref().is_some_and(|vsock| vsock.backend == VsockBackend::Vhost)),
        ("--testdev", config.testdev),
    ];
    options.into_iter().filter(|(_, given)| *given).map(|(option, _)| option).collect()
}

impl Parts {
    /// Returns what makes snapshots of a machine of `config`; what refuses them where it has devices without a state.
    pub(super) fn saver(self, config: &RunConfig) -> Box<Saver> {
        let options = unsaved(config).join(", ");
        if !options.is_empty() {
            return Box::new(move |_, _| Err(RequestError::Unsaved { options: options.clone() }));
        }
        let description = self.describe(config);
        Box::new(move |inspector, files| {
            self.save(&description, inspector, files)
                .map_err(|error| RequestError::Save { message: chain(error.as_ref()) })
        })
    }

    /// All but the processor.
    fn describe(&self, config: &RunConfig) -> Description {
        let places = (1..).zip(&config.serial).filter(|(_, target)| target.is_some());
        Description {
            hwvmm: env!("CARGO_PKG_VERSION").into(),
            state_version: STATE_VERSION,
            memory_bytes: config.memory.bytes,
            cpus: [config.cpus.sockets, config.cpus.cores, config.cpus.threads],
            uarts: places.map(|(place, _)| place).collect(),
            watchdog: config.watchdog,
            debug_exit: config.debug_exit,
            irqchip: if self.vm.is_split() { Irqchip::Split } else { Irqchip::Kernel },
            transport: config.transport,
            register_pages: self.register_pages,
            disks: (0..).zip(&config.disk).map(|(index, disk)| describe_disk(index, disk)).collect(),
            nets: config.net.iter().map(describe_net).collect(),
            sockets: config.vsock.as_ref().map(|vsock| self.describe_sockets(vsock)),
            shares: config.share.iter().map(describe_share).collect(),
            balloon: config.balloon.is_some(),
            rng: config.rng.map(|rng| RngDescription { bytes_per_second: rng.bytes_per_second }),
            virtio_console: config.console.is_some(),
            agent: config.template.as_ref().map(|_| AgentDescription { root: root_kind(&config.root) }),
            boot: self.boot,
            vmgenid: self.devices.has_generation_id,
            cpu_vendor: String::new(),
            cpu_features: Vec::new(),
        }
    }

    fn describe_sockets(&self, vsock: &VsockConfig) -> SocketsDescription {
        match (&vsock.backend, self.link) {
            (VsockBackend::Streams, AgentLink::Ports) => SocketsDescription::Ports,
            _ => SocketsDescription::Vsock { cid: vsock.cid },
        }
    }

    fn save(&self, description: &Description, inspector: &Inspector, files: &Files) -> Result<Saved, Box<dyn Error>> {
        // What the guest has written, and waits in the kernel or in a device.
        if let Outcome::End(end) = self.handler.flush() {
            return Err(format!("the run ends: {end}").into());
        }
        // Before the vCPUs, to which the interrupts of their last requests go.
        let virtio = self.virtio.pause()?;
        let vcpus = inspector.save(&self.msrs)?;
        // KVM_GET_NESTED_STATE is not read: what is between the guest and guests of its own would be lost.
        if vcpus.iter().any(VcpuState::runs_guests) {
            return Err(
                "the guest runs virtual machines of its own, whose state snapshots do not have yet: end them, and \
                        unload its module kvm_amd or kvm_intel"
                    .into(),
            );
        }
        let devices = &self.devices;
        // The watchdog does not run while the machine is paused.
        let now = inspector.control().paused_since().unwrap_or_else(Instant::now);
        let deadline = devices.watchdog.as_ref().and_then(|watchdog| watchdog.deadline());
        let mut state = State {
            description: description.clone(),
            vm: self.vm.save()?,
            vcpus,
            io_apic: devices.io_apic.as_ref().map(|io_apic| io_apic.save()),
            uarts: devices.uarts.iter().map(|uart| uart.save()).collect(),
            watchdog: deadline.map(|at| at.saturating_duration_since(now)),
            post: devices.post.last(),
            pci: virtio.save_bus(),
            virtio: virtio.save()?,
        };
        state.describe_processor();
        let text = format!("{}\n", serde_json::to_string_pretty(&state.description)?);
        // What no run would take is not written.
        let too_long = (text.len() as u64 > MAX_DESCRIPTION_BYTES).then_some("it is too long");
        if let Some(fault) = state.description.fault().or(too_long) {
            return Err(format!("machine.json would not be read again: {fault}").into());
        }
        let written_bytes = write_memory(&self.ram, &files.memory).map_err(|error| cannot("memory", &error))?;
        (&files.state).write_all(&encode(&state)?).map_err(|error| cannot("state", &error))?;
        (&files.description).write_all(text.as_bytes()).map_err(|error| cannot("machine.json", &error))?;
        Ok(Saved { memory_bytes: bytes_of_banks(&self.ram), written_bytes, disks: description.disks.len() })
    }
}

/// What kind of a root `root` is.
pub(super) fn root_kind(root: &RootChoice) -> RootKind {
    match root {
        RootChoice::Host => RootKind::Host,
        RootChoice::Folder(_) => RootKind::Folder,
        RootChoice::Image(_) | RootChoice::KernelImage => RootKind::Image,
        RootChoice::None => RootKind::None,
    }
}

fn describe_disk(index: usize, disk: &DiskConfig) -> DiskDescription {
    DiskDescription {
        id: disk_name(index, disk),
        path: disk.path.shown().to_string(),
        format: match disk.format {
            DiskFormat::Qcow2 | DiskFormat::DetectedQcow2 => ImageFormat::Qcow2,
            DiskFormat::Raw | DiskFormat::DetectedRaw | DiskFormat::Auto => ImageFormat::Raw,
        },
        read_only: disk.read_only,
        queues: disk.queues,
        serial: disk.serial.clone(),
    }
}

fn describe_net(net: &NetConfig) -> NetDescription {
    let mac = mac_of(net).map(|byte| format!("{byte:02x}")).join(":");
    NetDescription { mac, queues: net.queues, tap: matches!(net.backend, NetBackend::Tap { .. }) }
}

fn describe_share(share: &ShareConfig) -> ShareDescription {
    ShareDescription { tag: share.tag.clone(), path: share.path.shown().to_string() }
}

fn cannot(name: &str, error: &std::io::Error) -> String {
    format!("cannot write the file {name}: {error}")
}
