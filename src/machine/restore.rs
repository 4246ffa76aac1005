//! A machine that goes on from a snapshot.

use super::error::MachineError;
use super::net::is_vhost;
use super::save::{SavedDevices, root_kind};
use crate::config::{
    BalloonConfig, ConsoleTarget, DiskConfig, DiskFormat, NetBackend, NetConfig, ROOT_TAG, RngConfig, RunConfig,
    ShareConfig, VsockBackend, VsockConfig,
};
use crate::escape::escape;
use crate::kvm::{Vcpu, Vm};
use crate::snapshot::{
    AgentDescription, Description, DiskDescription, ImageFormat, NetDescription, RootKind, ShareDescription,
    SocketsDescription, State, check_features,
};
use hwvmm_devices::path_text::PathText as _;
use hwvmm_devices::virtio::vsock::FIRST_CID;
use kvm_bindings::kvm_cpuid_entry2;
use std::collections::BTreeSet;
use std::path::PathBuf;
use thiserror::Error;

/// The most bytes of a name in a message.
const MAX_NAME: usize = 200;

/// What is given does not fit to the machine of a snapshot.
#[derive(Debug, Error)]
pub enum Mismatch {
    /// Another number of disks.
    #[error(
        "the snapshot has {} disks{}, and {given} were given: give the image of each with --disk, in this order; it has to be as it was \
         when the snapshot was made", names.len(), Self::listed(names)
    )]
    Disks {
        /// The names of its disks, and the paths that they had.
        names: Vec<String>,
        /// The number of those that were given.
        given: usize,
    },
    /// A disk of another format.
    #[error("the snapshot's disk {name} is of the format {expected}, and {} is not: give the image that it had, or format={expected}", path.shown())]
    Format {
        /// The name of the disk.
        name: String,
        /// The format that it had.
        expected: &'static str,
        /// The path that was given.
        path: PathBuf,
    },
    /// An option of a disk that the guest knows.
    #[error("--disk {}: the snapshot's disk {name} has another {key}: leave it out", path.shown())]
    Disk {
        /// The name of the disk.
        name: String,
        /// The path that was given.
        path: PathBuf,
        /// The key of the option.
        key: &'static str,
    },
    /// Two disks with the same id.
    #[error("--disk: two disks have the id {id}, which may be the snapshot's: give another one, or none")]
    Id {
        /// The id that both disks have.
        id: String,
    },
    /// The guest has another way to the host's sockets, or none.
    #[error("the snapshot {0}")]
    Sockets(&'static str),
    /// A folder is missing.
    #[error("the snapshot has the shared folder {tag}, which the guest cannot write: give it with --share tag={tag},path=DIR{}", if *.is_root { " (that of a command with --root)" } else { "" })]
    NoShare {
        /// The tag by which the guest knows it.
        tag: String,
        /// It is the root of a command.
        is_root: bool,
    },
    /// A folder that the guest does not have.
    #[error("--share tag={tag}: the snapshot has no such shared folder: leave it out")]
    NewShare {
        /// The tag that was given.
        tag: String,
    },
    /// Another number of network cards.
    #[error(
        "the snapshot has {expected} network cards, and {given} were given: connect each of them with --net, in the same order"
    )]
    Nets {
        /// The number of its cards.
        expected: usize,
        /// The number of those that were given.
        given: usize,
    },
    /// The guest waits for a command, and there is none.
    #[error(
        "the snapshot is a template, whose guest waits for a command: give it one, as in hwvmm run --from DIR -- COMMAND"
    )]
    NeedsCommand,
    /// There is a command, and no agent waits for it.
    #[error(
        "the snapshot has no guest that waits for a command: leave the COMMAND out, or make a template with hwvmm run KERNEL \
         --template DIR"
    )]
    NoAgent,
    /// A root of another kind.
    #[error("the template's root is {expected}: {remedy}")]
    Root {
        /// What it is.
        expected: &'static str,
        /// What to do.
        remedy: &'static str,
    },
    /// A network card that is connected in another way than the guest knows it.
    #[error("--net: network card {number} of the snapshot {what}")]
    Net {
        /// Which one, counted from 1.
        number: usize,
        /// What it needs.
        what: &'static str,
    },
}

impl Mismatch {
    fn listed(names: &[String]) -> String {
        if names.is_empty() { String::new() } else { format!(" ({})", names.join(", ")) }
    }
}

