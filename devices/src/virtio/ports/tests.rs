//! The ports, from the driver and from the host.

use super::mock::{SPECS, device};
use super::{CONTROL_RECEIVE, CONTROL_TRANSMIT, Ports, queues};
use crate::virtio::mock::{Driver, NEEDS_RESET, Submitted};
use crate::virtio::vsock::{HostPorts, connector};
use proptest::prelude::*;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

pub(super) const TIMEOUT: Duration = Duration::from_secs(20);

/// A running device, and the host's ends of its first three ports.
pub(super) struct Setup {
    pub(super) driver: Driver,
    pub(super) host: Vec<UnixStream>,
    /// A buffer in which the next message comes.
    pub(super) message: Submitted,
}

impl Setup {
    pub(super) fn new() -> Self {
        let (device, host) = device().expect("sockets");
        for near in &host {
            near.set_read_timeout(Some(TIMEOUT)).expect("set");
        }
        let mut driver = Driver::running(Box::new(device));
        let message = driver.submit(CONTROL_RECEIVE.into(), &[], &[64]);
        Self { driver, host, message }
    }

    pub(super) fn say(&mut self, port: u32, event: u16, value: u16) {
        let mut bytes = port.to_le_bytes().to_vec();
        bytes.extend(event.to_le_bytes());
        bytes.extend(value.to_le_bytes());
        self.driver.request(CONTROL_TRANSMIT.into(), &[&bytes], &[]);
    }

    /// The next message: port, event, value, name.
    pub(super) fn hear(&mut self) -> (u32, u16, u16, String) {
        let used = self.driver.wait_used(CONTROL_RECEIVE.into());
        let bytes = self.driver.contents(&self.message, used.len);
        self.message = self.driver.submit(CONTROL_RECEIVE.into(), &[], &[64]);
        let half = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let port = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        (port, half(4), half(6), String::from_utf8_lossy(&bytes[8..]).into_owned())
    }

    /// As Linux does it: the driver is ready, and programs open the first three ports.
    pub(super) fn open(&mut self) {
        self.say(0, 0, 1);
        for (number, spec) in (0..).zip(SPECS) {
            assert_eq!(self.hear(), (number, 1, 1, String::new()));
            assert_eq!(self.hear(), (number, 7, 1, spec.name.into()));
        }
        for port in 0..3 {
            self.say(port, 6, 1);
            assert_eq!(self.hear(), (port, 6, 1, String::new()));
        }
    }

    pub(super) fn send(&mut self, port: u16, bytes: &[u8]) {
        self.driver.request(queues(port).1.into(), &[bytes], &[]);
    }

    pub(super) fn receive(&mut self, port: u16, most: u32) -> Vec<u8> {
        self.driver.request(queues(port).0.into(), &[], &[most])
    }
}

#[test]
fn ports_have_their_queues_and_their_number() {
    assert_eq!((0..4).map(queues).collect::<Vec<_>>(), [(0, 1), (4, 5), (6, 7), (8, 9)]);
    let setup = Setup::new();
    assert_eq!(setup.driver.read(0x104), 4, "max_nr_ports");
}

#[test]
fn bytes_go_both_ways_once_a_port_is_open() {
    let mut setup = Setup::new();
    setup.open();
    setup.host[0].write_all(b"window 24 80\n").expect("written");
    assert_eq!(setup.receive(0, 64), b"window 24 80\n");
    setup.send(0, b"started\n");
    let mut bytes = [0; 8];
    setup.host[0].read_exact(&mut bytes).expect("read");
    assert_eq!(&bytes, b"started\n");
}

#[test]
fn the_end_of_the_input_comes_behind_its_bytes() {
    let mut setup = Setup::new();
    setup.open();
    let mut host = setup.host.remove(1);
    host.write_all(b"last").expect("written");
    drop(host);
    assert_eq!(setup.receive(1, 64), b"last");
    // A buffer in which the end is seen.
    setup.driver.submit(queues(1).0.into(), &[], &[64]);
    assert_eq!(setup.hear(), (1, 6, 0, String::new()));
}

