//! Input of the guest's console, from stdin.

use super::harness::{Outcome, Test};
use super::{file, guests, hwvmm, kernel, run_with_input, text, when_it_runs};
use std::fs;

fn input_from_a_pipe_is_complete() -> Outcome {
    when_it_runs(|| {
        let sent = format!("{}.", "the quick brown fox ".repeat(40));
        let out = run_with_input(guests::echo(), &[], sent.clone().into_bytes());
        assert_eq!(text(&out.stdout), sent, "{}", text(&out.stderr));
        // The same input from a regular file, which epoll cannot wait for.
        let input = fs::File::open(file("input.txt", sent.as_bytes())).expect("opened");
        let path = kernel("echo", guests::echo());
        let out =
            hwvmm().args(["run", "-m", "16M", "--timeout", "30s"]).arg(path).stdin(input).output().expect("started");
        assert_eq!(text(&out.stdout), sent, "{}", text(&out.stderr));
    })
}

/// Sends `bytes` bytes to a guest that prints their hash.
fn reads_all(code: &'static [u8], bytes: usize) -> Outcome {
    when_it_runs(|| {
        let input: Vec<u8> = (0..bytes).map(|at| u8::try_from((at + at / 7919) % 251).expect("small")).collect();
        let hash = input.iter().fold(0_u32, |hash, byte| hash.wrapping_mul(33).wrapping_add(u32::from(*byte)));
        let out = run_with_input(code, &["--timeout", "100s"], input);
        assert_eq!(text(&out.stdout), format!("{hash:08X}\n"), "{}", text(&out.stderr));
    })
}

pub(super) const TESTS: &[Test] = &[
    ("input_from_a_pipe_is_complete", input_from_a_pipe_is_complete),
    ("a_paste_of_1_mib_is_complete", || reads_all(guests::read_in_bursts(), 1 << 20)),
    ("input_reaches_a_guest_that_reads_a_byte_for_each_interrupt", || reads_all(guests::read_by_the_byte(), 1 << 14)),
];
