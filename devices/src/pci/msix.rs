//! MSI-X (PCI Local Bus 3.0 §6.8.2): a table of messages, with a mask and a pending bit each.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use vmm_sys_util::eventfd::EventFd;

/// Bytes of a table entry: address, upper address, data, vector control.
const ENTRY_BYTES: u64 = 16;
const MASKED: u32 = 1;

/// Where messages become interrupts (KVM: GSI routing and irqfds).
pub trait MsiRouter: Send + Sync {
    /// From now on, `gsi` sends `data` to `address`.
    ///
    /// # Errors
    /// The system's.
    fn route(&self, gsi: u32, address: u64, data: u32) -> io::Result<()>;

    /// From now on, `gsi` sends nothing.
    ///
    /// # Errors
    /// The system's.
    fn unroute(&self, gsi: u32) -> io::Result<()>;
}

/// A message that can be sent: a write to `event` sends what `gsi` is routed to.
#[derive(Clone)]
pub struct MsiVector {
    /// The interrupt's number at the router.
    pub gsi: u32,
    /// Sends it.
    pub event: Arc<EventFd>,
}

struct Entry {
    vector: MsiVector,
    address: u64,
    data: u32,
    control: u32,
    pending: bool,
    routed: Option<(u64, u32)>,
}

struct State {
    entries: Vec<Entry>,
    enabled: bool,
    masked: bool,
}

/// The table of a function.
pub struct Msix {
    state: Mutex<State>,
    router: Arc<dyn MsiRouter>,
}

