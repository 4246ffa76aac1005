//! Both ends of the connector, with a device's process that behaves and one that does not.

use super::*;
use std::io::{Read, Write};
use std::os::unix::net::UnixListener;
use tempfile::TempDir;

fn named(path: &Path) -> (Connector, HostConnector) {
    connector(HostPorts { path: Some(path), joined: Vec::new() }).expect("sockets")
}

fn ends() -> (TempDir, Connector, HostConnector) {
    let folder = tempfile::tempdir().expect("a folder");
    let (device, host) = named(&folder.path().join("v"));
    (folder, device, host)
}

fn refused(device: &Connector, host: &mut HostConnector, port: u32) -> Option<i32> {
    let number = device.request(port).expect("room");
    assert_eq!(host.serve(Instant::now()), Served::All);
    let answer = device.answer().expect("an answer");
    assert_eq!(answer.number, number);
    answer.result.expect_err("no connection").raw_os_error()
}

#[test]
fn a_connection_is_handed_over_and_no_copy_is_kept() {
    let (folder, device, mut host) = ends();
    let listener = UnixListener::bind(folder.path().join("v_77")).expect("bound");
    let number = device.request(77).expect("room");
    assert!(device.answer().is_none(), "nothing is waited for");
    assert_eq!(host.serve(Instant::now()), Served::All);
    let answer = device.answer().expect("an answer");
    assert_eq!(answer.number, number);
    let mut ours = answer.result.expect("connected");
    let mut theirs = listener.accept().expect("connected").0;
    ours.write_all(b"x").expect("room");
    theirs.read_exact(&mut [0]).expect("there");
    assert_eq!(ours.read(&mut [0]).expect_err("nothing").kind(), io::ErrorKind::WouldBlock, "it does not block");
    drop(ours);
    assert_eq!(theirs.read(&mut [0]).expect("the end"), 0, "no other process has it open");
}

#[test]
fn only_sockets_of_the_path_are_connected_to() {
    let (folder, device, mut host) = ends();
    let secret = UnixListener::bind(folder.path().join("secret")).expect("bound");
    secret.set_nonblocking(true).expect("set");
    std::os::unix::fs::symlink(folder.path().join("secret"), folder.path().join("v_1")).expect("linked");
    std::fs::write(folder.path().join("v_2"), "a file").expect("written");
    assert_eq!(refused(&device, &mut host, 1), Some(libc::ECONNREFUSED), "a symbolic link");
    assert_eq!(refused(&device, &mut host, 2), Some(libc::ECONNREFUSED), "a file");
    assert_eq!(refused(&device, &mut host, 3), Some(libc::ENOENT));
    assert!(secret.accept().is_err(), "there is no connection");
    // A folder that is replaced later changes nothing.
    let (old, new) = (folder.path().join("old"), folder.path().join("new"));
    std::fs::create_dir(&new).expect("made");
    let (device, mut host) = named(&new.join("v"));
    std::fs::rename(&new, &old).expect("renamed");
    std::os::unix::fs::symlink(folder.path(), &new).expect("linked");
    let _listener = UnixListener::bind(folder.path().join("v_4")).expect("bound");
    assert_eq!(refused(&device, &mut host, 4), Some(libc::ENOENT));
    let (device, mut host) = named(&folder.path().join("missing/v"));
    assert_eq!(refused(&device, &mut host, 4), Some(libc::ENOENT));
}

#[test]
fn a_full_backlog_is_an_error_at_once() {
    let (folder, device, mut host) = ends();
    let path = folder.path().join("v_5");
    let _listener = UnixListener::bind(&path).expect("bound");
    let mut callers = Vec::new();
    while let Ok(caller) = crate::socket::connect_nonblocking(&path) {
        callers.push(caller);
    }
    assert_eq!(refused(&device, &mut host, 5), Some(libc::EAGAIN));
}

