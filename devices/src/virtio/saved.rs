//! The state of a device and its transport, as plain data, for snapshots. What is read from a file is as hostile as what a driver
//! writes: it is checked in the same way before it is used.

use super::queue::RingAddresses;
use crate::pci::{ConfigSpaceState, MsixState};
use serde::de::{Error as _, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};
use std::error::Error;
use std::fmt;
use std::io;
use std::marker::PhantomData;
use std::sync::Arc;
use thiserror::Error;

/// The most queues that a state may have; no device has as many.
pub const MAX_QUEUES: usize = 64;

/// A device on its transport that is paused: no worker has its queues.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VirtioState {
    /// The virtio device ID (virtio 1.3 §5).
    pub kind: u16,
    /// The device status (virtio 1.3 §2.1), without `DEVICE_NEEDS_RESET`.
    pub status: u8,
    /// `DEVICE_NEEDS_RESET` is set.
    pub needs_reset: bool,
    /// The configuration generation (virtio 1.3 §2.5).
    pub config_generation: u32,
    /// The feature bits that the driver has accepted, those that it has written so far.
    pub driver_features: u64,
    /// The feature selectors: device, driver.
    pub feature_selectors: [u32; 2],
    /// The queue that the queue registers access.
    pub queue_select: u16,
    /// The queues, by index.
    pub queues: Vec<QueueState>,
    /// What the device itself has.
    pub device: DeviceState,
    /// What only this kind of transport has.
    pub bus: BusState,
}

/// A queue as its driver has configured it, and where the device is in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueState {
    /// The size that the driver chose, in descriptors.
    pub size: u16,
    /// The driver has enabled the queue.
    pub ready: bool,
    /// Where its rings are.
    pub rings: RingAddresses,
    /// The index in the available ring of the chain that the device takes next.
    pub next_available: u16,
    /// The index in the used ring of the next chain that the device uses.
    pub next_used: u16,
}

/// What a device has besides its queues.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum DeviceState {
    /// The entropy device has nothing.
    Rng,
    /// The console has nothing: input that the guest has not taken is the host's.
    Console,
    /// A shared directory that the guest cannot write.
    Share(ShareState),
    /// The socket device.
    Vsock(VsockState),
    /// The console with ports that are no consoles.
    Ports(PortsState),
    /// A disk.
    Block(DiskState),
    /// A memory balloon.
    Balloon {
        /// The size in pages of 4 KiB that the guest is asked for (`num_pages`, virtio 1.3 §5.5.4).
        target_pages: u32,
        /// The size that it has reported (`actual`).
        actual_pages: u32,
    },
    /// A network card.
    Net {
        /// Its hardware address.
        mac: [u8; 6],
        /// The number of queue pairs that the driver uses (virtio 1.3 §5.1.6.5.5).
        active_pairs: u16,
    },
}

/// What the socket device has. Its connections are none of it: they are gone, and the guest is told so (`TRANSPORT_RESET`,
/// virtio 1.3 §5.10.6.7).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VsockState {
    /// The context ID of the guest.
    pub cid: u32,
    /// The connections that the guest has asked for and has no answer to. They are refused, as a guest that is told that all connections
    /// are gone may still wait for these.
    pub unanswered: Vec<PortPair>,
}

/// A connection of the socket device, by its ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortPair {
    /// The port of the host.
    pub host: u32,
    /// The port of the guest.
    pub guest: u32,
}

/// What a guest knows of a shared directory that it cannot write, and has open in it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShareState {
    /// The guest may use extended attributes.
    pub has_attributes: bool,
    /// The shared directory.
    pub root: FileId,
    /// The files that the guest knows, each directory before what is in it.
    #[serde(deserialize_with = "share_nodes")]
    pub nodes: Vec<ShareNode>,
    /// The files and directories that it has open.
    #[serde(deserialize_with = "share_handles")]
    pub handles: Vec<ShareHandle>,
}

