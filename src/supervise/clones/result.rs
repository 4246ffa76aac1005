//! How a clone has ended, and what it took.

use crate::exit::EndKind;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::Instant;

/// The longest statistics of a run that are read, in bytes.
const MAX_STATS_BYTES: u64 = 4 << 20;

/// How a clone has ended, and what it took.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct CloneResult {
    /// Which one, counted from 0.
    pub clone: u32,
    /// The exit status of its run; 128 and the number of a signal that ended it.
    pub status: u8,
    /// The end of its run; `None` where that is not known, as where the run did not start.
    pub end: Option<String>,
    /// The kind of that end, as in --status-file.
    pub end_kind: Option<EndKind>,
    /// Microseconds from the start of its process until its guest was about to run.
    pub first_instruction_us: Option<u64>,
    /// Microseconds from the start of its process until the first line of its output.
    pub first_line_us: Option<u64>,
    /// Microseconds from the start of its process until that had ended.
    pub ended_us: u64,
    /// Memory that only this clone has, in KiB: what the guest and both processes of hwvmm have written.
    pub own_kib: Option<u64>,
    /// The part of it that is the guest's.
    pub guest_own_kib: Option<u64>,
    /// Exits to user space.
    pub userspace_exits: Option<u64>,
    /// VM exits, as KVM counts them.
    pub vm_exits: Option<u64>,
}

/// What is read of the statistics of a run.
#[derive(Deserialize)]
struct Stats {
    end: String,
    end_kind: EndKind,
    started_at_ns: u64,
    userspace_exits: Exits,
    kvm: Option<BTreeMap<String, u64>>,
    memory: Option<Memory>,
}

#[derive(Deserialize)]
struct Exits {
    total: u64,
}

#[derive(Deserialize)]
struct Memory {
    guest_own_kib: u64,
    own_kib: Option<u64>,
}

impl CloneResult {
    /// Takes the statistics of the run whose process was started at `spawned_ns` (CLOCK_MONOTONIC). They are missing where it did not start.
    pub(super) fn read(&mut self, stats: &File, spawned_ns: u64) {
        let Some(stats) = bytes_of(stats).and_then(|bytes| serde_json::from_slice::<Stats>(&bytes).ok()) else {
            return;
        };
        self.end = Some(stats.end);
        self.end_kind = Some(stats.end_kind);
        self.first_instruction_us = stats.started_at_ns.checked_sub(spawned_ns).map(|nanoseconds| nanoseconds / 1000);
        self.userspace_exits = Some(stats.userspace_exits.total);
        self.vm_exits = stats.kvm.and_then(|kvm| kvm.get("exits").copied());
        if let Some(memory) = stats.memory {
            (self.own_kib, self.guest_own_kib) = (memory.own_kib, Some(memory.guest_own_kib));
        }
    }
}

fn bytes_of(file: &File) -> Option<Vec<u8>> {
    let length = file.metadata().ok()?.len();
    let mut bytes = vec![0; usize::try_from(length).ok().filter(|_| length <= MAX_STATS_BYTES)?];
    file.read_exact_at(&mut bytes, 0).ok()?;
    Some(bytes)
}

/// Microseconds since `start`.
pub(super) fn microseconds(start: Instant) -> u64 {
    u64::try_from(start.elapsed().as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_statistics_have_is_taken() {
        let file = |text: &str| {
            let file = tempfile::tempfile().expect("a file");
            file.write_all_at(text.as_bytes(), 0).expect("written");
            file
        };
        let text = r#"{"schema":1,"end":"e","end_kind":"power-off","started_at_ns":9000,"userspace_exits":{"total":3},
            "kvm":{"exits":7},"memory":{"guest_kib":9,"guest_own_kib":5,"own_kib":6}}"#;
        let mut result = CloneResult::default();
        result.read(&file(text), 4000);
        let expected = CloneResult {
            end: Some("e".into()),
            end_kind: Some(EndKind::PowerOff),
            first_instruction_us: Some(5),
            own_kib: Some(6),
            guest_own_kib: Some(5),
            userspace_exits: Some(3),
            vm_exits: Some(7),
            ..CloneResult::default()
        };
        assert_eq!(result, expected);
        for text in ["", "{", r#"{"end":1}"#] {
            let mut result = CloneResult::default();
            result.read(&file(text), 0);
            assert_eq!(result, CloneResult::default());
        }
        let mut never = CloneResult::default();
        never.read(&file(&text.replace("9000", "0").replace("{\"exits\":7}", "null")), 4000);
        assert_eq!((never.first_instruction_us, never.vm_exits), (None, None));
    }
}
