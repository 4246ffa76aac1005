//! A run's record, put together from the messages of the machine's process.

use super::message::{Message, Totals};
use crate::console::{LineState, UnreadInput};
use crate::exit::RunEnd;
use crate::kvm::clock::Anchor;
use crate::measure::record::VcpuRecord;
use crate::measure::tracer::{TraceRecord, VmRecord};
use crate::measure::{FlightRecorders, MenuEntry, RecordError, RunRecord, check_totals, check_trace};
use hwvmm_arch::boot::BootMethod;
use thiserror::Error;

/// How far the machine's process has come, as it says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Phase {
    /// It makes the machine.
    Starting,
    /// The machine is made, and its vCPUs run the guest.
    Running,
    /// The run has ended; the record is being made and sent.
    Ending,
    /// The record is complete.
    Complete,
}

/// A message came where it has no place.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("a message of kind {kind} came in the phase {phase:?}")]
pub(super) struct OutOfPlace {
    kind: &'static str,
    phase: Phase,
}

/// A message cannot be part of a record.
#[derive(Debug, Error, PartialEq, Eq)]
pub(super) enum Unusable {
    /// It has no place here.
    #[error(transparent)]
    OutOfPlace(#[from] OutOfPlace),
    /// Something in it is too long.
    #[error("a part of its record is not valid")]
    Record(#[from] RecordError),
    /// All histograms together have too many buckets.
    #[error("its histograms have more than {MAX_BUCKETS} buckets")]
    Buckets,
}

/// Checks the lengths in a message, before it is kept.
fn check(message: &Message) -> Result<(), RecordError> {
    match message {
        Message::Totals(totals) => {
            check_totals(&totals.devices, &totals.virtio, &totals.missing, totals.vm_stats.as_deref())
        }
        Message::Vcpu(vcpu) => vcpu.check_lengths(),
        Message::Trace { mmu, missing } => check_trace(mmu, missing),
        Message::VcpuTrace(Some(vcpu)) => vcpu.check_lengths(),
        Message::Entry(entry) => entry.check_lengths(),
        Message::Progress(_)
        | Message::Failed(_)
        | Message::Unbootable(_)
        | Message::Started { .. }
        | Message::WorkingSet(_)
        | Message::Ended(_)
        | Message::Unread(_)
        | Message::VcpuTrace(None)
        | Message::Complete(_) => Ok(()),
    }
}

/// The most buckets of histograms in a record, of 16 bytes each.
const MAX_BUCKETS: usize = 16 << 20;

/// Returns the number of buckets of histograms in a message.
fn buckets(message: &Message) -> usize {
    match message {
        Message::Vcpu(vcpu) => vcpu.buckets(),
        Message::VcpuTrace(Some(vcpu)) => vcpu.buckets(),
        _ => 0,
    }
}

/// What has been received of a record.
pub(super) struct Assembly {
    phase: Phase,
    /// The number of vCPUs: a record has no more.
    max_vcpus: usize,
    boot: Option<BootMethod>,
    entry: Option<MenuEntry>,
    startup_cpu_ns: u64,
    started_at_ns: u64,
    started: Option<Anchor>,
    end: Option<RunEnd>,
    totals: Option<Totals>,
    vcpus: Vec<VcpuRecord>,
    trace: Option<TraceRecord>,
    line: LineState,
    unread: Option<UnreadInput>,
    /// Why the kernel cannot be booted.
    unbootable: Option<String>,
    /// Buckets that the histograms so far have.
    buckets: usize,
}

impl Assembly {
    /// Nothing yet, of a machine with `max_vcpus` vCPUs.
    pub(super) fn new(max_vcpus: usize) -> Self {
        Self {
            phase: Phase::Starting,
            max_vcpus,
            boot: None,
            entry: None,
            startup_cpu_ns: 0,
            started_at_ns: 0,
            started: None,
            end: None,
            totals: None,
            vcpus: Vec::new(),
            trace: None,
            line: LineState::Start,
            unread: None,
            unbootable: None,
            buckets: 0,
        }
    }

    pub(super) fn phase(&self) -> Phase {
        self.phase
    }

    /// The end as the machine's process has told it.
    pub(super) fn end(&self) -> Option<&RunEnd> {
        self.end.as_ref()
    }

    /// Takes the input that the guest has not read.
    pub(super) fn take_unread(&mut self) -> UnreadInput {
        self.unread.take().unwrap_or_default()
    }

    /// Takes why the kernel cannot be booted, where the process has said that.
    pub(super) fn take_unbootable(&mut self) -> Option<String> {
        self.unbootable.take()
    }

    /// Where the guest's output has left the terminal: in the middle of a line, for all that is known, until the process says so.
    pub(super) fn line(&self) -> LineState {
        match self.phase {
            Phase::Starting | Phase::Complete => self.line,
            Phase::Running | Phase::Ending => LineState::Middle,
        }
    }

    /// Takes a message of a record. [`Message::Progress`], [`Message::Failed`] and [`Message::WorkingSet`] are none.
    ///
    /// # Errors
    /// [`Unusable`].
    pub(super) fn take(&mut self, message: Message) -> Result<(), Unusable> {
        let phase = self.phase;
        let out_of_place = |kind| Err(OutOfPlace { kind, phase }.into());
        check(&message)?;
        self.buckets = self.buckets.saturating_add(buckets(&message));
        if self.buckets > MAX_BUCKETS {
            return Err(Unusable::Buckets);
        }
        match message {
            Message::Entry(entry) if phase == Phase::Starting && self.entry.is_none() => self.entry = Some(entry),
            // A guest that runs, or has run, has a kernel that was booted.
            Message::Unbootable(why) if phase == Phase::Starting && self.unbootable.is_none() => {
                self.unbootable = Some(why);
            }
            Message::Started { boot, startup_cpu_ns, started_at_ns } if phase == Phase::Starting => {
                self.started_at_ns = started_at_ns;
                (self.boot, self.startup_cpu_ns, self.started) = (Some(boot), startup_cpu_ns, Some(Anchor::now()));
                self.phase = Phase::Running;
            }
            Message::Ended(end) if phase == Phase::Running => {
                self.end = Some(end);
                self.phase = Phase::Ending;
            }
            Message::Unread(unread) if phase == Phase::Ending && self.unread.is_none() => {
                self.unread = Some(unread.bounded());
            }
            Message::Totals(totals) if phase == Phase::Ending && self.totals.is_none() => {
                self.end = Some(totals.end.clone());
                self.totals = Some(*totals);
            }
            Message::Vcpu(vcpu) if phase == Phase::Ending && self.vcpus.len() < self.max_vcpus => {
                self.vcpus.push(*vcpu);
            }
            Message::Trace { mmu, missing } if phase == Phase::Ending && self.trace.is_none() => {
                self.trace = Some(TraceRecord { vcpus: Vec::new(), mmu, missing });
            }
            Message::VcpuTrace(vcpu) if phase == Phase::Ending => match &mut self.trace {
                Some(trace) if trace.vcpus.len() < self.max_vcpus => {
                    trace.vcpus.push(vcpu.map(|boxed: Box<VmRecord>| *boxed));
                }
                _ => return out_of_place("VcpuTrace"),
            },
            Message::Complete(line) if phase == Phase::Ending && self.totals.is_some() => {
                self.line = line;
                self.phase = Phase::Complete;
            }
            Message::WorkingSet(_) => return out_of_place("WorkingSet"),
            Message::Entry(_) => return out_of_place("Entry"),
            Message::Started { .. } => return out_of_place("Started"),
            Message::Unread(_) => return out_of_place("Unread"),
            Message::Ended(_) => return out_of_place("Ended"),
            Message::Totals(_) => return out_of_place("Totals"),
            Message::Vcpu(_) => return out_of_place("Vcpu"),
            Message::Trace { .. } => return out_of_place("Trace"),
            Message::VcpuTrace(_) => return out_of_place("VcpuTrace"),
            Message::Complete(_) => return out_of_place("Complete"),
            Message::Progress(_) => return out_of_place("Progress"),
            Message::Failed(_) => return out_of_place("Failed"),
            Message::Unbootable(_) => return out_of_place("Unbootable"),
        }
        Ok(())
    }

    /// Returns the record of a run that ended with `end`. What has not been received is empty in it; the last exits of a vCPU
    /// whose record is missing are taken from `flight_recorders`.
    pub(super) fn record(self, end: RunEnd, flight_recorders: &FlightRecorders) -> RunRecord {
        let now = Anchor::now();
        let (boot, entry, startup_cpu_ns) = (self.boot, self.entry, self.startup_cpu_ns);
        let started_at_ns = self.started_at_ns;
        let mut record = RunRecord { boot, entry, startup_cpu_ns, started_at_ns, ..RunRecord::ended(end) };
        if let Some(totals) = self.totals {
            let Totals { version, end: _, ran_ns, devices, coalesced_writes, vm_stats, virtio, memory, missing } =
                totals;
            record =
                RunRecord { version, ran_ns, devices, coalesced_writes, vm_stats, virtio, memory, missing, ..record };
        } else if let Some(started) = &self.started {
            record.ran_ns = started.ns_between(&now);
        }
        let received = self.vcpus.len();
        record.vcpus = self.vcpus;
        if let Some(start) = &self.started {
            for recorder in flight_recorders.iter().skip(received) {
                record.vcpus.push(VcpuRecord::of_last_exits(recorder.resolve(start, &now)));
            }
        }
        record.trace = self.trace.map(|mut trace| {
            // One entry a vCPU, as everybody expects.
            trace.vcpus.resize(record.vcpus.len(), None);
            trace
        });
        record
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exit::EndReason;
    use crate::measure::record::tests::sample;
    use crate::supervise::message::of_record;

    fn started(record: &RunRecord) -> [Message; 3] {
        let boot = record.boot.expect("it started");
        let entry = Message::Entry(record.entry.clone().expect("an entry"));
        let RunRecord { startup_cpu_ns, started_at_ns, .. } = *record;
        [entry, Message::Started { boot, startup_cpu_ns, started_at_ns }, Message::Ended(record.end.clone())]
    }

    #[test]
    fn a_record_is_the_same_after_the_way_through_messages() {
        let mut record = sample();
        record.vcpus.push(record.vcpus[0].clone());
        let mut assembly = Assembly::new(2);
        for message in started(&record).into_iter().chain(of_record(record.clone())) {
            assembly.take(message).expect("in its place");
        }
        assert_eq!((assembly.phase(), assembly.line()), (Phase::Ending, LineState::Middle));
        assembly.take(Message::Complete(LineState::Start)).expect("in its place");
        assert_eq!((assembly.phase(), assembly.line()), (Phase::Complete, LineState::Start));
        let recorders = FlightRecorders::new(2).expect("memory");
        assert_eq!(assembly.record(record.end.clone(), &recorders), record);
    }

    #[test]
    fn messages_out_of_place_are_refused() {
        let record = sample();
        let mut assembly = Assembly::new(1);
        let [entry, start, end] = started(&record);
        assembly.take(entry.clone()).expect("in its place");
        assert!(assembly.take(entry.clone()).is_err(), "two entries");
        assert!(assembly.take(end.clone()).is_err(), "an end before the start");
        assert!(assembly.take(Message::Complete(LineState::Start)).is_err());
        let unbootable = Message::Unbootable("no kernel".into());
        assembly.take(unbootable.clone()).expect("in its place");
        assert!(assembly.take(unbootable.clone()).is_err(), "twice");
        assert_eq!((assembly.take_unbootable(), assembly.take_unbootable()), (Some("no kernel".into()), None));
        assembly.take(start.clone()).expect("in its place");
        assert!(assembly.take(unbootable.clone()).is_err(), "of a guest that runs");
        assert!(assembly.take(start).is_err() && assembly.take(entry).is_err(), "after the start");
        let parts: Vec<Message> = of_record(record).collect();
        assert!(assembly.take(parts[0].clone()).is_err(), "a record before the end");
        assembly.take(end).expect("in its place");
        assert!(assembly.take(unbootable).is_err() && assembly.take_unbootable().is_none(), "of a guest that has run");
        assembly.take(Message::Unread(UnreadInput::default())).expect("in its place");
        assert!(assembly.take(Message::Unread(UnreadInput::default())).is_err(), "twice");
        assert!(assembly.take(Message::Complete(LineState::Start)).is_err(), "nothing to complete");
        assert!(matches!(parts[3], Message::VcpuTrace(_)) && assembly.take(parts[3].clone()).is_err());
        for part in &parts[..4] {
            assembly.take(part.clone()).expect("in its place");
        }
        for part in &parts[..3] {
            assert!(assembly.take(part.clone()).is_err(), "twice, or more vCPUs than there are: {part:?}");
        }
    }

    #[test]
    fn a_part_that_is_too_long_is_not_kept() {
        let mut record = sample();
        record.vcpus[0].stats = record.vm_stats.clone();
        let stats = record.vcpus[0].stats.as_mut().expect("statistics");
        stats[0].values = vec![1; 2000];
        let mut assembly = Assembly::new(1);
        for message in started(&record) {
            assembly.take(message).expect("in its place");
        }
        let parts: Vec<Message> = of_record(record).collect();
        assembly.take(parts[0].clone()).expect("the totals");
        assert!(matches!(assembly.take(parts[1].clone()), Err(Unusable::Record(RecordError::TooMany { .. }))));
        assert!(assembly.vcpus.is_empty());
    }

    #[test]
    fn the_last_exits_of_a_process_that_was_killed_are_in_its_record() {
        use crate::measure::ExitRecord;
        use crate::measure::flight_recorder::Detail;
        let mut assembly = Assembly::new(2);
        assembly.take(started(&sample())[1].clone()).expect("in its place");
        let recorders = FlightRecorders::new(2).expect("memory");
        let exit = ExitRecord {
            reason: crate::exit::ExitReason::Hlt,
            detail: Detail::default(),
            rip: Some(7),
            cpl: None,
            tsc: 1,
        };
        recorders.of_vcpu(1).expect("there").push(exit);
        let end = RunEnd { reason: EndReason::PowerOff, vcpu: None };
        let record = assembly.record(end, &recorders);
        let kept: Vec<usize> = record.vcpus.iter().map(|vcpu| vcpu.flight_recorder.len()).collect();
        assert_eq!((kept, record.vcpus[1].rip), (vec![0, 1], Some(7)));
    }
}
