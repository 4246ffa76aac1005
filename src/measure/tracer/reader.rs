//! Opens the tracepoints on each vCPU's thread and reads what they write, on a thread of its own.

use super::collect::{Collector, Events, VmRecord};
use super::format::FormatError;
use super::output::redirect;
use crate::error::chain;
use crate::sandbox::{Sandbox, ThreadRole};
use hwvmm_arch::layout::GpaRange;
use hwvmm_devices::path_text::PathText as _;
use perf_event::events::Tracepoint;
use perf_event::{Builder, Clock, Counter, SampleFlag, Sampler};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use thiserror::Error;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Sizes of a vCPU's ring, tried in this order: without privileges the kernel allows little locked memory.
const RING_BYTES: [usize; 4] = [8 << 20, 2 << 20, 512 << 10, 64 << 10];
/// What the rings of all vCPUs may take together, where that leaves each the smallest.
const ALL_RINGS_BYTES: usize = 64 << 20;
/// The type of a record that counts lost records (perf_event_open(2)).
const PERF_RECORD_LOST: u32 = 2;
const PERF_RECORD_SAMPLE: u32 = 9;

/// VM exits cannot be traced one by one.
#[derive(Debug, Error)]
pub enum Unavailable {
    /// No tracefs, or not for this user.
    #[error("KVM's tracepoints cannot be read at {}: {source}; {}", .path.shown(), remedy(.source))]
    Tracefs {
        /// Where they should be.
        path: PathBuf,
        /// Why the format of a tracepoint cannot be read.
        source: FormatError,
    },
    /// There is no tracepoint to open.
    #[error("the kernel has no tracepoint of VM exits")]
    NoTracepoint,
    /// No ring of any size was tried.
    #[error("there are too many vCPUs for a ring buffer for each")]
    NoRing,
    /// There are no file descriptors left.
    #[error("a tracepoint cannot be opened: {source}; raise `ulimit -n`")]
    Files {
        /// The error of the system call.
        source: io::Error,
    },
    /// perf_event_open(2) does not allow the tracepoints to be read.
    #[error(
        "perf_event_open does not allow KVM's tracepoints: {source}; run as root, or give hwvmm CAP_PERFMON, or set the \
         sysctl kernel.perf_event_paranoid to -1{}",
        paranoid()
    )]
    Perf {
        /// The error of the system call.
        source: io::Error,
    },
}

fn remedy(error: &FormatError) -> &'static str {
    match error.kind() {
        Some(io::ErrorKind::NotFound) => {
            "is tracefs mounted (mount -t tracefs tracefs /sys/kernel/tracing), and does the kernel have KVM's tracepoints?"
        }
        Some(io::ErrorKind::PermissionDenied) => {
            "run as root, or let this user read them (mount -o remount,mode=755 /sys/kernel/tracing)"
        }
        _ => "VM exits are counted in total only",
    }
}

fn perf(source: io::Error) -> Unavailable {
    match Errno::from_io_error(&source) {
        Some(Errno::MFILE | Errno::NFILE) => Unavailable::Files { source },
        _ => Unavailable::Perf { source },
    }
}

impl From<io::Error> for Unavailable {
    fn from(source: io::Error) -> Self {
        perf(source)
    }
}

fn paranoid() -> String {
    let now = std::fs::read_to_string("/proc/sys/kernel/perf_event_paranoid");
    now.map(|value| format!(" (it is {})", value.trim())).unwrap_or_default()
}

/// The events of one vCPU.
struct Source {
    vcpu: usize,
    ring: Sampler,
    /// Closed with the ring.
    _others: Vec<Counter>,
    /// The MMU's events, which are only counted.
    mmu: Vec<(&'static str, Counter)>,
    collector: Collector,
}

impl Source {
    fn drain(&mut self, events: &Events) {
        while let Some(record) = self.ring.next_record() {
            let bytes = record.to_contiguous();
            let word = |at: usize| Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?));
            match record.ty() {
                // time, size of the raw data, raw data.
                PERF_RECORD_SAMPLE => {
                    if let (Some(time_ns), Some(raw)) = (word(0), bytes.get(12..)) {
                        self.collector.record(events, time_ns, raw);
                    }
                }
                // id, how many.
                PERF_RECORD_LOST => self.collector.lost(word(8).unwrap_or(1)),
                _ => {}
            }
        }
    }
}

