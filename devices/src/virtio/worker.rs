//! The thread of a device's worker, with an event loop (event-manager).

use event_manager::{EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberOps};
use std::io;
use std::num::NonZeroU64;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use thiserror::Error;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// The longest thread name that Linux keeps, in bytes without the terminating zero (`TASK_COMM_LEN`).
const MAX_THREAD_NAME: usize = 15;

/// What a device runs while its driver is ready. Each worker has a thread with an event loop of its own, so that a worker
/// that blocks does not delay the others.
pub type Worker = Box<dyn MutEventSubscriber + Send>;

/// A worker's thread cannot be started.
#[derive(Debug, Error)]
pub enum WorkerError {
    /// The eventfd that stops the thread could not be created.
    #[error("cannot create an eventfd for the device thread {name}")]
    EventFd {
        /// Name of the thread.
        name: String,
        /// The host's error.
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
        /// The host's error.
        source: io::Error,
    },
}

/// Wakes the event loop when the thread is to end.
struct StopEvent {
    event: EventFd,
}

impl MutEventSubscriber for StopEvent {
    fn process(&mut self, _events: Events, _ops: &mut EventOps<'_>) {
        // Otherwise the last round of the event loop would report this event again instead of the worker's.
        let _ = self.event.read();
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        watch(ops, Events::new(&self.event, EventSet::IN));
    }
}

/// Adds `events` to the event loop. A failure is logged; the device then does not see those events.
pub(crate) fn watch(ops: &mut EventOps<'_>, events: Events) {
    if let Err(error) = ops.add(events) {
        log::error!("a device's event loop cannot wait for a file descriptor: {error}");
    }
}

/// A running worker. Dropping it lets the worker handle all pending events and joins the thread.
pub struct WorkerThread {
    thread: Option<JoinHandle<()>>,
    stop: EventFd,
    stopping: Arc<AtomicBool>,
}

impl WorkerThread {
    /// Starts `worker` on a thread called `name`, of which Linux keeps the first 15 bytes.
    ///
    /// # Errors
    /// Returns an error where the host is out of threads or file descriptors.
    pub fn start(name: &str, worker: Worker) -> Result<Self, WorkerError> {
        let eventfd_error = |source| WorkerError::EventFd { name: name.to_owned(), source };
        let stop = EventFd::new(EFD_NONBLOCK).map_err(eventfd_error)?;
        let mut manager: EventManager<Worker> =
            EventManager::new().map_err(|source| WorkerError::EventLoop { name: name.to_owned(), source })?;
        manager.add_subscriber(Box::new(StopEvent { event: stop.try_clone().map_err(eventfd_error)? }));
        let stopping = Arc::new(AtomicBool::new(false));
        let (thread_name, thread_stopping) = (name.to_owned(), Arc::clone(&stopping));
        let thread = std::thread::Builder::new()
            .name(name.chars().take(MAX_THREAD_NAME).collect())
            .spawn(move || run(&thread_name, manager, worker, &thread_stopping))
            .map_err(|source| WorkerError::Thread { name: name.to_owned(), source })?;
        Ok(Self { thread: Some(thread), stop, stopping })
    }
}

/// The thread's body: runs the event loop until `stopping` is set, then once more without waiting.
fn run(name: &str, mut manager: EventManager<Worker>, worker: Worker, stopping: &AtomicBool) {
    // The default timer slack of 50 us is longer than the waits of the notify coalescer.
    if let Err(error) = rustix::thread::set_current_timer_slack(NonZeroU64::new(1)) {
        log::debug!("{name}: cannot set the timer slack to 1 ns: {error}");
    }
    manager.add_subscriber(worker);
    loop {
        // The last round handles requests that were available before the stop, such as the guest's final output.
        let last = stopping.load(Ordering::Acquire);
        match manager.run_with_timeout(if last { 0 } else { -1 }) {
            Ok(_) => {}
            Err(event_manager::Error::Epoll(error)) if error.errno() == libc::EINTR => {}
            Err(error) => {
                log::error!("{name}: the event loop failed, the device stops: {error}");
                return;
            }
        }
        if last {
            return;
        }
    }
}

impl Drop for WorkerThread {
    fn drop(&mut self) {
        self.stopping.store(true, Ordering::Release);
        if let Err(error) = self.stop.write(1) {
            log::error!("cannot stop a device thread: {error}");
        }
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            log::error!("a device thread panicked");
            // Lets a test fail.
            debug_assert!(std::thread::panicking(), "a device thread panicked");
        }
    }
}
