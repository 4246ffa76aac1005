//! Tap interfaces of Linux (Documentation/networking/tuntap.rst): frames with virtio's header, offloads left to the
//! host's kernel.

use super::HEADER_BYTES;
use super::backend::{Backend, Offloads, Switch};
use crate::memory::Buffers;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;
use thiserror::Error;

const TUN: &str = "/dev/net/tun";
/// TUNSETQUEUE, which the libc crate lacks: _IOW('T', 217, int).
const TUNSETQUEUE: libc::c_ulong = 0x4004_54d9;
const IFF_ATTACH_QUEUE: i16 = 0x0200;
const IFF_DETACH_QUEUE: i16 = 0x0400;

/// A tap interface cannot be had.
#[derive(Debug, Error)]
pub enum TapError {
    /// No /dev/net/tun.
    #[error("cannot open {TUN}: is the module tun loaded (modprobe tun), and may you open it?")]
    Open(#[source] io::Error),
    /// The interface itself.
    #[error(
        "cannot use the tap interface {name}{}",
        match .source.raw_os_error() {
            Some(libc::EPERM) => ": it is another user's, or does not exist and only root may make it: \
                `ip tuntap add NAME mode tap user $USER`",
            Some(libc::EBUSY) => ": another program has it",
            Some(libc::EINVAL) => ": it is no tap interface, or its number of queues is another: \
                for queues=N it must be made with `ip tuntap add NAME mode tap multi_queue`",
            _ => "",
        }
    )]
    Interface {
        /// Its name.
        name: String,
        /// The system's words.
        source: io::Error,
    },
}

/// One queue of a tap interface.
pub struct Tap {
    file: File,
    multiqueue: bool,
    enabled: bool,
}

fn request(name: &str, flags: i16) -> libc::ifreq {
    let mut name_bytes = [0; libc::IFNAMSIZ];
    for (to, from) in name_bytes.iter_mut().zip(name.bytes().take(libc::IFNAMSIZ - 1)) {
        *to = from.cast_signed();
    }
    libc::ifreq { ifr_name: name_bytes, ifr_ifru: libc::__c_anonymous_ifr_ifru { ifru_flags: flags } }
}

fn check(result: i32) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn set_queue(file: &File, attached: bool) -> io::Result<()> {
    let request = request("", if attached { IFF_ATTACH_QUEUE } else { IFF_DETACH_QUEUE });
    // SAFETY: TUNSETQUEUE reads one ifreq, which lives for the call.
    check(unsafe { libc::ioctl(file.as_raw_fd(), TUNSETQUEUE, &raw const request) })
}

impl Tap {
    /// Opens all `queues` queues of the interface `name`, which is made where it does not exist.
    ///
    /// # Errors
    /// [`TapError`], with its remedy.
    pub fn open(name: &str, queues: u16) -> Result<Vec<Self>, TapError> {
        (0..queues.max(1)).map(|_| Self::open_queue(name, queues > 1)).collect()
    }

    fn open_queue(name: &str, multiqueue: bool) -> Result<Self, TapError> {
        let file =
            File::options().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(TUN).map_err(TapError::Open)?;
        let mut flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
        if multiqueue {
            flags |= libc::IFF_MULTI_QUEUE;
        }
        let request = request(name, i16::try_from(flags).unwrap_or(0));
        let bad = |source| TapError::Interface { name: name.to_owned(), source };
        // SAFETY: TUNSETIFF reads and writes one ifreq, which lives for the call.
        check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw const request) }).map_err(bad)?;
        let header = i32::try_from(HEADER_BYTES).unwrap_or(12);
        // SAFETY: TUNSETVNETHDRSZ reads one int, which lives for the call.
        check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const header) }).map_err(bad)?;
        Ok(Self { file, multiqueue, enabled: true })
    }
}

impl Backend for Tap {
    fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    fn has_header(&self) -> bool {
        true
    }

    fn vhost_file(&self) -> Option<&File> {
        Some(&self.file)
    }

    fn set_offloads(&mut self, offloads: Offloads) -> io::Result<()> {
        let Offloads { checksum, tso4, tso6, ufo } = offloads;
        let pairs =
            [(checksum, libc::TUN_F_CSUM), (tso4, libc::TUN_F_TSO4), (tso6, libc::TUN_F_TSO6), (ufo, libc::TUN_F_UFO)];
        // The others build on checksums.
        let flags = pairs.iter().filter(|(on, _)| *on && checksum).fold(0, |flags, (_, flag)| flags | flag);
        // SAFETY: TUNSETOFFLOAD takes its argument by value.
        check(unsafe { libc::ioctl(self.file.as_raw_fd(), libc::TUNSETOFFLOAD, libc::c_ulong::from(flags)) })
    }

    fn set_enabled(&mut self, enabled: bool) -> io::Result<()> {
        if self.multiqueue && self.enabled != enabled {
            set_queue(&self.file, enabled)?;
            self.enabled = enabled;
        }
        Ok(())
    }

    fn switch(&self) -> io::Result<Switch> {
        if !self.multiqueue {
            return Ok(Box::new(|_| Ok(())));
        }
        let file = self.file.try_clone()?;
        let state = std::sync::Mutex::new(self.enabled);
        Ok(Box::new(move |enabled| {
            let mut state = state.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            if *state != enabled {
                set_queue(&file, enabled)?;
                *state = enabled;
            }
            Ok(())
        }))
    }

    fn receive(&mut self, frame: &mut [u8]) -> io::Result<Option<usize>> {
        match self.file.read(frame) {
            Ok(count) => Ok(Some(count)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            // A queue that is detached, an interface that is down.
            Err(error) if error.raw_os_error() == Some(libc::EBADFD) => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn send(&mut self, frame: &mut Buffers<'_>) -> io::Result<()> {
        frame.write_to(self.file.as_fd(), None).map(|_| ())
    }
}
