//! The threads of devices. A thread is made with its event loop before the guest runs, and waits for workers: it runs one from
//! DRIVER_OK to the reset of the device. So no vCPU makes threads or event loops, and what a thread may do can be fixed when
//! it starts (see [`ThreadStart`]).

use super::device_thread::{DeviceThread, ThreadPreparation, ThreadStart};
use super::interrupt::DeviceInterrupt;
use super::worker::{Worker, WorkerError};
use event_manager::{EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberId, SubscriberOps};
use std::collections::VecDeque;
use std::error::Error;
use std::num::NonZeroU64;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// The longest thread name that Linux keeps, in bytes without the terminating zero (`TASK_COMM_LEN`).
const MAX_THREAD_NAME: usize = 15;
/// The stack of a thread. Less than a huge page: where the host has transparent huge pages, one in the middle of each stack would be memory
/// that no thread uses.
pub(super) const STACK_BYTES: usize = 1 << 20;
/// The longest time that a thread may take to start.
const START: Duration = Duration::from_secs(10);
/// The longest time that a thread may take to end once its worker was told to do nothing more.
const GRACE: Duration = Duration::from_millis(200);
/// The most rounds of the event loop after the order to stop, so that what is available then is handled.
const LAST_ROUNDS: usize = 4;

/// What starts a device thread.
#[derive(Clone)]
pub(super) struct StartPlan {
    pub(super) role: DeviceThread,
    pub(super) preparation: ThreadPreparation,
    pub(super) start: ThreadStart,
    /// Told when a reset ends late.
    pub(super) interrupt: Arc<DeviceInterrupt>,
}

/// Work of a device on a thread of its own, while it has no workers.
pub(super) type Job = Box<dyn FnOnce() + Send>;

/// An order to a thread.
enum Command {
    /// Run this worker: the driver has set `DRIVER_OK`.
    Activate(Worker),
    /// Drop the worker: the driver has reset the device, or it is paused.
    Reset,
    /// Do this, with no worker.
    Run(Job),
    /// Handle what is available, drop the worker, and end.
    Stop,
}

/// What a thread is doing.
enum Stage {
    Starting,
    /// It has no worker and no orders.
    Idle,
    /// It has a worker, or orders.
    Busy,
    /// It could not be prepared.
    Failed(Box<dyn Error + Send + Sync>),
    Ended,
}

struct State {
    commands: VecDeque<Command>,
    stage: Stage,
    /// A reset has not ended within the time that the driver's write waits for it.
    late: bool,
}

/// What a thread and its device share.
struct Shared {
    state: Mutex<State>,
    /// Signalled when the stage changes.
    changed: Condvar,
    /// True if commands may wait in `state`; read without its lock.
    has_commands: AtomicBool,
    /// Wakes the event loop.
    wake: EventFd,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set_stage(&self, stage: Stage) {
        self.state().stage = stage;
        self.changed.notify_all();
    }

    /// Returns the thread to [`Stage::Idle`] unless there are more orders, and true if a reset has ended late.
    fn end_order(&self) -> bool {
        let mut state = self.state();
        if !state.commands.is_empty() {
            // An order that follows an idle stage must not find an older one behind it.
            return false;
        }
        state.stage = Stage::Idle;
        let late = std::mem::take(&mut state.late);
        drop(state);
        self.changed.notify_all();
        late
    }

    /// Adds a command and wakes the thread.
    fn send(&self, mut state: MutexGuard<'_, State>, command: Command) {
        state.commands.push_back(command);
        drop(state);
        self.has_commands.store(true, Ordering::Release);
        if let Err(error) = self.wake.write(1) {
            log::error!("cannot wake a device thread: {error}");
        }
    }

    fn next_command(&self) -> Option<Command> {
        self.state().commands.pop_front()
    }