/// The VM exits of a run that has ended.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TraceRecord {
    /// By vCPU; `None` where its tracepoints could not be opened.
    pub vcpus: Vec<Option<VmRecord>>,
    /// Events of KVM's MMU by tracepoint (kvmmmu:*), of all vCPUs together; empty where the kernel has no such tracepoints.
    pub mmu: BTreeMap<String, u64>,
    /// What could not be traced and why, one sentence each.
    pub missing: Vec<String>,
}

struct Shared {
    events: Events,
    ram: Vec<GpaRange>,
    vcpus: usize,
    start_ns: u64,
    sources: Mutex<Vec<Source>>,
    missing: Mutex<Vec<String>>,
    epoll: Epoll,
    stop: EventFd,
}

/// For vCPU threads: opens the tracepoints on the calling thread.
#[derive(Clone)]
pub struct Handle(Arc<Shared>);

/// The tracer of a machine.
pub struct Tracer {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

fn tracefs() -> PathBuf {
    let usual = Path::new("/sys/kernel/tracing");
    let old = Path::new("/sys/kernel/debug/tracing");
    if !usual.join("events").exists() && old.join("events").exists() { old.to_owned() } else { usual.to_owned() }
}

impl Tracer {
    /// Prepares for a machine with this memory ((gpa, bytes)) and so many vCPUs; times count from `start_ns` on CLOCK_MONOTONIC.
    ///
    /// # Errors
    /// [`Unavailable`], with the remedy.
    pub fn new(ram: Vec<GpaRange>, vcpus: usize, start_ns: u64) -> Result<Self, Unavailable> {
        let path = tracefs();
        let events = Events::read(&path, Path::new("/sys"))
            .map_err(|source| Unavailable::Tracefs { path: path.join("events/kvm"), source })?;
        // Tried here, so that what is missing is said before the guest runs.
        open(events.ids().first().copied().unwrap_or(0)).map_err(perf)?;
        let epoll = Epoll::new().map_err(perf)?;
        let stop = EventFd::new(EFD_NONBLOCK).map_err(perf)?;
        epoll.ctl(ControlOperation::Add, stop.as_raw_fd(), EpollEvent::new(EventSet::IN, 0)).map_err(perf)?;
        let shared = Arc::new(Shared {
            events,
            ram,
            vcpus,
            start_ns,
            sources: Mutex::default(),
            missing: Mutex::default(),
            epoll,
            stop,
        });
        Ok(Self { shared, thread: None })
    }

    /// Starts the thread that reads, which enters `sandbox`. To be called before the vCPUs run.
    ///
    /// # Errors
    /// Returns the error of the host where it is out of threads.
    pub fn start(&mut self, sandbox: &Arc<Sandbox>) -> io::Result<()> {
        let (reader, sandbox) = (Arc::clone(&self.shared), Arc::clone(sandbox));
        let work = move || match sandbox.enter(ThreadRole::Trace, "trace") {
            Ok(()) => read(&reader),
            Err(error) => log::error!("the tracer's thread does not start: {}", chain(&error)),
        };
        self.thread = Some(std::thread::Builder::new().name("trace".into()).spawn(work)?);
        Ok(())
    }

    /// For the vCPU threads.
    #[must_use]
    pub fn handle(&self) -> Handle {
        Handle(Arc::clone(&self.shared))
    }

    /// Reads what is left, after the vCPU threads have ended.
    #[must_use]
    pub fn finish(self) -> TraceRecord {
        let vcpus = self.shared.vcpus;
        if let Err(error) = self.shared.stop.write(1) {
            log::error!("cannot wake the tracer: {error}");
        }
        if self.thread.is_some_and(|thread| thread.join().is_err()) {
            log::error!("the tracer's thread panicked: this is a bug in hwvmm");
        }
        let mut traced = TraceRecord { vcpus: vec![None; vcpus], ..TraceRecord::default() };
        let mut sources = std::mem::take(&mut *self.shared.sources.lock().unwrap_or_else(PoisonError::into_inner));
        for mut source in sources.drain(..) {
            source.drain(&self.shared.events);
            for (name, counter) in &mut source.mmu {
                *traced.mmu.entry((*name).to_owned()).or_default() += counter.read().unwrap_or(0);
            }
            if let Some(place) = traced.vcpus.get_mut(source.vcpu) {
                *place = Some(source.collector.finish());
            }
        }
        traced.missing = std::mem::take(&mut *self.shared.missing.lock().unwrap_or_else(PoisonError::into_inner));
        traced
    }
}

/// Reads the rings as they fill, until it is stopped.
fn read(shared: &Shared) {
    let mut ready = vec![EpollEvent::default(); 16];
    loop {
        match shared.epoll.wait(-1, &mut ready) {
            Ok(count) if ready.iter().take(count).any(|event| event.data() == 0) => return,
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => {
                log::error!("the tracer cannot wait: {error}");
                return;
            }
        }
        let mut sources = shared.sources.lock().unwrap_or_else(PoisonError::into_inner);
        sources.iter_mut().for_each(|source| source.drain(&shared.events));
    }
}

fn builder(id: u16) -> Builder<'static> {
    let mut builder = Builder::new(Tracepoint::with_id(u64::from(id)));
    builder
        .observe_self()
        .any_cpu()
        .include_kernel()
        .include_hv()
        .sample_period(1)
        .sample(SampleFlag::TIME | SampleFlag::RAW)
        .clockid(Clock::MONOTONIC);
    builder
}

