//! A thread with an event loop (event-manager) for a device's worker.

use super::Worker;
use event_manager::{EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberOps};
use std::io;
use std::num::NonZeroU64;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Ends the loop.
struct Stop {
    event: EventFd,
}

impl MutEventSubscriber for Stop {
    fn process(&mut self, _events: Events, _ops: &mut EventOps<'_>) {
        // So that the loop's last round is for the others.
        let _ = self.event.read();
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        watch(ops, Events::new(&self.event, EventSet::IN));
    }
}

/// Waits for `events`; a failure is logged.
pub(crate) fn watch(ops: &mut EventOps<'_>, events: Events) {
    if let Err(error) = ops.add(events) {
        log::error!("a device cannot wait for a file descriptor: {error:?}");
    }
}

/// A worker at work. It ends, and the thread with it, when this is dropped.
pub struct WorkerThread {
    thread: Option<JoinHandle<()>>,
    stop: EventFd,
    stopping: Arc<AtomicBool>,
}

impl WorkerThread {
    /// Starts `worker` on a thread called `name`.
    ///
    /// # Errors
    /// Where thread, epoll or eventfd are not to be had.
    pub fn start(name: &str, worker: Worker) -> io::Result<Self> {
        let stop = EventFd::new(EFD_NONBLOCK)?;
        let stopping = Arc::new(AtomicBool::new(false));
        let mut manager: EventManager<Worker> =
            EventManager::new().map_err(|error| io::Error::other(format!("epoll: {error:?}")))?;
        manager.add_subscriber(Box::new(Stop { event: stop.try_clone()? }));
        let told = Arc::clone(&stopping);
        let called = name.to_owned();
        let thread = std::thread::Builder::new().name(name.chars().take(15).collect()).spawn(move || {
            // Short waits are to be short (see NotifyCoalescer).
            if let Err(error) = rustix::thread::set_current_timer_slack(NonZeroU64::new(1)) {
                log::debug!("{called}: timer slack: {error}");
            }
            manager.add_subscriber(worker);
            loop {
                // What was asked for before the end is still done: the guest's last words, say.
                let last = told.load(Ordering::Acquire);
                match manager.run_with_timeout(if last { 0 } else { -1 }) {
                    Ok(_) => {}
                    Err(event_manager::Error::Epoll(error)) if error.errno() == libc::EINTR => {}
                    Err(error) => {
                        log::error!("{called}: its event loop ended: {error:?}");
                        return;
                    }
                }
                if last {
                    return;
                }
            }
        })?;
        Ok(Self { thread: Some(thread), stop, stopping })
    }
}

impl Drop for WorkerThread {
    fn drop(&mut self) {
        self.stopping.store(true, Ordering::Release);
        if let Err(error) = self.stop.write(1) {
            log::error!("cannot stop a device's thread: {error}");
        }
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            log::error!("a device's thread panicked");
            // A test must not pass over it.
            debug_assert!(std::thread::panicking(), "a device's thread panicked");
        }
    }
}
