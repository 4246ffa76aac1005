//! The device's worker: the control queues, and the ports one after the other.

use super::PortSpec;
use super::control::{CONTROL_BYTES, FromDriver, ToDriver};
use super::stream::{HostSide, Link, Stream};
use crate::virtio::queue::Virtqueue;
use crate::virtio::saved::{DeviceFault, PortsState};
use crate::virtio::slot::Slot;
use crate::virtio::vsock::Connector;
use crate::virtio::worker::watch;
use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use std::collections::VecDeque;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;

/// What the driver has said, and is to be told.
#[derive(Debug, Default)]
struct Control {
    /// The driver has said that it can take messages: it is told of each port once.
    ready: bool,
    /// Messages for the driver, with the port that each is about: at most five of each port, whatever the guest does.
    messages: VecDeque<(usize, ToDriver)>,
}

/// What a device keeps while it is paused: no worker has it then.
#[derive(Debug, Default)]
pub(super) struct Kept {
    control: Control,
    pub(super) links: Vec<Link>,
}

impl Kept {
    pub(super) fn save(&self, ports: usize) -> PortsState {
        let introduces = |(_, message): &&(usize, ToDriver)| matches!(message, ToDriver::Add | ToDriver::Name(_));
        let introductions = self.control.messages.iter().filter(introduces).count();
        let mut ports_state: Vec<_> = self.links.iter().map(Link::save).collect();
        ports_state.resize(ports, Link::default().save());
        PortsState {
            is_ready: self.control.ready,
            introductions: u32::try_from(introductions).unwrap_or(u32::MAX),
            ports: ports_state,
        }
    }

    /// What a device with the ports `specs` goes on with from a snapshot.
    pub(super) fn restored(state: &PortsState, specs: &[PortSpec]) -> Result<Self, DeviceFault> {
        let all: Vec<_> = introductions(specs).collect();
        let left = usize::try_from(state.introductions).ok().filter(|left| *left == 0 || state.is_ready);
        let left = left.and_then(|left| all.len().checked_sub(left)).and_then(|told| all.get(told..));
        let Some(left) = left.filter(|_| state.ports.len() == specs.len()) else { return Err(DeviceFault::Ports) };
        let mut messages: VecDeque<_> = left.iter().copied().collect();
        let mut links = Vec::new();
        for (number, port) in state.ports.iter().enumerate() {
            let mut link = Link::restored(*port);
            if port.has_ended && port.is_told {
                // The driver had no buffer for it yet.
                messages.push_back((number, ToDriver::Close));
                link.said = HostSide::Closed;
            }
            links.push(link);
        }
        Ok(Self { control: Control { ready: state.is_ready, messages }, links })
    }
}

/// The messages that tell a driver of the ports.
fn introductions(specs: &[PortSpec]) -> impl Iterator<Item = (usize, ToDriver)> {
    specs.iter().enumerate().flat_map(|(port, spec)| [(port, ToDriver::Add), (port, ToDriver::Name(spec.name))])
}

/// All ports of a device whose driver is ready.
pub(super) struct Worker {
    connector: Arc<Connector>,
    streams: Vec<Stream>,
    /// The control queues.
    receive: Virtqueue,
    transmit: Virtqueue,
    control: Control,
    /// Where the next worker finds what this one leaves.
    slot: Slot<Kept>,
}

/// What a worker is made of.
pub(super) struct WorkerSetup {
    pub(super) connector: Arc<Connector>,
    /// Each port with its receive and its transmit queue.
    pub(super) ports: Vec<(PortSpec, Virtqueue, Virtqueue)>,
    /// The control queues.
    pub(super) receive: Virtqueue,
    pub(super) transmit: Virtqueue,
    /// Has what a worker before a pause has left.
    pub(super) slot: Slot<Kept>,
}

impl Drop for Worker {
    fn drop(&mut self) {
        let links = self.streams.iter_mut().map(Stream::take_link).collect();
        self.slot.put(Some(Kept { control: std::mem::take(&mut self.control), links }));
    }
}

