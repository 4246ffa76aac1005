//! Ends of the machine's process that it did not choose.

use super::assembly::Unusable;
use super::channel::ChannelError;
use crate::exit::Crash;
use crate::sandbox::{PANICKED, Refused};
use rustix::process::{Signal, WaitStatus};
use std::fs::File;
use std::time::Duration;
use thiserror::Error;

/// How long the machine's process may go without a message once it should end.
pub(super) const GRACE: Duration = Duration::from_secs(2);
/// How long it may take to save its guest: a second for each GiB that is not zero, as a rule.
pub(super) const SAVE: Duration = Duration::from_secs(600);

/// Why the parent killed the machine's process.
#[derive(Debug, Error)]
pub(super) enum Killed {
    #[error("it did not end within {} s", GRACE.as_secs())]
    Late,
    #[error("it was not saved within {} s", SAVE.as_secs())]
    NotSaved,
    #[error("the guest did not run yet")]
    Starting,
    #[error(transparent)]
    Channel(#[from] ChannelError),
    #[error(transparent)]
    Unusable(#[from] Unusable),
}

/// What a process that has ended with `status` died of. Its sandbox has written what it refused to `reports`.
pub(super) fn crash(status: WaitStatus, reports: &File) -> Crash {
    let refused = (status.terminating_signal() == Some(Signal::SYS.as_raw())).then(|| Refused::read(reports)).flatten();
    if let Some(refused) = refused {
        return Crash::Refused(refused.to_string());
    }
    match (status.terminating_signal(), status.exit_status()) {
        (Some(signal), _) => Crash::Signal(signal),
        (None, Some(status)) if status == i32::from(PANICKED) => Crash::Panicked,
        (None, status) => Crash::Exited(status.unwrap_or(0)),
    }
}
