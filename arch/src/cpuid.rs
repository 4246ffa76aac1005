//! The CPUID leaves of a vCPU: those that KVM supports, with topology, APIC id, timers and TSC frequency filled in (SDM
//! vol. 2A, CPUID; APM vol. 3 app. E; KVM's own leaves: Linux' Documentation/virt/kvm/x86/cpuid.rst).

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

/// The frequency of the bus that KVM's local APIC timer counts, in kHz.
const APIC_BUS_KHZ: u32 = 1_000_000;
const KVM_SIGNATURE_LEAF: u32 = 0x4000_0000;
const KVM_FEATURES_LEAF: u32 = 0x4000_0001;
const TIMING_LEAF: u32 = 0x4000_0010;
const AMD_TOPOLOGY_LEAF: u32 = 0x8000_001e;
const ADDRESS_SIZES_LEAF: u32 = 0x8000_0008;
/// The bits of a physical address where no leaf says how many there are (SDM vol. 3A §4.1.4).
const DEFAULT_ADDRESS_BITS: u32 = 36;
const TOPOLOGY_LEAVES: [u32; 2] = [0xb, 0x1f];

/// What the leaves depend on, besides the leaves that KVM supports.
#[derive(Clone, Copy, Debug)]
pub struct CpuidOptions {
    /// The number of sockets, cores and threads.
    pub topology: Topology,
    /// The vCPU's APIC id.
    pub apic_id: u32,
    /// The frequency of the guest's TSC in kHz; `None` where KVM does not know it.
    pub tsc_khz: Option<u32>,
    /// If true, the local APIC has the TSC-deadline timer. It is a capability of its own (`KVM_CAP_TSC_DEADLINE_TIMER`):
    /// older kernels do not report it in the supported leaves.
    pub tsc_deadline: bool,
    /// If true, the leaves report x2APIC.
    pub x2apic: bool,
    /// If true, the leaves report the frequencies of TSC and APIC timer.
    pub tsc_frequency: bool,
    /// A mask of KVM's paravirtual features (leaf 0x4000_0001 EAX) that the leaves do not report.
    pub hidden_features: u32,
    /// If true, the leaves report MTRRs.
    pub mtrr: bool,
}

/// The vendor of the processor, whose rules the leaves follow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Vendor {
    /// Intel: the vendor string of leaf 0 is "GenuineIntel".
    Intel,
    /// AMD or Hygon: "AuthenticAMD" or "HygonGenuine".
    Amd,
    /// A vendor whose rules are unknown.
    Other,
}

/// The vendor from leaf 0.
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

/// The number of bits of the guest physical addresses that a guest can use: the smaller of MAXPHYADDR (leaf 0x8000_0008 EAX
/// bits 7:0) and GuestPhysAddrSize (bits 23:16), which KVM fills in since Linux 6.10 where its nested paging reaches less far.
#[must_use]
pub fn address_bits(leaves: &[kvm_cpuid_entry2]) -> u32 {
    let sizes = leaves.iter().find(|leaf| leaf.function == ADDRESS_SIZES_LEAF).map_or(0, |leaf| leaf.eax);
    let known = [sizes & 0xff, sizes >> 16 & 0xff].into_iter().filter(|bits| *bits != 0);
    known.min().unwrap_or(DEFAULT_ADDRESS_BITS)
}

/// The leaves for one vCPU, from what KVM supports.
#[must_use]
pub fn for_vcpu(supported: &[kvm_cpuid_entry2], options: &CpuidOptions) -> Vec<kvm_cpuid_entry2> {
    let vendor = vendor(supported);
    let mut leaves: Vec<_> = supported.iter().filter(|e| !TOPOLOGY_LEAVES.contains(&e.function)).copied().collect();
    for leaf in &mut leaves {
        match leaf.function {
            1 => leaf_1(leaf, options),
            4 => cache_sharing(leaf, &options.topology, CacheLeaf::Intel),
            0x15 if vendor == Vendor::Intel && options.tsc_frequency => leaf_15(leaf, options),
            KVM_FEATURES_LEAF => leaf.eax &= !options.hidden_features,
            0x8000_0001 if vendor == Vendor::Amd => amd_features(leaf, options),
            ADDRESS_SIZES_LEAF if vendor == Vendor::Amd => amd_sizes(leaf, &options.topology),
            0x8000_001d => cache_sharing(leaf, &options.topology, CacheLeaf::Amd),
            AMD_TOPOLOGY_LEAF => amd_topology(leaf, options),
            _ => {}
        }
    }
    if vendor == Vendor::Amd && options.topology.threads > 1 {
        add_amd_topology(&mut leaves, options);
    }
    add_topology(&mut leaves, supported, options);
    if options.tsc_frequency {
        add_timing(&mut leaves, options);
    }
    leaves
}

fn leaf_1(leaf: &mut kvm_cpuid_entry2, options: &CpuidOptions) {
    let threads = options.topology.threads_per_socket();
    // EBX bits 23:16 hold the number of APIC ids of a socket, which can be larger than that of its threads; at most 0xff.
    let ids = (1_u32 << options.topology.socket_shift()).min(0xff);
    leaf.ebx = leaf.ebx & 0x0000_ffff | ids << 16 | (options.apic_id & 0xff) << 24;
    leaf.ecx = (leaf.ecx | HYPERVISOR | X2APIC) & !if options.x2apic { 0 } else { X2APIC };
    leaf.ecx = if options.tsc_deadline { leaf.ecx | TSC_DEADLINE } else { leaf.ecx & !TSC_DEADLINE };
    leaf.edx = if threads > 1 { leaf.edx | HTT } else { leaf.edx & !HTT };
    if !options.mtrr {
        leaf.edx &= !MTRR;
    }
}

