//! Nanobenchmarks: what single operations cost a bare guest, and how many exits each makes: those of Adams and Agesen's paper
//! (ASPLOS 2006) and some of today's. The guest is hwvmm's own, and starts under any multiboot loader too, so that other VMMs
//! and a bare machine are measured with the same instructions.

mod compare;
mod image;
mod run;

pub use compare::{Form, compare};
pub use image::elf;
pub use run::measure;

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use thiserror::Error;

/// An operation: its name in the guest, what one of it is, and what the paper found, in cycles of a Pentium 4: native, software
/// VMM, hardware VMM.
pub struct Operation {
    /// As the guest and JSON have it.
    pub name: &'static str,
    /// For people.
    pub what: &'static str,
    /// The paper's figures, where it has this operation.
    pub paper: Option<[f64; 3]>,
}

const fn op(name: &'static str, what: &'static str) -> Operation {
    Operation { name, what, paper: None }
}

const fn paper(name: &'static str, what: &'static str, paper: [f64; 3]) -> Operation {
    Operation { name, what, paper: Some(paper) }
}

/// All operations, in the guest's order (which is the number in its marks). The first is the empty loop around all of them.
/// The paper gives syscall as "2,000 more" in software, and cr8wr in hardware as native: they are left out there (NaN).
pub const OPERATIONS: [Operation; 27] = [
    op("loop", "the loop around each operation"),
    paper("syscall", "user mode to kernel and back, by SYSCALL and SYSRET", [f64::NAN, f64::NAN, f64::NAN]),
    paper("in", "IN from port 0x80", [3209.0, 210.0, 15826.0]),
    paper("cr8wr", "a write to CR8 that unmasks nothing", [140.0, 35.0, f64::NAN]),
    paper("callret", "an indirect call and its return", [11.0, 51.0, 11.0]),
    paper("pgfault", "a page fault that the guest handles", [1093.0, 3927.0, 11242.0]),
    paper("divzero", "a divide fault that the guest handles", [889.0, 3223.0, 1014.0]),
    paper("ptemod", "a store to an entry of a page table in use", [1.0, 391.0, 12733.0]),
    op("pteuse", "the same, INVLPG, and a use of the page"),
    op("pdemod", "a store to an entry one level up, and a use of the page"),
    op("cpuid", "CPUID, leaf 0"),
    op("rdmsr", "RDMSR of the APIC's base"),
    op("wrmsr", "WRMSR of x2APIC's end of interrupt"),
    op("rdtsc", "RDTSC"),
    op("out", "OUT to a port in user space"),
    op("outk", "OUT to a port that KVM answers (ioeventfd)"),
    op("strout", "REP OUTSB of 64 bytes to a port in user space"),
    op("mmio", "a read of a device's memory in user space"),
    op("mmiosplit", "the same over the end of a page"),
    op("hypercall", "VMCALL or VMMCALL"),
    op("invlpg", "INVLPG"),
    op("cr3wr", "a write of CR3"),
    op("cr3pcid", "the same with PCID, flushing nothing"),
    op("switch", "a write of CR3 for another address space, and 16 of its pages"),
    op("populate", "a new entry in a page table, and a first use of its page"),
    op("hltwake", "HLT until the APIC's timer, 20,000 of its ticks ahead, wakes it"),
    op("ipi", "an IPI to a vCPU in HLT, and one back that ends this one's HLT"),
];

/// What one machine's column of the table holds.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Column {
    /// Its head.
    pub label: String,
    /// The version of hwvmm.
    pub hwvmm: String,
    /// The kernel of the host.
    pub kernel: String,
    /// The host's processor.
    pub cpu: String,
    /// KVM's MMU: "nested", "shadow", or "none" for a machine that is not hwvmm's.
    pub mmu: String,
    /// What was built, where that is known (`--commit`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub commit: Option<String>,
    /// By operation's name.
    pub results: BTreeMap<String, Measured>,
}

/// What was measured of an operation.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Measured {
    /// Cycles of the time-stamp counter that one takes: the median of all rounds, less the empty loop.
    pub cycles: f64,
    /// Half the distance of the quartiles, as a part of the median.
    pub spread: f64,
    /// VM exits that one makes, but for the host's interrupts; `None` where nobody counted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exits: Option<f64>,
    /// KVM's own counters that one moves by a hundredth or more, and userspace exits by reason.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub by: BTreeMap<String, f64>,
}

