//! Dispatch: who answers an exit, and what becomes of the run.

use super::end::{CommandEnd, EndReason};
use super::reason::kvm_exit_name;
use crate::kvm::exit::InternalError;
use crate::kvm::{CoalescedAddress, CoalescedRing, Direction, Exit};
use hwvmm_devices::bus::{self, Action, Bus};
use kvm_bindings::{KVM_SYSTEM_EVENT_CRASH, KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN};
use serde::{Deserialize, Serialize};

/// The result of an unknown hypercall (-KVM_ENOSYS).
const HYPERCALL_UNKNOWN: u64 = (-1000_i64).cast_unsigned();

/// One of the two buses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BusKind {
    /// The bus of the I/O ports.
    Pio,
    /// Guest physical addresses outside of memory.
    Mmio,
}

/// The destination of an exit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Route {
    /// A device: the index of its slot on a bus.
    Slot(BusKind, usize),
    /// An address of a bus that no device claims. Reads give all ones, writes are dropped.
    Unmapped(BusKind, u64),
    /// An MSR that KVM does not emulate.
    Msr(u32),
    /// The exit is no access to a device or an MSR.
    None,
}

/// What becomes of the run after an exit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Back into the guest.
    Continue,
    /// The vCPU was kicked: see whether it should stop.
    Kicked,
    /// The run is over.
    End(EndReason),
}

/// An exit that has been answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Handled {
    /// The device or register that the exit went to.
    pub route: Route,
    /// How the run goes on.
    pub outcome: Outcome,
}

impl Handled {
    fn end(end: EndReason) -> Self {
        Self { route: Route::None, outcome: Outcome::End(end) }
    }

    fn go_on(route: Route) -> Self {
        Self { route, outcome: Outcome::Continue }
    }
}

/// The exit handler of a machine; all vCPUs share it.
pub struct Handler {
    /// The devices on I/O ports.
    pub pio: Bus,
    /// The devices at guest physical addresses.
    pub mmio: Bus,
    /// The ring of coalesced writes, where writes are coalesced.
    pub ring: Option<CoalescedRing>,
}

impl Handler {
    /// Answers an exit: fills what the guest reads, hands on what it writes.
    pub fn handle(&self, exit: &mut Exit<'_>) -> Handled {
        // What the guest wrote before comes first.
        if let Outcome::End(end) = self.drain_coalesced() {
            return Handled::end(end);
        }
        match exit {
            Exit::Pio { port, direction, size, data } => self.pio(*port, *direction, *size, data),
            Exit::MmioRead { gpa, data } => read(&self.mmio, BusKind::Mmio, *gpa, data.len(), data),
            Exit::MmioWrite { gpa, data } => write(&self.mmio, BusKind::Mmio, *gpa, data.len(), data),
            Exit::MsrRead { index, error, .. } | Exit::MsrWrite { index, error, .. } => {
                **error = 1;
                Handled::go_on(Route::Msr(*index))
            }
            Exit::Hypercall { result, .. } => {
                **result = HYPERCALL_UNKNOWN;
                Handled::go_on(Route::None)
            }
            Exit::Interrupted => Handled { route: Route::None, outcome: Outcome::Kicked },
            Exit::Again | Exit::IrqWindowOpen | Exit::Intr | Exit::SetTpr | Exit::IoapicEoi(_) => {
                Handled::go_on(Route::None)
            }
            Exit::Hlt => Handled::end(EndReason::Halted),
            Exit::Shutdown => Handled::end(EndReason::TripleFault),
            Exit::SystemEvent { kind } => Handled::end(system_event(*kind)),
            Exit::FailEntry { .. }
            | Exit::InternalError(_)
            | Exit::MemoryFault { .. }
            | Exit::Debug { .. }
            | Exit::Exception
            | Exit::TprAccess
            | Exit::Nmi
            | Exit::Hyperv
            | Exit::Foreign(_)
            | Exit::Unknown
            | Exit::Unsupported(_) => Handled::end(EndReason::Kvm(describe(exit))),
        }
    }

    /// Hands on the writes that wait in the kernel.
    pub fn drain_coalesced(&self) -> Outcome {
        let mut outcome = Outcome::Continue;
        let Some(ring) = &self.ring else { return outcome };
        ring.drain(|coalesced| {
            let (bus, kind, address) = match coalesced.address {
                CoalescedAddress::Pio(port) => (&self.pio, BusKind::Pio, port.into()),
                CoalescedAddress::Mmio(gpa) => (&self.mmio, BusKind::Mmio, gpa),
            };
            let handled = write(bus, kind, address, coalesced.item_bytes, coalesced.data);
            if outcome == Outcome::Continue {
                outcome = handled.outcome;
            }
        });
        outcome
    }

    /// Hands on all that waits: in the kernel, and in devices that hold output back.
    pub fn flush(&self) -> Outcome {
        let outcome = self.drain_coalesced();
        self.pio.flush();
        outcome
    }

