//! All streams of a guest, on one thread.

use super::HOST_CID;
use super::connection::{BUFFER_BYTES, Connection, State};
use super::packet::{
    HEADER_BYTES, Header, OP_CREDIT_REQUEST, OP_CREDIT_UPDATE, OP_REQUEST, OP_RESPONSE, OP_RST, OP_RW, OP_SHUTDOWN,
    SHUTDOWN_SEND, TYPE_STREAM,
};
use crate::memory::{Buffers, Memory};
use crate::socket::connect_now;
use crate::virtio::worker::watch;
use crate::virtio::{Chain, Virtqueue};
use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use std::collections::{HashMap, VecDeque};
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

/// The most streams at once.
const MAX_CONNECTIONS: usize = 1024;
/// Answers that wait for the guest's buffers; beyond, its own packets wait.
const MAX_ANSWERS: usize = 1024;
/// The first port that the host's side of a stream gets.
const FIRST_LOCAL_PORT: u32 = 1 << 30;
/// The longest line that names a port: `CONNECT 4294967295\n`.
const MAX_LINE: usize = 32;

/// A stream: the host's port and the guest's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Key {
    local: u32,
    peer: u32,
}

pub(super) struct Muxer {
    cid: u64,
    path: PathBuf,
    listener: UnixListener,
    receive: Virtqueue,
    transmit: Virtqueue,
    connections: HashMap<Key, Connection>,
    by_fd: HashMap<RawFd, Key>,
    /// Packets without data, for the guest.
    answers: VecDeque<Header>,
    next_local: u32,
    /// Whose turn it is to send.
    turns: VecDeque<Key>,
    /// Host programs may be at the door that were not let in, for want of room.
    crowded: bool,
}

impl Muxer {
    pub(super) fn new(
        cid: u64,
        path: PathBuf,
        listener: UnixListener,
        receive: Virtqueue,
        transmit: Virtqueue,
    ) -> Self {
        Self {
            cid,
            path,
            listener,
            receive,
            transmit,
            connections: HashMap::new(),
            by_fd: HashMap::new(),
            answers: VecDeque::new(),
            next_local: FIRST_LOCAL_PORT,
            turns: VecDeque::new(),
            crowded: false,
        }
    }

