//! One thread a vCPU: started together, kicked, asked whether they rest, stopped and joined.

use super::pause::{Gate, Passed};
use super::run_loop::{Records, Stop, run};
use super::saving::{SaveError, Saving};
use crate::cluster::{Clusters, Follow};
use crate::error::chain;
use crate::exit::{EndReason, Handler, RunEnd};
use crate::kvm::clock::Anchor;
use crate::kvm::kick::{self, KickTarget};
use crate::kvm::state::VcpuState;
use crate::kvm::stats::Reader;
use crate::kvm::vcpu::{Running, VcpuActivity};
use crate::kvm::{KvmError, Vcpu};
use crate::measure::tracer;
use crate::measure::{
    Counters, FlightRecorder, FlightRecorders, HandlerTime, Measured, NoProfile, Profiler, UserProfile, VcpuRecord,
};
use crate::sandbox::{Sandbox, SandboxError, ThreadRole};
use hwvmm_arch::msr::IA32_LSTAR;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use vmm_sys_util::eventfd::EventFd;

/// How often a vCPU that does not come out is kicked again: it may just have entered a system call.
const KICK_AGAIN: Duration = Duration::from_millis(1);

/// How long the vCPUs may take to stop. An access to a device takes up to a second where the device is being reset.
const STOP: Duration = Duration::from_millis(1500);

/// How long a vCPU may take to come out before the machine is paused, or how soon the pause is given up.
const PAUSE: Duration = Duration::from_millis(1500);

/// How long the vCPUs of a paused machine may take to tell their state.
const SAVE: Duration = Duration::from_secs(5);
const SAVE_POLL: Duration = Duration::from_micros(200);

/// Shared by all that can end a run: the first end counts.
pub struct Control {
    ended: Mutex<Option<RunEnd>>,
    stop: AtomicBool,
    event: EventFd,
    /// Raised to have each vCPU publish whether it rests.
    inspection: AtomicU64,
    pub(super) gate: Gate,
    /// A line that is seen asks for a snapshot.
    pub(super) saves_at_line: AtomicBool,
    /// A snapshot is asked for.
    pub(super) snapshot_due: AtomicBool,
    saving: Mutex<Saving>,
}

impl Control {
    /// A run that has not ended.
    ///
    /// # Errors
    /// Where no eventfd can be created.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            ended: Mutex::new(None),
            stop: AtomicBool::new(false),
            event: EventFd::new(vmm_sys_util::eventfd::EFD_NONBLOCK)?,
            inspection: AtomicU64::new(0),
            gate: Gate::default(),
            saves_at_line: AtomicBool::new(false),
            snapshot_due: AtomicBool::new(false),
            saving: Mutex::default(),
        })
    }

    /// Ends the run, unless it has ended already.
    pub fn end(&self, reason: EndReason, vcpu: Option<usize>) {
        self.ended.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(RunEnd { reason, vcpu });
        self.wake();
    }

    /// Has the event loop look at its deadlines again.
    pub fn wake(&self) {
        if let Err(error) = self.event.write(1) {
            log::error!("cannot wake the event loop: {error}");
        }
    }

    /// The end, once there is one.
    #[must_use]
    pub fn ended(&self) -> Option<RunEnd> {
        self.ended.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Readable once the run has ended, and after [`Self::wake`].
    #[must_use]
    pub fn event(&self) -> &EventFd {
        &self.event
    }

    /// Returns true if the run ends and every thread should stop.
    #[must_use]
    pub fn is_stopping(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }
}

/// What is to be measured at exits.
#[derive(Clone)]
pub enum Measure {
    /// Nothing but the counts.
    Nothing,
    /// Time in the handler.
    Times,
    /// Every cause, from `start` on; VM exits too where they can be traced.
    Profile {
        /// From when times count.
        start: Instant,
        /// The tracer of VM exits.
        tracer: Option<tracer::Handle>,
    },
}

/// What the threads of vCPUs may do on the host.
#[derive(Clone)]
pub struct Confinement {
    /// The sandbox that each thread enters before it runs the guest.
    pub sandbox: Arc<Sandbox>,
    /// The role in which it does.
    pub role: ThreadRole,
}

/// What a thread shows to the outside.
struct VcpuShared {
    target: Mutex<Option<KickTarget>>,
    inspected: AtomicU64,
    activity: AtomicU8,
    /// A copy of the counters, made when the thread was last kicked for one.
    counters: Mutex<Option<Counters>>,
    /// The round of the last state that was asked for, and that state.
    saved: Mutex<(u64, Option<Result<VcpuState, KvmError>>)>,
}

