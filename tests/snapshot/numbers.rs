//! The guest `touch`, which reads 4 MiB and writes 1 MiB again and again, and prints a number each time.

use super::harness::{folder, text};
use super::{Machine, guests};
use std::path::PathBuf;

/// A snapshot of the guest, and the last whole number that it printed.
pub(super) fn snapshot(name: &str) -> (PathBuf, u32) {
    let machine = Machine::boot(name, guests::touch(), &["-m", "32M"]);
    let snapshot = folder().join(name);
    machine.answer(&["pause"]);
    machine.snapshot(&snapshot);
    let last = *numbers(&text(&machine.output())).last().expect("numbers");
    machine.stop();
    (snapshot, last)
}

/// The numbers of whole lines.
pub(super) fn numbers(output: &str) -> Vec<u32> {
    let whole = output.split_inclusive('\n').filter(|line| line.ends_with('\n') && line.len() == 9);
    whole.map(|line| number(line.trim())).collect()
}

/// The number whose eight digits, from '0' to '?', are these.
pub(super) fn number(line: &str) -> u32 {
    line.bytes().fold(0, |number, digit| number << 4 | u32::from(digit - b'0'))
}

/// The eight digits of a number, as the guest prints it.
pub(super) fn digits(number: u32) -> String {
    (0..8).rev().map(|digit| char::from(b'0' + (number >> (4 * digit) & 15) as u8)).collect()
}
