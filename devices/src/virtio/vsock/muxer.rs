//! The worker of the socket device, which handles all connections of a guest.

use super::connection::{BUFFER_BYTES, Connection, ConnectionError, MAX_UNSENT_BYTES, State};
use super::connector::Connector;
use super::events::Events as GuestEvents;
use super::packet::{
    HEADER_BYTES, Header, OP_CREDIT_REQUEST, OP_CREDIT_UPDATE, OP_REQUEST, OP_RESPONSE, OP_RST, OP_RW, OP_SHUTDOWN,
    SHUTDOWN_SEND, TYPE_STREAM,
};
use super::sockets::{FIRST_LOCAL_PORT, Key, MAX_CONNECTIONS, MAX_CONTROL_PACKETS, Pending, Sockets};
use super::spec::HOST_CID;
use crate::error::chain as error_chain;
use crate::memory::{Buffers, Memory};
use crate::path_text::PathText as _;
use crate::socket::Listener;
use crate::virtio::chain::Chain;
use crate::virtio::queue::Virtqueue;
use crate::virtio::slot::Slot;
use crate::virtio::worker::watch;
use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;

/// The most bytes of a CONNECT line; the longest valid one is `CONNECT 4294967295\n`.
const MAX_LINE: usize = 32;

pub(super) struct Muxer {
    cid: u64,
    /// Where host programs connect; `None` where none can.
    listener: Option<Arc<Listener>>,
    connector: Arc<Connector>,
    receive: Virtqueue,
    transmit: Virtqueue,
    /// Where the guest is to be told of closed connections.
    events: Option<GuestEvents>,
    sockets: Sockets,
    /// Where the connections go when the worker ends.
    slot: Slot<Sockets>,
}

/// What a worker is made of.
pub(super) struct MuxerSetup {
    pub(super) cid: u64,
    pub(super) listener: Option<Arc<Listener>>,
    pub(super) connector: Arc<Connector>,
    pub(super) receive: Virtqueue,
    pub(super) transmit: Virtqueue,
    pub(super) events: Option<GuestEvents>,
    /// Has the connections from before a pause.
    pub(super) slot: Slot<Sockets>,
}

impl Drop for Muxer {
    fn drop(&mut self) {
        self.slot.put(Some(std::mem::take(&mut self.sockets)));
    }
}

impl Muxer {
    pub(super) fn new(setup: MuxerSetup) -> Self {
        let MuxerSetup { cid, listener, connector, receive, transmit, events, slot } = setup;
        let sockets = slot.take().unwrap_or_default();
        Self { cid, listener, connector, receive, transmit, events, sockets, slot }
    }

    fn header(&mut self, key: Key, op: u16) -> Header {
        let fwd_cnt = self.sockets.connections.get_mut(&key).map_or(0, Connection::fwd_cnt_for_packet);
        Header {
            src_cid: HOST_CID,
            dst_cid: self.cid,
            src_port: key.local,
            dst_port: key.peer,
            kind: TYPE_STREAM,
            op,
            buf_alloc: BUFFER_BYTES,
            fwd_cnt,
            ..Header::default()
        }
    }

    /// Queues a packet without data for the guest.
    fn send_control(&mut self, key: Key, op: u16) {
        let header = self.header(key, op);
        self.sockets.control_packets.push_back(header);
    }

    /// Adds a connection to the send queue, where it is not in it.
    fn queue_send(&mut self, key: Key) {
        if let Some(connection) = self.sockets.connections.get_mut(&key)
            && !std::mem::replace(&mut connection.queued, true)
        {
            self.sockets.send_queue.push_back(key);
        }
    }

    fn add(&mut self, key: Key, connection: Connection, ops: &mut EventOps<'_>) {
        let events = EventSet::IN | EventSet::OUT | EventSet::EDGE_TRIGGERED;
        watch(ops, Events::new(&connection.stream, events));
        self.sockets.by_fd.insert(connection.stream.as_raw_fd(), key);
        self.sockets.connections.insert(key, connection);
    }

