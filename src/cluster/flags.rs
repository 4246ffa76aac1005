//! RFLAGS of an interpreted vCPU. The status flags of the last arithmetic instruction are worked out only where one of them is needed.

use hwvmm_arch::regs::RFLAGS_IF;

pub(super) const CF: u64 = 1 << 0;
pub(super) const PF: u64 = 1 << 2;
pub(super) const AF: u64 = 1 << 4;
pub(super) const ZF: u64 = 1 << 6;
pub(super) const SF: u64 = 1 << 7;
pub(super) const DF: u64 = 1 << 10;
pub(super) const OF: u64 = 1 << 11;
/// The status flags (SDM vol. 1 §3.4.3.1).
pub(super) const STATUS: u64 = CF | PF | AF | ZF | SF | OF;
pub(super) const IF: u64 = RFLAGS_IF;

/// RFLAGS.
#[derive(Clone, Copy, Debug)]
pub(super) struct Flags {
    /// All flags; the status flags are those of `result` and `carries` instead, where `sign` is not 0.
    bits: u64,
    /// The result of the last addition, subtraction or logical instruction, zero-extended.
    result: u64,
    /// The carry or borrow out of each bit of it.
    carries: u64,
    /// The number of the result's sign bit: 7, 15, 31 or 63; 0 where `bits` has everything.
    sign: u32,
}

impl Flags {
    pub(super) fn new(bits: u64) -> Self {
        Self { bits, result: 0, carries: 0, sign: 0 }
    }

    /// Sets the status flags to those of an addition, a subtraction or a logical instruction, whose sign bit is bit `sign`.
    #[inline]
    pub(super) fn set_lazy(&mut self, result: u64, carries: u64, sign: u32) {
        (self.result, self.carries, self.sign) = (result, carries, sign);
    }

    /// Sets the flags in `mask` to those of `value`.
    #[inline]
    pub(super) fn set(&mut self, mask: u64, value: u64) {
        self.bits = self.get() & !mask | value & mask;
        self.sign = 0;
    }

    /// Sets all status flags to those of `value`.
    #[inline]
    pub(super) fn set_status(&mut self, value: u64) {
        self.bits = self.bits & !STATUS | value & STATUS;
        self.sign = 0;
    }

    /// Returns all flags.
    #[inline]
    pub(super) fn get(&self) -> u64 {
        if self.sign == 0 {
            return self.bits;
        }
        let mut bits = self.bits & !STATUS;
        bits |= u64::from(self.cf()) | u64::from(self.pf()) << 2 | u64::from(self.zf()) << 6;
        bits |= self.carries >> 3 << 4 & AF;
        bits | u64::from(self.sf()) << 7 | u64::from(self.of()) << 11
    }

    /// Returns flags that no arithmetic instruction changes, such as IF.
    #[inline]
    pub(super) fn control(&self, mask: u64) -> u64 {
        self.bits & mask & !STATUS
    }

    /// Clears flags that no arithmetic instruction changes.
    pub(super) fn clear_control(&mut self, mask: u64) {
        self.bits &= !(mask & !STATUS);
    }

    #[inline]
    pub(super) fn cf(&self) -> bool {
        if self.sign == 0 { self.bits & CF != 0 } else { self.carries >> self.sign & 1 != 0 }
    }

    #[inline]
    pub(super) fn zf(&self) -> bool {
        if self.sign == 0 { self.bits & ZF != 0 } else { self.result == 0 }
    }

    #[inline]
    pub(super) fn sf(&self) -> bool {
        if self.sign == 0 { self.bits & SF != 0 } else { self.result >> self.sign & 1 != 0 }
    }

    #[inline]
    pub(super) fn of(&self) -> bool {
        if self.sign == 0 {
            return self.bits & OF != 0;
        }
        (self.carries >> self.sign ^ self.carries >> (self.sign - 1)) & 1 != 0
    }

    #[inline]
    pub(super) fn pf(&self) -> bool {
        if self.sign == 0 { self.bits & PF != 0 } else { (self.result & 0xff).count_ones() & 1 == 0 }
    }

    /// Returns true if the condition with this number holds (SDM vol. 2D, table B-10).
    #[inline]
    pub(super) fn condition(&self, number: u8) -> bool {
        let holds = match number >> 1 & 7 {
            0 => self.of(),
            1 => self.cf(),
            2 => self.zf(),
            3 => self.cf() || self.zf(),
            4 => self.sf(),
            5 => self.pf(),
            6 => self.sf() != self.of(),
            _ => self.zf() || self.sf() != self.of(),
        };
        holds != (number & 1 != 0)
    }
}
