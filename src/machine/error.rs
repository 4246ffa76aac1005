//! Why a machine cannot be made.

use crate::boot::KernelError;
use crate::kvm::KvmError;
use crate::memory::MemoryError;
use hwvmm_devices::BusError;
use hwvmm_devices::path_text::PathText as _;
use std::io;
use std::path::PathBuf;
use thiserror::Error;

/// Why a machine cannot be made.
#[derive(Debug, Error)]
pub enum MachineError {
    /// An ioctl of KVM failed.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// Guest memory cannot be made.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The kernel, the initrd or the command line cannot be loaded.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// Two devices overlap on a bus.
    #[error(transparent)]
    Bus(#[from] BusError),
    /// More vCPUs than the host's KVM has.
    #[error("this host's KVM runs at most {max} vCPUs in a machine, not {asked}: give the guest fewer with -c")]
    TooManyVcpus {
        /// The number of vCPUs that was asked for.
        asked: u32,
        /// The largest number of vCPUs that KVM allows.
        max: usize,
    },
    /// More memory than the guest's processor, which has the host's physical addresses, can address.
    #[error(
        "physical addresses have {address_bits} bits on this host (CPUID 0x80000008, as its KVM gives it to guests), which is too \
         few for {asked} bytes of guest memory and the hole below 4 GiB: -m {most_mib}M is the most"
    )]
    TooMuchMemory {
        /// The size that was asked for, in bytes.
        asked: u64,
        /// The number of bits of a physical address.
        address_bits: u32,
        /// The largest size that fits, in MiB.
        most_mib: u64,
    },
    /// KVM does not have a capability that an option needs.
    #[error("this host's KVM does not have {capability}, which --{option} needs")]
    Missing {
        /// Name of the capability (KVM_CAP_*), and the first Linux that has it.
        capability: &'static str,
        /// Name of the option.
        option: &'static str,
    },
    /// The file for a console's output cannot be created.
    #[error("cannot open {} for the serial port's output", .0.shown())]
    SerialFile(PathBuf, #[source] io::Error),
    /// A disk image cannot be opened.
    #[error(transparent)]
    Disk(#[from] hwvmm_devices::virtio::block::ImageError),
    /// The disk of `--seed` cannot be made.
    #[error(transparent)]
    Seed(#[from] super::seed::SeedError),
    /// A tap interface cannot be opened.
    #[error(transparent)]
    Tap(#[from] hwvmm_devices::virtio::net::TapError),
    /// A shared folder cannot be opened.
    #[error(transparent)]
    Share(#[from] hwvmm_devices::virtio::fs::ShareError),
    /// The socket of the vsock device cannot be made.
    #[error(transparent)]
    Vsock(#[from] hwvmm_devices::virtio::vsock::VsockError),
    /// The control socket cannot be made.
    #[error(transparent)]
    Api(#[from] crate::control::ListenError),
    /// The vhost-net device of the host cannot be used.
    #[error("vhost=on needs /dev/vhost-net: load the module (modprobe vhost_net), and check its permissions")]
    Vhost(#[source] hwvmm_devices::virtio::net::VhostNetError),
    /// The vsock device has no process that connects to sockets of the host.
    #[error("the vsock device has no process that connects for it; this is a bug in hwvmm")]
    NoConnector,
    /// The vhost-vsock device of the host cannot be used.
    #[error(
        "vsock with vhost=on needs /dev/vhost-vsock (modprobe vhost_vsock; check its permissions) and a cid of its own"
    )]
    VhostVsock(#[source] hwvmm_devices::virtio::vsock::KernelVsockError),
    /// The program passt, for user-mode networking, cannot be started.
    #[error("--net user needs the program passt{}", Self::passt_remedy(.0))]
    Passt(#[source] io::Error),
    /// A virtio device cannot be put on its transport.
    #[error(transparent)]
    Transport(#[from] hwvmm_devices::virtio::TransportError),
    /// The pages with PCI configuration spaces cannot be mapped.
    #[error(transparent)]
    Page(#[from] hwvmm_devices::page::PageError),
    /// There are more devices than the bus takes.
    #[error("{asked} virtio devices are too many: {bus} takes {max}")]
    TooManyDevices {
        /// The number of devices that was asked for.
        asked: usize,
        /// The largest number of devices on the bus.
        max: usize,
        /// The name of the bus.
        bus: &'static str,
    },
    /// The processor of a snapshot is not to be had.
    #[error("the snapshot cannot be used on this host")]
    SnapshotProcessor(#[from] crate::snapshot::FeatureError),
    /// The state of a snapshot has vCPUs with other APIC ids than the machine.
    #[error("the snapshot cannot be used: its vCPUs have other APIC ids than those of its machine")]
    SnapshotIds,
    /// The state of a snapshot has an I/O APIC, and the machine none, or the other way round.
    #[error("the snapshot cannot be used: its I/O APIC is not that of its machine")]
    SnapshotIoApic,
    /// The state of the I/O APIC in a snapshot.
    #[error("the snapshot cannot be used")]
    SnapshotPins(#[from] hwvmm_devices::legacy::IoApicStateError),
    /// The state of a UART in a snapshot.
    #[error("the snapshot cannot be used")]
    SnapshotUart(#[from] hwvmm_devices::legacy::UartStateError),
    /// The state of a virtio device in a snapshot.
    #[error(transparent)]
    SnapshotVirtio(#[from] hwvmm_devices::virtio::VirtioStateError),
    /// The state of the PCI bus in a snapshot.
    #[error("the snapshot cannot be used: its state of the PCI bus is none")]
    SnapshotPci,
    /// A file descriptor cannot be made.
    #[error("cannot get a file descriptor")]
    Fd(#[from] io::Error),
}

impl MachineError {
    /// What the user can do when passt cannot be started.
    fn passt_remedy(error: &io::Error) -> &'static str {
        if error.kind() == io::ErrorKind::NotFound { ": it is not installed (apt install passt)" } else { "" }
    }
}
