//! Names of the MSRs that guests access (SDM vol. 4, APM vol. 2 app. A, Linux Documentation/virt/kvm/x86/msr.rst).

use std::borrow::Cow;

const NAMES: &[(u32, &str)] = &[
    (0x10, "TSC"),
    (0x17, "PLATFORM_ID"),
    (0x1b, "APIC_BASE"),
    (0x3a, "FEATURE_CONTROL"),
    (0x3b, "TSC_ADJUST"),
    (0x48, "SPEC_CTRL"),
    (0x49, "PRED_CMD"),
    (0x79, "BIOS_UPDT_TRIG"),
    (0x8b, "PATCH_LEVEL"),
    (0xce, "PLATFORM_INFO"),
    (0xe7, "MPERF"),
    (0xe8, "APERF"),
    (0xfe, "MTRRcap"),
    (0x10a, "ARCH_CAPABILITIES"),
    (0x140, "MISC_FEATURE_ENABLES"),
    (0x174, "SYSENTER_CS"),
    (0x175, "SYSENTER_ESP"),
    (0x176, "SYSENTER_EIP"),
    (0x179, "MCG_CAP"),
    (0x17a, "MCG_STATUS"),
    (0x17b, "MCG_CTL"),
    (0x199, "PERF_CTL"),
    (0x1a0, "MISC_ENABLE"),
    (0x1d9, "DEBUGCTL"),
    (0x250, "MTRRfix64K_00000"),
    (0x258, "MTRRfix16K_80000"),
    (0x259, "MTRRfix16K_A0000"),
    (0x277, "PAT"),
    (0x2ff, "MTRRdefType"),
    (0x38d, "FIXED_CTR_CTRL"),
    (0x38f, "PERF_GLOBAL_CTRL"),
    (0x606, "RAPL_POWER_UNIT"),
    (0x6e0, "TSC_DEADLINE"),
    (0xda0, "XSS"),
    (0x4b56_4d00, "KVM_WALL_CLOCK_NEW"),
    (0x4b56_4d01, "KVM_SYSTEM_TIME_NEW"),
    (0x4b56_4d02, "KVM_ASYNC_PF_EN"),
    (0x4b56_4d03, "KVM_STEAL_TIME"),
    (0x4b56_4d04, "KVM_EOI_EN"),
    (0x4b56_4d05, "KVM_POLL_CONTROL"),
    (0x4b56_4d06, "KVM_ASYNC_PF_INT"),
    (0x4b56_4d07, "KVM_ASYNC_PF_ACK"),
    (0xc000_0080, "EFER"),
    (0xc000_0081, "STAR"),
    (0xc000_0082, "LSTAR"),
    (0xc000_0083, "CSTAR"),
    (0xc000_0084, "SYSCALL_MASK"),
    (0xc000_0100, "FS_BASE"),
    (0xc000_0101, "GS_BASE"),
    (0xc000_0102, "KERNEL_GS_BASE"),
    (0xc000_0103, "TSC_AUX"),
    (0xc001_0004, "K7_PERFCTR0"),
    (0xc001_0010, "SYSCFG"),
    (0xc001_0015, "HWCR"),
    (0xc001_001f, "NB_CFG"),
    (0xc001_0055, "INT_PENDING_MSG"),
    (0xc001_0058, "MMIO_CONF_BASE"),
    (0xc001_0061, "PSTATE_CUR_LIMIT"),
    (0xc001_0114, "VM_CR"),
    (0xc001_0140, "OSVW_ID_LENGTH"),
    (0xc001_0141, "OSVW_STATUS"),
    (0xc001_011f, "VIRT_SPEC_CTRL"),
    (0xc001_1020, "LS_CFG"),
    (0xc001_1022, "DC_CFG"),
    (0xc001_1023, "BU_CFG2"),
    (0xc001_1029, "DE_CFG"),
    (0xc001_102a, "BU_CFG3"),
];

