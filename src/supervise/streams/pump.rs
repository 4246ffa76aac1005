//! One direction of a command's streams: bytes from a descriptor to another, through a buffer of a fixed size.

use rustix::event::PollFlags;
use rustix::io::{Errno, ioctl_fionbio, read, write};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// Bytes that are held for a reader that does not read.
const BUFFER_BYTES: usize = 64 << 10;

/// Whether a stream goes on.
#[derive(Debug)]
pub(super) enum PumpState {
    /// There may be more.
    Open,
    /// All was written and the source has ended, or the reader has closed its end. Both descriptors are closed.
    Ended,
    /// Reading or writing failed for another reason than a reader that is gone. Both descriptors are closed.
    Failed(io::Error),
}

/// Moves bytes from a source to a sink. It never waits: both are non-blocking. What the sink does not take is held, and the source
/// is not read while the buffer is full.
#[derive(Debug)]
pub(super) struct Pump {
    /// `None` once it has ended.
    source: Option<OwnedFd>,
    /// `None` once all has been written, or the reader has closed its end.
    sink: Option<OwnedFd>,
    buffer: Box<[u8]>,
    /// What is held lies from here ...
    start: usize,
    /// ... to here.
    end: usize,
}

impl Pump {
    /// Makes both descriptors non-blocking. That holds for all who share their open files: the caller restores it.
    ///
    /// # Errors
    /// Returns the error of ioctl(2) with FIONBIO.
    pub(super) fn new(source: OwnedFd, sink: OwnedFd) -> io::Result<Self> {
        ioctl_fionbio(&source, true)?;
        ioctl_fionbio(&sink, true)?;
        let buffer = vec![0; BUFFER_BYTES].into_boxed_slice();
        Ok(Self { source: Some(source), sink: Some(sink), buffer, start: 0, end: 0 })
    }

