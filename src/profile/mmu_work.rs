//! What KVM did for the guest's page tables, in the words of Adams and Agesen (ASPLOS 2006): true page faults are the guest's
//! own, and handed to it; hidden ones come from tables of KVM's being behind; traces are writes to page tables that KVM follows.

use super::units::number;
use std::collections::BTreeMap;

/// Returns true if the counters are those of a machine on shadow paging: only there KVM sees the guest's own page faults, and
/// keeps shadow tables that can be out of sync.
#[must_use]
pub(super) fn is_shadow(kvm: &BTreeMap<String, u64>) -> bool {
    ["pf_guest", "mmu_unsync", "invlpg"].iter().any(|name| kvm.get(*name).is_some_and(|count| *count > 0))
}

/// One sentence from KVM's statistics; `None` where they show no such work.
#[must_use]
pub(super) fn describe(kvm: &BTreeMap<String, u64>) -> Option<String> {
    let of = |name: &str| kvm.get(name).copied().unwrap_or(0);
    let (taken, guests) = (of("pf_taken"), of("pf_guest"));
    let traced = of("mmu_pte_write");
    let mut parts = Vec::new();
    let mut part = |count: u64, what: &str| {
        if count > 0 {
            parts.push(format!("{} {what}", number(count)));
        }
    };
    if !is_shadow(kvm) {
        part(taken, "faults of the nested tables");
        part(of("pf_emulate"), "of them accesses to emulate");
        part(of("tlb_flush"), "TLB flushes");
        part(of("pages_1g"), "pages of 1 GiB mapped at the end");
        part(of("pages_2m"), "pages of 2 MiB mapped at the end");
        part(of("pages_4k"), "pages of 4 KiB mapped at the end");
        return (taken > 0).then(|| format!("nested page tables: {}", parts.join(", ")));
    }
    part(guests, "true page faults (the guest's own)");
    part(taken.saturating_sub(guests), "hidden page faults (KVM's tables were not up to date)");
    part(traced, "traces (writes to page tables that KVM write-protects)");
    part(of("invlpg"), "INVLPGs");
    part(of("tlb_flush"), "TLB flushes");
    part(of("kvmmmu:kvm_mmu_get_page"), "shadow pages looked up or created");
    part(of("kvmmmu:kvm_mmu_unsync_page"), "tables left unsynchronized");
    part(of("kvmmmu:kvm_mmu_sync_page"), "synchronized again");
    part(of("mmu_shadow_zapped"), "shadow pages zapped");
    part(of("mmu_flooded"), "flooded with writes");
    part(of("mmu_unsync"), "unsynchronized at the end");
    Some(format!("shadow page tables: {}", parts.join(", ")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kvm(counts: &[(&str, u64)]) -> BTreeMap<String, u64> {
        counts.iter().map(|(name, count)| ((*name).to_owned(), *count)).collect()
    }

    #[test]
    fn true_and_hidden_faults_are_told_apart() {
        let text = describe(&kvm(&[("pf_taken", 54_001), ("pf_guest", 9_000), ("mmu_pte_write", 7)])).expect("work");
        assert!(text.starts_with("shadow page tables: 9,000 true"), "{text}");
        assert!(text.contains("45,001 hidden") && text.contains("7 traces"), "{text}");
        let text = describe(&kvm(&[("pf_guest", 9), ("kvmmmu:kvm_mmu_unsync_page", 4)])).expect("work");
        assert!(text.ends_with("4 tables left unsynchronized"), "{text}");
        let text = describe(&kvm(&[("pf_taken", 48), ("pf_emulate", 2), ("mmu_pte_write", 9)])).expect("work");
        assert_eq!(text, "nested page tables: 48 faults of the nested tables, 2 of them accesses to emulate");
        let text = describe(&kvm(&[("pf_taken", 48), ("pages_2m", 40), ("pages_4k", 3)])).expect("work");
        assert!(text.ends_with("40 pages of 2 MiB mapped at the end, 3 pages of 4 KiB mapped at the end"), "{text}");
        assert_eq!(describe(&kvm(&[("exits", 5)])), None);
    }
}
