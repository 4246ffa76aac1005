//! Writes to stderr without waiting for its reader: a pipe that is not read or a terminal that is stopped (Ctrl-S) blocks no thread.
//!
//! stderr itself stays blocking, since other processes have the same open file. A pipe or a terminal is opened once more, as a
//! non-blocking file of this process. No thread is needed: a process with threads could not fork.

use crate::console::fresh_line;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FileType, Mode, OFlags};
use rustix::io::Errno;
use rustix::net::SendFlags;
use std::collections::VecDeque;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::{Mutex, MutexGuard, TryLockError};
use std::time::{Duration, Instant};

/// Bytes that wait for the reader at most. Further lines are dropped and counted.
const MAX_WAITING_BYTES: usize = 64 << 10;
/// Bytes at once: a pipe takes so many in one piece (PIPE_BUF, pipe(7)).
const CHUNK_BYTES: usize = 4096;
/// How long to wait for a reader that takes nothing.
const PATIENCE: Duration = Duration::from_secs(1);
/// How long to wait for a reader that is slow.
const MAX_WAIT: Duration = Duration::from_secs(60);
/// How long a thread may wait for the lock. It is held for moments only.
const MAX_LOCK_WAIT: Duration = Duration::from_millis(5);

/// Locks, unless another thread holds the lock for [`MAX_LOCK_WAIT`].
pub(super) fn lock_in_time<T>(mutex: &Mutex<T>) -> Option<MutexGuard<'_, T>> {
    let mut give_up = None;
    loop {
        match mutex.try_lock() {
            Ok(guard) => return Some(guard),
            Err(TryLockError::Poisoned(poisoned)) => return Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => {}
        }
        let now = Instant::now();
        if *give_up.get_or_insert(now + MAX_LOCK_WAIT) <= now {
            return None;
        }
        std::hint::spin_loop();
    }
}

/// A file and how it is written to without waiting for a reader.
enum Target {
    /// A regular file has no reader.
    File(OwnedFd),
    /// A pipe or a terminal that this process has opened as non-blocking.
    NonBlocking(OwnedFd),
    /// A socket takes a flag.
    Socket(OwnedFd),
    /// A pipe or a terminal that may not be opened again, such as another user's. A write after poll(2) can still wait if another
    /// process has filled it in between.
    Blocking(OwnedFd),
}

impl Target {
    fn new(file: OwnedFd) -> Self {
        let kind = rustix::fs::fstat(&file).map(|stat| FileType::from_raw_mode(stat.st_mode));
        match kind {
            Ok(FileType::RegularFile) => Self::File(file),
            Ok(FileType::Socket) => Self::Socket(file),
            _ => {
                let path = format!("/proc/self/fd/{}", file.as_raw_fd());
                let flags = OFlags::WRONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
                rustix::fs::open(path, flags, Mode::empty()).map_or(Self::Blocking(file), Self::NonBlocking)
            }
        }
    }

    fn file(&self) -> &OwnedFd {
        let (Self::File(file) | Self::NonBlocking(file) | Self::Socket(file) | Self::Blocking(file)) = self;
        file
    }

    /// Waits until it takes bytes, or until `time` is over.
    fn wait(&self, time: Duration) {
        let time = Timespec::try_from(time).unwrap_or(Timespec { tv_sec: 1, tv_nsec: 0 });
        // An error shows in the next write.
        let _ = poll(&mut [PollFd::new(self.file(), PollFlags::OUT)], Some(&time));
    }

    /// Writes some bytes; `AGAIN` if it takes none now.
    fn write(&self, bytes: &[u8]) -> Result<usize, Errno> {
        match self {
            Self::File(file) | Self::NonBlocking(file) => rustix::io::write(file, bytes),
            Self::Socket(file) => rustix::net::send(file, bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL),
            Self::Blocking(file) => {
                let ready = poll(&mut [PollFd::new(file, PollFlags::OUT)], Some(&Timespec { tv_sec: 0, tv_nsec: 0 }))?;
                if ready == 0 { Err(Errno::AGAIN) } else { rustix::io::write(file, bytes) }
            }
        }
    }
}

