//! Each case runs in a process of its own: this test binary again, with the case in its environment.

use super::test_process::{CASE, FOLDER, run, sandbox};
use super::*;
use crate::sandbox::sys::call;
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::process::ExitStatusExt;
use std::process::Output;

/// Runs `case` in a process of its own. Its stderr gets the reports.
fn run_case(case: &str) -> Output {
    let folder = tempfile::tempdir().expect("a folder");
    std::fs::write(folder.path().join("file"), "text").expect("written");
    run(case, folder.path())
}

/// Runs `case`, which a filter must end. Returns what was refused.
fn refused(case: &str) -> String {
    let output = run_case(case);
    assert_eq!(output.status.signal(), Some(libc::SIGSYS), "{case}: {output:?}");
    Refused::read(output.stderr.as_slice()).unwrap_or_else(|| panic!("{case}: no report: {output:?}")).to_string()
}

fn passes(case: &str) {
    let output = run_case(case);
    assert!(output.status.success(), "{case}: {output:?}");
}

/// What a case does on a thread with the role `role`.
fn act(action: &str) {
    match action {
        "nothing" => {}
        "usual" => usual(),
        "abort" => std::process::abort(),
        "overflow" => overflow(0),
        "exec" => drop(call(libc::SYS_execve, [c"/bin/true".as_ptr().addr(), 0, 0, 0])),
        "open" => drop(File::open("/etc/shadow")),
        "socket" => drop(std::net::TcpStream::connect("127.0.0.1:1")),
        "unix" => drop(std::os::unix::net::UnixDatagram::unbound()),
        "connect" => drop(call(libc::SYS_connect, [usize::MAX, 0, 0, 0])),
        "sendmsg" => drop(call(libc::SYS_sendmsg, [usize::MAX, 0, 0, 0])),
        "recvmsg" => drop(call(libc::SYS_recvmsg, [usize::MAX, 0, 0, 0])),
        "executable" => drop(call(libc::SYS_mprotect, [0x1000, 0x2000, 4, 0])),
        "executable-page" => drop(call(libc::SYS_mprotect, [0x1000, 0x1000, 4, 0])),
        "kill" => drop(call(libc::SYS_tgkill, [1, 1, 0, 0])),
        "ioctl" => drop(call(libc::SYS_ioctl, [usize::MAX, 0x5413, 0, 0])),
        "terminal" => drop(call(libc::SYS_ioctl, [usize::MAX, 0x5402, 0, 0])),
        "flags" => assert_eq!(
            call(libc::SYS_fcntl, [usize::MAX, 4, 0x0c02, 0]).expect_err("no file").raw_os_error(),
            Some(libc::EBADF)
        ),
        "direct" => drop(call(libc::SYS_fcntl, [usize::MAX, 4, 0x4002, 0])),
        "irqfd" => drop(call(libc::SYS_ioctl, [usize::MAX, 0x4020_ae76, 0, 0])),
        "ioeventfd" => drop(call(libc::SYS_ioctl, [usize::MAX, 0x4040_ae79, 0, 0])),
        "memory-region" => drop(call(libc::SYS_ioctl, [usize::MAX, 0x4020_ae46, 0, 0])),
        "uncoalesce" => drop(call(libc::SYS_ioctl, [usize::MAX, 0x4010_ae68, 0, 0])),
        "async" => drop(call(libc::SYS_fcntl, [0, 4, 0x2002, 0])),
        "owner" => drop(call(libc::SYS_fcntl, [0, 8, 1, 0])),
        "cid" => drop(call(libc::SYS_ioctl, [usize::MAX, 0x4008_af60, 0, 0])),
        "uring" => drop(call(libc::SYS_io_uring_setup, [1, 0, 0, 0])),
        "handler" => drop(call(libc::SYS_rt_sigaction, [31, 0, 0, 8])),
        "x32" => drop(call(0x4000_0000 | libc::SYS_getpid, [0; 4])),
        "kvm-run" => assert_eq!(
            call(libc::SYS_ioctl, [usize::MAX, 0xae80, 0, 0]).expect_err("no vCPU").raw_os_error(),
            Some(libc::EBADF)
        ),
        "route" => assert_eq!(
            call(libc::SYS_ioctl, [usize::MAX, 0x4008_ae6a, 0, 0]).expect_err("no VM").raw_os_error(),
            Some(libc::EBADF)
        ),
        "blocked" => {
            let mask = 1_u64 << (libc::SIGSYS - 1);
            call(libc::SYS_rt_sigprocmask, [0, (&raw const mask).addr(), 0, 8]).expect("blocked");
            drop(call(libc::SYS_execve, [0; 4]));
        }
        other => panic!("no action {other}"),
    }
}

