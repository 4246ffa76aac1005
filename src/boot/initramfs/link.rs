//! What the agent reaches the host by: the kernel decides, by the drivers that it has.

use super::index::{Driver, IndexError, ModuleIndex};
use super::release::read_up_to;
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io;

/// How much of a vmlinux is searched at once, and at most.
const PIECE_BYTES: usize = 1 << 20;
const SEARCH_BYTES: u64 = 256 << 20;

/// What the agent reaches the host by.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum AgentLink {
    /// Stream sockets (virtio 1.3 section 5.10).
    #[default]
    Vsock,
    /// Ports of a console (virtio 1.3 section 5.3), for a kernel that has these alone.
    Ports,
}

/// What the agent may reach the host by.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LinkChoice {
    /// Vsock alone: the user has asked for a vsock device.
    #[default]
    Vsock,
    /// Vsock, or a console's ports where the kernel has no vsock.
    VsockFirst,
    /// A console's ports, or vsock where the kernel has no virtio console: a guest that is saved goes on with the same ports.
    PortsFirst,
}

impl LinkChoice {
    /// What is looked for, the first one first.
    pub(super) fn order(self) -> &'static [AgentLink] {
        match self {
            Self::Vsock => &[AgentLink::Vsock],
            Self::VsockFirst => &[AgentLink::Vsock, AgentLink::Ports],
            Self::PortsFirst => &[AgentLink::Ports, AgentLink::Vsock],
        }
    }
}

impl AgentLink {
    /// The driver that the guest needs for it.
    #[must_use]
    pub fn driver(self) -> Driver {
        match self {
            Self::Vsock => Driver::Vsock,
            Self::Ports => Driver::VirtioConsole,
        }
    }

    /// What of `choice` a kernel can be reached by that has no modules, by the names of the drivers in its unpacked image. One that seems to
    /// have none gets vsock: its agent says what is missing.
    ///
    /// # Errors
    /// Those of reading the file.
    pub fn of_vmlinux(vmlinux: &File, choice: LinkChoice) -> io::Result<Self> {
        let links = choice.order();
        // A driver has its name (KBUILD_MODNAME) as a string.
        let names: Vec<String> = links.iter().map(|link| format!("{}\0", link.driver().module())).collect();
        let overlap = names.iter().map(String::len).max().unwrap_or_default();
        let mut piece = vec![0; PIECE_BYTES + overlap];
        let mut best: Option<usize> = None;
        let mut offset = 0;
        while offset < SEARCH_BYTES {
            let count = read_up_to(vmlinux, &mut piece, offset)?;
            let bytes = piece.get(..count).unwrap_or_default();
            let found = names.iter().position(|name| memchr::memmem::find(bytes, name.as_bytes()).is_some());
            best = best.into_iter().chain(found).min();
            if best == Some(0) || count < piece.len() {
                break;
            }
            offset += PIECE_BYTES as u64;
        }
        Ok(best.and_then(|place| links.get(place)).copied().unwrap_or_default())
    }
}

/// The modules that a guest needs, by the list of its kernel.
#[derive(Debug, PartialEq, Eq)]
pub struct Resolved<'a> {
    /// Their paths, in the order in which they are to be loaded.
    pub paths: Vec<&'a str>,
    /// What the agent reaches the host by.
    pub link: AgentLink,
}

impl<'a> Resolved<'a> {
    /// What `drivers`, with vsock among them, need; what of `choice` the kernel has is in place of vsock.
    ///
    /// # Errors
    /// [`IndexError`].
    pub fn of(index: &ModuleIndex<'a>, drivers: &[Driver], choice: LinkChoice) -> Result<Self, IndexError> {
        for link in choice.order() {
            let of_link = |driver: &Driver| if *driver == Driver::Vsock { link.driver() } else { *driver };
            let drivers: Vec<Driver> = drivers.iter().map(of_link).collect();
            match index.resolve(&drivers) {
                Err(IndexError::NoDriver(driver)) if driver == link.driver() => {}
                paths => return Ok(Self { paths: paths?, link: *link }),
            }
        }
        // The kernel has none of them: vsock is what it should have.
        Err(IndexError::NoDriver(Driver::Vsock))
    }
}

#[cfg(test)]
mod tests {
    use super::super::index::IndexFiles;
    use super::*;
    use std::io::Write;

    fn link_of(parts: &[(usize, &[u8])], choice: LinkChoice) -> AgentLink {
        let mut bytes = vec![0xcc; PIECE_BYTES * 2 + 100];
        for (at, text) in parts {
            bytes[*at..at + text.len()].copy_from_slice(text);
        }
        let mut file = tempfile::tempfile().expect("a file");
        file.write_all(&bytes).expect("written");
        AgentLink::of_vmlinux(&file, choice).expect("read")
    }

    fn link(parts: &[(usize, &[u8])]) -> AgentLink {
        link_of(parts, LinkChoice::VsockFirst)
    }

    #[test]
    fn a_kernel_is_reached_by_what_it_has() {
        let (vsock, console) = (&b"\0vmw_vsock_virtio_transport\0"[..], &b"\0virtio_console\0"[..]);
        for at in [0, 5, PIECE_BYTES - 10, PIECE_BYTES, PIECE_BYTES * 2 + 50] {
            assert_eq!(link(&[(at, console)]), AgentLink::Ports, "at {at}");
        }
        assert_eq!(link(&[(100, console), (PIECE_BYTES - 5, vsock)]), AgentLink::Vsock);
        assert_eq!(link(&[]), AgentLink::Vsock);
        assert_eq!(link_of(&[(100, vsock), (PIECE_BYTES - 5, console)], LinkChoice::PortsFirst), AgentLink::Ports);
        assert_eq!(link_of(&[(100, vsock)], LinkChoice::PortsFirst), AgentLink::Vsock);
        // What both transports share is no transport.
        let common = &b"\0vmw_vsock_virtio_transport_common\0"[..];
        assert_eq!(link(&[(7, common), (100, console)]), AgentLink::Ports);
    }

    #[test]
    fn a_kernel_without_vsock_is_reached_by_its_console() {
        let drivers = [Driver::VirtioPci, Driver::Vsock];
        let link = |dependencies: &str, choice| {
            let files = IndexFiles { dependencies, builtin: "kernel/virtio_pci.ko\n", soft: "" };
            Resolved::of(&ModuleIndex::parse(files), &drivers, choice).map(|found| (found.paths.concat(), found.link))
        };
        let (vsock, console) = ("k/vmw_vsock_virtio_transport.ko:\n", "k/virtio_console.ko:\n");
        let both = vsock.to_owned() + console;
        let by_vsock = Ok(("k/vmw_vsock_virtio_transport.ko".into(), AgentLink::Vsock));
        let by_ports = Ok(("k/virtio_console.ko".into(), AgentLink::Ports));
        let neither = Err(IndexError::NoDriver(Driver::Vsock));
        assert_eq!(link(&both, LinkChoice::VsockFirst), by_vsock);
        assert_eq!(link(console, LinkChoice::VsockFirst), by_ports);
        assert_eq!(link(console, LinkChoice::Vsock), neither, "a vsock device was asked for");
        assert_eq!(link(&both, LinkChoice::PortsFirst), by_ports);
        assert_eq!(link(vsock, LinkChoice::PortsFirst), by_vsock);
        for choice in [LinkChoice::VsockFirst, LinkChoice::PortsFirst] {
            assert_eq!(link("", choice), neither);
        }
    }
}
