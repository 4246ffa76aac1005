//! The capabilities that hwvmm uses (KVM API 8 and 4.4), and what is lost without each.

use kvm_bindings as kvm;

/// How much depends on a capability.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// No guest runs without it.
    Required,
    /// Something works less well.
    Useful,
}

/// One capability.
#[derive(Clone, Copy, Debug)]
pub struct Capability {
    /// KVM_CAP_*.
    pub number: u32,
    /// Its name without KVM_CAP_.
    pub name: &'static str,
    /// How much depends on it.
    pub need: Need,
    /// What is lost without it.
    pub lost: &'static str,
}

const fn required(number: u32, name: &'static str, lost: &'static str) -> Capability {
    Capability { number, name, need: Need::Required, lost }
}

const fn useful(number: u32, name: &'static str, lost: &'static str) -> Capability {
    Capability { number, name, need: Need::Useful, lost }
}

/// All of them.
pub const USED: &[Capability] = &[
    required(kvm::KVM_CAP_USER_MEMORY, "USER_MEMORY", "guests have no memory"),
    required(kvm::KVM_CAP_IRQCHIP, "IRQCHIP", "no interrupt controllers in the kernel"),
    required(kvm::KVM_CAP_EXT_CPUID, "EXT_CPUID", "the guest's processor cannot be described"),
    required(kvm::KVM_CAP_IRQFD, "IRQFD", "devices cannot raise interrupts"),
    required(kvm::KVM_CAP_IMMEDIATE_EXIT, "IMMEDIATE_EXIT", "a running guest cannot be stopped safely"),
    useful(kvm::KVM_CAP_SYNC_REGS, "SYNC_REGS", "the last exits are shown without their RIP"),
    useful(kvm::KVM_CAP_TSC_DEADLINE_TIMER, "TSC_DEADLINE_TIMER", "timers cost two exits instead of one"),
    useful(kvm::KVM_CAP_GET_TSC_KHZ, "GET_TSC_KHZ", "guests without kvmclock calibrate the TSC themselves"),
    useful(kvm::KVM_CAP_IOEVENTFD, "IOEVENTFD", "each doorbell goes through user space"),
    useful(kvm::KVM_CAP_BINARY_STATS_FD, "BINARY_STATS_FD", "--stats has no figures of the kernel's"),
    useful(kvm::KVM_CAP_X86_USER_SPACE_MSR, "X86_USER_SPACE_MSR", "--trap-msrs is not there"),
    useful(
        kvm::KVM_CAP_PRE_FAULT_MEMORY,
        "PRE_FAULT_MEMORY",
        "prefault=on fills the host's pages only (before Linux 6.11)",
    ),
    useful(kvm::KVM_CAP_X86_DISABLE_EXITS, "X86_DISABLE_EXITS", "HLT and PAUSE always exit"),
];
