//! Connections, from both sides.
#![allow(clippy::cast_possible_truncation, reason = "numbers of tests are small")]

use super::connection::{BUFFER_BYTES, MAX_UNSENT_BYTES};
use super::packet::{
    HEADER_BYTES, Header, OP_CREDIT_REQUEST, OP_CREDIT_UPDATE, OP_REQUEST, OP_RESPONSE, OP_RST, OP_RW, OP_SHUTDOWN,
};
use super::spec::HOST_CID;
use super::{Served, Vsock};
use crate::memory::{Buffers, Memory};
use crate::virtio::mock::{Driver, Used};
use crate::virtio::saved::{DeviceState, PortPair, VirtioState, VsockState};
use proptest::prelude::*;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tempfile::TempDir;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

const CID: u64 = 9;

fn device() -> (TempDir, Driver) {
    let folder = tempfile::tempdir().expect("a folder");
    let device = super::mock::device(9, &folder.path().join("v")).expect("a socket");
    let mut driver = Driver::running(Box::new(device));
    for _ in 0..16 {
        driver.submit(0, &[], &[4096]);
    }
    (folder, driver)
}

fn packet(op: u16, src_port: u32, dst_port: u32, len: usize) -> Header {
    let len = u32::try_from(len).expect("short");
    Header {
        src_cid: CID,
        dst_cid: HOST_CID,
        src_port,
        dst_port,
        len,
        kind: 1,
        op,
        buf_alloc: 1 << 20,
        ..Header::default()
    }
}

fn send(driver: &mut Driver, header: Header, data: &[u8]) {
    driver.request(1, &[&header.to_bytes(), data], &[]);
}

/// The next packet for the guest; its buffer goes back to the device.
fn receive(driver: &mut Driver) -> (Header, Vec<u8>) {
    let Used { head, len } = driver.wait_used(0);
    // `submit` uses one descriptor a buffer: the head tells where it lies.
    let mut descriptor = [0; 8];
    driver.memory.read_slice(&mut descriptor, GuestAddress(u64::from(head) * 16)).expect("memory");
    let mut bytes = vec![0; len as usize];
    driver.memory.read_slice(&mut bytes, GuestAddress(u64::from_le_bytes(descriptor))).expect("memory");
    let memory = Memory::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 8192)]).expect("small"), Arc::new(()));
    memory.write_slice(&bytes, GuestAddress(0)).expect("there");
    let mut buffers = Buffers::default();
    buffers.push(&memory, GuestAddress(0), len).expect("there");
    let header = Header::read(&mut buffers).expect("a header");
    driver.submit(0, &[], &[4096]);
    (header, buffers.to_vec())
}

fn line(socket: &mut UnixStream) -> String {
    let mut text = String::new();
    let mut byte = [0];
    while !text.ends_with('\n') {
        match socket.read(&mut byte) {
            Ok(1) => text.push(char::from(byte[0])),
            // Closed, perhaps before all that we said was read.
            Ok(_) => break,
            Err(error) => {
                assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset, "in time");
                break;
            }
        }
    }
    text
}

fn patient(socket: UnixStream) -> UnixStream {
    socket.set_read_timeout(Some(Duration::from_secs(10))).expect("a timeout");
    socket
}

#[test]
fn the_guest_reaches_a_host_program() {
    let (folder, mut driver) = device();
    let listener = UnixListener::bind(folder.path().join("v_77")).expect("a socket");
    send(&mut driver, packet(OP_REQUEST, 1000, 77, 0), &[]);
    let mut socket = patient(listener.accept().expect("a stream").0);
    let (header, _) = receive(&mut driver);
    assert_eq!((header.op, header.src_port, header.dst_port, header.dst_cid), (OP_RESPONSE, 77, 1000, CID));
    send(&mut driver, packet(OP_RW, 1000, 77, 5), b"hello");
    let mut seen = [0; 5];
    socket.read_exact(&mut seen).expect("in time");
    assert_eq!(&seen, b"hello");
    socket.write_all(b"and back").expect("room");
    let (header, data) = receive(&mut driver);
    assert_eq!((header.op, data.as_slice(), header.fwd_cnt), (OP_RW, &b"and back"[..], 5));
    drop(socket);
    assert_eq!(receive(&mut driver).0.op, OP_SHUTDOWN);
    send(&mut driver, Header { flags: 3, ..packet(OP_SHUTDOWN, 1000, 77, 0) }, &[]);
    assert_eq!(receive(&mut driver).0.op, OP_RST);
}

