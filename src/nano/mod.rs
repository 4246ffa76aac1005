//! Nanobenchmarks: the cost of single operations in a small guest, and the exits that each makes. The operations are those of
//! Adams and Agesen's paper (ASPLOS 2006) and some newer ones. The guest also starts under any multiboot loader, so that other
//! VMMs and a bare machine are measured with the same instructions.

mod compare;
mod image;
mod run;

pub use compare::{Form, compare};
pub use image::elf;
pub use run::{NanoError, measure};

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use thiserror::Error;

/// An operation that is measured.
pub struct Operation {
    /// The name in the guest's output and in JSON.
    pub name: &'static str,
    /// What one operation does, for people.
    pub what: &'static str,
    /// The paper's figures; `None` where it does not have this operation.
    pub paper: Option<PaperCycles>,
}

/// What the paper measured of one operation, in cycles of a Pentium 4; NaN where it gives no figure.
#[derive(Clone, Copy, Debug)]
pub struct PaperCycles {
    /// On the bare processor, without virtualization.
    pub native: f64,
    /// With a software VMM (binary translation).
    pub software: f64,
    /// With a hardware VMM (VT-x without nested paging).
    pub hardware: f64,
}

const fn op(name: &'static str, what: &'static str) -> Operation {
    Operation { name, what, paper: None }
}

/// `cycles` are native, with a software VMM, with a hardware VMM.
const fn paper(name: &'static str, what: &'static str, cycles: [f64; 3]) -> Operation {
    let [native, software, hardware] = cycles;
    Operation { name, what, paper: Some(PaperCycles { native, software, hardware }) }
}

/// All operations, in the guest's order, which is the number in its marks. The first is the empty loop around each of them. The
/// paper gives no figure for syscall ("2,000 more" in software) and for cr8wr in hardware (as native): these are NaN.
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

/// How a measured machine translates guest addresses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Paging {
    /// A guest of hwvmm's, on nested page tables.
    Nested,
    /// A guest of hwvmm's, on shadow page tables.
    Shadow,
    /// A guest of hwvmm's, on a KVM that does not report its MMU.
    #[default]
    Unknown,
    /// A bare machine, or another VMM: its exits are not counted.
    None,
}

/// The results of one machine: a column of the table.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Column {
    /// The heading of the column.
    pub label: String,
    /// The version of hwvmm.
    pub hwvmm: String,
    /// The version of the host's kernel.
    pub kernel: String,
    /// The model name of the host's processor.
    pub cpu: String,
    /// The kind of paging that KVM's MMU used: nested or shadow.
    pub mmu: Paging,
    /// The commit that hwvmm was built from, where it is known (`--commit`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub commit: Option<String>,
    /// The results by the name of the operation.
    pub results: BTreeMap<String, Measured>,
}

/// The results of one operation.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Measured {
    /// TSC cycles of one operation: the median of all rounds, minus the empty loop.
    pub cycles: f64,
    /// Half the interquartile range, as a fraction of the median.
    pub spread: f64,
    /// VM exits of one operation, without host interrupts; `None` where they were not counted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exits: Option<f64>,
    /// KVM's counters that one operation increases by 0.01 or more, and userspace exits by reason.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub by: BTreeMap<String, f64>,
}

/// Why the guest's output cannot be parsed.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum ParseError {
    /// A line that the guest does not print.
    #[error("'{0}' is not a line of the nanobenchmarks' guest")]
    Line(String),
    /// The line `nano end` is missing.
    #[error("the guest did not run to its end: its last line is {}", .0.as_deref().unwrap_or("missing"))]
    Unfinished(Option<String>),
}

/// The cycles of one operation in each round: the round's cycles divided by the number of operations.
fn per_operation(count: &str, rounds: &[&str]) -> Option<Vec<f64>> {
    let number = |text: &str| u64::from_str_radix(text, 16).ok();
    let count = number(count).filter(|count| *count > 0)?;
    let all: Option<Vec<u64>> = rounds.iter().map(|text| number(text)).collect();
    // Cycles fit into the 53 bits that an f64 keeps: 2^53 cycles are a month.
    #[allow(clippy::cast_precision_loss, reason = "see above")]
    all.filter(|all| !all.is_empty()).map(|all| all.iter().map(|cycles| *cycles as f64 / count as f64).collect())
}

/// The median of `values`, and half the interquartile range as a fraction of it.
fn median_and_spread(values: &mut [f64]) -> (f64, f64) {
    values.sort_by(f64::total_cmp);
    let at = |part: usize| values.get((values.len() * part / 4).min(values.len().saturating_sub(1))).copied();
    let (low, middle, high) = (at(1).unwrap_or(0.0), at(2).unwrap_or(0.0), at(3).unwrap_or(0.0));
    (middle, if middle > 0.0 { (high - low) / 2.0 / middle } else { 0.0 })
}

/// Parses the guest's output. Lines of others, such as a boot loader, are skipped.
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
                let (cycles, spread) = median_and_spread(&mut each);
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
    fn output_is_parsed_and_the_empty_loop_is_subtracted() {
        let text = "SeaBIOS\r\nnano loop a a a a\r\nnano in 2 10 12 11\r\nnano wrmsr skipped\r\nnano end\r\n";
        let results = parse(text).expect("parsed");
        assert_eq!(results["loop"].cycles, 1.0);
        assert_eq!(results["in"].cycles, 7.5);
        assert!(results["in"].spread > 0.0 && !results.contains_key("wrmsr"));
        assert_eq!(parse("nano loop a 1"), Err(ParseError::Unfinished(Some("nano loop a 1".into()))));
        assert_eq!(parse(""), Err(ParseError::Unfinished(None)));
        assert!(matches!(parse("nano in 0 1"), Err(ParseError::Line(_))));
        assert!(matches!(parse("nano in 1 x"), Err(ParseError::Line(_))));
    }

    #[test]
    fn operations_have_the_order_of_the_guest() {
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
