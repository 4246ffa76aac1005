//! The registers of an interpreted vCPU, and what an instruction leads to.

use super::arith::mask;
use super::flags::Flags;
use super::mmu::Mmu;
use super::op::{HIGH, Op};
use crate::measure::clusters::ClusterEnd as End;

pub(super) const RAX: u8 = 0;
pub(super) const RCX: u8 = 1;
pub(super) const RDX: u8 = 2;
pub(super) const RSP: u8 = 4;
pub(super) const RBP: u8 = 5;

/// What an instruction has led to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Flow {
    /// The next instruction is the one behind it.
    Next,
    /// RIP is set.
    Jumped,
    /// It is port I/O, which the caller carries out.
    Port,
    /// It cannot be carried out, for the reason in [`Cpu::end`]; nothing else has changed.
    End,
}

/// The registers of an interpreted vCPU.
pub(super) struct Cpu {
    /// By their numbers; from 16 on they are 0.
    pub(super) regs: [u64; 32],
    pub(super) rip: u64,
    pub(super) flags: Flags,
    /// The segment bases, by [`Op::segment`].
    pub(super) bases: [u64; 4],
    /// Why the last instruction with [`Flow::End`] cannot be carried out. Not in it, so that it is a byte that is compared with 0.
    pub(super) end: End,
}

impl Cpu {
    /// A vCPU with these registers.
    pub(super) fn new(regs: [u64; 32], rip: u64, flags: Flags, bases: [u64; 4]) -> Self {
        Self { regs, rip, flags, bases, end: End::Unsupported }
    }

    /// What a result means for the instructions behind it.
    #[inline]
    pub(super) fn flow(&mut self, result: Result<(), End>, done: Flow) -> Flow {
        match result {
            Ok(()) => done,
            Err(end) => {
                self.end = end;
                Flow::End
            }
        }
    }

    #[inline]
    pub(super) fn get(&self, number: u8, width: u8) -> u64 {
        let value = self.regs[usize::from(number & 31)];
        if width == 0 && number & HIGH != 0 { value >> 8 & 0xff } else { value & mask(width) }
    }

    #[inline]
    pub(super) fn whole(&self, number: u8) -> u64 {
        self.regs[usize::from(number & 31)]
    }

    #[inline]
    pub(super) fn set(&mut self, number: u8, width: u8, value: u64) {
        let register = &mut self.regs[usize::from(number & 15)];
        *register = match width {
            3 => value,
            2 => value & 0xffff_ffff,
            1 => *register & !0xffff | value & 0xffff,
            _ if number & HIGH != 0 => *register & !0xff00 | (value & 0xff) << 8,
            _ => *register & !0xff | value & 0xff,
        };
    }

    /// The linear address of the memory operand.
    #[inline]
    pub(super) fn address(&self, op: &Op) -> u64 {
        let address = self.whole(op.base).wrapping_add(op.disp);
        if !op.indexed {
            return address;
        }
        let index = self.whole(op.index) << (op.scale & 3);
        address.wrapping_add(index).wrapping_add(self.bases[usize::from(op.segment & 3)])
    }

    #[inline]
    pub(super) fn load(&self, op: &Op, width: u8, mmu: &mut Mmu<'_>) -> Result<u64, End> {
        mmu.load(self.address(op), width)
    }

    #[inline]
    pub(super) fn push(&mut self, value: u64, mmu: &mut Mmu<'_>) -> Result<(), End> {
        let top = self.whole(RSP).wrapping_sub(8);
        mmu.store(top, 3, value)?;
        self.set(RSP, 3, top);
        Ok(())
    }

    #[inline]
    pub(super) fn pop(&mut self, mmu: &mut Mmu<'_>) -> Result<u64, End> {
        let top = self.whole(RSP);
        let value = mmu.load(top, 3)?;
        self.set(RSP, 3, top.wrapping_add(8));
        Ok(value)
    }
}