impl VcpuShared {
    fn kick(&self) {
        if let Some(target) = *self.target.lock().unwrap_or_else(PoisonError::into_inner) {
            target.kick();
        }
    }
}

/// Looks at running vCPUs from outside, and holds them up.
pub struct Inspector {
    shared: Vec<Arc<VcpuShared>>,
    control: Arc<Control>,
}

impl Inspector {
    /// Has every vCPU say whether it rests, and show its counters. Costs one exit a vCPU, and none while the machine is paused.
    pub fn ask(&self) {
        self.control.inspection.fetch_add(1, Ordering::AcqRel);
        self.control.gate.call();
        // A signal to a vCPU that waits would make the next KVM_RUN return at once.
        if !self.control.is_paused() {
            self.shared.iter().for_each(|shared| shared.kick());
        }
    }

    /// Pauses the machine: returns true once no vCPU runs the guest. Costs one exit a vCPU. Returns false where one does not
    /// come out within `PAUSE`; then all go on.
    #[must_use]
    pub fn pause(&self) -> bool {
        if self.control.is_paused() {
            return true;
        }
        self.control.gate.close();
        let deadline = Instant::now() + PAUSE;
        while Instant::now() < deadline {
            self.shared.iter().for_each(|shared| shared.kick());
            if self.control.gate.all_wait(self.shared.len(), KICK_AGAIN) {
                return true;
            }
        }
        self.control.resume();
        false
    }

    /// What paused it, and since when.
    #[must_use]
    pub fn control(&self) -> &Control {
        &self.control
    }

    /// Returns the state of each vCPU of a machine that is paused, with the MSRs `msrs`.
    ///
    /// # Errors
    /// [`SaveError`].
    pub fn save(&self, msrs: &Arc<[u32]>) -> Result<Vec<VcpuState>, SaveError> {
        let round = {
            let mut saving = self.control.saving.lock().unwrap_or_else(PoisonError::into_inner);
            saving.round = saving.round.wrapping_add(1);
            saving.msrs = Arc::clone(msrs);
            saving.round
        };
        self.control.gate.call();
        let deadline = Instant::now() + SAVE;
        let mut states = Vec::with_capacity(self.shared.len());
        for shared in &self.shared {
            states.push(loop {
                let mut saved = shared.saved.lock().unwrap_or_else(PoisonError::into_inner);
                match saved.1.take() {
                    Some(state) if saved.0 == round => break state?,
                    _ => drop(saved),
                }
                if Instant::now() > deadline {
                    return Err(SaveError::Late);
                }
                std::thread::sleep(SAVE_POLL);
            });
        }
        Ok(states)
    }

    /// Returns true if all vCPUs have answered the last request for a report.
    #[must_use]
    pub fn all_answered(&self) -> bool {
        let asked = self.control.inspection.load(Ordering::Acquire);
        self.shared.iter().all(|shared| shared.inspected.load(Ordering::Acquire) == asked)
    }

    /// The counters of each vCPU as they were last shared; `None` before.
    #[must_use]
    pub fn counters(&self) -> Vec<Option<Counters>> {
        let of = |shared: &Arc<VcpuShared>| shared.counters.lock().unwrap_or_else(PoisonError::into_inner).clone();
        self.shared.iter().map(of).collect()
    }
}

struct Thread {
    shared: Arc<VcpuShared>,
    handle: JoinHandle<VcpuRecord>,
}

/// The vCPU threads of a running machine.
pub struct Threads {
    threads: Vec<Thread>,
    control: Arc<Control>,
}

const AWAKE: u8 = 0;
const HALTED: u8 = 1;
const NOT_STARTED: u8 = 2;

