//! The flight recorder, written down: the last exits of each vCPU, with the functions that made them.

use super::render::time;
use super::symbols::Symbols;
use crate::machine::RunRecord;
use crate::measure::ExitRecord;
use std::fmt::Write as _;

/// One line for equal exits that follow each other.
struct Line<'a> {
    first: &'a ExitRecord,
    times: usize,
}

fn same(a: &ExitRecord, b: &ExitRecord) -> bool {
    (a.reason, a.detail, a.rip, a.cpl) == (b.reason, b.detail, b.rip, b.cpl)
}

/// The last exits of each vCPU, oldest first.
#[must_use]
pub fn flight_recorder(finish: &RunRecord, symbols: Option<&Symbols>) -> String {
    let mut text = String::new();
    for (index, vcpu) in finish.vcpus.iter().enumerate() {
        let mut lines: Vec<Line<'_>> = Vec::new();
        for exit in vcpu.flight_recorder.iter() {
            match lines.last_mut() {
                Some(last) if same(last.first, exit) => last.times += 1,
                _ => lines.push(Line { first: exit, times: 1 }),
            }
        }
        let count: usize = lines.iter().map(|line| line.times).sum();
        let _ = writeln!(text, "hwvmm: the last {count} userspace exits of vCPU {index}, oldest first:");
        for Line { first, times } in lines {
            let at = time(vcpu.clock.0.ns_until(first.tsc, &vcpu.clock.1));
            let place = first.rip.and_then(|rip| symbols?.resolve(rip));
            let place = place.map(|place| format!(" {}+{:#x}", place.function, place.offset)).unwrap_or_default();
            let again = if times > 1 { format!(" ({times} times)") } else { String::new() };
            let _ = writeln!(text, "hwvmm:   {at:>8} {first}{place}{again}");
        }
    }
    text
}
