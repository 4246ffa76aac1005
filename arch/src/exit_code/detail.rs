//! The meaning of an exit code and its information fields, for VMX and SVM.

use super::access::AccessKind;
use super::{svm, vmx};
use serde::{Deserialize, Serialize};

/// The virtualization extension of the host's processor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Isa {
    /// Intel's virtual-machine extensions (VMX, VT-x).
    Vmx,
    /// AMD's secure virtual machine (SVM, AMD-V).
    Svm,
}

/// A class of VM exits that exists on both VMX and SVM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Class {
    /// Port I/O: IN, OUT, INS, OUTS.
    Pio,
    /// Access to an MSR: RDMSR, WRMSR, and their forms for lists, for programs and with an immediate operand.
    Msr,
    /// An execution of the CPUID instruction.
    Cpuid,
    /// A nested page fault (NPT) or an EPT violation: the memory is not mapped yet, or a device is there.
    #[serde(rename = "npf")]
    NestedPageFault,
    /// An execution of HLT: the vCPU waits for an interrupt.
    Hlt,
    /// An interrupt, NMI or SMI for the host.
    #[serde(rename = "intr")]
    Interrupt,
    /// A window for an interrupt or NMI of the guest's: it can take one now.
    Window,
    /// The guest's timer: it arms the timer, or the timer's time has come.
    Timer,
    /// Access to a control or debug register.
    #[serde(rename = "cr")]
    ControlRegister,
    /// An exception; with shadow paging these are mostly page faults.
    Exception,
    /// The instructions PAUSE, MONITOR, MWAIT, UMWAIT and TPAUSE.
    Pause,
    /// A hypercall: VMCALL, VMMCALL.
    Hypercall,
    /// Access to the local APIC, where the processor virtualizes it (APICv, AVIC).
    Apic,
    /// Any other VM exit.
    Other,
}

impl Class {
    /// All classes, in the order in which tables list them.
    pub const ALL: [Self; 14] = [
        Self::Pio,
        Self::Msr,
        Self::Cpuid,
        Self::NestedPageFault,
        Self::Hlt,
        Self::Interrupt,
        Self::Window,
        Self::Timer,
        Self::ControlRegister,
        Self::Exception,
        Self::Pause,
        Self::Hypercall,
        Self::Apic,
        Self::Other,
    ];

    /// The name of the class in budgets and in JSON.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Pio => "pio",
            Self::Msr => "msr",
            Self::Cpuid => "cpuid",
            Self::NestedPageFault => "npf",
            Self::Hlt => "hlt",
            Self::Interrupt => "intr",
            Self::Window => "window",
            Self::Timer => "timer",
            Self::ControlRegister => "cr",
            Self::Exception => "exception",
            Self::Pause => "pause",
            Self::Hypercall => "hypercall",
            Self::Apic => "apic",
            Self::Other => "other",
        }
    }
}

/// A port access, decoded from the information fields of its VM exit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IoAccess {
    /// The number of the port.
    pub port: u16,
    /// The size of an item in bytes: 1, 2 or 4.
    pub size: u8,
    /// A write for OUT and OUTS, a read for IN and INS.
    pub kind: AccessKind,
}

/// An access to a register of the local APIC, decoded from the information fields of its VM exit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ApicAccess {
    /// The register's offset in the APIC's page, in bytes: below 4096.
    pub offset: u16,
    /// Whether the guest read or wrote the register.
    pub kind: AccessKind,
}

fn port(bits: u64) -> u16 {
    u16::try_from(bits & 0xffff).unwrap_or(0)
}

impl Isa {
    /// The extension for the field `isa` of KVM's tracepoints (KVM_ISA_VMX, KVM_ISA_SVM).
    #[must_use]
    pub fn from_kvm(number: u64) -> Option<Self> {
        match number {
            1 => Some(Self::Vmx),
            2 => Some(Self::Svm),
            _ => None,
        }
    }