    fn remove(&mut self, key: Key, ops: &mut EventOps<'_>) {
        if let Some(connection) = self.sockets.connections.remove(&key) {
            self.sockets.by_fd.remove(&connection.stream.as_raw_fd());
            self.sockets.unsent_bytes = self.sockets.unsent_bytes.saturating_sub(connection.unsent_bytes());
            if connection.queued {
                // A guest that connects and resets over and over would fill the queue with keys of connections that are gone.
                self.sockets.send_queue.retain(|queued| *queued != key);
            }
            if let Err(error) = ops.remove(Events::new(&connection.stream, EventSet::IN)) {
                log::debug!("vsock: cannot remove a socket from the event loop: {error}");
            }
        }
    }

    /// Ends a connection on both sides.
    fn reset(&mut self, key: Key, ops: &mut EventOps<'_>) {
        self.send_control(key, OP_RST);
        self.remove(key, ops);
    }

    /// Accepts connections of host programs.
    fn accept(&mut self, ops: &mut EventOps<'_>) {
        let Some(listener) = self.listener.clone() else { return };
        loop {
            self.sockets.accept_paused = self.sockets.connections.len() >= MAX_CONNECTIONS;
            if self.sockets.accept_paused {
                return;
            }
            match listener.socket().accept() {
                Ok((stream, _)) => {
                    if let Err(error) = stream.set_nonblocking(true) {
                        log::warn!("vsock: cannot set a connection to non-blocking: {error}");
                        continue;
                    }
                    // The port in the guest is not known yet.
                    let key = Key { local: self.free_port(), peer: 0 };
                    self.add(key, Connection::new(stream, State::AwaitingConnectLine), ops);
                    self.read_connect_line(key, ops);
                }
                Err(_) => return,
            }
        }
    }

    /// Returns a local port that no connection has.
    fn free_port(&mut self) -> u32 {
        loop {
            let port = self.sockets.next_local;
            self.sockets.next_local = port.checked_add(1).unwrap_or(FIRST_LOCAL_PORT);
            if !self.sockets.connections.keys().any(|key| key.local == port) {
                return port;
            }
        }
    }