/// Gives `config` what the machine of a snapshot has: memory, vCPUs, devices. The images of disks are those of `config`: nothing in a
/// snapshot, which a guest may have had a hand in, decides what is opened.
///
/// # Errors
/// [`Mismatch`].
pub fn configure(config: &mut RunConfig, description: &Description) -> Result<(), Mismatch> {
    check_agent(config, description.agent)?;
    config.memory.bytes = description.memory_bytes;
    config.cpus = description.vcpus();
    config.watchdog = description.watchdog;
    config.debug_exit = description.debug_exit;
    config.transport = description.transport;
    config.balloon = description.balloon.then(BalloonConfig::default);
    config.rng = description.rng.map(|rng| RngConfig { bytes_per_second: rng.bytes_per_second });
    let has_command = config.has_command();
    // Stdout is a command's; the kernel's log may be on any console.
    let other = || if has_command { ConsoleTarget::Log } else { ConsoleTarget::Null };
    for (place, target) in (1_u8..).zip(&mut config.serial) {
        let there = description.uarts.contains(&place);
        connect(target, there, other, || format!("UART {place}"));
    }
    connect(&mut config.console, description.virtio_console, other, || "virtio console".into());
    config.vsock = sockets(config.vsock.take(), description.sockets).map_err(Mismatch::Sockets)?;
    config.share = shares(std::mem::take(&mut config.share), &description.shares)?;
    let (expected, given) = (description.nets.len(), config.net.len());
    if expected != given {
        return Err(Mismatch::Nets { expected, given });
    }
    for (number, (net, described)) in (1..).zip(config.net.iter_mut().zip(&description.nets)) {
        configure_net(net, described).map_err(|what| Mismatch::Net { number, what })?;
    }
    if config.disk.len() != description.disks.len() {
        let names = description
            .disks
            .iter()
            .map(|disk| format!("{}: {}", escape(&disk.id, MAX_NAME), escape(&disk.path, MAX_NAME)))
            .collect();
        return Err(Mismatch::Disks { names, given: config.disk.len() });
    }
    config.disk.iter_mut().zip(&description.disks).try_for_each(|(disk, described)| configure_disk(disk, described))?;
    // An id that was given may be that of another disk of the snapshot.
    let mut ids = BTreeSet::new();
    match config.disk.iter().filter_map(|disk| disk.id.as_deref()).find(|id| !ids.insert(*id)) {
        Some(id) => Err(Mismatch::Id { id: escape(id, MAX_NAME) }),
        None => Ok(()),
    }
}

/// Checks that a command is for a guest that waits for one, and that its root is of the same kind. Which folder or image that is, the options
/// say alone.
fn check_agent(config: &RunConfig, agent: Option<AgentDescription>) -> Result<(), Mismatch> {
    let agent = match (agent, config.has_command()) {
        (None, false) => return Ok(()),
        (None, true) => return Err(Mismatch::NoAgent),
        (Some(_), false) => return Err(Mismatch::NeedsCommand),
        (Some(agent), true) => agent,
    };
    if root_kind(&config.root) == agent.root {
        return Ok(());
    }
    let (expected, remedy) = match agent.root {
        RootKind::Host => ("that of the host", "leave --root out"),
        RootKind::Folder => ("a folder", "give the same one again with --root DIR"),
        RootKind::Image => ("a disk image", "give the same one again with --root IMAGE"),
        RootKind::None => ("the initramfs", "give --root none"),
    };
    Err(Mismatch::Root { expected, remedy })
}

/// Returns what the guest's sockets are connected to, or why they cannot be. Without `given`, to nothing but the streams of a command.
fn sockets(
    given: Option<VsockConfig>,
    described: Option<SocketsDescription>,
) -> Result<Option<VsockConfig>, &'static str> {
    let streams = |cid| VsockConfig { cid, backend: VsockBackend::Streams };
    let backend = given.as_ref().map(|given| &given.backend);
    Ok(match (described, backend) {
        (None, None) => None,
        (None, Some(VsockBackend::Streams)) => return Err("is of a machine that has nothing to run a COMMAND by"),
        (None, Some(_)) => return Err("has no socket device: leave --vsock out"),
        (Some(SocketsDescription::Ports), None | Some(VsockBackend::Streams)) => Some(streams(FIRST_CID)),
        (Some(SocketsDescription::Ports), Some(_)) => {
            return Err("has ports for the streams of its command, and no socket device: leave --vsock out");
        }
        (Some(SocketsDescription::Vsock { .. }), Some(VsockBackend::Vhost)) => {
            return Err("has a socket device of hwvmm's own: give --vsock uds=PATH");
        }
        // The guest knows its context ID.
        (Some(SocketsDescription::Vsock { cid }), Some(_)) => given.map(|given| VsockConfig { cid, ..given }),
        (Some(SocketsDescription::Vsock { cid }), None) => Some(streams(cid)),
    })
}