impl Threads {
    /// Starts all vCPUs.
    ///
    /// # Errors
    /// Where a thread cannot be started, or there is no flight recorder for a vCPU; those that run already are stopped.
    pub fn start(
        vcpus: Vec<Vcpu>,
        handler: &Arc<Handler>,
        control: &Arc<Control>,
        measure: &Measure,
        flight_recorders: &FlightRecorders,
        confinement: &Confinement,
        follow: Option<Follow>,
    ) -> io::Result<Self> {
        kick::install()?;
        let start = Anchor::now();
        let mut threads = Self { threads: Vec::new(), control: Arc::clone(control) };
        for (index, vcpu) in vcpus.into_iter().enumerate() {
            let Some(flight_recorder) = flight_recorders.of_vcpu(index) else {
                threads.stop();
                return Err(io::ErrorKind::InvalidInput.into());
            };
            let shared = Arc::new(VcpuShared {
                target: Mutex::new(None),
                inspected: AtomicU64::new(0),
                activity: AtomicU8::new(AWAKE),
                counters: Mutex::new(None),
                saved: Mutex::default(),
            });
            let work = Work {
                index,
                start,
                shared: Arc::clone(&shared),
                handler: Arc::clone(handler),
                control: Arc::clone(control),
                confinement: confinement.clone(),
                follow,
            };
            let measure = measure.clone();
            let body = move || work.start(vcpu, measure, flight_recorder);
            match std::thread::Builder::new().name(format!("vcpu{index}")).stack_size(256 << 10).spawn(body) {
                Ok(handle) => threads.threads.push(Thread { shared, handle }),
                Err(error) => {
                    threads.stop();
                    return Err(error);
                }
            }
        }
        Ok(threads)
    }

    /// Has every vCPU say whether it rests, and show its counters. Costs one exit a vCPU.
    pub fn request_report(&self) {
        self.inspector().ask();
    }

    /// For another thread that looks at the vCPUs.
    #[must_use]
    pub fn inspector(&self) -> Inspector {
        let shared = self.threads.iter().map(|thread| Arc::clone(&thread.shared)).collect();
        Inspector { shared, control: Arc::clone(&self.control) }
    }

    /// Returns true if all vCPUs have answered the last request for a report, and none can run again without a reset.
    #[must_use]
    pub fn all_halted(&self) -> bool {
        let asked = self.control.inspection.load(Ordering::Acquire);
        let state = |thread: &Thread| {
            let answered = thread.shared.inspected.load(Ordering::Acquire) == asked;
            answered.then(|| thread.shared.activity.load(Ordering::Acquire))
        };
        asked > 0
            && self.threads.iter().all(|thread| matches!(state(thread), Some(HALTED | NOT_STARTED)))
            && self.threads.iter().any(|thread| state(thread) == Some(HALTED))
    }

    /// Stops all vCPUs and takes what they leave. A vCPU that does not stop within `STOP`, as its thread waits for the host,
    /// leaves nothing.
    pub fn stop(self) -> Vec<VcpuRecord> {
        self.control.stop.store(true, Ordering::Release);
        self.control.gate.call();
        let deadline = Instant::now() + STOP;
        // All of them, again and again: one may wait for a lock that another holds while it writes to a full pipe.
        while self.threads.iter().any(|thread| !thread.handle.is_finished()) && Instant::now() < deadline {
            self.threads.iter().filter(|thread| !thread.handle.is_finished()).for_each(|thread| thread.shared.kick());
            std::thread::sleep(KICK_AGAIN);
        }
        let mut finished = Vec::new();
        for (index, thread) in self.threads.into_iter().enumerate() {
            if !thread.handle.is_finished() {
                log::error!("the thread of vCPU {index} does not end within {STOP:?}: it waits for the host");
                continue;
            }
            match thread.handle.join() {
                Ok(result) => finished.push(result),
                Err(_) => log::error!("a vCPU's thread panicked: this is a bug in hwvmm"),
            }
        }
        finished
    }
}

/// Ends the run should the thread panic: the others would wait for it for ever.
struct EndOnPanic<'a>(&'a Work);

impl Drop for EndOnPanic<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let what = format!("the thread of vCPU {} panicked: this is a bug in hwvmm", self.0.index);
            self.0.control.end(EndReason::Failed(what), Some(self.0.index));
        }
    }
}

/// What a vCPU's thread works with.
struct Work {
    index: usize,
    /// When the vCPUs were started.
    start: Anchor,
    shared: Arc<VcpuShared>,
    handler: Arc<Handler>,
    control: Arc<Control>,
    confinement: Confinement,
    follow: Option<Follow>,
}

impl Work {
    fn start(self, mut vcpu: Vcpu, measure: Measure, flight_recorder: FlightRecorder) -> VcpuRecord {
        match measure {
            Measure::Nothing => self.run(vcpu, NoProfile, flight_recorder),
            Measure::Times => self.run(vcpu, HandlerTime::default(), flight_recorder),
            Measure::Profile { start, tracer } => {
                vcpu.sync_cpl();
                if let Some(tracer) = tracer {
                    tracer.attach(self.index);
                }
                self.run(vcpu, UserProfile::new(start), flight_recorder)
            }
        }
    }

