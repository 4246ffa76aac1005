//! Running a machine to its end: vCPU threads, the event loop, and what ends a run from outside.

use super::confine::{self, device_threads, reach};
use super::drain::Drain;
use super::halt::{HaltDetector, stats_readers};
use super::limits::{Limits, OutputLimit};
use super::net::Passt;
use super::paused::VirtioDevices;
use super::request::requests;
use super::save::Parts;
use super::saving::{Save, SavingError, saver};
use super::working_set::Recorder;
use super::{Event, Machine, Setup};
use crate::config::ProfileLevel;
use crate::console::{Input, UnreadInput, Watch, terminal_size};
use crate::control::{Live, Server};
use crate::event_loop::{EventLoop, EventLoopError, OnReadable};
use crate::exit::handler::BusKind;
use crate::exit::{EndReason, Handler, RunEnd};
use crate::kvm::stats::Reader;
use crate::kvm::{CoalescedRing, Vm};
use crate::measure::record::{DeviceRange, RunRecord, VERSION};
use crate::measure::tracer::Tracer;
use crate::measure::{MemoryFiles, MemoryUse, cpu_time_ns, monotonic_ns};
use crate::memory::{GuestRam, give_back_startup};
use crate::sandbox::{SandboxError, ThreadRole};
use crate::vcpu::{Control, Measure, Threads};
use event_manager::MutEventSubscriber;
use hwvmm_arch::boot::BootMethod;
use hwvmm_arch::layout::GpaRange;
use hwvmm_devices::virtio::TransportError;
use hwvmm_devices::virtio::console::{ConsoleSize, Port};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};
use thiserror::Error;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

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
    /// The machine that is to save itself cannot be saved.
    #[error(transparent)]
    Saving(#[from] SavingError),
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

/// What the event loop waits for besides the vCPUs.
struct Sources<'a> {
    input: Option<Input>,
    api: Option<Server>,
    /// Where requests to end the run come from.
    requests: Option<BorrowedFd<'a>>,
    save: Save,
    resized: Option<Arc<Port>>,
}

/// The event loop with all event sources outside of the guest.
fn listen(control: &Arc<Control>, sources: Sources<'_>) -> Result<EventLoop, RunError> {
    let save = sources.save;
    let requests = sources.requests.map(|socket| requests(socket, control, save)).transpose();
    let requests = requests.map_err(|error| RunError::Io("wait for requests to end the run", error))?;
    let mut event_loop = EventLoop::new()?;
    let event = control.event().try_clone().map_err(|error| RunError::Io("copy an eventfd", error))?;
    event_loop.add(Box::new(OnReadable::new(event, |event: &vmm_sys_util::eventfd::EventFd| {
        let _ = event.read();
    })));
    let input = sources.input.map(|input| Box::new(input) as Box<dyn MutEventSubscriber>);
    let api = sources.api.map(|api| Box::new(api) as Box<dyn MutEventSubscriber>);
    input.into_iter().chain(api).chain(requests).for_each(|subscriber| event_loop.add(subscriber));
    if let Some(port) = sources.resized {
        watch_size(&mut event_loop, port).map_err(|error| RunError::Io("watch the terminal's size", error))?;
    }
    Ok(event_loop)
}

/// Confines the process, and starts the threads of devices and the tracer, which inherit what this one is confined to. Everything is open.
fn confine_and_start(
    setup: &Setup<'_>,
    passt: Vec<Passt>,
    virtio: &VirtioDevices,
    tracer: Option<&mut Tracer>,
) -> Result<(), RunError> {
    let sandbox = &setup.sandbox;
    let thread = |error| RunError::Io("start a thread", error);
    sandbox.confine_process(&reach(setup.config))?;
    passt.into_iter().try_for_each(|process| process.attend(sandbox)).map_err(thread)?;
    virtio.start(&device_threads(sandbox))?;
    tracer.map_or(Ok(()), |tracer| tracer.start(sandbox)).map_err(thread)
}

