//! The flight recorder: the last exits of a vCPU, printed when a run fails.

use crate::exit::ExitReason;
use crate::kvm::Exit;
use crate::kvm::clock::Anchor;
use crate::memory::SharedWords;
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::{fmt, io};

/// The access that an exit was for; all zero where it was for none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Detail {
    /// Port, gpa, MSR index or hypercall number, by the exit's reason.
    pub address: u64,
    /// The first eight bytes read or written, little-endian.
    pub data: u64,
    /// Size of one item in bytes.
    pub size: usize,
    /// Number of items: more than one for a string instruction.
    pub count: usize,
}

impl Detail {
    /// Takes the details of an exit that has been handled: the data of a read are what the guest gets.
    #[must_use]
    pub fn of(exit: &Exit<'_>) -> Self {
        match exit {
            Exit::Pio { port, size, data, .. } => {
                Self { address: u64::from(*port), data: first_bytes(data), size: *size, count: data.len() / size }
            }
            Exit::MmioRead { gpa, data } => Self::access(*gpa, data),
            Exit::MmioWrite { gpa, data } => Self::access(*gpa, data),
            Exit::MsrRead { index, data, .. } => Self { address: u64::from(*index), data: **data, size: 8, count: 1 },
            Exit::MsrWrite { index, data, .. } => Self { address: u64::from(*index), data: *data, size: 8, count: 1 },
            Exit::Hypercall { number, .. } => Self { address: *number, ..Self::default() },
            Exit::MemoryFault { gpa, .. } => Self { address: *gpa, ..Self::default() },
            _ => Self::default(),
        }
    }

    fn access(address: u64, data: &[u8]) -> Self {
        Self { address, data: first_bytes(data), size: data.len(), count: 1 }
    }
}

fn first_bytes(data: &[u8]) -> u64 {
    data.iter().take(8).rev().fold(0, |value, byte| value << 8 | u64::from(*byte))
}

/// One exit, as the run loop writes it down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExitRecord {
    /// Reason of the exit.
    pub reason: ExitReason,
    /// The access that it was for.
    pub detail: Detail,
    /// Address of the instruction; `None` where KVM does not copy registers out with the exit (KVM_CAP_SYNC_REGS).
    pub rip: Option<u64>,
    /// Privilege level, 0 to 3; `None` unless a profile is made.
    pub cpl: Option<u8>,
    /// Time-stamp counter of the host when the exit had been handled.
    pub tsc: u64,
}

/// One exit of a vCPU whose thread has ended: an [`ExitRecord`] with its time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FlightEntry {
    /// Time since the vCPUs were started, in nanoseconds.
    pub at_ns: u64,
    /// Reason of the exit.
    pub reason: ExitReason,
    /// The access that it was for.
    pub detail: Detail,
    /// Address of the instruction, where it is known.
    pub rip: Option<u64>,
    /// Privilege level, 0 to 3, where it is known.
    pub cpl: Option<u8>,
}

impl FlightEntry {
    /// Returns true if both exits are the same but for their times.
    #[must_use]
    pub fn is_same_exit(&self, other: &Self) -> bool {
        (self.reason, self.detail, self.rip, self.cpl) == (other.reason, other.detail, other.rip, other.cpl)
    }
}

impl fmt::Display for FlightEntry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:<14}", self.reason.name())?;
        let Detail { address, data, size, count } = self.detail;
        if size > 0 {
            write!(f, " {address:#x} size {size}")?;
            if count != 1 {
                write!(f, " × {count}")?;
            }
            write!(f, " data {data:#x}")?;
        } else if address != 0 {
            write!(f, " {address:#x}")?;
        }
        match self.rip {
            Some(rip) => write!(f, " rip {rip:#x}"),
            None => Ok(()),
        }
    }
}

/// Exits that are kept of each vCPU.
pub const KEPT: usize = 256;

/// Words of one exit.
const ENTRY_WORDS: usize = 6;
/// Words of a vCPU: the number of exits so far, then the exits.
const VCPU_WORDS: usize = 1 + KEPT * ENTRY_WORDS;
/// In place of a privilege level that is not known.
const NO_CPL: u8 = 0xff;