/// What all threads do: memory, messages, locks, waits, panics.
fn usual() {
    let blocks: Vec<Vec<u8>> = (0..64).map(|shift| vec![1; 1 << (shift % 22)]).collect();
    drop(blocks);
    let map: std::collections::HashMap<_, _> = [(1, 2)].into();
    println!("{map:?} {:?}", std::time::Instant::now());
    eprint!("");
    std::thread::sleep(std::time::Duration::from_millis(1));
    std::thread::park_timeout(std::time::Duration::from_millis(1));
    let _ = rustix::process::getpid();
    assert!(std::panic::catch_unwind(|| std::panic::resume_unwind(Box::new(1))).is_err());
}

#[allow(unconditional_recursion, reason = "the stack is to end")]
fn overflow(depth: u64) {
    let page = std::hint::black_box([depth; 512]);
    overflow(depth + page[0]);
}

fn role(name: &str) -> ThreadRole {
    ThreadRole::ALL.into_iter().find(|role| format!("{role:?}") == name).expect("a role")
}

/// Not a test by itself: what the other tests run in a process of its own.
#[test]
fn case() {
    let Ok(case) = std::env::var(CASE) else { return };
    let words: Vec<&str> = case.split(' ').collect();
    match words[..] {
        ["reach"] => reach(),
        ["process"] => whole_process(),
        ["capabilities"] => capabilities_by_role(),
        ["view", ref host @ ..] => super::view_tests::case(host),
        ["unusable"] => super::view_tests::unusable_user_namespace(),
        ["mounts"] => super::view_tests::mounts_of_shares(),
        ["limits"] => limits(),
        ["handover"] => handover(),
        [mode, name, action] => {
            let mode = if mode == "log" { Mode::Log } else { Mode::On };
            // Not dropped: a role need not permit to close its files.
            let sandbox: &'static Sandbox = Box::leak(Box::new(sandbox(mode)));
            let action = action.to_owned();
            let role = role(name);
            let thread = std::thread::Builder::new().stack_size(256 << 10).spawn(move || {
                rustix::thread::set_no_new_privs(true).expect("set");
                sandbox.enter(role, &format!("{role:?}0")).expect("entered");
                act(&action);
            });
            thread.expect("a thread").join().expect("no panic");
        }
        _ => panic!("no case {case}"),
    }
}

#[test]
fn every_role_refuses_what_hostile_code_would_do() {
    for role in ThreadRole::ALL {
        for (action, call) in [
            ("exec", "execve (59)"),
            ("open", "openat (257)"),
            ("executable", "mprotect (10)"),
            ("kill", "tgkill (234)"),
            ("uring", "io_uring_setup (425)"),
            ("handler", "rt_sigaction (13)"),
            ("x32", "system call 1073741863"),
        ] {
            let expected = format!("its thread {role:?}0 called {call}, which its sandbox does not permit");
            assert_eq!(refused(&format!("on {role:?} {action}")), expected);
        }
    }
}

#[test]
fn sockets_and_ioctls_are_limited_by_their_arguments() {
    for role in ThreadRole::ALL {
        for (action, call) in [("socket", "socket (41)"), ("unix", "socket (41)"), ("connect", "connect (42)")] {
            assert!(refused(&format!("on {role:?} {action}")).contains(&format!("called {call}")), "{role:?} {action}");
        }
        // The process sends its open files to no other process, and gets no others.
        assert!(refused(&format!("on {role:?} sendmsg")).contains("called sendmsg (46)"), "{role:?}");
        // Connections of a guest, and the files of a snapshot.
        if matches!(role, ThreadRole::Vsock | ThreadRole::Main) {
            passes(&format!("on {role:?} recvmsg"));
        } else {
            assert!(refused(&format!("on {role:?} recvmsg")).contains("called recvmsg (47)"), "{role:?}");
        }
    }
    assert!(refused("on Vcpu ioctl").contains("called ioctl 0x5413,"), "TIOCGWINSZ");
    passes("on Main ioctl");
    // The test device has one page of guest memory executable for a moment.
    passes("on TestVcpu executable-page");
    assert!(refused("on Vcpu executable-page").contains("called mprotect (10)"));
    assert!(refused("on Main terminal").contains("called ioctl 0x5402,"), "TCSETS");
    passes("on Fs flags");
    assert!(refused("on Fs async").contains("called fcntl"), "O_ASYNC");
    assert!(refused("on Fs direct").contains("called fcntl"), "O_DIRECT");
    assert!(refused("on Fs owner").contains("called fcntl"), "F_SETOWN");
    assert!(refused("on Vhost cid").contains("called ioctl 0x4008af60,"), "VHOST_VSOCK_SET_GUEST_CID");
    passes("on Vcpu kvm-run");
    assert!(refused("on Fs kvm-run").contains("called ioctl 0xae80,"));
}

