//! The sleep and reset registers of hardware-reduced ACPI (ACPI 6.5 §4.8.3.6, §4.8.3.7), as ports.

use crate::bus::{Action, BusDevice};

const SLEEP_CONTROL: u64 = 0;
const SLEEP_STATUS: u64 = 1;
const RESET: u64 = 2;
const SLEEP_ENABLE: u8 = 1 << 5;
const SLEEP_TYPE_SHIFT: u8 = 2;

/// The sleep control, sleep status and reset registers, on three ports in this order.
pub struct Power {
    sleep_type_off: u8,
    reset_value: u8,
}

impl Power {
    /// Makes the registers. `sleep_type_off` is the sleep type of `_S5` in the DSDT, `reset_value` the RESET_VALUE of the FADT.
    #[must_use]
    pub fn new(sleep_type_off: u8, reset_value: u8) -> Self {
        Self { sleep_type_off, reset_value }
    }
}

impl BusDevice for Power {
    fn read(&self, offset: u64, data: &mut [u8]) {
        if matches!(offset, SLEEP_CONTROL | SLEEP_STATUS | RESET) {
            data.fill(0);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) -> Action {
        let [value] = *data else { return Action::None };
        match offset {
            SLEEP_CONTROL if value & SLEEP_ENABLE != 0 => {
                let sleep_type = value >> SLEEP_TYPE_SHIFT & 7;
                if sleep_type == self.sleep_type_off {
                    return Action::PowerOff;
                }
                log::warn!("the guest requested the sleep type {sleep_type}, which is not supported: ignored");
                Action::None
            }
            RESET if value == self.reset_value => Action::Reset,
            _ => Action::None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_s5_with_enable_turns_off() {
        let power = Power::new(5, 1);
        assert_eq!(power.write(0, &[5 << 2]), Action::None);
        assert_eq!(power.write(0, &[4 << 2 | 0x20]), Action::None);
        assert_eq!(power.write(0, &[5 << 2 | 0x20]), Action::PowerOff);
        assert_eq!(power.write(2, &[0]), Action::None);
        assert_eq!(power.write(2, &[1, 1]), Action::None);
        assert_eq!(power.write(2, &[1]), Action::Reset);
    }
}