/// Returns the folders of `given` in the order in which the guest has them.
fn shares(mut given: Vec<ShareConfig>, described: &[ShareDescription]) -> Result<Vec<ShareConfig>, Mismatch> {
    let mut shares = Vec::new();
    for ShareDescription { tag, .. } in described {
        let Some(place) = given.iter().position(|share| share.tag == *tag) else {
            return Err(Mismatch::NoShare { tag: escape(tag, MAX_NAME), is_root: tag == ROOT_TAG });
        };
        // The guest has mounted it as one that it cannot write.
        shares.push(ShareConfig { read_only: true, privileged_files: false, ..given.remove(place) });
    }
    match given.into_iter().next() {
        Some(share) => Err(Mismatch::NewShare { tag: share.tag }),
        None => Ok(shares),
    }
}

/// A console that was not given is connected to `other`.
fn connect(
    target: &mut Option<ConsoleTarget>,
    there: bool,
    other: impl Fn() -> ConsoleTarget,
    name: impl Fn() -> String,
) {
    match (there, &target) {
        (true, None) => *target = Some(other()),
        (false, Some(_)) => {
            log::info!("the machine of the snapshot has no {}", name());
            *target = None;
        }
        _ => {}
    }
}

/// Returns what the card needs.
fn configure_net(net: &mut NetConfig, described: &NetDescription) -> Result<(), &'static str> {
    let is_tap = matches!(net.backend, NetBackend::Tap { .. });
    if described.tap && !is_tap {
        return Err("needs a tap interface, whose offloads the guest uses");
    } else if is_vhost(net) {
        return Err("cannot be one with vhost=on");
    } else if net.mac.is_some() {
        return Err("has its hardware address: leave mac out");
    } else if net.queues != described.queues && (net.queues != 1 || !is_tap) {
        return Err("has another number of queues: leave queues out, and give it a tap interface");
    }
    net.queues = described.queues;
    Ok(())
}

fn configure_disk(disk: &mut DiskConfig, described: &DiskDescription) -> Result<(), Mismatch> {
    let name = || escape(&described.id, MAX_NAME);
    let is_qcow2 = matches!(disk.format, DiskFormat::Qcow2 | DiskFormat::DetectedQcow2);
    if is_qcow2 != (described.format == ImageFormat::Qcow2) {
        let expected = if is_qcow2 { "raw" } else { "qcow2" };
        return Err(Mismatch::Format { name: name(), expected, path: disk.path.clone() });
    }
    let wrong = [
        ("readonly", disk.read_only && !described.read_only),
        ("queues", disk.queues != 1 && disk.queues != described.queues),
        ("serial", !disk.serial.is_empty() && disk.serial != described.serial),
    ];
    if let Some((key, _)) = wrong.into_iter().find(|(_, wrong)| *wrong) {
        return Err(Mismatch::Disk { name: name(), path: disk.path.clone(), key });
    }
    disk.read_only = described.read_only;
    disk.queues = described.queues;
    disk.serial.clone_from(&described.serial);
    disk.id.get_or_insert_with(|| described.id.clone());
    Ok(())
}

/// Creates the vCPUs, which have to have the features that the guest was told of.
pub(super) fn vcpus(
    vm: &Vm,
    state: &State,
    supported: &[kvm_cpuid_entry2],
    apic_ids: &[u32],
) -> Result<Vec<Vcpu>, MachineError> {
    if !state.vcpus.iter().map(|vcpu| &vcpu.id).eq(apic_ids) {
        return Err(MachineError::SnapshotIds);
    }
    state.vcpus.iter().try_for_each(|vcpu| check_features(&vcpu.cpuid, supported))?;
    let vcpus = apic_ids.iter().map(|id| vm.create_vcpu(*id)).collect::<Result<Vec<_>, _>>()?;
    vcpus.iter().zip(&state.vcpus).try_for_each(|(vcpu, state)| vcpu.restore(state))?;
    Ok(vcpus)
}

/// Sets the state of KVM's chips and of the devices. To be called when the vCPUs are there, and nothing runs yet.
pub(super) fn devices(vm: &Vm, state: &State, devices: &SavedDevices) -> Result<(), MachineError> {
    vm.restore(&state.vm)?;
    match (&devices.io_apic, &state.io_apic) {
        (Some(io_apic), Some(state)) => io_apic.restore(state)?,
        (None, None) => {}
        _ => return Err(MachineError::SnapshotIoApic),
    }
    if let Some(watchdog) = &devices.watchdog {
        watchdog.restore(state.watchdog);
    }
    devices.post.restore(state.post);
    // Last: their interrupts go to the chips.
    devices.uarts.iter().zip(&state.uarts).try_for_each(|(uart, state)| uart.restore(state))?;
    Ok(())
}
