//! The drivers that a guest with a command needs for its devices.

use crate::boot::initramfs::{Driver, LinkChoice};
use crate::config::{RootChoice, RunConfig, Transport, VsockBackend};
use crate::tune::Lever;

/// The drivers that the guest needs, in the order in which they are loaded.
pub(super) fn drivers(config: &RunConfig) -> Vec<Driver> {
    let bus = match config.transport {
        Transport::Pci => Driver::VirtioPci,
        Transport::Mmio => Driver::VirtioMmio,
    };
    let mut drivers = Vec::new();
    if !config.tune.wants(Lever::UncheckedModules) {
        drivers.push(Driver::FastSha256);
    }
    drivers.extend([bus, Driver::Vsock]);
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

/// What the agent may use. A user who asks for a vsock device has a kernel with vsock.
pub(super) fn links(config: &RunConfig) -> LinkChoice {
    let own = config.vsock.as_ref().is_some_and(|vsock| vsock.backend == VsockBackend::Streams);
    match (own, &config.template) {
        (false, _) => LinkChoice::Vsock,
        (true, None) => LinkChoice::VsockFirst,
        (true, Some(_)) => LinkChoice::PortsFirst,
    }
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
        let (hash, pci) = (Driver::FastSha256, Driver::VirtioPci);
        assert_eq!(drivers(&config("")), [hash, pci, Driver::Vsock, Driver::Virtiofs, Driver::Overlay]);
        assert_eq!(drivers(&config("root = 'none'\ntransport = 'mmio'")), [hash, Driver::VirtioMmio, Driver::Vsock]);
        let writable = drivers(&config("root = 'none'\nrw = ['/tmp']"));
        assert_eq!(writable, [hash, pci, Driver::Vsock, Driver::Virtiofs]);
        let unchecked = drivers(&config("root = 'none'\ntune = ['unchecked-modules=on']"));
        assert_eq!(unchecked, [pci, Driver::Vsock]);
        let image = |text: &str| {
            let text = format!("kernel-from = 'i'\nroot = 'image'\ncommand = ['a']\n{text}");
            drivers(&toml::from_str::<RunOptions>(&text).expect("TOML").into_config().expect("valid"))
        };
        let disk = [hash, pci, Driver::Vsock, Driver::VirtioBlk, Driver::Crc32c, Driver::Ext4, Driver::Overlay];
        assert_eq!(image(""), disk);
        assert!(image("share = ['tag=a,path=b']").contains(&Driver::Virtiofs), "a folder that the command may mount");
    }
}