struct Queue {
    /// Opened with the first text.
    file: Option<OwnedFd>,
    target: Option<Target>,
    texts: VecDeque<String>,
    /// What is left of the text that is being written.
    rest: Vec<u8>,
    /// The length of all `texts` together, in bytes.
    bytes: usize,
    /// Lines that were dropped and not counted on stderr yet.
    lost: u64,
    /// A thread has waited for [`PATIENCE`], and nothing was written since.
    stalled: bool,
}

/// What [`Queue::pump`] has come to.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Pumped {
    /// All texts are written, and the queue is empty.
    All,
    /// Some is written, and there is more.
    Some,
    /// Nothing could be written.
    Nothing,
}

impl Queue {
    fn put(&mut self, text: String) {
        self.bytes += text.len();
        self.texts.push_back(text);
    }

    fn has_room(&self, text: &str, limit: usize) -> bool {
        self.bytes + self.rest.len() + text.len() <= limit
    }

    /// Takes the next text. Returns false if there is none.
    fn next(&mut self) -> bool {
        let Some(text) = self.texts.pop_front() else { return false };
        self.bytes -= text.len();
        self.rest = fresh_line().as_bytes().to_vec();
        if self.lost > 0 {
            self.rest.extend(lost_line(std::mem::take(&mut self.lost)).into_bytes());
        }
        self.rest.extend(text.into_bytes());
        true
    }

    /// Writes what can be written without waiting.
    fn pump(&mut self) -> Pumped {
        let target = match (self.target.take(), self.file.take()) {
            (Some(target), _) => target,
            (None, Some(file)) => Target::new(file),
            (None, None) => {
                self.texts.clear();
                (self.bytes, self.lost) = (0, 0);
                return Pumped::All;
            }
        };
        let mut pumped = Pumped::Nothing;
        while !self.rest.is_empty() || self.next() {
            match target.write(&self.rest[..self.rest.len().min(CHUNK_BYTES)]) {
                Ok(count) => {
                    self.rest.drain(..count);
                    (pumped, self.stalled) = (Pumped::Some, false);
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    self.target = Some(target);
                    return pumped;
                }
                Err(_) => {
                    self.rest.clear();
                    self.lost += 1;
                }
            }
        }
        self.target = Some(target);
        Pumped::All
    }
}

/// The queue of texts for stderr.
pub(super) struct Writer(Mutex<Queue>);

impl Writer {
    /// Writes to `file`; to nothing where there is none.
    pub(super) fn new(file: Option<OwnedFd>) -> Self {
        Self(Mutex::new(Queue {
            file,
            target: None,
            texts: VecDeque::new(),
            rest: Vec::new(),
            bytes: 0,
            lost: 0,
            stalled: false,
        }))
    }

    /// Closes the file. All further texts go to nothing.
    pub(super) fn close(&self) {
        if let Some(mut queue) = lock_in_time(&self.0) {
            (queue.file, queue.target) = (None, None);
        }
    }

    /// Writes a line, or keeps it for later; it is dropped and counted where too much waits. Does not wait.
    pub(super) fn line(&self, text: String) {
        if let Some(mut queue) = lock_in_time(&self.0) {
            if queue.has_room(&text, MAX_WAITING_BYTES) {
                queue.put(text);
            } else {
                queue.lost += 1;
            }
            queue.pump();
        }
    }

    /// Counts lines that were dropped elsewhere.
    pub(super) fn lost(&self, count: u64) {
        if count > 0
            && let Some(mut queue) = lock_in_time(&self.0)
        {
            queue.lost = queue.lost.saturating_add(count);
        }
    }

