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

/// How much of the flight recorder is printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extent {
    /// All exits that were kept.
    All,
    /// The last lines of each vCPU: on a terminal, more would scroll the console's last lines away.
    LastLines,
}

/// Lines of each vCPU with [`Extent::LastLines`].
const LAST_LINES: usize = 16;

/// Returns the last exits of each vCPU, oldest first.
#[must_use]
pub fn flight_recorder(record: &RunRecord, symbols: Option<&Symbols>, extent: Extent) -> String {
    let mut text = String::new();
    for (index, vcpu) in record.vcpus.iter().enumerate() {
        let mut lines: Vec<Line<'_>> = Vec::new();
        for exit in &vcpu.flight_recorder {
            match lines.last_mut() {
                Some(last) if last.first.is_same_exit(exit) => last.times += 1,
                _ => lines.push(Line { first: exit, times: 1 }),
            }
        }
        let left_out = match extent {
            Extent::All => 0,
            Extent::LastLines => lines.len().saturating_sub(LAST_LINES),
        };
        lines.drain(..left_out);
        let count: usize = lines.iter().map(|line| line.times).sum();
        let more = if left_out > 0 {
            format!(" (-v shows all {} that were kept)", vcpu.flight_recorder.len())
        } else {
            String::new()
        };
        let _ = writeln!(text, "hwvmm: the last {count} userspace exits of vCPU {index}{more}, oldest first:");
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::measure::record::tests::sample;

    #[test]
    fn a_terminal_gets_the_last_lines_and_a_file_gets_all() {
        let mut record = sample();
        let entry = record.vcpus[0].flight_recorder[0];
        // 40 different exits, the last of them ten times.
        let exits = (0..40).map(|at_ns| FlightEntry { at_ns, rip: Some(at_ns), ..entry });
        record.vcpus[0].flight_recorder = exits.chain((0..9).map(|_| FlightEntry { rip: Some(39), ..entry })).collect();
        let all = flight_recorder(&record, None, Extent::All);
        assert!(all.starts_with("hwvmm: the last 49 userspace exits of vCPU 0, oldest first:\n"), "{all}");
        assert_eq!(all.lines().count(), 41);
        let last = flight_recorder(&record, None, Extent::LastLines);
        assert!(
            last.starts_with("hwvmm: the last 25 userspace exits of vCPU 0 (-v shows all 49 that were kept), "),
            "{last}"
        );
        assert_eq!(last.lines().count(), 1 + LAST_LINES);
        assert_eq!(last.lines().last(), all.lines().last());
        assert!(last.ends_with("rip 0x27 (10 times)\n"), "{last}");
    }
}
