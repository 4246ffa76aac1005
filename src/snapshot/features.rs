//! The features of the processor that a guest was told of, against those of this host.

use kvm_bindings::kvm_cpuid_entry2;
use thiserror::Error;

/// A guest's processor is not to be had here.
#[derive(Debug, PartialEq, Eq, Error)]
pub enum FeatureError {
    /// The rules of another vendor.
    #[error("the snapshot is of a processor of {saved}, and this host has one of {host}")]
    Vendor {
        /// The vendor of the snapshot's processor.
        saved: String,
        /// That of this host's.
        host: String,
    },
    /// A feature is missing.
    #[error("this host's processor or KVM does not have {0}, which the guest of the snapshot may use")]
    Missing(String),
}

/// A register that CPUID gives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

impl Register {
    fn of(self, leaf: &kvm_cpuid_entry2) -> u32 {
        match self {
            Self::Eax => leaf.eax,
            Self::Ebx => leaf.ebx,
            Self::Ecx => leaf.ecx,
            Self::Edx => leaf.edx,
        }
    }
}

/// A register whose bits are features (SDM vol. 2A, CPUID; APM vol. 3, appendix E; KVM's cpuid.rst).
struct Word {
    leaf: u32,
    index: u32,
    register: Register,
    /// Bits that say what the operating system or hwvmm has set, and not what the processor has.
    other: u32,
    names: &'static [(u32, &'static str)],
}

/// Leaf 1 ECX: OSXSAVE, the TSC-deadline timer (a capability of its own), x2APIC (KVM's), and the hypervisor's bit.
const OTHER_1_ECX: u32 = 1 << 27 | 1 << 24 | 1 << 21 | 1 << 31;
/// Leaf 1 EDX: the number of threads is above 1.
const OTHER_1_EDX: u32 = 1 << 28;
/// Leaf 0x8000_0001 ECX: how threads are told.
const OTHER_AMD: u32 = 1 << 1 | 1 << 22;

const WORDS: &[Word] = &[
    Word {
        leaf: 1,
        index: 0,
        register: Register::Ecx,
        other: OTHER_1_ECX,
        names: &[
            (0, "sse3"),
            (1, "pclmulqdq"),
            (9, "ssse3"),
            (12, "fma"),
            (13, "cx16"),
            (19, "sse4_1"),
            (20, "sse4_2"),
            (22, "movbe"),
            (23, "popcnt"),
            (25, "aes"),
            (26, "xsave"),
            (28, "avx"),
            (29, "f16c"),
            (30, "rdrand"),
        ],
    },
    Word {
        leaf: 1,
        index: 0,
        register: Register::Edx,
        other: OTHER_1_EDX,
        names: &[(0, "fpu"), (4, "tsc"), (15, "cmov"), (23, "mmx"), (24, "fxsr"), (25, "sse"), (26, "sse2")],
    },
    Word {
        leaf: 7,
        index: 0,
        register: Register::Ebx,
        other: 0,
        names: &[
            (0, "fsgsbase"),
            (3, "bmi1"),
            (5, "avx2"),
            (7, "smep"),
            (8, "bmi2"),
            (9, "erms"),
            (10, "invpcid"),
            (16, "avx512f"),
            (17, "avx512dq"),
            (18, "rdseed"),
            (19, "adx"),
            (20, "smap"),
            (23, "clflushopt"),
            (24, "clwb"),
            (29, "sha_ni"),
            (30, "avx512bw"),
            (31, "avx512vl"),
        ],
    },
    // OSPKE follows CR4.
    Word { leaf: 7, index: 0, register: Register::Ecx, other: 1 << 4, names: &[(2, "umip"), (3, "pku"), (16, "la57")] },
    Word { leaf: 7, index: 0, register: Register::Edx, other: 0, names: &[(4, "fsrm"), (26, "spec_ctrl")] },
    Word { leaf: 7, index: 1, register: Register::Eax, other: 0, names: &[(4, "avx_vnni"), (5, "avx512_bf16")] },
    Word { leaf: 7, index: 1, register: Register::Ecx, other: 0, names: &[] },
    Word {
        leaf: 7,
        index: 1,
        register: Register::Edx,
        other: 0,
        names: &[(4, "avx_vnni_int8"), (5, "avx_ne_convert"), (14, "prefetchi")],
    },
    Word { leaf: 7, index: 2, register: Register::Edx, other: 0, names: &[(4, "bhi_ctrl")] },
    Word { leaf: 0xd, index: 0, register: Register::Eax, other: 0, names: &[] },
    Word {
        leaf: 0xd,
        index: 1,
        register: Register::Eax,
        other: 0,
        names: &[(0, "xsaveopt"), (1, "xsavec"), (2, "xgetbv1"), (3, "xsaves")],
    },
    Word {
        leaf: 0x4000_0001,
        index: 0,
        register: Register::Eax,
        other: 0,
        names: &[(0, "kvmclock"), (3, "kvmclock2")],
    },
    Word {
        leaf: 0x8000_0001,
        index: 0,
        register: Register::Ecx,
        other: OTHER_AMD,
        names: &[(0, "lahf_lm"), (2, "svm"), (5, "abm"), (6, "sse4a"), (16, "fma4")],
    },
    Word {
        leaf: 0x8000_0001,
        index: 0,
        register: Register::Edx,
        other: 0,
        names: &[(11, "syscall"), (20, "nx"), (26, "pdpe1gb"), (27, "rdtscp"), (29, "lm")],
    },
    Word { leaf: 0x8000_0007, index: 0, register: Register::Edx, other: 0, names: &[(8, "constant_tsc")] },
    Word { leaf: 0x8000_0021, index: 0, register: Register::Eax, other: 0, names: &[(8, "autoibrs")] },
    Word { leaf: 0x8000_0008, index: 0, register: Register::Ebx, other: 0, names: &[(0, "clzero"), (9, "wbnoinvd")] },
];

