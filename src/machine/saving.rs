//! A run that saves its machine, and ends then (`--template`, `--snapshot-at`).

use super::save::unsaved;
use super::setup::Setup;
use crate::control::{Live, RequestError};
use crate::error::chain;
use crate::exit::EndReason;
use crate::snapshot::Files;
use std::io;
use std::sync::{Arc, OnceLock};
use thiserror::Error;

/// Saves the machine, and returns the end of the run.
pub(super) type Save = Arc<dyn Fn() -> EndReason + Send + Sync>;

/// The machine could not be saved.
#[derive(Debug, Error)]
pub enum SavingError {
    /// It has devices whose state cannot be.
    #[error("--snapshot-at")]
    Unsaved(#[source] RequestError),
    /// fcntl(2) failed.
    #[error("cannot copy the files of the snapshot")]
    Files(#[source] io::Error),
}

/// Returns what saves the machine of `live`. It is paused for good then: what it wrote to its disks later would not be in the snapshot.
///
/// # Errors
/// [`SavingError::Unsaved`] where a machine that is to save itself has devices without a state: before its guest has run for it.
pub(super) fn saver(setup: &Setup<'_>, live: Option<Arc<OnceLock<Live>>>) -> Result<Save, SavingError> {
    let options = unsaved(setup.config).join(", ");
    if setup.config.snapshot_at.is_some() && !options.is_empty() {
        return Err(SavingError::Unsaved(RequestError::Unsaved { options }));
    }
    let files = setup.save_to.map(Files::try_clone).transpose().map_err(SavingError::Files)?;
    Ok(Arc::new(move || {
        let (Some(files), Some(live)) = (&files, live.as_ref().and_then(|live| live.get())) else {
            return EndReason::Failed("a machine that does not run cannot be saved".into());
        };
        let saved = if live.pause() { live.snapshot(files) } else { Err(RequestError::Busy) };
        match saved {
            Ok(_) => EndReason::Saved,
            Err(error) => EndReason::Failed(format!("the guest cannot be saved: {}", chain(&error))),
        }
    }))
}
