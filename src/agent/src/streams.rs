//! Bytes on their way between the command and the host.

use crate::ports::PortDevice;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{Errno, read, write};
use rustix::net::{Shutdown, shutdown};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

/// What is read at once, in bytes.
const BUFFER_BYTES: usize = 64 << 10;

/// What a descriptor is, which says how its end is told.
#[derive(Debug)]
pub(crate) enum Kind {
    /// Closed at its end.
    Pipe,
    /// Shut down at its end, and kept until the host has answered.
    Socket,
    /// Closed at its end, which the host is told, and opened again to see the host's answer.
    Port(PortDevice),
}

/// One end of a [`Pump`].
#[derive(Debug)]
pub(crate) struct Side {
    file: Option<OwnedFd>,
    kind: Kind,
}

impl Side {
    /// Makes `file` non-blocking.
    pub(crate) fn new(file: OwnedFd, kind: Kind) -> Result<Self, Errno> {
        rustix::io::ioctl_fionbio(&file, true)?;
        Ok(Self { file: Some(file), kind })
    }

    fn end(&mut self, how: Shutdown) {
        match &self.kind {
            Kind::Pipe => self.file = None,
            Kind::Port(port) => {
                // Before it is opened again: a port has one user.
                self.file = None;
                if how == Shutdown::Write {
                    self.file = port.open().ok();
                }
            }
            Kind::Socket => {
                if let Some(file) = &self.file {
                    // The host may have closed it already.
                    let _ = shutdown(file, how);
                }
            }
        }
    }
}

/// What a pump did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Progress {
    /// Bytes moved, or an end was seen.
    Moved,
    /// Nothing happened.
    None,
}

/// Moves bytes one way, until either side ends. It reads only what it can write: a slow reader stops the writer.
#[derive(Debug)]
pub(crate) struct Pump {
    from: Side,
    to: Side,
    buffer: Vec<u8>,
    /// The first byte of `buffer` that is not written, and the one behind the last.
    start: usize,
    end: usize,
    over: bool,
    /// Why bytes may have been lost.
    lost: Option<Errno>,
}

impl Pump {
    pub(crate) fn new(from: Side, to: Side) -> Self {
        Self { from, to, buffer: vec![0; BUFFER_BYTES], start: 0, end: 0, over: false, lost: None }
    }

    /// Returns true if no more bytes will move.
    pub(crate) fn is_over(&self) -> bool {
        self.over
    }

    /// Returns true if bytes were read that are not written.
    pub(crate) fn holds_bytes(&self) -> bool {
        self.start < self.end
    }

    /// What has to be waited for. The side that is written to is watched for its end too.
    pub(crate) fn interests(&self) -> Vec<PollFd<'_>> {
        if self.over {
            return Vec::new();
        }
        let (input, output) =
            if self.holds_bytes() { (None, PollFlags::OUT) } else { (Some(PollFlags::IN), PollFlags::empty()) };
        let from = self.from.file.as_ref().zip(input).map(|(file, flags)| PollFd::new(file, flags));
        let to = self.to.file.as_ref().map(|file| PollFd::new(file, output));
        from.into_iter().chain(to).collect()
    }

    /// Moves what can be moved once. `closed` says that the side that is written to was hung up.
    pub(crate) fn run(&mut self, closed: bool) -> Progress {
        if self.over {
            return Progress::None;
        }
        if closed {
            return self.stop();
        }
        let mut progress = Progress::None;
        if !self.holds_bytes() {
            let Some(from) = &self.from.file else { return self.stop() };
            let mut got = read(from, &mut self.buffer);
            if got == Ok(0) && matches!(self.from.kind, Kind::Port(_)) {
                // Linux looks for data first and for the end then: data that came in between is there at the second look.
                got = read(from, &mut self.buffer);
            }
            match got {
                // EIO is the end of a terminal whose other end is closed.
                Ok(0) | Err(Errno::IO | Errno::CONNRESET) => return self.stop(),
                Ok(count) => {
                    (self.start, self.end) = (0, count);
                    progress = Progress::Moved;
                }
                Err(Errno::AGAIN | Errno::INTR) => return Progress::None,
                Err(_) => return self.stop(),
            }
        }
        let Some(to) = &self.to.file else { return self.stop() };
        match write(to, self.buffer.get(self.start..self.end).unwrap_or_default()) {
            Ok(count) if count > 0 => {
                self.start += count;
                Progress::Moved
            }
            Err(Errno::AGAIN | Errno::INTR) => progress,
            // The reader is gone, and wants no more.
            Err(Errno::PIPE | Errno::CONNRESET | Errno::NOTCONN) => self.stop(),
            failed => {
                self.lost = Some(failed.err().unwrap_or(Errno::IO));
                self.stop()
            }
        }
    }

    /// Why bytes may not have reached the side that is written to, though that has a reader.
    pub(crate) fn lost(&self) -> Option<Errno> {
        self.lost
    }

    /// Ends both sides.
    pub(crate) fn stop(&mut self) -> Progress {
        if !self.over {
            self.over = true;
            self.from.end(Shutdown::Read);
            self.to.end(Shutdown::Write);
        }
        Progress::Moved
    }

    /// Waits until the host has ended the socket that was written to, so that nothing is lost on its way.
    pub(crate) fn wait_for_answer(&self) -> Result<(), Errno> {
        let Some(socket) = &self.to.file else {
            // A port that could not be opened again.
            return if matches!(self.to.kind, Kind::Port(_)) { Err(Errno::NODEV) } else { Ok(()) };
        };
        loop {
            match read(socket, &mut [0; 64]) {
                Ok(0) => return Ok(()),
                // The host has nothing to say on this stream.
                Ok(_) | Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => match poll(&mut [PollFd::new(socket, PollFlags::IN)], None) {
                    Ok(_) | Err(Errno::INTR) => {}
                    Err(error) => return Err(error),
                },
                Err(_) => return Ok(()),
            }
        }
    }
}

