//! The capabilities that hwvmm uses (KVM API 8 and 4.4), and what is lost without each.

use kvm_bindings as kvm;
use std::fmt;
use std::num::ParseIntError;
use std::str::FromStr;

/// The version of a Linux kernel, without its patch level.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct KernelVersion {
    /// The number before the first point.
    pub major: u32,
    /// The number behind it.
    pub minor: u32,
}

impl fmt::Display for KernelVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

impl FromStr for KernelVersion {
    type Err = ParseIntError;

    /// Reads a release as uname(2) has it, such as `6.1.0-56-amd64`.
    fn from_str(release: &str) -> Result<Self, ParseIntError> {
        let mut numbers = release.split(|c: char| !c.is_ascii_digit());
        let mut number = || numbers.next().unwrap_or_default().parse();
        Ok(Self { major: number()?, minor: number()? })
    }
}

/// How much depends on a capability.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// No guest runs without it.
    Required,
    /// Something works less well.
    Useful,
}

/// A capability of KVM's (KVM API 4.4).
#[derive(Clone, Copy, Debug)]
pub struct Capability {
    /// The number of the capability (KVM_CAP_*), as KVM_CHECK_EXTENSION takes it.
    pub number: u32,
    /// The name without KVM_CAP_.
    pub name: &'static str,
    /// How much depends on it.
    pub need: Need,
    /// What is lost without it, in English.
    pub lost: &'static str,
    /// The first Linux with it, where a host may run an older one.
    pub since: Option<KernelVersion>,
}

impl Capability {
    const fn since(self, major: u32, minor: u32) -> Self {
        Self { since: Some(KernelVersion { major, minor }), ..self }
    }
}

const fn required(number: u32, name: &'static str, lost: &'static str) -> Capability {
    Capability { number, name, need: Need::Required, lost, since: None }
}

const fn useful(number: u32, name: &'static str, lost: &'static str) -> Capability {
    Capability { number, name, need: Need::Useful, lost, since: None }
}

/// All capabilities that hwvmm uses.
pub const USED: &[Capability] = &[
    required(kvm::KVM_CAP_USER_MEMORY, "USER_MEMORY", "guests have no memory"),
    required(kvm::KVM_CAP_IRQCHIP, "IRQCHIP", "no interrupt controllers in the kernel"),
    required(kvm::KVM_CAP_EXT_CPUID, "EXT_CPUID", "the guest's processor cannot be described"),
    required(kvm::KVM_CAP_IRQFD, "IRQFD", "devices cannot raise interrupts"),
    required(kvm::KVM_CAP_IMMEDIATE_EXIT, "IMMEDIATE_EXIT", "a running guest cannot be stopped safely").since(4, 11),
    useful(kvm::KVM_CAP_SYNC_REGS, "SYNC_REGS", "the last exits are shown without their RIP"),
    useful(kvm::KVM_CAP_TSC_DEADLINE_TIMER, "TSC_DEADLINE_TIMER", "timers cost two exits instead of one"),
    useful(kvm::KVM_CAP_GET_TSC_KHZ, "GET_TSC_KHZ", "guests without kvmclock calibrate the TSC themselves"),
    useful(kvm::KVM_CAP_IOEVENTFD, "IOEVENTFD", "each doorbell goes through user space"),
    useful(kvm::KVM_CAP_BINARY_STATS_FD, "BINARY_STATS_FD", "--stats has no statistics of KVM").since(5, 14),
    useful(kvm::KVM_CAP_X86_USER_SPACE_MSR, "X86_USER_SPACE_MSR", "--trap-msrs is not available").since(5, 10),
    useful(kvm::KVM_CAP_PRE_FAULT_MEMORY, "PRE_FAULT_MEMORY", "prefault=on fills the host's pages only").since(6, 11),
    useful(kvm::KVM_CAP_X86_DISABLE_EXITS, "X86_DISABLE_EXITS", "HLT and PAUSE always exit").since(4, 17),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases_are_read() {
        let version = |text: &str| text.parse::<KernelVersion>().ok().map(|version| version.to_string());
        assert_eq!(version("6.1.0-56-amd64").as_deref(), Some("6.1"));
        assert_eq!(version("7.0-rc1").as_deref(), Some("7.0"));
        assert_eq!((version("unknown"), version("6")), (None, None));
        assert!(KernelVersion { major: 6, minor: 9 } < KernelVersion { major: 6, minor: 11 });
    }
}