/// The guest resets, or asks again for, a connection that is being made.
#[test]
fn a_connection_that_the_guest_wants_no_more_is_closed() {
    let folder = tempfile::tempdir().expect("a folder");
    let listener = UnixListener::bind(folder.path().join("v_77")).expect("a socket");
    let path = folder.path().join("v");
    let (connector, mut host) =
        super::connector(super::HostPorts { path: Some(&path), joined: Vec::new() }).expect("sockets");
    let mut driver = Driver::running(Box::new(Vsock::new(9, Some(&path), Arc::new(connector)).expect("a socket")));
    for _ in 0..16 {
        driver.submit(0, &[], &[4096]);
    }
    let mut serve = || {
        while host.serve(Instant::now()) != Served::All {}
        patient(listener.accept().expect("a stream").0)
    };
    for change in [OP_RST, OP_REQUEST, OP_RW] {
        send(&mut driver, packet(OP_REQUEST, 1000, 77, 0), &[]);
        send(&mut driver, packet(change, 1000, 77, 0), &[]);
        if change != OP_RST {
            assert_eq!(receive(&mut driver).0.op, OP_RST);
        }
        assert_eq!(serve().read(&mut [0]).expect("the end"), 0, "closed");
        assert!(driver.poll_used(0).is_none());
    }
    send(&mut driver, packet(OP_REQUEST, 1000, 77, 0), &[]);
    let _socket = serve();
    assert_eq!(receive(&mut driver).0.op, OP_RESPONSE);
    // A reset of the device while a connection is made.
    send(&mut driver, packet(OP_REQUEST, 1001, 77, 0), &[]);
    driver.start(u64::MAX);
    assert_eq!(serve().read(&mut [0]).expect("the end"), 0, "closed");
}

#[test]
fn a_host_program_reaches_the_guest() {
    let (folder, mut driver) = device();
    let mut socket = patient(UnixStream::connect(folder.path().join("v")).expect("listening"));
    socket.write_all(b"CONNECT 5").expect("room");
    socket.write_all(b"2\nearly").expect("room");
    let (request, _) = receive(&mut driver);
    assert_eq!((request.op, request.dst_port), (OP_REQUEST, 52));
    send(&mut driver, packet(OP_RESPONSE, 52, request.src_port, 0), &[]);
    assert_eq!(line(&mut socket), format!("OK {}\n", request.src_port));
    let (header, data) = receive(&mut driver);
    assert_eq!((header.op, data.as_slice()), (OP_RW, &b"early"[..]));
    // A guest that refuses.
    let mut other = patient(UnixStream::connect(folder.path().join("v")).expect("listening"));
    other.write_all(b"CONNECT 53\n").expect("room");
    let (request, _) = receive(&mut driver);
    send(&mut driver, packet(OP_RST, 53, request.src_port, 0), &[]);
    assert_eq!(line(&mut other), "");
    // A program that does not send CONNECT.
    let mut rude = patient(UnixStream::connect(folder.path().join("v")).expect("listening"));
    rude.write_all(b"GET / HTTP/1.1\r\n\r\n").expect("room");
    assert_eq!(line(&mut rude), "");
}

/// Ports of connections that host programs open can be guessed.
#[test]
fn a_packet_for_a_connection_before_its_connect_line_changes_nothing() {
    let (folder, mut driver) = device();
    let mut socket = patient(UnixStream::connect(folder.path().join("v")).expect("listening"));
    std::thread::sleep(Duration::from_millis(50));
    let guessed = 1 << 30;
    for op in [OP_CREDIT_UPDATE, OP_CREDIT_REQUEST, OP_RW, OP_SHUTDOWN, OP_RESPONSE] {
        send(&mut driver, packet(op, 0, guessed, 0), &[]);
        let (answer, _) = receive(&mut driver);
        assert_eq!((answer.op, answer.src_port, answer.dst_port), (OP_RST, guessed, 0));
    }
    send(&mut driver, packet(OP_RST, 0, guessed, 0), &[]);
    socket.write_all(b"CONNECT 52\nhello").expect("room");
    let (request, _) = receive(&mut driver);
    assert_eq!((request.op, request.src_port, request.dst_port), (OP_REQUEST, guessed, 52));
    send(&mut driver, packet(OP_RESPONSE, 52, guessed, 0), &[]);
    assert_eq!(line(&mut socket), format!("OK {guessed}\n"));
    let (header, data) = receive(&mut driver);
    assert_eq!((header.op, data.as_slice()), (OP_RW, &b"hello"[..]));
}

