//! An I/O APIC (82093AA data sheet §3) for a split irqchip, where the local APICs are KVM's. Each unmasked redirection entry
//! becomes a GSI route to its message; there is no other delivery, and all lines are edge-triggered.

use crate::bus::{Action, BusDevice};
use crate::error::chain;
use crate::half::Half;
use crate::pci::{MsiMessage, MsiRouter};
use serde::{Deserialize, Serialize};
use std::sync::{Arc, Mutex, PoisonError};
use thiserror::Error;

/// Offset in bytes of IOREGSEL, which selects a register.
const SELECT: u64 = 0x00;
/// Offset in bytes of IOWIN, which accesses the selected register.
const WINDOW: u64 = 0x10;
const REG_ID: u8 = 0;
/// The bits of the identification register that can be written.
const ID: u32 = 0x0f00_0000;
const REG_VERSION: u8 = 1;
const REG_ARBITRATION: u8 = 2;
const FIRST_ENTRY: u8 = 0x10;
/// The version of KVM's own I/O APIC: without an EOI register.
const VERSION: u32 = 0x11;

const MASKED: u64 = 1 << 16;
/// The read-only bits of an entry: delivery status and remote IRR.
const READ_ONLY: u64 = 1 << 12 | 1 << 14;
const MSI_ADDRESS: u64 = 0xfee0_0000;

/// The registers of an [`IoApic`], for a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IoApicState {
    select: u8,
    id: u32,
    /// The redirection entries, by pin.
    entries: Vec<u64>,
}

/// The registers are those of an I/O APIC with another number of pins.
#[derive(Debug, Error)]
#[error("the state of the I/O APIC has {found} pins, and the machine {pins}")]
pub struct IoApicStateError {
    found: usize,
    pins: usize,
}

struct State {
    select: u8,
    id: u32,
    entries: Vec<u64>,
}

/// An I/O APIC with up to 120 pins.
pub struct IoApic {
    first_gsi: u32,
    state: Mutex<State>,
    router: Arc<dyn MsiRouter>,
}

/// Half of a redirection entry, as a 32-bit register.
struct EntryRegister {
    pin: usize,
    half: Half,
}

impl EntryRegister {
    fn from_select(select: u8) -> Option<Self> {
        let register = select.checked_sub(FIRST_ENTRY)?;
        let half = if register.is_multiple_of(2) { Half::Low } else { Half::High };
        Some(Self { pin: usize::from(register / 2), half })
    }
}

/// Returns the message of a redirection entry (SDM vol. 3A §11.11), without its trigger mode.
fn message(entry: u64) -> MsiMessage {
    let (destination, logical) = (entry >> 56, entry >> 11 & 1);
    let data = u32::try_from(entry & 0x7ff).unwrap_or(0);
    MsiMessage { address: MSI_ADDRESS | destination << 12 | logical << 2, data }
}

impl IoApic {
    /// Size of the register region in bytes.
    pub const BYTES: u64 = 0x20;

    /// Makes an I/O APIC with `pins` pins, all masked. Pin n is GSI `first_gsi + n` of `router`.
    #[must_use]
    pub fn new(first_gsi: u32, pins: u32, router: Arc<dyn MsiRouter>) -> Self {
        let entries = (0..pins.min(120)).map(|_| MASKED).collect();
        Self { first_gsi, state: Mutex::new(State { select: 0, id: 0, entries }), router }
    }

    /// Returns its registers.
    #[must_use]
    pub fn save(&self) -> IoApicState {
        let State { select, id, entries } = &*self.state.lock().unwrap_or_else(PoisonError::into_inner);
        IoApicState { select: *select, id: *id, entries: entries.clone() }
    }

    /// Sets its registers, and the routes of the pins that are not masked.
    ///
    /// # Errors
    /// [`IoApicStateError`], where `state` is that of another I/O APIC.
    pub fn restore(&self, saved: &IoApicState) -> Result<(), IoApicStateError> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let (found, pins) = (saved.entries.len(), state.entries.len());
        if found != pins {
            return Err(IoApicStateError { found, pins });
        }
        state.id = saved.id & ID;
        for (pin, entry) in saved.entries.iter().enumerate() {
            // The high half first: a route is made with the low one.
            for half in [Half::High, Half::Low] {
                self.set_entry(&mut state, &EntryRegister { pin, half }, half.get(*entry));
            }
        }
        state.select = saved.select;
        Ok(())
    }

    fn set_entry(&self, state: &mut State, register: &EntryRegister, value: u32) {
        let pin = register.pin;
        let Some(entry) = state.entries.get_mut(pin) else { return };
        let old = *entry;
        register.half.set(entry, value);
        *entry = old & READ_ONLY | *entry & !READ_ONLY;
        let (new, gsi) = (*entry, self.first_gsi + u32::try_from(pin).unwrap_or(0));
        let result = if new & MASKED != 0 {
            if old & MASKED == 0 { self.router.unroute(gsi) } else { Ok(()) }
        } else {
            self.router.route(gsi, message(new))
        };
        if let Err(error) = result {
            log::warn!("I/O APIC: pin {pin} with redirection entry {new:#x}: {}", chain(&error));
        }
    }
}