/// The thread of a vsock device uses a connection that another process has made.
fn handover() {
    use hwvmm_devices::virtio::vsock::{HostPorts, connector};
    use std::io::{Read, Write};
    let folder = std::path::PathBuf::from(std::env::var(FOLDER).expect("a folder"));
    let listener = std::os::unix::net::UnixListener::bind(folder.join("v_7")).expect("bound");
    let (device, mut host) =
        connector(HostPorts { path: Some(&folder.join("v")), joined: Vec::new() }).expect("sockets");
    let sandbox = sandbox(Mode::On);
    let thread = std::thread::spawn(move || {
        rustix::thread::set_no_new_privs(true).expect("set");
        sandbox.enter(ThreadRole::Vsock, "vsock").expect("entered");
        let number = device.request(7).expect("room");
        let answer = std::iter::from_fn(|| Some(device.answer())).flatten().next().expect("an answer");
        assert_eq!(answer.number, number);
        answer.result.expect("connected").write_all(b"hello").expect("room");
    });
    let mut socket = loop {
        host.serve(std::time::Instant::now());
        listener.set_nonblocking(true).expect("set");
        if let Ok((socket, _)) = listener.accept() {
            break socket;
        }
    };
    let mut text = String::new();
    socket.read_to_string(&mut text).expect("read");
    assert_eq!(text, "hello");
    thread.join().expect("no panic");
}

#[test]
fn a_vsock_device_uses_connections_that_its_parent_has_made() {
    passes("handover");
}

/// A coalesced write to the I/O APIC or to an MSI-X table routes an interrupt, in the thread that happens to take it.
#[test]
fn all_threads_that_carry_out_accesses_to_the_bus_can_route_interrupts() {
    for role in [ThreadRole::Vcpu, ThreadRole::TestVcpu, ThreadRole::Drain, ThreadRole::Main] {
        passes(&format!("on {role:?} route"));
    }
    assert!(refused("on Net route").contains("called ioctl 0x4008ae6a,"));
}

/// Memory, doorbells and interrupts of the machine are made before the guest runs.
#[test]
fn no_thread_changes_the_machine() {
    for role in ThreadRole::ALL {
        for action in ["irqfd", "ioeventfd", "memory-region", "uncoalesce"] {
            assert!(refused(&format!("on {role:?} {action}")).contains("called ioctl 0x40"), "{role:?} {action}");
        }
    }
}

#[test]
fn every_role_permits_what_each_thread_does() {
    for role in ThreadRole::ALL {
        passes(&format!("on {role:?} nothing"));
        if role == ThreadRole::Parser {
            assert!(refused("on Parser usual").contains("nanosleep"), "it never waits");
        } else {
            passes(&format!("on {role:?} usual"));
        }
    }
}

#[test]
fn an_abort_and_a_stack_overflow_keep_their_status() {
    for role in ThreadRole::ALL {
        for action in ["abort", "overflow"] {
            let output = run_case(&format!("on {role:?} {action}"));
            assert_eq!(output.status.signal(), Some(libc::SIGABRT), "{role:?} {action}: {output:?}");
        }
    }
}

#[test]
fn a_blocked_signal_does_not_save_the_process() {
    let output = run_case("on Vcpu blocked");
    assert_eq!(output.status.signal(), Some(libc::SIGSYS), "{output:?}");
}

#[test]
fn log_tells_and_permits() {
    let output = run_case("log Vcpu open");
    assert!(output.status.success(), "{output:?}");
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(text, "hwvmm: sandbox: thread Vcpu0 called openat (257): --sandbox=on refuses that\n");
    assert!(run_case("log Main usual").stderr.is_empty());
}

fn denied<T>(result: io::Result<T>, what: &str) {
    match result {
        Ok(_) => panic!("{what} is possible"),
        Err(error) => assert!(matches!(error.raw_os_error(), Some(libc::EACCES | libc::EPERM)), "{what}: {error}"),
    }
}