#[test]
fn connections_to_missing_ports_and_invalid_packets_are_reset() {
    let (_folder, mut driver) = device();
    send(&mut driver, packet(OP_REQUEST, 1, 1234, 0), &[]);
    assert_eq!(receive(&mut driver).0.op, OP_RST);
    send(&mut driver, packet(OP_RW, 1, 99, 3), b"abc");
    assert_eq!(receive(&mut driver).0.op, OP_RST);
    // Another socket type is reset with the same type; packets with other CIDs are ignored.
    send(&mut driver, Header { kind: 2, ..packet(OP_REQUEST, 1, 99, 0) }, &[]);
    let (header, _) = receive(&mut driver);
    assert_eq!((header.op, header.kind), (OP_RST, 2));
    send(&mut driver, Header { src_cid: 4, ..packet(OP_REQUEST, 1, 99, 0) }, &[]);
    send(&mut driver, Header { dst_cid: 4, ..packet(OP_REQUEST, 1, 99, 0) }, &[]);
    // A truncated header, and a chain without a readable buffer.
    driver.request(1, &[&[1; HEADER_BYTES - 1]], &[]);
    driver.request(1, &[], &[8]);
    std::thread::sleep(Duration::from_millis(20));
    assert!(driver.poll_used(0).is_none());
}

#[test]
fn a_host_program_that_does_not_accept_blocks_nothing() {
    let (folder, mut driver) = device();
    let path = folder.path().join("v_5");
    let _listener = UnixListener::bind(&path).expect("a socket");
    let mut callers = Vec::new();
    while let Ok(caller) = crate::socket::connect_nonblocking(&path) {
        callers.push(caller);
    }
    send(&mut driver, packet(OP_REQUEST, 1, 5, 0), &[]);
    assert_eq!(receive(&mut driver).0.op, OP_RST);
}

#[test]
fn credit_is_kept_on_both_sides() {
    let (folder, mut driver) = device();
    let listener = UnixListener::bind(folder.path().join("v_8")).expect("a socket");
    send(&mut driver, Header { buf_alloc: 10, ..packet(OP_REQUEST, 7, 8, 0) }, &[]);
    let mut socket = listener.accept().expect("a stream").0;
    assert_eq!(receive(&mut driver).0.op, OP_RESPONSE);
    socket.write_all(&[1; 25]).expect("room");
    assert_eq!(receive(&mut driver).1.len(), 10, "no more than the guest has room for");
    std::thread::sleep(Duration::from_millis(20));
    assert!(driver.poll_used(0).is_none());
    send(&mut driver, Header { buf_alloc: 10, fwd_cnt: 10, ..packet(OP_CREDIT_REQUEST, 7, 8, 0) }, &[]);
    let mut rest = 0;
    while rest < 10 {
        rest += receive(&mut driver).1.len();
    }
    // A guest that sends more than it may, to a program that does not read, is cut off.
    let mut reset = false;
    for _ in 0..2000 {
        send(&mut driver, packet(OP_RW, 7, 8, 4000), &[5; 4000]);
        if driver.poll_used(0).is_some() {
            reset = true;
            break;
        }
    }
    assert!(reset);
}

/// Sends as much as the host keeps for a program that does not read, and returns the answer to the last packet.
fn fill(driver: &mut Driver, guest_port: u32) -> u16 {
    let data = vec![5; 60_000];
    let mut sent = 0_u32;
    loop {
        send(driver, packet(OP_CREDIT_REQUEST, guest_port, 8, 0), &[]);
        // Other credit updates may come before that which was asked for.
        let (mut answer, _) = receive(driver);
        while answer.dst_port != guest_port {
            answer = receive(driver).0;
        }
        if answer.op == OP_RST {
            return OP_RST;
        }
        let room = BUFFER_BYTES - sent.wrapping_sub(answer.fwd_cnt);
        if room == 0 {
            return answer.op;
        }
        let count = room.min(data.len() as u32);
        send(driver, packet(OP_RW, guest_port, 8, count as usize), &data[..count as usize]);
        sent += count;
    }
}

