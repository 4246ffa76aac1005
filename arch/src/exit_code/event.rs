//! What an exit for an exception, an interrupt or a register was about.

use super::{AccessKind, Isa};
use serde::{Deserialize, Serialize};

/// The kind of an event that made a guest exit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum EventKind {
    /// An interrupt of the host's.
    Interrupt,
    /// A non-maskable interrupt of the host's.
    Nmi,
    /// An exception of the guest's.
    Exception,
}

/// An event that made a guest exit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Event {
    /// The kind of the event.
    pub kind: EventKind,
    /// The interrupt or exception vector, 0 to 255.
    pub vector: u8,
}

/// Mnemonics of the exceptions, by vector (SDM vol. 3A table 6-1; APM vol. 2 table 8-1).
const EXCEPTIONS: [&str; 22] = [
    "#DE", "#DB", "", "#BP", "#OF", "#BR", "#UD", "#NM", "#DF", "", "#TS", "#NP", "#SS", "#GP", "#PF", "", "#MF",
    "#AC", "#MC", "#XM", "#VE", "#CP",
];

impl Event {
    /// The mnemonic of an exception, such as "#PF", or "NMI".
    #[must_use]
    pub fn name(self) -> Option<&'static str> {
        match self.kind {
            EventKind::Interrupt => None,
            EventKind::Nmi => Some("NMI"),
            EventKind::Exception => EXCEPTIONS.get(usize::from(self.vector)).copied().filter(|name| !name.is_empty()),
        }
    }
}

/// A register that an instruction accessed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Register {
    /// Control register with this number.
    Control(u8),
    /// Debug register with this number.
    Debug(u8),
}

/// An access to a control or debug register.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct RegisterAccess {
    /// The control or debug register that is accessed.
    pub register: Register,
    /// What the instruction did to it.
    pub kind: AccessKind,
}

/// The low bits of `value`.
fn low_byte(value: u64) -> u8 {
    value.to_le_bytes()[0]
}

impl Isa {
    /// The event of an exit for an exception or interrupt. VMX has it in the VM-exit interruption information (SDM vol. 3C §24.9.2),
    /// `intr_info`; SVM has the vector of an exception in the exit code, and none of an interrupt.
    #[must_use]
    pub fn event(self, code: u64, intr_info: u64) -> Option<Event> {
        let (kind, vector) = match (self, code) {
            (Self::Svm, 0x40..=0x5f) => (EventKind::Exception, low_byte(code - 0x40)),
            (Self::Svm, 0x61) => (EventKind::Nmi, 2),
            (Self::Svm, _) => return None,
            (Self::Vmx, _) => {
                let valid = intr_info >> 31 & 1 == 1 && matches!(code & 0xffff, 0 | 1);
                let kind = match intr_info >> 8 & 7 {
                    0 => EventKind::Interrupt,
                    2 => EventKind::Nmi,
                    // Of the hardware, of INT1, and of INT3 and INTO.
                    3 | 5 | 6 => EventKind::Exception,
                    _ => return None,
                };
                (valid.then_some(kind)?, low_byte(intr_info))
            }
        };
        Some(Event { kind, vector })
    }

    /// The register of an exit for a control or debug register. VMX has it in the exit qualification (SDM vol. 3C tables 28-3 and
    /// 28-4), `info1`; SVM in the exit code.
    #[must_use]
    pub fn register(self, code: u64, info1: u64) -> Option<RegisterAccess> {
        use AccessKind::{Read, Write};
        let (register, kind) = match (self, code & 0xffff) {
            (Self::Svm, 0x00..=0x0f) => (Register::Control(low_byte(code)), Read),
            (Self::Svm, 0x10..=0x1f) => (Register::Control(low_byte(code - 0x10)), Write),
            (Self::Svm, 0x20..=0x2f) => (Register::Debug(low_byte(code - 0x20)), Read),
            (Self::Svm, 0x30..=0x3f) => (Register::Debug(low_byte(code - 0x30)), Write),
            (Self::Svm, 0x65) => (Register::Control(0), Write),
            (Self::Svm, 0x90..=0x9f) => (Register::Control(low_byte(code - 0x90)), Write),
            (Self::Vmx, 28) => match info1 >> 4 & 3 {
                0 => (Register::Control(low_byte(info1 & 15)), Write),
                1 => (Register::Control(low_byte(info1 & 15)), Read),
                // CLTS and LMSW.
                _ => (Register::Control(0), Write),
            },
            (Self::Vmx, 29) => (Register::Debug(low_byte(info1 & 7)), if info1 >> 4 & 1 == 0 { Write } else { Read }),
            _ => return None,
        };
        Some(RegisterAccess { register, kind })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_those_of_the_interruption_information() {
        let event = |code, info| Isa::Vmx.event(code, info).map(|event| (event.kind, event.vector));
        assert_eq!(event(0, 0x8000_0b0e), Some((EventKind::Exception, 14)), "#PF with an error code");
        assert_eq!(event(0, 0x8000_0603), Some((EventKind::Exception, 3)), "INT3");
        assert_eq!(event(0, 0x8000_0202), Some((EventKind::Nmi, 2)));
        assert_eq!(event(1, 0x8000_00ec), Some((EventKind::Interrupt, 0xec)));
        assert_eq!((event(0, 0xb0e), event(7, 0x8000_00ec)), (None, None), "not valid, and not for this reason");
        assert_eq!(Isa::Svm.event(0x4e, 0).and_then(Event::name), Some("#PF"));
        assert_eq!(Isa::Svm.event(0x61, 0).and_then(Event::name), Some("NMI"));
        assert_eq!((Isa::Svm.event(0x60, 0), Isa::Svm.event(0x72, 0)), (None, None));
    }

    #[test]
    fn registers_are_decoded_alike_on_vmx_and_svm() {
        use AccessKind::{Read, Write};
        let access = |register, kind| Some(RegisterAccess { register, kind });
        let pairs = [
            (0x03, 28, 3 | 1 << 4, access(Register::Control(3), Read)),
            (0x13, 28, 3 | 5 << 8, access(Register::Control(3), Write)),
            (0x65, 28, 2 << 4, access(Register::Control(0), Write)),
            (0x27, 29, 7 | 1 << 4, access(Register::Debug(7), Read)),
            (0x37, 29, 7, access(Register::Debug(7), Write)),
            (0x72, 10, 0, None),
        ];
        for (svm, vmx, qualification, expected) in pairs {
            assert_eq!(Isa::Svm.register(svm, 0), expected);
            assert_eq!(Isa::Vmx.register(vmx, qualification), expected);
        }
    }
}
