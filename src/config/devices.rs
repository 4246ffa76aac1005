//! Virtio devices as they are asked for on the command line.

use super::keyvalue;
use super::values::{ValueError, parse_size, parse_switch};
use std::net::SocketAddr;
use std::path::PathBuf;

/// The most queues of a disk or a network card.
const MAX_QUEUES: u16 = 16;

/// What carries virtio devices.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Transport {
    /// virtio-pci: a message and a doorbell for each queue.
    Pci,
    /// virtio-mmio: fewest exits at boot, one interrupt a device.
    Mmio,
}

/// How a disk's file is read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DiskFormat {
    /// By its first bytes.
    #[default]
    Auto,
    /// As it is.
    Raw,
    /// qcow2.
    Qcow2,
}

/// A disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskConfig {
    /// File or block device.
    pub path: PathBuf,
    /// Its format.
    pub format: DiskFormat,
    /// Never written.
    pub read_only: bool,
    /// Past the host's page cache.
    pub direct: bool,
    /// Queues.
    pub queues: u16,
    /// What the guest sees as serial number: `serial`, else `id`.
    pub serial: String,
    /// The name in counts and logs.
    pub id: Option<String>,
    /// When the host's disk is full, the guest waits, instead of getting an error.
    pub stop_when_full: bool,
    /// No io_uring.
    pub plain_io: bool,
}

impl DiskConfig {
    /// Reads `PATH[,format=raw|qcow2|auto][,readonly=on][,direct=on][,queues=N][,serial=S][,id=S][,werror=report|stop]
    /// [,io=auto|plain]`.
    ///
    /// # Errors
    /// Where it is malformed or out of bounds.
    pub fn parse(text: &str) -> Result<Self, ValueError> {
        let mut disk = Self {
            path: PathBuf::new(),
            format: DiskFormat::Auto,
            read_only: false,
            direct: false,
            queues: 1,
            serial: String::new(),
            id: None,
            stop_when_full: false,
            plain_io: false,
        };
        let keys = ["path", "format", "readonly", "direct", "queues", "serial", "id", "werror", "io"];
        for (key, value) in keyvalue::parse(text, Some("path"), &keys)? {
            match key {
                "path" => disk.path = value.into(),
                "format" => disk.format = parse_format(value)?,
                "readonly" => disk.read_only = parse_switch("readonly", value)?,
                "direct" => disk.direct = parse_switch("direct", value)?,
                "queues" => disk.queues = parse_queues(value)?,
                "serial" => value.clone_into(&mut disk.serial),
                "io" => {
                    disk.plain_io = match value {
                        "auto" => false,
                        "plain" => true,
                        _ => return Err(choice("io", "auto, plain", value)),
                    }
                }
                "id" => disk.id = Some(value.to_owned()),
                _ => {
                    disk.stop_when_full = match value {
                        "report" => false,
                        "stop" => true,
                        _ => return Err(choice("werror", "report, stop", value)),
                    }
                }
            }
        }
        if disk.path.as_os_str().is_empty() {
            return Err(ValueError::Needs("path=FILE"));
        }
        if disk.serial.is_empty() {
            disk.serial = disk.id.clone().unwrap_or_default();
        }
        Ok(disk)
    }
}

fn choice(key: &'static str, choices: &'static str, value: &str) -> ValueError {
    ValueError::Choice { key, choices, value: value.to_owned() }
}

fn parse_format(value: &str) -> Result<DiskFormat, ValueError> {
    match value {
        "auto" => Ok(DiskFormat::Auto),
        "raw" => Ok(DiskFormat::Raw),
        "qcow2" => Ok(DiskFormat::Qcow2),
        _ => Err(choice("format", "auto, raw, qcow2", value)),
    }
}

fn parse_queues(value: &str) -> Result<u16, ValueError> {
    let queues = value.parse().ok().filter(|queues| (1..=MAX_QUEUES).contains(queues));
    queues.ok_or_else(|| ValueError::Number { key: "queues", from: 1, to: MAX_QUEUES.into(), value: value.to_owned() })
}

/// A port of the host that leads to one of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Forward {
    /// UDP, not TCP.
    pub udp: bool,
    /// Where the host listens.
    pub host: SocketAddr,
    /// The guest's port.
    pub guest_port: u16,
}

/// What a network card is connected to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NetBackend {
    /// A tap interface of the host.
    Tap {
        /// Its name.
        name: String,
        /// Work done by the host's kernel (vhost-net).
        vhost: bool,
    },
    /// The host's network without any right, by passt.
    User(Vec<Forward>),
}

/// A network card.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetConfig {
    /// Where its packets go.
    pub backend: NetBackend,
    /// Its address; by default made from the backend's name, so that it stays the same.
    pub mac: Option<[u8; 6]>,
    /// Queue pairs.
    pub queues: u16,
}

