//! The flight recorder: the last exits of a vCPU, printed when a run fails.

use crate::exit::ExitReason;
use crate::kvm::Exit;
use crate::kvm::clock::Anchor;
use serde::{Deserialize, Serialize};
use std::fmt;

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

/// Exits that are kept.
pub const KEPT: usize = 256;

/// The last [`KEPT`] exits.
#[derive(Clone, Debug)]
pub struct FlightRecorder {
    ring: Vec<ExitRecord>,
    next: usize,
}

impl Default for FlightRecorder {
    fn default() -> Self {
        Self { ring: Vec::with_capacity(KEPT), next: 0 }
    }
}

impl FlightRecorder {
    /// Adds an exit; overwrites the oldest where [`KEPT`] are there.
    pub fn push(&mut self, record: ExitRecord) {
        match self.ring.get_mut(self.next) {
            Some(slot) => *slot = record,
            None => self.ring.push(record),
        }
        self.next = (self.next + 1) % KEPT;
    }

    /// The exits, oldest first.
    pub fn iter(&self) -> impl Iterator<Item = &ExitRecord> {
        // Until the ring is full, nothing is overwritten: the next place is behind the last one filled.
        let (newer, older) = self.ring.split_at(self.next.min(self.ring.len()));
        older.iter().chain(newer)
    }

    /// Returns the exits with their times, oldest first. The time-stamp counter is converted by what both clocks did between
    /// `start`, from which times count, and `end`.
    #[must_use]
    pub fn resolve(&self, start: &Anchor, end: &Anchor) -> Vec<FlightEntry> {
        let entry = |record: &ExitRecord| {
            let ExitRecord { reason, detail, rip, cpl, tsc } = *record;
            FlightEntry { at_ns: start.ns_until(tsc, end), reason, detail, rip, cpl }
        };
        self.iter().map(entry).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(address: u64) -> ExitRecord {
        let detail = Detail { address, data: 0x41, size: 1, count: 1 };
        ExitRecord { reason: ExitReason::PioOut, detail, rip: Some(0x1000), cpl: None, tsc: 0 }
    }

    #[test]
    fn the_oldest_go_first() {
        let mut flight_recorder = FlightRecorder::default();
        let kept =
            |flight_recorder: &FlightRecorder| flight_recorder.iter().map(|s| s.detail.address).collect::<Vec<u64>>();
        (0..20).for_each(|address| flight_recorder.push(record(address)));
        assert_eq!(kept(&flight_recorder), (0..20).collect::<Vec<_>>());
        (20..260).for_each(|address| flight_recorder.push(record(address)));
        assert_eq!(kept(&flight_recorder), (4..260).collect::<Vec<_>>());
    }

    #[test]
    fn a_line_has_what_one_looks_for() {
        let mut flight_recorder = FlightRecorder::default();
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