    /// Writes text of any length, and waits until it is written or the reader has taken nothing for a second. Until it takes
    /// something again, only what fits into the queue is kept, and no thread waits.
    pub(super) fn print(&self, text: String) {
        if let Some(mut queue) = lock_in_time(&self.0) {
            if queue.stalled && !queue.has_room(&text, 2 * MAX_WAITING_BYTES) {
                queue.lost += 1;
            } else {
                queue.put(text);
            }
            drop(queue);
            self.flush();
        }
    }

    /// Writes what can be written without waiting. Returns true if all is written.
    pub(super) fn pump(&self) -> bool {
        lock_in_time(&self.0).is_some_and(|mut queue| queue.pump() == Pumped::All)
    }

    /// Waits until all is written, or the reader has taken nothing for a second.
    pub(super) fn flush(&self) {
        let start = Instant::now();
        let mut progress = start;
        while let Some(mut queue) = lock_in_time(&self.0) {
            let pumped = queue.pump();
            let now = Instant::now();
            match pumped {
                Pumped::All => return,
                Pumped::Some => progress = now,
                Pumped::Nothing => {}
            }
            let left = PATIENCE.saturating_sub(now.duration_since(progress));
            if queue.stalled || now.duration_since(start) > MAX_WAIT {
                return;
            }
            if left.is_zero() {
                queue.stalled = true;
                return;
            }
            let target = queue.target.as_ref().and_then(|target| target.file().as_fd().try_clone_to_owned().ok());
            drop(queue);
            if let Some(target) = target {
                Target::Blocking(target).wait(left);
            }
            if pumped == Pumped::Nothing {
                // poll(2) may say that there is room where write(2) finds none.
                std::thread::sleep(Duration::from_millis(1));
            }
        }
    }
}