impl NetConfig {
    /// Reads `tap=NAME[,mac=A][,queues=N][,vhost=on]` or `user[,mac=A][,hostfwd=tcp:127.0.0.1:2222-:22]...`.
    ///
    /// # Errors
    /// Where it is malformed or out of bounds.
    pub fn parse(text: &str) -> Result<Self, ValueError> {
        let (mut tap, mut user, mut vhost, mut mac, mut queues) = (None, false, false, None, 1);
        // hostfwd may come again and again, which lists of keys otherwise may not.
        let (forwards, rest): (Vec<&str>, Vec<&str>) = text.split(',').partition(|item| item.starts_with("hostfwd="));
        let rest = rest.join(",");
        for (key, value) in keyvalue::parse(&rest, Some("kind"), &["tap", "mac", "queues", "vhost"])? {
            match key {
                "kind" if value == "user" => user = true,
                "kind" => return Err(choice("--net", "tap=NAME, user", value)),
                "tap" => tap = Some(value.to_owned()),
                "mac" => mac = Some(parse_mac(value)?),
                "queues" => queues = parse_queues(value)?,
                _ => vhost = parse_switch("vhost", value)?,
            }
        }
        let backend = match (tap, user) {
            (Some(name), false) if (1..=15).contains(&name.len()) && forwards.is_empty() => {
                NetBackend::Tap { name, vhost }
            }
            (Some(name), false) if forwards.is_empty() => return Err(ValueError::Interface(name)),
            (None, true) if !vhost && queues == 1 => {
                NetBackend::User(forwards.iter().map(|text| parse_forward(text)).collect::<Result<_, _>>()?)
            }
            (None, true) => return Err(ValueError::Needs("tap=NAME for vhost and queues")),
            (None, false) => return Err(ValueError::Needs("tap=NAME or user")),
            (Some(_), _) => return Err(ValueError::Needs("either tap=NAME or user; hostfwd goes with user")),
        };
        Ok(Self { backend, mac, queues })
    }
}

fn parse_mac(value: &str) -> Result<[u8; 6], ValueError> {
    let error = || ValueError::Mac(value.to_owned());
    let mut mac = [0; 6];
    let mut parts = value.split(':');
    for byte in &mut mac {
        let part = parts.next().filter(|part| part.len() == 2).ok_or_else(error)?;
        *byte = u8::from_str_radix(part, 16).map_err(|_| error())?;
    }
    // A group address is nobody's; all zeroes neither.
    if parts.next().is_some() || mac[0] & 1 != 0 || mac == [0; 6] {
        return Err(error());
    }
    Ok(mac)
}

/// `hostfwd=tcp:[ADDRESS]:PORT-[:]PORT`.
fn parse_forward(text: &str) -> Result<Forward, ValueError> {
    let error = || ValueError::Forward(text.to_owned());
    let value = text.strip_prefix("hostfwd=").unwrap_or(text);
    let (protocol, rest) = value.split_once(':').ok_or_else(error)?;
    let udp = match protocol {
        "tcp" => false,
        "udp" => true,
        _ => return Err(error()),
    };
    let (host, guest) = rest.rsplit_once('-').ok_or_else(error)?;
    let (address, port) = host.rsplit_once(':').ok_or_else(error)?;
    let address = if address.is_empty() { "127.0.0.1" } else { address };
    let host = format!("{address}:{port}").parse().map_err(|_| error())?;
    let guest_port = guest.trim_start_matches(':').parse().map_err(|_| error())?;
    Ok(Forward { udp, host, guest_port })
}

/// Entropy for the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RngConfig {
    /// The most bytes a second; `None`: as many as it wants.
    pub bytes_per_second: Option<u64>,
}

impl RngConfig {
    /// Reads `on`, or a number of bytes a second such as `64K`.
    ///
    /// # Errors
    /// Where it is neither.
    pub fn parse(text: &str) -> Result<Self, ValueError> {
        let bytes_per_second = match text {
            "on" | "true" => None,
            _ => Some(parse_size(text)?).filter(|rate| *rate > 0),
        };
        Ok(Self { bytes_per_second })
    }
}

/// Streams between guest and host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VsockConfig {
    /// The guest's address, from 3.
    pub cid: u32,
    /// The host's Unix socket; `None`: the host's kernel does the work (vhost-vsock).
    pub path: Option<PathBuf>,
}

impl VsockConfig {
    /// Reads `cid=N,uds=PATH` or `cid=N,vhost=on`.
    ///
    /// # Errors
    /// Where it is malformed or out of bounds.
    pub fn parse(text: &str) -> Result<Self, ValueError> {
        let (mut cid, mut path, mut vhost) = (3, None, false);
        for (key, value) in keyvalue::parse(text, None, &["cid", "uds", "vhost"])? {
            match key {
                "cid" => {
                    let bad = || ValueError::Number { key: "cid", from: 3, to: u32::MAX - 1, value: value.to_owned() };
                    cid = value.parse().ok().filter(|cid| (3..u32::MAX).contains(cid)).ok_or_else(bad)?;
                }
                "vhost" => vhost = parse_switch("vhost", value)?,
                _ => path = Some(PathBuf::from(value)).filter(|path| !path.as_os_str().is_empty()),
            }
        }
        if vhost == path.is_some() {
            return Err(ValueError::Needs("either uds=PATH or vhost=on"));
        }
        Ok(Self { cid, path })
    }
}