/// The leaf that describes a cache.
#[derive(Clone, Copy, PartialEq, Eq)]
enum CacheLeaf {
    /// Deterministic cache parameters, leaf 4 of Intel (SDM vol. 2A, CPUID).
    Intel,
    /// Cache properties, leaf 0x8000_001d of AMD (APM vol. 3, appendix E).
    Amd,
}

/// Sets which vCPUs share a cache: the threads of a core share L1 and L2, a socket shares L3. Bits 25:14 of EAX hold the
/// number of APIC ids minus 1; in leaf 4 bits 31:26 hold the number of core ids of the socket minus 1.
fn cache_sharing(leaf: &mut kvm_cpuid_entry2, topology: &Topology, kind: CacheLeaf) {
    if leaf.eax & 0x1f == 0 {
        return;
    }
    let level = leaf.eax >> 5 & 7;
    let shift = if level >= 3 { topology.socket_shift() } else { topology.core_shift() };
    leaf.eax = leaf.eax & 0x3fff | ((1 << shift) - 1) << 14;
    if kind == CacheLeaf::Intel {
        leaf.eax |= ((1 << (topology.socket_shift() - topology.core_shift())) - 1).min(0x3f) << 26;
    }
}

/// TSC frequency = crystal × EBX / EAX. The crystal is given as KVM's APIC bus, because Linux takes the APIC timer's rate from it.
fn leaf_15(leaf: &mut kvm_cpuid_entry2, options: &CpuidOptions) {
    if let Some(khz) = options.tsc_khz {
        (leaf.eax, leaf.ebx, leaf.ecx) = (APIC_BUS_KHZ, khz, APIC_BUS_KHZ * 1000);
    }
}

fn amd_features(leaf: &mut kvm_cpuid_entry2, options: &CpuidOptions) {
    leaf.ecx = if options.topology.threads_per_socket() > 1 { leaf.ecx | CMP_LEGACY } else { leaf.ecx & !CMP_LEGACY };
    if !options.mtrr {
        leaf.edx &= !MTRR;
    }
}

/// Adds leaf 0x8000_001e, the only one that has the threads of AMD processors, and TOPOEXT, without which a guest does not read
/// it. KVM reports both only where the host has them; they need no support of the hardware.
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
    // Each socket is one node.
    leaf.ecx = options.apic_id >> topology.socket_shift();
    leaf.edx = 0;
}

/// Adds leaves 0xb and 0x1f: level 0 has the threads of a core, level 1 those of a socket.
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

/// Adds leaf 0x4000_0010: the frequencies of TSC and APIC bus in kHz, for guests that do not use kvmclock.
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
            tsc_frequency: true,
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

    #[test]
    fn the_smaller_of_two_address_sizes_counts() {
        let sizes = |eax| kvm_cpuid_entry2 { eax, ..leaf(ADDRESS_SIZES_LEAF) };
        assert_eq!(address_bits(&[leaf(0), sizes(0x3028)]), 40);
        assert_eq!(address_bits(&[sizes(0x0030_3934), leaf(1)]), 48, "nested paging of 4 levels");
        assert_eq!(address_bits(&[sizes(0x0034_3030)]), 48);
        assert_eq!((address_bits(&[]), address_bits(&[sizes(0)])), (36, 36));
    }

    fn find(leaves: &[kvm_cpuid_entry2], function: u32, index: u32) -> kvm_cpuid_entry2 {
        *leaves.iter().find(|e| e.function == function && e.index == index).expect("leaf")
    }

    #[test]
    fn every_topology_leaf_has_the_configured_topology() {
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
    fn the_timing_leaf_is_absent_without_a_tsc_frequency() {
        let options = CpuidOptions { tsc_deadline: false, ..options() };
        let leaves = for_vcpu(&supported(), &options);
        assert!(leaves.iter().all(|e| e.function != 0x4000_0010));
        assert_eq!(find(&leaves, 1, 0).edx & HTT, 0);
        assert_eq!(find(&leaves, 1, 0).ecx & TSC_DEADLINE, 0);
    }

    #[test]
    fn hidden_features_are_not_reported() {
        let mut supported = supported();
        supported.push(kvm_cpuid_entry2 { eax: 0xff, ..leaf(0x4000_0001) });
        for feature in supported.iter_mut().filter(|leaf| [1, 0x8000_0001].contains(&leaf.function)) {
            feature.edx |= MTRR;
        }
        let all = CpuidOptions { tsc_khz: Some(1), ..options() };
        assert_eq!(find(&for_vcpu(&supported, &all), 0x4000_0001, 0).eax, 0xff);
        let few = CpuidOptions { x2apic: false, tsc_frequency: false, hidden_features: 1 << 6, mtrr: false, ..all };
        let leaves = for_vcpu(&supported, &few);
        assert_eq!(find(&leaves, 1, 0).ecx & X2APIC, 0);
        assert_eq!((find(&leaves, 1, 0).edx | find(&leaves, 0x8000_0001, 0).edx) & MTRR, 0);
        assert_eq!(find(&leaves, 0x4000_0001, 0).eax, 0xbf);
        assert!(leaves.iter().all(|e| e.function != 0x4000_0010));
    }
}
