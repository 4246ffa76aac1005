//! The one table of userspace exit reasons. A reason that is missing here does not compile.

#![deny(clippy::wildcard_enum_match_arm)]

use crate::kvm::{Direction, Exit};
use kvm_bindings as kvm;
use serde::{Deserialize, Serialize};

macro_rules! exit_reasons {
    ($($variant:ident $name:literal $what:literal,)*) => {
        /// Why KVM_RUN returned to user space.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[repr(u8)]
        pub enum ExitReason {
            $(#[doc = $what] #[serde(rename = $name)] $variant,)*
        }

        impl ExitReason {
            /// All reasons, in the order of their indices.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)*];
            /// How many there are.
            pub const COUNT: usize = Self::ALL.len();

            /// The name in tables and in JSON.
            #[must_use]
            pub fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)* }
            }

            /// One line on what it is.
            #[must_use]
            pub fn what(self) -> &'static str {
                match self { $(Self::$variant => $what,)* }
            }

            /// The place in an array of [`Self::COUNT`].
            #[must_use]
            pub fn index(self) -> usize {
                self as usize
            }
        }
    };
}

exit_reasons! {
    PioIn "pio_in" "The guest read a port.",
    PioOut "pio_out" "The guest wrote a port.",
    MmioRead "mmio_read" "The guest read memory of a device.",
    MmioWrite "mmio_write" "The guest wrote memory of a device.",
    MsrRead "msr_read" "The guest read an MSR that KVM does not know.",
    MsrWrite "msr_write" "The guest wrote an MSR that KVM does not know.",
    Hypercall "hypercall" "The guest made a hypercall that KVM passes to user space.",
    Hlt "hlt" "The guest halted (only without an APIC in the kernel).",
    Interrupted "interrupted" "A signal interrupted KVM_RUN: a kick.",
    Again "again" "A vCPU got the start-up message that it waited for.",
    Shutdown "shutdown" "The processor shut down: a triple fault.",
    FailEntry "fail_entry" "The hardware refused to enter the guest.",
    InternalError "internal_error" "KVM could not go on.",
    SystemEvent "system_event" "The guest signalled a system event.",
    MemoryFault "memory_fault" "The guest touched memory that its slots do not allow.",
    Debug "debug" "A guest-debug event.",
    Exception "exception" "An exception.",
    IrqWindowOpen "irq_window_open" "The guest can take an interrupt.",
    Intr "intr" "An interrupt of the host.",
    SetTpr "set_tpr" "The task priority changed.",
    TprAccess "tpr_access" "The task priority was accessed.",
    Nmi "nmi" "A non-maskable interrupt.",
    IoapicEoi "ioapic_eoi" "An interrupt was acknowledged at the I/O APIC in user space.",
    Hyperv "hyperv" "Hyper-V emulation.",
    Foreign "foreign" "A reason of another architecture.",
    Unknown "unknown" "The hardware exited for a reason that KVM does not know.",
    Unsupported "unsupported" "A reason that this hwvmm does not know.",
}

impl ExitReason {
    /// The reason of an exit.
    #[must_use]
    pub fn of(exit: &Exit<'_>) -> Self {
        match exit {
            Exit::Pio { direction: Direction::In, .. } => Self::PioIn,
            Exit::Pio { direction: Direction::Out, .. } => Self::PioOut,
            Exit::MmioRead { .. } => Self::MmioRead,
            Exit::MmioWrite { .. } => Self::MmioWrite,
            Exit::MsrRead { .. } => Self::MsrRead,
            Exit::MsrWrite { .. } => Self::MsrWrite,
            Exit::Hypercall { .. } => Self::Hypercall,
            Exit::Hlt => Self::Hlt,
            Exit::Interrupted => Self::Interrupted,
            Exit::Again => Self::Again,
            Exit::Shutdown => Self::Shutdown,
            Exit::FailEntry { .. } => Self::FailEntry,
            Exit::InternalError(_) => Self::InternalError,
            Exit::SystemEvent { .. } => Self::SystemEvent,
            Exit::MemoryFault { .. } => Self::MemoryFault,
            Exit::Debug { .. } => Self::Debug,
            Exit::Exception => Self::Exception,
            Exit::IrqWindowOpen => Self::IrqWindowOpen,
            Exit::Intr => Self::Intr,
            Exit::SetTpr => Self::SetTpr,
            Exit::TprAccess => Self::TprAccess,
            Exit::Nmi => Self::Nmi,
            Exit::IoapicEoi(_) => Self::IoapicEoi,
            Exit::Hyperv => Self::Hyperv,
            Exit::Foreign(_) => Self::Foreign,
            Exit::Unknown => Self::Unknown,
            Exit::Unsupported(_) => Self::Unsupported,
        }
    }
}

/// The kernel's name for a KVM_EXIT_* number that is not handled (KVM API 5), without the prefix.
#[must_use]
pub fn kvm_exit_name(number: u32) -> &'static str {
    match number {
        kvm::KVM_EXIT_S390_SIEIC => "S390_SIEIC",
        kvm::KVM_EXIT_S390_RESET => "S390_RESET",
        kvm::KVM_EXIT_DCR => "DCR",
        kvm::KVM_EXIT_OSI => "OSI",
        kvm::KVM_EXIT_PAPR_HCALL => "PAPR_HCALL",
        kvm::KVM_EXIT_S390_UCONTROL => "S390_UCONTROL",
        kvm::KVM_EXIT_WATCHDOG => "WATCHDOG",
        kvm::KVM_EXIT_S390_TSCH => "S390_TSCH",
        kvm::KVM_EXIT_EPR => "EPR",
        kvm::KVM_EXIT_S390_STSI => "S390_STSI",
        kvm::KVM_EXIT_ARM_NISV => "ARM_NISV",
        kvm::KVM_EXIT_DIRTY_RING_FULL => "DIRTY_RING_FULL",
        kvm::KVM_EXIT_AP_RESET_HOLD => "AP_RESET_HOLD",
        kvm::KVM_EXIT_X86_BUS_LOCK => "X86_BUS_LOCK",
        kvm::KVM_EXIT_XEN => "XEN",
        kvm::KVM_EXIT_RISCV_SBI => "RISCV_SBI",
        kvm::KVM_EXIT_RISCV_CSR => "RISCV_CSR",
        kvm::KVM_EXIT_NOTIFY => "NOTIFY",
        kvm::KVM_EXIT_LOONGARCH_IOCSR => "LOONGARCH_IOCSR",
        40 => "TDX",
        _ => "of a kernel newer than this hwvmm",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn indices_and_names_are_distinct() {
        for (index, reason) in ExitReason::ALL.iter().enumerate() {
            assert_eq!(reason.index(), index);
        }
        let names: HashSet<_> = ExitReason::ALL.iter().map(|reason| reason.name()).collect();
        assert_eq!(names.len(), ExitReason::COUNT);
    }
}