/// A wait for poll(2).
pub(crate) fn timespec(wait: Duration) -> Timespec {
    Timespec { tv_sec: i64::try_from(wait.as_secs()).unwrap_or(i64::MAX), tv_nsec: wait.subsec_nanos().into() }
}

/// Waits until `file` is ready, or returns [`Errno::TIMEDOUT`] at `deadline`.
pub(crate) fn wait_for(file: impl AsFd, flags: PollFlags, deadline: Instant) -> Result<(), Errno> {
    let file: BorrowedFd<'_> = file.as_fd();
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(Errno::TIMEDOUT);
        }
        match poll(&mut [PollFd::from_borrowed_fd(file, flags)], Some(&timespec(left))) {
            Ok(0) | Err(Errno::INTR) => {}
            Ok(_) => return Ok(()),
            Err(error) => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    fn pump() -> (std::io::PipeWriter, Pump, UnixStream) {
        let (reader, writer) = std::io::pipe().expect("a pipe");
        let (near, far) = UnixStream::pair().expect("sockets");
        let from = Side::new(reader.into(), Kind::Pipe).expect("a side");
        let to = Side::new(near.into(), Kind::Socket).expect("a side");
        (writer, Pump::new(from, to), far)
    }

    #[test]
    fn bytes_and_the_end_arrive() {
        let (mut writer, mut pump, mut far) = pump();
        assert_eq!(pump.run(false), Progress::None);
        writer.write_all(b"abc").expect("written");
        assert_eq!(pump.run(false), Progress::Moved);
        drop(writer);
        assert_eq!(pump.run(false), Progress::Moved);
        assert!(pump.is_over() && pump.interests().is_empty());
        let mut all = Vec::new();
        far.read_to_end(&mut all).expect("read");
        assert_eq!(all, b"abc");
        // Longer than the agent waits for anything else: the host's reader may be a person with a pager.
        let slow = crate::report::PATIENCE + Duration::from_secs(1);
        let start = Instant::now();
        let host = std::thread::spawn(move || {
            std::thread::sleep(slow);
            drop(far);
        });
        assert_eq!(pump.wait_for_answer(), Ok(()));
        assert!(start.elapsed() >= slow, "the rest was not waited for");
        host.join().expect("no panic");
    }

    #[test]
    fn a_reader_that_is_gone_ends_the_writer() {
        let (mut writer, mut pump, far) = pump();
        drop(far);
        // Another test that starts a process has both reading ends in it, from fork to exec.
        let deadline = Instant::now() + Duration::from_secs(20);
        let error = loop {
            assert!(Instant::now() < deadline, "there is a reader still");
            pump.run(false);
            match writer.write_all(b"d") {
                Ok(()) => std::thread::sleep(Duration::from_millis(1)),
                Err(error) => break error,
            }
        };
        assert!(pump.is_over());
        assert_eq!(error.kind(), std::io::ErrorKind::BrokenPipe);
    }

    #[test]
    fn a_slow_reader_stops_the_writer() {
        let (writer, mut pump, mut far) = pump();
        let feeder = std::thread::spawn(move || {
            let mut writer = writer;
            writer.write_all(&[7; 4 << 20]).expect("written");
        });
        let deadline = Instant::now() + Duration::from_secs(20);
        while !pump.holds_bytes() || pump.run(false) == Progress::Moved {
            assert!(Instant::now() < deadline, "the socket never filled up");
            pump.run(false);
        }
        assert_eq!(pump.interests().len(), 1, "only the socket is waited for");
        let reader = std::thread::spawn(move || {
            let mut all = Vec::new();
            far.read_to_end(&mut all).expect("read");
            all.len()
        });
        while !pump.is_over() {
            assert!(Instant::now() < deadline, "the pump never ended");
            pump.run(false);
            std::thread::yield_now();
        }
        feeder.join().expect("fed");
        assert_eq!(reader.join().expect("read"), 4 << 20);
    }
}
