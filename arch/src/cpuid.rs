//! The CPUID leaves that hwvmm shows its guest: what KVM supports, with the topology, the APIC ids, the timers and the
//! TSC's frequency put in (SDM vol. 2A CPUID; APM vol. 3 app. E; KVM's leaves: Documentation/virt/kvm/x86/cpuid.rst).

use crate::topology::Topology;
use kvm_bindings::kvm_cpuid_entry2;

const HYPERVISOR: u32 = 1 << 31; // leaf 1 ecx
const TSC_DEADLINE: u32 = 1 << 24; // leaf 1 ecx
const X2APIC: u32 = 1 << 21; // leaf 1 ecx
const MTRR: u32 = 1 << 12;
const HTT: u32 = 1 << 28; // leaf 1 edx
const SIGNIFICANT_INDEX: u32 = 1; // KVM_CPUID_FLAG_SIGNIFCANT_INDEX
const CMP_LEGACY: u32 = 1 << 1; // leaf 0x8000_0001 ecx
const TOPOEXT: u32 = 1 << 22; // leaf 0x8000_0001 ecx

/// KVM's local APIC timer runs on a bus of 1 GHz.
const APIC_BUS_KHZ: u32 = 1_000_000;
const KVM_SIGNATURE_LEAF: u32 = 0x4000_0000;
const KVM_FEATURES_LEAF: u32 = 0x4000_0001;
const TIMING_LEAF: u32 = 0x4000_0010;
const AMD_TOPOLOGY_LEAF: u32 = 0x8000_001e;
const TOPOLOGY_LEAVES: [u32; 2] = [0xb, 0x1f];

/// What the leaves depend on, beside what KVM supports.
#[derive(Clone, Copy, Debug)]
pub struct CpuidOptions {
    /// Sockets, cores, threads.
    pub topology: Topology,
    /// This vCPU's APIC id.
    pub apic_id: u32,
    /// The guest's TSC frequency, where KVM tells it.
    pub tsc_khz: Option<u32>,
    /// Whether KVM has the TSC-deadline timer (`KVM_CAP_TSC_DEADLINE_TIMER`: Linux before 6.x does not put it into
    /// the supported leaves).
    pub tsc_deadline: bool,
    /// Whether the guest is told of x2APIC.
    pub x2apic: bool,
    /// Whether it is told the frequencies of TSC and APIC timer.
    pub tell_tsc: bool,
    /// KVM's paravirtual features (leaf 0x4000_0001 EAX) that it is not told of.
    pub hidden_features: u32,
    /// Whether it is told of MTRRs.
    pub mtrr: bool,
}

/// Which vendor's rules the leaves follow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Vendor {
    /// "GenuineIntel".
    Intel,
    /// "AuthenticAMD" or "HygonGenuine".
    Amd,
    /// Any other.
    Other,
}

/// The vendor that leaf 0 names.
#[must_use]
pub fn vendor(leaves: &[kvm_cpuid_entry2]) -> Vendor {
    let Some(leaf) = leaves.iter().find(|e| e.function == 0) else { return Vendor::Other };
    let name: Vec<u8> = [leaf.ebx, leaf.edx, leaf.ecx].iter().flat_map(|r| r.to_le_bytes()).collect();
    match name.as_slice() {
        b"GenuineIntel" => Vendor::Intel,
        b"AuthenticAMD" | b"HygonGenuine" => Vendor::Amd,
        _ => Vendor::Other,
    }
}

/// The leaves for one vCPU, from what KVM supports.
#[must_use]
pub fn for_vcpu(supported: &[kvm_cpuid_entry2], options: &CpuidOptions) -> Vec<kvm_cpuid_entry2> {
    let vendor = vendor(supported);
    let mut leaves: Vec<_> = supported.iter().filter(|e| !TOPOLOGY_LEAVES.contains(&e.function)).copied().collect();
    for leaf in &mut leaves {
        match leaf.function {
            1 => leaf_1(leaf, options),
            4 => cache_sharing(leaf, &options.topology, true),
            0x15 if vendor == Vendor::Intel && options.tell_tsc => leaf_15(leaf, options),
            KVM_FEATURES_LEAF => leaf.eax &= !options.hidden_features,
            0x8000_0001 if vendor == Vendor::Amd => amd_features(leaf, &options.topology, options.mtrr),
            0x8000_0008 if vendor == Vendor::Amd => amd_sizes(leaf, &options.topology),
            0x8000_001d => cache_sharing(leaf, &options.topology, false),
            AMD_TOPOLOGY_LEAF => amd_topology(leaf, options),
            _ => {}
        }
    }
    if vendor == Vendor::Amd && options.topology.threads > 1 {
        add_amd_topology(&mut leaves, options);
    }
    add_topology(&mut leaves, supported, options);
    if options.tell_tsc {
        add_timing(&mut leaves, options);
    }
    leaves
}