/// The flight recorders of all vCPUs, in memory that is shared with forked processes: the parent of a machine's process reads
/// them when that process was killed.
#[derive(Clone)]
pub struct FlightRecorders(Arc<SharedWords>);

impl FlightRecorders {
    /// Makes empty recorders for `vcpus` vCPUs, 12 KiB each once they are full.
    ///
    /// # Errors
    /// Returns an error if the memory cannot be mapped.
    pub fn new(vcpus: usize) -> io::Result<Self> {
        SharedWords::new(vcpus.saturating_mul(VCPU_WORDS)).map(|shared| Self(Arc::new(shared)))
    }

    /// Returns the recorder of a vCPU; `None` where there is no vCPU with this index.
    #[must_use]
    pub fn of_vcpu(&self, index: usize) -> Option<FlightRecorder> {
        let first = index.checked_mul(VCPU_WORDS)?;
        self.0.words().get(first..first.checked_add(VCPU_WORDS)?)?;
        Some(FlightRecorder { shared: Arc::clone(&self.0), first })
    }

    /// Returns the recorders of all vCPUs.
    pub fn iter(&self) -> impl Iterator<Item = FlightRecorder> {
        (0..self.0.words().len() / VCPU_WORDS).filter_map(|index| self.of_vcpu(index))
    }
}

/// The last [`KEPT`] exits of a vCPU.
pub struct FlightRecorder {
    shared: Arc<SharedWords>,
    /// Index of the first word.
    first: usize,
}

impl FlightRecorder {
    fn words(&self) -> &[AtomicU64] {
        self.shared.words().get(self.first..self.first + VCPU_WORDS).unwrap_or_default()
    }

    /// Adds an exit; overwrites the oldest where [`KEPT`] are there. Only the thread of the vCPU may call it.
    pub fn push(&self, record: ExitRecord) {
        let Some((pushed, entries)) = self.words().split_first() else { return };
        let count = pushed.load(Ordering::Relaxed);
        let first = place(count);
        let Some(entry) = entries.get(first..first + ENTRY_WORDS) else { return };
        for (word, value) in entry.iter().zip(encode(&record)) {
            word.store(value, Ordering::Relaxed);
        }
        pushed.store(count.wrapping_add(1), Ordering::Release);
    }

    /// Returns the exits, oldest first. What a process that writes at the same time leaves half-written is left out where it is
    /// no exit, and wrong where it is one.
    pub fn iter(&self) -> impl Iterator<Item = ExitRecord> {
        let words = self.words();
        let pushed = words.first().map_or(0, |word| word.load(Ordering::Acquire));
        let kept = pushed.min(KEPT as u64);
        (pushed - kept..pushed).filter_map(|count| {
            let first = 1 + place(count);
            let mut values = [0; ENTRY_WORDS];
            for (value, word) in values.iter_mut().zip(words.get(first..first + ENTRY_WORDS)?) {
                *value = word.load(Ordering::Relaxed);
            }
            decode(values)
        })
    }

    /// Returns the exits with their times, oldest first. The time-stamp counter is converted by what both clocks did between
    /// `start`, from which times count, and `end`.
    #[must_use]
    pub fn resolve(&self, start: &Anchor, end: &Anchor) -> Vec<FlightEntry> {
        let entry = |record: ExitRecord| {
            let ExitRecord { reason, detail, rip, cpl, tsc } = record;
            FlightEntry { at_ns: start.ns_until(tsc, end), reason, detail, rip, cpl }
        };
        self.iter().map(entry).collect()
    }
}

/// Index of the first word of the exit before which there were `count`, among the words behind the number of exits.
fn place(count: u64) -> usize {
    usize::try_from(count % KEPT as u64).unwrap_or(0) * ENTRY_WORDS
}

/// The words of an exit. Word 0: the reason in byte 0, the privilege level in byte 1, 1 in byte 2 where RIP is known. Word 1: the
/// size of an item in the upper half, their number in the lower.
fn encode(record: &ExitRecord) -> [u64; ENTRY_WORDS] {
    let ExitRecord { reason, detail, rip, cpl, tsc } = *record;
    let has_rip = u8::from(rip.is_some());
    let head = u64::from_le_bytes([reason as u8, cpl.unwrap_or(NO_CPL), has_rip, 0, 0, 0, 0, 0]);
    let half = |value: usize| u64::from(u32::try_from(value).unwrap_or(u32::MAX));
    let items = half(detail.size) << 32 | half(detail.count);
    [head, items, detail.address, detail.data, rip.unwrap_or(0), tsc]
}