/// Registers of the x2APIC: MSR 0x800 + register (SDM vol. 3A table 11-6).
const X2APIC: &[(u32, &str)] = &[
    (0x02, "ID"),
    (0x03, "VERSION"),
    (0x08, "TPR"),
    (0x0a, "PPR"),
    (0x0b, "EOI"),
    (0x0d, "LDR"),
    (0x0f, "SVR"),
    (0x28, "ESR"),
    (0x2f, "LVT_CMCI"),
    (0x30, "ICR"),
    (0x32, "LVT_TIMER"),
    (0x33, "LVT_THERMAL"),
    (0x34, "LVT_PERF"),
    (0x35, "LVT_LINT0"),
    (0x36, "LVT_LINT1"),
    (0x37, "LVT_ERROR"),
    (0x38, "TIMER_INITIAL"),
    (0x39, "TIMER_CURRENT"),
    (0x3e, "TIMER_DIVIDE"),
    (0x3f, "SELF_IPI"),
];

fn find(names: &[(u32, &'static str)], number: u32) -> Option<&'static str> {
    names.iter().find(|(known, _)| *known == number).map(|(_, name)| *name)
}

/// The name of the MSR `index`, without a prefix such as `IA32_`.
#[must_use]
pub fn msr_name(index: u32) -> Option<Cow<'static, str>> {
    if let Some(name) = find(NAMES, index) {
        return Some(Cow::Borrowed(name));
    }
    Some(Cow::Owned(match index {
        0x800..=0x8ff => match (find(X2APIC, index - 0x800), index - 0x800) {
            (Some(name), _) => format!("x2APIC {name}"),
            (None, register @ 0x10..=0x17) => format!("x2APIC ISR{}", register - 0x10),
            (None, register @ 0x18..=0x1f) => format!("x2APIC TMR{}", register - 0x18),
            (None, register @ 0x20..=0x27) => format!("x2APIC IRR{}", register - 0x20),
            (None, register) => format!("x2APIC {register:#x}"),
        },
        0x200..=0x21f if index.is_multiple_of(2) => format!("MTRRphysBase{}", (index - 0x200) / 2),
        0x200..=0x21f => format!("MTRRphysMask{}", (index - 0x201) / 2),
        0x268..=0x26f => format!("MTRRfix4K_{:X}000", 0xc0 + (index - 0x268) * 8),
        0x400..=0x47f => {
            format!("MC{}_{}", (index - 0x400) / 4, ["CTL", "STATUS", "ADDR", "MISC"][(index & 3) as usize])
        }
        0xc1..=0xc8 => format!("PMC{}", index - 0xc1),
        0x186..=0x18d => format!("PERFEVTSEL{}", index - 0x186),
        0x280..=0x29f => format!("MC{}_CTL2", index - 0x280),
        0xc001_0000..=0xc001_0003 => format!("K7_EVNTSEL{}", index - 0xc001_0000),
        0xc001_0200..=0xc001_020b if index.is_multiple_of(2) => format!("PERF_CTL{}", (index - 0xc001_0200) / 2),
        0xc001_0200..=0xc001_020b => format!("PERF_CTR{}", (index - 0xc001_0201) / 2),
        0x4000_0000..=0x4000_01ff => format!("Hyper-V {index:#x}"),
        _ => return None,
    }))
}

#[cfg(test)]
mod tests {
    use super::msr_name;

    #[test]
    fn msrs_that_linux_uses_have_names() {
        for (index, name) in [
            (0x6e0, "TSC_DEADLINE"),
            (0x80b, "x2APIC EOI"),
            (0x811, "x2APIC ISR1"),
            (0x201, "MTRRphysMask0"),
            (0x26f, "MTRRfix4K_F8000"),
            (0x401, "MC0_STATUS"),
            (0x4b56_4d01, "KVM_SYSTEM_TIME_NEW"),
        ] {
            assert_eq!(msr_name(index).as_deref(), Some(name));
        }
        assert_eq!(msr_name(0x12345), None);
    }
}
