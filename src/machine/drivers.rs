//! The drivers that a guest with a command needs for its devices.

use crate::boot::initramfs::{AgentLink, Driver};
use crate::config::{RootChoice, RunConfig, Transport, VsockBackend};

/// The drivers that the guest needs, in the order in which they are loaded.
pub(super) fn drivers(config: &RunConfig) -> Vec<Driver> {
    let bus = match config.transport {
        Transport::Pci => Driver::VirtioPci,
        Transport::Mmio => Driver::VirtioMmio,
    };
    let mut drivers = vec![bus, Driver::Vsock];
    let on_disk = matches!(config.root, RootChoice::Image(_));
    if !config.share.is_empty() {
        drivers.push(Driver::Virtiofs);
    }
    if on_disk {
        drivers.extend([Driver::VirtioBlk, Driver::Crc32c, Driver::Ext4]);
    }
    if config.root != RootChoice::None {
        drivers.push(Driver::Overlay);
    }
    drivers
}

/// What the agent may use in place of vsock. A user who asks for a vsock device has a kernel with vsock.
pub(super) fn other_link(config: &RunConfig) -> Option<AgentLink> {
    let own = config.vsock.as_ref().is_some_and(|vsock| vsock.backend == VsockBackend::Streams);
    own.then_some(AgentLink::Ports)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::RunOptions;

    fn config(text: &str) -> RunConfig {
        let options: RunOptions = toml::from_str(&format!("kernel = 'k'\ncommand = ['a']\n{text}")).expect("TOML");
        options.into_config().expect("valid")
    }

    #[test]
    fn the_drivers_are_those_of_the_devices() {
        assert_eq!(drivers(&config("")), [Driver::VirtioPci, Driver::Vsock, Driver::Virtiofs, Driver::Overlay]);
        assert_eq!(drivers(&config("root = 'none'\ntransport = 'mmio'")), [Driver::VirtioMmio, Driver::Vsock]);
        let writable = drivers(&config("root = 'none'\nrw = ['/tmp']"));
        assert_eq!(writable, [Driver::VirtioPci, Driver::Vsock, Driver::Virtiofs]);
        let image = |text: &str| {
            let text = format!("kernel-from = 'i'\nroot = 'image'\ncommand = ['a']\n{text}");
            drivers(&toml::from_str::<RunOptions>(&text).expect("TOML").into_config().expect("valid"))
        };
        let disk = [Driver::VirtioPci, Driver::Vsock, Driver::VirtioBlk, Driver::Crc32c, Driver::Ext4, Driver::Overlay];
        assert_eq!(image(""), disk);
        assert!(image("share = ['tag=a,path=b']").contains(&Driver::Virtiofs), "a folder that the command may mount");
    }
}
