//! MSI-X (PCI Local Bus 3.0 §6.8.2): a table of messages, each with a mask bit and a pending bit.

use super::msi::{MsiMessage, MsiRouter, MsiVector};
use crate::error::chain;
use crate::half::Half;
use crate::irq::note_raised;
use crate::page::{PageError, RegisterPage};
use serde::{Deserialize, Serialize};
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Size in bytes of a table entry: message address, message upper address, message data, vector control.
const ENTRY_BYTES: u64 = 16;
/// The same in words of 32 bits.
const ENTRY_WORDS: usize = 4;
/// Vector control: the mask bit.
const MASKED: u32 = 1;

struct Entry {
    vector: MsiVector,
    address: u64,
    data: u32,
    control: u32,
    pending: bool,
    /// The message that the vector's GSI is routed to.
    routed: Option<MsiMessage>,
}

impl Entry {
    fn message(&self) -> MsiMessage {
        MsiMessage { address: self.address, data: self.data }
    }

    fn is_masked(&self) -> bool {
        self.control & MASKED != 0
    }
}

/// The writable bits of the MSI-X message control.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MsixControl {
    /// MSI-X Enable: the function may send its vectors.
    pub enabled: bool,
    /// Function Mask: all vectors are masked, whatever their own mask bits.
    pub function_masked: bool,
}

impl MsixControl {
    fn may_send(self) -> bool {
        self.enabled && !self.function_masked
    }
}

/// An entry of the table, for a snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct EntryState {
    address: u64,
    data: u32,
    control: u32,
    pending: bool,
}

/// The table, for a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MsixState {
    entries: Vec<EntryState>,
}

struct State {
    entries: Vec<Entry>,
    control: MsixControl,
}

/// The MSI-X table of a function.
pub struct Msix {
    state: Mutex<State>,
    router: Arc<dyn MsiRouter>,
    page: RegisterPage,
}

impl Msix {
    /// Makes a table with one entry for each of `vectors`, all masked. MSI-X is disabled.
    ///
    /// # Errors
    /// Returns [`PageError`] where the page of the table cannot be mapped.
    pub fn new(vectors: Vec<MsiVector>, router: Arc<dyn MsiRouter>) -> Result<Self, PageError> {
        let entry = |vector| Entry { vector, address: 0, data: 0, control: MASKED, pending: false, routed: None };
        let entries = vectors.into_iter().map(entry).collect();
        let state = Mutex::new(State { entries, control: MsixControl::default() });
        let msix = Self { state, router, page: RegisterPage::all_ones()? };
        msix.show_all(&msix.state());
        Ok(msix)
    }

    /// Returns a page with what reads of the table return, for a guest that reads it without an access. A table of more than 256 entries
    /// is not all in it.
    pub(crate) fn page(&self) -> &RegisterPage {
        &self.page
    }

    fn show_all(&self, state: &State) {
        for (index, entry) in state.entries.iter().enumerate() {
            self.show(index, entry);
        }
    }

