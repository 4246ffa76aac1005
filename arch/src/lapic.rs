//! The local APIC's local vector table at boot (SDM vol. 3A §11.5.1).

use kvm_bindings::kvm_lapic_state;

const LVT_LINT0: usize = 0x350;
const LVT_LINT1: usize = 0x360;
const DELIVERY_NMI: u32 = 4 << 8;
const DELIVERY_EXTINT: u32 = 7 << 8;
const DELIVERY_MASK: u32 = 7 << 8;

fn set_delivery(state: &mut kvm_lapic_state, register: usize, mode: u32) {
    for (i, shift) in [0_u32, 8, 16, 24].into_iter().enumerate() {
        let mask = (DELIVERY_MASK >> shift) & 0xff;
        let bits = (mode >> shift) & 0xff;
        let old = state.regs[register + i].to_le_bytes()[0];
        let new = (u32::from(old) & !mask) | bits;
        state.regs[register + i] = i8::from_le_bytes([new.to_le_bytes()[0]]);
    }
}

/// Sets LINT0 to ExtINT (the PIC's interrupt) and LINT1 to NMI, as a PC's firmware does.
pub fn set_boot_lints(state: &mut kvm_lapic_state) {
    set_delivery(state, LVT_LINT0, DELIVERY_EXTINT);
    set_delivery(state, LVT_LINT1, DELIVERY_NMI);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_delivery_mode_changes() {
        let mut state = kvm_lapic_state::default();
        state.regs[LVT_LINT0 + 2] = 1; // masked
        set_boot_lints(&mut state);
        let read =
            |register: usize| u32::from_le_bytes(std::array::from_fn(|i| state.regs[register + i].to_le_bytes()[0]));
        assert_eq!(read(LVT_LINT0), 0x1_0700);
        assert_eq!(read(LVT_LINT1), 0x400);
    }
}