    /// The source, to be polled for input; `None` while there is no room for more, or once it has ended.
    #[must_use]
    pub(super) fn source(&self) -> Option<BorrowedFd<'_>> {
        self.source.as_ref().filter(|_| self.held() < self.buffer.len()).map(AsFd::as_fd)
    }

    /// The sink, with the events to poll it for: none where there is nothing to write. poll(2) reports even then that its reader is gone.
    #[must_use]
    pub(super) fn sink(&self) -> Option<(BorrowedFd<'_>, PollFlags)> {
        let events = if self.held() > 0 { PollFlags::OUT } else { PollFlags::empty() };
        self.sink.as_ref().map(|sink| (sink.as_fd(), events))
    }

    /// Reads once and writes once, with what poll(2) said of the sink.
    pub(super) fn advance(&mut self, sink_events: PollFlags) -> PumpState {
        // With bytes to write, write(2) says whether it still takes them.
        let gone = sink_events.intersects(PollFlags::ERR | PollFlags::HUP) && self.held() == 0;
        let result = if gone { Err(Errno::PIPE) } else { self.fill().and_then(|()| self.drain()) };
        match result {
            Ok(()) if self.source.is_some() || self.held() > 0 => PumpState::Open,
            Ok(()) | Err(Errno::PIPE | Errno::CONNRESET) => {
                self.close();
                PumpState::Ended
            }
            Err(error) => {
                self.close();
                PumpState::Failed(error.into())
            }
        }
    }

    fn held(&self) -> usize {
        self.end - self.start
    }

    fn close(&mut self) {
        (self.source, self.sink) = (None, None);
        (self.start, self.end) = (0, 0);
    }

    /// Reads once, where there is room.
    fn fill(&mut self) -> Result<(), Errno> {
        let Some(source) = &self.source else { return Ok(()) };
        if self.end == self.buffer.len() && self.start > 0 {
            self.buffer.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        let room = &mut self.buffer[self.end..];
        if room.is_empty() {
            return Ok(());
        }
        match read(source, room) {
            Ok(0) => self.source = None,
            Ok(count) => self.end += count,
            // A peer that has reset the connection sends nothing more.
            Err(Errno::CONNRESET) => self.source = None,
            Err(Errno::AGAIN | Errno::INTR) => {}
            Err(error) => return Err(error),
        }
        Ok(())
    }

    /// Writes once, where there is something.
    fn drain(&mut self) -> Result<(), Errno> {
        let Some(sink) = &self.sink else { return Err(Errno::PIPE) };
        if self.start == self.end {
            return Ok(());
        }
        match write(sink, &self.buffer[self.start..self.end]) {
            Ok(count) => self.start += count,
            Err(Errno::AGAIN | Errno::INTR) => {}
            Err(error) => return Err(error),
        }
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::event::{PollFd, Timespec, poll};
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;
    use std::thread;

    fn pair() -> (UnixStream, UnixStream) {
        UnixStream::pair().expect("a pair of sockets")
    }

    /// Polls once, for 5 s at most, and advances.
    fn step(pump: &mut Pump) -> PumpState {
        let limit = Timespec { tv_sec: 5, tv_nsec: 0 };
        let (sink, wanted) = pump.sink().expect("open");
        let mut fds = vec![PollFd::from_borrowed_fd(sink, wanted)];
        fds.extend(pump.source().map(|source| PollFd::from_borrowed_fd(source, PollFlags::IN)));
        assert!(poll(&mut fds, Some(&limit)).expect("poll") > 0, "nothing happened within 5 s");
        let events = fds[0].revents();
        pump.advance(events)
    }

    fn run(pump: &mut Pump) -> PumpState {
        loop {
            match step(pump) {
                PumpState::Open => {}
                end => return end,
            }
        }
    }

    #[test]
    fn twenty_megabytes_arrive_as_they_are_and_then_the_end() {
        let sent: Vec<u8> = (0..20_000_000_u32).map(|index| (index.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
        let (mut writer, source) = pair();
        let (sink, mut reader) = pair();
        let mut pump = Pump::new(source.into(), sink.into()).expect("a pump");
        let received = thread::scope(|scope| {
            scope.spawn(|| {
                writer.write_all(&sent).expect("written");
                writer.shutdown(std::net::Shutdown::Both).expect("shut down");
            });
            let received = scope.spawn(move || {
                let mut received = Vec::new();
                reader.read_to_end(&mut received).map(|_| received)
            });
            assert!(matches!(run(&mut pump), PumpState::Ended));
            received.join().expect("no panic").expect("read")
        });
        assert!(received == sent, "{} bytes of {}", received.len(), sent.len());
    }

    #[test]
    fn a_reader_that_does_not_read_holds_the_writer_and_not_the_pump() {
        let (mut writer, source) = pair();
        let (sink, reader) = pair();
        writer.set_nonblocking(true).expect("set");
        let mut pump = Pump::new(source.into(), sink.into()).expect("a pump");
        let mut written = 0;
        while pump.source().is_some() {
            written += writer.write(&[1; 4096]).unwrap_or(0);
            assert!(matches!(pump.advance(PollFlags::empty()), PumpState::Open));
            assert!(written < 64 << 20, "no back pressure");
        }
        assert_eq!(pump.held(), BUFFER_BYTES);
        assert!(matches!(pump.advance(PollFlags::empty()), PumpState::Open), "it does not wait");
        drop(reader);
        assert!(matches!(run(&mut pump), PumpState::Ended));
    }

    #[test]
    fn a_reader_that_is_gone_ends_the_source_too() {
        // Before anything was written, and with something to write.
        for text in [&b""[..], b"text"] {
            let (mut writer, source) = pair();
            let (reader, sink) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).expect("a pipe");
            let mut pump = Pump::new(source.into(), sink).expect("a pump");
            drop(reader);
            writer.write_all(text).expect("room");
            assert!(matches!(run(&mut pump), PumpState::Ended));
            // Another test that starts a process has the other end in it, from fork to exec.
            let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
            let error = loop {
                assert!(std::time::Instant::now() < deadline, "there is a reader still");
                match writer.write_all(b"more") {
                    Ok(()) => std::thread::sleep(std::time::Duration::from_millis(1)),
                    Err(error) => break error,
                }
            };
            assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
        }
    }

    #[test]
    fn a_sink_without_space_is_a_failure() {
        let (mut writer, source) = pair();
        let full = std::fs::OpenOptions::new().write(true).open("/dev/full").expect("/dev/full");
        let mut pump = Pump::new(source.into(), full.into()).expect("a pump");
        writer.write_all(b"text").expect("room");
        let PumpState::Failed(error) = run(&mut pump) else { panic!("a failure") };
        assert_eq!(error.kind(), io::ErrorKind::StorageFull);
    }

    #[test]
    fn a_source_without_bytes_ends_at_once() {
        let null = std::fs::File::open("/dev/null").expect("/dev/null");
        let (sink, mut reader) = pair();
        let mut pump = Pump::new(null.into(), sink.into()).expect("a pump");
        assert!(matches!(run(&mut pump), PumpState::Ended));
        assert_eq!(reader.read(&mut [0]).expect("the end"), 0);
    }
}
