//! VMX basic exit reasons (Intel SDM vol. 3D app. C).

/// Bit 31 of an exit reason: the VM entry failed (SDM vol. 3C §28.8).
pub const ENTRY_FAILURE: u64 = 1 << 31;

const NAMES: [&str; 86] = [
    "EXCEPTION_NMI",
    "EXTERNAL_INTERRUPT",
    "TRIPLE_FAULT",
    "INIT_SIGNAL",
    "SIPI_SIGNAL",
    "IO_SMI",
    "OTHER_SMI",
    "INTERRUPT_WINDOW",
    "NMI_WINDOW",
    "TASK_SWITCH",
    "CPUID",
    "GETSEC",
    "HLT",
    "INVD",
    "INVLPG",
    "RDPMC",
    "RDTSC",
    "RSM",
    "VMCALL",
    "VMCLEAR",
    "VMLAUNCH",
    "VMPTRLD",
    "VMPTRST",
    "VMREAD",
    "VMRESUME",
    "VMWRITE",
    "VMXOFF",
    "VMXON",
    "CR_ACCESS",
    "DR_ACCESS",
    "IO_INSTRUCTION",
    "MSR_READ",
    "MSR_WRITE",
    "INVALID_GUEST_STATE",
    "MSR_LOADING",
    "",
    "MWAIT",
    "MONITOR_TRAP",
    "",
    "MONITOR",
    "PAUSE",
    "MACHINE_CHECK",
    "",
    "TPR_BELOW_THRESHOLD",
    "APIC_ACCESS",
    "VIRTUALIZED_EOI",
    "GDTR_IDTR",
    "LDTR_TR",
    "EPT_VIOLATION",
    "EPT_MISCONFIG",
    "INVEPT",
    "RDTSCP",
    "PREEMPTION_TIMER",
    "INVVPID",
    "WBINVD",
    "XSETBV",
    "APIC_WRITE",
    "RDRAND",
    "INVPCID",
    "VMFUNC",
    "ENCLS",
    "RDSEED",
    "PML_FULL",
    "XSAVES",
    "XRSTORS",
    "PCONFIG",
    "SPP",
    "UMWAIT",
    "TPAUSE",
    "LOADIWKEY",
    "ENCLV",
    "",
    "ENQCMD_PASID",
    "ENQCMDS_PASID",
    "BUS_LOCK",
    "NOTIFY",
    "SEAMCALL",
    "TDCALL",
    "RDMSRLIST",
    "WRMSRLIST",
    "URDMSR",
    "UWRMSR",
    "",
    "",
    "MSR_READ_IMM",
    "MSR_WRITE_IMM",
];

/// The name of an exit reason's basic part (bits 15:0).
#[must_use]
pub fn name(reason: u64) -> Option<&'static str> {
    let index = usize::try_from(reason & 0xffff).ok()?;
    NAMES.get(index).copied().filter(|name| !name.is_empty())
}

#[cfg(test)]
mod tests {
    #[test]
    fn names_are_at_their_exit_reasons() {
        for (reason, name) in [
            (10, "CPUID"),
            (30, "IO_INSTRUCTION"),
            (48, "EPT_VIOLATION"),
            (67, "UMWAIT"),
            (75, "NOTIFY"),
            (77, "TDCALL"),
            (84, "MSR_READ_IMM"),
            (85, "MSR_WRITE_IMM"),
        ] {
            assert_eq!(super::name(reason), Some(name));
        }
        assert_eq!(super::name(super::ENTRY_FAILURE | 0x21), Some("INVALID_GUEST_STATE"));
        assert_eq!((super::name(35), super::name(86)), (None, None));
    }

    /// The numbers of EXIT_REASON_* in Linux 6.18, arch/x86/include/uapi/asm/vmx.h.
    #[test]
    fn all_that_linux_knows_have_names() {
        let linux = (0..=85).filter(|reason| !matches!(reason, 35 | 38 | 42 | 71 | 82 | 83));
        assert!(linux.into_iter().all(|reason| super::name(reason).is_some()));
    }
}