/// A file that the guest knows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShareNode {
    /// The number by which the guest knows it (`nodeid`).
    pub number: u64,
    /// How often the guest has looked it up, without what it has taken back by FORGET.
    pub lookups: u64,
    /// What tells it from others.
    pub file: FileId,
    /// Where it is found; `None` where it cannot be.
    pub place: Option<NodePlace>,
}

/// Where a file is found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodePlace {
    /// The number of its directory; 1 is the shared one.
    pub parent: u64,
    /// Its name there.
    pub name: Vec<u8>,
}

/// By what a file of a shared directory is told from others.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileId {
    /// The number of the device that has it (`st_dev`).
    pub device: u64,
    /// Its number there (`st_ino`).
    pub inode: u64,
    /// What it is (the `S_IFMT` bits of `st_mode`).
    pub kind: u32,
    /// Of a symbolic link, when it was made, in nanoseconds since 1970; 0 of others. Its target cannot change but with the link, whose number
    /// another link may get.
    pub link_made_ns: i64,
}

/// A file or a directory that the guest has open.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShareHandle {
    /// The number by which the guest knows it (`fh`).
    pub number: u64,
    /// The number of the file.
    pub node: u64,
    /// The flags of open(2).
    pub flags: u32,
    /// What tells its content from what it was.
    pub content: FileContent,
}

/// By what the content of a file is told from what it was; nothing for a directory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileContent {
    /// Its size in bytes.
    pub bytes: u64,
    /// When it was written last: seconds and nanoseconds since 1970.
    pub modified: (i64, i64),
}

/// The most files of a share in a state, and the most that are open.
const MAX_SHARE_NODES: usize = 1 << 18;
const MAX_SHARE_HANDLES: usize = 1 << 14;

fn share_nodes<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<ShareNode>, D::Error> {
    deserializer.deserialize_seq(AtMost::<ShareNode, MAX_SHARE_NODES>(PhantomData))
}

fn share_handles<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<ShareHandle>, D::Error> {
    deserializer.deserialize_seq(AtMost::<ShareHandle, MAX_SHARE_HANDLES>(PhantomData))
}

/// A list of at most `N` items, each of which takes much more memory than it has bytes in a file.
struct AtMost<T, const N: usize>(PhantomData<T>);

impl<'de, T: Deserialize<'de>, const N: usize> Visitor<'de> for AtMost<T, N> {
    type Value = Vec<T>;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "at most {N} items")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Vec<T>, A::Error> {
        let mut all = Vec::new();
        while let Some(item) = items.next_element()? {
            if all.len() >= N {
                return Err(A::Error::invalid_length(all.len(), &self));
            }
            all.push(item);
        }
        Ok(all)
    }
}

/// What a console with ports has. The connections of the host are none of it: a run makes new ones.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortsState {
    /// The driver has said that it can take messages (`VIRTIO_CONSOLE_DEVICE_READY`, virtio 1.3 §5.3.6.2).
    pub is_ready: bool,
    /// How many of the messages that introduce the ports wait for buffers of the driver.
    pub introductions: u32,
    /// The ports, by number.
    pub ports: Vec<PortState>,
}

/// A port as its driver knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortState {
    /// A program of the guest has it open.
    pub is_open: bool,
    /// The last thing that the driver was told of the host's connection is that there is one.
    pub is_told: bool,
    /// The connection has ended, or there was none to be had.
    pub has_ended: bool,
}

/// By what a disk is told from others.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskState {
    /// The device configuration (struct virtio_blk_config, virtio 1.3 §5.2.4), which has the disk's size and block sizes.
    pub config: Vec<u8>,
    /// The files of the image: first its own, then its data and backing files.
    pub files: Vec<FileMark>,
}

/// By what a file of the host is told from others, and from itself at another time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileMark {
    /// The number of the device that has it (`st_dev`), and its number there (`st_ino`).
    pub number: [u64; 2],
    /// Its size in bytes.
    pub bytes: u64,
    /// When it was written last: seconds and nanoseconds since 1970. `None` for a block device, for which the time says nothing.
    pub modified: Option<(i64, i64)>,
    /// When its inode was changed last, which a program cannot set; as `modified`.
    pub changed: Option<(i64, i64)>,
}