    fn header(&mut self, key: Key, op: u16) -> Header {
        let fwd_cnt = self.connections.get_mut(&key).map_or(0, Connection::tell_forwarded);
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

    fn answer(&mut self, key: Key, op: u16, flags: u32) {
        let header = Header { flags, ..self.header(key, op) };
        self.answers.push_back(header);
    }

    /// Gives a stream its turn to send, once.
    fn queue(&mut self, key: Key) {
        if let Some(connection) = self.connections.get_mut(&key)
            && !std::mem::replace(&mut connection.in_turn, true)
        {
            self.turns.push_back(key);
        }
    }

    fn add(&mut self, key: Key, connection: Connection, ops: &mut EventOps<'_>) {
        let events = EventSet::IN | EventSet::OUT | EventSet::EDGE_TRIGGERED;
        watch(ops, Events::new(&connection.stream, events));
        self.by_fd.insert(connection.stream.as_raw_fd(), key);
        self.connections.insert(key, connection);
    }

    fn remove(&mut self, key: Key, ops: &mut EventOps<'_>) {
        if let Some(connection) = self.connections.remove(&key) {
            self.by_fd.remove(&connection.stream.as_raw_fd());
            if let Err(error) = ops.remove(Events::new(&connection.stream, EventSet::IN)) {
                log::debug!("vsock: {error:?}");
            }
        }
    }

    /// Ends a stream that cannot go on.
    fn reset(&mut self, key: Key, ops: &mut EventOps<'_>) {
        self.answer(key, OP_RST, 0);
        self.remove(key, ops);
    }

    /// A host program is at the door.
    fn accept(&mut self, ops: &mut EventOps<'_>) {
        loop {
            self.crowded = self.connections.len() >= MAX_CONNECTIONS;
            if self.crowded {
                return;
            }
            match self.listener.accept() {
                Ok((stream, _)) => {
                    if let Err(error) = stream.set_nonblocking(true) {
                        log::warn!("vsock: {error}");
                        continue;
                    }
                    // Its guest port is not known yet: 0 stands for that.
                    let key = Key { local: self.free_port(), peer: 0 };
                    self.add(key, Connection::new(stream, State::Naming), ops);
                    self.read_line(key, ops);
                }
                Err(_) => return,
            }
        }
    }

    fn free_port(&mut self) -> u32 {
        loop {
            let port = self.next_local;
            self.next_local = port.checked_add(1).unwrap_or(FIRST_LOCAL_PORT);
            if !self.connections.keys().any(|key| key.local == port) {
                return port;
            }
        }
    }

    /// Reads `CONNECT PORT\n`, a byte at a time: what follows is for the guest.
    fn read_line(&mut self, key: Key, ops: &mut EventOps<'_>) {
        let Some(connection) = self.connections.get_mut(&key) else { return };
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
        let Some(mut connection) = self.connections.remove(&key) else { return };
        match port {
            Some(peer) => {
                let named = Key { peer, ..key };
                connection.state = State::Asked;
                self.by_fd.insert(connection.stream.as_raw_fd(), named);
                self.connections.insert(named, connection);
                self.answer(named, OP_REQUEST, 0);
            }
            None => {
                log::warn!("vsock: a host program said {text:?}, where CONNECT PORT was wanted");
                self.connections.insert(key, connection);
                self.remove(key, ops);
            }
        }
    }

    /// The guest's packets.
    fn take_packets(&mut self, ops: &mut EventOps<'_>) {
        let memory = self.transmit.memory();
        loop {
            self.transmit.disable_notification();
            while self.answers.len() < MAX_ANSWERS
                && let Some(mut chain) = self.transmit.pop(&memory)
            {
                if let Some(header) = Header::read(&mut chain.readable) {
                    self.take_packet(&header, &mut chain.readable, ops);
                }
                self.transmit.push(chain.head, 0);
            }
            self.transmit.notify();
            // With too many answers waiting, the guest's next buffers, which kick the other queue, bring us back.
            if self.answers.len() >= MAX_ANSWERS || !self.transmit.enable_notification() {
                return;
            }
        }
    }

    fn take_packet(&mut self, header: &Header, data: &mut Buffers<'_>, ops: &mut EventOps<'_>) {
        let key = Key { local: header.dst_port, peer: header.src_port };
        if header.src_cid != self.cid || header.dst_cid != HOST_CID {
            return;
        }
        if header.kind != TYPE_STREAM {
            // An answer of the same type (§5.10.6.4.2).
            let refusal = Header { kind: header.kind, ..self.header(key, OP_RST) };
            self.answers.push_back(refusal);
            return;
        }
        let Some(connection) = self.connections.get_mut(&key) else {
            match header.op {
                OP_REQUEST => self.connect(key, header, ops),
                OP_RST => {}
                _ => self.answer(key, OP_RST, 0),
            }
            return;
        };
        connection.take_credit(header.buf_alloc, header.fwd_cnt);
        let result = match (header.op, connection.state) {
            (OP_RESPONSE, State::Asked) => {
                connection.state = State::Open;
                connection.stream.write_all(format!("OK {}\n", key.local).as_bytes())
            }
            (OP_RW, State::Open) => {
                let wanted = usize::try_from(header.len).unwrap_or(usize::MAX);
                let mut data = data.split_to(wanted);
                if data.len() == wanted { connection.take(&mut data) } else { Err(io::ErrorKind::InvalidData.into()) }
            }
            (OP_SHUTDOWN, _) => {
                connection.shut_down(header.flags);
                connection.flush()
            }
            (OP_CREDIT_UPDATE, _) => Ok(()),
            (OP_CREDIT_REQUEST, _) => {
                self.answer(key, OP_CREDIT_UPDATE, 0);
                return self.queue(key);
            }
            (OP_RST, _) => return self.remove(key, ops),
            (op, state) => Err(io::Error::other(format!("operation {op} while {state:?}"))),
        };
        if let Err(error) = result {
            log::debug!("vsock: {key:?}: {error}");
            return self.reset(key, ops);
        }
        self.queue(key);
    }

    /// The guest asks for the host's port.
    fn connect(&mut self, key: Key, header: &Header, ops: &mut EventOps<'_>) {
        let mut path = self.path.clone().into_os_string();
        path.push(format!("_{}", key.local));
        let stream = if self.connections.len() < MAX_CONNECTIONS {
            connect_now(Path::new(&path))
        } else {
            Err(io::Error::other("too many streams"))
        };
        match stream {
            Ok(stream) => {
                let mut connection = Connection::new(stream, State::Open);
                connection.take_credit(header.buf_alloc, header.fwd_cnt);
                self.add(key, connection, ops);
                self.answer(key, OP_RESPONSE, 0);
                self.queue(key);
            }
            Err(error) => {
                log::info!("vsock: the guest wants port {}: {}: {error}", key.local, path.display());
                self.answer(key, OP_RST, 0);
            }
        }
    }

    /// Packets for the guest: answers first, then data, stream by stream.
    fn give_packets(&mut self, memory: &Memory, ops: &mut EventOps<'_>) {
        loop {
            self.receive.disable_notification();
            while !self.answers.is_empty() || !self.turns.is_empty() {
                let Some(mut chain) = self.receive.pop(memory) else { break };
                let written = match self.answers.pop_front() {
                    Some(answer) => Some(chain.writable.write(&answer.to_bytes())),
                    None => self.next_data(&mut chain, ops),
                };
                match written {
                    Some(bytes) => self.receive.push(chain.head, u32::try_from(bytes).unwrap_or(0)),
                    None => self.receive.undo_pop(),
                }
            }
            self.receive.notify();
            let waiting = !self.answers.is_empty() || !self.turns.is_empty();
            // Nothing to give: the guest's new buffers are no news.
            if !waiting || !self.receive.enable_notification() {
                return;
            }
        }
    }

    /// One packet of the stream whose turn it is, into `chain`; its length. `None` where that one has nothing.
    fn next_data(&mut self, chain: &mut Chain<'_>, ops: &mut EventOps<'_>) -> Option<usize> {
        let key = self.turns.pop_front()?;
        let connection = self.connections.get_mut(&key)?;
        connection.in_turn = false;
        if connection.is_over() {
            self.reset(key, ops);
            return None;
        }
        if connection.owes_credit() {
            self.answer(key, OP_CREDIT_UPDATE, 0);
            self.queue(key);
            return None;
        }
        if !connection.wants_to_send() || chain.writable.len() <= HEADER_BYTES {
            return None;
        }
        let mut place = chain.writable.split_to(HEADER_BYTES);
        match connection.read_into(&mut chain.writable) {
            Ok(0) => {
                connection.ended = true;
                // The guest may still send.
                let header = Header { flags: SHUTDOWN_SEND, ..self.header(key, OP_SHUTDOWN) };
                Some(place.write(&header.to_bytes()))
            }
            Ok(count) => {
                let len = u32::try_from(count).unwrap_or(0);
                let header = Header { len, ..self.header(key, OP_RW) };
                self.queue(key);
                Some(place.write(&header.to_bytes()) + count)
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                connection.readable = false;
                None
            }
            Err(error) => {
                log::debug!("vsock: {key:?}: {error}");
                self.reset(key, ops);
                None
            }
        }
    }

    /// A stream can be read or written again.
    fn ready(&mut self, key: Key, set: EventSet, ops: &mut EventOps<'_>) {
        let Some(connection) = self.connections.get_mut(&key) else { return };
        if connection.state == State::Naming {
            return self.read_line(key, ops);
        }
        if set.intersects(EventSet::IN | EventSet::HANG_UP | EventSet::READ_HANG_UP | EventSet::ERROR) {
            connection.readable = true;
        }
        if connection.flush().is_err() {
            return self.reset(key, ops);
        }
        self.queue(key);
    }
}

impl MutEventSubscriber for Muxer {
    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        let fd = events.fd();
        if fd == self.listener.as_raw_fd() {
            self.accept(ops);
        } else if let Some(key) = self.by_fd.get(&fd).copied() {
            self.ready(key, events.event_set(), ops);
        }
        self.receive.take_kicks();
        self.transmit.take_kicks();
        if self.crowded && self.connections.len() < MAX_CONNECTIONS {
            self.accept(ops);
        }
        let memory = self.receive.memory();
        loop {
            self.take_packets(ops);
            let before = self.answers.len();
            self.give_packets(&memory, ops);
            // Room for answers again: the guest's packets that waited for it.
            if before < MAX_ANSWERS || self.answers.len() >= MAX_ANSWERS {
                return;
            }
        }
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        watch(ops, Events::new(self.receive.kick(), EventSet::IN));
        watch(ops, Events::new(self.transmit.kick(), EventSet::IN));
        watch(ops, Events::new(&self.listener, EventSet::IN | EventSet::EDGE_TRIGGERED));
    }
}
