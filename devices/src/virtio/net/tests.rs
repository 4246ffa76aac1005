//! The network device, with a socket pair in place of passt.
#![allow(clippy::cast_possible_truncation, reason = "numbers of tests are small")]

use super::{Backend, BackendError, Net, QueueState, QueueSwitch, Stream};
use crate::memory::Buffers;
use crate::virtio::device::VirtioDevice as _;
use crate::virtio::mock::{Driver, Used};
use crate::virtio::saved::DeviceState;
use proptest::prelude::*;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

const MAC: [u8; 6] = [2, 1, 2, 3, 4, 5];

fn card() -> (UnixStream, Driver) {
    let (ours, theirs) = UnixStream::pair().expect("a pair");
    theirs.set_read_timeout(Some(Duration::from_secs(10))).expect("a timeout");
    let device = Net::new(MAC, vec![Box::new(Stream::new(ours).expect("non-blocking"))]).expect("a device");
    (theirs, Driver::running(Box::new(device)))
}

fn send(socket: &mut UnixStream, frame: &[u8]) {
    let length = u32::try_from(frame.len()).expect("short");
    socket.write_all(&length.to_be_bytes()).expect("room");
    socket.write_all(frame).expect("room");
}

fn take(socket: &mut UnixStream) -> Vec<u8> {
    let mut length = [0; 4];
    socket.read_exact(&mut length).expect("in time");
    let mut frame = vec![0; u32::from_be_bytes(length) as usize];
    socket.read_exact(&mut frame).expect("in time");
    frame
}

#[test]
fn a_card_without_offloads_offers_none() {
    let (_socket, driver) = card();
    let mut config = [0; 10];
    driver.read_bytes(0x100, &mut config);
    assert_eq!(config[..6], MAC);
    assert_eq!(config[6..], [1, 0, 1, 0]);
    assert_eq!(driver.device_features() & super::OFFLOADS, 0);
}

#[test]
fn frames_leave_without_the_header() {
    let (mut socket, mut driver) = card();
    driver.request(1, &[&[0; 12], b"a frame"], &[]);
    driver.request(1, &[&[&[0; 12][..], b"another"].concat()], &[]);
    assert_eq!(take(&mut socket), b"a frame");
    assert_eq!(take(&mut socket), b"another");
}

#[test]
fn frames_arrive_with_a_header_in_merged_buffers() {
    let (mut socket, mut driver) = card();
    let frame: Vec<u8> = (0..3000_u32).map(|at| (at % 250) as u8).collect();
    // The frame waits for receive buffers.
    send(&mut socket, &frame);
    std::thread::sleep(Duration::from_millis(30));
    let buffers: Vec<_> = (0..4).map(|_| driver.submit(0, &[], &[1000])).collect();
    let mut seen = Vec::new();
    for buffer in &buffers {
        let Used { head, len } = driver.wait_used(0);
        assert_eq!(head, u32::from(buffer.head));
        seen.extend(driver.contents(buffer, len));
    }
    assert_eq!(seen[..12], [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 4, 0], "four buffers");
    assert_eq!(seen[12..], frame);
}

#[test]
fn without_merging_a_frame_that_does_not_fit_is_dropped_and_the_next_one_comes() {
    let (ours, mut socket) = UnixStream::pair().expect("a pair");
    let device = Net::new(MAC, vec![Box::new(Stream::new(ours).expect("non-blocking"))]).expect("a device");
    let mut driver = Driver::new(Box::new(device));
    driver.start(!super::F_MRG_RXBUF);
    let buffer = driver.submit(0, &[], &[100]);
    send(&mut socket, &[1; 2000]);
    send(&mut socket, &[2; 50]);
    let used = driver.wait_used(0);
    assert_eq!(used, Used { head: u32::from(buffer.head), len: 62 });
    assert_eq!(driver.contents(&buffer, used.len)[10..], [&[1, 0][..], &[2; 50]].concat());
}

#[test]
fn a_backend_that_does_not_read_delays_frames_and_loses_none() {
    let (mut socket, mut driver) = card();
    let frame = [7; 1500];
    let (mut sent, mut used) = (0_u32, 0_u32);
    while sent < 400 {
        driver.submit(1, &[&[0; 12], &frame], &[]);
        sent += 1;
        while driver.poll_used(1).is_some() {
            used += 1;
        }
        // At most as many as the queue has room for (two descriptors each).
        if sent - used >= 100 {
            break;
        }
    }
    for _ in 0..sent {
        assert_eq!(take(&mut socket), frame);
    }
    while used < sent {
        driver.wait_used(1);
        used += 1;
    }
}

#[test]
fn the_device_works_after_its_backend_has_ended() {
    let (socket, mut driver) = card();
    drop(socket);
    for _ in 0..10 {
        driver.request(1, &[&[0; 12], b"into the void"], &[]);
    }
    driver.start(u64::MAX);
    driver.request(1, &[&[0; 12], b"again"], &[]);
}

/// A queue of a tap interface that takes its time to be attached.
struct SlowSwitch {
    socket: UnixStream,
    state: Arc<Mutex<Option<QueueState>>>,
}

