//! The device's worker: the control queues, and the ports one after the other.

use super::control::{CONTROL_BYTES, FromDriver, ToDriver};
use super::stream::Stream;
use crate::virtio::queue::Virtqueue;
use crate::virtio::vsock::Connector;
use crate::virtio::worker::watch;
use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use std::collections::VecDeque;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;

/// All ports of a device whose driver is ready.
pub(super) struct Worker {
    connector: Arc<Connector>,
    streams: Vec<Stream>,
    /// The control queues.
    receive: Virtqueue,
    transmit: Virtqueue,
    /// The driver has said that it can take messages: it is told of each port once.
    ready: bool,
    /// Messages for the driver: at most four of each port, whatever the guest does.
    messages: VecDeque<Vec<u8>>,
}

impl Worker {
    pub(super) fn new(
        connector: Arc<Connector>,
        streams: Vec<Stream>,
        receive: Virtqueue,
        transmit: Virtqueue,
    ) -> Self {
        Self { connector, streams, receive, transmit, ready: false, messages: VecDeque::new() }
    }

    fn say(&mut self, port: usize, message: ToDriver) {
        self.messages.push_back(message.encode(u32::try_from(port).unwrap_or(u32::MAX)));
    }

    /// Reads what the driver says.
    fn listen(&mut self) {
        let mut said = Vec::new();
        self.transmit.serve(|chain| {
            let mut bytes = [0; CONTROL_BYTES];
            if chain.readable.read(&mut bytes) == CONTROL_BYTES {
                said.extend(FromDriver::parse(bytes));
            }
            Some(0)
        });
        for message in said {
            match message {
                FromDriver::Ready => self.introduce(),
                FromDriver::Opened(port) => self.opened(port),
                FromDriver::Closed(port) => {
                    if let Some(stream) = usize::try_from(port).ok().and_then(|port| self.streams.get_mut(port)) {
                        stream.close();
                    }
                }
            }
        }
    }

    /// Tells the driver of the ports.
    fn introduce(&mut self) {
        if std::mem::replace(&mut self.ready, true) {
            return;
        }
        for port in 0..self.streams.len() {
            let name = self.streams.get(port).map_or("", |stream| stream.spec.name);
            self.say(port, ToDriver::Add);
            self.say(port, ToDriver::Name(name));
        }
    }

    /// Asks for the connection of a port, the first time that the guest opens it.
    fn opened(&mut self, port: u32) {
        let Some(stream) = usize::try_from(port).ok().and_then(|port| self.streams.get_mut(port)) else { return };
        if !stream.wants_connection() {
            return;
        }
        match self.connector.request(stream.spec.host_port) {
            Ok(number) => stream.asked(Some(number)),
            Err(error) => {
                log::warn!("port {}: no connection can be asked for: {error}", stream.spec.name);
                stream.asked(None);
            }
        }
    }

    /// Takes the connections that came.
    fn connect(&mut self, ops: &mut EventOps<'_>) {
        while let Some(answer) = self.connector.answer() {
            // One from before a reset of the device is nobody's.
            let Some(port) = self.streams.iter().position(|stream| stream.is_asked(answer.number)) else { continue };
            let Some(stream) = self.streams.get_mut(port) else { continue };
            if let Err(error) = &answer.result {
                log::warn!("port {}: there is no connection: {error}", stream.spec.name);
            }
            if let Some(socket) = stream.connect(answer.result.ok()) {
                let events = EventSet::IN | EventSet::OUT | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
                watch(ops, Events::new(socket, events));
                self.say(port, ToDriver::Open);
            }
        }
    }

    /// Gives the driver the messages, as it has buffers for them.
    fn tell(&mut self) {
        let messages = &mut self.messages;
        self.receive.serve(|chain| {
            let message = messages.pop_front()?;
            Some(u32::try_from(chain.writable.write(&message)).unwrap_or(0))
        });
    }
}

impl MutEventSubscriber for Worker {
    /// Looks at all: sockets and the connector report each change once.
    fn process(&mut self, _events: Events, ops: &mut EventOps<'_>) {
        self.connect(ops);
        // Before the ports: what the guest sent before it closed one is in its queue by then.
        self.listen();
        for port in 0..self.streams.len() {
            let Some(ended) = self.streams.get_mut(port).and_then(Stream::serve) else { continue };
            if let Err(error) = ops.remove(Events::new(&ended, EventSet::IN)) {
                log::error!("a port's socket {} cannot be taken out of the event loop: {error}", ended.as_raw_fd());
            }
            self.say(port, ToDriver::Close);
            // What the guest has sent meanwhile is dropped now.
            let _ = self.streams.get_mut(port).and_then(Stream::serve);
        }
        self.tell();
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        for queue in [&self.receive, &self.transmit] {
            watch(ops, Events::new(queue.kick(), EventSet::IN));
        }
        for kick in self.streams.iter().flat_map(Stream::kicks) {
            watch(ops, Events::new(kick, EventSet::IN));
        }
        watch(ops, Events::new(&self.connector.as_fd(), EventSet::IN | EventSet::EDGE_TRIGGERED));
    }
}
