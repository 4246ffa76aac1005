//! What the end of a machine's process says of a crash.

use crate::exit::Crash;
use crate::sandbox::{PANICKED, Refused};
use rustix::process::{Signal, WaitStatus};
use std::fs::File;

/// The crash of a process that ended with `status`; `reports` has the system call that the sandbox refused, if there was one.
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
