//! The event loop of the main thread (epoll, by event-manager): signals, console input, the control socket.

use event_manager::{EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberOps};
use std::os::fd::AsRawFd;
use std::time::Duration;
use thiserror::Error;

/// Why the event loop cannot go on.
#[derive(Debug, Error)]
pub enum EventLoopError {
    /// The epoll file descriptor cannot be made.
    #[error("cannot start the event loop")]
    Start(#[source] event_manager::Error),
    /// The call of epoll_wait(2) that waits for events failed.
    #[error("cannot wait for events")]
    Wait(#[source] event_manager::Error),
}

/// A subscriber that calls a function whenever a file descriptor is readable. The function must read what is there, or it is
/// called again at once.
pub struct OnReadable<T, F> {
    source: T,
    call: F,
}

impl<T: AsRawFd, F: FnMut(&T)> OnReadable<T, F> {
    /// A subscriber that calls `call` when `source` is readable.
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

/// An epoll loop that calls its subscribers when their file descriptors are ready. It runs in the thread that calls
/// [`EventLoop::wait`].
pub struct EventLoop {
    manager: EventManager<Box<dyn MutEventSubscriber>>,
}

impl EventLoop {
    /// An event loop without subscribers.
    ///
    /// # Errors
    /// [`EventLoopError::Start`].
    pub fn new() -> Result<Self, EventLoopError> {
        EventManager::new().map(|manager| Self { manager }).map_err(EventLoopError::Start)
    }

    /// Registers `subscriber`, whose `init` adds the file descriptors that it waits for.
    pub fn add(&mut self, subscriber: Box<dyn MutEventSubscriber>) {
        self.manager.add_subscriber(subscriber);
    }

    /// Waits for events, at most for `timeout`, and handles them.
    ///
    /// # Errors
    /// [`EventLoopError::Wait`].
    pub fn wait(&mut self, timeout: Duration) -> Result<(), EventLoopError> {
        // Rounded up to milliseconds: a wait of 0 would spin until the timeout.
        let ms = i32::try_from(timeout.as_micros().div_ceil(1000)).unwrap_or(i32::MAX);
        match self.manager.run_with_timeout(ms) {
            Ok(_) => Ok(()),
            Err(event_manager::Error::Epoll(error)) if error.errno() == libc::EINTR => Ok(()),
            Err(error) => Err(EventLoopError::Wait(error)),
        }
    }
}
