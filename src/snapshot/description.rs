//! What a machine is: the readable part of a snapshot (`machine.json`), and what a restored run has to have as well.

use crate::config::{Cpus, MAX_MEMORY_BYTES, MAX_QUEUES, MIN_MEMORY_BYTES, Transport};
use crate::escape::is_active;
use hwvmm_arch::boot::BootMethod;
use hwvmm_arch::layout::UARTS;
use hwvmm_devices::virtio::vsock::FIRST_CID;
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;

/// Where a machine's I/O APIC is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Irqchip {
    /// In KVM, with two PICs.
    Kernel,
    /// In hwvmm.
    Split,
}

/// The format of a disk's image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ImageFormat {
    /// The sectors of the disk, one after the other.
    Raw,
    /// qcow2.
    Qcow2,
}

/// A disk. Its image is not a part of the snapshot: a run names it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskDescription {
    /// Its name in counts and logs.
    pub id: String,
    /// The path that its image had, for people: it decides nothing.
    pub path: String,
    /// The format of its image.
    pub format: ImageFormat,
    /// The guest cannot write it.
    pub read_only: bool,
    /// The number of its queues.
    pub queues: u16,
    /// The serial number that the guest sees.
    pub serial: String,
}

/// A network card. What it is connected to is a run's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetDescription {
    /// Its hardware address, for people: the state has it.
    pub mac: String,
    /// The number of its queue pairs.
    pub queues: u16,
    /// It was connected to a tap interface, whose offloads the guest may use.
    pub tap: bool,
}

/// What connects sockets or streams of the guest to the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", deny_unknown_fields)]
pub enum SocketsDescription {
    /// The socket device.
    Vsock {
        /// The context ID of the guest.
        cid: u32,
    },
    /// The console with the ports of a command's streams.
    Ports,
}

/// A folder of the host that the guest can mount. A run names it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShareDescription {
    /// The tag by which the guest mounts it.
    pub tag: String,
    /// The path that it had, for people: it decides nothing.
    pub path: String,
}

/// The entropy device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RngDescription {
    /// The largest number of bytes a second.
    pub bytes_per_second: Option<u64>,
}

/// The root of a guest that waits for commands. What it is connected to is a run's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RootKind {
    /// The root of the host.
    Host,
    /// A folder of the host.
    Folder,
    /// A disk.
    Image,
    /// The root stays the initramfs that the guest booted with.
    None,
}

/// The agent of a guest that waits for commands (`--template`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AgentDescription {
    /// The root that commands find.
    pub root: RootKind,
}

/// The most disks, and the most network cards, as a PCI bus has 31 places.
const MAX_DISKS: usize = 31;
/// The longest text of a disk in bytes: paths are shorter.
const MAX_TEXT: usize = 8192;
/// The longest name or serial number of a disk in bytes.
const MAX_NAME: usize = 256;

/// The longest tag of a shared folder in bytes (virtio 1.3 §5.11.4).
const MAX_TAG: usize = 36;

/// What a machine is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Description {
    /// The version of hwvmm that made the snapshot.
    pub hwvmm: String,
    /// The version of the state's format ([`super::STATE_VERSION`]).
    pub state_version: u32,
    /// The size of guest memory in bytes.
    pub memory_bytes: u64,
    /// Sockets, cores of a socket, and threads of a core.
    pub cpus: [u32; 3],
    /// The machine has a UART at these places (1 is COM1).
    pub uarts: Vec<u8>,
    /// The machine has a watchdog (`--watchdog`).
    pub watchdog: bool,
    /// The machine has isa-debug-exit (`--debug-exit`).
    pub debug_exit: bool,
    /// Where the I/O APIC is.
    pub irqchip: Irqchip,
    /// How virtio devices are connected.
    pub transport: Transport,
    /// The guest was told to find registers in memory that it can read by itself.
    pub register_pages: bool,
    /// The disks, in their order.
    pub disks: Vec<DiskDescription>,
    /// The network cards, in their order.
    pub nets: Vec<NetDescription>,
    /// What connects sockets or streams of the guest to the host, where there is something.
    pub sockets: Option<SocketsDescription>,
    /// The folders of the host that the guest can mount and not write, in their order.
    pub shares: Vec<ShareDescription>,
    /// The machine has a memory balloon.
    pub balloon: bool,
    /// The entropy device, where there is one.
    pub rng: Option<RngDescription>,
    /// The machine has a virtio console.
    pub virtio_console: bool,
    /// The guest waits for commands.
    pub agent: Option<AgentDescription>,
    /// How the kernel was loaded.
    pub boot: BootMethod,
    /// The machine has a generation identifier (VMGenID).
    pub vmgenid: bool,
    /// The vendor of the processor, as CPUID has it.
    pub cpu_vendor: String,
    /// Features of the processor that the guest was told of, those that have a name here.
    pub cpu_features: Vec<String>,
}

impl DiskDescription {
    /// Returns true if no machine has such a disk.
    fn is_none(&self) -> bool {
        !(1..=MAX_QUEUES).contains(&self.queues)
            || self.path.len() > MAX_TEXT
            || self.id.is_empty()
            || [&self.id, &self.serial].iter().any(|name| name.len() > MAX_NAME || name.chars().any(is_active))
    }
}