/// The guest's words cannot be read.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum ParseError {
    /// A line that is none of the guest's.
    #[error("'{0}' is no line of the nanobenchmarks' guest")]
    Line(String),
    /// The last line is missing.
    #[error("the guest did not come to its end: its last line is {}", .0.as_deref().unwrap_or("missing"))]
    Unfinished(Option<String>),
}

/// One operation's cycles, all rounds of them, divided by its count.
fn per_operation(count: &str, rounds: &[&str]) -> Option<Vec<f64>> {
    let number = |text: &str| u64::from_str_radix(text, 16).ok();
    let count = number(count).filter(|count| *count > 0)?;
    let all: Option<Vec<u64>> = rounds.iter().map(|text| number(text)).collect();
    // Cycles fit into the 53 bits that an f64 keeps: 2^53 cycles are a month.
    #[allow(clippy::cast_precision_loss, reason = "see above")]
    all.filter(|all| !all.is_empty()).map(|all| all.iter().map(|cycles| *cycles as f64 / count as f64).collect())
}

/// The median, and half the distance of the quartiles as a part of it.
fn median(values: &mut [f64]) -> (f64, f64) {
    values.sort_by(f64::total_cmp);
    let at = |part: usize| values.get((values.len() * part / 4).min(values.len().saturating_sub(1))).copied();
    let (low, middle, high) = (at(1).unwrap_or(0.0), at(2).unwrap_or(0.0), at(3).unwrap_or(0.0));
    (middle, if middle > 0.0 { (high - low) / 2.0 / middle } else { 0.0 })
}

/// Reads what the guest said. Other lines than its own, such as a loader's, are passed over.
///
/// # Errors
/// [`ParseError`].
pub fn parse(text: &str) -> Result<BTreeMap<String, Measured>, ParseError> {
    let mut results = BTreeMap::new();
    let mut last = None;
    let mut empty = 0.0;
    for line in text.lines().map(str::trim).filter(|line| line.starts_with("nano ")) {
        last = Some(line.to_owned());
        let words: Vec<&str> = line.split_whitespace().skip(1).collect();
        match words[..] {
            ["end"] => return Ok(results),
            [_, "skipped"] => {}
            [name, count, ref rounds @ ..] => {
                let mut each = per_operation(count, rounds).ok_or_else(|| ParseError::Line(line.to_owned()))?;
                let (cycles, spread) = median(&mut each);
                if name == OPERATIONS[0].name {
                    empty = cycles;
                }
                let cycles = if name == OPERATIONS[0].name { cycles } else { (cycles - empty).max(0.0) };
                results.insert(name.to_owned(), Measured { cycles, spread, ..Measured::default() });
            }
            _ => return Err(ParseError::Line(line.to_owned())),
        }
    }
    Err(ParseError::Unfinished(last))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_guests_words_are_read_with_the_loop_taken_off() {
        let text = "SeaBIOS\r\nnano loop a a a a\r\nnano in 2 10 12 11\r\nnano wrmsr skipped\r\nnano end\r\n";
        let results = parse(text).expect("its words");
        assert_eq!(results["loop"].cycles, 1.0);
        assert_eq!(results["in"].cycles, 7.5);
        assert!(results["in"].spread > 0.0 && !results.contains_key("wrmsr"));
        assert_eq!(parse("nano loop a 1"), Err(ParseError::Unfinished(Some("nano loop a 1".into()))));
        assert_eq!(parse(""), Err(ParseError::Unfinished(None)));
        assert!(matches!(parse("nano in 0 1"), Err(ParseError::Line(_))));
        assert!(matches!(parse("nano in 1 x"), Err(ParseError::Line(_))));
    }

    #[test]
    fn the_table_is_the_guests() {
        let guest = image::guest();
        for (number, operation) in OPERATIONS.iter().enumerate() {
            let mut name = operation.name.as_bytes().to_vec();
            name.resize(16, 0);
            let at = guest.windows(16).position(|bytes| bytes == name).expect(operation.name);
            let first = guest.windows(16).position(|bytes| bytes.starts_with(b"loop\0")).expect("the first");
            assert_eq!(at, first + number * 32, "{}", operation.name);
        }
    }
}