/// 64 connections of 256 KiB each are all that is kept; one more is reset with its first byte that the host does not take.
#[test]
fn what_is_kept_for_programs_that_do_not_read_has_a_bound_over_all_connections() {
    let (folder, mut driver) = device();
    let listener = UnixListener::bind(folder.path().join("v_8")).expect("a socket");
    let mut sockets = Vec::new();
    let connections = u32::try_from(MAX_UNSENT_BYTES).expect("small") / BUFFER_BYTES;
    assert_eq!(connections, 64);
    for port in 1..=connections + 1 {
        send(&mut driver, packet(OP_REQUEST, port, 8, 0), &[]);
        sockets.push(listener.accept().expect("a stream").0);
        assert_eq!(receive(&mut driver).0.op, OP_RESPONSE, "{port}");
        let answer = fill(&mut driver, port);
        assert_eq!(answer, if port <= connections { OP_CREDIT_UPDATE } else { OP_RST }, "{port}");
    }
    // A program that reads makes room for the others.
    let mut reader = patient(sockets.swap_remove(0));
    let mut read = vec![0; 200_000];
    reader.read_exact(&mut read).expect("in time");
    send(&mut driver, packet(OP_REQUEST, 100, 8, 0), &[]);
    let mut other = patient(listener.accept().expect("a stream").0);
    while receive(&mut driver).0.op != OP_RESPONSE {}
    send(&mut driver, packet(OP_RW, 100, 8, 5), b"hello");
    let mut seen = [0; 5];
    other.read_exact(&mut seen).expect("in time");
    assert_eq!(&seen, b"hello");
}

#[test]
fn the_socket_goes_with_the_device() {
    let (folder, driver) = device();
    assert!(folder.path().join("v").exists());
    drop(driver);
    assert!(!folder.path().join("v").exists());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn any_packets_are_survived(packets in proptest::collection::vec(
        (0_u16..9, 0_u32..3, 0_u32..3, any::<u32>(), 0_usize..100, any::<u32>(), any::<u32>()), 1..60)) {
        let (folder, mut driver) = device();
        let listener = UnixListener::bind(folder.path().join("v_1")).expect("a socket");
        for (op, src, dst, flags, len, buf_alloc, fwd_cnt) in packets {
            let claimed = if flags % 3 == 0 { len } else { (flags % 200) as usize };
            let header = Header { flags, buf_alloc, fwd_cnt, ..packet(op, src, dst, claimed) };
            send(&mut driver, header, &vec![1; len]);
        }
        drop(listener);
        driver.start(u64::MAX);
        driver.submit(0, &[], &[4096]);
        send(&mut driver, packet(OP_REQUEST, 1, 1234, 0), &[]);
        prop_assert_eq!(driver.wait_used(0).len as usize, HEADER_BYTES);
    }
}

/// Connections go on over a pause, also with what was on its way in both directions.
#[test]
fn a_pause_closes_no_connection() {
    let (folder, mut driver) = device();
    let listener = UnixListener::bind(folder.path().join("v_77")).expect("a socket");
    send(&mut driver, packet(OP_REQUEST, 1000, 77, 0), &[]);
    let mut socket = patient(listener.accept().expect("a stream").0);
    assert_eq!(receive(&mut driver).0.op, OP_RESPONSE);
    for round in 0..20_u8 {
        driver.device().pause(Instant::now() + Duration::from_secs(20)).expect("paused");
        socket.write_all(&[round; 9]).expect("room");
        driver.submit(1, &[&packet(OP_RW, 1000, 77, 7).to_bytes(), &[round; 7]], &[]);
        assert!(driver.device().resume());
        let mut seen = [0; 7];
        socket.read_exact(&mut seen).expect("in time");
        assert_eq!(seen, [round; 7]);
        driver.wait_used(1);
        let (header, data) = receive(&mut driver);
        assert_eq!((header.op, data.as_slice()), (OP_RW, &[round; 9][..]));
    }
    // A reset closes it.
    driver.start(u64::MAX);
    assert_eq!(socket.read(&mut [0]).expect("in time"), 0);
}

