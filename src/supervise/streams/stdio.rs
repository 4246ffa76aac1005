//! hwvmm's own stdin, stdout and stderr, for a process that must not wait for them.

use rustix::fs::{FileType, Mode, OFlags, fstat, open};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

/// What is done with a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Direction {
    Read,
    Write,
}

/// Returns a copy of a stream. That of a pipe or a terminal is opened anew, where that is possible: it can be non-blocking without
/// the shell's, and that of other programs, being so too.
///
/// # Errors
/// Where the stream is not open.
pub(super) fn private_copy(stream: BorrowedFd<'_>, direction: Direction) -> io::Result<OwnedFd> {
    let kind = FileType::from_raw_mode(fstat(stream)?.st_mode);
    let access = match direction {
        Direction::Read => OFlags::RDONLY,
        Direction::Write => OFlags::WRONLY,
    };
    if matches!(kind, FileType::Fifo | FileType::CharacterDevice) {
        let flags = access | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        if let Ok(file) = open(format!("/proc/self/fd/{}", stream.as_raw_fd()), flags, Mode::empty()) {
            return Ok(file);
        }
    }
    stream.try_clone_to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::fcntl_getfl;
    use std::os::fd::AsFd;

    #[test]
    fn the_copy_of_a_pipe_has_flags_of_its_own() {
        let (reader, writer) = std::io::pipe().expect("a pipe");
        for (stream, direction) in [(reader.as_fd(), Direction::Read), (writer.as_fd(), Direction::Write)] {
            let copy = private_copy(stream, direction).expect("a copy");
            rustix::io::ioctl_fionbio(&copy, true).expect("set");
            assert!(fcntl_getfl(&copy).expect("flags").contains(OFlags::NONBLOCK));
            assert!(!fcntl_getfl(stream).expect("flags").contains(OFlags::NONBLOCK));
        }
        drop(reader);
        let copy = private_copy(writer.as_fd(), Direction::Write).expect("a copy of a pipe without readers");
        // Another test that starts a process has the reading end in it, from fork to exec.
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
        while rustix::io::write(&copy, b"x") != Err(rustix::io::Errno::PIPE) {
            assert!(std::time::Instant::now() < deadline, "there is a reader still");
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
    }
}
