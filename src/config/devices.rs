//! Virtio devices and shared folders: one struct for each, read from the command line and from TOML.

use super::error::ValueError;
use super::spec::device_spec;
use super::value::{Items, Value, choices, utf8};
use std::ffi::OsStr;
use std::net::SocketAddr;
use std::path::PathBuf;

/// The largest number of queues of a disk, and of queue pairs of a network card.
pub const MAX_QUEUES: u16 = 16;
/// The smallest context ID of a guest (virtio 1.3, section 5.10.4).
const MIN_CID: u32 = 3;
/// The largest context ID of a guest; `u32::MAX` is the broadcast address.
const MAX_CID: u32 = u32::MAX - 1;

/// The transport of virtio devices.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Transport {
    /// virtio-pci: one interrupt (MSI-X) and one notification address for each queue.
    Pci,
    /// virtio-mmio: fewest exits at boot, one interrupt for each device.
    Mmio,
}

/// The format of a disk image.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum DiskFormat {
    /// qcow2 if the file begins with its magic number, and then without a backing file; else raw.
    #[default]
    Auto,
    /// The sectors of the disk, one after the other.
    Raw,
    /// qcow2, with the backing files that its header names.
    Qcow2,
    /// What `Auto` has become: raw, and the guest cannot make it an image of another format.
    #[value(skip)]
    DetectedRaw,
    /// What `Auto` has become: qcow2, without any other file.
    #[value(skip)]
    DetectedQcow2,
}

/// What happens when the host's disk is full (QEMU's `werror`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum WriteError {
    /// The guest gets an I/O error.
    #[default]
    Report,
    /// The request waits until there is space.
    Stop,
}

/// What is done with a disk that may have been written since the snapshot was made that a machine goes on from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum ChangedDisk {
    /// It is refused.
    #[default]
    Refuse,
    /// It is taken.
    Accept,
}

/// How a disk image is read and written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum DiskIo {
    /// By io_uring where the host has it.
    #[default]
    Auto,
    /// By preadv and pwritev.
    Plain,
}

choices!(Transport, DiskFormat, WriteError, ChangedDisk, DiskIo);

device_spec! {
    /// A virtio disk and its image (`--disk`).
    #[derive(Clone, Debug, PartialEq, Eq)]
    pub struct DiskConfig {
        /// Path of the image file or block device.
        path: PathBuf = "path" "PATH", first required ("path=FILE");
        /// Format of the image.
        format: DiskFormat = "format" "auto|raw|qcow2", or (DiskFormat::Auto);
        /// Path of the data file of a qcow2 image that has one.
        data_file: Option<PathBuf> = "data-file" "PATH", optional;
        /// True if the guest cannot write it.
        read_only: bool = "readonly" "on|off", switch;
        /// True if the host's page cache is not used (O_DIRECT).
        direct: bool = "direct" "on|off", switch;
        /// Number of request queues (virtio 1.3 section 5.2.2), each with a thread of its own.
        queues: u16 = "queues" "N", number (1..=MAX_QUEUES, 1);
        /// Serial number that the guest sees; by default the `id`, or empty.
        serial: String = "serial" "S", or (String::new());
        /// Name of the device in counts and logs; by default `disk0`, `disk1`, ...
        id: Option<String> = "id" "S", optional;
        /// What happens when the host's disk is full.
        write_error: WriteError = "werror" "report|stop", or (WriteError::Report);
        /// With `--from`: what is done with an image that may have been written since the snapshot was made.
        changed: ChangedDisk = "changed" "refuse|accept", or (ChangedDisk::Refuse);
        /// How the image is read and written.
        io: DiskIo = "io" "auto|plain", or (DiskIo::Auto);
    }
    check |disk| {
        if disk.data_file.is_some() && disk.format != DiskFormat::Qcow2 {
            return Err(ValueError::Needs("format=qcow2 for data-file"));
        }
        let serial = if disk.serial.is_empty() { disk.id.clone().unwrap_or_default() } else { disk.serial };
        Ok(Self { serial, ..disk })
    }
}

/// Protocol of a forwarded port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// TCP connections are forwarded.
    Tcp,
    /// UDP datagrams are forwarded.
    Udp,
}

/// A port of the host that is forwarded to one of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Forward {
    /// Protocol of both ports.
    pub protocol: Protocol,
    /// Address and port on which the host listens.
    pub host: SocketAddr,
    /// Port of the guest.
    pub guest_port: u16,
}

