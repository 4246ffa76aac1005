//! Why a machine has no result.

use crate::sandbox::ForkError;
use std::io;
use thiserror::Error;

/// The machine could not be started or its process not be watched.
#[derive(Debug, Error)]
pub enum SuperviseError {
    /// The process for the machine could not be started.
    #[error(transparent)]
    Fork(#[from] ForkError),
    /// Sockets, shared memory, poll(2), waitpid(2).
    #[error("cannot {0}")]
    Io(&'static str, #[source] io::Error),
    /// The machine's process says that it failed: why.
    #[error("{0}")]
    Machine(String),
    /// The machine's process says that the kernel cannot be booted: why.
    #[error("{0}")]
    Unbootable(String),
}