    /// The name in JSON and in tables: "vmx" or "svm".
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Vmx => "vmx",
            Self::Svm => "svm",
        }
    }

    /// The name of an exit code in the vendor's manual, or its number where it has no name.
    #[must_use]
    pub fn reason(self, code: u64) -> String {
        let name = match self {
            Self::Vmx => vmx::name(code),
            Self::Svm => svm::name(code),
        };
        name.map_or_else(|| format!("{code:#x}"), str::to_owned)
    }

    /// The class of an exit code.
    #[must_use]
    pub fn class(self, code: u64) -> Class {
        match self {
            Self::Svm => match code {
                0x7b => Class::Pio,
                0x7c => Class::Msr,
                0x72 => Class::Cpuid,
                0x400 => Class::NestedPageFault,
                0x78 | 0xa6 => Class::Hlt,
                0x60..=0x63 => Class::Interrupt,
                // KVM intercepts IRET to learn that the guest can take an NMI.
                0x64 | 0x74 => Class::Window,
                0x00..=0x3f | 0x65 | 0x8f..=0x9f => Class::ControlRegister,
                0x40..=0x5f => Class::Exception,
                0x77 | 0x8a..=0x8c => Class::Pause,
                0x81 => Class::Hypercall,
                0x401 | 0x402 => Class::Apic,
                _ => Class::Other,
            },
            Self::Vmx => match code & 0xffff {
                30 => Class::Pio,
                31 | 32 | 78..=81 | 84 | 85 => Class::Msr,
                10 => Class::Cpuid,
                48 | 49 => Class::NestedPageFault,
                12 => Class::Hlt,
                1 | 3 | 5 | 6 => Class::Interrupt,
                7 | 8 => Class::Window,
                52 => Class::Timer,
                28 | 29 => Class::ControlRegister,
                0 => Class::Exception,
                36 | 39 | 40 | 67 | 68 => Class::Pause,
                18 => Class::Hypercall,
                43..=45 | 56 => Class::Apic,
                _ => Class::Other,
            },
        }
    }

    /// Decodes the port access of an exit of class [`Class::Pio`] (APM vol. 2 §15.10.2, EXITINFO1; SDM vol. 3C table 28-5, exit
    /// qualification).
    #[must_use]
    pub fn io(self, info1: u64) -> IoAccess {
        match self {
            Self::Svm => {
                let size = u8::try_from(info1 >> 4 & 7).unwrap_or(0);
                IoAccess { port: port(info1 >> 16), size, kind: AccessKind::of_write(info1 & 1 == 0) }
            }
            Self::Vmx => {
                let size = u8::try_from(info1 & 7).unwrap_or(0) + 1;
                IoAccess { port: port(info1 >> 16), size, kind: AccessKind::of_write(info1 & 8 == 0) }
            }
        }
    }

    /// Decodes an exit of class [`Class::Apic`] that has the register: on VMX the APIC-access and the APIC-write exit (SDM vol. 3C
    /// §28.2.1, table 28-6; §30.4.3.3), on SVM the unaccelerated access (APM vol. 2 §15.29.9.2, EXITINFO1).
    #[must_use]
    pub fn apic(self, code: u64, info1: u64) -> Option<ApicAccess> {
        let kind = match (self, code & 0xffff) {
            (Self::Svm, 0x402) => AccessKind::of_write(info1 >> 32 & 1 == 1),
            // Linear accesses: 0 is a read, 1 a write. Other kinds have no offset, or are no access of an instruction's to data.
            (Self::Vmx, 44) => match info1 >> 12 & 15 {
                0 => AccessKind::Read,
                1 => AccessKind::Write,
                _ => return None,
            },
            (Self::Vmx, 56) => AccessKind::Write,
            _ => return None,
        };
        let mask = match self {
            // Bits 3:0 are reserved.
            Self::Svm => 0xff0,
            Self::Vmx => 0xfff,
        };
        u16::try_from(info1 & mask).ok().map(|offset| ApicAccess { offset, kind })
    }

    /// Returns whether an exit of class [`Class::Msr`] is a read or a write. SVM has that in EXITINFO1, VMX in the exit reason.
    #[must_use]
    pub fn msr_access(self, code: u64, info1: u64) -> AccessKind {
        AccessKind::of_write(match self {
            Self::Svm => info1 & 1 == 1,
            Self::Vmx => matches!(code & 0xffff, 32 | 79 | 81 | 85),
        })
    }

    /// Returns the access of a nested page fault; an instruction fetch counts as a read (APM vol. 2 §15.25.6, EXITINFO1 bit 1;
    /// SDM vol. 3C table 28-7, bit 1).
    #[must_use]
    pub fn fault_access(self, info1: u64) -> AccessKind {
        AccessKind::of_write(info1 & 2 != 0)
    }

    /// The gpa of a nested page fault, where the tracepoint `kvm_exit` has it: SVM's EXITINFO2.
    #[must_use]
    pub fn fault_gpa(self, info2: u64) -> Option<u64> {
        (self == Self::Svm).then_some(info2)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn port_accesses_are_decoded_alike_on_vmx_and_svm() {
        let expected = IoAccess { port: 0x3f8, size: 1, kind: AccessKind::Write };
        assert_eq!(Isa::Svm.io(0x3f8 << 16 | 1 << 4), expected);
        assert_eq!(Isa::Vmx.io(0x3f8 << 16), expected);
        let read = IoAccess { port: 0xcfc, size: 4, kind: AccessKind::Read };
        assert_eq!(Isa::Svm.io(0xcfc << 16 | 4 << 4 | 1), read);
        assert_eq!(Isa::Vmx.io(0xcfc << 16 | 8 | 3), read);
    }

    #[test]
    fn apic_accesses_are_decoded_alike_on_vmx_and_svm() {
        let access = |offset, kind| Some(ApicAccess { offset, kind });
        assert_eq!(Isa::Vmx.apic(44, 1 << 12 | 0x380), access(0x380, AccessKind::Write));
        assert_eq!(Isa::Vmx.apic(44, 0x390), access(0x390, AccessKind::Read));
        assert_eq!(
            (Isa::Vmx.apic(44, 10 << 12 | 0x380), Isa::Vmx.apic(44, 2 << 12)),
            (None, None),
            "no access to data"
        );
        assert_eq!(Isa::Vmx.apic(56, 0x380), access(0x380, AccessKind::Write));
        assert_eq!(Isa::Svm.apic(0x402, 1 << 32 | 0x380), access(0x380, AccessKind::Write));
        assert_eq!(Isa::Svm.apic(0x402, 0x390), access(0x390, AccessKind::Read));
        assert_eq!((Isa::Vmx.apic(45, 0x380), Isa::Svm.apic(0x401, 0x380)), (None, None), "a vector, and an ICR");
    }

    #[test]
    fn classes_agree_on_vmx_and_svm() {
        let pairs = [
            (0x64, 7),
            (0x74, 8),
            (0x62, 6),
            (0x63, 3),
            (0x7b, 30),
            (0x72, 10),
            (0x400, 48),
            (0x78, 12),
            (0x60, 1),
            (0x81, 18),
            (0x10, 28),
            (0x7c, 84),
            (0x7c, 85),
            (0x8b, 67),
            (0x77, 68),
            (0x402, 44),
            (0x402, 56),
        ];
        for (svm, vmx) in pairs {
            assert_eq!(Isa::Svm.class(svm), Isa::Vmx.class(vmx));
        }
        assert_eq!((Isa::Vmx.class(7), Isa::Vmx.class(52)), (Class::Window, Class::Timer), "not the host's");
        assert_eq!((Isa::Svm.msr_access(0x7c, 1), Isa::Svm.msr_access(0x7c, 0)), (AccessKind::Write, AccessKind::Read));
        for (code, kind) in
            [(32, AccessKind::Write), (31, AccessKind::Read), (85, AccessKind::Write), (84, AccessKind::Read)]
        {
            assert_eq!(Isa::Vmx.msr_access(code, 1), kind, "{code}");
        }
        assert_eq!((Isa::Svm.reason(0x72), Isa::Vmx.reason(10)), ("CPUID".into(), "CPUID".into()));
        assert_eq!(Isa::Svm.reason(0x3fe), "0x3fe");
    }
}