impl BusDevice for IoApic {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let value = match (offset, state.select) {
            (SELECT, select) => u32::from(select),
            (WINDOW, REG_ID | REG_ARBITRATION) => state.id,
            (WINDOW, REG_VERSION) => VERSION | u32::try_from(state.entries.len().saturating_sub(1)).unwrap_or(0) << 16,
            (WINDOW, select) => {
                let value = |register: EntryRegister| Some(register.half.get(*state.entries.get(register.pin)?));
                EntryRegister::from_select(select).and_then(value).unwrap_or(0)
            }
            _ => 0,
        };
        data.fill(0);
        let bytes = value.to_le_bytes();
        let count = data.len().min(bytes.len());
        data[..count].copy_from_slice(&bytes[..count]);
    }

    fn write(&self, offset: u64, data: &[u8]) -> Action {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        match (offset, data) {
            (SELECT, [select, ..]) => state.select = *select,
            (WINDOW, &[a, b, c, d]) => {
                let value = u32::from_le_bytes([a, b, c, d]);
                match state.select {
                    REG_ID => state.id = value & ID,
                    select => {
                        if let Some(register) = EntryRegister::from_select(select) {
                            self.set_entry(&mut state, &register, value);
                        }
                    }
                }
            }
            _ => {}
        }
        Action::None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pci::RouteError;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    #[derive(Default)]
    struct Routes(Mutex<BTreeMap<u32, MsiMessage>>);
    impl MsiRouter for Routes {
        fn route(&self, gsi: u32, message: MsiMessage) -> Result<(), RouteError> {
            self.0.lock().expect("lock").insert(gsi, message);
            Ok(())
        }
        fn unroute(&self, gsi: u32) -> Result<(), RouteError> {
            self.0.lock().expect("lock").remove(&gsi);
            Ok(())
        }
    }

    fn set(chip: &IoApic, register: u8, value: u32) {
        chip.write(SELECT, &u32::from(register).to_le_bytes());
        chip.write(WINDOW, &value.to_le_bytes());
    }

    fn get(chip: &IoApic, register: u8) -> u32 {
        let mut data = [0; 4];
        chip.write(SELECT, &[register]);
        chip.read(WINDOW, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn an_unmasked_pin_is_a_route() {
        let routes = Arc::new(Routes::default());
        let chip = IoApic::new(4, 2, Arc::clone(&routes) as _);
        assert_eq!((get(&chip, 1), get(&chip, 0x10), get(&chip, 0x14)), (0x1_0011, 0x1_0000, 0));
        set(&chip, 0x13, 3 << 24);
        set(&chip, 0x12, 0x31);
        assert_eq!(routes.0.lock().expect("lock").get(&5), Some(&MsiMessage { address: 0xfee0_3000, data: 0x31 }));
        // Read-only bits do not change; logical destination mode; lowest priority delivery.
        set(&chip, 0x12, 0x5931);
        assert_eq!(get(&chip, 0x12), 0x0931);
        assert_eq!(routes.0.lock().expect("lock").get(&5), Some(&MsiMessage { address: 0xfee0_3004, data: 0x131 }));
        set(&chip, 0x12, 0x1_0031);
        assert!(routes.0.lock().expect("lock").is_empty());
        set(&chip, 0, 0xffff_ffff);
        assert_eq!(get(&chip, 0), 0x0f00_0000);
    }

    #[test]
    fn registers_and_routes_are_restored() {
        let routes = || Arc::new(Routes::default());
        let (before, after) = (routes(), routes());
        let chip = IoApic::new(4, 3, Arc::clone(&before) as _);
        set(&chip, 0, 0x0300_0000);
        set(&chip, 0x13, 3 << 24);
        set(&chip, 0x12, 0x31);
        let state = chip.save();
        let other = IoApic::new(4, 3, Arc::clone(&after) as _);
        other.restore(&state).expect("as many pins");
        assert_eq!(other.save(), state);
        assert_eq!((get(&other, 0x12), get(&other, 0x13), get(&other, 0)), (0x31, 3 << 24, 0x0300_0000));
        assert_eq!(*before.0.lock().expect("lock"), *after.0.lock().expect("lock"));
        let error = IoApic::new(4, 2, routes()).restore(&state).expect_err("refused").to_string();
        assert!(error.contains("3 pins, and the machine 2"), "{error}");
    }

    proptest! {
        #[test]
        fn any_access_is_survived(writes in proptest::collection::vec((0_u64..0x20, proptest::collection::vec(any::<u8>(), 0..9)), 0..50)) {
            let routes = Arc::new(Routes::default());
            let chip = IoApic::new(4, 3, Arc::clone(&routes) as _);
            for (offset, data) in writes {
                chip.write(offset, &data);
                chip.read(offset, &mut data.clone());
            }
            prop_assert!(routes.0.lock().expect("lock").keys().all(|gsi| (4..7).contains(gsi)));
        }
    }
}
