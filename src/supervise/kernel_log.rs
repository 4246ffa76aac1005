//! The log of the guest's kernel, where stdin and stdout are a command's: the last of it is kept for failures.

use crate::escape::{GUEST_BYTES, escape};
use crate::exit::EndReason;
use crate::logging;
use rustix::io::{Errno, read};
use rustix::pipe::{PipeFlags, pipe_with};
use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// Bytes that are kept.
const KEPT_BYTES: usize = 16 << 10;
/// Bytes of one read, and reads before other things are looked at again.
const READ_BYTES: usize = 4096;
const READS: usize = 16;

/// Whether lines are printed on stderr as they come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Echo {
    /// Each line is printed when it ends (`-v`).
    On,
    /// Lines are printed after a failure only.
    Off,
}

/// Where the log goes, beside the lines that are kept.
#[derive(Clone, Copy, Debug)]
pub struct KernelLogTarget<'a> {
    /// A file that gets all of it as it is.
    pub file: Option<&'a File>,
    /// Whether its lines are printed.
    pub echo: Echo,
}

/// The log as it comes.
pub(super) struct KernelLog<'a> {
    /// `None` once its writing end is closed.
    pipe: Option<OwnedFd>,
    file: Option<&'a File>,
    echo: Echo,
    last: VecDeque<u8>,
    /// The line that has no end yet, where lines are printed.
    line: Vec<u8>,
    /// Why the file does not have all of it.
    lost: Option<String>,
}

impl<'a> KernelLog<'a> {
    /// Makes the log, and the end at which the machine's process writes.
    ///
    /// # Errors
    /// Returns the error of pipe2(2).
    pub(super) fn new(target: KernelLogTarget<'a>) -> io::Result<(Self, OwnedFd)> {
        let (reader, writer) = pipe_with(PipeFlags::CLOEXEC)?;
        rustix::io::ioctl_fionbio(&reader, true)?;
        let KernelLogTarget { file, echo } = target;
        let log = Self { pipe: Some(reader), file, echo, last: VecDeque::new(), line: Vec::new(), lost: None };
        Ok((log, writer))
    }

    /// What is readable when there is more.
    pub(super) fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.pipe.as_ref().map(AsFd::as_fd)
    }

    /// Takes what is there, a bounded amount.
    pub(super) fn serve(&mut self) {
        for _ in 0..READS {
            let Some(pipe) = &self.pipe else { return };
            let mut bytes = [0; READ_BYTES];
            match read(pipe, &mut bytes) {
                Ok(count) if count > 0 => self.take(bytes.get(..count).unwrap_or_default()),
                Err(Errno::AGAIN | Errno::INTR) => return,
                Ok(_) | Err(_) => self.pipe = None,
            }
        }
    }

    fn take(&mut self, bytes: &[u8]) {
        if let Some(mut file) = self.file
            && let Err(error) = file.write_all(bytes)
        {
            log::warn!("--kernel-log: the rest of the kernel's log is not written: {error}");
            self.file = None;
            // A terminal that is full for a moment is no place that has to have all of it.
            self.lost = (error.kind() != io::ErrorKind::WouldBlock).then(|| error.to_string());
        }
        self.last.extend(bytes);
        let too_many = self.last.len().saturating_sub(KEPT_BYTES);
        self.last.drain(..too_many);
        if self.echo == Echo::On {
            self.print(bytes);
        }
    }

    /// Prints whole lines, without control characters.
    fn print(&mut self, bytes: &[u8]) {
        for part in bytes.split_inclusive(|byte| *byte == b'\n') {
            let room = GUEST_BYTES.saturating_sub(self.line.len());
            self.line.extend_from_slice(part.get(..room).unwrap_or(part));
            if part.ends_with(b"\n") {
                let line = std::mem::take(&mut self.line);
                logging::print(&format!("{}\n", shown(&line)));
            }
        }
    }

    /// The end of a run with the fate of its log: who reads the file for what the kernel complained of must not take a part for all.
    pub(super) fn explain(&self, end: EndReason) -> EndReason {
        match (end, &self.lost) {
            (EndReason::Command(command), Some(why)) => {
                EndReason::Failed(format!("the command {command}, but --kernel-log was cut off: {why}"))
            }
            (end, _) => end,
        }
    }

    /// The lines that are kept, without control characters, at most `lines` of them.
    pub(super) fn last_lines(&mut self, lines: usize) -> Vec<String> {
        let bytes = self.last.make_contiguous();
        let mut found: Vec<String> =
            bytes.rsplit(|byte| *byte == b'\n').map(shown).filter(|line| !line.is_empty()).take(lines).collect();
        found.reverse();
        found
    }
}

fn shown(line: &[u8]) -> String {
    escape(String::from_utf8_lossy(line).trim_end(), GUEST_BYTES)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Seek};

    #[test]
    fn the_last_lines_are_kept_and_the_file_has_all() {
        let mut file = tempfile::tempfile().expect("a file");
        let target = KernelLogTarget { file: Some(&file), echo: Echo::Off };
        let (mut log, writer) = KernelLog::new(target).expect("a pipe");
        for number in 0..5000 {
            rustix::io::write(&writer, format!("line {number}\r\n").as_bytes()).expect("room");
            log.serve();
        }
        rustix::io::write(&writer, b"\x1b[2J no end").expect("room");
        drop(writer);
        log.serve();
        assert!(log.fd().is_none() && log.last.len() <= KEPT_BYTES);
        assert_eq!(log.last_lines(2), ["line 4999", "\\x1b[2J no end"]);
        file.rewind().expect("rewound");
        let mut text = String::new();
        file.read_to_string(&mut text).expect("read");
        assert!(text.starts_with("line 0\r\n") && text.contains("line 2500\r\n"));
    }

    #[test]
    fn a_file_that_lacks_a_part_is_a_failure() {
        use crate::exit::CommandEnd;
        let ended = EndReason::Command(CommandEnd::Exited(0));
        let full = File::options().write(true).open("/dev/full").expect("/dev/full");
        let (mut log, writer) = KernelLog::new(KernelLogTarget { file: Some(&full), echo: Echo::Off }).expect("a pipe");
        assert_eq!(log.explain(ended.clone()), ended);
        rustix::io::write(&writer, b"BUG: x\n").expect("room");
        log.serve();
        assert!(matches!(log.explain(ended), EndReason::Failed(why) if why.contains("--kernel-log was cut off")));
        assert_eq!(log.explain(EndReason::Reset), EndReason::Reset);
    }

    #[test]
    fn a_writer_that_never_stops_is_not_all_that_is_served() {
        let target = KernelLogTarget { file: None, echo: Echo::Off };
        let (mut log, writer) = KernelLog::new(target).expect("a pipe");
        rustix::pipe::fcntl_setpipe_size(&writer, 1 << 20).expect("a large pipe");
        rustix::io::write(&writer, &[b'a'; 1 << 20]).expect("room");
        log.serve();
        assert_eq!(log.last.len(), KEPT_BYTES);
        let left = rustix::io::ioctl_fionread(log.pipe.as_ref().expect("open")).expect("a number");
        assert_eq!(left, (1 << 20) - (READS * READ_BYTES) as u64);
    }
}