impl Value for Forward {
    /// Reads QEMU's form: `tcp:[ADDRESS]:PORT-[:]PORT`.
    fn parse(text: &OsStr) -> Result<Self, ValueError> {
        let text = utf8(text)?;
        let parse = || {
            let (protocol, rest) = text.split_once(':')?;
            let protocol = match protocol {
                "tcp" => Protocol::Tcp,
                "udp" => Protocol::Udp,
                _ => return None,
            };
            let (host, guest) = rest.rsplit_once('-')?;
            let (address, port) = host.rsplit_once(':')?;
            let address = if address.is_empty() { "127.0.0.1" } else { address };
            let host = format!("{address}:{port}").parse().ok()?;
            Some(Self { protocol, host, guest_port: guest.trim_start_matches(':').parse().ok()? })
        };
        parse().ok_or_else(|| ValueError::Forward(text.to_owned()))
    }
}

/// Hardware address of a network card.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MacAddress(pub [u8; 6]);

impl Value for MacAddress {
    fn parse(text: &OsStr) -> Result<Self, ValueError> {
        let text = utf8(text)?;
        let error = || ValueError::Mac(text.to_owned());
        let mut mac = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut mac {
            let part = parts.next().filter(|part| part.len() == 2).ok_or_else(error)?;
            *byte = u8::from_str_radix(part, 16).map_err(|_| error())?;
        }
        // Neither a group address nor all zeroes can be the address of a card.
        if parts.next().is_some() || mac[0] & 1 != 0 || mac == [0; 6] {
            return Err(error());
        }
        Ok(Self(mac))
    }
}

/// What a network card is connected to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NetBackend {
    /// A tap interface of the host.
    Tap {
        /// Name of the interface.
        name: String,
        /// True if the host's kernel moves the packets (vhost-net).
        vhost: bool,
    },
    /// The network of the host by passt, which needs no privileges, with these ports forwarded to the guest.
    User(Vec<Forward>),
}

device_spec! {
    /// A network card as given.
    #[derive(Clone)]
    struct NetSpec {
        tap: Option<String> = "tap" "NAME", optional;
        user: bool = "user" "on|off", switch;
        mac: Option<MacAddress> = "mac" "MAC", optional;
        queues: u16 = "queues" "N", number (1..=MAX_QUEUES, 1);
        vhost: bool = "vhost" "on|off", switch;
        forwards: Vec<Forward> = "hostfwd" "tcp|udp:[ADDRESS]:PORT-:PORT", repeated;
    }
}

/// A network card (`--net`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetConfig {
    /// What it is connected to.
    pub backend: NetBackend,
    /// Its hardware address; `None`: one derived from the name of the backend, the same in each run.
    pub mac: Option<[u8; 6]>,
    /// Number of queue pairs.
    pub queues: u16,
}

impl TryFrom<NetSpec> for NetConfig {
    type Error = ValueError;

    fn try_from(spec: NetSpec) -> Result<Self, ValueError> {
        let NetSpec { tap, user, mac, queues, vhost, forwards } = spec;
        let backend = match (tap, user) {
            (Some(_), true) => return Err(ValueError::Needs("either tap=NAME or user")),
            (Some(_), false) if !forwards.is_empty() => return Err(ValueError::Needs("user for hostfwd")),
            (Some(name), false) if !(1..=15).contains(&name.len()) => return Err(ValueError::Interface(name)),
            (Some(name), false) => NetBackend::Tap { name, vhost },
            (None, true) if vhost || queues > 1 => return Err(ValueError::Needs("tap=NAME for vhost and queues")),
            (None, true) => NetBackend::User(forwards),
            (None, false) => return Err(ValueError::Needs("tap=NAME or user")),
        };
        Ok(Self { backend, mac: mac.map(|MacAddress(bytes)| bytes), queues })
    }
}

impl Value for NetConfig {
    fn parse(text: &OsStr) -> Result<Self, ValueError> {
        NetSpec::parse(text)?.try_into()
    }

    fn from_items(items: Items) -> Result<Self, ValueError> {
        NetSpec::from_items(items)?.try_into()
    }

    fn usage() -> Option<String> {
        Some(
            "tap=NAME[,mac=MAC][,queues=N][,vhost=on|off], or user[,mac=MAC][,hostfwd=tcp|udp:[ADDRESS]:PORT-:PORT]..."
                .into(),
        )
    }
}

