//! Numbers of MSRs (SDM vol. 4), and the MSRs that are set before the guest runs.

use kvm_bindings::kvm_msr_entry;

/// The number of `IA32_TIME_STAMP_COUNTER`.
pub const IA32_TSC: u32 = 0x10;
/// The number of `IA32_TSC_DEADLINE`.
pub const IA32_TSC_DEADLINE: u32 = 0x6e0;
/// The number of `IA32_MCG_CAP`, whose low byte is the number of machine-check banks.
pub const IA32_MCG_CAP: u32 = 0x179;
/// The numbers of the MTRRs: bases and masks of variable ranges, fixed ranges, and the default type (SDM vol. 3A §12.11.2).
/// KVM does not list them among those to be saved.
pub const MTRRS: [u32; 28] = [
    0x200,
    0x201,
    0x202,
    0x203,
    0x204,
    0x205,
    0x206,
    0x207,
    0x208,
    0x209,
    0x20a,
    0x20b,
    0x20c,
    0x20d,
    0x20e,
    0x20f,
    0x250,
    0x258,
    0x259,
    0x268,
    0x269,
    0x26a,
    0x26b,
    0x26c,
    0x26d,
    0x26e,
    0x26f,
    IA32_MTRR_DEF_TYPE,
];

/// The number of `IA32_MISC_ENABLE`.
pub const IA32_MISC_ENABLE: u32 = 0x1a0;
/// The number of `IA32_MTRR_DEF_TYPE`.
pub const IA32_MTRR_DEF_TYPE: u32 = 0x2ff;

/// The number of `IA32_LSTAR`, the address that SYSCALL jumps to (APM vol. 2 §6.1.1).
pub const IA32_LSTAR: u32 = 0xc000_0082;

const MISC_ENABLE_FAST_STRING: u64 = 1;
const MTRR_ENABLE: u64 = 1 << 11;
const MTRR_TYPE_WRITE_BACK: u64 = 6;

/// The MSRs as firmware would have set them: fast strings are enabled, and all memory is write-back. Linux disables the PAT
/// where the MTRR default type is not enabled.
#[must_use]
pub fn boot_msrs() -> Vec<kvm_msr_entry> {
    let entry = |index, data| kvm_msr_entry { index, data, ..Default::default() };
    vec![
        entry(IA32_MISC_ENABLE, MISC_ENABLE_FAST_STRING),
        entry(IA32_MTRR_DEF_TYPE, MTRR_ENABLE | MTRR_TYPE_WRITE_BACK),
    ]
}
