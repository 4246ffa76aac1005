//! Network cards: from the configuration to a device with its backend.

use super::error::MachineError;
use crate::config::{Forward, NetBackend, NetConfig, Protocol};
use hwvmm_devices::virtio::VirtioDevice;
use hwvmm_devices::virtio::net::{Backend, Net, Stream, Tap};
use std::io::{BufRead, BufReader};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};

/// What the guest gets by DHCP, and where it finds the host: as in other VMMs' user mode.
const GUEST_ADDRESS: &str = "10.0.2.15";
const HOST_ADDRESS: &str = "10.0.2.2";
const NETMASK: &str = "255.255.255.0";
/// Lines of passt's that are shown when it fails.
const LAST_LINES: usize = 5;

/// A card for `net`.
pub(super) fn card(net: &NetConfig) -> Result<Box<dyn VirtioDevice>, MachineError> {
    let (name, backends): (&str, Vec<Box<dyn Backend>>) = match &net.backend {
        NetBackend::Tap { name, .. } => {
            let queues = Tap::open(name, net.queues)?;
            (name, queues.into_iter().map(|tap| Box::new(tap) as Box<dyn Backend>).collect())
        }
        NetBackend::User(forwards) => ("user", vec![Box::new(Stream::new(start_passt(forwards)?)?)]),
    };
    let card = Net::new(net.mac.unwrap_or_else(|| stable_mac(name)), backends);
    match net.backend {
        NetBackend::Tap { vhost: true, .. } => Ok(Box::new(card.with_vhost().map_err(MachineError::Vhost)?)),
        NetBackend::Tap { .. } | NetBackend::User(_) => Ok(Box::new(card)),
    }
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
fn start_passt(forwards: &[Forward]) -> Result<UnixStream, MachineError> {
    let (ours, theirs) = UnixStream::pair()?;
    let mut command = Command::new("passt");
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
    std::thread::Builder::new().name("passt".into()).spawn(move || attend(child))?;
    Ok(ours)
}

/// Listens to what passt says, and says it where passt fails.
fn attend(mut child: Child) {
    let mut last: Vec<String> = Vec::new();
    if let Some(stderr) = child.stderr.take() {
        for line in BufReader::new(stderr).lines().map_while(Result::ok) {
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