/// What only one kind of transport has.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum BusState {
    /// virtio-mmio.
    Mmio {
        /// InterruptStatus (virtio 1.3 §4.2.2).
        interrupt_status: u32,
    },
    /// virtio-pci.
    Pci {
        /// The configuration space.
        config: ConfigSpaceState,
        /// The ISR status (virtio 1.3 §4.1.4.5).
        isr_status: u8,
        /// The MSI-X vector for configuration changes.
        config_vector: u16,
        /// The MSI-X vectors of the queues.
        queue_vectors: Vec<u16>,
        /// The MSI-X table.
        msix: MsixState,
    },
}

/// A device cannot be paused, or its state cannot be saved.
#[derive(Debug, Error)]
pub enum PauseError {
    /// The driver has reset the device, whose workers wait for the host.
    #[error("{name} is being reset by its driver, which waits for the host: try again")]
    Resetting {
        /// Name of the device.
        name: Arc<str>,
    },
    /// Its requests in flight are not completed in time.
    #[error("{name} does not complete its requests in time: it waits for the host")]
    Late {
        /// Name of the device.
        name: Arc<str>,
    },
    /// Requests were given up that the host may still do.
    #[error(
        "{name} has given up requests, as the host's kernel had no memory for them, and it may still do them: restart the guest, \
         or have it reset the device"
    )]
    Abandoned {
        /// Name of the device.
        name: Arc<str>,
    },
    /// What was written cannot be brought to stable storage.
    #[error("{name} cannot be flushed")]
    Flush {
        /// Name of the device.
        name: Arc<str>,
        /// What fsync(2) or a write failed with.
        source: io::Error,
    },
    /// The device has no state for snapshots.
    #[error("{name} has no state that can be saved")]
    Unsaved {
        /// Name of the device.
        name: Arc<str>,
    },
    /// It has what no snapshot can have, now.
    #[error("the state of {name} cannot be saved")]
    State {
        /// Name of the device.
        name: Arc<str>,
        /// What stands against it.
        source: SaveFault,
    },
}

/// What a device has that no snapshot can have.
#[derive(Debug, Error)]
pub enum SaveFault {
    /// What tells it from others cannot be read: fstat(2) failed.
    #[error("it cannot be read")]
    Io(#[from] io::Error),
    /// The host has not taken all that the guest has sent: the rest would be lost, or reach another reader.
    #[error("the guest has sent bytes to its port {port} that the host has not taken: have them read, and try again")]
    UnsentBytes {
        /// The name of the port.
        port: &'static str,
    },
    /// A file is open that cannot be found by a name.
    #[error(
        "the guest has the file {path} open, which has been removed or cannot be found by its name any more: have it closed, and try again"
    )]
    OpenFile {
        /// Its path beneath the shared directory, shown and not too long.
        path: String,
    },
    /// The guest knows too many files.
    #[error(
        "the guest knows {files} files of it, too many: have it forget those that it does not use (echo 2 >/proc/sys/vm/drop_caches), and try again"
    )]
    ManyFiles {
        /// The number of files.
        files: usize,
    },
}

/// The state of a snapshot is none that this device can have.
#[derive(Debug, Error)]
#[error("the snapshot cannot be used: its state of {name}")]
pub struct VirtioStateError {
    /// Name of the device.
    pub name: Arc<str>,
    /// What is wrong.
    pub source: StateFault,
}