#[test]
fn a_slow_host_holds_the_guest_and_gets_all() {
    let mut setup = Setup::new();
    setup.open();
    let sent: Vec<u8> = (0..1_500_000_u32).map(|at| (at.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let mut host = setup.host[2].try_clone().expect("a copy");
    let reader = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(100));
        let mut all = Vec::new();
        host.read_to_end(&mut all).map(|_| all)
    });
    for part in sent.chunks(32 << 10) {
        setup.send(2, part);
    }
    // The guest has closed the port: all that it sent comes before the end.
    setup.say(2, 6, 0);
    assert!(reader.join().expect("no panic").expect("read") == sent);
    // Opened once more, to see that the host has all.
    setup.say(2, 6, 1);
    drop(setup.host.pop());
    setup.driver.submit(queues(2).0.into(), &[], &[64]);
    assert_eq!(setup.hear(), (2, 6, 0, String::new()));
}

#[test]
fn a_reader_that_is_gone_is_told_and_what_comes_is_dropped() {
    let mut setup = Setup::new();
    setup.open();
    drop(setup.host.pop());
    setup.driver.submit(queues(2).0.into(), &[], &[64]);
    assert_eq!(setup.hear(), (2, 6, 0, String::new()));
    for _ in 0..40 {
        setup.send(2, &[7; 1000]);
    }
}

#[test]
fn input_that_the_guest_wants_no_more_ends_the_connection() {
    let mut setup = Setup::new();
    setup.open();
    setup.say(1, 6, 0);
    assert_eq!(setup.hear(), (1, 6, 0, String::new()));
    assert_eq!(setup.host[1].read(&mut [0; 8]).expect("the end"), 0);
}

#[test]
fn a_port_has_one_connection_and_others_have_none() {
    let mut setup = Setup::new();
    setup.open();
    // The host refuses the fourth; no port has a fifth.
    for port in [3, 4, 0, u32::MAX] {
        setup.say(port, 6, 1);
    }
    setup.say(0, 0, 1);
    setup.send(3, b"dropped");
    setup.host[0].write_all(b"x").expect("written");
    assert_eq!(setup.receive(0, 64), b"x", "it goes on");
    assert_eq!(setup.driver.poll_used(CONTROL_RECEIVE.into()), None, "and says nothing twice");
}

#[test]
fn a_driver_without_several_ports_gets_nothing() {
    let (asks, _connects) = connector(HostPorts { path: None, joined: Vec::new() }).expect("sockets");
    let mut driver = Driver::new(Box::new(Ports::new(Arc::new(asks), SPECS)));
    driver.negotiate(0);
    driver.write(0x70, 15);
    assert_ne!(driver.status() & NEEDS_RESET, 0);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    /// Whatever a guest says and sends, the device goes on, and holds no more than a chain of a port.
    #[test]
    fn any_messages_leave_the_device_running(
        messages in proptest::collection::vec((0..6_u32, 0..9_u16, 0..3_u16, 0..10_usize, 0..5000_usize), 1..40)
    ) {
        let mut setup = Setup::new();
        for (port, event, value, queue, bytes) in messages {
            let mut message = port.to_le_bytes().to_vec();
            message.extend(event.to_le_bytes());
            message.extend(value.to_le_bytes());
            message.truncate(if bytes % 7 == 0 { bytes % 8 } else { 8 });
            message.push(0);
            setup.driver.request(CONTROL_TRANSMIT.into(), &[&message], &[]);
            if ![CONTROL_RECEIVE, CONTROL_TRANSMIT].map(usize::from).contains(&queue) && setup.driver.used_index(queue) < 10 {
                setup.driver.submit(queue, &[&vec![1; bytes + 1]], &[]);
            }
        }
        prop_assert_eq!(setup.driver.status() & NEEDS_RESET, 0);
    }
}
