//! Segments for the boot states, and the GDT that holds them (SDM vol. 3A §3.4.5, §5.2).

use kvm_bindings::kvm_segment;

/// Selector of the 64-bit code segment (Linux boot protocol: `__BOOT_CS`).
pub const CODE_SELECTOR: u16 = 0x10;
/// Selector of the data segment (`__BOOT_DS`).
pub const DATA_SELECTOR: u16 = 0x18;
/// Selector of the task segment: Intel processors refuse VM entry without a busy TSS.
pub const TSS_SELECTOR: u16 = 0x20;

/// A flat segment of 4 GiB. `code` or data; `long` makes the code segment 64-bit.
#[must_use]
pub fn flat(selector: u16, code: bool, long: bool) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        // Accessed; execute/read (0xb) or read/write (0x3).
        type_: if code { 0xb } else { 0x3 },
        present: 1,
        dpl: 0,
        db: u8::from(!long),
        s: 1,
        l: u8::from(long),
        g: 1,
        avl: 0,
        unusable: 0,
        padding: 0,
    }
}

/// A busy 32/64-bit TSS at 0.
#[must_use]
pub fn task() -> kvm_segment {
    kvm_segment { base: 0, limit: 0x67, selector: TSS_SELECTOR, type_: 0xb, present: 1, ..Default::default() }
}

/// A real-mode segment whose base is `selector × 16`.
#[must_use]
pub fn real(selector: u16, code: bool) -> kvm_segment {
    kvm_segment {
        base: u64::from(selector) << 4,
        limit: 0xffff,
        selector,
        type_: if code { 0xb } else { 0x3 },
        present: 1,
        s: 1,
        ..Default::default()
    }
}

/// The 8-byte descriptor of a segment, as a GDT holds it.
#[must_use]
pub fn descriptor(segment: &kvm_segment) -> u64 {
    let limit = u64::from(if segment.g == 1 { segment.limit >> 12 } else { segment.limit });
    let base = segment.base;
    (limit & 0xffff)
        | (base & 0xff_ffff) << 16
        | u64::from(segment.type_ & 0xf) << 40
        | u64::from(segment.s & 1) << 44
        | u64::from(segment.dpl & 3) << 45
        | u64::from(segment.present & 1) << 47
        | (limit >> 16 & 0xf) << 48
        | u64::from(segment.avl & 1) << 52
        | u64::from(segment.l & 1) << 53
        | u64::from(segment.db & 1) << 54
        | u64::from(segment.g & 1) << 55
        | (base >> 24 & 0xff) << 56
}

/// The boot GDT: two empty entries, code, data, task.
#[must_use]
pub fn boot_gdt(long: bool) -> [u64; 5] {
    [
        0,
        0,
        descriptor(&flat(CODE_SELECTOR, true, long)),
        descriptor(&flat(DATA_SELECTOR, false, false)),
        descriptor(&task()),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_are_the_well_known_ones() {
        assert_eq!(descriptor(&flat(CODE_SELECTOR, true, true)), 0x00af_9b00_0000_ffff);
        assert_eq!(descriptor(&flat(CODE_SELECTOR, true, false)), 0x00cf_9b00_0000_ffff);
        assert_eq!(descriptor(&flat(DATA_SELECTOR, false, false)), 0x00cf_9300_0000_ffff);
        assert_eq!(descriptor(&task()), 0x0000_8b00_0000_0067);
    }
}