fn leaf_1(leaf: &mut kvm_cpuid_entry2, options: &CpuidOptions) {
    let threads = options.topology.threads_per_socket();
    // The number of APIC ids that a socket takes, not of its threads; 0xff is the field's largest.
    let ids = (1_u32 << options.topology.socket_shift()).min(0xff);
    leaf.ebx = leaf.ebx & 0x0000_ffff | ids << 16 | (options.apic_id & 0xff) << 24;
    leaf.ecx = (leaf.ecx | HYPERVISOR | X2APIC) & !if options.x2apic { 0 } else { X2APIC };
    leaf.ecx = if options.tsc_deadline { leaf.ecx | TSC_DEADLINE } else { leaf.ecx & !TSC_DEADLINE };
    leaf.edx = if threads > 1 { leaf.edx | HTT } else { leaf.edx & !HTT };
    if !options.mtrr {
        leaf.edx &= !MTRR;
    }
}

/// Who shares a cache: L1 and L2 the threads of a core, L3 the socket. Bits 25:14 of EAX hold the number of APIC ids
/// less 1; on Intel bits 31:26 hold the socket's number of core ids less 1.
fn cache_sharing(leaf: &mut kvm_cpuid_entry2, topology: &Topology, intel: bool) {
    if leaf.eax & 0x1f == 0 {
        return;
    }
    let level = leaf.eax >> 5 & 7;
    let shift = if level >= 3 { topology.socket_shift() } else { topology.core_shift() };
    leaf.eax = leaf.eax & 0x3fff | ((1 << shift) - 1) << 14;
    if intel {
        leaf.eax |= ((1 << (topology.socket_shift() - topology.core_shift())) - 1).min(0x3f) << 26;
    }
}

/// TSC frequency = crystal × EBX / EAX. The crystal is KVM's APIC bus: Linux takes the APIC timer's rate from it.
fn leaf_15(leaf: &mut kvm_cpuid_entry2, options: &CpuidOptions) {
    if let Some(khz) = options.tsc_khz {
        (leaf.eax, leaf.ebx, leaf.ecx) = (APIC_BUS_KHZ, khz, APIC_BUS_KHZ * 1000);
    }
}

fn amd_features(leaf: &mut kvm_cpuid_entry2, topology: &Topology, mtrr: bool) {
    leaf.ecx = if topology.threads_per_socket() > 1 { leaf.ecx | CMP_LEGACY } else { leaf.ecx & !CMP_LEGACY };
    if !mtrr {
        leaf.edx &= !MTRR;
    }
}

/// AMD processors tell their threads by leaf 0x8000_001e alone, and a guest looks there only with TOPOEXT. KVM shows
/// both where the host has them; they are plain numbers, so that a guest can be told them anywhere.
fn add_amd_topology(leaves: &mut Vec<kvm_cpuid_entry2>, options: &CpuidOptions) {
    for leaf in leaves.iter_mut() {
        match leaf.function {
            0x8000_0000 => leaf.eax = leaf.eax.max(AMD_TOPOLOGY_LEAF),
            0x8000_0001 => leaf.ecx |= TOPOEXT,
            _ => {}
        }
    }
    if !leaves.iter().any(|leaf| leaf.function == AMD_TOPOLOGY_LEAF) {
        let mut leaf = kvm_cpuid_entry2 { function: AMD_TOPOLOGY_LEAF, ..Default::default() };
        amd_topology(&mut leaf, options);
        leaves.push(leaf);
    }
}

fn amd_sizes(leaf: &mut kvm_cpuid_entry2, topology: &Topology) {
    leaf.ecx = leaf.ecx & !0xf0ff | (topology.threads_per_socket() - 1).min(0xff) | topology.socket_shift() << 12;
}

fn amd_topology(leaf: &mut kvm_cpuid_entry2, options: &CpuidOptions) {
    let topology = &options.topology;
    leaf.eax = options.apic_id;
    let core = (options.apic_id & ((1 << topology.socket_shift()) - 1)) >> topology.core_shift();
    leaf.ebx = core & 0xff | (topology.threads - 1) << 8;
    // One node in each socket.
    leaf.ecx = options.apic_id >> topology.socket_shift();
    leaf.edx = 0;
}

/// Leaves 0xb and 0x1f: level 0 the threads of a core, level 1 those of a socket.
fn add_topology(leaves: &mut Vec<kvm_cpuid_entry2>, supported: &[kvm_cpuid_entry2], options: &CpuidOptions) {
    let max_leaf = supported.iter().find(|e| e.function == 0).map_or(0, |e| e.eax);
    let topology = &options.topology;
    let levels = [
        (topology.core_shift(), topology.threads, 1_u32),
        (topology.socket_shift(), topology.threads_per_socket(), 2),
        (0, 0, 0),
    ];
    for function in TOPOLOGY_LEAVES {
        let offered = function == 0xb || supported.iter().any(|e| e.function == function);
        if function > max_leaf || !offered {
            continue;
        }
        for (index, (shift, count, kind)) in (0..).zip(levels) {
            leaves.push(kvm_cpuid_entry2 {
                function,
                index,
                flags: SIGNIFICANT_INDEX,
                eax: shift,
                ebx: count,
                ecx: index | kind << 8,
                edx: options.apic_id,
                ..Default::default()
            });
        }
    }
}

