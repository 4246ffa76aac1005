//! The connections of a guest, which a device keeps while it is paused.

use super::connection::Connection;
use super::packet::Header;
use std::collections::{HashMap, VecDeque};
use std::os::fd::RawFd;

/// The lowest local port of connections that host programs open.
pub(super) const FIRST_LOCAL_PORT: u32 = 1 << 30;

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
