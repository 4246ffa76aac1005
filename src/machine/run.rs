//! Running a machine to its end: vCPU threads, the event loop, and what ends a run from outside.

use super::virtio::VirtioHandle;
use super::{Machine, Setup};
use crate::config::ProfileLevel;
use crate::console::terminal_size;
use crate::control::Live;
use crate::event_loop::{EventLoop, EventLoopError, OnReadable};
use crate::exit::handler::BusKind;
use crate::exit::{EndReason, Handler, Outcome, RunEnd, Signal};
use crate::kvm::stats::Reader;
use crate::kvm::{CoalescedRing, Vcpu};
use crate::measure::MemoryUse;
use crate::measure::record::{DeviceRange, RunRecord, VERSION};
use crate::measure::tracer::Tracer;
use crate::memory::{GuestRam, give_back_startup};
use crate::vcpu::{Control, Measure, Threads};
use event_manager::MutEventSubscriber;
use hwvmm_arch::layout::GpaRange;
use hwvmm_devices::legacy::Watchdog;
use hwvmm_devices::virtio::console::{ConsoleSize, Port};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use thiserror::Error;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

/// How often the run is looked at for a guest that will never wake.
const TICK: Duration = Duration::from_secs(1);
/// Without KVM's statistics one cannot see that a guest does something; asking costs an exit.
const BLIND_TICKS: u32 = 10;

