//! `--sandbox=log`: system calls that would have been refused are told on stderr, and go on.
//!
//! The filters ask (SECCOMP_RET_USER_NOTIF), and a thread of the process answers. The kernel's own log (SECCOMP_RET_LOG) is
//! for root to read.

use super::sys::{self, Asked};
use super::trap::Refused;
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use std::collections::BTreeSet;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::mpsc::{Receiver, Sender, channel};

/// The most lines that are written; hostile code could otherwise fill the terminal.
const MAX_LINES: usize = 200;

struct Watched {
    thread: String,
    listener: OwnedFd,
}

/// Answers for threads with filters that ask.
pub(super) struct Watcher {
    new: Sender<Watched>,
    wake: OwnedFd,
}

impl Watcher {
    /// Starts the thread that answers. It ends with the process.
    ///
    /// # Errors
    /// Where the host is out of threads or file descriptors.
    pub(super) fn start() -> io::Result<Self> {
        let (new, receiver) = channel();
        let wake = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?;
        let woken = wake.try_clone()?;
        std::thread::Builder::new()
            .name("sandbox".into())
            .stack_size(128 << 10)
            .spawn(move || answer(&receiver, &woken))?;
        Ok(Self { new, wake })
    }

    /// Answers for `thread` from here on.
    ///
    /// # Errors
    /// Where the thread that answers has ended.
    pub(super) fn watch(&self, thread: String, listener: OwnedFd) -> io::Result<()> {
        self.new.send(Watched { thread, listener }).map_err(|_| io::ErrorKind::BrokenPipe)?;
        rustix::io::write(&self.wake, &1_u64.to_ne_bytes())?;
        Ok(())
    }
}

fn answer(receiver: &Receiver<Watched>, woken: &OwnedFd) {
    let mut watched: Vec<Watched> = Vec::new();
    let mut told = BTreeSet::new();
    loop {
        let mut fds: Vec<PollFd<'_>> = std::iter::once(woken.as_fd())
            .chain(watched.iter().map(|one| one.listener.as_fd()))
            .map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN))
            .collect();
        if let Err(error) = poll(&mut fds, None)
            && error != rustix::io::Errno::INTR
        {
            return;
        }
        let ready: Vec<PollFlags> = fds.iter().skip(1).map(PollFd::revents).collect();
        let mut ready = ready.into_iter();
        watched.retain(|one| {
            let flags = ready.next().unwrap_or(PollFlags::empty());
            if flags.contains(PollFlags::IN)
                && let Ok(asked) = sys::receive(one.listener.as_fd())
            {
                tell(&mut told, &one.thread, asked);
                let _ = sys::permit(one.listener.as_fd(), asked);
            }
            // The listener hangs up when its thread has ended.
            !flags.contains(PollFlags::HUP)
        });
        let _ = rustix::io::read(woken, &mut [0; 8]);
        watched.extend(receiver.try_iter());
    }
}

/// Says once what would have been refused. No lock may be taken: the thread that asks may hold that of stderr.
fn tell(told: &mut BTreeSet<(String, u32, u64)>, thread: &str, Asked { number, args, .. }: Asked) {
    let number = number.unsigned_abs();
    let by_request = [libc::SYS_ioctl, libc::SYS_fcntl].contains(&i64::from(number));
    let argument = if by_request { args[1] } else { 0 };
    if told.len() >= MAX_LINES || !told.insert((thread.to_owned(), number, argument)) {
        return;
    }
    let refused = Refused { thread: thread.to_owned(), number, argument };
    let line = format!("hwvmm: sandbox: thread {thread} called {}: --sandbox=on refuses that\n", refused.call());
    let _ = rustix::io::write(rustix::stdio::stderr(), line.as_bytes());
}
