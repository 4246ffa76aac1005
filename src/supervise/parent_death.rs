//! A run that ends with the process that started it.

use super::signals::with_default_action;
use crate::exit::Signal;
use rustix::process::{Signal as ProcessSignal, getppid, set_parent_process_death_signal};
use std::io;
use thiserror::Error;

/// This process cannot be made to end with its parent.
#[derive(Debug, Error)]
pub enum ParentDeathError {
    /// prctl(2) failed.
    #[error("--end-with-parent: PR_SET_PDEATHSIG")]
    Prctl(#[source] io::Error),
    /// The parent is gone already, or was never this process.
    #[error("--end-with-parent {0}: this process has another parent")]
    NotParent(i32),
}

/// Has SIGTERM sent to this process when its parent, the process with the ID `parent`, ends (PR_SET_PDEATHSIG); SIGKILL where this
/// process ignores SIGTERM, as its parent may have had it.
///
/// # Errors
/// [`ParentDeathError`].
pub fn end_with_parent(parent: i32) -> Result<(), ParentDeathError> {
    let is_taken = !with_default_action([Signal::TERM]).is_empty();
    let signal = if is_taken { ProcessSignal::TERM } else { ProcessSignal::KILL };
    set_parent_process_death_signal(Some(signal)).map_err(|error| ParentDeathError::Prctl(error.into()))?;
    // A parent that was gone before that call sends no signal.
    let found = getppid().map(|found| found.as_raw_nonzero().get());
    if found == Some(parent) { Ok(()) } else { Err(ParentDeathError::NotParent(parent)) }
}
