//! `#VMEXIT` codes: the values of EXITCODE in the VMCB (APM vol. 2 app. C).

/// Exit codes with names of their own.
const NAMES: &[(u64, &str)] = &[
    (0x00, "CR0_READ"),
    (0x02, "CR2_READ"),
    (0x03, "CR3_READ"),
    (0x04, "CR4_READ"),
    (0x08, "CR8_READ"),
    (0x10, "CR0_WRITE"),
    (0x12, "CR2_WRITE"),
    (0x13, "CR3_WRITE"),
    (0x14, "CR4_WRITE"),
    (0x18, "CR8_WRITE"),
    (0x41, "EXCP_DB"),
    (0x43, "EXCP_BP"),
    (0x46, "EXCP_UD"),
    (0x47, "EXCP_NM"),
    (0x4d, "EXCP_GP"),
    (0x4e, "EXCP_PF"),
    (0x51, "EXCP_AC"),
    (0x52, "EXCP_MC"),
    (0x60, "INTR"),
    (0x61, "NMI"),
    (0x62, "SMI"),
    (0x63, "INIT"),
    (0x64, "VINTR"),
    (0x65, "CR0_SEL_WRITE"),
    (0x66, "IDTR_READ"),
    (0x67, "GDTR_READ"),
    (0x68, "LDTR_READ"),
    (0x69, "TR_READ"),
    (0x6a, "IDTR_WRITE"),
    (0x6b, "GDTR_WRITE"),
    (0x6c, "LDTR_WRITE"),
    (0x6d, "TR_WRITE"),
    (0x6e, "RDTSC"),
    (0x6f, "RDPMC"),
    (0x70, "PUSHF"),
    (0x71, "POPF"),
    (0x72, "CPUID"),
    (0x73, "RSM"),
    (0x74, "IRET"),
    (0x75, "SWINT"),
    (0x76, "INVD"),
    (0x77, "PAUSE"),
    (0x78, "HLT"),
    (0x79, "INVLPG"),
    (0x7a, "INVLPGA"),
    (0x7b, "IOIO"),
    (0x7c, "MSR"),
    (0x7d, "TASK_SWITCH"),
    (0x7e, "FERR_FREEZE"),
    (0x7f, "SHUTDOWN"),
    (0x80, "VMRUN"),
    (0x81, "VMMCALL"),
    (0x82, "VMLOAD"),
    (0x83, "VMSAVE"),
    (0x84, "STGI"),
    (0x85, "CLGI"),
    (0x86, "SKINIT"),
    (0x87, "RDTSCP"),
    (0x88, "ICEBP"),
    (0x89, "WBINVD"),
    (0x8a, "MONITOR"),
    (0x8b, "MWAIT"),
    (0x8c, "MWAIT_CONDITIONAL"),
    (0x8d, "XSETBV"),
    (0x8e, "RDPRU"),
    (0x8f, "EFER_WRITE_TRAP"),
    (0xa0, "INVLPGB"),
    (0xa1, "INVLPGB_ILLEGAL"),
    (0xa2, "INVPCID"),
    (0xa3, "MCOMMIT"),
    (0xa4, "TLBSYNC"),
    (0xa5, "BUSLOCK"),
    (0xa6, "IDLE_HLT"),
    (0x400, "NPF"),
    (0x401, "AVIC_INCOMPLETE_IPI"),
    (0x402, "AVIC_NOACCEL"),
    (0x403, "VMGEXIT"),
];

/// The name of an exit code, without its `VMEXIT_` prefix.
#[must_use]
pub fn name(code: u64) -> Option<&'static str> {
    let own = NAMES.iter().find(|(known, _)| *known == code).map(|(_, name)| *name);
    own.or(match code {
        0x00..=0x0f => Some("CR_READ"),
        0x10..=0x1f => Some("CR_WRITE"),
        0x20..=0x2f => Some("DR_READ"),
        0x30..=0x3f => Some("DR_WRITE"),
        0x40..=0x5f => Some("EXCP"),
        0x90..=0x9f => Some("CR_WRITE_TRAP"),
        // -1 to -4, of which the tracepoint kvm_exit has the lower 32 bits.
        0xffff_ffff | u64::MAX => Some("INVALID"),
        0xffff_fffe | 0xffff_ffff_ffff_fffe => Some("BUSY"),
        0xffff_fffd | 0xffff_ffff_ffff_fffd => Some("IDLE_REQUIRED"),
        0xffff_fffc | 0xffff_ffff_ffff_fffc => Some("INVALID_PMC"),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    #[test]
    fn exit_codes_of_a_linux_boot_have_names() {
        for (code, name) in [
            (0x60, "INTR"),
            (0x72, "CPUID"),
            (0x7b, "IOIO"),
            (0x7c, "MSR"),
            (0x400, "NPF"),
            (0x2f, "DR_READ"),
            (0x4e, "EXCP_PF"),
            (0x4f, "EXCP"),
            (0x12, "CR2_WRITE"),
            (0x05, "CR_READ"),
            (0xa4, "TLBSYNC"),
            (0xa6, "IDLE_HLT"),
            (0xffff_fffe, "BUSY"),
            (u64::MAX, "INVALID"),
        ] {
            assert_eq!(super::name(code), Some(name));
        }
        assert_eq!(super::name(0x3ff), None);
    }

    /// The numbers of SVM_EXIT_* in Linux 6.18, arch/x86/include/uapi/asm/svm.h, without those of the GHCB protocol.
    #[test]
    fn all_that_linux_knows_have_names() {
        let linux = (0x00..=0x9f).chain([0xa2, 0xa5, 0xa6]).chain(0x400..=0x403).chain([u64::MAX]);
        assert!(linux.into_iter().all(|code| super::name(code).is_some()));
    }
}
