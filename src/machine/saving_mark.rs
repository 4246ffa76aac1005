//! The port for marks of a machine that is saved at one of them.

use crate::vcpu::Control;
use hwvmm_devices::legacy::MarkPort;
use hwvmm_devices::{Action, BusDevice};
use std::sync::Arc;

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
    use crate::exit::EndReason;

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