/// An event that is counted and leaves no records.
fn counting(id: u16) -> io::Result<Counter> {
    Builder::new(Tracepoint::with_id(u64::from(id))).observe_self().any_cpu().include_kernel().include_hv().build()
}

fn open(id: u16) -> io::Result<Counter> {
    builder(id).build()
}

/// Sizes to try for each of so many rings, the largest first.
fn ring_sizes(vcpus: usize) -> impl Iterator<Item = usize> {
    let most = (ALL_RINGS_BYTES / vcpus.max(1)).max(RING_BYTES[RING_BYTES.len() - 1]);
    RING_BYTES.into_iter().filter(move |bytes| *bytes <= most)
}

/// The exit's tracepoint, with the largest ring that the system allows.
fn open_ring(id: u16, vcpus: usize) -> Result<Sampler, Unavailable> {
    let mut last = Unavailable::NoRing;
    for bytes in ring_sizes(vcpus) {
        match builder(id).wakeup_watermark(bytes / 4).build()?.sampled(bytes) {
            Ok(ring) => return Ok(ring),
            Err(error) => last = perf(error),
        }
    }
    Err(last)
}

impl Handle {
    /// Traces the calling thread as vCPU `vcpu` from here on. What fails is remembered, and the guest runs without.
    pub fn attach(&self, vcpu: usize) {
        if let Err(error) = self.try_attach(vcpu) {
            let what = format!("vCPU {vcpu}: {error}");
            self.0.missing.lock().unwrap_or_else(PoisonError::into_inner).push(what);
        }
    }

    fn try_attach(&self, vcpu: usize) -> Result<(), Unavailable> {
        let shared = &self.0;
        let ids = shared.events.ids();
        let (first, rest) = ids.split_first().ok_or(Unavailable::NoTracepoint)?;
        let mut ring = open_ring(*first, shared.vcpus)?;
        let mut others = Vec::new();
        for id in rest {
            let mut event = open(*id)?;
            redirect(&event, &ring)?;
            event.enable()?;
            others.push(event);
        }
        // Nothing is lost but these where the kernel refuses them.
        let counted = |(name, id): &(&'static str, u16)| {
            let mut counter = counting(*id).ok()?;
            counter.enable().ok()?;
            Some((*name, counter))
        };
        let mmu = shared.events.mmu().iter().filter_map(counted).collect();
        ring.enable()?;
        let readable = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, 1);
        shared.epoll.ctl(ControlOperation::Add, ring.as_raw_fd(), readable)?;
        let collector = Collector::new(shared.ram.clone(), shared.start_ns);
        let source = Source { vcpu, ring, _others: others, mmu, collector };
        shared.sources.lock().unwrap_or_else(PoisonError::into_inner).push(source);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_vcpus_have_smaller_rings() {
        assert_eq!(ring_sizes(1).next(), Some(8 << 20));
        assert_eq!(ring_sizes(64).next(), Some(512 << 10));
        assert_eq!(ring_sizes(100_000).collect::<Vec<_>>(), [64 << 10]);
    }

    #[test]
    fn what_is_missing_comes_with_its_remedy() {
        let source = FormatError::from(io::Error::from(io::ErrorKind::NotFound));
        let text = Unavailable::Tracefs { path: "/sys/x".into(), source }.to_string();
        assert!(text.contains("/sys/x") && text.contains("mount -t tracefs"), "{text}");
        let text = perf(io::Error::from(io::ErrorKind::PermissionDenied)).to_string();
        assert!(text.contains("CAP_PERFMON") && text.contains("perf_event_paranoid"), "{text}");
    }
}