/// A folder of the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShareConfig {
    /// The name by which the guest mounts it.
    pub tag: String,
    /// The folder.
    pub path: PathBuf,
    /// The guest may not change it.
    pub read_only: bool,
}

impl ShareConfig {
    /// Reads `tag=NAME,path=DIR[,readonly=on]`.
    ///
    /// # Errors
    /// Where it is malformed.
    pub fn parse(text: &str) -> Result<Self, ValueError> {
        let (mut tag, mut path, mut read_only) = (None, None, false);
        for (key, value) in keyvalue::parse(text, None, &["tag", "path", "readonly"])? {
            match key {
                "tag" => tag = Some(value.to_owned()),
                "path" => path = Some(PathBuf::from(value)),
                _ => read_only = parse_switch("readonly", value)?,
            }
        }
        match (tag, path) {
            (Some(tag), Some(path)) => Ok(Self { tag, path, read_only }),
            _ => Err(ValueError::Needs("tag=NAME and path=DIR")),
        }
    }
}

/// A memory balloon.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BalloonConfig {
    /// What the guest is to give up from the start, in bytes.
    pub bytes: u64,
}

impl BalloonConfig {
    /// Reads `on`, or a size.
    ///
    /// # Errors
    /// Where it is neither.
    pub fn parse(text: &str) -> Result<Self, ValueError> {
        let bytes = if matches!(text, "on" | "true") { 0 } else { parse_size(text)? };
        Ok(Self { bytes })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn disks() {
        let disk = DiskConfig::parse("a.img").expect("a path");
        assert_eq!((disk.path, disk.queues, disk.read_only), ("a.img".into(), 1, false));
        let disk = DiskConfig::parse("path=a,format=qcow2,readonly=on,direct=on,queues=4,id=root,werror=stop");
        let disk = disk.expect("all keys");
        assert!(disk.read_only && disk.direct && disk.stop_when_full);
        assert_eq!((disk.queues, disk.serial.as_str(), disk.format), (4, "root", DiskFormat::Qcow2));
        for bad in ["", "readonly=on", "a,queues=0", "a,queues=17", "a,format=vmdk", "a,werror=x", "a,cache=none"] {
            assert!(DiskConfig::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn network_cards() {
        let net = NetConfig::parse("tap=tap0,mac=52:54:00:12:34:56,queues=2,vhost=on").expect("a tap");
        assert_eq!(net.backend, NetBackend::Tap { name: "tap0".into(), vhost: true });
        assert_eq!((net.mac, net.queues), (Some([0x52, 0x54, 0, 0x12, 0x34, 0x56]), 2));
        let net = NetConfig::parse("user,hostfwd=tcp:127.0.0.1:2222-:22,hostfwd=udp::53-53").expect("user mode");
        let NetBackend::User(forwards) = net.backend else { panic!("user mode") };
        assert_eq!(forwards[0].guest_port, 22);
        assert_eq!(forwards[1].host, "127.0.0.1:53".parse().expect("an address"));
        for bad in [
            "",
            "bridge",
            "tap=",
            "tap=a-name-that-is-too-long",
            "tap=t,mac=01:00:00:00:00:00",
            "tap=t,mac=1:2",
            "tap=t,hostfwd=tcp::1-1",
            "user,hostfwd=tcp:1",
            "user,vhost=on",
            "user,tap=t",
        ] {
            assert!(NetConfig::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn sockets_folders_and_balloons() {
        let vsock = VsockConfig::parse("cid=7,uds=/tmp/v").expect("both");
        assert_eq!((vsock.cid, vsock.path), (7, Some("/tmp/v".into())));
        assert_eq!(VsockConfig::parse("vhost=on").map(|vsock| vsock.path), Ok(None));
        let share = ShareConfig::parse("tag=src,path=.,readonly=on").expect("all");
        assert_eq!((share.tag.as_str(), share.read_only), ("src", true));
        assert_eq!(BalloonConfig::parse("1G").map(|balloon| balloon.bytes), Ok(1 << 30));
        for bad in ["", "cid=2,uds=x", "cid=4294967295,uds=x", "cid=3", "uds=", "uds=x,vhost=on", "vhost=off"] {
            assert!(VsockConfig::parse(bad).is_err(), "{bad}");
        }
        for bad in ["", "tag=x", "path=x", "x", "tag=a,path=b,readonly=1"] {
            assert!(ShareConfig::parse(bad).is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_survived(text in ".*") {
            let _ = (VsockConfig::parse(&text), ShareConfig::parse(&text), BalloonConfig::parse(&text));
            let _ = (DiskConfig::parse(&text), NetConfig::parse(&text), RngConfig::parse(&text));
        }
    }
}