/// A run could not be carried out.
#[derive(Debug, Error)]
pub enum RunError {
    /// Threads, event loop, signals.
    #[error("cannot {0}")]
    Io(&'static str, #[source] io::Error),
    /// The event loop failed.
    #[error(transparent)]
    EventLoop(#[from] EventLoopError),
}

/// Ends the run on the signals that end programs, so that the terminal is put back and the counts are shown.
fn add_signals(event_loop: &mut EventLoop, control: &Arc<Control>) -> io::Result<Vec<signal_hook::SigId>> {
    let mut ids = Vec::new();
    for signal in Signal::ALL {
        let (receiver, sender) = UnixStream::pair()?;
        ids.push(signal_hook::low_level::pipe::register(signal.number().into(), sender)?);
        let control = Arc::clone(control);
        event_loop.add(Box::new(OnReadable::new(receiver, move |receiver: &UnixStream| {
            let _ = rustix::io::read(receiver.as_fd(), &mut [0; 16]);
            control.end(EndReason::Signal(signal), None);
        })));
    }
    Ok(ids)
}

/// Tells the console when the terminal's size changes.
fn watch_size(event_loop: &mut EventLoop, port: Arc<Port>) -> io::Result<()> {
    let (receiver, sender) = UnixStream::pair()?;
    signal_hook::low_level::pipe::register(signal_hook::consts::SIGWINCH, sender)?;
    event_loop.add(Box::new(OnReadable::new(receiver, move |receiver: &UnixStream| {
        let _ = rustix::io::read(receiver.as_fd(), &mut [0; 16]);
        let (columns, rows) = terminal_size();
        port.resize(ConsoleSize { columns, rows });
    })));
    Ok(())
}

/// Sees when all vCPUs rest for good.
struct HaltDetector {
    readers: Vec<Option<Reader>>,
    exits: Vec<u64>,
    asked: bool,
    blind_ticks: u32,
}

fn stats_readers(vcpus: &[Vcpu]) -> Vec<Option<Reader>> {
    vcpus.iter().map(|vcpu| vcpu.stats_fd().ok().and_then(|file| Reader::new(file).ok())).collect()
}

impl HaltDetector {
    fn new(vcpus: &[Vcpu]) -> Self {
        Self { readers: stats_readers(vcpus), exits: Vec::new(), asked: false, blind_ticks: 0 }
    }

    /// VM exits of each vCPU so far, or nothing where KVM does not tell.
    fn count_exits(&self) -> Vec<u64> {
        let exits = |reader: &Reader| {
            let stats = reader.read().ok()?;
            stats.iter().find(|stat| stat.name == "exits")?.values.first().copied()
        };
        self.readers.iter().filter_map(|reader| exits(reader.as_ref()?)).collect()
    }

    /// Once a tick: whether the guest will never run again. Its vCPUs are asked only where none has exited since the
    /// last tick, and once until one does.
    fn tick(&mut self, threads: &Threads) -> bool {
        if self.asked && threads.all_halted() {
            return true;
        }
        let exits = self.count_exits();
        let blind = exits.is_empty();
        self.blind_ticks += 1;
        let quiet = if blind { self.blind_ticks.is_multiple_of(BLIND_TICKS) } else { exits == self.exits };
        if !quiet {
            self.asked = false;
        } else if blind || !self.asked {
            threads.request_report();
            self.asked = true;
        }
        self.exits = exits;
        false
    }
}

fn cpu_time() -> Duration {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
    Duration::new(seconds, u32::try_from(now.tv_nsec).unwrap_or(0))
}

/// CLOCK_MONOTONIC, in nanoseconds: perf's records are on it.
fn monotonic_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    u64::try_from(now.tv_sec).unwrap_or(0) * 1_000_000_000 + u64::try_from(now.tv_nsec).unwrap_or(0)
}

/// What is measured, and the tracer of VM exits. What cannot be had is said, and the run goes on without.
fn measure(setup: &Setup<'_>, ram: &GuestRam, vcpus: usize, start: Instant) -> (Measure, Option<Tracer>, Vec<String>) {
    let Some(level) = setup.config.profile else {
        let measure = if setup.config.stats.is_some() { Measure::Times } else { Measure::Nothing };
        return (measure, None, Vec::new());
    };
    if level == ProfileLevel::User {
        return (Measure::Profile { start, tracer: None }, None, Vec::new());
    }
    let banks = ram.get().iter().map(|region| GpaRange { start: region.start_addr().0, bytes: region.len() }).collect();
    match Tracer::new(banks, vcpus, monotonic_ns()) {
        Ok(tracer) => (Measure::Profile { start, tracer: Some(tracer.handle()) }, Some(tracer), Vec::new()),
        Err(error) => {
            let missing = format!("VM exits are not told apart: {error}");
            log::warn!("{missing}");
            (Measure::Profile { start, tracer: None }, None, vec![missing])
        }
    }
}

/// The event loop with everybody who waits outside of the guest, and the signals that it has taken over.
fn listen(
    control: &Arc<Control>,
    subscribers: impl IntoIterator<Item = Box<dyn MutEventSubscriber>>,
    resized: Option<Arc<Port>>,
) -> Result<(EventLoop, Vec<signal_hook::SigId>), RunError> {
    let mut event_loop = EventLoop::new()?;
    let event = control.event().try_clone().map_err(|error| RunError::Io("copy an eventfd", error))?;
    event_loop.add(Box::new(OnReadable::new(event, |event: &vmm_sys_util::eventfd::EventFd| {
        let _ = event.read();
    })));
    subscribers.into_iter().for_each(|subscriber| event_loop.add(subscriber));
    if let Some(port) = resized {
        watch_size(&mut event_loop, port).map_err(|error| RunError::Io("watch the terminal's size", error))?;
    }
    let signals = add_signals(&mut event_loop, control).map_err(|error| RunError::Io("catch signals", error))?;
    Ok((event_loop, signals))
}

/// How long writes wait in the kernel at most. Each look costs the guest some time where it has no processor to spare.
const DRAIN: Duration = Duration::from_millis(100);

/// Takes what waits in the kernel when no exit does.
struct Drain {
    thread: std::thread::JoinHandle<()>,
    stop: Arc<AtomicBool>,
}

impl Drain {
    /// `None` where nothing ever waits.
    fn start(handler: &Arc<Handler>, control: &Arc<Control>) -> io::Result<Option<Self>> {
        if handler.ring.is_none() {
            return Ok(None);
        }
        let (handler, control) = (Arc::clone(handler), Arc::clone(control));
        let stop = Arc::new(AtomicBool::new(false));
        let stopping = Arc::clone(&stop);
        let work = move || {
            while !stopping.load(Ordering::Acquire) {
                std::thread::park_timeout(DRAIN);
                if let Outcome::End(end) = handler.drain_coalesced() {
                    control.end(end, None);
                }
            }
        };
        let thread = std::thread::Builder::new().name("drain".into()).stack_size(128 << 10).spawn(work)?;
        Ok(Some(Self { thread, stop }))
    }

    fn stop(self) {
        self.stop.store(true, Ordering::Release);
        self.thread.thread().unpark();
        if self.thread.join().is_err() {
            log::error!("the thread that takes waiting writes panicked: this is a bug in hwvmm");
        }
    }
}

/// What ends a run besides the guest.
struct Limits<'a> {
    control: &'a Control,
    watchdog: Option<Arc<Watchdog>>,
    /// When, and after how long.
    timeout: Option<(Instant, Duration)>,
    halt_detector: HaltDetector,
}

