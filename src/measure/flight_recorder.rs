//! The last exits of a vCPU, kept for the day that the run ends badly.

use crate::exit::ExitReason;
use crate::kvm::Exit;
use std::fmt;

/// What is kept of one exit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Detail {
    /// Port, gpa, MSR index or hypercall number.
    pub address: u64,
    /// The first eight bytes read or written, little-endian.
    pub data: u64,
    /// Bytes in one item.
    pub size: usize,
    /// Items.
    pub count: usize,
}

impl Detail {
    /// Takes what there is from an exit that has been handled (so that data read are those the guest gets).
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

/// One exit as it is remembered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExitRecord {
    /// Why.
    pub reason: ExitReason,
    /// With what.
    pub detail: Detail,
    /// Where, if KVM tells it with the exit.
    pub rip: Option<u64>,
    /// At which privilege level, if that was asked for.
    pub cpl: Option<u8>,
    /// When, on the time-stamp counter.
    pub tsc: u64,
}

impl fmt::Display for ExitRecord {
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

/// How many exits are remembered.
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
    /// Remembers an exit in place of the oldest.
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
        assert_eq!(record(0x3f8).to_string(), "pio_out        0x3f8 size 1 data 0x41 rip 0x1000");
    }

    #[test]
    fn data_are_little_endian_and_cut_to_eight_bytes() {
        assert_eq!(first_bytes(&[1, 2]), 0x201);
        assert_eq!(first_bytes(&[0xff; 9]), u64::MAX);
    }
}
