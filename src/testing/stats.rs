//! What the statistics of a run (`hwvmm run --stats-out`) say of it. The run's end is taken from here, never from messages.

use crate::bounded_read::{self, ReadError};
use crate::exit::EndKind;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::Path;
use thiserror::Error;

/// The largest file of statistics, in bytes.
const MAX_BYTES: u64 = 32 << 20;
/// Reasons of exits that are kept: there are fewer.
const MAX_REASONS: usize = 200;

/// A run has no statistics.
#[derive(Debug, Error)]
pub(super) enum StatsError {
    /// There is no file, or it cannot be read.
    #[error("its statistics cannot be read")]
    Read(#[from] ReadError),
    /// The file is none.
    #[error("its statistics cannot be understood")]
    Json(#[from] serde_json::Error),
}

/// The end of a run, and its exits.
#[derive(Clone, Debug, Deserialize)]
pub(super) struct Stats {
    /// What kind of end it was.
    pub(super) end_kind: EndKind,
    /// The end in words, for people.
    pub(super) end: String,
    /// The status of that end.
    pub(super) status: u8,
    userspace_exits: UserspaceExits,
    kvm: Option<BTreeMap<String, u64>>,
}

#[derive(Clone, Debug, Deserialize)]
struct UserspaceExits {
    total: u64,
    by_reason: BTreeMap<String, ReasonCount>,
}

#[derive(Clone, Debug, Deserialize)]
struct ReasonCount {
    count: u64,
}

/// The exits of a test.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExitCounts {
    /// The number of userspace exits, on all vCPUs.
    pub userspace: u64,
    /// Userspace exits by reason.
    pub by_reason: BTreeMap<String, u64>,
    /// All VM exits, by KVM's own count, where it has one.
    pub vm_exits: Option<u64>,
}

impl Stats {
    /// Reads the file at `path`.
    ///
    /// # Errors
    /// [`StatsError`]
    pub(super) fn read(path: &Path) -> Result<Self, StatsError> {
        Ok(serde_json::from_slice(&bounded_read::read(path, MAX_BYTES)?)?)
    }

    pub(super) fn exits(&self) -> ExitCounts {
        let reasons = self.userspace_exits.by_reason.iter().take(MAX_REASONS);
        ExitCounts {
            userspace: self.userspace_exits.total,
            by_reason: reasons.map(|(reason, count)| (reason.clone(), count.count)).collect(),
            vm_exits: self.kvm.as_ref().and_then(|kvm| kvm.get("exits").copied()),
        }
    }

    #[cfg(test)]
    pub(super) fn of_end(end: &crate::exit::EndReason) -> Self {
        let userspace_exits = UserspaceExits { total: 7, by_reason: BTreeMap::new() };
        Self { end_kind: end.kind(), end: end.to_string(), status: end.status(), userspace_exits, kvm: None }
    }
}
