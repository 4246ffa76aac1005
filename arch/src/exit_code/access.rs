//! The direction of an access that made a VM exit.

use serde::{Deserialize, Serialize};

/// The direction of a guest's access to a port, a register or memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AccessKind {
    /// The guest reads.
    Read,
    /// The guest writes. Of the instructions on control registers, MOV to CR, CLTS and LMSW are writes.
    Write,
}

impl AccessKind {
    /// The direction of an access, from a bit that says whether it is a write.
    pub(super) const fn of_write(write: bool) -> Self {
        if write { Self::Write } else { Self::Read }
    }
}
