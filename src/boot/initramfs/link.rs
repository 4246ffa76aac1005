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

impl AgentLink {
    /// The driver that the guest needs for it.
    #[must_use]
    pub fn driver(self) -> Driver {
        match self {
            Self::Vsock => Driver::Vsock,
            Self::Ports => Driver::VirtioConsole,
        }
    }

    /// What a kernel can be reached by that has no modules, by the names of the drivers in its unpacked image. One that seems to have
    /// neither gets vsock: its agent says what is missing.
    ///
    /// # Errors
    /// Those of reading the file.
    pub fn of_vmlinux(vmlinux: &File) -> io::Result<Self> {
        // A driver has its name (KBUILD_MODNAME) as a string.
        let [vsock, console] = [Self::Vsock, Self::Ports].map(|link| format!("{}\0", link.driver().module()));
        let overlap = vsock.len().max(console.len());
        let mut piece = vec![0; PIECE_BYTES + overlap];
        let mut has_console = false;
        let mut offset = 0;
        while offset < SEARCH_BYTES {
            let count = read_up_to(vmlinux, &mut piece, offset)?;
            let bytes = piece.get(..count).unwrap_or_default();
            if memchr::memmem::find(bytes, vsock.as_bytes()).is_some() {
                return Ok(Self::Vsock);
            }
            has_console |= memchr::memmem::find(bytes, console.as_bytes()).is_some();
            if count < piece.len() {
                break;
            }
            offset += PIECE_BYTES as u64;
        }
        Ok(if has_console { Self::Ports } else { Self::Vsock })
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
    /// What `drivers`, with vsock among them, need; `other` is in place of vsock where the kernel has that alone.
    ///
    /// # Errors
    /// [`IndexError`].
    pub fn of(index: &ModuleIndex<'a>, drivers: &[Driver], other: Option<AgentLink>) -> Result<Self, IndexError> {
        let error = match (index.resolve(drivers), other) {
            (Err(error @ IndexError::NoDriver(Driver::Vsock)), Some(_)) => error,
            (paths, _) => return Ok(Self { paths: paths?, link: AgentLink::Vsock }),
        };
        let link = other.unwrap_or_default();
        let drivers: Vec<Driver> =
            drivers.iter().map(|driver| if *driver == Driver::Vsock { link.driver() } else { *driver }).collect();
        match index.resolve(&drivers) {
            // The kernel has neither: vsock is what it should have.
            Err(IndexError::NoDriver(driver)) if driver == link.driver() => Err(error),
            paths => Ok(Self { paths: paths?, link }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::index::IndexFiles;
    use super::*;
    use std::io::Write;

    fn link(parts: &[(usize, &[u8])]) -> AgentLink {
        let mut bytes = vec![0xcc; PIECE_BYTES * 2 + 100];
        for (at, text) in parts {
            bytes[*at..at + text.len()].copy_from_slice(text);
        }
        let mut file = tempfile::tempfile().expect("a file");
        file.write_all(&bytes).expect("written");
        AgentLink::of_vmlinux(&file).expect("read")
    }

    #[test]
    fn a_kernel_is_reached_by_what_it_has() {
        let (vsock, console) = (&b"\0vmw_vsock_virtio_transport\0"[..], &b"\0virtio_console\0"[..]);
        for at in [0, 5, PIECE_BYTES - 10, PIECE_BYTES, PIECE_BYTES * 2 + 50] {
            assert_eq!(link(&[(at, console)]), AgentLink::Ports, "at {at}");
        }
        assert_eq!(link(&[(100, console), (PIECE_BYTES - 5, vsock)]), AgentLink::Vsock);
        assert_eq!(link(&[]), AgentLink::Vsock);
        // What both transports share is no transport.
        let common = &b"\0vmw_vsock_virtio_transport_common\0"[..];
        assert_eq!(link(&[(7, common), (100, console)]), AgentLink::Ports);
    }

    #[test]
    fn a_kernel_without_vsock_is_reached_by_its_console() {
        let drivers = [Driver::VirtioPci, Driver::Vsock];
        let link = |dependencies: &str, other| {
            let files = IndexFiles { dependencies, builtin: "kernel/virtio_pci.ko\n", soft: "" };
            Resolved::of(&ModuleIndex::parse(files), &drivers, other).map(|found| (found.paths.concat(), found.link))
        };
        let (vsock, console) = ("k/vmw_vsock_virtio_transport.ko:\n", "k/virtio_console.ko:\n");
        let both = vsock.to_owned() + console;
        let ports = Some(AgentLink::Ports);
        assert_eq!(link(&both, ports), Ok(("k/vmw_vsock_virtio_transport.ko".into(), AgentLink::Vsock)));
        assert_eq!(link(console, ports), Ok(("k/virtio_console.ko".into(), AgentLink::Ports)));
        assert_eq!(link(console, None), Err(IndexError::NoDriver(Driver::Vsock)), "a vsock device was asked for");
        assert_eq!(link("", ports), Err(IndexError::NoDriver(Driver::Vsock)));
    }
}
