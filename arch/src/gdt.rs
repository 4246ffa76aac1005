//! The segments of the states in which a guest is entered, and the GDT that holds them (SDM vol. 3A §3.4.5, §5.2).

use kvm_bindings::kvm_segment;

/// The selector of the code segment (`__BOOT_CS` in the Linux boot protocol).
pub const CODE_SELECTOR: u16 = 0x10;
/// The selector of the data segment (`__BOOT_DS` in the Linux boot protocol).
pub const DATA_SELECTOR: u16 = 0x18;
/// The selector of the task segment. A VM entry needs a busy TSS (SDM vol. 3C §27.3.1.2).
pub const TSS_SELECTOR: u16 = 0x20;

/// Segment type: code, execute/read, accessed (SDM vol. 3A table 3-1).
const TYPE_CODE: u8 = 0xb;
/// Segment type: data, read/write, accessed.
const TYPE_DATA: u8 = 0x3;

/// The default operand size of a code segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CodeSize {
    /// Protected mode, or compatibility mode: D = 1, L = 0.
    Bits32,
    /// 64-bit mode: D = 0, L = 1.
    Bits64,
}

/// The code segment of the boot GDT, flat over 4 GiB.
#[must_use]
pub fn flat_code(size: CodeSize) -> kvm_segment {
    let long = size == CodeSize::Bits64;
    kvm_segment { selector: CODE_SELECTOR, type_: TYPE_CODE, db: u8::from(!long), l: u8::from(long), ..flat_data() }
}

/// The data segment of the boot GDT, flat over 4 GiB.
#[must_use]
pub fn flat_data() -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector: DATA_SELECTOR,
        type_: TYPE_DATA,
        present: 1,
        db: 1,
        s: 1,
        g: 1,
        ..Default::default()
    }
}

/// The task segment of the boot GDT: a busy 32-bit or 64-bit TSS at gpa 0.
#[must_use]
pub fn task() -> kvm_segment {
    kvm_segment { base: 0, limit: 0x67, selector: TSS_SELECTOR, type_: 0xb, present: 1, ..Default::default() }
}

/// A real-mode code segment: 64 KiB from gpa 0.
#[must_use]
pub fn real_code() -> kvm_segment {
    kvm_segment { type_: TYPE_CODE, ..real_data() }
}

/// A real-mode data segment: 64 KiB from gpa 0.
#[must_use]
pub fn real_data() -> kvm_segment {
    kvm_segment { base: 0, limit: 0xffff, selector: 0, type_: TYPE_DATA, present: 1, s: 1, ..Default::default() }
}

/// The 8-byte descriptor of a segment (SDM vol. 3A figure 3-8).
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

/// The boot GDT: two empty entries, then code, data and task segment.
#[must_use]
pub fn boot_gdt(size: CodeSize) -> [u64; 5] {
    [0, 0, descriptor(&flat_code(size)), descriptor(&flat_data()), descriptor(&task())]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn boot_descriptors_have_their_architectural_values() {
        assert_eq!(descriptor(&flat_code(CodeSize::Bits64)), 0x00af_9b00_0000_ffff);
        assert_eq!(descriptor(&flat_code(CodeSize::Bits32)), 0x00cf_9b00_0000_ffff);
        assert_eq!(descriptor(&flat_data()), 0x00cf_9300_0000_ffff);
        assert_eq!(descriptor(&task()), 0x0000_8b00_0000_0067);
    }
}
