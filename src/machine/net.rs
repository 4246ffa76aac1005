//! Network cards: from the configuration to a device with its backend.

use super::MachineError;
use crate::config::{NetBackend, NetConfig};
use hwvmm_devices::virtio::VirtioDevice;
use hwvmm_devices::virtio::net::{Backend, Net, Tap};

/// A card for `net`.
pub(super) fn card(net: &NetConfig) -> Result<Box<dyn VirtioDevice>, MachineError> {
    let (name, backends): (&str, Vec<Box<dyn Backend>>) = match &net.backend {
        NetBackend::Tap { name, vhost: _ } => {
            let queues = Tap::open(name, net.queues)?;
            (name, queues.into_iter().map(|tap| Box::new(tap) as Box<dyn Backend>).collect())
        }
        NetBackend::User(_) => return Err(MachineError::Missing("user-mode networking", "net")),
    };
    Ok(Box::new(Net::new(net.mac.unwrap_or_else(|| stable_mac(name)), backends)))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_stay_and_differ() {
        assert_eq!(stable_mac("tap0"), stable_mac("tap0"));
        assert_ne!(stable_mac("tap0"), stable_mac("tap1"));
        assert_eq!(stable_mac("x")[0], 2);
    }
}