impl Worker {
    pub(super) fn new(setup: WorkerSetup) -> Self {
        let WorkerSetup { connector, ports, receive, transmit, slot } = setup;
        let Kept { control, links } = slot.take().unwrap_or_default();
        let links = links.into_iter().chain(std::iter::repeat_with(Link::default));
        let streams = ports
            .into_iter()
            .zip(links)
            .map(|((spec, from_host, to_host), link)| Stream::new(spec, from_host, to_host, link));
        Self { connector, streams: streams.collect(), receive, transmit, control, slot }
    }

    fn say(&mut self, port: usize, message: ToDriver) {
        let said = match message {
            ToDriver::Open => Some(HostSide::Open),
            ToDriver::Close => Some(HostSide::Closed),
            ToDriver::Add | ToDriver::Name(_) => None,
        };
        if let (Some(said), Some(stream)) = (said, self.streams.get_mut(port)) {
            stream.link.said = said;
        }
        self.control.messages.push_back((port, message));
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
        if !std::mem::replace(&mut self.control.ready, true) {
            let specs: Vec<PortSpec> = self.streams.iter().map(|stream| stream.spec).collect();
            self.control.messages.extend(introductions(&specs));
        }
    }

    /// Takes note that the guest opens a port.
    fn opened(&mut self, port: u32) {
        let Some(port) = usize::try_from(port).ok().filter(|port| *port < self.streams.len()) else { return };
        if let Some(stream) = self.streams.get_mut(port) {
            stream.open();
        }
        self.ask_for_connection(port);
    }

    /// Asks for the connection of a port that the guest has opened: once, and once more in each run from a snapshot.
    fn ask_for_connection(&mut self, port: usize) {
        let Some(stream) = self.streams.get_mut(port).filter(|stream| stream.wants_connection()) else { return };
        match self.connector.request(stream.spec.host_port) {
            Ok(number) => stream.asked(Some(number)),
            Err(error) => {
                log::warn!("port {}: no connection can be asked for: {error}", stream.spec.name);
                stream.asked(None);
                self.end(port);
            }
        }
    }

    /// Tells the driver that there is no connection, unless it knows.
    fn end(&mut self, port: usize) {
        if self.streams.get(port).is_some_and(|stream| stream.link.said == HostSide::Open) {
            self.say(port, ToDriver::Close);
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
            let Some(socket) = stream.connect(answer.result.ok()) else {
                self.end(port);
                continue;
            };
            watch(ops, Events::new(socket, socket_events()));
            // A guest that goes on from a snapshot knows of a connection, and uses this one as it did that.
            if stream.link.said == HostSide::Closed {
                self.say(port, ToDriver::Open);
            }
        }
    }

    /// Gives the driver the messages, as it has buffers for them.
    fn tell(&mut self) {
        let Self { control: Control { messages, .. }, streams, receive, .. } = self;
        receive.serve(|chain| {
            let (port, message) = messages.pop_front()?;
            let number = u32::try_from(port).unwrap_or(u32::MAX);
            let written = chain.writable.write(&message.encode(number));
            match (streams.get_mut(port), message) {
                (Some(stream), ToDriver::Open) => stream.link.told = HostSide::Open,
                (Some(stream), ToDriver::Close) => stream.link.told = HostSide::Closed,
                (_, ToDriver::Add | ToDriver::Name(_)) | (None, _) => {}
            }
            Some(u32::try_from(written).unwrap_or(0))
        });
    }
}

/// What is watched of a connection. What it can do when it is added is reported, too.
fn socket_events() -> EventSet {
    EventSet::IN | EventSet::OUT | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED
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
        // Those from before a pause.
        for socket in self.streams.iter().filter_map(Stream::socket) {
            watch(ops, Events::new(socket, socket_events()));
        }
        for port in 0..self.streams.len() {
            self.ask_for_connection(port);
        }
    }
}