    /// Waits until `is_reached` returns true for the stage, or until `deadline`. Returns what it returned last.
    fn wait(&self, deadline: Instant, is_reached: impl Fn(&Stage) -> bool) -> bool {
        let mut state = self.state();
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if is_reached(&state.stage) || left.is_zero() {
                return is_reached(&state.stage);
            }
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

/// Wakes the event loop when there are commands.
struct WakeEvent(Arc<Shared>);

impl MutEventSubscriber for WakeEvent {
    fn process(&mut self, _events: Events, _ops: &mut EventOps<'_>) {
        let _ = self.0.wake.read();
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        super::worker::watch(ops, Events::new(&self.0.wake, EventSet::IN));
    }
}

/// A thread that runs one worker of a device at a time.
pub(super) struct WorkerThread {
    name: String,
    shared: Arc<Shared>,
    /// The event loop of a thread that was not started.
    event_loop: Option<EventManager<Worker>>,
    handle: Option<JoinHandle<()>>,
}

impl WorkerThread {
    /// Makes the event loop of a thread called `name`, of which Linux keeps the first 15 bytes.
    ///
    /// # Errors
    /// Returns an error where the host is out of file descriptors.
    pub(super) fn new(name: String) -> Result<Self, WorkerError> {
        let wake = EventFd::new(EFD_NONBLOCK).map_err(|source| WorkerError::EventFd { name: name.clone(), source })?;
        let mut event_loop: EventManager<Worker> =
            EventManager::new().map_err(|source| WorkerError::EventLoop { name: name.clone(), source })?;
        let state = Mutex::new(State { commands: VecDeque::new(), stage: Stage::Starting, late: false });
        let shared = Arc::new(Shared { state, changed: Condvar::new(), has_commands: AtomicBool::new(false), wake });
        event_loop.add_subscriber(Box::new(WakeEvent(Arc::clone(&shared))));
        Ok(Self { name, shared, event_loop: Some(event_loop), handle: None })
    }

    /// Starts the thread, where it was not started.
    ///
    /// # Errors
    /// Returns an error where the host is out of threads.
    pub(super) fn start(&mut self, plan: StartPlan) -> Result<(), WorkerError> {
        let Some(event_loop) = self.event_loop.take() else { return Ok(()) };
        let (name, shared) = (self.name.clone(), Arc::clone(&self.shared));
        let handle = std::thread::Builder::new()
            // The standard library panics at a zero.
            .name(name.chars().filter(|c| *c != '\0').take(MAX_THREAD_NAME).collect())
            .stack_size(STACK_BYTES)
            .spawn(move || Body { name, shared, event_loop, worker: None }.run(&plan))
            .map_err(|source| WorkerError::Thread { name: self.name.clone(), source })?;
        self.handle = Some(handle);
        Ok(())
    }

    /// Waits until the thread has started.
    ///
    /// # Errors
    /// Returns an error where it could not be prepared, or takes too long.
    pub(super) fn wait_started(&self, role: DeviceThread) -> Result<(), WorkerError> {
        let name = || self.name.clone();
        if !self.shared.wait(Instant::now() + START, |stage| !matches!(stage, Stage::Starting)) {
            return Err(WorkerError::NotInTime { name: name(), limit: START });
        }
        let mut state = self.shared.state();
        match std::mem::replace(&mut state.stage, Stage::Ended) {
            Stage::Failed(source) => Err(WorkerError::Prepare { name: name(), role, source }),
            Stage::Ended => Err(WorkerError::Ended { name: name() }),
            stage => {
                state.stage = stage;
                Ok(())
            }
        }
    }

    /// Gives the thread a worker to run.
    ///
    /// # Errors
    /// Returns an error where the thread has ended, or was never started.
    pub(super) fn activate(&self, worker: Worker) -> Result<(), WorkerError> {
        self.order(Command::Activate(worker))
    }

    /// Gives the thread, which must be idle, something to do.
    fn order(&self, command: Command) -> Result<(), WorkerError> {
        let mut state = self.shared.state();
        if !matches!(state.stage, Stage::Idle) {
            return Err(WorkerError::Ended { name: self.name.clone() });
        }
        state.stage = Stage::Busy;
        self.shared.send(state, command);
        Ok(())
    }

    /// Has the thread do `job`.
    ///
    /// # Errors
    /// Returns an error where the thread has a worker, has ended, or was never started.
    pub(super) fn run(&self, job: Job) -> Result<(), WorkerError> {
        self.order(Command::Run(job))
    }

    /// Has the thread drop its worker, where it has one. One order of this kind waits at most.
    pub(super) fn request_reset(&self) {
        let state = self.shared.state();
        let waits = state.commands.iter().any(|command| matches!(command, Command::Reset));
        if matches!(state.stage, Stage::Busy) && !waits {
            self.shared.send(state, Command::Reset);
        }
    }

    /// Waits until the thread has no worker, or until `deadline`. Returns true if it has none.
    pub(super) fn wait_idle(&self, deadline: Instant) -> bool {
        self.shared.wait(deadline, |stage| !matches!(stage, Stage::Busy))
    }

    /// Notes that no thread waits for the end of the reset any longer.
    pub(super) fn note_late_reset(&self) {
        let mut state = self.shared.state();
        state.late = matches!(state.stage, Stage::Busy);
    }

    /// Has the thread end once its worker has handled what is available.
    pub(super) fn request_stop(&self) {
        if self.handle.is_some() {
            self.shared.send(self.shared.state(), Command::Stop);
        }
    }

    /// Waits until the thread has ended, or until `deadline`. `abort` must have its worker do nothing more; it is called at the
    /// deadline. A thread that does not end then either, as it waits for the host, is left to itself.
    pub(super) fn wait_ended(&mut self, deadline: Instant, abort: impl FnOnce()) {
        let Some(handle) = self.handle.take() else { return };
        let has_ended = |stage: &Stage| matches!(stage, Stage::Ended | Stage::Failed(_));
        if !self.shared.wait(deadline, has_ended) {
            abort();
            if !self.shared.wait(Instant::now() + GRACE, has_ended) {
                log::error!("the device thread {} does not end: it waits for the host", self.name);
                return;
            }
        }
        if handle.join().is_err() {
            log::error!("the device thread {} panicked: this is a bug in hwvmm", self.name);
            // Lets a test fail.
            debug_assert!(std::thread::panicking(), "a device thread panicked");
        }
    }
}

/// What runs on the thread.
struct Body {
    name: String,
    shared: Arc<Shared>,
    event_loop: EventManager<Worker>,
    worker: Option<SubscriberId>,
}

/// Says that the thread has ended, also where it panics.
struct EndedOnDrop(Arc<Shared>);

impl Drop for EndedOnDrop {
    fn drop(&mut self) {
        if !matches!(self.0.state().stage, Stage::Failed(_)) {
            self.0.set_stage(Stage::Ended);
        }
    }
}

impl Body {
    fn run(self, plan: &StartPlan) {
        // Dropped after `body` and its worker.
        let _ended = EndedOnDrop(Arc::clone(&self.shared));
        let mut body = self;
        // The default timer slack of 50 us is longer than the waits of the notify coalescer.
        if let Err(error) = rustix::thread::set_current_timer_slack(NonZeroU64::new(1)) {
            log::debug!("{}: cannot set the timer slack to 1 ns: {error}", body.name);
        }
        if let Err(error) = (plan.preparation)().and_then(|()| (plan.start)(plan.role)) {
            body.shared.set_stage(Stage::Failed(error));
            return;
        }
        body.shared.set_stage(Stage::Idle);
        while body.obey(&plan.interrupt) {
            if body.handle_events(-1).is_none() {
                return;
            }
        }
        for _ in 0..LAST_ROUNDS {
            if body.handle_events(0).is_none_or(|events| events == 0) {
                break;
            }
        }
    }

    /// Handles the events of one round, for which it waits up to `timeout_ms`; -1 for any time. Returns their number, or
    /// `None` where the event loop failed.
    fn handle_events(&mut self, timeout_ms: i32) -> Option<usize> {
        match self.event_loop.run_with_timeout(timeout_ms) {
            Ok(events) => Some(events),
            Err(event_manager::Error::Epoll(error)) if error.errno() == libc::EINTR => Some(0),
            Err(error) => {
                log::error!("{}: the event loop failed, the device stops: {error}", self.name);
                None
            }
        }
    }

    /// Carries the commands out. Returns false where the thread is to stop.
    fn obey(&mut self, interrupt: &DeviceInterrupt) -> bool {
        if !self.shared.has_commands.load(Ordering::Relaxed) {
            return true;
        }
        while self.shared.has_commands.swap(false, Ordering::AcqRel) {
            while let Some(command) = self.shared.next_command() {
                match command {
                    Command::Activate(worker) => self.worker = Some(self.event_loop.add_subscriber(worker)),
                    Command::Reset => {
                        self.end_worker();
                        if self.shared.end_order() {
                            interrupt.reset_ended();
                        }
                    }
                    Command::Run(job) => {
                        job();
                        if self.shared.end_order() {
                            interrupt.reset_ended();
                        }
                    }
                    Command::Stop => return false,
                }
            }
        }
        true
    }

    /// Has the worker handle what was available before the driver reset the device, and drops it.
    fn end_worker(&mut self) {
        let Some(worker) = self.worker.take() else { return };
        self.handle_events(0);
        if self.event_loop.remove_subscriber(worker).is_err() {
            log::error!("{}: the event loop has lost its worker", self.name);
        }
    }
}