fn reach() {
    let folder = std::path::PathBuf::from(std::env::var(FOLDER).expect("a folder"));
    let readable = folder.join("readable");
    let writable = folder.join("writable");
    for path in [&readable, &writable] {
        std::fs::create_dir(path).expect("made");
        std::fs::write(path.join("file"), "text").expect("written");
    }
    let opened = File::open(folder.join("file")).expect("opened before");
    let sandbox = sandbox(Mode::On);
    let reach = [
        Reach { path: readable.clone(), access: Access::Read },
        Reach { path: writable.clone(), access: Access::ReadWrite },
    ];
    sandbox.confine_process(&reach).expect("confined");
    assert_eq!(std::fs::read_to_string(readable.join("file")).expect("readable"), "text");
    assert_eq!(std::fs::read_dir(&readable).expect("readable").count(), 1);
    denied(std::fs::write(readable.join("file"), "x"), "a write to what is to be read");
    denied(std::fs::write(readable.join("new"), "x"), "a new file in what is to be read");
    denied(std::fs::remove_file(readable.join("file")), "a removal from what is to be read");
    std::fs::write(writable.join("new"), "x").expect("writable");
    std::fs::create_dir(writable.join("folder")).expect("writable");
    std::fs::rename(writable.join("new"), writable.join("folder/new")).expect("writable");
    std::fs::remove_file(writable.join("folder/new")).expect("writable");
    denied(File::open(folder.join("file")), "a file beside what is within reach");
    denied(File::open("/etc/passwd"), "a file of the host");
    denied(File::open(writable.join("../file")), "a file above what is within reach");
    std::os::unix::fs::symlink("/etc/passwd", writable.join("link")).expect("writable");
    denied(File::open(writable.join("link")), "a file of the host by a link");
    denied(std::net::TcpListener::bind("127.0.0.1:0"), "a TCP port");
    denied(std::net::TcpStream::connect("127.0.0.1:1"), "a TCP connection");
    let parent = rustix::process::getppid().expect("a parent");
    denied(rustix::process::test_kill_process(parent).map_err(Into::into), "a signal to another process");
    rustix::process::test_kill_process(rustix::process::getpid()).expect("a signal to itself");
    std::thread::spawn(|| denied(File::open("/etc/passwd"), "a file of the host, on a thread")).join().expect("denied");
    // What was open is open.
    assert_eq!(std::io::read_to_string(opened).expect("open"), "text");
}

#[test]
fn nothing_but_what_was_given_is_within_reach() {
    passes("reach");
}

fn whole_process() {
    let sandbox = sandbox(Mode::On);
    sandbox.confine_process(&[]).expect("confined");
    let thread = std::thread::spawn(move || {
        denied(File::open("/proc/self/status"), "a file of the process");
        rustix::thread::no_new_privs().expect("known").then_some(()).expect("no_new_privs");
        let core = rustix::process::getrlimit(Resource::Core);
        assert_eq!((core.current, core.maximum), (Some(0), Some(0)));
        assert_eq!(rustix::process::dumpable_behavior().expect("known"), DumpableBehavior::NotDumpable);
    });
    thread.join().expect("no panic");
}

#[test]
fn the_process_gets_no_rights_and_leaves_no_core() {
    passes("process");
}

fn limits() {
    let reports = std::io::stderr().as_fd().try_clone_to_owned().expect("a copy");
    let size = File::open("/proc/self/statm").ok();
    let sandbox = Sandbox { mismatch: None, size, ..Sandbox::new(Mode::On, reports).expect("a sandbox") };
    sandbox.confine_process(&[]).expect("confined");
    sandbox.enter(ThreadRole::Main, "main").expect("entered");
    for resource in [Resource::Core, Resource::Nofile, Resource::As] {
        let rustix::process::Rlimit { current, maximum } = rustix::process::getrlimit(resource);
        assert!(current.is_some() && current == maximum, "{resource:?}: {current:?} {maximum:?}");
    }
    let mapped = |bytes: usize| Vec::<u8>::new().try_reserve_exact(bytes).is_ok();
    assert!(mapped(256 << 20) && !mapped(513 << 20), "memory");
}

#[test]
fn memory_and_files_of_the_process_are_limited() {
    passes("limits");
}

fn capabilities_by_role() {
    use rustix::thread::{CapabilitySet, CapabilitySets, capabilities, capability_is_in_bounding_set};
    let before = capabilities(None).expect("readable");
    // Capabilities are read by capget, which no role permits; so without filters.
    let bare = std::sync::Arc::new(Sandbox { mode: Mode::On, ..Sandbox::off() });
    bare.confine_process(&[]).expect("confined");
    for role in ThreadRole::ALL {
        let bare = std::sync::Arc::clone(&bare);
        let thread = std::thread::spawn(move || {
            bare.enter(role, "x").expect("entered");
            capabilities(None).expect("readable")
        });
        let CapabilitySets { effective, permitted, inheritable } = thread.join().expect("no panic");
        let kept = if role == ThreadRole::Fs { before.permitted } else { CapabilitySet::empty() };
        assert_eq!(
            (permitted, effective & !kept, inheritable & !kept),
            (kept, CapabilitySet::empty(), CapabilitySet::empty())
        );
    }
    if before.effective.contains(CapabilitySet::SETPCAP) {
        assert!(!capability_is_in_bounding_set(CapabilitySet::SYS_ADMIN).expect("known"));
    }
}

#[test]
fn only_shares_keep_capabilities() {
    passes("capabilities");
}