    /// Reads `CONNECT PORT\n`, a byte at a time, as what follows is data for the guest.
    fn read_connect_line(&mut self, key: Key, ops: &mut EventOps<'_>) {
        let Some(connection) = self.sockets.connections.get_mut(&key) else { return };
        let mut byte = [0];
        while connection.line.last() != Some(&b'\n') {
            match connection.stream.read(&mut byte) {
                Ok(1) if connection.line.len() < MAX_LINE => connection.line.push(byte[0]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Ok(_) | Err(_) => return self.remove(key, ops),
            }
        }
        let text = String::from_utf8_lossy(&connection.line).into_owned();
        let port = text.trim_end().strip_prefix("CONNECT ").and_then(|port| port.trim().parse::<u32>().ok());
        let Some(peer) = port else {
            log::warn!("vsock: a host program sent {text:?} where \"CONNECT PORT\" was expected");
            return self.remove(key, ops);
        };
        let named = Key { peer, ..key };
        // The guest can have a connection of its own with this port of the host.
        if self.sockets.connections.contains_key(&named) && named != key {
            return self.remove(key, ops);
        }
        let Some(mut connection) = self.sockets.connections.remove(&key) else { return };
        connection.state = State::Requested;
        self.sockets.by_fd.insert(connection.stream.as_raw_fd(), named);
        self.sockets.connections.insert(named, connection);
        self.send_control(named, OP_REQUEST);
    }

    /// Handles the available packets of the guest.
    fn receive_packets(&mut self, ops: &mut EventOps<'_>) {
        let memory = self.transmit.memory();
        loop {
            self.transmit.disable_notification();
            while self.sockets.control_packets.len() < MAX_CONTROL_PACKETS
                && let Some(mut chain) = self.transmit.pop(&memory)
            {
                if let Some(header) = Header::read(&mut chain.readable) {
                    self.receive_packet(&header, &mut chain.readable, ops);
                }
                self.transmit.push(chain.head, 0);
            }
            self.transmit.notify();
            // Where too many control packets wait, the kick of the receive queue for new buffers continues.
            if self.sockets.control_packets.len() >= MAX_CONTROL_PACKETS || !self.transmit.enable_notification() {
                return;
            }
        }
    }

    fn receive_packet(&mut self, header: &Header, data: &mut Buffers<'_>, ops: &mut EventOps<'_>) {
        let key = Key { local: header.dst_port, peer: header.src_port };
        if header.src_cid != self.cid || header.dst_cid != HOST_CID {
            return;
        }
        if header.kind != TYPE_STREAM {
            // A reset of the same type (virtio 1.3 §5.10.6.4.2).
            let reset = Header { kind: header.kind, ..self.header(key, OP_RST) };
            self.sockets.control_packets.push_back(reset);
            return;
        }
        // The guest does not know of a connection whose guest port is not known yet.
        let is_known = |connection: &&mut Connection| connection.state != State::AwaitingConnectLine;
        let Some(connection) = self.sockets.connections.get_mut(&key).filter(is_known) else {
            return self.receive_unconnected(key, header, ops);
        };
        connection.update_credit(header.buf_alloc, header.fwd_cnt);
        match header.op {
            OP_RST => return self.remove(key, ops),
            OP_CREDIT_REQUEST => self.send_control(key, OP_CREDIT_UPDATE),
            _ => {
                let (before, room) =
                    (connection.unsent_bytes(), MAX_UNSENT_BYTES.saturating_sub(self.sockets.unsent_bytes));
                let handled = handle_packet(connection, key, header, data, room);
                self.sockets.unsent_bytes =
                    (self.sockets.unsent_bytes + connection.unsent_bytes()).saturating_sub(before);
                if let Err(error) = handled {
                    log::debug!("vsock: {key:?} is reset: {}", error_chain(&error));
                    return self.reset(key, ops);
                }
            }
        }
        self.queue_send(key);
    }

    /// Handles the guest's request to connect to a port of the host.
    fn connect(&mut self, key: Key, header: &Header, ops: &mut EventOps<'_>) {
        if self.sockets.connections.len() + self.sockets.pending.len() >= MAX_CONNECTIONS {
            log::info!("vsock: connection to port {} refused: there are {MAX_CONNECTIONS} connections", key.local);
            return self.send_control(key, OP_RST);
        }
        let requested = self.connector.request(key.local).or_else(|error| {
            if error.kind() != io::ErrorKind::WouldBlock {
                return Err(error);
            }
            self.take_answers(ops);
            self.connector.request(key.local)
        });
        match requested {
            Ok(number) => {
                let Header { buf_alloc, fwd_cnt, .. } = *header;
                self.sockets.pending.push(Pending { number, key, buf_alloc, fwd_cnt });
            }
            Err(error) => self.refuse(key, &error),
        }
    }

    fn refuse(&mut self, key: Key, error: &io::Error) {
        match &self.listener {
            Some(listener) => {
                log::info!("vsock: connection to port {} refused: {}_{0}: {error}", key.local, listener.path().shown());
            }
            None => log::info!("vsock: connection to port {} refused: {error}", key.local),
        }
        self.send_control(key, OP_RST);
    }

    /// Takes the connections that were made.
    fn take_answers(&mut self, ops: &mut EventOps<'_>) {
        while let Some(answer) = self.connector.answer() {
            // Otherwise the guest does not want it any longer, or the device was reset: the connection is closed.
            let Some(index) = self.sockets.pending.iter().position(|pending| pending.number == answer.number) else {
                continue;
            };
            let Pending { key, buf_alloc, fwd_cnt, .. } = self.sockets.pending.swap_remove(index);
            match answer.result {
                // The guest uses a port that hwvmm has given to a host program meanwhile.
                Ok(_) if self.sockets.connections.contains_key(&key) => {}
                Ok(stream) => {
                    let mut connection = Connection::new(stream, State::Established);
                    connection.update_credit(buf_alloc, fwd_cnt);
                    self.add(key, connection, ops);
                    self.send_control(key, OP_RESPONSE);
                    self.queue_send(key);
                }
                Err(error) => self.refuse(key, &error),
            }
        }
    }

    /// Handles a packet without a connection.
    fn receive_unconnected(&mut self, key: Key, header: &Header, ops: &mut EventOps<'_>) {
        let before = self.sockets.pending.len();
        self.sockets.pending.retain(|pending| pending.key != key);
        let was_pending = self.sockets.pending.len() < before;
        match header.op {
            OP_RST => {}
            OP_REQUEST if !was_pending => self.connect(key, header, ops),
            // A connection that is being made takes nothing but a reset.
            _ => self.send_control(key, OP_RST),
        }
    }

    /// Sends packets to the guest: control packets first, then data of the connections in the send queue.
    fn send_packets(&mut self, memory: &Memory, ops: &mut EventOps<'_>) {
        loop {
            self.receive.disable_notification();
            while !self.sockets.control_packets.is_empty() || !self.sockets.send_queue.is_empty() {
                let Some(mut chain) = self.receive.pop(memory) else { break };
                let written = match self.sockets.control_packets.pop_front() {
                    Some(header) => Some(chain.writable.write(&header.to_bytes())),
                    None => self.write_data_packet(&mut chain, ops),
                };
                match written {
                    Some(bytes) => self.receive.push(chain.head, u32::try_from(bytes).unwrap_or(0)),
                    None => self.receive.undo_pop(),
                }
            }
            self.receive.notify();
            let waiting = !self.sockets.control_packets.is_empty() || !self.sockets.send_queue.is_empty();
            // Kicks for new receive buffers are needed only where packets wait for them.
            if !waiting || !self.receive.enable_notification() {
                return;
            }
        }
    }

    /// Writes a packet of the next connection in the send queue to `chain` and returns its length in bytes. `None` where the
    /// connection has no data.
    fn write_data_packet(&mut self, chain: &mut Chain<'_>, ops: &mut EventOps<'_>) -> Option<usize> {
        let key = self.sockets.send_queue.pop_front()?;
        let connection = self.sockets.connections.get_mut(&key)?;
        connection.queued = false;
        if connection.is_closed() {
            self.reset(key, ops);
            return None;
        }
        if connection.needs_credit_update() {
            self.send_control(key, OP_CREDIT_UPDATE);
            self.queue_send(key);
            return None;
        }
        if !connection.can_send() || chain.writable.len() <= HEADER_BYTES {
            return None;
        }
        let mut header_buffer = chain.writable.split_to(HEADER_BYTES);
        match connection.read_into(&mut chain.writable) {
            Ok(0) => {
                connection.end_of_stream = true;
                // The guest can still send.
                let header = Header { flags: SHUTDOWN_SEND, ..self.header(key, OP_SHUTDOWN) };
                Some(header_buffer.write(&header.to_bytes()))
            }
            Ok(count) => {
                let len = u32::try_from(count).unwrap_or(0);
                let header = Header { len, ..self.header(key, OP_RW) };
                self.queue_send(key);
                Some(header_buffer.write(&header.to_bytes()) + count)
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                connection.readable = false;
                None
            }
            Err(error) => {
                log::debug!("vsock: {key:?} is reset: {error}");
                self.reset(key, ops);
                None
            }
        }
    }

    /// Handles events of a connection's socket.
    fn handle_socket_event(&mut self, key: Key, set: EventSet, ops: &mut EventOps<'_>) {
        let Some(connection) = self.sockets.connections.get_mut(&key) else { return };
        if connection.state == State::AwaitingConnectLine {
            return self.read_connect_line(key, ops);
        }
        if set.intersects(EventSet::IN | EventSet::HANG_UP | EventSet::READ_HANG_UP | EventSet::ERROR) {
            connection.readable = true;
        }
        let before = connection.unsent_bytes();
        let flushed = connection.flush();
        self.sockets.unsent_bytes = (self.sockets.unsent_bytes + connection.unsent_bytes()).saturating_sub(before);
        if flushed.is_err() {
            return self.reset(key, ops);
        }
        self.queue_send(key);
    }
}

/// Handles a packet of the guest for a connection, other than a reset and a credit request. `room` is how many bytes more
/// may be kept for its host program.
fn handle_packet(
    connection: &mut Connection,
    key: Key,
    header: &Header,
    data: &mut Buffers<'_>,
    room: usize,
) -> Result<(), ConnectionError> {
    match (header.op, connection.state) {
        (OP_RESPONSE, State::Requested) => {
            connection.state = State::Established;
            connection.stream.write_all(format!("OK {}\n", key.local).as_bytes())?;
            Ok(())
        }
        (OP_RW, State::Established) => {
            let expected = usize::try_from(header.len).unwrap_or(usize::MAX);
            let mut data = data.split_to(expected);
            if data.len() < expected {
                return Err(ConnectionError::ShortPacket { expected, found: data.len() });
            }
            connection.send(&mut data, room)
        }
        (OP_SHUTDOWN, _) => {
            connection.shut_down(header.flags);
            connection.flush()?;
            Ok(())
        }
        (OP_CREDIT_UPDATE, _) => Ok(()),
        (op, state) => Err(ConnectionError::InvalidOperation { op, state }),
    }
}

impl MutEventSubscriber for Muxer {
    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        let fd = events.fd();
        if let Some(events) = &mut self.events
            && fd == events.queue().kick().as_raw_fd()
        {
            return events.send();
        }
        if self.listener.as_ref().is_some_and(|listener| fd == listener.socket().as_raw_fd()) {
            self.accept(ops);
        } else if fd == self.connector.as_fd().as_raw_fd() {
            self.take_answers(ops);
        } else if let Some(key) = self.sockets.by_fd.get(&fd).copied() {
            self.handle_socket_event(key, events.event_set(), ops);
        }
        self.receive.take_kicks();
        self.transmit.take_kicks();
        if self.sockets.accept_paused && self.sockets.connections.len() < MAX_CONNECTIONS {
            self.accept(ops);
        }
        let memory = self.receive.memory();
        loop {
            self.receive_packets(ops);
            let before = self.sockets.control_packets.len();
            self.send_packets(&memory, ops);
            // Continue where the guest's packets were not handled, as too many control packets waited, and now fewer do.
            if before < MAX_CONTROL_PACKETS || self.sockets.control_packets.len() >= MAX_CONTROL_PACKETS {
                return;
            }
        }
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        watch(ops, Events::new(self.receive.kick(), EventSet::IN));
        watch(ops, Events::new(self.transmit.kick(), EventSet::IN));
        let listener = self.listener.as_ref().map(|listener| listener.socket().as_fd());
        for socket in listener.into_iter().chain([self.connector.as_fd()]) {
            watch(ops, Events::new(&socket, EventSet::IN | EventSet::EDGE_TRIGGERED));
        }
        // Those from before a pause.
        for connection in self.sockets.connections.values() {
            watch(ops, Events::new(&connection.stream, EventSet::IN | EventSet::OUT | EventSet::EDGE_TRIGGERED));
        }
        if let Some(events) = &mut self.events {
            watch(ops, Events::new(events.queue().kick(), EventSet::IN));
            events.send();
        }
    }
}