/// Says that the guest starts now. Returns the CPU time used so far, and the time on CLOCK_MONOTONIC, both in nanoseconds.
fn announce_start(setup: &Setup<'_>, boot: BootMethod) -> (u64, u64) {
    let startup_cpu_ns = cpu_time_ns();
    let milliseconds = Duration::from_nanos(startup_cpu_ns).as_secs_f64() * 1e3;
    log::debug!("{boot}: {milliseconds:.1} ms of CPU time before the guest runs");
    let started_at_ns = monotonic_ns();
    (setup.on_event)(Event::Started { boot, startup_cpu_ns, started_at_ns });
    (startup_cpu_ns, started_at_ns)
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
    let Machine { msrs, ram, boot, follow, register_pages, passt, .. } = machine;
    let live = api.as_ref().map(Server::live).or_else(|| setup.save_to.map(|_| Arc::default()));
    let save = saver(setup, live.clone())?;
    let unread = input.as_ref().map(Input::unread);
    let mut event_loop =
        listen(&control, Sources { input, api, requests: setup.requests, save: Arc::clone(&save), resized })?;
    let halt_detector = HaltDetector::new(&vcpus);
    let readers = if live.is_some() { stats_readers(&vcpus) } else { Vec::new() };
    if let Err(error) = give_back_startup() {
        log::debug!("memory used at the start is kept: {error}");
    }
    let wants_memory = setup.config.stats.is_some() || setup.config.profile.is_some();
    let memory = if wants_memory { MemoryFiles::open().ok() } else { None };
    let start = Instant::now();
    let recorder = Recorder::new(setup, &ram, start).map_err(|error| RunError::Io("read /proc/self/pagemap", error))?;
    let (measure, mut tracer, missing) = measure(setup, &ram, vcpus.len(), start);
    confine_and_start(setup, passt, &virtio, tracer.as_mut())?;
    let (startup_cpu_ns, started_at_ns) = announce_start(setup, boot);
    if handler.ring.is_some() {
        // Before the first output of the guest.
        watches.iter().for_each(|watch| watch.note_flush(start));
    }
    let confinement = confine::vcpus(setup.config, &setup.sandbox);
    let threads = Threads::start(vcpus, &handler, &control, &measure, setup.flight_recorders, &confinement, follow)
        .map_err(|error| RunError::Io("start a vCPU's thread", error))?;
    if let Some(live) = live {
        let (vm, ram, handler) = (Arc::clone(&vm), ram.clone(), Arc::clone(&handler));
        let (devices, virtio) = (saved.clone(), Arc::clone(&virtio));
        let (handler, link) = (Arc::clone(&handler), setup.files.link);
        let parts = Parts { vm, ram, handler: Arc::clone(&handler), devices, virtio, boot, register_pages, link, msrs };
        let _ = live.set(Live::new(threads.inspector(), handler, readers, parts.saver(setup.config)));
    }
    let drain = Drain::start(&handler, &control, &setup.sandbox, &watches)
        .map_err(|error| RunError::Io("start a thread", error))?;
    setup.sandbox.enter(ThreadRole::Main, "main")?;
    let mut limits = Limits {
        control: &control,
        watchdog: saved.watchdog,
        halt_detector,
        watches: &watches,
        virtio: &virtio,
        drain: drain.as_ref(),
        paused: Duration::ZERO,
        output: OutputLimit {
            announcements: &setup.announcements,
            deadline: setup.output_deadline,
            timeout: setup.config.boot_timeout.unwrap_or_default(),
        },
        save,
        recorder,
    };
    let result = limits.wait(&mut event_loop, &threads);
    let ran = start.elapsed();
    limits.recorder.take().into_iter().for_each(Recorder::finish);
    // Before what only the end needs is in memory: the code of the record, the record.
    let memory = memory.and_then(|files| files.read(&ram.host_ranges().collect::<Vec<_>>()).ok());
    let started = Started { boot, startup_cpu_ns, started_at_ns, missing, threads, drain, tracer };
    let machine = Stopping { vm: &vm, handler: &handler, virtio: &virtio, control: &control, watches: &watches };
    let record = machine.stop(setup, started, ran, memory, result)?;
    Ok(Ran { record, unread: unread.map(|unread| unread.take()).unwrap_or_default() })
}

/// What was started for the run.
struct Started {
    boot: BootMethod,
    startup_cpu_ns: u64,
    started_at_ns: u64,
    /// What could not be measured.
    missing: Vec<String>,
    threads: Threads,
    drain: Option<Drain>,
    tracer: Option<Tracer>,
}

/// The parts of a machine whose run has ended.
struct Stopping<'a> {
    vm: &'a Vm,
    handler: &'a Handler,
    virtio: &'a VirtioDevices,
    control: &'a Control,
    watches: &'a [Watch],
}

impl Stopping<'_> {
    /// Stops the threads, has the guest's output written, and makes the record. `result` is that of the event loop.
    fn stop(
        self,
        setup: &Setup<'_>,
        started: Started,
        ran: Duration,
        memory: Option<MemoryUse>,
        result: Result<(), EventLoopError>,
    ) -> Result<RunRecord, RunError> {
        if let Some(end) = self.control.ended() {
            (setup.on_event)(Event::Ended(&explained(setup, end)));
        }
        let vcpus = started.threads.stop();
        // The guest's final output.
        started.drain.into_iter().for_each(Drain::stop);
        self.handler.flush();
        let trace = started.tracer.map(Tracer::finish);
        self.virtio.stop(Instant::now() + DEVICES_END);
        result?;
        if let Some(end) = self.control.ended() {
            self.watches.iter().for_each(|watch| watch.finish(&end.reason));
        }
        // Again: what the guest wrote last may explain the end.
        let end = self.control.ended().map_or_else(
            || RunEnd { reason: EndReason::Failed("the run ended without a reason".into()), vcpu: None },
            |end| explained(setup, end),
        );
        Ok(RunRecord {
            version: VERSION,
            end,
            boot: Some(started.boot),
            // Whoever opened the image knows it.
            entry: None,
            startup_cpu_ns: started.startup_cpu_ns,
            started_at_ns: started.started_at_ns,
            ran_ns: nanoseconds(ran),
            vcpus,
            devices: devices(self.handler),
            coalesced_writes: self.handler.ring.as_ref().map_or(0, CoalescedRing::drained),
            vm_stats: self.vm.stats_fd().ok().and_then(|file| Reader::new(file).ok()?.read().ok()),
            virtio: self.virtio.queues(),
            memory,
            trace,
            missing: started.missing,
        })
    }
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
