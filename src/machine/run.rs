//! Running a machine to its end: vCPU threads, the event loop, and what ends a run from outside.

use super::confine::{self, device_threads, reach};
use super::paused::VirtioDevices;
use super::request::requests;
use super::save::Parts;
use super::{Event, Machine, Setup};
use crate::config::ProfileLevel;
use crate::console::{Announcements, Input, Look, UnreadInput, Watch, terminal_size};
use crate::control::Live;
use crate::error::chain;
use crate::event_loop::{EventLoop, EventLoopError, OnReadable};
use crate::exit::handler::BusKind;
use crate::exit::{EndReason, Handler, Outcome, RunEnd};
use crate::kvm::stats::Reader;
use crate::kvm::{CoalescedRing, Vcpu};
use crate::measure::record::{DeviceRange, RunRecord, VERSION};
use crate::measure::tracer::Tracer;
use crate::measure::{MemoryUse, cpu_time_ns};
use crate::memory::{GuestRam, give_back_startup};
use crate::sandbox::{Sandbox, SandboxError, ThreadRole};
use crate::tune::Lever;
use crate::vcpu::{Control, FollowExits, Measure, Threads};
use event_manager::MutEventSubscriber;
use hwvmm_arch::layout::GpaRange;
use hwvmm_devices::legacy::Watchdog;
use hwvmm_devices::virtio::TransportError;
use hwvmm_devices::virtio::console::{ConsoleSize, Port};
use std::fs::File;
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

/// How long the devices' threads may take to end: longer than a console waits for a reader of the guest's final output.
const DEVICES_END: Duration = Duration::from_millis(1250);

/// A run could not be carried out.
#[derive(Debug, Error)]
pub enum RunError {
    /// Threads, event loop, signals.
    #[error("cannot {0}")]
    Io(&'static str, #[source] io::Error),
    /// The event loop failed.
    #[error(transparent)]
    EventLoop(#[from] EventLoopError),
    /// The process cannot be confined.
    #[error("cannot confine the machine's process; --sandbox=off runs it without")]
    Sandbox(#[from] SandboxError),
    /// A thread of a device cannot be started.
    #[error(transparent)]
    Device(#[from] TransportError),
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

/// Detects that all vCPUs are halted permanently.
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

/// CLOCK_MONOTONIC, in nanoseconds: perf's records are on it.
fn monotonic_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    u64::try_from(now.tv_sec).unwrap_or(0) * 1_000_000_000 + u64::try_from(now.tv_nsec).unwrap_or(0)
}

/// What is measured, and the tracer of VM exits. What is not available is logged, and the run goes on without it.
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
            let missing = format!("VM exits are counted in total only: {error}");
            log::warn!("{missing}");
            (Measure::Profile { start, tracer: None }, None, vec![missing])
        }
    }
}

/// The event loop with all event sources outside of the guest.
fn listen(
    control: &Arc<Control>,
    subscribers: impl IntoIterator<Item = Box<dyn MutEventSubscriber>>,
    resized: Option<Arc<Port>>,
) -> Result<EventLoop, RunError> {
    let mut event_loop = EventLoop::new()?;
    let event = control.event().try_clone().map_err(|error| RunError::Io("copy an eventfd", error))?;
    event_loop.add(Box::new(OnReadable::new(event, |event: &vmm_sys_util::eventfd::EventFd| {
        let _ = event.read();
    })));
    subscribers.into_iter().for_each(|subscriber| event_loop.add(subscriber));
    if let Some(port) = resized {
        watch_size(&mut event_loop, port).map_err(|error| RunError::Io("watch the terminal's size", error))?;
    }
    Ok(event_loop)
}

/// How long writes wait in the kernel, and output in devices, at most. Each look costs the guest some time where it has no
/// processor to spare.
const DRAIN: Duration = Duration::from_millis(100);

/// Takes what waits in the kernel when no exit does.
struct Drain {
    thread: std::thread::JoinHandle<()>,
    stop: Arc<AtomicBool>,
}

impl Drain {
    /// `None` where nothing ever waits.
    fn start(
        handler: &Arc<Handler>,
        control: &Arc<Control>,
        sandbox: &Arc<Sandbox>,
        watches: &[Watch],
    ) -> io::Result<Option<Self>> {
        if handler.ring.is_none() {
            return Ok(None);
        }
        let watches = watches.to_vec();
        let (handler, control, sandbox) = (Arc::clone(handler), Arc::clone(control), Arc::clone(sandbox));
        let stop = Arc::new(AtomicBool::new(false));
        let stopping = Arc::clone(&stop);
        let work = move || {
            if let Err(error) = sandbox.enter(ThreadRole::Drain, "drain") {
                return control.end(EndReason::Failed(chain(&error)), None);
            }
            while !stopping.load(Ordering::Acquire) {
                std::thread::park_timeout(DRAIN);
                let began = Instant::now();
                if let Outcome::End(end) = handler.flush() {
                    control.end(end, None);
                }
                watches.iter().for_each(|watch| watch.note_flush(began));
            }
        };
        let thread = std::thread::Builder::new().name("drain".into()).stack_size(128 << 10).spawn(work)?;
        Ok(Some(Self { thread, stop }))
    }

