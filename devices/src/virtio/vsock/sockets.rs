//! The connections of a guest, which a device keeps while it is paused.

use super::connection::Connection;
use super::packet::{Header, OP_RESPONSE, OP_RST, TYPE_STREAM};
use super::spec::HOST_CID;
use crate::virtio::saved::PortPair;
use std::collections::{HashMap, VecDeque};
use std::os::fd::RawFd;

/// The lowest local port of connections that host programs open.
pub(super) const FIRST_LOCAL_PORT: u32 = 1 << 30;

/// The most connections of a guest.
pub(super) const MAX_CONNECTIONS: usize = 1024;
/// The most control packets that wait for receive buffers of the guest; then no packets of the guest are handled.
pub(super) const MAX_CONTROL_PACKETS: usize = 1024;
/// The most connections without an answer: those that are being made, and a packet for each other, with a few that one packet of the
/// guest can add.
pub(super) const MAX_UNANSWERED: usize = 2 * (MAX_CONNECTIONS + MAX_CONTROL_PACKETS);

/// Identifies a connection: the port on the host and the port in the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Key {
    pub(super) local: u32,
    pub(super) peer: u32,
}

/// A connection of the guest that is being made.
pub(super) struct Pending {
    /// The number of the request for it.
    pub(super) number: u32,
    pub(super) key: Key,
    /// The guest's `buf_alloc` and `fwd_cnt`.
    pub(super) buf_alloc: u32,
    pub(super) fwd_cnt: u32,
}

/// All connections of a guest.
pub(super) struct Sockets {
    /// A bounded number: that of the connector's requests without an answer.
    pub(super) pending: Vec<Pending>,
    pub(super) connections: HashMap<Key, Connection>,
    pub(super) by_fd: HashMap<RawFd, Key>,
    /// Packets without data that wait for receive buffers of the guest.
    pub(super) control_packets: VecDeque<Header>,
    pub(super) next_local: u32,
    /// Connections that may have data for the guest, in the order in which they send.
    pub(super) send_queue: VecDeque<Key>,
    /// Bytes of the guest that all connections keep for host programs, at most [`super::connection::MAX_UNSENT_BYTES`].
    pub(super) unsent_bytes: usize,
    /// Connections of host programs may wait in the backlog, as there were too many.
    pub(super) accept_paused: bool,
}

impl Default for Sockets {
    fn default() -> Self {
        Self {
            pending: Vec::new(),
            connections: HashMap::new(),
            by_fd: HashMap::new(),
            control_packets: VecDeque::new(),
            next_local: FIRST_LOCAL_PORT,
            send_queue: VecDeque::new(),
            unsent_bytes: 0,
            accept_paused: false,
        }
    }
}

impl Sockets {
    /// The connections that the guest has asked for, and has no answer to.
    pub(super) fn unanswered(&self) -> Vec<PortPair> {
        let pending = self.pending.iter().map(|pending| pending.key);
        let answers = self.control_packets.iter().filter(|header| [OP_RESPONSE, OP_RST].contains(&header.op));
        let answers = answers.map(|header| Key { local: header.src_port, peer: header.dst_port });
        pending.chain(answers).map(|key| PortPair { host: key.local, guest: key.peer }).collect()
    }

    /// No connections, and a refusal of each of `unanswered`, for a guest with the context ID `cid`.
    pub(super) fn refusing(cid: u32, unanswered: &[PortPair]) -> Self {
        let refusal = |pair: &PortPair| Header {
            src_cid: HOST_CID,
            dst_cid: u64::from(cid),
            src_port: pair.host,
            dst_port: pair.guest,
            kind: TYPE_STREAM,
            op: OP_RST,
            ..Header::default()
        };
        Self { control_packets: unanswered.iter().map(refusal).collect(), ..Self::default() }
    }
}