impl Backend for SlowSwitch {
    fn fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    fn has_header(&self) -> bool {
        true
    }

    fn queue_switch(&self) -> io::Result<QueueSwitch> {
        let state = Arc::clone(&self.state);
        Ok(Arc::new(move |new| {
            if new == QueueState::Attached {
                std::thread::sleep(Duration::from_millis(50));
            }
            *state.lock().expect("not poisoned") = Some(new);
            Ok(())
        }))
    }

    fn receive(&mut self, _frame: &mut [u8]) -> Result<Option<usize>, BackendError> {
        Ok(None)
    }

    fn send(&mut self, _frame: &mut Buffers<'_>) -> Result<(), BackendError> {
        Ok(())
    }
}

#[test]
fn a_reset_takes_back_the_queue_pairs_of_a_command_at_the_same_time() {
    let states: [Arc<Mutex<Option<QueueState>>>; 2] = Default::default();
    let backends = states.iter().map(|state| {
        let socket = UnixStream::pair().expect("a pair").0;
        Box::new(SlowSwitch { socket, state: Arc::clone(state) }) as Box<dyn Backend>
    });
    let mut driver = Driver::running(Box::new(Net::new(MAC, backends.collect()).expect("a device")));
    assert_eq!(driver.request(4, &[&[4, 0], &[2, 0]], &[1]), [0]);
    assert_eq!(*states[1].lock().expect("not poisoned"), Some(QueueState::Attached));
    driver.start(u64::MAX);
    driver.submit(4, &[&[4, 0], &[2, 0]], &[1]);
    driver.write(0x70, 0);
    assert_eq!(driver.status(), 0);
    let states = states.map(|state| *state.lock().expect("not poisoned"));
    assert_eq!(states, [Some(QueueState::Attached), Some(QueueState::Detached)]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]
    #[test]
    fn any_chain_is_survived(chains in proptest::collection::vec((0_usize..2, 0_usize..30, 0_u32..70), 1..30)) {
        let (mut socket, mut driver) = card();
        for (queue, readable, writable) in chains {
            let bytes = vec![0xa5; readable];
            driver.submit(queue, &[&bytes], &[writable]);
            send(&mut socket, &bytes);
        }
        driver.start(u64::MAX);
        driver.request(1, &[&[0; 12], b"still there"], &[]);
    }
}

/// A frame that waits for receive buffers is not lost by a pause, and others come in their order behind it.
#[test]
fn a_pause_loses_no_frame() {
    let (mut socket, mut driver) = card();
    let device = |driver: &Driver| {
        driver.device().pause(Instant::now() + Duration::from_secs(20)).expect("paused");
        assert!(driver.device().resume());
    };
    for round in 0..20_u8 {
        send(&mut socket, &[round; 100]);
        send(&mut socket, &[round + 100; 100]);
        if round.is_multiple_of(2) {
            std::thread::sleep(Duration::from_millis(2));
        }
        device(&driver);
        for expected in [round, round + 100] {
            let buffer = driver.submit(0, &[], &[1000]);
            let Used { head, len } = driver.wait_used(0);
            assert_eq!((head, len), (u32::from(buffer.head), 112));
            assert_eq!(driver.contents(&buffer, len)[12..], [expected; 100]);
        }
        driver.submit(1, &[&[0; 12], &[round; 60]], &[]);
        device(&driver);
        driver.wait_used(1);
        assert_eq!(take(&mut socket), [round; 60]);
    }
}

/// The card of a machine that goes on from a snapshot has the address of the old one, and its link is down for a moment.
#[test]
fn a_new_card_announces_itself() {
    let (_old, mut driver) = card();
    driver.request(1, &[&[0; 12], b"a frame"], &[]);
    let (ours, mut socket) = UnixStream::pair().expect("a pair");
    let backend: Box<dyn Backend> = Box::new(Stream::new(ours).expect("non-blocking"));
    driver.replace(Box::new(Net::new([2; 6], vec![backend]).expect("a device"))).expect("restored");
    let config = |driver: &Driver| {
        let mut config = [0; 8];
        driver.read_bytes(0x100, &mut config);
        (config[..6] == MAC, config[6])
    };
    assert_eq!(config(&driver), (true, 1));
    let generation = driver.read(0xfc);
    assert!(driver.device().resume());
    let wait = |status: u8| {
        let start = Instant::now();
        while config(&driver) != (true, status) {
            assert!(start.elapsed() < Duration::from_secs(20), "the link does not become {status}");
            std::thread::sleep(Duration::from_millis(1));
        }
    };
    wait(0);
    wait(1);
    assert_eq!(driver.read(0xfc), generation + 2 * 2, "the driver is told of both, each counts two");
    driver.request(1, &[&[0; 12], b"another"], &[]);
    assert_eq!(take(&mut socket), b"another");
    let (ours, _socket) = UnixStream::pair().expect("a pair");
    let two: Vec<Box<dyn Backend>> = vec![Box::new(Stream::new(ours).expect("non-blocking"))];
    assert!(Net::new(MAC, two).expect("a device").restore(&DeviceState::Rng).is_err());
}