fn lost_line(count: u64) -> String {
    let lines = if count == 1 { "line was" } else { "lines were" };
    format!("hwvmm: warning: {count} {lines} not printed: stderr took no more\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
    use std::fs::File;
    use std::io::Read;

    fn pipe() -> (File, Writer) {
        let (reader, writer) = std::io::pipe().expect("a pipe");
        (File::from(OwnedFd::from(reader)), Writer::new(Some(writer.into())))
    }

    fn read(reader: &mut File, until: &str) -> String {
        let mut text = String::new();
        let mut buffer = [0; 4096];
        while !text.contains(until) {
            let count = reader.read(&mut buffer).expect("read");
            text += std::str::from_utf8(&buffer[..count]).expect("UTF-8");
        }
        text
    }

    #[test]
    fn texts_are_written_in_order_and_whole() {
        let sockets = socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None).expect("sockets");
        let socket = (File::from(sockets.0), Writer::new(Some(sockets.1)));
        for (mut reader, writer) in [pipe(), socket] {
            let long = "x".repeat(500_000);
            let thread = std::thread::spawn(move || read(&mut reader, "end"));
            writer.line("a\n".into());
            writer.print(format!("{long}\n"));
            writer.line("end".into());
            writer.flush();
            assert_eq!(thread.join().expect("no panic"), format!("a\n{long}\nend"));
        }
    }

    #[test]
    fn a_file_is_appended_to() {
        let mut file = tempfile::tempfile().expect("a file");
        std::io::Write::write_all(&mut file, b"before\n").expect("written");
        let writer = Writer::new(Some(file.try_clone().expect("a copy").into()));
        writer.line("a\n".into());
        writer.print("b\n".into());
        std::io::Seek::rewind(&mut file).expect("rewound");
        assert_eq!(read(&mut file, "b\n"), "before\na\nb\n");
    }

    #[test]
    fn nobody_waits_for_long_where_nothing_is_read() {
        let (mut reader, writer) = pipe();
        let start = Instant::now();
        // Lines wait for nothing: more of them than a pipe and the queue take.
        (0..20_000).for_each(|_| writer.line("0123456789\n".into()));
        assert!(start.elapsed() < PATIENCE, "{:?}", start.elapsed());
        let waiting = || lock_in_time(&writer.0).map(|queue| queue.bytes).expect("not locked");
        assert!(waiting() <= MAX_WAITING_BYTES);
        writer.print("x".repeat(1 << 20));
        (0..1000).for_each(|_| writer.print("y".repeat(1000)));
        writer.flush();
        let took = start.elapsed();
        assert!(took >= PATIENCE && took < PATIENCE * 3, "{took:?}");
        assert!(waiting() <= (1 << 20) + 2 * MAX_WAITING_BYTES);
        // Once it is read, it goes on, and says what it has dropped.
        let thread = std::thread::spawn(move || read(&mut reader, "the end"));
        while !writer.pump() {
            assert!(start.elapsed() < PATIENCE * 10, "it does not go on");
            std::thread::yield_now();
        }
        writer.print("the end".into());
        let said = thread.join().expect("no panic");
        assert!(said.contains("lines were not printed: stderr took no more\n"), "{}", &said[said.len() - 200..]);
    }

    /// Another process fills the pipe all the time: a write right after poll(2) has found room must not wait either.
    #[test]
    fn a_pipe_that_others_fill_blocks_no_thread() {
        let (reader, writer) = std::io::pipe().expect("a pipe");
        let other = Target::new(writer.try_clone().expect("a copy").into());
        let writer = Writer::new(Some(writer.into()));
        let start = Instant::now();
        for _ in 0..2000 {
            while other.write(&[b'x'; 4096]).is_ok() {}
            writer.line("0123456789\n".into());
            rustix::io::read(&reader, &mut [0; 4096]).expect("read");
        }
        assert!(start.elapsed() < PATIENCE);
    }

    /// Where the pipe cannot be opened once more, such as one of another user's.
    #[test]
    fn a_pipe_that_stays_blocking_is_written_to_where_it_has_room() {
        let (reader, pipe) = std::io::pipe().expect("a pipe");
        let target = Target::Blocking(pipe.try_clone().expect("a copy").into());
        let mut written = 0;
        while let Ok(count) = target.write(&[b'x'; CHUNK_BYTES]) {
            written += count;
        }
        assert_eq!(written, rustix::pipe::fcntl_getpipe_size(&pipe).expect("a size"));
        assert_eq!(target.write(b"x"), Err(Errno::AGAIN));
        rustix::io::read(&reader, &mut [0; CHUNK_BYTES]).expect("read");
        assert_eq!(target.write(&[b'x'; CHUNK_BYTES]), Ok(CHUNK_BYTES));
    }

    #[test]
    fn a_writer_that_is_closed_writes_nothing() {
        let (mut reader, writer) = pipe();
        writer.line("a".into());
        writer.close();
        writer.print("b".into());
        let mut said = String::new();
        reader.read_to_string(&mut said).expect("read to its end");
        assert_eq!(said, "a");
        assert!(lock_in_time(&writer.0).expect("not locked").texts.is_empty());
    }

    #[test]
    fn a_reader_that_is_gone_is_no_reason_to_wait() {
        let (reader, writer) = pipe();
        drop(reader);
        let start = Instant::now();
        writer.line("a".into());
        (0..100).for_each(|_| writer.print("b".repeat(100_000)));
        writer.flush();
        assert!(start.elapsed() < PATIENCE);
        Writer::new(None).print("nothing".into());
    }

    #[test]
    fn a_lock_that_is_not_given_back_is_given_up() {
        let lock = Mutex::new(0);
        let held = lock.lock().expect("not poisoned");
        let start = Instant::now();
        assert!(lock_in_time(&lock).is_none());
        assert!(start.elapsed() < Duration::from_secs(1));
        drop(held);
        let dies = || {
            let _held = lock.lock().expect("not poisoned");
            panic!("as it should");
        };
        assert!(std::thread::scope(|scope| scope.spawn(dies).join()).is_err());
        assert!(lock_in_time(&lock).is_some(), "of a thread that panicked");
    }
}