impl Word {
    fn bits(&self, leaves: &[kvm_cpuid_entry2]) -> u32 {
        // A snapshot that was tampered with can have a leaf twice.
        let same = leaves.iter().filter(|leaf| leaf.function == self.leaf && leaf.index == self.index);
        same.fold(0, |bits, leaf| bits | self.register.of(leaf)) & !self.other
    }

    fn name(&self, bit: u32) -> String {
        match self.names.iter().find(|(number, _)| *number == bit) {
            Some((_, name)) => (*name).to_owned(),
            None => format!("bit {bit} of {:?} of CPUID leaf {:#x}.{}", self.register, self.leaf, self.index),
        }
    }
}

/// The vendor's name from leaf 0, printable ASCII only.
#[must_use]
pub fn vendor_name(leaves: &[kvm_cpuid_entry2]) -> String {
    let Some(leaf) = leaves.iter().find(|leaf| leaf.function == 0) else { return String::new() };
    let bytes = [leaf.ebx, leaf.edx, leaf.ecx].into_iter().flat_map(u32::to_le_bytes);
    bytes.filter(u8::is_ascii_graphic).map(char::from).collect()
}

/// The features in `leaves` that have a name.
pub(super) fn named(leaves: &[kvm_cpuid_entry2]) -> Vec<String> {
    let of_word = |word: &Word| {
        let bits = word.bits(leaves);
        let set = word.names.iter().filter(|(bit, _)| bits >> bit & 1 == 1).map(|(_, name)| (*name).to_owned());
        set.collect::<Vec<_>>()
    };
    WORDS.iter().flat_map(of_word).collect()
}

/// Checks that a processor with the leaves `supported` has the vendor and all features of `saved`.
///
/// # Errors
/// [`FeatureError`], with the first feature that is missing.
pub fn check_features(saved: &[kvm_cpuid_entry2], supported: &[kvm_cpuid_entry2]) -> Result<(), FeatureError> {
    let (vendor, host) = (vendor_name(saved), vendor_name(supported));
    if vendor != host {
        return Err(FeatureError::Vendor { saved: vendor, host });
    }
    for word in WORDS {
        let missing = word.bits(saved) & !word.bits(supported);
        if missing != 0 {
            return Err(FeatureError::Missing(word.name(missing.trailing_zeros())));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32, registers: [u32; 4]) -> kvm_cpuid_entry2 {
        let [eax, ebx, ecx, edx] = registers;
        kvm_cpuid_entry2 { function, eax, ebx, ecx, edx, ..Default::default() }
    }

    fn processor(vendor: &[u8; 12], ecx: u32, ebx7: u32) -> Vec<kvm_cpuid_entry2> {
        let word = |at: usize| u32::from_le_bytes([vendor[at], vendor[at + 1], vendor[at + 2], vendor[at + 3]]);
        vec![leaf(0, [7, word(0), word(8), word(4)]), leaf(1, [0, 0, ecx, 1]), leaf(7, [0, ebx7, 0, 0])]
    }

    #[test]
    fn a_missing_feature_is_named() {
        let saved = processor(b"AuthenticAMD", 1 << 27 | 1 << 24 | 1, 1 << 5 | 1 << 1);
        assert_eq!(named(&saved), ["sse3", "fpu", "avx2"]);
        assert_eq!(check_features(&saved, &processor(b"AuthenticAMD", 1, u32::MAX)), Ok(()));
        let error = check_features(&saved, &processor(b"AuthenticAMD", 1, 1 << 1)).expect_err("missing").to_string();
        assert!(error.contains("does not have avx2"), "{error}");
        let error = check_features(&saved, &processor(b"AuthenticAMD", 1, 1 << 5)).expect_err("missing").to_string();
        assert!(error.contains("bit 1 of Ebx of CPUID leaf 0x7.0"), "{error}");
    }

    #[test]
    fn another_vendor_is_named() {
        let saved = processor(b"AuthenticAMD", 0, 0);
        let error = check_features(&saved, &processor(b"GenuineIntel", 0, 0)).expect_err("refused").to_string();
        assert!(error.contains("AuthenticAMD") && error.contains("GenuineIntel"), "{error}");
    }
}