/// The guest of a snapshot is told once that its connections are gone, as soon as it has a buffer for that.
#[test]
fn a_new_device_resets_the_transport() {
    for buffer_before in [true, false] {
        let (folder, mut driver) = device();
        let listener = UnixListener::bind(folder.path().join("v_77")).expect("a socket");
        send(&mut driver, packet(OP_REQUEST, 1000, 77, 0), &[]);
        let mut old = patient(listener.accept().expect("a stream").0);
        assert_eq!(receive(&mut driver).0.op, OP_RESPONSE);
        let submitted = buffer_before.then(|| driver.submit(2, &[], &[4]));
        let other = tempfile::tempdir().expect("a folder");
        driver.replace(Box::new(super::mock::device(9, &other.path().join("v")).expect("a socket"))).expect("restored");
        assert_eq!(old.read(&mut [0]).expect("in time"), 0, "it is closed");
        assert!(driver.device().resume());
        let submitted = submitted.unwrap_or_else(|| driver.submit(2, &[], &[4]));
        let Used { head, len } = driver.wait_used(2);
        assert_eq!((head, driver.contents(&submitted, len)), (u32::from(submitted.head), vec![0; 4]));
        driver.submit(2, &[], &[4]);
        // Packets of the old connection are refused, and new ones are made.
        send(&mut driver, packet(OP_RW, 1000, 77, 1), b"x");
        assert_eq!(receive(&mut driver).0.op, OP_RST);
        let listener = UnixListener::bind(other.path().join("v_77")).expect("a socket");
        send(&mut driver, packet(OP_REQUEST, 1001, 77, 0), &[]);
        drop(listener.accept().expect("a stream"));
        assert_eq!(receive(&mut driver).0.op, OP_RESPONSE);
        assert_eq!(driver.poll_used(2), None, "once");
    }
}

/// A connection that was asked for while the machine was saved is refused at once: the guest does not wait for it until its time is up.
#[test]
fn a_new_device_refuses_what_had_no_answer() {
    let folder = tempfile::tempdir().expect("a folder");
    let device = super::mock::device(9, &folder.path().join("v")).expect("a socket");
    // Without a buffer for the answers.
    let mut driver = Driver::running(Box::new(device));
    let _listener = UnixListener::bind(folder.path().join("v_77")).expect("a socket");
    send(&mut driver, packet(OP_REQUEST, 1000, 77, 0), &[]);
    send(&mut driver, packet(OP_REQUEST, 1001, 99, 0), &[]);
    std::thread::sleep(Duration::from_millis(50));
    let other = tempfile::tempdir().expect("a folder");
    driver.replace(Box::new(super::mock::device(9, &other.path().join("v")).expect("a socket"))).expect("restored");
    assert!(driver.device().resume());
    for _ in 0..2 {
        driver.submit(0, &[], &[4096]);
    }
    let mut refused: Vec<_> =
        (0..2).map(|_| receive(&mut driver).0).map(|header| (header.op, header.dst_port)).collect();
    refused.sort_unstable();
    assert_eq!(refused, [(OP_RST, 1000), (OP_RST, 1001)]);
}

#[test]
fn states_of_other_socket_devices_are_refused() {
    let (folder, mut driver) = device();
    driver.device().pause(Instant::now() + Duration::from_secs(20)).expect("paused");
    let good = driver.device().save().expect("a state");
    let of = |cid, connections| VirtioState {
        device: DeviceState::Vsock(VsockState { cid, unanswered: vec![PortPair { host: 1, guest: 2 }; connections] }),
        ..good.clone()
    };
    for (number, (state, fits)) in
        [(of(9, 0), true), (of(9, 4096), true), (of(9, 4097), false), (of(8, 0), false)].into_iter().enumerate()
    {
        let device = super::mock::device(9, &folder.path().join(format!("w{number}"))).expect("a socket");
        assert_eq!(driver.replace_with(Box::new(device), &state).is_ok(), fits);
    }
}
