//! Numbers of MSRs (SDM vol. 4), and the MSRs that are set before the guest runs.

use kvm_bindings::kvm_msr_entry;

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
