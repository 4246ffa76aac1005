//! The flight recorder as text: the last exits of each vCPU, with the functions that made them.

use super::symbols::Symbols;
use super::units::time;
use crate::measure::RunRecord;
use crate::measure::flight_recorder::FlightEntry;
use std::fmt::Write as _;

/// A line: one exit, or equal exits that follow each other.
struct Line<'a> {
    first: &'a FlightEntry,
    times: usize,
}

/// Returns the last exits of each vCPU, oldest first.
#[must_use]
pub fn flight_recorder(record: &RunRecord, symbols: Option<&Symbols>) -> String {
    let mut text = String::new();
    for (index, vcpu) in record.vcpus.iter().enumerate() {
        let mut lines: Vec<Line<'_>> = Vec::new();
        for exit in &vcpu.flight_recorder {
            match lines.last_mut() {
                Some(last) if last.first.is_same_exit(exit) => last.times += 1,
                _ => lines.push(Line { first: exit, times: 1 }),
            }
        }
        let count: usize = lines.iter().map(|line| line.times).sum();
        let _ = writeln!(text, "hwvmm: the last {count} userspace exits of vCPU {index}, oldest first:");
        for Line { first, times } in lines {
            let at = time(first.at_ns);
            let place = first.rip.and_then(|rip| symbols?.resolve(rip));
            let place = place.map(|place| format!(" {}+{:#x}", place.function, place.offset)).unwrap_or_default();
            let again = if times > 1 { format!(" ({times} times)") } else { String::new() };
            let _ = writeln!(text, "hwvmm:   {at:>8} {first}{place}{again}");
        }
    }
    text
}
