//! Output of the guest's console: how many times it is written to the host.

use super::harness::{Outcome, Test};
use super::{guests, hwvmm, kernel, text, when_it_runs};
use rustix::pipe::{PipeFlags, fcntl_setpipe_size, pipe_with};
use std::os::fd::AsFd as _;
use std::process::Stdio;
use std::time::Instant;

/// The output of a guest, each write(2) by itself: those to a pipe with O_DIRECT are packets, up to 4 KiB each (pipe(2)).
fn writes(options: &[&str]) -> Vec<Vec<u8>> {
    let (reader, writer) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::DIRECT).expect("a pipe");
    // Each packet takes a page of the pipe.
    fcntl_setpipe_size(&reader, 1 << 20).expect("set");
    let child = hwvmm()
        .args(["run", "-m", "16M", "--timeout", "20s"])
        .args(options)
        .arg(kernel("polled", guests::polled_lines()))
        .stdout(Stdio::from(writer))
        .stderr(Stdio::piped())
        .spawn()
        .expect("started");
    let mut packets = Vec::new();
    loop {
        let mut packet = vec![0; 4096];
        let count = rustix::io::retry_on_intr(|| rustix::io::read(reader.as_fd(), &mut packet[..])).expect("read");
        if count == 0 {
            break;
        }
        packet.truncate(count);
        packets.push(packet);
    }
    let out = child.wait_with_output().expect("ended");
    assert_eq!(out.status.code(), Some(0), "{}", text(&out.stderr));
    let line = "0123456789012345678901234567890123456789012345678\n";
    assert_eq!(text(&packets.concat()), format!("{}end", line.repeat(200)));
    packets
}

/// 200 lines of 50 bytes, and one without an end.
fn polled_output_is_written_in_lines() -> Outcome {
    when_it_runs(|| {
        assert_eq!(writes(&["--tune", "coalesced-io=off"]).len(), 10_003, "each byte by itself");
        let start = Instant::now();
        let count = writes(&[]).len();
        // The thread that flushes ten times a second may divide a line each time; it looks once more when it is stopped.
        let flushes = usize::try_from(start.elapsed().as_millis() / 100).expect("small") + 2;
        assert!(count <= 201 + flushes, "{count} writes, and at most {flushes} flushes");
    })
}

pub(super) const TESTS: &[Test] = &[("polled_output_is_written_in_lines", polled_output_is_written_in_lines)];
