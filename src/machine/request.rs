//! Requests of the parent process to a running machine.

use super::saving::Save;
use crate::event_loop::OnReadable;
use crate::exit::{CommandEnd, EndReason, Signal};
use crate::vcpu::Control;
use event_manager::MutEventSubscriber;
use rustix::io::Errno;
use rustix::net::{RecvFlags, recv};
use serde::{Deserialize, Serialize};
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

/// Why the parent process wants the run to end. Each is sent as one packet with the JSON of the value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum StopRequest {
    /// hwvmm got a signal that ends programs.
    Signal(Signal),
    /// The time of `--timeout` passed: its length.
    TimedOut(Duration),
    /// The guest's command had not started when the time of `--boot-timeout` passed: its length.
    NotBooted(Duration),
    /// The guest's command has ended, and the guest goes on.
    Command(CommandEnd),
    /// The guest said that it cannot run the command, and goes on.
    NoCommand,
    /// The guest is ready for a command: it is to be saved first.
    Save,
}

impl StopRequest {
    /// The longest packet in bytes.
    pub const MAX_BYTES: usize = 256;

    /// Returns the end that the request leads to.
    #[must_use]
    pub fn end(self) -> EndReason {
        match self {
            Self::Signal(signal) => EndReason::Signal(signal),
            Self::TimedOut(after) => EndReason::TimedOut(after),
            Self::NotBooted(after) => EndReason::NotBooted(after),
            Self::Command(end) => EndReason::Command(end),
            Self::NoCommand => EndReason::NoCommand(None),
            Self::Save => EndReason::Saved,
        }
    }
}

/// What one look at the socket has brought.
enum Received {
    Request(StopRequest),
    /// Nothing that can be used.
    Nothing,
    /// The parent process is gone.
    Closed,
}

fn receive(socket: &OwnedFd) -> Received {
    let mut packet = [0; StopRequest::MAX_BYTES];
    match recv(socket, &mut packet[..], RecvFlags::DONTWAIT) {
        Ok((0, _)) => Received::Closed,
        Ok((bytes, _)) => match serde_json::from_slice(packet.get(..bytes).unwrap_or_default()) {
            Ok(request) => Received::Request(request),
            Err(error) => {
                log::error!("a request to end the run cannot be read: {error}");
                Received::Nothing
            }
        },
        Err(Errno::AGAIN | Errno::INTR) => Received::Nothing,
        Err(_) => Received::Closed,
    }
}

/// Returns a subscriber that ends the run when a request arrives on `socket`, or when the parent process is gone.
pub(super) fn requests(
    socket: BorrowedFd<'_>,
    control: &Arc<Control>,
    save: Save,
) -> io::Result<Box<dyn MutEventSubscriber>> {
    let socket = socket.try_clone_to_owned()?;
    let control = Arc::clone(control);
    Ok(Box::new(OnReadable::new(socket, move |socket: &OwnedFd| match receive(socket) {
        Received::Request(StopRequest::Save) => control.end(save(), None),
        Received::Request(request) => control.end(request.end(), None),
        Received::Nothing => {}
        Received::Closed => {
            control.end(EndReason::Failed("the process that started the machine is gone".into()), None);
        }
    })))
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::net::{AddressFamily, SendFlags, SocketFlags, SocketType, send, socketpair};

    #[test]
    fn requests_are_read_one_by_one() {
        let flags = SocketFlags::CLOEXEC;
        let (parent, child) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).expect("sockets");
        let asked = [
            StopRequest::Signal(Signal::TERM),
            StopRequest::TimedOut(Duration::MAX),
            StopRequest::NotBooted(Duration::MAX),
            StopRequest::Command(CommandEnd::Exited(7)),
            StopRequest::NoCommand,
            StopRequest::Save,
        ];
        for request in asked {
            let packet = serde_json::to_vec(&request).expect("JSON");
            assert!(packet.len() <= StopRequest::MAX_BYTES, "{}", packet.len());
            send(&parent, &packet, SendFlags::empty()).expect("room");
        }
        send(&parent, b"?", SendFlags::empty()).expect("room");
        for request in asked {
            assert!(matches!(receive(&child), Received::Request(found) if found == request));
        }
        assert!(matches!(receive(&child), Received::Nothing), "no request");
        assert!(matches!(receive(&child), Received::Nothing), "nothing to read");
        drop(parent);
        assert!(matches!(receive(&child), Received::Closed));
    }
}
