use super::*;
use crate::exit::CommandEnd;
use std::io::{Read, Write};

/// A session whose standard streams are those of the test, and the guest's end of its control stream.
fn session() -> (Session, UnixStream) {
    let (ends, mut ports) = Ends::new(AgentStreams::Command(CommandTerminal::None)).expect("sockets");
    let numbers: Vec<u32> = ports.iter().map(|joined| joined.port).collect();
    assert_eq!(numbers, [FIRST_AGENT_PORT, FIRST_AGENT_PORT + 1, FIRST_AGENT_PORT + 2, FIRST_AGENT_PORT + 3]);
    let guest = ports.remove(0).socket;
    (Session::without_streams(ends.control, AgentTask::Run), guest)
}

fn after(lines: &str, end: EndReason) -> EndReason {
    let (mut session, mut guest) = session();
    guest.write_all(lines.as_bytes()).expect("room");
    session.serve();
    session.explain(end)
}

#[test]
fn a_guest_without_ports_has_its_status_from_the_control_stream() {
    let ended = EndReason::Command(CommandEnd::Exited(7));
    assert_eq!(after("started\nexited 7\n", EndReason::PowerOff), ended);
    assert_eq!(after("started\nexited 7\n", EndReason::Panicked(None)), EndReason::Panicked(None));
    assert_eq!(after("started\nexited 0\n", ended.clone()), ended, "the port's status counts where there is one");
}

#[test]
fn a_guest_that_ends_before_has_no_status() {
    let none = EndReason::NoCommandStatus(Box::new(EndReason::PowerOff));
    assert_eq!(after("started\n", EndReason::PowerOff), none);
    assert_eq!(after("", EndReason::PowerOff), none);
    assert_eq!(after("exited 0\n", EndReason::PowerOff), none, "it was not started");
    assert_eq!(after("started\nexited 0 \x1b[2J\n", EndReason::PowerOff), none);
}

#[test]
fn a_failure_of_the_agent_is_told_with_what_may_help() {
    let failed = "failed root no folder\n";
    assert_eq!(after(failed, EndReason::PowerOff), EndReason::NoCommand(Some("root: no folder".into())));
    let hint = EndReason::NoCommand(Some("see --modules".into()));
    assert_eq!(after(failed, hint), EndReason::NoCommand(Some("root: no folder; see --modules".into())));
}

/// A full disk behind stdout.
#[test]
fn a_command_whose_output_is_cut_off_has_not_passed() {
    let (mut session, mut guest) = session();
    let full = std::fs::File::options().write(true).open("/dev/full").expect("/dev/full");
    let (mut output, source) = UnixStream::pair().expect("sockets");
    let pump = Pump::new(source.into(), full.into()).expect("a pump");
    session.outputs.push(Stream { name: "stdout", pump });
    output.write_all(b"not ok 1").expect("room");
    guest.write_all(b"started\nexited 0\n").expect("room");
    session.serve();
    let EndReason::Failed(why) = session.explain(EndReason::Command(CommandEnd::Exited(0))) else { panic!("passed") };
    assert!(why.starts_with("the command exited with status 0, but its stdout was cut off: "), "{why}");
    assert_eq!(session.explain(EndReason::Panicked(None)), EndReason::Panicked(None));
}

/// Such as `head -1`.
#[test]
fn a_reader_that_has_seen_enough_is_no_failure() {
    let (mut session, _guest) = session();
    let (mut output, source) = UnixStream::pair().expect("sockets");
    let (sink, reader) = UnixStream::pair().expect("sockets");
    drop(reader);
    let pump = Pump::new(source.into(), sink.into()).expect("a pump");
    session.outputs.push(Stream { name: "stdout", pump });
    output.write_all(b"text").expect("room");
    session.serve();
    let ended = EndReason::Command(CommandEnd::Exited(0));
    assert_eq!((session.outputs.len(), session.explain(ended.clone())), (0, ended));
}

/// The guest's ends of the streams, control first.
fn template() -> (Session, Vec<UnixStream>) {
    let (ends, ports) = Ends::new(AgentStreams::Template).expect("sockets");
    let session = Session::new(ends, Vec::new()).expect("a session");
    (session, ports.into_iter().map(|joined| joined.socket).collect())
}

#[test]
fn a_guest_that_is_ready_is_saved_and_not_stopped() {
    let (mut session, mut guest) = template();
    session.serve();
    assert_eq!((session.saves_at(), session.has_started(), guest.len()), (None, false, 4));
    guest[0].write_all(b"ready\n").expect("room");
    session.serve();
    assert!(session.saves_at().is_some() && session.has_started());
    assert_eq!((session.stops_at(), session.stop_request()), (None, None));
    for stream in &mut guest[1..] {
        let error = stream.read(&mut [0; 8]).expect_err("neither bytes nor an end");
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
    }
    assert_eq!(session.explain(EndReason::Saved), EndReason::Saved);
    guest[0].write_all(b"failed root gone\n").expect("room");
    session.serve();
    assert_eq!((session.saves_at(), session.stop_request()), (None, Some(StopRequest::NoCommand)));
    assert_eq!(session.explain(EndReason::Saved), EndReason::NoCommand(Some("root: gone".into())));
}

#[test]
fn a_guest_that_waits_is_sent_its_command_in_pieces() {
    let message: Vec<u8> = (0..2_000_000_u32).map(|at| (at.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    for terminal in [CommandTerminal::None, CommandTerminal::Given] {
        let (ends, ports) = Ends::new(AgentStreams::Late(terminal)).expect("sockets");
        assert_eq!(ports.len(), 4, "the guest has connected all of them");
        let mut session = Session::without_streams(ends.control, AgentTask::Run);
        session.unsent.clone_from(&message);
        let mut guest = ports.into_iter().map(|joined| joined.socket).next().expect("the control stream");
        let (mut all, mut bytes) = (Vec::new(), vec![0; 64 << 10]);
        while all.len() < message.len() {
            session.serve();
            if let Ok(count) = guest.read(&mut bytes) {
                all.extend_from_slice(&bytes[..count]);
            }
        }
        assert!(all == message);
        guest.write_all(b"started\nexited 7\n").expect("room");
        session.serve();
        assert_eq!(session.explain(EndReason::PowerOff), EndReason::Command(CommandEnd::Exited(7)));
    }
}

#[test]
fn a_guest_that_goes_on_is_stopped_later() {
    let (mut session, mut guest) = session();
    guest.write_all(b"started\n").expect("room");
    session.serve();
    assert_eq!((session.stops_at(), session.stop_request()), (None, None));
    guest.write_all(b"signaled 9\n").expect("room");
    session.serve();
    assert!(session.stops_at().is_some_and(|at| at > Instant::now()));
    assert_eq!(session.stop_request(), Some(StopRequest::Command(CommandEnd::Signaled(9))));
}