    fn pio(&self, port: u16, direction: Direction, size: usize, data: &mut [u8]) -> Handled {
        match direction {
            Direction::In => read(&self.pio, BusKind::Pio, u64::from(port), size, data),
            Direction::Out => write(&self.pio, BusKind::Pio, u64::from(port), size, data),
        }
    }
}

/// Reads `data.len() / size` items from one address. An unmapped address reads as all ones.
fn read(bus: &Bus, kind: BusKind, address: u64, size: usize, data: &mut [u8]) -> Handled {
    data.fill(0xff);
    let Some(found) = bus.find(address) else { return Handled::go_on(Route::Unmapped(kind, address)) };
    for item in data.chunks_exact_mut(size.max(1)) {
        found.device.read(found.offset, item);
    }
    Handled::go_on(Route::Slot(kind, found.slot))
}

/// Writes `data.len() / size` items to one address. Writes to an unmapped address are dropped.
fn write(bus: &Bus, kind: BusKind, address: u64, size: usize, data: &[u8]) -> Handled {
    let Some(found) = bus.find(address) else { return Handled::go_on(Route::Unmapped(kind, address)) };
    let action = if data.len() > size {
        found.device.write_string(found.offset, size, data)
    } else {
        found.device.write(found.offset, data)
    };
    let outcome = match action {
        Action::None => Outcome::Continue,
        Action::Reset => Outcome::End(EndReason::Reset),
        Action::PowerOff => Outcome::End(EndReason::PowerOff),
        Action::Panicked => Outcome::End(EndReason::Panicked(None)),
        Action::DebugExit(status) => Outcome::End(EndReason::DebugExit(status)),
        Action::CommandEnd(end) => Outcome::End(match end {
            bus::CommandEnd::Exited(status) => EndReason::Command(CommandEnd::Exited(status)),
            bus::CommandEnd::Signaled(signal) => EndReason::Command(CommandEnd::Signaled(signal)),
            bus::CommandEnd::Failed => EndReason::NoCommand(None),
        }),
    };
    Handled { route: Route::Slot(kind, found.slot), outcome }
}

fn system_event(kind: u32) -> EndReason {
    match kind {
        KVM_SYSTEM_EVENT_SHUTDOWN => EndReason::PowerOff,
        KVM_SYSTEM_EVENT_RESET => EndReason::Reset,
        KVM_SYSTEM_EVENT_CRASH => EndReason::Panicked(None),
        other => EndReason::Kvm(format!("KVM_EXIT_SYSTEM_EVENT of unknown type {other}")),
    }
}

/// An exit that ends the run, with its data.
fn describe(exit: &Exit<'_>) -> String {
    match exit {
        Exit::FailEntry { reason, cpu } => format!(
            "KVM_EXIT_FAIL_ENTRY: the hardware refused to enter the guest, reason {reason:#x}{} on host CPU {cpu}",
            fail_entry_name(*reason)
        ),
        Exit::InternalError(error) => describe_internal(error),
        Exit::MemoryFault { flags, gpa, size } => {
            format!("KVM_EXIT_MEMORY_FAULT: {size} bytes at gpa {gpa:#x}, flags {flags:#x}")
        }
        Exit::Debug { pc } => format!("KVM_EXIT_DEBUG at {pc:#x}, though no debugger is attached"),
        Exit::Foreign(number) | Exit::Unsupported(number) => {
            format!("KVM_EXIT_{} ({number}), which cannot be handled", kvm_exit_name(*number))
        }
        other => format!("{other:?}, which cannot be handled"),
    }
}

/// VMX reports a failed entry by an exit reason with bit 31 set; SVM by its EXITCODE.
fn fail_entry_name(reason: u64) -> String {
    use hwvmm_arch::exit_code::{svm, vmx};
    let name =
        if reason & vmx::ENTRY_FAILURE != 0 && reason >> 32 == 0 { vmx::name(reason) } else { svm::name(reason) };
    name.map(|name| format!(" ({name})")).unwrap_or_default()
}

fn describe_internal(error: &InternalError) -> String {
    let kind = match error.suberror {
        kvm_bindings::KVM_INTERNAL_ERROR_EMULATION => "it cannot emulate an instruction",
        kvm_bindings::KVM_INTERNAL_ERROR_SIMUL_EX => "an exception during an exception",
        kvm_bindings::KVM_INTERNAL_ERROR_DELIVERY_EV => "an exit during the delivery of an event",
        kvm_bindings::KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON => "an exit reason that KVM does not know",
        _ => "for a reason it does not explain",
    };
    let data: Vec<String> = error.data.iter().take(error.count).map(|word| format!("{word:#x}")).collect();
    let instruction = emulation_bytes(error).map(|bytes| format!(", instruction bytes {bytes}")).unwrap_or_default();
    format!("KVM_EXIT_INTERNAL_ERROR: {kind} (suberror {}, data {}{instruction})", error.suberror, data.join(" "))
}