/// `None` where the words are no exit.
fn decode([head, items, address, data, rip, tsc]: [u64; ENTRY_WORDS]) -> Option<ExitRecord> {
    let [reason, cpl, has_rip, ..] = head.to_le_bytes();
    let reason = *ExitReason::ALL.get(usize::from(reason))?;
    let half = |value: u64| usize::try_from(value & u64::from(u32::MAX)).unwrap_or(0);
    let (size, count) = (half(items >> 32), half(items));
    let cpl = (cpl != NO_CPL).then_some(cpl);
    let detail = Detail { address, data, size, count };
    Some(ExitRecord { reason, detail, rip: (has_rip == 1).then_some(rip), cpl, tsc })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(address: u64) -> ExitRecord {
        let detail = Detail { address, data: 0x41, size: 1, count: 1 };
        ExitRecord { reason: ExitReason::PioOut, detail, rip: Some(0x1000), cpl: None, tsc: 0 }
    }

    fn recorder() -> FlightRecorder {
        FlightRecorders::new(2).expect("memory").of_vcpu(1).expect("the second of two")
    }

    #[test]
    fn every_exit_is_read_as_it_was_written() {
        let recorders = FlightRecorders::new(2).expect("memory");
        let recorder = recorders.of_vcpu(1).expect("the second of two");
        assert!(recorders.of_vcpu(2).is_none());
        let detail = Detail { address: u64::MAX, data: u64::MAX, size: 8, count: 4096 };
        let records: Vec<ExitRecord> = ExitReason::ALL
            .iter()
            .flat_map(|reason| {
                let all = ExitRecord { reason: *reason, detail, rip: Some(u64::MAX), cpl: Some(3), tsc: u64::MAX };
                [all, ExitRecord { detail: Detail::default(), rip: None, cpl: None, tsc: 0, ..all }]
            })
            .collect();
        records.iter().for_each(|record| recorder.push(*record));
        assert_eq!(recorder.iter().collect::<Vec<_>>(), records);
        assert_eq!(recorders.iter().map(|one| one.iter().count()).collect::<Vec<_>>(), [0, records.len()]);
    }

    #[test]
    fn words_that_are_no_exit_are_left_out() {
        let recorder = recorder();
        recorder.push(record(1));
        recorder.words()[0].store(u64::MAX, Ordering::Relaxed);
        recorder.words()[1].store(u64::MAX, Ordering::Relaxed);
        assert!(recorder.iter().count() < KEPT);
    }

    #[test]
    fn the_oldest_go_first() {
        let flight_recorder = recorder();
        let kept =
            |flight_recorder: &FlightRecorder| flight_recorder.iter().map(|s| s.detail.address).collect::<Vec<u64>>();
        (0..20).for_each(|address| flight_recorder.push(record(address)));
        assert_eq!(kept(&flight_recorder), (0..20).collect::<Vec<_>>());
        (20..260).for_each(|address| flight_recorder.push(record(address)));
        assert_eq!(kept(&flight_recorder), (4..260).collect::<Vec<_>>());
    }

    #[test]
    fn a_line_has_what_one_looks_for() {
        let flight_recorder = recorder();
        let start = Anchor::now();
        flight_recorder.push(ExitRecord { tsc: crate::kvm::clock::tsc(), ..record(0x3f8) });
        flight_recorder.push(record(0x3f8));
        let entries = flight_recorder.resolve(&start, &Anchor::now());
        assert_eq!(entries[0].to_string(), "pio_out        0x3f8 size 1 data 0x41 rip 0x1000");
        assert!(entries[0].is_same_exit(&entries[1]));
        assert_eq!(entries[1].at_ns, 0, "before the start");
    }

    #[test]
    fn data_are_little_endian_and_cut_to_eight_bytes() {
        assert_eq!(first_bytes(&[1, 2]), 0x201);
        assert_eq!(first_bytes(&[0xff; 9]), u64::MAX);
    }
}