    /// Has it look at once.
    fn flush(&self) {
        self.thread.thread().unpark();
    }

    fn stop(self) {
        self.stop.store(true, Ordering::Release);
        self.thread.thread().unpark();
        if self.thread.join().is_err() {
            log::error!("the thread that takes coalesced writes panicked: this is a bug in hwvmm");
        }
    }
}

/// Ends of a run that no exit shows.
struct Limits<'a> {
    control: &'a Control,
    watchdog: Option<Arc<Watchdog>>,
    halt_detector: HaltDetector,
    watches: &'a [Watch],
    virtio: &'a VirtioDevices,
    drain: Option<&'a Drain>,
    /// The time for which the machine was paused that the watchdog has been given.
    paused: Duration,
    output: OutputLimit<'a>,
}

/// When a console must have had output at the latest.
struct OutputLimit<'a> {
    announcements: &'a Announcements,
    deadline: Option<Instant>,
    timeout: Duration,
}

impl OutputLimit<'_> {
    /// Returns when to look again, or the end of a guest that has printed nothing in time.
    fn look(&mut self, now: Instant) -> Result<Option<Instant>, EndReason> {
        match self.deadline {
            Some(at) if at <= now => {
                self.deadline = None;
                if self.announcements.has_output() { Ok(None) } else { Err(EndReason::NotBooted(self.timeout)) }
            }
            deadline => Ok(deadline),
        }
    }
}

impl Limits<'_> {
    /// Looks for lines that do not go on. Returns when to look again.
    fn look_at_consoles(&self, now: Instant) -> Option<Instant> {
        let looks = self.watches.iter().map(|watch| watch.look(now));
        let again = looks.filter_map(|look| match look {
            Look::NoLine => None,
            Look::Again(at) => Some(at),
            Look::Flush(at) => {
                self.drain.into_iter().for_each(Drain::flush);
                Some(at)
            }
            Look::End(end) => {
                self.control.end(end, None);
                None
            }
        });
        again.min()
    }

    /// When the watchdog expires; it does not run while the machine is paused. Pauses that are over are added to its time, also one that
    /// began and ended since it was looked at last, as that of a snapshot does.
    fn watchdog_deadline(&mut self) -> Option<Instant> {
        let watchdog = self.watchdog.as_ref()?;
        if self.control.is_paused() {
            return None;
        }
        let paused = self.control.paused_before();
        watchdog.extend(paused.saturating_sub(std::mem::replace(&mut self.paused, paused)));
        watchdog.deadline()
    }

    /// Handles events until the run has ended.
    fn wait(&mut self, event_loop: &mut EventLoop, threads: &Threads) -> Result<(), RunError> {
        let mut next_tick = Instant::now() + TICK;
        while self.control.ended().is_none() {
            if !self.control.is_paused() {
                self.virtio.resume_paused();
            }
            let now = Instant::now();
            let dog = self.watchdog_deadline();
            if dog.is_some_and(|at| at <= now) {
                self.control.end(EndReason::Watchdog, None);
            } else if next_tick <= now {
                next_tick = now + TICK;
                if !self.control.is_paused() && self.halt_detector.tick(threads) {
                    self.control.end(EndReason::Halted, None);
                }
            }
            let output = self.output.look(now).unwrap_or_else(|end| {
                self.control.end(end, None);
                None
            });
            let console = self.look_at_consoles(now);
            let next = dog.into_iter().chain(console).chain(output).fold(next_tick, Instant::min);
            event_loop.wait(next.saturating_duration_since(now))?;
        }
        Ok(())
    }
}

/// What a run leaves.
pub struct Ran {
    /// What was counted and measured, and how the run ended.
    pub record: RunRecord,
    /// Input that the guest has not read.
    pub unread: UnreadInput,
}