#[test]
fn requests_without_an_answer_are_bounded() {
    let (_folder, device, mut host) = ends();
    for _ in 0..MAX_OUTSTANDING {
        device.request(1).expect("room");
    }
    assert_eq!(device.request(1).expect_err("full").kind(), io::ErrorKind::WouldBlock);
    while host.serve(Instant::now()) == Served::Some {}
    assert_eq!(std::iter::from_fn(|| device.answer()).count(), MAX_OUTSTANDING);
    device.request(1).expect("room again");
}

#[test]
fn the_rate_is_bounded() {
    let (_folder, device, mut host) = ends();
    let start = Instant::now();
    host.bucket = Bucket { left: BURST, last: start };
    let mut served = 0;
    loop {
        device.request(1).expect("room");
        let state = host.serve(start);
        served += std::iter::from_fn(|| device.answer()).count();
        match state {
            Served::All => {}
            Served::Later => break,
            other => panic!("{other:?}"),
        }
    }
    device.request(1).expect("room");
    assert_eq!(host.serve(start), Served::Later);
    assert!(device.answer().is_none());
    assert_eq!(served, BURST as usize);
    assert_eq!(host.resumes_at(start), Some(start + INTERVAL));
    assert_eq!(host.resumes_at(start + INTERVAL), None);
    assert_eq!(host.serve(start + INTERVAL), Served::Later, "one more");
    assert!(device.answer().is_some());
}

#[test]
fn a_process_that_takes_no_answers_blocks_no_thread() {
    let (folder, device, mut host) = ends();
    let _listener = UnixListener::bind(folder.path().join("v_6")).expect("bound");
    for round in 0..50_000_u32 {
        let sent = send(&device.socket, &packet(round, 6), SendFlags::DONTWAIT | SendFlags::NOSIGNAL);
        assert!(sent.is_ok(), "{round}");
        host.bucket.left = BURST;
        assert_eq!(host.serve(Instant::now()), Served::All);
    }
}

#[test]
fn what_is_no_request_closes_the_channel() {
    for bad in [&[][..], &[1; PACKET_BYTES - 1], &[1; PACKET_BYTES + 1], &[1; 4096]] {
        let (_folder, device, mut host) = ends();
        send(&device.socket, bad, SendFlags::empty()).expect("room");
        assert_eq!(host.serve(Instant::now()), Served::Closed, "{}", bad.len());
    }
    let (_folder, device, mut host) = ends();
    drop(device);
    assert_eq!(host.serve(Instant::now()), Served::Closed);
}

#[test]
fn a_joined_port_is_given_to_the_first_connection_alone() {
    let folder = tempfile::tempdir().expect("a folder");
    let _listener = UnixListener::bind(folder.path().join("v_5")).expect("bound");
    let _other = UnixListener::bind(folder.path().join("v_6")).expect("bound");
    for path in [None, Some(folder.path().join("v"))] {
        let (mut near, far) = UnixStream::pair().expect("sockets");
        far.set_nonblocking(true).expect("set");
        let joined = vec![JoinedPort { port: 5, socket: far }];
        let (device, mut host) = connector(HostPorts { path: path.as_deref(), joined }).expect("sockets");
        device.request(5).expect("room");
        assert_eq!(host.serve(Instant::now()), Served::All);
        let mut stream = device.answer().expect("an answer").result.expect("connected");
        near.write_all(b"x").expect("room");
        stream.read_exact(&mut [0]).expect("there");
        assert_eq!(refused(&device, &mut host, 5), Some(libc::ECONNREFUSED), "it is taken");
        drop(stream);
        assert_eq!(near.read(&mut [0]).expect("the end"), 0, "no other process has it open");
        if path.is_none() {
            assert_eq!(refused(&device, &mut host, 6), Some(libc::ECONNREFUSED), "no other port");
        } else {
            device.request(6).expect("room");
            assert_eq!(host.serve(Instant::now()), Served::All);
            device.answer().expect("an answer").result.expect("connected by its name");
        }
    }
}
