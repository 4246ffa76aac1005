//! Ports over a pause, and in a device that goes on from the state of another one.

use super::mock::{SPECS, device};
use super::tests::{Setup, TIMEOUT};
use super::{CONTROL_RECEIVE, CONTROL_TRANSMIT, queues};
use crate::virtio::mock::NEEDS_RESET;
use crate::virtio::saved::{DeviceFault, DeviceState, PauseError, PortsState, SaveFault, StateFault, VirtioState};
use proptest::prelude::*;
use std::io::{Read, Write};
use std::time::{Duration, Instant};

impl Setup {
    fn pause(&self) {
        self.driver.device().pause(Instant::now() + TIMEOUT).expect("paused");
    }

    /// Puts a new device with new connections in the place of the old one, which is dropped with its own.
    fn restore(&mut self) {
        let (device, host) = device().expect("sockets");
        self.driver.replace(Box::new(device)).expect("restored");
        self.host = host;
        for near in &self.host {
            near.set_read_timeout(Some(TIMEOUT)).expect("set");
        }
        assert!(self.driver.device().resume());
    }

    /// Bytes both ways, and nothing besides.
    fn check(&mut self, round: u8) {
        self.host[0].write_all(&[round; 5]).expect("written");
        assert_eq!(self.receive(0, 64), [round; 5]);
        self.host[1].write_all(&[round; 6]).expect("written");
        assert_eq!(self.receive(1, 64), [round; 6]);
        for (port, host) in [(0, 0), (2, 2)] {
            self.send(port, &[round; 7]);
            let mut bytes = [0; 7];
            self.host[host].read_exact(&mut bytes).expect("read");
            assert_eq!(bytes, [round; 7]);
        }
    }

    fn hears_nothing(&mut self) {
        assert_eq!(self.driver.poll_used(CONTROL_RECEIVE.into()), None);
    }
}

#[test]
fn a_pause_closes_no_connection_and_loses_nothing() {
    let mut setup = Setup::new();
    setup.open();
    for round in 0..20 {
        setup.check(round);
        setup.pause();
        setup.host[0].write_all(&[round; 3]).expect("written");
        let sent = setup.driver.submit(queues(2).1.into(), &[&[round; 9]], &[]);
        assert!(setup.driver.device().resume());
        assert_eq!(setup.receive(0, 64), [round; 3]);
        assert_eq!(setup.driver.wait_used(queues(2).1.into()).head, u32::from(sent.head));
        let mut bytes = [0; 9];
        setup.host[2].read_exact(&mut bytes).expect("read");
        assert_eq!(bytes, [round; 9]);
    }
    setup.hears_nothing();
}

/// A program that waits at its port goes on with the host's new end: it is told nothing.
#[test]
fn a_restored_guest_has_new_connections_at_its_open_ports() {
    let mut setup = Setup::new();
    setup.open();
    setup.check(1);
    for round in 2..5 {
        let mut old = std::mem::take(&mut setup.host);
        // What the old host has sent and nobody has taken stays with it.
        old[0].write_all(b"old").expect("written");
        setup.restore();
        // The end, or that nobody took the last of it.
        assert!(matches!(old[2].read(&mut [0; 8]), Ok(0)));
        setup.check(round);
        setup.hears_nothing();
    }
    // What is closed and opened again then is so as ever.
    setup.say(1, 6, 0);
    assert_eq!(setup.hear(), (1, 6, 0, String::new()));
}