    /// Writes an entry to the page.
    fn show(&self, index: usize, entry: &Entry) {
        let at = index.saturating_mul(ENTRY_WORDS * 4);
        let words = [Half::Low.get(entry.address), Half::High.get(entry.address), entry.data, entry.control];
        for (register, word) in (at..RegisterPage::BYTES).step_by(4).zip(words) {
            self.page.write_register(register, word);
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the number of entries.
    #[must_use]
    pub fn len(&self) -> u16 {
        u16::try_from(self.state().entries.len()).unwrap_or(u16::MAX)
    }

    /// Returns true if there are no entries.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Sets the message control, and sends what is pending and no longer masked.
    pub fn set_control(&self, control: MsixControl) {
        let mut state = self.state();
        state.control = control;
        for index in 0..state.entries.len() {
            self.update(&mut state, index);
        }
    }

    /// Sends the message of entry `index`, or sets its pending bit where it is masked. Nothing happens where MSI-X is
    /// disabled, or where the table has no such entry.
    ///
    /// # Errors
    /// Returns the error of the write to the vector's irqfd.
    pub fn trigger(&self, index: u16) -> io::Result<()> {
        let mut state = self.state();
        let control = state.control;
        let Some(entry) = state.entries.get_mut(usize::from(index)).filter(|_| control.enabled) else {
            return Ok(());
        };
        if control.function_masked || entry.is_masked() {
            entry.pending = true;
            return Ok(());
        }
        note_raised();
        entry.vector.event.write(1)
    }

    /// Routes the entry's message and sends it if it is pending, where the entry is not masked.
    fn update(&self, state: &mut State, index: usize) {
        let may_send = state.control.may_send();
        let Some(entry) = state.entries.get_mut(index).filter(|entry| may_send && !entry.is_masked()) else { return };
        let message = entry.message();
        if entry.routed != Some(message) {
            if let Err(error) = self.router.route(entry.vector.gsi, message) {
                log::error!("MSI-X entry {index}: cannot route {message:x?}: {}", chain(&error));
                return;
            }
            entry.routed = Some(message);
        }
        if std::mem::take(&mut entry.pending) {
            note_raised();
            if let Err(error) = entry.vector.event.write(1) {
                log::error!("MSI-X entry {index}: cannot send the pending message: {error}");
            }
        }
    }

    /// Reads the table at byte `offset`. Valid reads have 4 or 8 bytes and are aligned (PCI Local Bus 3.0 §6.8.2); others
    /// return all ones.
    pub fn read_table(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        if !matches!(data.len(), 4 | 8) || !offset.is_multiple_of(data.len() as u64) {
            return;
        }
        let state = self.state();
        for (offset, part) in (offset..).step_by(4).zip(data.chunks_exact_mut(4)) {
            if let Some(entry) = usize::try_from(offset / ENTRY_BYTES).ok().and_then(|index| state.entries.get(index)) {
                let value = match offset % ENTRY_BYTES {
                    0 => Half::Low.get(entry.address),
                    4 => Half::High.get(entry.address),
                    8 => entry.data,
                    _ => entry.control,
                };
                part.copy_from_slice(&value.to_le_bytes());
            }
        }
    }

    /// Writes the table at byte `offset`. Valid writes have 4 or 8 bytes and are aligned; others are ignored.
    pub fn write_table(&self, offset: u64, data: &[u8]) {
        if !matches!(data.len(), 4 | 8) || !offset.is_multiple_of(data.len() as u64) {
            return;
        }
        let mut state = self.state();
        for (offset, part) in (offset..).step_by(4).zip(data.chunks_exact(4)) {
            let Ok(value) = <[u8; 4]>::try_from(part).map(u32::from_le_bytes) else { return };
            let Ok(index) = usize::try_from(offset / ENTRY_BYTES) else { return };
            let Some(entry) = state.entries.get_mut(index) else { return };
            match offset % ENTRY_BYTES {
                0 => Half::Low.set(&mut entry.address, value & !3),
                4 => Half::High.set(&mut entry.address, value),
                8 => entry.data = value,
                _ => entry.control = value & MASKED,
            }
            self.show(index, entry);
            self.update(&mut state, index);
        }
    }

    /// Reads the pending bit array at byte `offset`: bit n of the array is the pending bit of entry n.
    pub fn read_pending(&self, offset: u64, data: &mut [u8]) {
        let state = self.state();
        for (at, byte) in (offset..).zip(data) {
            let first = usize::try_from(at).unwrap_or(usize::MAX).saturating_mul(8);
            *byte = (0..8).fold(0, |bits, bit| {
                let pending = state.entries.get(first.saturating_add(bit)).is_some_and(|entry| entry.pending);
                bits | u8::from(pending) << bit
            });
        }
    }

    /// Returns the table's state.
    #[must_use]
    pub fn save(&self) -> MsixState {
        let state = self.state();
        let entry =
            |&Entry { address, data, control, pending, .. }: &Entry| EntryState { address, data, control, pending };
        MsixState { entries: state.entries.iter().map(entry).collect() }
    }

    /// Sets the table's state and the message control, with routes for the entries that are not masked. What is pending and not masked
    /// is sent. Returns false, and changes nothing, where the state has another number of entries.
    #[must_use]
    pub fn restore(&self, saved: &MsixState, control: MsixControl) -> bool {
        let mut state = self.state();
        if saved.entries.len() != state.entries.len() {
            return false;
        }
        for (entry, &EntryState { address, data, control, pending }) in state.entries.iter_mut().zip(&saved.entries) {
            // As after a write of the guest: the address is a multiple of 4.
            (entry.address, entry.data) = (address & !3, data);
            (entry.control, entry.pending) = (control & MASKED, pending);
        }
        self.show_all(&state);
        drop(state);
        self.set_control(control);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::super::msi::RouteError;
    use super::*;
    use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

    #[derive(Default)]
    struct Routes(Mutex<Vec<(u32, MsiMessage)>>);
    impl MsiRouter for Routes {
        fn route(&self, gsi: u32, message: MsiMessage) -> Result<(), RouteError> {
            self.0.lock().expect("not poisoned").push((gsi, message));
            Ok(())
        }
        fn unroute(&self, _gsi: u32) -> Result<(), RouteError> {
            Ok(())
        }
    }

    #[test]
    fn masked_messages_wait_and_routes_change_only_with_the_message() {
        let routes = Arc::new(Routes::default());
        let event = Arc::new(EventFd::new(EFD_NONBLOCK).expect("an eventfd"));
        let sent = || event.read().unwrap_or(0);
        let unmasked = MsixControl { enabled: true, function_masked: false };
        let masked = MsixControl { enabled: true, function_masked: true };
        let msix = Msix::new(
            vec![MsiVector { gsi: 24, event: Arc::clone(&event) }],
            Arc::clone(&routes) as Arc<dyn MsiRouter>,
        )
        .expect("a table");
        msix.trigger(0).expect("dropped");
        msix.set_control(unmasked);
        msix.write_table(0, &[0x03, 0, 0xe0, 0xfe, 0, 0, 0, 0]);
        msix.write_table(8, &0x41_u32.to_le_bytes());
        msix.trigger(0).expect("pending");
        assert_eq!(sent(), 0);
        let mut pending = [0; 8];
        msix.read_pending(0, &mut pending);
        assert_eq!(pending, [1, 0, 0, 0, 0, 0, 0, 0]);
        msix.write_table(12, &[0; 4]);
        assert_eq!(sent(), 1, "the pending message is sent when its entry is unmasked");
        msix.set_control(masked);
        msix.trigger(0).expect("pending");
        msix.set_control(unmasked);
        assert_eq!(sent(), 1);
        let message = MsiMessage { address: 0xfee0_0000, data: 0x41 };
        assert_eq!(*routes.0.lock().expect("not poisoned"), [(24, message)]);
        // Another table has the same messages, with routes.
        msix.set_control(masked);
        msix.trigger(0).expect("pending");
        let saved = msix.save();
        let other_event = Arc::new(EventFd::new(EFD_NONBLOCK).expect("an eventfd"));
        let vector = MsiVector { gsi: 30, event: Arc::clone(&other_event) };
        let other = Msix::new(vec![vector], Arc::clone(&routes) as Arc<dyn MsiRouter>).expect("a table");
        assert!(other.restore(&saved, masked) && other.save() == saved);
        assert_eq!(routes.0.lock().expect("not poisoned").len(), 1, "it is masked");
        other.set_control(unmasked);
        assert_eq!(routes.0.lock().expect("not poisoned").pop(), Some((30, message)));
        assert_eq!(other_event.read().unwrap_or(0), 1, "the pending bit came along");
        let none = MsixState { entries: Vec::new() };
        assert!(
            !other.restore(&none, masked)
                && other.save().entries == [EntryState { pending: false, ..saved.entries[0] }]
        );
        msix.set_control(unmasked);
        // Beyond the table, invalid lengths, not aligned: ignored.
        msix.write_table(16, &[0xff; 4]);
        msix.write_table(2, &[0xff; 4]);
        msix.write_table(0, &[0xff; 3]);
        msix.trigger(9).expect("nothing");
        let mut data = [0; 8];
        msix.read_table(0, &mut data);
        assert_eq!(data, [0x00, 0, 0xe0, 0xfe, 0, 0, 0, 0]);
    }
}
