//! Model-specific registers that hwvmm sets before the guest runs (SDM vol. 4).

use kvm_bindings::kvm_msr_entry;

/// `IA32_MISC_ENABLE`.
pub const IA32_MISC_ENABLE: u32 = 0x1a0;
/// `IA32_MTRR_DEF_TYPE`.
pub const IA32_MTRR_DEF_TYPE: u32 = 0x2ff;

/// Where SYSCALL enters the kernel (APM vol. 2 §6.1.1).
pub const IA32_LSTAR: u32 = 0xc000_0082;

const MISC_ENABLE_FAST_STRING: u64 = 1;
const MTRR_ENABLE: u64 = 1 << 11;
const MTRR_TYPE_WRITE_BACK: u64 = 6;

/// What firmware would have left behind: fast strings on, and all memory write-back. Without an enabled MTRR
/// default type Linux leaves the PAT off.
#[must_use]
pub fn boot_msrs() -> Vec<kvm_msr_entry> {
    let entry = |index, data| kvm_msr_entry { index, data, ..Default::default() };
    vec![
        entry(IA32_MISC_ENABLE, MISC_ENABLE_FAST_STRING),
        entry(IA32_MTRR_DEF_TYPE, MTRR_ENABLE | MTRR_TYPE_WRITE_BACK),
    ]
}
