//! A port: its queues, and the connection behind it.

use crate::virtio::queue::Virtqueue;
use crate::virtio::saved::PortState;
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, Shutdown, recv, send, shutdown};
use std::os::unix::net::UnixStream;

/// The most bytes of a chain. Linux sends 32 KiB at once (`port_fops_write`).
pub(super) const MAX_CHAIN_BYTES: u32 = 64 << 10;
/// Bytes that are moved to the guest at once.
const READ_BYTES: usize = 16 << 10;

/// Which way the bytes of a port go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flow {
    /// From the host: a guest that has closed the port reads no more.
    ToGuest,
    /// To the host: a guest that has closed the port has sent all, and the host closes the connection when it has all.
    FromGuest,
    /// Both ways.
    Both,
}

/// A port of the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PortSpec {
    /// The name that the guest sees in /sys/class/virtio-ports/*/name.
    pub name: &'static str,
    /// The port of the host that its connection is asked for by, as one of the vsock device's is.
    pub host_port: u32,
    /// Which way its bytes go.
    pub flow: Flow,
}

/// The connection behind a port.
#[derive(Debug)]
enum Connection {
    /// The guest has not opened the port yet.
    None,
    /// It was asked for, by this number.
    Asked(u32),
    /// There is one.
    Open(UnixStream),
    /// There was one, or none could be had. A port has one connection until the driver resets the device.
    Over,
}

/// What the driver knows of the host's connection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum HostSide {
    /// There is none.
    #[default]
    Closed,
    /// There is one.
    Open,
}

/// What a port has besides its queues. The device keeps it while no worker has it.
#[derive(Debug)]
pub(super) struct Link {
    connection: Connection,
    /// Bytes of the guest that the connection has not taken, of one chain: at most [`MAX_CHAIN_BYTES`], from `sent` on.
    held: Vec<u8>,
    sent: usize,
    /// The last look at what the guest sends has left a chain in the queue.
    refused: bool,
    /// The guest has closed the port, and sends no more.
    closing: bool,
    /// A program of the guest has the port open.
    is_open: bool,
    /// What the last message for the driver says that was made.
    pub(super) said: HostSide,
    /// What the last message says that the driver has got.
    pub(super) told: HostSide,
    /// As the worker ended, the guest had sent what its connection had not taken.
    pub(super) has_unsent: bool,
}

impl Default for Link {
    fn default() -> Self {
        Self {
            connection: Connection::None,
            held: Vec::new(),
            sent: 0,
            refused: false,
            closing: false,
            is_open: false,
            said: HostSide::Closed,
            told: HostSide::Closed,
            has_unsent: false,
        }
    }
}

impl Link {
    /// The port of a guest that goes on from a snapshot. Its connection is to be asked for.
    pub(super) fn restored(state: PortState) -> Self {
        let told = if state.is_told { HostSide::Open } else { HostSide::Closed };
        Self { is_open: state.is_open, said: told, told, ..Self::default() }
    }

    pub(super) fn save(&self) -> PortState {
        PortState {
            is_open: self.is_open,
            is_told: self.told == HostSide::Open,
            has_ended: matches!(self.connection, Connection::Over),
        }
    }
}

/// A port.
pub(super) struct Stream {
    pub(super) spec: PortSpec,
    receive: Virtqueue,
    transmit: Virtqueue,
    pub(super) link: Link,
}

/// How often in a row a queue is looked at whose reader keeps up, before the other ports have their turn.
const LOOKS: usize = 16;

/// Whether a connection goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Go {
    On,
    /// The host's end is gone.
    Ended,
}

impl Stream {
    pub(super) fn new(spec: PortSpec, receive: Virtqueue, transmit: Virtqueue, link: Link) -> Self {
        Self { spec, receive, transmit, link }
    }

    /// Takes out what the next worker goes on with.
    pub(super) fn take_link(&mut self) -> Link {
        let mut link = std::mem::take(&mut self.link);
        // What waits for a connection that there never was goes to the next one as well.
        let has_connection = matches!(link.connection, Connection::Open(_));
        link.has_unsent = has_connection && (!link.held.is_empty() || link.refused || self.transmit.has_available());
        link
    }

    /// The eventfds that the driver kicks.
    pub(super) fn kicks(&self) -> [&vmm_sys_util::eventfd::EventFd; 2] {
        [self.receive.kick(), self.transmit.kick()]
    }

    /// A program of the guest has opened the port.
    pub(super) fn open(&mut self) {
        self.link.is_open = true;
    }

    /// Returns true if the guest has the port open, and its connection was not asked for.
    pub(super) fn wants_connection(&self) -> bool {
        self.link.is_open && matches!(self.link.connection, Connection::None)
    }

    /// The connection was asked for by this number; `None` where that is impossible.
    pub(super) fn asked(&mut self, number: Option<u32>) {
        self.link.connection = number.map_or(Connection::Over, Connection::Asked);
    }

    /// Returns true if its connection was asked for by this number.
    pub(super) fn is_asked(&self, number: u32) -> bool {
        matches!(self.link.connection, Connection::Asked(asked) if asked == number)
    }

    /// Takes the connection; `None` where there is none to be had. Returns it to be watched.
    pub(super) fn connect(&mut self, socket: Option<UnixStream>) -> Option<&UnixStream> {
        self.link.connection = socket.map_or(Connection::Over, Connection::Open);
        self.socket()
    }

