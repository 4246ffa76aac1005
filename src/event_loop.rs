//! The event loop (event-manager): what happens outside of the guest, on the main thread.

use event_manager::{EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberOps};
use std::io;
use std::os::fd::AsRawFd;
use std::time::Duration;

/// Calls a function whenever a file descriptor is readable. The function must take what there is to read.
pub struct OnReadable<T, F> {
    source: T,
    call: F,
}

impl<T: AsRawFd, F: FnMut(&T)> OnReadable<T, F> {
    /// Calls `call` when `source` is readable.
    pub fn new(source: T, call: F) -> Self {
        Self { source, call }
    }
}

impl<T: AsRawFd, F: FnMut(&T)> MutEventSubscriber for OnReadable<T, F> {
    fn process(&mut self, _events: Events, _ops: &mut EventOps<'_>) {
        (self.call)(&self.source);
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        if let Err(error) = ops.add(Events::new(&self.source, EventSet::IN)) {
            log::error!("cannot wait for a file descriptor: {error:?}");
        }
    }
}

/// The loop.
pub struct EventLoop {
    manager: EventManager<Box<dyn MutEventSubscriber>>,
}

impl EventLoop {
    /// An empty loop.
    ///
    /// # Errors
    /// Where epoll is not to be had.
    pub fn new() -> io::Result<Self> {
        EventManager::new().map(|manager| Self { manager }).map_err(|error| io::Error::other(format!("{error:?}")))
    }

    /// Adds somebody who waits for events.
    pub fn add(&mut self, subscriber: Box<dyn MutEventSubscriber>) {
        self.manager.add_subscriber(subscriber);
    }

    /// Waits for events, at most for `timeout`, and handles them.
    ///
    /// # Errors
    /// Where epoll fails.
    pub fn wait(&mut self, timeout: Duration) -> io::Result<()> {
        // Rounded up: a wait of 0 would spin until the time has come.
        let ms = i32::try_from(timeout.as_micros().div_ceil(1000)).unwrap_or(i32::MAX);
        match self.manager.run_with_timeout(ms) {
            Ok(_) => Ok(()),
            Err(event_manager::Error::Epoll(error)) if error.errno() == libc::EINTR => Ok(()),
            Err(error) => Err(io::Error::other(format!("{error:?}"))),
        }
    }
}