    fn run<P: Profiler>(self, mut vcpu: Vcpu, profiler: P, flight_recorder: FlightRecorder) -> VcpuRecord
    where
        Measured: From<P::Measured>,
    {
        *self.shared.target.lock().unwrap_or_else(PoisonError::into_inner) = Some(KickTarget::current());
        let counters = Counters::new(&self.handler.pio, &self.handler.mmio);
        let _guard = EndOnPanic(&self);
        let mut records = Records { counters, flight_recorder, clusters: None, profiler };
        let rip = {
            let mut running = vcpu.enter();
            records.clusters = self.follow.and_then(|follow| Clusters::new(&mut running, follow));
            let stopped = match self.confine() {
                Err(error) => Ok(Stop::End(EndReason::Failed(chain(&error)))),
                Ok(()) if self.control.is_stopping() => Ok(Stop::Asked),
                Ok(()) => run(&mut running, &self.handler, &mut records, |running, records| {
                    self.kicked(running, &records.counters)
                }),
            };
            match stopped {
                Ok(Stop::Asked) => {}
                Ok(Stop::End(end)) => self.control.end(end, Some(self.index)),
                Err(error) => self.control.end(self.failure(&error), Some(self.index)),
            }
            // Those in kvm_run are newer where an access in a cluster has ended the run.
            let synced = running.vcpu().synced_rip();
            synced.or_else(|| running.vcpu().regs().ok().map(|regs| regs.rip))
        };
        *self.shared.target.lock().unwrap_or_else(PoisonError::into_inner) = None;
        let Records { counters, flight_recorder, clusters, profiler } = records;
        let stats = vcpu.stats_fd().ok().and_then(|file| Reader::new(file).ok()?.read().ok());
        VcpuRecord {
            counts: counters.resolve(&self.handler.pio, &self.handler.mmio),
            flight_recorder: flight_recorder.resolve(&self.start, &Anchor::now()),
            clusters: clusters.map(|clusters| clusters.record()),
            measured: profiler.finish().into(),
            stats,
            rip,
            lstar: vcpu.msr(IA32_LSTAR).filter(|address| *address != 0),
        }
    }

    /// Enters the sandbox with the role of this vCPU; the thread is named after its index.
    fn confine(&self) -> Result<(), SandboxError> {
        self.confinement.sandbox.enter(self.confinement.role, &format!("vcpu{}", self.index))
    }

    /// After a kick: answers what is asked, and waits while the machine is paused. Returns true if the vCPU is to stop.
    fn kicked(&self, running: &mut Running<'_>, counters: &Counters) -> bool {
        loop {
            match self.control.gate.pass(|| self.answer(running, counters)) {
                Passed::Open => return false,
                Passed::Stops => return true,
                Passed::Waited => {
                    running.vcpu().note_pause();
                    // Those that came while it waited are answered: they are to make no exit.
                    running.clear_kick();
                }
            }
        }
    }

    /// Publishes whether the vCPU rests and what it has counted, where asked. Returns true if the vCPU is to stop.
    fn answer(&self, running: &Running<'_>, counters: &Counters) -> bool {
        let asked = self.control.inspection.load(Ordering::Acquire);
        if self.shared.inspected.load(Ordering::Acquire) != asked {
            *self.shared.counters.lock().unwrap_or_else(PoisonError::into_inner) = Some(counters.clone());
            let activity = match running.vcpu().activity() {
                Ok(VcpuActivity::HaltedForGood) => HALTED,
                Ok(VcpuActivity::NotStarted) => NOT_STARTED,
                Ok(VcpuActivity::Awake) | Err(_) => AWAKE,
            };
            self.shared.activity.store(activity, Ordering::Release);
            self.shared.inspected.store(asked, Ordering::Release);
        }
        let Saving { round, msrs } = self.control.saving.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let mut saved = self.shared.saved.lock().unwrap_or_else(PoisonError::into_inner);
        if saved.0 != round {
            *saved = (round, Some(running.vcpu().save(&msrs)));
        }
        self.control.is_stopping()
    }

    fn failure(&self, error: &KvmError) -> EndReason {
        EndReason::Kvm(format!("KVM_RUN of vCPU {} failed: {}", self.index, error.source))
    }
}
