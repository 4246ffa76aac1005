//! Tap interfaces (Linux Documentation/networking/tuntap.rst). Frames have struct `virtio_net_hdr`, so that the host's kernel
//! does the offloads.

use super::backend::{Backend, BackendError, Offloads, QueueState, QueueSwitch};
use super::header::HEADER_BYTES;
use crate::memory::Buffers;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::{Arc, Mutex, PoisonError};
use thiserror::Error;

const TUN: &str = "/dev/net/tun";
/// TUNSETQUEUE, which the libc crate lacks: _IOW('T', 217, int).
const TUNSETQUEUE: libc::c_ulong = 0x4004_54d9;
const IFF_ATTACH_QUEUE: i16 = 0x0200;
const IFF_DETACH_QUEUE: i16 = 0x0400;

/// A tap interface cannot be opened.
#[derive(Debug, Error)]
pub enum TapError {
    /// `/dev/net/tun` cannot be opened.
    #[error("cannot open {TUN}: check that the module tun is loaded (modprobe tun) and that you have access")]
    Open(#[source] io::Error),
    /// The interface cannot be attached to.
    #[error(
        "cannot use the tap interface {name}{}",
        match .source.raw_os_error() {
            Some(libc::EPERM) => ": it belongs to another user, or does not exist; root creates it with \
                `ip tuntap add NAME mode tap user $USER`",
            Some(libc::EBUSY) => ": another program uses it",
            Some(libc::EINVAL) => ": it is not a tap interface, or has another number of queues: \
                queues=N needs one created with `ip tuntap add NAME mode tap multi_queue`",
            _ => "",
        }
    )]
    Interface {
        /// Name of the interface.
        name: String,
        /// The error of the ioctl (TUNSETIFF, TUNSETVNETHDRSZ).
        source: io::Error,
    },
}

/// One queue of a tap interface.
pub struct Tap {
    file: File,
    queues: TapQueues,
}

/// The number of queues of a tap interface, of which several need `IFF_MULTI_QUEUE`.
#[derive(Clone, Copy, PartialEq, Eq)]
enum TapQueues {
    Single,
    Multiple,
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

fn set_queue(file: &File, state: QueueState) -> io::Result<()> {
    let flags = match state {
        QueueState::Attached => IFF_ATTACH_QUEUE,
        QueueState::Detached => IFF_DETACH_QUEUE,
    };
    let request = request("", flags);
    // SAFETY: TUNSETQUEUE reads one ifreq, which lives for the call.
    check(unsafe { libc::ioctl(file.as_raw_fd(), TUNSETQUEUE, &raw const request) })
}

impl Tap {
    /// Opens `queues` queues of the interface `name`. The interface is created where it does not exist and the user may do so.
    ///
    /// # Errors
    /// Returns [`TapError`] where the interface cannot be opened, with advice.
    pub fn open(name: &str, queues: u16) -> Result<Vec<Self>, TapError> {
        let kind = if queues > 1 { TapQueues::Multiple } else { TapQueues::Single };
        (0..queues.max(1)).map(|_| Self::open_queue(name, kind)).collect()
    }

    fn open_queue(name: &str, queues: TapQueues) -> Result<Self, TapError> {
        let file =
            File::options().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(TUN).map_err(TapError::Open)?;
        let mut flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
        if queues == TapQueues::Multiple {
            flags |= libc::IFF_MULTI_QUEUE;
        }
        let request = request(name, i16::try_from(flags).unwrap_or(0));
        let bad = |source| TapError::Interface { name: name.to_owned(), source };
        // SAFETY: TUNSETIFF reads and writes one ifreq, which lives for the call.
        check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw const request) }).map_err(bad)?;
        let header = i32::try_from(HEADER_BYTES).unwrap_or(12);
        // SAFETY: TUNSETVNETHDRSZ reads one int, which lives for the call.
        check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const header) }).map_err(bad)?;
        Ok(Self { file, queues })
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
        // TSO and UFO need checksum offload.
        let flags = pairs.iter().filter(|(on, _)| *on && checksum).fold(0, |flags, (_, flag)| flags | flag);
        // SAFETY: TUNSETOFFLOAD takes its argument by value.
        check(unsafe { libc::ioctl(self.file.as_raw_fd(), libc::TUNSETOFFLOAD, libc::c_ulong::from(flags)) })
    }

    fn queue_switch(&self) -> io::Result<QueueSwitch> {
        if self.queues == TapQueues::Single {
            return Ok(Arc::new(|_| Ok(())));
        }
        let file = self.file.try_clone()?;
        let current = Mutex::new(QueueState::Attached);
        Ok(Arc::new(move |state| {
            let mut current = current.lock().unwrap_or_else(PoisonError::into_inner);
            if *current != state {
                set_queue(&file, state)?;
                *current = state;
            }
            Ok(())
        }))
    }

    fn receive(&mut self, frame: &mut [u8]) -> Result<Option<usize>, BackendError> {
        match self.file.read(frame) {
            Ok(count) => Ok(Some(count)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            // The queue is detached, or the interface is down.
            Err(error) if error.raw_os_error() == Some(libc::EBADFD) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    fn send(&mut self, frame: &mut Buffers<'_>) -> Result<(), BackendError> {
        frame.write_to(self.file.as_fd(), None)?;
        Ok(())
    }
}