impl Limits<'_> {
    /// Handles events until the run has ended.
    fn wait(&mut self, event_loop: &mut EventLoop, threads: &Threads) -> Result<(), RunError> {
        let mut next_tick = Instant::now() + TICK;
        while self.control.ended().is_none() {
            let now = Instant::now();
            let dog = self.watchdog.as_ref().and_then(|watchdog| watchdog.deadline());
            if let Some((_, timeout)) = self.timeout.filter(|(at, _)| *at <= now) {
                self.control.end(EndReason::TimedOut(timeout), None);
            } else if dog.is_some_and(|at| at <= now) {
                self.control.end(EndReason::Watchdog, None);
            } else if next_tick <= now {
                next_tick = now + TICK;
                if self.halt_detector.tick(threads) {
                    self.control.end(EndReason::Halted, None);
                }
            }
            let moments = [Some(next_tick), dog, self.timeout.map(|(at, _)| at)];
            let next = moments.into_iter().flatten().min().unwrap_or(next_tick);
            event_loop.wait(next.saturating_duration_since(now))?;
        }
        Ok(())
    }
}

/// Runs a machine until the run ends.
///
/// # Errors
/// Where threads or the event loop cannot be had.
pub fn run(machine: Machine, setup: &Setup<'_>) -> Result<RunRecord, RunError> {
    let Machine { vcpus, vm, virtio, api, handler, control, input, resized, watchdog, ram, loaded } = machine;
    let live = api.as_ref().map(crate::control::Server::live);
    let input = input.map(|input| Box::new(input) as Box<dyn MutEventSubscriber>);
    let api = api.map(|api| Box::new(api) as Box<dyn MutEventSubscriber>);
    let (mut event_loop, signals) = listen(&control, input.into_iter().chain(api), resized)?;
    let halt_detector = HaltDetector::new(&vcpus);
    let readers = if live.is_some() { stats_readers(&vcpus) } else { Vec::new() };
    if let Err(error) = give_back_startup() {
        log::debug!("start-up's memory stays: {error}");
    }

    let startup_cpu = cpu_time();
    let start = Instant::now();
    log::debug!("{}: {:.1} ms of CPU time before the guest runs", loaded.method, startup_cpu.as_secs_f64() * 1e3);
    let timeout = setup.config.timeout.map(|timeout| (start + timeout, timeout));
    let (measure, tracer, missing) = measure(setup, &ram, vcpus.len(), start);
    let threads = Threads::start(vcpus, &handler, &control, &measure)
        .map_err(|error| RunError::Io("start a vCPU's thread", error))?;
    if let Some(live) = live {
        let _ = live.set(Live::new(threads.inspector(), Arc::clone(&handler), readers));
    }
    let drain = Drain::start(&handler, &control).map_err(|error| RunError::Io("start a thread", error))?;
    let result = Limits { control: &control, watchdog, timeout, halt_detector }.wait(&mut event_loop, &threads);
    let ran = start.elapsed();
    let vcpus = threads.stop();
    // The guest's final output.
    drain.into_iter().for_each(Drain::stop);
    handler.drain_coalesced();
    let trace = tracer.map(Tracer::finish);
    virtio.iter().for_each(VirtioHandle::stop);
    for id in signals {
        signal_hook::low_level::unregister(id);
    }
    result?;
    let end = control
        .ended()
        .unwrap_or(RunEnd { reason: EndReason::Failed("the run ended without a reason".into()), vcpu: None });
    let wants_memory = setup.config.stats.is_some() || setup.config.profile.is_some();
    Ok(RunRecord {
        version: VERSION,
        end: RunEnd { reason: setup.announcements.explain(end.reason), vcpu: end.vcpu },
        boot: loaded.method,
        startup_cpu_ns: nanoseconds(startup_cpu),
        ran_ns: nanoseconds(ran),
        vcpus,
        devices: devices(&handler),
        coalesced_writes: handler.ring.as_ref().map_or(0, CoalescedRing::drained),
        vm_stats: vm.stats_fd().ok().and_then(|file| Reader::new(file).ok()?.read().ok()),
        virtio: virtio.iter().flat_map(VirtioHandle::queues).collect(),
        memory: wants_memory.then(|| MemoryUse::now(&ram.host_ranges().collect::<Vec<_>>()).ok()).flatten(),
        trace,
        missing,
    })
}

fn devices(handler: &Handler) -> Vec<DeviceRange> {
    DeviceRange::list(BusKind::Pio, &handler.pio).chain(DeviceRange::list(BusKind::Mmio, &handler.mmio)).collect()
}

fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}