impl ShareDescription {
    /// Returns true if no machine has such a folder.
    fn is_none(&self) -> bool {
        let tag = &self.tag;
        tag.is_empty() || tag.len() > MAX_TAG || tag.chars().any(is_active) || self.path.len() > MAX_TEXT
    }
}

/// Returns true if a name comes twice.
fn repeats<'a>(mut names: impl Iterator<Item = &'a String>) -> bool {
    let mut seen = BTreeSet::new();
    names.any(|name| !seen.insert(name))
}

impl Description {
    /// The vCPUs as a configuration has them.
    #[must_use]
    pub fn vcpus(&self) -> Cpus {
        let [sockets, cores, threads] = self.cpus;
        Cpus { sockets, cores, threads }
    }

    /// The number of virtio devices.
    #[must_use]
    pub fn virtio_devices(&self) -> usize {
        let single = [self.rng.is_some(), self.sockets.is_some(), self.balloon, self.virtio_console];
        self.disks.len() + self.nets.len() + self.shares.len() + single.into_iter().filter(|there| *there).count()
    }

    /// Returns what is wrong with it, in English; `None` where a machine can be made from it.
    #[must_use]
    pub fn fault(&self) -> Option<&'static str> {
        let [sockets, cores, threads] = self.cpus.map(u64::from);
        let vcpus = sockets.saturating_mul(cores).saturating_mul(threads);
        if !(MIN_MEMORY_BYTES..=MAX_MEMORY_BYTES).contains(&self.memory_bytes)
            || !self.memory_bytes.is_multiple_of(4096)
        {
            Some("its size of memory is none that a machine has")
        } else if !(1..=u64::from(crate::config::MAX_CPUS)).contains(&vcpus) {
            Some("its number of vCPUs is none that a machine has")
        } else if !self.uarts.is_sorted_by(|one, next| one < next)
            || !self.uarts.iter().all(|uart| (1..=UARTS.len()).contains(&usize::from(*uart)))
        {
            Some("its UARTs are none that a machine has")
        } else if self.disks.len() > MAX_DISKS || self.disks.iter().any(DiskDescription::is_none) {
            Some(
                "its disks are none that a machine has: the names or serial numbers may be too long, or have control characters",
            )
        } else if repeats(self.disks.iter().map(|disk| &disk.id))
            || repeats(self.disks.iter().map(|disk| &disk.serial).filter(|serial| !serial.is_empty()))
        {
            Some("two of its disks have the same name or serial number")
        } else if self.nets.len() > MAX_DISKS
            || self.nets.iter().any(|net| !(1..=MAX_QUEUES).contains(&net.queues) || net.mac.len() > MAX_TEXT)
        {
            Some("its network cards are none that a machine has")
        } else if matches!(self.sockets, Some(SocketsDescription::Vsock { cid }) if cid < FIRST_CID) {
            Some("its socket device has a context ID that no guest has")
        } else if self.shares.len() > MAX_DISKS || self.shares.iter().any(ShareDescription::is_none) {
            Some(
                "its shared folders are none that a machine has: their tags may be too long, or have control characters",
            )
        } else if repeats(self.shares.iter().map(|share| &share.tag)) {
            Some("two of its shared folders have the same tag")
        } else if self.rng.is_some_and(|rng| rng.bytes_per_second == Some(0)) {
            Some("its entropy device gives nothing")
        } else {
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk(id: &str, serial: &str) -> DiskDescription {
        let (path, format) = ("/images/a".into(), ImageFormat::Raw);
        DiskDescription { id: id.into(), path, format, read_only: false, queues: 1, serial: serial.into() }
    }

    #[test]
    fn names_of_disks_are_checked() {
        let fault = |disks: Vec<DiskDescription>| {
            let description = Description { disks, ..Description::of_tests() };
            description.fault()
        };
        assert_eq!(fault(vec![disk("disk0", ""), disk("disk1", ""), disk("root", "root")]), None);
        let long = "x".repeat(257);
        for bad in ["", "\0", "a\nb", "\x1b[2J", "\u{202e}", &long] {
            let fault = fault(vec![disk(bad, "")]).expect("refused");
            assert!(fault.contains("its disks"), "{fault}");
        }
        assert!(fault(vec![disk("disk0", "a\0")]).is_some());
        for twice in [vec![disk("a", "x"), disk("b", "x")], vec![disk("a", ""), disk("a", "")]] {
            assert!(fault(twice).expect("refused").contains("same name"));
        }
    }

    impl Description {
        pub(in crate::snapshot) fn of_tests() -> Self {
            use hwvmm_arch::boot::{Decompressor, EntryProtocol};
            Self {
                hwvmm: "0.1.0".into(),
                state_version: 1,
                memory_bytes: 16 << 20,
                cpus: [1, 1, 1],
                uarts: vec![1],
                watchdog: false,
                debug_exit: false,
                irqchip: Irqchip::Kernel,
                transport: Transport::Mmio,
                register_pages: false,
                disks: Vec::new(),
                nets: Vec::new(),
                sockets: None,
                shares: Vec::new(),
                balloon: false,
                rng: None,
                virtio_console: false,
                agent: None,
                boot: BootMethod { decompressor: Decompressor::None, protocol: EntryProtocol::Multiboot },
                vmgenid: false,
                cpu_vendor: String::new(),
                cpu_features: Vec::new(),
            }
        }
    }
}
