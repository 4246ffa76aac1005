//! What is asked of the vCPUs of a paused machine for a snapshot.

use crate::kvm::KvmError;
use std::sync::Arc;
use thiserror::Error;

/// A request for the state of each vCPU.
#[derive(Clone, Default)]
pub(super) struct Saving {
    /// Raised with each request.
    pub(super) round: u64,
    /// The MSRs that the state has.
    pub(super) msrs: Arc<[u32]>,
}

/// The state of a vCPU cannot be had.
#[derive(Debug, Error)]
pub enum SaveError {
    /// An ioctl failed.
    #[error("the state of a virtual processor cannot be read")]
    Kvm(#[from] KvmError),
    /// A vCPU did not answer in time.
    #[error("a virtual processor does not tell its state in time")]
    Late,
}