/// The instruction that could not be emulated: flags in the first word (bit 0: bytes follow), then a size byte and
/// 15 bytes (KVM API 5, `emulation_failure`).
fn emulation_bytes(error: &InternalError) -> Option<String> {
    if error.suberror != kvm_bindings::KVM_INTERNAL_ERROR_EMULATION || error.count < 3 || error.data[0] & 1 == 0 {
        return None;
    }
    let bytes: Vec<u8> = error.data[1..3].iter().flat_map(|word| word.to_le_bytes()).collect();
    let size = usize::from(*bytes.first()?).min(15);
    Some(bytes.get(1..=size)?.iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().join(" "))
}

#[cfg(test)]
mod tests {
    use super::*;
    use hwvmm_devices::{BusBuilder, BusDevice};
    use std::sync::{Arc, Mutex};

    /// Gives 1, 2, 3, ... by item, and remembers what is written.
    #[derive(Default)]
    struct Items(Mutex<Vec<Vec<u8>>>);
    impl BusDevice for Items {
        fn read(&self, _offset: u64, data: &mut [u8]) {
            let mut items = self.0.lock().expect("lock");
            items.push(Vec::new());
            data.fill(u8::try_from(items.len()).expect("few"));
        }
        fn write(&self, _offset: u64, data: &[u8]) -> Action {
            self.0.lock().expect("lock").push(data.to_vec());
            if data == [0xee] { Action::DebugExit(3) } else { Action::None }
        }
    }

    fn handler() -> (Handler, Arc<Items>) {
        let items = Arc::new(Items::default());
        let mut pio = BusBuilder::default();
        pio.insert(0xe0, 4, "items", Arc::clone(&items) as Arc<dyn BusDevice>).expect("free");
        (Handler { pio: pio.freeze(), mmio: BusBuilder::default().freeze(), ring: None }, items)
    }

    #[test]
    fn strings_are_split_into_items() {
        let (handler, items) = handler();
        let mut data = *b"abcdef";
        let out = &mut Exit::Pio { port: 0xe0, direction: Direction::Out, size: 2, data: &mut data };
        assert_eq!(handler.handle(out).route, Route::Slot(BusKind::Pio, 0));
        assert_eq!(*items.0.lock().expect("lock"), [b"ab", b"cd", b"ef"]);
        let mut data = [0; 4];
        handler.handle(&mut Exit::Pio { port: 0xe1, direction: Direction::In, size: 1, data: &mut data });
        assert_eq!(data, [4, 5, 6, 7]);
    }

    #[test]
    fn unmapped_addresses_read_as_all_ones_and_are_counted() {
        let (handler, _) = handler();
        let mut data = [0; 4];
        let handled = handler.handle(&mut Exit::MmioRead { gpa: 0xd000_0000, data: &mut data });
        assert_eq!(data, [0xff; 4]);
        assert_eq!(handled, Handled::go_on(Route::Unmapped(BusKind::Mmio, 0xd000_0000)));
    }

    #[test]
    fn unknown_msrs_fault() {
        let (handler, _) = handler();
        let (mut data, mut error) = (0, 0);
        let handled = handler.handle(&mut Exit::MsrRead { index: 0x1234, data: &mut data, error: &mut error });
        assert_eq!((handled.route, error), (Route::Msr(0x1234), 1));
    }

    #[test]
    fn what_cannot_be_handled_is_named_with_its_data() {
        let (handler, _) = handler();
        let mut data = [0; 16];
        data[..3].copy_from_slice(&[1, 0x00c3_0f48_9003, 0]);
        let mut exit = Exit::InternalError(InternalError { suberror: 1, count: 3, data });
        let Outcome::End(EndReason::Kvm(text)) = handler.handle(&mut exit).outcome else { panic!("an end") };
        assert!(text.contains("KVM_EXIT_INTERNAL_ERROR") && text.contains("90 48 0f"), "{text}");
        let mut exit = Exit::FailEntry { reason: 0x8000_0021, cpu: 3 };
        let Outcome::End(EndReason::Kvm(text)) = handler.handle(&mut exit).outcome else { panic!("an end") };
        assert!(text.contains("INVALID_GUEST_STATE"), "{text}");
    }

    #[test]
    fn actions_end_the_run() {
        let (handler, _) = handler();
        let mut data = [0xee];
        let out = &mut Exit::Pio { port: 0xe0, direction: Direction::Out, size: 1, data: &mut data };
        assert_eq!(handler.handle(out).outcome, Outcome::End(EndReason::DebugExit(3)));
        assert_eq!(handler.handle(&mut Exit::Shutdown).outcome, Outcome::End(EndReason::TripleFault));
    }
}