device_spec! {
    /// An entropy device (`--rng`).
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct RngConfig {
        /// The largest number of bytes a second; `None`: no limit.
        bytes_per_second: Option<u64> = "rate" "RATE", first bytes;
    }
    check |rng| if rng.bytes_per_second == Some(0) { Err(ValueError::NoRate) } else { Ok(rng) }
}

device_spec! {
    /// A memory balloon (`--balloon`).
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct BalloonConfig {
        /// Size of the balloon at the start, in bytes.
        bytes: u64 = "size" "SIZE", first bytes (0);
    }
}

/// A device that is on or off: `on` is the device with its defaults.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Toggle<T> {
    /// There is no such device.
    Off,
    /// There is the device, with this configuration.
    On(T),
}

impl<T> Toggle<T> {
    /// Returns the device; `None` if it is off.
    #[must_use]
    pub fn device(self) -> Option<T> {
        match self {
            Self::Off => None,
            Self::On(device) => Some(device),
        }
    }
}

impl<T: Value + Default> Value for Toggle<T> {
    const NUMBER: bool = true;
    const BOOLEAN: bool = true;

    fn parse(text: &OsStr) -> Result<Self, ValueError> {
        match bool::parse(text) {
            Ok(true) => Ok(Self::On(T::default())),
            Ok(false) => Ok(Self::Off),
            Err(_) => T::parse(text).map(Self::On),
        }
    }

    fn from_items(items: Items) -> Result<Self, ValueError> {
        T::from_items(items).map(Self::On)
    }

    fn usage() -> Option<String> {
        T::usage().map(|form| format!("on, off or {form}"))
    }
}

/// How stream sockets reach the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VsockBackend {
    /// hwvmm listens on this Unix socket, and connects to `PATH_PORT` for the guest.
    Unix(PathBuf),
    /// The host's own vsock sockets (vhost-vsock).
    Vhost,
    /// The guest reaches the streams of its command, and no other port of the host.
    Streams,
}

device_spec! {
    /// A vsock device as given.
    #[derive(Clone)]
    struct VsockSpec {
        cid: u32 = "cid" "N", number (MIN_CID..=MAX_CID, MIN_CID);
        uds: Option<PathBuf> = "uds" "PATH", optional;
        vhost: bool = "vhost" "on|off", switch;
    }
}

/// A vsock device (`--vsock`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VsockConfig {
    /// Context ID of the guest, from 3.
    pub cid: u32,
    /// How stream sockets reach the host.
    pub backend: VsockBackend,
}

impl TryFrom<VsockSpec> for VsockConfig {
    type Error = ValueError;

    fn try_from(spec: VsockSpec) -> Result<Self, ValueError> {
        let backend = match (spec.uds, spec.vhost) {
            (Some(path), false) => VsockBackend::Unix(path),
            (None, true) => VsockBackend::Vhost,
            _ => return Err(ValueError::Needs("either uds=PATH or vhost=on")),
        };
        Ok(Self { cid: spec.cid, backend })
    }
}

impl Value for VsockConfig {
    fn parse(text: &OsStr) -> Result<Self, ValueError> {
        VsockSpec::parse(text)?.try_into()
    }

    fn from_items(items: Items) -> Result<Self, ValueError> {
        VsockSpec::from_items(items)?.try_into()
    }

    fn usage() -> Option<String> {
        Some("cid=N,uds=PATH or cid=N,vhost=on".into())
    }
}

device_spec! {
    /// A folder of the host that the guest can mount (`--share`, virtiofs).
    #[derive(Clone, Debug, PartialEq, Eq)]
    pub struct ShareConfig {
        /// The tag by which the guest mounts it.
        tag: String = "tag" "NAME", required ("tag=NAME and path=DIR");
        /// Path of the folder.
        path: PathBuf = "path" "DIR", required ("tag=NAME and path=DIR");
        /// True if the guest cannot change it.
        read_only: bool = "readonly" "on|off", switch;
        /// True if the guest can make device nodes, and files with a set-user-ID or set-group-ID bit.
        privileged_files: bool = "privileged-files" "on|off", switch;
    }
}

#[cfg(test)]
mod tests {
    use super::super::module::ModuleConfig;
    use super::*;
    use proptest::prelude::*;

    fn parse<T: Value>(text: &str) -> Result<T, ValueError> {
        T::parse(OsStr::new(text))
    }

