//! Why a machine cannot be made.

use crate::boot::KernelError;
use crate::kvm::KvmError;
use crate::memory::MemoryError;
use hwvmm_devices::BusError;
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
    /// KVM does not have a capability that an option needs.
    #[error("this host's KVM does not have {0}, which --{1} needs")]
    Missing(&'static str, &'static str),
    /// The file for a console's output cannot be created.
    #[error("cannot open {} for the serial port's output", .0.display())]
    SerialFile(PathBuf, #[source] io::Error),
    /// A disk image cannot be opened.
    #[error(transparent)]
    Disk(#[from] hwvmm_devices::virtio::block::ImageError),
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
    #[error("vhost=on needs /dev/vhost-net: is the module loaded (modprobe vhost_net), and may you open it?")]
    Vhost(#[source] hwvmm_devices::virtio::net::VhostNetError),
    /// The vhost-vsock device of the host cannot be used.
    #[error(
        "vsock with vhost=on needs /dev/vhost-vsock (modprobe vhost_vsock, and may you open it?) and a cid of its own"
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
    /// A file descriptor cannot be made.
    #[error("cannot get a file descriptor")]
    Fd(#[from] io::Error),
}

impl MachineError {
    /// What mends it when passt cannot be started.
    fn passt_remedy(error: &io::Error) -> &'static str {
        if error.kind() == io::ErrorKind::NotFound { ": it is not installed (apt install passt)" } else { "" }
    }
}
