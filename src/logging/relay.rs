//! Messages of another process of hwvmm: it sends them over a socket, and this process prints them. Neither waits for the
//! other. The other one may have been taken over by its guest: its packets are checked, escaped, and limited here once more.

use super::messages::print_packet;
use super::packet::{Kind, PACKET_BYTES, Packet, Place, RelaySender, Severity};
use crate::console::LineState;
use crate::seqpacket::is_closed;
use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType, recv, socketpair};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// Packets that [`Relay::forward`] takes at once.
const PACKETS_AT_ONCE: usize = 64;

/// What [`Relay::forward`] has found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Forwarded {
    /// All that was there.
    All,
    /// There may be more.
    Some,
    /// The other process has closed its end; all is forwarded.
    Closed,
}

/// The end that prints.
pub struct Relay {
    socket: OwnedFd,
}

/// Makes a relay and its sender, for another process.
///
/// # Errors
/// Returns the error of socketpair(2).
pub fn relay() -> io::Result<(Relay, RelaySender)> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
    Ok((Relay { socket: ours }, RelaySender::new(theirs.into())))
}

impl Relay {
    /// Prints the messages that are there, a bounded number. Never waits.
    pub fn forward(&self) -> Forwarded {
        for _ in 0..PACKETS_AT_ONCE {
            match self.receive() {
                Ok(packet) if packet.text.is_empty() && packet.kind == Kind::Message => {}
                Ok(packet) => print_packet(&packet),
                Err(Errno::AGAIN | Errno::INTR) => return Forwarded::All,
                Err(_) => return Forwarded::Closed,
            }
        }
        Forwarded::Some
    }

    /// Takes a packet. One that is not hwvmm's is an error message: what Rust's runtime or the C library writes where the socket is
    /// the stderr of the other process.
    fn receive(&self) -> Result<Packet, Errno> {
        let mut buffer = [0; PACKET_BYTES];
        let (bytes, _) = recv(&self.socket, &mut buffer[..], RecvFlags::DONTWAIT)?;
        // An empty packet, or the end.
        if bytes == 0 && is_closed(self.socket.as_fd()) {
            return Err(Errno::PIPE);
        }
        let bytes = &buffer[..bytes.min(PACKET_BYTES)];
        Ok(Packet::decode(bytes).unwrap_or_else(|| other_text(bytes)))
    }
}

/// What was written to the socket as to any stderr.
fn other_text(bytes: &[u8]) -> Packet {
    let text = String::from_utf8_lossy(bytes);
    // The sandbox's own lines, which are written where no lock may be taken.
    let (severity, text) = match text.strip_prefix("hwvmm: ") {
        Some(rest) => (Severity::Say, rest),
        None => (Severity::Error, &*text),
    };
    Packet {
        kind: Kind::Message,
        place: Place { id: 0, severity },
        more: 0,
        line: LineState::Start,
        lost: 0,
        text: text.trim().to_owned(),
    }
}

impl AsFd for Relay {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn packet(text: &str) -> Packet {
        let place = Place { id: 1 << 40, severity: Severity::Warning };
        Packet { kind: Kind::Count, place, more: 3 << 50, line: LineState::Middle, lost: 7, text: text.to_owned() }
    }

    #[test]
    fn packets_arrive_as_they_were_sent() {
        let (relay, sender) = relay().expect("sockets");
        assert_eq!(relay.receive(), Err(Errno::AGAIN));
        assert!(sender.send(&packet("a")) && sender.send(&packet("")));
        assert_eq!(relay.receive(), Ok(packet("a")));
        assert_eq!(relay.receive(), Ok(packet("")));
        drop(sender);
        assert_eq!(relay.receive(), Err(Errno::PIPE));
    }

    #[test]
    fn an_empty_packet_is_not_the_end() {
        let (relay, sender) = relay().expect("sockets");
        rustix::net::send(&sender, b"", rustix::net::SendFlags::NOSIGNAL).expect("room");
        assert!(sender.send(&packet("a")));
        assert_eq!(relay.receive().expect("a packet").text, "");
        assert_eq!(relay.receive(), Ok(packet("a")));
        assert_eq!(relay.forward(), Forwarded::All);
        drop(sender);
        assert_eq!(relay.forward(), Forwarded::Closed);
    }

    #[test]
    fn what_a_runtime_writes_to_stderr_is_an_error_message() {
        let (relay, sender) = relay().expect("sockets");
        for (written, text) in [
            (&b"\nthread 'x' has overflowed its stack\n"[..], "thread 'x' has overflowed its stack"),
            (b"\x01\x02", "\x01\x02"),
        ] {
            rustix::io::write(&sender, written).expect("room");
            let packet = relay.receive().expect("a packet");
            assert_eq!((packet.place.severity, packet.text.as_str()), (Severity::Error, text));
        }
    }

    #[test]
    fn a_sender_does_not_wait() {
        let (relay, sender) = relay().expect("sockets");
        let mut sent = 0;
        while sender.send(&packet(&"x".repeat(9000))) {
            sent += 1;
            assert!(sent < 10_000, "the socket has no end");
        }
        let mut received = 0;
        while let Ok(packet) = relay.receive() {
            received += 1;
            assert!(packet.text.len() < PACKET_BYTES);
        }
        assert_eq!(received, sent);
    }
}