impl Msix {
    /// A table with one entry a vector, all masked.
    #[must_use]
    pub fn new(vectors: Vec<MsiVector>, router: Arc<dyn MsiRouter>) -> Self {
        let entry = |vector| Entry { vector, address: 0, data: 0, control: MASKED, pending: false, routed: None };
        let entries = vectors.into_iter().map(entry).collect();
        Self { state: Mutex::new(State { entries, enabled: false, masked: false }), router }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Number of entries.
    #[must_use]
    pub fn len(&self) -> u16 {
        u16::try_from(self.state().entries.len()).unwrap_or(u16::MAX)
    }

    /// Whether there are no entries.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The function's MSI-X Enable and Function Mask bits.
    pub fn set_control(&self, enabled: bool, masked: bool) {
        let mut state = self.state();
        state.enabled = enabled;
        state.masked = masked;
        for index in 0..state.entries.len() {
            self.update(&mut state, index);
        }
    }

    /// Sends message `index`, or notes it where it is masked. Without MSI-X, or beyond the table, nothing is sent.
    ///
    /// # Errors
    /// The eventfd's.
    pub fn trigger(&self, index: u16) -> io::Result<()> {
        let mut state = self.state();
        let (enabled, masked) = (state.enabled, state.masked);
        let Some(entry) = state.entries.get_mut(usize::from(index)).filter(|_| enabled) else { return Ok(()) };
        if masked || entry.control & MASKED != 0 {
            entry.pending = true;
            return Ok(());
        }
        entry.vector.event.write(1)
    }

    /// Brings the route up to date, and sends what is pending, once an entry is not masked.
    fn update(&self, state: &mut State, index: usize) {
        let open = state.enabled && !state.masked;
        let Some(entry) = state.entries.get_mut(index).filter(|entry| open && entry.control & MASKED == 0) else {
            return;
        };
        if entry.routed != Some((entry.address, entry.data)) {
            if let Err(error) = self.router.route(entry.vector.gsi, entry.address, entry.data) {
                log::error!("MSI-X entry {index}, address {:#x}: no route: {error}", entry.address);
                return;
            }
            entry.routed = Some((entry.address, entry.data));
        }
        if std::mem::take(&mut entry.pending)
            && let Err(error) = entry.vector.event.write(1)
        {
            log::error!("MSI-X entry {index}: {error}");
        }
    }

    /// Reads the table: 4 or 8 bytes, aligned (§6.8.2); all ones else.
    pub fn read_table(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        if !matches!(data.len(), 4 | 8) || !offset.is_multiple_of(data.len() as u64) {
            return;
        }
        let state = self.state();
        for (offset, part) in (offset..).step_by(4).zip(data.chunks_exact_mut(4)) {
            if let Some(entry) = usize::try_from(offset / ENTRY_BYTES).ok().and_then(|index| state.entries.get(index)) {
                let [low, high] = halves(entry.address);
                let value = match offset % ENTRY_BYTES {
                    0 => low,
                    4 => high,
                    8 => entry.data,
                    _ => entry.control,
                };
                part.copy_from_slice(&value.to_le_bytes());
            }
        }
    }

    /// Writes the table: 4 or 8 bytes, aligned; nothing else is taken.
    pub fn write_table(&self, offset: u64, data: &[u8]) {
        if !matches!(data.len(), 4 | 8) || !offset.is_multiple_of(data.len() as u64) {
            return;
        }
        let mut state = self.state();
        for (offset, part) in (offset..).step_by(4).zip(data.chunks_exact(4)) {
            let Ok(value) = <[u8; 4]>::try_from(part).map(u32::from_le_bytes) else { return };
            let Ok(index) = usize::try_from(offset / ENTRY_BYTES) else { return };
            let Some(entry) = state.entries.get_mut(index) else { return };
            let [low, high] = halves(entry.address);
            match offset % ENTRY_BYTES {
                0 => entry.address = u64::from(high) << 32 | u64::from(value & !3),
                4 => entry.address = u64::from(value) << 32 | u64::from(low),
                8 => entry.data = value,
                _ => entry.control = value & MASKED,
            }
            self.update(&mut state, index);
        }
    }

    /// Reads the pending bits.
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

    /// Masks everything and forgets what is pending, as a reset of the function does.
    pub fn reset(&self) {
        let mut state = self.state();
        state.enabled = false;
        state.masked = false;
        for entry in &mut state.entries {
            entry.control = MASKED;
            entry.pending = false;
        }
    }
}

fn halves(value: u64) -> [u32; 2] {
    let bytes = value.to_le_bytes();
    [[0, 1, 2, 3], [4, 5, 6, 7]].map(|half| u32::from_le_bytes(half.map(|index: usize| bytes[index])))
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    #[derive(Default)]
    struct Routes(Mutex<Vec<(u32, u64, u32)>>);
    impl MsiRouter for Routes {
        fn route(&self, gsi: u32, address: u64, data: u32) -> io::Result<()> {
            self.0.lock().expect("alone").push((gsi, address, data));
            Ok(())
        }
        fn unroute(&self, _gsi: u32) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn masked_messages_wait_and_routes_change_only_with_the_message() {
        let routes = Arc::new(Routes::default());
        let event = Arc::new(EventFd::new(EFD_NONBLOCK).expect("an eventfd"));
        let sent = || event.read().unwrap_or(0);
        let msix = Msix::new(
            vec![MsiVector { gsi: 24, event: Arc::clone(&event) }],
            Arc::clone(&routes) as Arc<dyn MsiRouter>,
        );
        msix.trigger(0).expect("dropped");
        msix.set_control(true, false);
        msix.write_table(0, &[0x03, 0, 0xe0, 0xfe, 0, 0, 0, 0]);
        msix.write_table(8, &0x41_u32.to_le_bytes());
        msix.trigger(0).expect("pending");
        assert_eq!(sent(), 0);
        let mut pending = [0; 8];
        msix.read_pending(0, &mut pending);
        assert_eq!(pending, [1, 0, 0, 0, 0, 0, 0, 0]);
        msix.write_table(12, &[0; 4]);
        assert_eq!(sent(), 1, "unmasked: what was pending is sent");
        msix.set_control(true, true);
        msix.trigger(0).expect("pending");
        msix.set_control(true, false);
        assert_eq!(sent(), 1);
        assert_eq!(*routes.0.lock().expect("alone"), [(24, 0xfee0_0000, 0x41)]);
        // Out of the table, odd lengths, odd places: nothing.
        msix.write_table(16, &[0xff; 4]);
        msix.write_table(2, &[0xff; 4]);
        msix.write_table(0, &[0xff; 3]);
        msix.trigger(9).expect("nothing");
        let mut data = [0; 8];
        msix.read_table(0, &mut data);
        assert_eq!(data, [0x00, 0, 0xe0, 0xfe, 0, 0, 0, 0]);
    }
}
