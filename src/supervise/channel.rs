//! Messages over a SOCK_SEQPACKET socket, in packets of bounded size.
//!
//! Each message is JSON, cut into packets. The first byte of a packet says whether the message goes on in the next one.

use super::message::Message;
use crate::seqpacket::is_closed;
use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socketpair};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use thiserror::Error;

/// Bytes of a packet, with its first.
const PACKET_BYTES: usize = 32 << 10;
/// First byte of a packet: the message goes on in the next packet.
const MORE: u8 = 0;
/// First byte of a packet: it is the message's last.
const LAST: u8 = 1;
/// The longest message in bytes, but for those of a vCPU: unread input takes the most, 80 KiB of it, as numbers. In memory a message can
/// be 24 times as long as it was sent, where it has nothing but empty texts.
const MAX_MESSAGE_BYTES: usize = 1 << 20;
/// The longest message of a vCPU in bytes: about twice what a profile takes that has all of its causes, with twenty different times each.
const MAX_VCPU_BYTES: usize = 32 << 20;
/// How the messages of a vCPU begin: [`Message::Vcpu`] and [`Message::VcpuTrace`] as serde writes them.
const VCPU_PREFIXES: [&[u8]; 2] = [b"{\"Vcpu\":", b"{\"VcpuTrace\":"];
/// The most bytes that a machine's process may send, however many vCPUs it has; with fewer, what two messages for each vCPU and
/// [`OTHER_MESSAGES`] can have.
const MAX_TOTAL_BYTES: usize = 512 << 20;
/// More messages than there are beside those of vCPUs: a hundred of progress, and one of each other kind.
const OTHER_MESSAGES: usize = 128;

/// What the machine's process has sent cannot be used. It is not trusted after that.
#[derive(Debug, Error)]
pub(super) enum ChannelError {
    /// The call of recv(2) that reads a packet failed.
    #[error("cannot read from it")]
    Receive(#[source] io::Error),
    /// A packet starts with another byte than [`MORE`] and [`LAST`].
    #[error("a packet starts with byte {0}")]
    Packet(u8),
    /// A message is longer than one of its kind can be.
    #[error("a message is longer than {} MiB", .max_bytes >> 20)]
    TooLong {
        /// The limit in bytes.
        max_bytes: usize,
    },
    /// All messages together have more bytes than this.
    #[error("it has sent more than {} MiB", .0 >> 20)]
    TooMuch(usize),
    /// A message is not what it should be.
    #[error("a message cannot be read")]
    Json(#[source] serde_json::Error),
}

/// Makes a connected pair of sockets: one for each process.
///
/// # Errors
/// Returns the error of socketpair(2).
pub(super) fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?)
}

/// The end of the channel in the machine's process.
pub(super) struct Sender(OwnedFd);

impl Sender {
    /// Makes the sending end from one socket of [`pair`].
    pub(super) fn new(socket: OwnedFd) -> Self {
        Self(socket)
    }

    /// Sends a message. Waits while the parent does not read.
    ///
    /// # Errors
    /// Returns the error of send(2): `BrokenPipe` where the parent is gone.
    pub(super) fn send(&self, message: &Message) -> io::Result<()> {
        let json = serde_json::to_vec(message)?;
        let mut chunks = json.chunks(PACKET_BYTES - 1).peekable();
        let mut packet = Vec::with_capacity(PACKET_BYTES.min(json.len() + 1));
        while let Some(chunk) = chunks.next() {
            packet.clear();
            packet.push(if chunks.peek().is_some() { MORE } else { LAST });
            packet.extend_from_slice(chunk);
            send_packet(self.0.as_fd(), &packet, Wait::Yes)?;
        }
        Ok(())
    }
}

impl AsFd for Sender {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// What a sender does while the other end has no room.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Wait {
    /// It waits until there is room.
    Yes,
    /// It gets an error.
    No,
}