/// Output that the host has not taken is not lost, and reaches no other reader.
#[test]
fn bytes_on_their_way_to_the_host_are_in_no_snapshot() {
    let mut setup = Setup::new();
    setup.open();
    let sent: Vec<u8> = (0..2_000_000_u32).map(|at| (at.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let mut parts = sent.chunks(32 << 10);
    // Until one is not taken.
    let waits = std::iter::from_fn(|| parts.next()).any(|part| {
        setup.driver.submit(queues(2).1.into(), &[part], &[]);
        let start = Instant::now();
        while start.elapsed() < Duration::from_millis(300) {
            if setup.driver.poll_used(queues(2).1.into()).is_some() {
                return false;
            }
        }
        true
    });
    assert!(waits);
    setup.pause();
    let error = setup.driver.device().save().expect_err("refused");
    assert!(matches!(error, PauseError::State { source: SaveFault::UnsentBytes { port: "out" }, .. }), "{error}");
    assert!(setup.driver.device().resume());
    let mut host = setup.host.remove(2);
    let reader = std::thread::spawn(move || {
        let mut all = Vec::new();
        host.read_to_end(&mut all).map(|_| all)
    });
    setup.driver.wait_used(queues(2).1.into());
    parts.for_each(|part| setup.send(2, part));
    setup.say(2, 6, 0);
    assert!(reader.join().expect("no panic").expect("read") == sent, "each byte once");
}

/// What a program has sent before there was a connection goes to the first that there is.
#[test]
fn bytes_that_wait_for_a_connection_go_to_the_first_one() {
    let mut setup = Setup::new();
    let sent = setup.driver.submit(queues(0).1.into(), &[b"early"], &[]);
    setup.restore();
    assert_eq!(setup.driver.poll_used(queues(0).1.into()), None);
    setup.open();
    assert_eq!(setup.driver.wait_used(queues(0).1.into()).head, u32::from(sent.head));
    let mut bytes = [0; 5];
    setup.host[0].read_exact(&mut bytes).expect("read");
    assert_eq!(&bytes, b"early");
}

#[test]
fn messages_that_wait_for_buffers_are_told_once() {
    let mut setup = Setup::new();
    setup.say(0, 0, 1);
    // The first one is told.
    assert_eq!(setup.hear(), (0, 1, 1, String::new()));
    let mut expected: Vec<_> = (0..)
        .zip(SPECS)
        .flat_map(|(number, spec)| [(number, 1, 1, String::new()), (number, 7, 1, spec.name.to_owned())])
        .skip(1)
        .collect();
    for _ in 0..expected.len() {
        setup.restore();
        assert_eq!(setup.hear(), expected.remove(0));
    }
    setup.restore();
    setup.say(0, 0, 1);
    setup.say(1, 6, 1);
    assert_eq!(setup.hear(), (1, 6, 1, String::new()), "the ports are introduced once");
}

/// A stream that had ended has a connection again, and a program that opens the port anew reads from it.
#[test]
fn a_port_whose_connection_was_over_gets_a_new_one() {
    let mut setup = Setup::new();
    setup.open();
    drop(setup.host.remove(1));
    setup.driver.submit(queues(1).0.into(), &[], &[64]);
    assert_eq!(setup.hear(), (1, 6, 0, String::new()));
    setup.restore();
    assert_eq!(setup.hear(), (1, 6, 1, String::new()));
    setup.host[1].write_all(b"more").expect("written");
    let used = setup.driver.wait_used(queues(1).0.into());
    assert_eq!(used.len, 4);
    // One that the guest has closed, when it opens it.
    setup.say(2, 6, 0);
    assert_eq!(setup.host[2].read(&mut [0; 8]).expect("the end"), 0);
    setup.restore();
    setup.say(2, 6, 1);
    setup.send(2, b"again");
    let mut bytes = [0; 5];
    setup.host[2].read_exact(&mut bytes).expect("read");
    assert_eq!(&bytes, b"again");
}

/// The end of a stream that the driver had no buffer for comes before the new connection.
#[test]
fn an_end_that_was_not_told_is_told_first() {
    let mut setup = Setup::new();
    setup.open();
    // The only buffer has another message, which the driver does not look at.
    setup.say(3, 6, 1);
    drop(setup.host.remove(1));
    setup.driver.submit(queues(1).0.into(), &[], &[64]);
    drop(setup.host.remove(1));
    setup.driver.submit(queues(2).0.into(), &[], &[64]);
    let start = Instant::now();
    while setup.driver.used_index(CONTROL_RECEIVE.into()) < 12 {
        assert!(start.elapsed() < TIMEOUT);
    }
    std::thread::sleep(Duration::from_millis(50));
    setup.restore();
    let mut heard: Vec<_> = (0..4).map(|_| setup.hear()).map(|(port, event, value, _)| (port, event, value)).collect();
    heard.sort_by_key(|message| message.0);
    assert_eq!(heard, [(1, 6, 0), (1, 6, 1), (2, 6, 0), (2, 6, 1)]);
}

#[test]
fn a_run_without_connections_ends_the_ports() {
    let mut setup = Setup::new();
    setup.open();
    let (asks, _connects) =
        crate::virtio::vsock::connector(crate::virtio::vsock::HostPorts::default()).expect("sockets");
    drop(_connects);
    let device = super::Ports::new(std::sync::Arc::new(asks), SPECS);
    setup.driver.replace(Box::new(device)).expect("restored");
    assert!(setup.driver.device().resume());
    for port in 0..3 {
        assert_eq!(setup.hear(), (port, 6, 0, String::new()));
    }
    setup.send(0, b"dropped");
}

#[test]
fn a_reset_device_knows_nothing_of_the_state() {
    let mut setup = Setup::new();
    setup.open();
    setup.restore();
    setup.driver.start(u64::MAX);
    setup.message = setup.driver.submit(CONTROL_RECEIVE.into(), &[], &[64]);
    setup.say(0, 0, 1);
    assert_eq!(setup.hear(), (0, 1, 1, String::new()));
}

fn saved(setup: &Setup) -> (VirtioState, PortsState) {
    setup.pause();
    let state = setup.driver.device().save().expect("a state");
    let DeviceState::Ports(ports) = state.device.clone() else { panic!("the ports'") };
    (state, ports)
}

#[test]
fn states_of_other_ports_are_refused() {
    let mut setup = Setup::new();
    setup.open();
    let (state, good) = saved(&setup);
    assert_eq!((good.is_ready, good.introductions, good.ports.len()), (true, 0, 4));
    let mut refused = |change: &dyn Fn(&mut PortsState)| {
        let (mut state, mut ports) = (state.clone(), good.clone());
        change(&mut ports);
        state.device = DeviceState::Ports(ports);
        let error = setup.driver.replace_with(Box::new(device().expect("sockets").0), &state).expect_err("refused");
        assert!(matches!(error.source, StateFault::Device(DeviceFault::Ports)), "{error}");
    };
    refused(&|ports| ports.ports.truncate(3));
    refused(&|ports| ports.ports.clear());
    refused(&|ports| ports.ports.push(ports.ports[0]));
    refused(&|ports| ports.introductions = 9);
    refused(&|ports| ports.introductions = u32::MAX);
    refused(&|ports| (ports.is_ready, ports.introductions) = (false, 1));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    /// A state that is taken gives a device that goes on, whatever the guest has said before and says then.
    #[test]
    fn any_state_of_ports_leaves_the_device_running(
        messages in proptest::collection::vec((0..5_u32, 0..9_u16, 0..2_u16), 0..8),
        is_ready in any::<bool>(), introductions in 0..10_u32,
        flags in proptest::collection::vec(any::<(bool, bool, bool)>(), 3..6),
    ) {
        let mut setup = Setup::new();
        for (port, event, value) in messages.iter().copied() {
            setup.say(port, event, value);
        }
        let (mut state, mut ports) = saved(&setup);
        (ports.is_ready, ports.introductions) = (is_ready, introductions);
        ports.ports = flags.into_iter().map(|(is_open, is_told, has_ended)| {
            crate::virtio::saved::PortState { is_open, is_told, has_ended }
        }).collect();
        let fits = ports.ports.len() == 4 && introductions <= 8 && (is_ready || introductions == 0);
        state.device = DeviceState::Ports(ports);
        let (device, _host) = device().expect("sockets");
        prop_assert_eq!(setup.driver.replace_with(Box::new(device), &state).is_ok(), fits);
        setup.driver.device().resume();
        for (port, event, value) in messages {
            setup.say(port, event, value);
        }
        setup.driver.submit(CONTROL_TRANSMIT.into(), &[&[0; 8]], &[]);
        prop_assert_eq!(setup.driver.status() & NEEDS_RESET, 0);
    }
}