/// Leaf 0x4000_0010: TSC and APIC bus frequency in kHz, for guests that do not use kvmclock.
fn add_timing(leaves: &mut Vec<kvm_cpuid_entry2>, options: &CpuidOptions) {
    let Some(khz) = options.tsc_khz else { return };
    let Some(signature) = leaves.iter_mut().find(|e| e.function == KVM_SIGNATURE_LEAF) else { return };
    signature.eax = signature.eax.max(TIMING_LEAF);
    leaves.retain(|e| e.function != TIMING_LEAF);
    leaves.push(kvm_cpuid_entry2 { function: TIMING_LEAF, eax: khz, ebx: APIC_BUS_KHZ, ..Default::default() });
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options() -> CpuidOptions {
        CpuidOptions {
            topology: Topology::flat(1),
            apic_id: 0,
            tsc_khz: None,
            tsc_deadline: true,
            x2apic: true,
            tell_tsc: true,
            hidden_features: 0,
            mtrr: true,
        }
    }

    fn leaf(function: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 { function, ..Default::default() }
    }

    fn supported() -> Vec<kvm_cpuid_entry2> {
        let amd = kvm_cpuid_entry2 { eax: 0x1f, ebx: 0x6874_7541, edx: 0x6974_6e65, ecx: 0x444d_4163, ..leaf(0) };
        let signature = kvm_cpuid_entry2 { eax: 0x4000_0001, ..leaf(0x4000_0000) };
        vec![amd, leaf(1), leaf(0xb), signature, leaf(0x8000_0000), leaf(0x8000_0001), leaf(0x8000_0008)]
    }

    fn find(leaves: &[kvm_cpuid_entry2], function: u32, index: u32) -> kvm_cpuid_entry2 {
        *leaves.iter().find(|e| e.function == function && e.index == index).expect("leaf")
    }

    #[test]
    fn the_topology_asked_for_is_in_every_leaf() {
        let topology = Topology { sockets: 1, cores: 2, threads: 2 };
        let options = CpuidOptions { topology, apic_id: 3, tsc_khz: Some(2_400_000), ..options() };
        assert_eq!(vendor(&supported()), Vendor::Amd);
        let leaves = for_vcpu(&supported(), &options);
        let one = find(&leaves, 1, 0);
        assert_eq!(one.ebx >> 16, 3 << 8 | 4);
        assert_eq!(one.ecx & (TSC_DEADLINE | X2APIC | HYPERVISOR), TSC_DEADLINE | X2APIC | HYPERVISOR);
        assert_ne!(one.edx & HTT, 0);
        assert_eq!(find(&leaves, 0xb, 0).eax, 1);
        assert_eq!((find(&leaves, 0xb, 1).eax, find(&leaves, 0xb, 1).ebx), (2, 4));
        assert_eq!(find(&leaves, 0xb, 1).edx, 3);
        assert_eq!(find(&leaves, 0x8000_0008, 0).ecx, 3 | 2 << 12);
        assert_eq!(find(&leaves, 0x8000_001e, 0).ebx, 1 | 1 << 8);
        assert_ne!(find(&leaves, 0x8000_0001, 0).ecx & TOPOEXT, 0);
        assert_eq!(find(&leaves, 0x8000_0000, 0).eax, 0x8000_001e);
        assert_eq!(find(&leaves, 0x4000_0000, 0).eax, 0x4000_0010);
        assert_eq!(find(&leaves, 0x4000_0010, 0).eax, 2_400_000);
    }

    #[test]
    fn without_a_tsc_frequency_nothing_is_told() {
        let options = CpuidOptions { tsc_deadline: false, ..options() };
        let leaves = for_vcpu(&supported(), &options);
        assert!(leaves.iter().all(|e| e.function != 0x4000_0010));
        assert_eq!(find(&leaves, 1, 0).edx & HTT, 0);
        assert_eq!(find(&leaves, 1, 0).ecx & TSC_DEADLINE, 0);
    }

    #[test]
    fn what_is_hidden_is_not_there() {
        let mut supported = supported();
        supported.push(kvm_cpuid_entry2 { eax: 0xff, ..leaf(0x4000_0001) });
        for feature in supported.iter_mut().filter(|leaf| [1, 0x8000_0001].contains(&leaf.function)) {
            feature.edx |= MTRR;
        }
        let all = CpuidOptions { tsc_khz: Some(1), ..options() };
        assert_eq!(find(&for_vcpu(&supported, &all), 0x4000_0001, 0).eax, 0xff);
        let few = CpuidOptions { x2apic: false, tell_tsc: false, hidden_features: 1 << 6, mtrr: false, ..all };
        let leaves = for_vcpu(&supported, &few);
        assert_eq!(find(&leaves, 1, 0).ecx & X2APIC, 0);
        assert_eq!((find(&leaves, 1, 0).edx | find(&leaves, 0x8000_0001, 0).edx) & MTRR, 0);
        assert_eq!(find(&leaves, 0x4000_0001, 0).eax, 0xbf);
        assert!(leaves.iter().all(|e| e.function != 0x4000_0010));
    }
}