/// Sends one packet.
///
/// # Errors
/// Returns the error of send(2): `WouldBlock` where there is no room, and the sender does not wait.
pub(super) fn send_packet(socket: BorrowedFd<'_>, packet: &[u8], wait: Wait) -> io::Result<()> {
    let flags = match wait {
        Wait::Yes => SendFlags::NOSIGNAL,
        Wait::No => SendFlags::NOSIGNAL | SendFlags::DONTWAIT,
    };
    loop {
        match send(socket, packet, flags) {
            Ok(_) => return Ok(()),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// What the parent's end has received.
#[derive(Debug)]
pub(super) enum Received {
    /// A whole message, put together from its packets.
    Message(Box<Message>),
    /// A part of a message.
    Part,
    /// Nothing is there at the moment.
    Nothing,
    /// The other process has closed its end.
    Closed,
}

/// The end of the channel in the parent process.
pub(super) struct Receiver {
    socket: OwnedFd,
    message: Vec<u8>,
    total: usize,
    max_total: usize,
    packet: Vec<u8>,
}

impl Receiver {
    /// Makes the receiving end from the other socket of [`pair`], for a machine with `vcpus` vCPUs.
    pub(super) fn new(socket: OwnedFd, vcpus: usize) -> Self {
        let of_vcpus = vcpus.saturating_mul(2).saturating_mul(MAX_VCPU_BYTES);
        let max_total = of_vcpus.saturating_add(OTHER_MESSAGES * MAX_MESSAGE_BYTES).min(MAX_TOTAL_BYTES);
        Self { socket, message: Vec::new(), total: 0, max_total, packet: vec![0; PACKET_BYTES] }
    }

    /// Takes one packet, without waiting for it.
    ///
    /// # Errors
    /// [`ChannelError`]: the channel cannot be used afterwards.
    pub(super) fn receive(&mut self) -> Result<Received, ChannelError> {
        let bytes = match recv(&self.socket, &mut self.packet[..], RecvFlags::DONTWAIT) {
            // An empty packet, or the end.
            Ok((0, _)) => return Ok(if is_closed(self.socket.as_fd()) { Received::Closed } else { Received::Part }),
            Ok((bytes, _)) => bytes.min(PACKET_BYTES),
            Err(Errno::AGAIN | Errno::INTR) => return Ok(Received::Nothing),
            // The other end was closed with a request unread. Said once, and before what it has sent.
            Err(Errno::CONNRESET) => return Ok(Received::Part),
            Err(error) => return Err(ChannelError::Receive(error.into())),
        };
        let Some((&first, rest)) = self.packet[..bytes].split_first() else { return Ok(Received::Part) };
        self.total += bytes;
        if self.total > self.max_total {
            return Err(ChannelError::TooMuch(self.max_total));
        }
        self.message.extend_from_slice(rest);
        let of_vcpu = VCPU_PREFIXES.iter().any(|prefix| self.message.starts_with(prefix));
        let max_bytes = if of_vcpu { MAX_VCPU_BYTES } else { MAX_MESSAGE_BYTES };
        if self.message.len() > max_bytes {
            return Err(ChannelError::TooLong { max_bytes });
        }
        match first {
            MORE => Ok(Received::Part),
            LAST => {
                let message = serde_json::from_slice(&std::mem::take(&mut self.message)).map_err(ChannelError::Json)?;
                Ok(Received::Message(Box::new(message)))
            }
            other => Err(ChannelError::Packet(other)),
        }
    }
}

impl AsFd for Receiver {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::console::LineState;

    fn ends() -> (Sender, Receiver) {
        let (parent, child) = pair().expect("sockets");
        (Sender::new(child), Receiver::new(parent, 1))
    }

    #[test]
    fn messages_arrive_whole_whatever_their_length() {
        let (sender, mut receiver) = ends();
        let sent =
            [Message::Progress("a".into()), Message::Failed("b".repeat(100_000)), Message::Complete(LineState::Start)];
        let expected = sent.clone();
        let thread = std::thread::spawn(move || sent.iter().for_each(|message| sender.send(message).expect("sent")));
        let mut found = Vec::new();
        loop {
            match receiver.receive().expect("usable") {
                Received::Message(message) => found.push(*message),
                Received::Part => {}
                Received::Nothing => std::thread::yield_now(),
                Received::Closed => break,
            }
        }
        thread.join().expect("no panic");
        assert_eq!(found, expected);
    }

    #[test]
    fn messages_of_a_process_that_has_not_read_a_request_arrive() {
        let (sender, mut receiver) = ends();
        send_packet(receiver.as_fd(), b"a request", Wait::No).expect("room");
        sender.send(&Message::Complete(LineState::Start)).expect("sent");
        drop(sender);
        let mut found = Vec::new();
        loop {
            match receiver.receive().expect("usable") {
                Received::Message(message) => found.push(*message),
                Received::Part => {}
                Received::Nothing => panic!("the other end is closed"),
                Received::Closed => break,
            }
        }
        assert_eq!(found, [Message::Complete(LineState::Start)]);
    }

    #[test]
    fn what_is_no_message_is_refused() {
        let refused = |packet: &[u8]| {
            let (sender, mut receiver) = ends();
            send_packet(sender.as_fd(), packet, Wait::No).expect("room");
            receiver.receive().expect_err("refused").to_string()
        };
        assert_eq!(refused(b"\x07"), "a packet starts with byte 7");
        assert_eq!(refused(b"\x01{"), "a message cannot be read");
        let nested = format!("\x01{}", r#"{"Ended":{"vcpu":null,"reason":"#.to_owned() + &r#"{"NotSeen":"#.repeat(200));
        assert_eq!(refused(nested.as_bytes()), "a message cannot be read", "a recursion has a limit");
    }

    #[test]
    fn lengths_are_limited() {
        let (sender, mut receiver) = ends();
        let mut after = |start: &[u8], bytes: usize| {
            receiver.message = start.to_vec();
            receiver.message.resize(bytes, b' ');
            send_packet(sender.as_fd(), b"\x001", Wait::No).expect("room");
            receiver.receive()
        };
        for start in [&b"{\"Totals\":"[..], b"", b"[{\"Vcpu\":"] {
            assert!(matches!(after(start, MAX_MESSAGE_BYTES - 1), Ok(Received::Part)));
            let refused = after(start, MAX_MESSAGE_BYTES);
            assert!(matches!(refused, Err(ChannelError::TooLong { max_bytes: MAX_MESSAGE_BYTES })), "{refused:?}");
        }
        for start in VCPU_PREFIXES {
            assert!(matches!(after(start, MAX_VCPU_BYTES - 1), Ok(Received::Part)));
            assert!(matches!(after(start, MAX_VCPU_BYTES), Err(ChannelError::TooLong { max_bytes: MAX_VCPU_BYTES })));
        }
        assert_eq!(receiver.max_total, 2 * MAX_VCPU_BYTES + OTHER_MESSAGES * MAX_MESSAGE_BYTES);
        receiver.total = receiver.max_total;
        send_packet(sender.as_fd(), b"\x001", Wait::No).expect("room");
        assert!(matches!(receiver.receive(), Err(ChannelError::TooMuch(_))));
    }

    #[test]
    fn messages_of_vcpus_begin_as_is_expected() {
        let record = crate::measure::record::tests::sample();
        let messages = crate::supervise::message::of_record(record);
        let of_vcpus = messages.filter(|message| matches!(message, Message::Vcpu(_) | Message::VcpuTrace(_)));
        let json: Vec<_> = of_vcpus.map(|message| serde_json::to_vec(&message).expect("JSON")).collect();
        assert!(json.len() >= 2);
        assert!(json.iter().all(|json| VCPU_PREFIXES.iter().any(|prefix| json.starts_with(prefix))));
    }

    #[test]
    fn an_empty_packet_is_not_the_end() {
        let (sender, mut receiver) = ends();
        send_packet(sender.as_fd(), b"", Wait::No).expect("room");
        sender.send(&Message::Complete(LineState::Start)).expect("sent");
        assert!(matches!(receiver.receive(), Ok(Received::Part)));
        assert!(matches!(receiver.receive(), Ok(Received::Message(_))));
        drop(sender);
        assert!(matches!(receiver.receive(), Ok(Received::Closed)));
    }

    #[test]
    fn a_receiver_that_takes_nothing_does_not_stop_a_sender_that_does_not_wait() {
        let (parent, child) = pair().expect("sockets");
        let full = (0..100_000).find_map(|_| send_packet(parent.as_fd(), &[0; 1000], Wait::No).err());
        assert_eq!(full.expect("full").kind(), io::ErrorKind::WouldBlock);
        drop(child);
    }

    /// The longest record of VM exits that is likely: all causes, twenty different times each.
    #[test]
    fn a_long_record_fits_into_a_message() {
        use crate::measure::record::tests::sample;
        use crate::measure::tally::Bucket;
        let record = sample();
        let mut vcpu = record.trace.expect("a trace").vcpus.swap_remove(0).expect("traced");
        let mut cause = vcpu.causes[0].clone();
        cause.outside.histogram = vec![Bucket { up_to_ns: 123_456, count: 12_345 }; 20];
        vcpu.causes = vec![cause; 33_792];
        vcpu.check_lengths().expect("as long as it may be");
        let bytes = serde_json::to_vec(&Message::VcpuTrace(Some(Box::new(vcpu)))).expect("JSON").len();
        assert!((1 << 20..MAX_VCPU_BYTES / 3 * 2).contains(&bytes), "{bytes}");
    }
}
