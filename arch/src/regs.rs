//! The register states in which a vCPU enters its guest: real mode, 32-bit protected mode, 64-bit long mode.

use crate::gdt::{self, CodeSize};
use crate::layout::{BOOT_GDT, BOOT_PML4, ZERO_PAGE};
use kvm_bindings::{kvm_dtable, kvm_regs, kvm_sregs};

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// RFLAGS with only bit 1 set, which is always 1 (SDM vol. 1 §3.4.3).
pub const RFLAGS_RESERVED: u64 = 2;
/// RFLAGS.IF: maskable interrupts are enabled.
pub const RFLAGS_IF: u64 = 1 << 9;
/// The magic number in EAX for a multiboot kernel (Multiboot 0.6.96 §3.2).
pub const MULTIBOOT_EAX: u64 = 0x2bad_b002;

/// The boot protocol and entry point by which the bootstrap processor (BSP) enters the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// The Linux 64-bit boot protocol: long mode, identity-mapped page tables, RSI = gpa of the zero page.
    Linux64 {
        /// The gpa of the first instruction.
        rip: u64,
    },
    /// PVH: 32-bit protected mode without paging, EBX = gpa of the start info.
    Pvh {
        /// The gpa of the first instruction.
        rip: u64,
        /// The gpa of the start info.
        start_info: u64,
    },
    /// Multiboot 1: 32-bit protected mode without paging, EBX = gpa of the information structure.
    Multiboot {
        /// The gpa of the first instruction.
        rip: u64,
        /// The gpa of the information structure.
        info: u64,
    },
    /// Real mode with CS base 0, for tests.
    Real {
        /// The gpa of the first instruction, below 64 KiB.
        rip: u64,
    },
}

impl Entry {
    /// The gpa of the first instruction.
    #[must_use]
    pub fn rip(&self) -> u64 {
        match *self {
            Self::Linux64 { rip } | Self::Pvh { rip, .. } | Self::Multiboot { rip, .. } | Self::Real { rip } => rip,
        }
    }

    /// The general-purpose registers for this entry.
    #[must_use]
    pub fn regs(&self) -> kvm_regs {
        let base = kvm_regs { rip: self.rip(), rflags: RFLAGS_RESERVED, ..Default::default() };
        match *self {
            Self::Linux64 { .. } => kvm_regs { rsi: ZERO_PAGE, ..base },
            Self::Pvh { start_info, .. } => kvm_regs { rbx: start_info, ..base },
            Self::Multiboot { info, .. } => kvm_regs { rax: MULTIBOOT_EAX, rbx: info, ..base },
            Self::Real { .. } => base,
        }
    }

    /// Changes `sregs` into the special registers for this entry. They must be those after reset, so that the APIC base stays.
    pub fn apply(&self, sregs: &mut kvm_sregs) {
        match self {
            Self::Linux64 { .. } => long_mode(sregs),
            Self::Pvh { .. } | Self::Multiboot { .. } => protected_mode(sregs),
            Self::Real { .. } => real_mode(sregs),
        }
    }

    /// The size of the code segment in the boot GDT for this entry.
    #[must_use]
    pub fn code_size(&self) -> CodeSize {
        match self {
            Self::Linux64 { .. } => CodeSize::Bits64,
            Self::Pvh { .. } | Self::Multiboot { .. } | Self::Real { .. } => CodeSize::Bits32,
        }
    }
}

fn set_segments(sregs: &mut kvm_sregs, size: CodeSize) {
    let data = gdt::flat_data();
    sregs.cs = gdt::flat_code(size);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = gdt::task();
    sregs.gdt = kvm_dtable { base: BOOT_GDT, limit: 5 * 8 - 1, ..Default::default() };
    sregs.idt = kvm_dtable { base: 0, limit: 0, ..Default::default() };
}

fn protected_mode(sregs: &mut kvm_sregs) {
    set_segments(sregs, CodeSize::Bits32);
    sregs.cr0 = CR0_PE | CR0_ET;
    (sregs.cr3, sregs.cr4, sregs.efer) = (0, 0, 0);
}

fn long_mode(sregs: &mut kvm_sregs) {
    set_segments(sregs, CodeSize::Bits64);
    sregs.cr0 = CR0_PE | CR0_ET | CR0_PG;
    sregs.cr3 = BOOT_PML4;
    sregs.cr4 = CR4_PAE;
    sregs.efer = EFER_LME | EFER_LMA;
}

fn real_mode(sregs: &mut kvm_sregs) {
    let data = gdt::real_data();
    sregs.cs = gdt::real_code();
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.cr0 = CR0_ET;
    (sregs.cr3, sregs.cr4, sregs.efer) = (0, 0, 0);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_mode_has_paging_and_a_64_bit_code_segment() {
        let mut sregs = kvm_sregs { apic_base: 0xfee0_0900, ..Default::default() };
        let entry = Entry::Linux64 { rip: 0x100_0000 };
        entry.apply(&mut sregs);
        assert_eq!((sregs.cs.l, sregs.cs.db), (1, 0));
        assert_ne!(sregs.cr0 & CR0_PG, 0);
        assert_ne!(sregs.efer & EFER_LMA, 0);
        assert_eq!(sregs.apic_base, 0xfee0_0900);
        assert_eq!((entry.regs().rip, entry.regs().rsi), (0x100_0000, ZERO_PAGE));
    }

    #[test]
    fn multiboot_enters_flat_32_bit_code_without_paging() {
        let mut sregs = kvm_sregs::default();
        let entry = Entry::Multiboot { rip: 0x40_00bc, info: 0x9_0000 };
        entry.apply(&mut sregs);
        assert_eq!((sregs.cs.l, sregs.cs.db, sregs.cs.limit), (0, 1, 0xffff_ffff));
        assert_eq!(sregs.cr0 & (CR0_PG | CR0_PE), CR0_PE);
        assert_eq!((entry.regs().rax, entry.regs().rbx), (MULTIBOOT_EAX, 0x9_0000));
    }
}
