//! What an exit code and its information fields say, for both kinds of processor.

use super::{svm, vmx};

/// The instruction set of the host's virtualization, numbered as in KVM's tracepoints.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Isa {
    /// Intel's VMX.
    Vmx,
    /// AMD's SVM.
    Svm,
}

/// Kinds of VM exits that mean the same on both.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Class {
    /// IN, OUT and their string forms.
    Pio,
    /// RDMSR, WRMSR.
    Msr,
    /// CPUID.
    Cpuid,
    /// A nested page fault: memory not yet there, or a device's.
    NestedPageFault,
    /// HLT.
    Hlt,
    /// An interrupt for the host, or a window for one of the guest's.
    Interrupt,
    /// A control or debug register.
    ControlRegister,
    /// An exception: with shadow paging, page faults.
    Exception,
    /// PAUSE, MWAIT, MONITOR.
    Pause,
    /// VMCALL, VMMCALL.
    Hypercall,
    /// Local APIC, where the processor helps with it.
    Apic,
    /// Anything else.
    Other,
}

impl Class {
    /// All, in the order of tables.
    pub const ALL: [Self; 12] = [
        Self::Pio,
        Self::Msr,
        Self::Cpuid,
        Self::NestedPageFault,
        Self::Hlt,
        Self::Interrupt,
        Self::ControlRegister,
        Self::Exception,
        Self::Pause,
        Self::Hypercall,
        Self::Apic,
        Self::Other,
    ];

    /// The name in budgets and in JSON.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Pio => "pio",
            Self::Msr => "msr",
            Self::Cpuid => "cpuid",
            Self::NestedPageFault => "npf",
            Self::Hlt => "hlt",
            Self::Interrupt => "intr",
            Self::ControlRegister => "cr",
            Self::Exception => "exception",
            Self::Pause => "pause",
            Self::Hypercall => "hypercall",
            Self::Apic => "apic",
            Self::Other => "other",
        }
    }
}

/// An access to ports, as the information fields tell it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IoAccess {
    /// The port.
    pub port: u16,
    /// Bytes of an item.
    pub size: u8,
    /// Whether the guest writes.
    pub write: bool,
}

fn port(bits: u64) -> u16 {
    u16::try_from(bits & 0xffff).unwrap_or(0)
}

impl Isa {
    /// From the field `isa` of KVM's tracepoints.
    #[must_use]
    pub fn from_kvm(number: u64) -> Option<Self> {
        match number {
            1 => Some(Self::Vmx),
            2 => Some(Self::Svm),
            _ => None,
        }
    }

    /// "vmx" or "svm".
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Vmx => "vmx",
            Self::Svm => "svm",
        }
    }

    /// The manual's name of an exit code; its number where it has none.
    #[must_use]
    pub fn reason(self, code: u64) -> String {
        let name = match self {
            Self::Vmx => vmx::name(code),
            Self::Svm => svm::name(code),
        };
        name.map_or_else(|| format!("{code:#x}"), str::to_owned)
    }

    /// The kind of an exit code.
    #[must_use]
    pub fn class(self, code: u64) -> Class {
        match self {
            Self::Svm => match code {
                0x7b => Class::Pio,
                0x7c => Class::Msr,
                0x72 => Class::Cpuid,
                0x400 => Class::NestedPageFault,
                0x78 | 0xa6 => Class::Hlt,
                0x60..=0x64 => Class::Interrupt,
                0x00..=0x3f | 0x65 | 0x8f..=0x9f => Class::ControlRegister,
                0x40..=0x5f => Class::Exception,
                0x77 | 0x8a..=0x8c => Class::Pause,
                0x81 => Class::Hypercall,
                0x401 | 0x402 => Class::Apic,
                _ => Class::Other,
            },
            Self::Vmx => match code & 0xffff {
                30 => Class::Pio,
                31 | 32 => Class::Msr,
                10 => Class::Cpuid,
                48 | 49 => Class::NestedPageFault,
                12 => Class::Hlt,
                1 | 7 | 8 | 52 => Class::Interrupt,
                28 | 29 => Class::ControlRegister,
                0 => Class::Exception,
                36 | 39 | 40 => Class::Pause,
                18 => Class::Hypercall,
                43..=45 | 56 => Class::Apic,
                _ => Class::Other,
            },
        }
    }

    /// The port access of an exit of class [`Class::Pio`] (APM vol. 2 §15.10.2, EXITINFO1; SDM vol. 3C table 28-5, exit
    /// qualification).
    #[must_use]
    pub fn io(self, info1: u64) -> IoAccess {
        match self {
            Self::Svm => {
                let size = u8::try_from(info1 >> 4 & 7).unwrap_or(0);
                IoAccess { port: port(info1 >> 16), size, write: info1 & 1 == 0 }
            }
            Self::Vmx => {
                let size = u8::try_from(info1 & 7).unwrap_or(0) + 1;
                IoAccess { port: port(info1 >> 16), size, write: info1 & 8 == 0 }
            }
        }
    }

    /// Whether an exit of class [`Class::Msr`] is a write (SVM tells it in EXITINFO1, VMX by the reason).
    #[must_use]
    pub fn is_msr_write(self, code: u64, info1: u64) -> bool {
        match self {
            Self::Svm => info1 & 1 == 1,
            Self::Vmx => code & 0xffff == 32,
        }
    }

    /// Whether a nested page fault is a write (APM vol. 2 §15.25.6, EXITINFO1 bit 1; SDM vol. 3C table 28-7, bit 1).
    #[must_use]
    pub fn is_fault_write(self, info1: u64) -> bool {
        info1 & 2 != 0
    }

    /// The guest physical address of a nested page fault, where `kvm_exit` has it: SVM's EXITINFO2.
    #[must_use]
    pub fn fault_gpa(self, info2: u64) -> Option<u64> {
        (self == Self::Svm).then_some(info2)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_byte_to_the_uart_is_the_same_on_both() {
        let expected = IoAccess { port: 0x3f8, size: 1, write: true };
        assert_eq!(Isa::Svm.io(0x3f8 << 16 | 1 << 4), expected);
        assert_eq!(Isa::Vmx.io(0x3f8 << 16), expected);
        let read = IoAccess { port: 0xcfc, size: 4, write: false };
        assert_eq!(Isa::Svm.io(0xcfc << 16 | 4 << 4 | 1), read);
        assert_eq!(Isa::Vmx.io(0xcfc << 16 | 8 | 3), read);
    }

    #[test]
    fn kinds_agree() {
        let pairs = [(0x7b, 30), (0x72, 10), (0x400, 48), (0x78, 12), (0x60, 1), (0x81, 18), (0x10, 28)];
        for (svm, vmx) in pairs {
            assert_eq!(Isa::Svm.class(svm), Isa::Vmx.class(vmx));
        }
        assert!(Isa::Svm.is_msr_write(0x7c, 1) && Isa::Vmx.is_msr_write(32, 0) && !Isa::Vmx.is_msr_write(31, 1));
        assert_eq!((Isa::Svm.reason(0x72), Isa::Vmx.reason(10)), ("CPUID".into(), "CPUID".into()));
        assert_eq!(Isa::Svm.reason(0x3fe), "0x3fe");
    }
}
