//! Network cards: from the configuration to a device with its backend.

use super::error::MachineError;
use crate::config::{Forward, NetBackend, NetConfig, Protocol};
use crate::error::chain;
use crate::sandbox::{Sandbox, ThreadRole};
use hwvmm_devices::memory::Memory;
use hwvmm_devices::virtio::VirtioDevice;
use hwvmm_devices::virtio::net::{Backend, Net, Stream, Tap};
use std::io::{self, BufRead, BufReader, Read};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

/// The program for a network without rights on the host, which is found by PATH.
pub const PASST: &str = "passt";

/// What the guest gets by DHCP, and where it finds the host: as in other VMMs' user mode.
const GUEST_ADDRESS: &str = "10.0.2.15";
const HOST_ADDRESS: &str = "10.0.2.2";
const NETMASK: &str = "255.255.255.0";
/// Lines of passt's that are shown when it fails.
const LAST_LINES: usize = 5;

/// The longest line of passt's that is kept, in bytes. A longer one becomes several.
const LINE_BYTES: u64 = 1024;

/// A virtio network device, with the host's process that its backend needs.
pub(super) struct Card {
    pub(super) device: Box<dyn VirtioDevice>,
    /// The process behind it, where there is one.
    pub(super) passt: Option<Passt>,
}

/// A card for `net`, whose queues are in `memory`.
pub(super) fn card(net: &NetConfig, memory: &Memory) -> Result<Card, MachineError> {
    let mut passt = None;
    let backends: Vec<Box<dyn Backend>> = match &net.backend {
        NetBackend::Tap { name, .. } => {
            let queues = Tap::open(name, net.queues)?;
            queues.into_iter().map(|tap| Box::new(tap) as Box<dyn Backend>).collect()
        }
        NetBackend::User(forwards) => {
            let (socket, process) = start_passt(forwards)?;
            passt = Some(process);
            vec![Box::new(Stream::new(socket)?)]
        }
    };
    let card = Net::new(mac_of(net), backends)?;
    let device: Box<dyn VirtioDevice> = match net.backend {
        NetBackend::Tap { vhost: true, .. } => Box::new(card.with_vhost(memory).map_err(MachineError::Vhost)?),
        NetBackend::Tap { .. } | NetBackend::User(_) => Box::new(card),
    };
    Ok(Card { device, passt })
}

/// The hardware address of a card.
pub(super) fn mac_of(net: &NetConfig) -> [u8; 6] {
    let name = match &net.backend {
        NetBackend::Tap { name, .. } => name,
        NetBackend::User(_) => "user",
    };
    net.mac.unwrap_or_else(|| stable_mac(name))
}

/// Returns true if the host's kernel has the queues of the card.
pub(super) fn is_vhost(net: &NetConfig) -> bool {
    matches!(net.backend, NetBackend::Tap { vhost: true, .. })
}

/// An address that is the same in every run: locally administered, the rest from the backend's name (FNV-1a).
fn stable_mac(name: &str) -> [u8; 6] {
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    for byte in name.bytes() {
        hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    }
    let [a, b, c, d, e, ..] = hash.to_le_bytes();
    [0x02, a, b, c, d, e]
}

/// passt's way to say where to listen: `ADDRESS/PORT:GUEST_PORT`.
fn port_spec(forward: &Forward) -> String {
    let address = match forward.host {
        SocketAddr::V4(host) => IpAddr::V4(*host.ip()),
        SocketAddr::V6(host) => IpAddr::V6(*host.ip()),
    };
    format!("{address}/{}:{}", forward.host.port(), forward.guest_port)
}

/// Starts passt on one end of a socket; it ends when the other end, which is returned, closes.
fn start_passt(forwards: &[Forward]) -> Result<(UnixStream, Passt), MachineError> {
    let (ours, theirs) = UnixStream::pair()?;
    let mut command = Command::new(PASST);
    command
        .args(["--foreground", "--quiet", "--stderr", "--fd", "0"])
        .args(["--address", GUEST_ADDRESS, "--netmask", NETMASK, "--gateway", HOST_ADDRESS])
        .stdin(Stdio::from(OwnedFd::from(theirs)))
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    for forward in forwards {
        command
            .arg(match forward.protocol {
                Protocol::Tcp => "--tcp-ports",
                Protocol::Udp => "--udp-ports",
            })
            .arg(port_spec(forward));
    }
    let child = command.spawn().map_err(MachineError::Passt)?;
    Ok((ours, Passt(child)))
}

/// A process of passt. Its own sandbox confines it.
pub(super) struct Passt(Child);

impl Passt {
    /// Starts a thread in `sandbox` that reads what passt prints, and logs it where passt fails.
    pub(super) fn attend(self, sandbox: &Arc<Sandbox>) -> io::Result<()> {
        let sandbox = Arc::clone(sandbox);
        let work = move || match sandbox.enter(ThreadRole::Passt, "passt") {
            Ok(()) => attend(self.0),
            Err(error) => log::error!("the output of passt cannot be read: {}", chain(&error)),
        };
        std::thread::Builder::new().name("passt".into()).spawn(work).map(|_| ())
    }
}

/// The lines of `from`, whatever bytes are in them.
fn lines(mut from: impl BufRead) -> impl Iterator<Item = String> {
    std::iter::from_fn(move || {
        let mut line = Vec::new();
        let count = from.by_ref().take(LINE_BYTES).read_until(b'\n', &mut line).ok()?;
        (count > 0).then(|| String::from_utf8_lossy(&line).trim_end().to_owned())
    })
}

fn attend(mut child: Child) {
    let mut last: Vec<String> = Vec::new();
    if let Some(stderr) = child.stderr.take() {
        for line in lines(BufReader::new(stderr)) {
            // passt logs to syslog, which may be missing; the message about that is dropped.
            if line.starts_with("Failed to send ") {
                continue;
            }
            log::info!("passt: {line}");
            last.push(line);
            if last.len() > LAST_LINES {
                last.remove(0);
            }
        }
    }
    match child.wait() {
        Ok(status) if !status.success() => {
            log::error!("passt ended with {status}; the guest has no network: {}", last.join("; "));
        }
        Ok(_) => {}
        Err(error) => log::error!("passt: {error}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_passt_are_bounded_and_all_are_read() {
        let text = [&b"a\n\xff\n\n"[..], &[b'x'; 2500], b"\nb"].concat();
        let x = |count| "x".repeat(count);
        let expected = ["a".to_owned(), "\u{fffd}".into(), String::new(), x(1024), x(1024), x(452), "b".into()];
        assert_eq!(lines(&text[..]).collect::<Vec<_>>(), expected);
    }

    #[test]
    fn addresses_stay_and_differ() {
        assert_eq!(stable_mac("tap0"), stable_mac("tap0"));
        assert_ne!(stable_mac("tap0"), stable_mac("tap1"));
        assert_eq!(stable_mac("x")[0], 2);
    }

    #[test]
    fn ports_are_said_as_passt_wants_them() {
        let host = "127.0.0.1:2222".parse().expect("an address");
        assert_eq!(port_spec(&Forward { protocol: Protocol::Tcp, host, guest_port: 22 }), "127.0.0.1/2222:22");
    }
}