/// Runs a machine until the run ends.
///
/// # Errors
/// Where threads or the event loop cannot be created.
pub fn run(machine: Machine, setup: &Setup<'_>) -> Result<Ran, RunError> {
    let Machine { vcpus, vm, virtio, api, handler, control, input, watches, resized, saved, .. } = machine;
    let Machine { msrs, ram, boot, register_pages, passt, .. } = machine;
    let live = api.as_ref().map(crate::control::Server::live);
    let unread = input.as_ref().map(Input::unread);
    let input = input.map(|input| Box::new(input) as Box<dyn MutEventSubscriber>);
    let api = api.map(|api| Box::new(api) as Box<dyn MutEventSubscriber>);
    let requests = setup.requests.map(|socket| requests(socket, &control)).transpose();
    let requests = requests.map_err(|error| RunError::Io("wait for requests to end the run", error))?;
    let mut event_loop = listen(&control, input.into_iter().chain(api).chain(requests), resized)?;
    let halt_detector = HaltDetector::new(&vcpus);
    let readers = if live.is_some() { stats_readers(&vcpus) } else { Vec::new() };
    if let Err(error) = give_back_startup() {
        log::debug!("memory used at the start is kept: {error}");
    }

    let wants_memory = setup.config.stats.is_some() || setup.config.profile.is_some();
    let smaps = if wants_memory { File::open(MemoryUse::FILE).ok() } else { None };
    let start = Instant::now();
    let (measure, mut tracer, missing) = measure(setup, &ram, vcpus.len(), start);
    // Everything is open. From here on threads are started, which inherit what this one is confined to.
    let sandbox = &setup.sandbox;
    sandbox.confine_process(&reach(setup.config))?;
    for process in passt {
        process.attend(sandbox).map_err(|error| RunError::Io("start a thread", error))?;
    }
    let thread_start = device_threads(sandbox);
    virtio.start(&thread_start)?;
    if let Some(tracer) = &mut tracer {
        tracer.start(sandbox).map_err(|error| RunError::Io("start a thread", error))?;
    }

    let startup_cpu_ns = cpu_time_ns();
    log::debug!(
        "{}: {:.1} ms of CPU time before the guest runs",
        boot,
        Duration::from_nanos(startup_cpu_ns).as_secs_f64() * 1e3
    );
    (setup.on_event)(Event::Started { boot, startup_cpu_ns });
    let confinement = confine::vcpus(setup.config, sandbox);
    if handler.ring.is_some() {
        // Before the first output of the guest.
        watches.iter().for_each(|watch| watch.note_flush(start));
    }
    // The test device raises interrupts by ioctls of its own (KVM_IRQ_LINE), which a cluster would not see.
    let follows = setup.config.tune.wants(Lever::ExitClusters) && !setup.config.testdev;
    let follow = if follows { FollowExits::Adaptive } else { FollowExits::Never };
    let threads = Threads::start(vcpus, &handler, &control, &measure, setup.flight_recorders, &confinement, follow)
        .map_err(|error| RunError::Io("start a vCPU's thread", error))?;
    if let Some(live) = live {
        let parts = Parts {
            vm: Arc::clone(&vm),
            ram: ram.clone(),
            handler: Arc::clone(&handler),
            devices: saved.clone(),
            virtio: Arc::clone(&virtio),
            boot,
            register_pages,
            msrs,
        };
        let saver = parts.saver(setup.config);
        let _ = live.set(Live::new(threads.inspector(), Arc::clone(&handler), readers, saver));
    }
    let drain =
        Drain::start(&handler, &control, sandbox, &watches).map_err(|error| RunError::Io("start a thread", error))?;
    sandbox.enter(ThreadRole::Main, "main")?;
    let output = OutputLimit {
        announcements: &setup.announcements,
        deadline: setup.output_deadline,
        timeout: setup.config.boot_timeout.unwrap_or_default(),
    };
    let mut limits = Limits {
        control: &control,
        watchdog: saved.watchdog,
        halt_detector,
        watches: &watches,
        virtio: &virtio,
        drain: drain.as_ref(),
        paused: Duration::ZERO,
        output,
    };
    let result = limits.wait(&mut event_loop, &threads);
    let ran = start.elapsed();
    // Before what only the end needs is in memory: the code of the record, the record.
    let memory = smaps.and_then(|smaps| MemoryUse::read(&smaps, &ram.host_ranges().collect::<Vec<_>>()).ok());
    let ended = |control: &Control| control.ended().map(|end| explained(setup, end));
    if let Some(end) = ended(&control) {
        (setup.on_event)(Event::Ended(&end));
    }
    let vcpus = threads.stop();
    // The guest's final output.
    drain.into_iter().for_each(Drain::stop);
    handler.flush();
    let trace = tracer.map(Tracer::finish);
    virtio.stop(Instant::now() + DEVICES_END);
    result?;
    if let Some(end) = control.ended() {
        watches.iter().for_each(|watch| watch.finish(&end.reason));
    }
    // Again: what the guest wrote last may explain the end.
    let end = ended(&control)
        .unwrap_or(RunEnd { reason: EndReason::Failed("the run ended without a reason".into()), vcpu: None });
    let record = RunRecord {
        version: VERSION,
        end,
        boot: Some(boot),
        // Whoever opened the image knows it.
        entry: None,
        startup_cpu_ns,
        ran_ns: nanoseconds(ran),
        vcpus,
        devices: devices(&handler),
        coalesced_writes: handler.ring.as_ref().map_or(0, CoalescedRing::drained),
        vm_stats: vm.stats_fd().ok().and_then(|file| Reader::new(file).ok()?.read().ok()),
        virtio: virtio.queues(),
        memory,
        trace,
        missing,
    };
    Ok(Ran { record, unread: unread.map(|unread| unread.take()).unwrap_or_default() })
}

/// The end with what the guest's kernel has announced.
fn explained(setup: &Setup<'_>, end: RunEnd) -> RunEnd {
    RunEnd { reason: setup.files.explain(setup.announcements.explain(end.reason)), vcpu: end.vcpu }
}

fn devices(handler: &Handler) -> Vec<DeviceRange> {
    DeviceRange::list(BusKind::Pio, &handler.pio).chain(DeviceRange::list(BusKind::Mmio, &handler.mmio)).collect()
}

fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}