    /// The connection, where there is one.
    pub(super) fn socket(&self) -> Option<&UnixStream> {
        match &self.link.connection {
            Connection::Open(socket) => Some(socket),
            Connection::None | Connection::Asked(_) | Connection::Over => None,
        }
    }

    /// The guest has closed the port. What it sent before is in the queue.
    pub(super) fn close(&mut self) {
        self.link.closing = true;
        self.link.is_open = false;
    }

    /// Moves what can be moved. Returns the connection where it has ended, to be watched no more.
    pub(super) fn serve(&mut self) -> Option<UnixStream> {
        let go = match (self.send(), self.deliver()) {
            (Go::On, Go::On) => self.finish(),
            _ => Go::Ended,
        };
        if go == Go::On {
            return None;
        }
        (self.link.held, self.link.sent) = (Vec::new(), 0);
        match std::mem::replace(&mut self.link.connection, Connection::Over) {
            Connection::Open(socket) => Some(socket),
            Connection::None | Connection::Asked(_) | Connection::Over => None,
        }
    }

    /// Ends what the guest has closed, once all that it sent was taken.
    fn finish(&mut self) -> Go {
        if !self.link.closing || self.link.refused || !self.link.held.is_empty() {
            return Go::On;
        }
        let Some(socket) = self.socket() else { return Go::On };
        if self.spec.flow == Flow::ToGuest {
            return Go::Ended;
        }
        match shutdown(socket, Shutdown::Write) {
            Ok(()) => {
                self.link.closing = false;
                Go::On
            }
            Err(_) => Go::Ended,
        }
    }

    /// Takes what the guest sends. Without a connection it stays in the queue, and behind one it is dropped.
    fn send(&mut self) -> Go {
        for _ in 0..LOOKS {
            let go = self.send_once();
            // A chain that had to wait has room now, where its reader has taken what was before it: no event says so.
            if go == Go::Ended || !self.link.refused || !self.link.held.is_empty() || self.socket().is_none() {
                return go;
            }
        }
        // The other ports come first.
        if let Err(error) = self.transmit.kick().write(1) {
            log::error!("port {}: its queue cannot be looked at again: {error}", self.spec.name);
        }
        Go::On
    }

    fn send_once(&mut self) -> Go {
        let Self { transmit, link: Link { connection, held, sent, refused, .. }, .. } = self;
        let mut go = Go::On;
        *refused = false;
        transmit.serve(|chain| {
            let socket = match &*connection {
                Connection::Open(socket) if go == Go::On => socket,
                Connection::Open(_) | Connection::None | Connection::Asked(_) => {
                    *refused = true;
                    return None;
                }
                Connection::Over => return Some(0),
            };
            // What is left of the chain before.
            if drain(socket, held, sent, &mut go) == Taken::Not {
                *refused = true;
                return None;
            }
            held.resize(chain.readable.len().min(MAX_CHAIN_BYTES as usize), 0);
            let read = chain.readable.read(held);
            held.truncate(read);
            // The chain is the guest's again, and its bytes are held here where the connection does not take them.
            drain(socket, held, sent, &mut go);
            Some(0)
        });
        if let Connection::Open(socket) = &*connection
            && go == Go::On
        {
            drain(socket, held, sent, &mut go);
        }
        go
    }

    /// Gives the guest what comes, as it has buffers for it.
    fn deliver(&mut self) -> Go {
        let Self { receive, link: Link { connection, .. }, .. } = self;
        let mut bytes = [0; READ_BYTES];
        let mut go = Go::On;
        receive.serve(|chain| {
            let Connection::Open(socket) = &*connection else { return None };
            if go == Go::Ended {
                return None;
            }
            let wanted = chain.writable.len().min(bytes.len());
            if wanted == 0 {
                return Some(0);
            }
            match recv(socket, &mut bytes[..wanted], RecvFlags::DONTWAIT) {
                Ok((count, _)) if count > 0 => {
                    Some(u32::try_from(chain.writable.write(bytes.get(..count).unwrap_or_default())).unwrap_or(0))
                }
                Err(Errno::AGAIN | Errno::INTR) => None,
                // The end, or a connection that was reset.
                Ok(_) | Err(_) => {
                    go = Go::Ended;
                    None
                }
            }
        });
        go
    }
}

/// What became of bytes that are held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Taken {
    All,
    /// Some are left.
    Not,
}

/// Sends what is held, as far as the connection takes it. Where that is gone, `go` says so, and the bytes are dropped.
fn drain(socket: &UnixStream, held: &mut Vec<u8>, sent: &mut usize, go: &mut Go) -> Taken {
    while *sent < held.len() {
        match send(socket, held.get(*sent..).unwrap_or_default(), SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
            Ok(count) => *sent += count,
            Err(Errno::INTR) => {}
            // Where the host lacks memory, too, they wait: a stream that ends early looks as if it were whole.
            Err(Errno::AGAIN | Errno::NOBUFS | Errno::NOMEM) => return Taken::Not,
            Err(error) => {
                // Its reader is gone.
                if !matches!(error, Errno::PIPE | Errno::CONNRESET) {
                    log::error!("a port's connection is given up: {error}");
                }
                *go = Go::Ended;
                break;
            }
        }
    }
    held.clear();
    *sent = 0;
    Taken::All
}
