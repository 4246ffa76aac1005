//! What a device runs while its driver is ready.

use super::device_thread::DeviceThread;
use event_manager::{EventOps, Events, MutEventSubscriber};
use std::error::Error;
use std::io;
use std::time::Duration;
use thiserror::Error;

/// What a device runs while its driver is ready. Each worker runs on a thread of its own, so that a worker that blocks does not
/// delay the others. `init` is called on that thread; the worker is dropped on it when the driver resets the device.
pub type Worker = Box<dyn MutEventSubscriber + Send>;

/// Adds `events` to the event loop. A failure is logged; the device then does not see those events.
pub(crate) fn watch(ops: &mut EventOps<'_>, events: Events) {
    if let Err(error) = ops.add(events) {
        log::error!("a device's event loop cannot wait for a file descriptor: {error}");
    }
}

/// A worker's thread cannot be started, or cannot be used.
#[derive(Debug, Error)]
pub enum WorkerError {
    /// The eventfd that wakes the thread could not be created.
    #[error("cannot create an eventfd for the device thread {name}")]
    EventFd {
        /// Name of the thread.
        name: String,
        /// The error of eventfd(2).
        source: io::Error,
    },
    /// The epoll instance of the event loop could not be created.
    #[error("cannot create the event loop of the device thread {name}")]
    EventLoop {
        /// Name of the thread.
        name: String,
        /// The event manager's error.
        source: event_manager::Error,
    },
    /// The thread itself could not be created.
    #[error("cannot create the device thread {name}")]
    Thread {
        /// Name of the thread.
        name: String,
        /// The error of creating the thread.
        source: io::Error,
    },
    /// The thread could not be prepared for its work.
    #[error("cannot prepare the {role} thread {name}")]
    Prepare {
        /// Name of the thread.
        name: String,
        /// What the thread is for.
        role: DeviceThread,
        /// The error of the system call or of the hook.
        source: Box<dyn Error + Send + Sync>,
    },
    /// The thread did not start in time.
    #[error("the device thread {name} did not start within {limit:?}")]
    NotInTime {
        /// Name of the thread.
        name: String,
        /// How long was waited.
        limit: Duration,
    },
    /// The thread has ended, as its event loop failed or as it panicked.
    #[error("the device thread {name} has ended")]
    Ended {
        /// Name of the thread.
        name: String,
    },
    /// The device has more workers than threads.
    #[error("the device has no thread for worker {0}")]
    NoThread(usize),
}
