//! A run that saves its machine by itself (`--snapshot-at`), and ends then.

use super::run::RunError;
use super::save::unsaved;
use crate::config::RunConfig;
use crate::control::{Live, RequestError};
use crate::exit::EndReason;
use crate::snapshot::Files;
use crate::vcpu::Control;
use hwvmm_devices::legacy::MarkPort;
use hwvmm_devices::{Action, BusDevice};
use std::sync::{Arc, OnceLock};

/// Saves the machine when it is asked for.
pub(super) struct Saving<'a> {
    files: &'a Files,
    live: Arc<OnceLock<Live>>,
}

impl<'a> Saving<'a> {
    /// The machine of `config` is saved to `files`.
    ///
    /// # Errors
    /// [`RunError::Unsaved`] where it has devices that have no state: before the guest has run for it.
    pub(super) fn new(config: &RunConfig, files: &'a Files, live: Arc<OnceLock<Live>>) -> Result<Self, RunError> {
        let options = unsaved(config).join(", ");
        if options.is_empty() {
            Ok(Self { files, live })
        } else {
            Err(RunError::Unsaved(RequestError::Unsaved { options }))
        }
    }

    /// Pauses the machine for good and saves it. What it writes to its disks is then not behind the snapshot's back. Returns the end of the
    /// run.
    pub(super) fn save(&self) -> EndReason {
        let saved = self
            .live
            .get()
            .ok_or(RequestError::NotRunning)
            .and_then(|live| if live.pause() { live.snapshot(self.files) } else { Err(RequestError::Busy) });
        match saved {
            Ok(_) => EndReason::Saved,
            Err(RequestError::Save { message }) => EndReason::Failed(format!("no snapshot was made: {message}")),
            Err(error) => EndReason::Failed(format!("no snapshot was made: {error}")),
        }
    }
}

/// The port for marks of a machine that is saved when the guest writes a number there.
pub(super) struct SavingMark {
    number: u32,
    control: Arc<Control>,
}

impl SavingMark {
    pub(super) fn new(number: u32, control: &Arc<Control>) -> Self {
        Self { number, control: Arc::clone(control) }
    }
}

impl BusDevice for SavingMark {
    fn read(&self, offset: u64, data: &mut [u8]) {
        MarkPort.read(offset, data);
    }

    fn write(&self, offset: u64, data: &[u8]) -> Action {
        // A shorter write is of a shorter number.
        let mut number = [0; 4];
        if offset == 0 && data.len() <= number.len() {
            number[..data.len()].copy_from_slice(data);
            if u32::from_le_bytes(number) == self.number {
                self.control.request_snapshot();
            }
        }
        Action::None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_number_asks_for_a_snapshot() {
        let control = Arc::new(Control::new().expect("a control"));
        let port = SavingMark::new(7, &control);
        for (offset, data) in [(0, &[8_u8, 0, 0, 0][..]), (1, &[7]), (0, &[7, 1]), (0, &[]), (0, &[7, 0, 0, 0, 0])] {
            port.write(offset, data);
            assert!(!control.take_snapshot_request(), "{offset} {data:?}");
        }
        for data in [&[7_u8, 0, 0, 0][..], &[7]] {
            port.write(0, data);
            assert!(control.take_snapshot_request() && !control.take_snapshot_request(), "{data:?}");
        }
    }

    #[test]
    fn a_line_asks_for_a_snapshot_where_one_is_wanted() {
        let control = Control::new().expect("a control");
        control.save_at_line();
        control.line_seen(EndReason::Seen("up".into()));
        assert!(control.take_snapshot_request() && control.ended().is_none());
        control.line_seen(EndReason::Panicked(None));
        assert!(!control.take_snapshot_request());
        assert_eq!(control.ended().map(|end| end.reason), Some(EndReason::Panicked(None)));
    }
}