    #[test]
    fn disks() {
        let disk: DiskConfig = parse("a.img").expect("a path");
        assert_eq!((disk.path, disk.queues, disk.read_only), ("a.img".into(), 1, false));
        let disk = "path=a,format=qcow2,readonly,direct=on,queues=4,id=root,werror=stop,io=plain,changed=accept";
        let disk: DiskConfig = parse(disk).expect("all keys");
        assert!(disk.read_only && disk.direct);
        assert_eq!((disk.write_error, disk.io, disk.changed), (WriteError::Stop, DiskIo::Plain, ChangedDisk::Accept));
        assert_eq!((disk.queues, disk.serial.as_str(), disk.format), (4, "root", DiskFormat::Qcow2));
        for bad in [
            "",
            "readonly=on",
            "a,queues=0",
            "a,queues=17",
            "a,format=vmdk",
            "a,format=detected-raw",
            "a,werror=x",
            "a,cache=none",
        ] {
            assert!(parse::<DiskConfig>(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn network_cards() {
        let net = parse::<NetConfig>("tap=tap0,mac=52:54:00:12:34:56,queues=2,vhost=on").expect("a tap");
        assert_eq!(net.backend, NetBackend::Tap { name: "tap0".into(), vhost: true });
        assert_eq!((net.mac, net.queues), (Some([0x52, 0x54, 0, 0x12, 0x34, 0x56]), 2));
        let net = parse::<NetConfig>("user,hostfwd=tcp:127.0.0.1:2222-:22,hostfwd=udp::53-53").expect("user mode");
        let NetBackend::User(forwards) = net.backend else { panic!("user mode") };
        assert_eq!(forwards[0].guest_port, 22);
        assert_eq!(forwards[1].host, "127.0.0.1:53".parse().expect("an address"));
        for bad in
            ["", "bridge", "tap=", "tap=a-name-that-is-too-long", "user,hostfwd=tcp:1", "user,vhost=on", "user,tap=t"]
        {
            assert!(parse::<NetConfig>(bad).is_err(), "{bad}");
        }
        for bad in ["tap=t,mac=01:00:00:00:00:00", "tap=t,mac=1:2", "tap=t,hostfwd=tcp::1-1"] {
            assert!(parse::<NetConfig>(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn sockets_folders_and_balloons() {
        let vsock = parse::<VsockConfig>("cid=7,uds=/tmp/v").expect("both");
        assert_eq!((vsock.cid, vsock.backend), (7, VsockBackend::Unix("/tmp/v".into())));
        assert_eq!(parse::<VsockConfig>("vhost").expect("vhost").backend, VsockBackend::Vhost);
        let share = parse::<ShareConfig>("tag=src,path=.,readonly=on").expect("all");
        assert_eq!((share.tag.as_str(), share.read_only, share.privileged_files), ("src", true, false));
        assert!(parse::<ShareConfig>("tag=a,path=b,privileged-files=on").expect("all").privileged_files);
        let balloon =
            |text: &str| parse::<Toggle<BalloonConfig>>(text).map(|balloon| balloon.device().map(|it| it.bytes));
        assert_eq!(balloon("1G").expect("a size"), Some(1 << 30));
        assert_eq!((balloon("on").expect("on"), balloon("off").expect("off")), (Some(0), None));
        assert!(balloon("much").is_err());
        for bad in ["", "cid=2,uds=x", "cid=4294967295,uds=x", "cid=3", "uds=", "uds=x,vhost=on", "vhost=off"] {
            assert!(parse::<VsockConfig>(bad).is_err(), "{bad}");
        }
        for bad in ["", "tag=x", "path=x", "x", "tag=a,path=b,readonly=1", "tag=a,path="] {
            assert!(parse::<ShareConfig>(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn modules() {
        let module = |text: &str| parse::<ModuleConfig>(text).map(|module| (module.path, module.arguments)).ok();
        assert_eq!(module("a"), Some(("a".into(), String::new())));
        assert_eq!(module("a,b=c,d"), Some(("a".into(), "b=c,d".into())));
        assert_eq!(module(",b"), None);
    }

    proptest! {
        #[test]
        fn no_text_panics(text in ".*") {
            let _ = (parse::<VsockConfig>(&text), parse::<ShareConfig>(&text), parse::<BalloonConfig>(&text));
            let _ = (parse::<DiskConfig>(&text), parse::<NetConfig>(&text), parse::<Toggle<RngConfig>>(&text));
            let _ = parse::<ModuleConfig>(&text);
        }
    }
}