/// What is wrong with a state.
#[derive(Debug, Error)]
pub enum StateFault {
    /// It is of another type of device.
    #[error("is of the virtio device type {found}, and the device's is {expected}")]
    Kind {
        /// The type in the state.
        found: u16,
        /// The device's.
        expected: u16,
    },
    /// It is of another transport.
    #[error("is of another transport")]
    Bus,
    /// No driver can bring a device to this status.
    #[error("has the device status {0:#x}, which no driver can set")]
    Status(u8),
    /// What no driver can have set yet at its device status.
    #[error("has {0} of a driver at a device status at which it cannot have set them")]
    Early(&'static str),
    /// The driver accepted features that this run does not offer.
    #[error(
        "has the feature bits {0:#x}, which this run does not offer: give it the --tune settings of the run that was saved \
         (0x20000000 is event-idx)"
    )]
    Features(u64),
    /// Another number of queues, or of their interrupt vectors.
    #[error("has another number of queues or vectors")]
    Queues,
    /// A size that no driver can set.
    #[error("has a queue {index} of {size} descriptors, where {max} are the most")]
    QueueSize {
        /// Index of the queue.
        index: usize,
        /// Its size.
        size: u16,
        /// The largest size that the device offers.
        max: u16,
    },
    /// The queues cannot be used.
    #[error(transparent)]
    Rings(Box<dyn Error + Send + Sync>),
    /// The configuration space is not as long as one is.
    #[error("has a PCI configuration space of another size")]
    ConfigSpace,
    /// What the device itself has.
    #[error(transparent)]
    Device(#[from] DeviceFault),
}

/// What a device's own state does not fit to.
#[derive(Debug, Error)]
pub enum DeviceFault {
    /// It is of another device.
    #[error("is of another device")]
    Other,
    /// The shared directory is another one.
    #[error("is of another directory, or of one that the guest can write: share the one that it had")]
    OtherShare,
    /// What no guest can know of a directory.
    #[error("has files or open files of a shared directory that no guest can have")]
    NoShare,
    /// The host does not let hwvmm have as many open files.
    #[error(
        "has {files} files of a shared directory, for which this run may not have enough open: raise the limit with `ulimit -n`"
    )]
    ManyFiles {
        /// The number of files.
        files: usize,
    },
    /// A file that the guest has open is not what it was.
    #[error(
        "has the file {path} open, which was changed, replaced or removed since, or cannot be read: make the snapshot anew"
    )]
    OpenFile {
        /// Its path beneath the shared directory, shown and not too long.
        path: String,
    },
    /// The guest has another context ID, or more connections than there are.
    #[error("is of a socket device with another context ID, or with more connections than one has")]
    Vsock,
    /// It is none that a console with these ports can have.
    #[error("is of a console with other ports, or has messages that it never sends")]
    Ports,
    /// The disk has another size.
    #[error("is of a disk of {expected} bytes, and this one has {found}: give it the disk that it had, or a copy")]
    DiskSize {
        /// The size in the state.
        expected: u64,
        /// That of the disk.
        found: u64,
    },
    /// The disk has other properties that the guest knows.
    #[error("is of a disk with other block sizes or queues: it must be on a file system like the one that it was on")]
    DiskProperties,
    /// The image has another number of files.
    #[error(
        "is of a disk whose image has {expected} files, and this one has {found}: give the image and backing files that it had"
    )]
    DiskFiles {
        /// The number of files in the state.
        expected: usize,
        /// That of the disk.
        found: usize,
    },
    /// A file of the disk's image is not as it was, or a copy whose time is not that of the original.
    #[error(
        "is of the disk as it was then, and its file {place} was changed since, or is a copy without the time of the original: \
         make copies with cp -p while the machine is paused, or add changed=accept to --disk if it has what it had then \
         (else the guest's file systems are destroyed)"
    )]
    DiskChanged {
        /// Which of the image's files, counted from 1.
        place: usize,
    },
    /// A file of the disk is a block device, on which no write leaves a time.
    #[error(
        "is of the disk as it was then, and whether its file {place}, a block device, was written since cannot be known: add \
         changed=accept to --disk if it has what it had then (else the guest's file systems are destroyed)"
    )]
    DiskUnknown {
        /// Which of the image's files, counted from 1.
        place: usize,
    },
    /// What tells the disk from others, or a file of a shared directory, cannot be read.
    #[error("cannot be compared with what the host has")]
    Io(#[source] io::Error),
}
