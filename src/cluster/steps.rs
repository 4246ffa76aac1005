//! The instructions that a path through a driver is made of: one function for each form and width, so that an instruction costs one
//! indirect call, and its masks and sign bits are constants. What is less frequent, and what
//! needs a page to be translated first, goes to [`any`].

use super::arith::{alu, extend, mask, unary};
use super::cpu::{Cpu, Flow, RCX, RSP};
use super::mmu::Mmu;
use super::op::{Alu, Form, Kind, Op, Unary, is_canonical};
use super::rare::any;

/// Carries an instruction out. Where it ends the cluster nothing has changed.
type Run = fn(&mut Cpu, &mut Mmu<'_>, &Op) -> Flow;

/// An instruction with the function that carries it out.
#[derive(Clone, Copy)]
pub(super) struct Step {
    run: Run,
    pub(super) op: Op,
}

impl Step {
    pub(super) fn new(op: Op) -> Self {
        Self { run: function(&op), op }
    }

    #[inline]
    pub(super) fn run(&self, cpu: &mut Cpu, mmu: &mut Mmu<'_>) -> Flow {
        (self.run)(cpu, mmu, &self.op)
    }
}

/// The value, where the page's translation is kept and the access is aligned. Else the instruction is carried out by [`slow`], from its
/// start: a call in the last place costs no registers to be saved.
macro_rules! kept {
    ($value:expr, $cpu:ident, $mmu:ident, $op:ident) => {
        match $value {
            Some(value) => value,
            None => return slow($cpu, $mmu, $op),
        }
    };
}

/// The instance of a function for the width, which is its last parameter.
macro_rules! of_width {
    ($width:expr, $function:ident $(, $parameter:expr)*) => {
        match $width {
            3 => $function::<$({ $parameter },)* 3>,
            2 => $function::<$({ $parameter },)* 2>,
            1 => $function::<$({ $parameter },)* 1>,
            _ => $function::<$({ $parameter },)* 0>,
        }
    };
}

fn function(op: &Op) -> Run {
    if op.locked {
        return any;
    }
    match op.kind {
        Kind::MovRr => of_width!(op.width, move_register),
        Kind::MovRi => of_width!(op.width, move_immediate),
        Kind::Load => of_width!(op.width, load),
        Kind::Store => of_width!(op.width, store),
        Kind::StoreImm => of_width!(op.width, store_immediate),
        // A destination of 32 bits has its upper half cleared: that of 64 bits has the same value.
        Kind::MovzxR(0) if op.width > 1 => zero_extend::<0>,
        Kind::MovzxR(1) if op.width > 1 => zero_extend::<1>,
        Kind::MovzxM(0) if op.width > 1 => load_zero_extended::<0>,
        Kind::MovzxM(1) if op.width > 1 => load_zero_extended::<1>,
        Kind::MovsxR(2) if op.width == 3 => sign_extend::<2>,
        Kind::MovsxM(2) if op.width == 3 => load_sign_extended::<2>,
        Kind::Lea => of_width!(op.width, load_address),
        Kind::Alu(operation, form) => arithmetic(operation, form, op.width),
        Kind::UnaryR(operation) => one_operand(operation, op.width),
        Kind::ShiftClR(operation) => shift_by_cl(operation, op.width),
        Kind::Jcc(condition) => conditional_jump(condition),
        Kind::Jmp => jump,
        Kind::JmpR => jump_register,
        Kind::Call => call,
        Kind::Ret => ret,
        Kind::PushR => push,
        Kind::Pop => pop,
        Kind::Nop => nop,
        Kind::InDx | Kind::InImm | Kind::OutDx | Kind::OutImm => port,
        _ => any,
    }
}

fn arithmetic(operation: Alu, form: Form, width: u8) -> Run {
    match operation {
        Alu::Add => of_form::<0>(form, width),
        Alu::Or => of_form::<1>(form, width),
        Alu::Adc => of_form::<2>(form, width),
        Alu::Sbb => of_form::<3>(form, width),
        Alu::And => of_form::<4>(form, width),
        Alu::Sub => of_form::<5>(form, width),
        Alu::Xor => of_form::<6>(form, width),
        Alu::Cmp => of_form::<7>(form, width),
        Alu::Test => of_form::<8>(form, width),
    }
}

/// The operation of [`of_form`]'s parameter.
const fn alu_of(number: u8) -> Alu {
    match number {
        0 => Alu::Add,
        1 => Alu::Or,
        2 => Alu::Adc,
        3 => Alu::Sbb,
        4 => Alu::And,
        5 => Alu::Sub,
        6 => Alu::Xor,
        7 => Alu::Cmp,
        _ => Alu::Test,
    }
}

fn of_form<const ALU: u8>(form: Form, width: u8) -> Run {
    match form {
        Form::Rr => of_width!(width, alu_rr, ALU),
        Form::Ri => of_width!(width, alu_ri, ALU),
        Form::Rm => of_width!(width, alu_rm, ALU),
        Form::Mr => of_width!(width, alu_mr, ALU),
        Form::Mi => of_width!(width, alu_mi, ALU),
    }
}

fn one_operand(operation: Unary, width: u8) -> Run {
    match operation {
        Unary::Inc => of_width!(width, unary_r, 0),
        Unary::Dec => of_width!(width, unary_r, 1),
        Unary::Neg => of_width!(width, unary_r, 2),
        Unary::Not => of_width!(width, unary_r, 3),
        Unary::Shl => of_width!(width, unary_r, 4),
        Unary::Shr => of_width!(width, unary_r, 5),
        Unary::Sar => of_width!(width, unary_r, 6),
        Unary::Rol | Unary::Ror => any,
    }
}

fn shift_by_cl(operation: Unary, width: u8) -> Run {
    match operation {
        Unary::Shl => of_width!(width, shift_cl_r, 4),
        Unary::Shr => of_width!(width, shift_cl_r, 5),
        Unary::Sar => of_width!(width, shift_cl_r, 6),
        _ => any,
    }
}

const fn unary_of(number: u8) -> Unary {
    match number {
        0 => Unary::Inc,
        1 => Unary::Dec,
        2 => Unary::Neg,
        3 => Unary::Not,
        4 => Unary::Shl,
        5 => Unary::Shr,
        _ => Unary::Sar,
    }
}

fn conditional_jump(condition: u8) -> Run {
    const JUMPS: [Run; 16] = [
        jump_if::<0>,
        jump_if::<1>,
        jump_if::<2>,
        jump_if::<3>,
        jump_if::<4>,
        jump_if::<5>,
        jump_if::<6>,
        jump_if::<7>,
        jump_if::<8>,
        jump_if::<9>,
        jump_if::<10>,
        jump_if::<11>,
        jump_if::<12>,
        jump_if::<13>,
        jump_if::<14>,
        jump_if::<15>,
    ];
    JUMPS[usize::from(condition & 15)]
}

#[cold]
fn slow(cpu: &mut Cpu, mmu: &mut Mmu<'_>, op: &Op) -> Flow {
    any(cpu, mmu, op)
}

fn port(_: &mut Cpu, _: &mut Mmu<'_>, _: &Op) -> Flow {
    Flow::Port
}

fn nop(_: &mut Cpu, _: &mut Mmu<'_>, _: &Op) -> Flow {
    Flow::Next
}

fn move_register<const W: u8>(cpu: &mut Cpu, _: &mut Mmu<'_>, op: &Op) -> Flow {
    cpu.set(op.dst, W, cpu.get(op.src, W));
    Flow::Next
}

fn move_immediate<const W: u8>(cpu: &mut Cpu, _: &mut Mmu<'_>, op: &Op) -> Flow {
    cpu.set(op.dst, W, op.imm);
    Flow::Next
}

fn load<const W: u8>(cpu: &mut Cpu, mmu: &mut Mmu<'_>, op: &Op) -> Flow {
    let value = kept!(mmu.load_kept(cpu.address(op), W), cpu, mmu, op);
    cpu.set(op.dst, W, value);
    Flow::Next
}

fn store<const W: u8>(cpu: &mut Cpu, mmu: &mut Mmu<'_>, op: &Op) -> Flow {
    kept!(mmu.store_kept(cpu.address(op), W, cpu.get(op.src, W)), cpu, mmu, op);
    Flow::Next
}

fn store_immediate<const W: u8>(cpu: &mut Cpu, mmu: &mut Mmu<'_>, op: &Op) -> Flow {
    kept!(mmu.store_kept(cpu.address(op), W, op.imm), cpu, mmu, op);
    Flow::Next
}

fn zero_extend<const FROM: u8>(cpu: &mut Cpu, _: &mut Mmu<'_>, op: &Op) -> Flow {
    cpu.set(op.dst, 3, cpu.get(op.src, FROM));
    Flow::Next
}

fn load_zero_extended<const FROM: u8>(cpu: &mut Cpu, mmu: &mut Mmu<'_>, op: &Op) -> Flow {
    let value = kept!(mmu.load_kept(cpu.address(op), FROM), cpu, mmu, op);
    cpu.set(op.dst, 3, value);
    Flow::Next
}

fn sign_extend<const FROM: u8>(cpu: &mut Cpu, _: &mut Mmu<'_>, op: &Op) -> Flow {
    cpu.set(op.dst, 3, extend(cpu.get(op.src, FROM), FROM));
    Flow::Next
}

fn load_sign_extended<const FROM: u8>(cpu: &mut Cpu, mmu: &mut Mmu<'_>, op: &Op) -> Flow {
    let value = kept!(mmu.load_kept(cpu.address(op), FROM), cpu, mmu, op);
    cpu.set(op.dst, 3, extend(value, FROM));
    Flow::Next
}

fn load_address<const W: u8>(cpu: &mut Cpu, _: &mut Mmu<'_>, op: &Op) -> Flow {
    let address = cpu.address(op);
    cpu.set(op.dst, W, address);
    Flow::Next
}

/// Sets the flags, and the destination unless the operation is CMP or TEST.
#[inline]
fn to_register<const ALU: u8, const W: u8>(cpu: &mut Cpu, op: &Op, b: u64) -> Flow {
    let operation = alu_of(ALU);
    let result = alu(operation, cpu.get(op.dst, W), b, W, &mut cpu.flags);
    if !operation.only_compares() {
        cpu.set(op.dst, W, result);
    }
    Flow::Next
}

#[inline]
fn to_memory<const ALU: u8, const W: u8>(cpu: &mut Cpu, mmu: &mut Mmu<'_>, op: &Op, b: u64) -> Flow {
    let (operation, address) = (alu_of(ALU), cpu.address(op));
    if operation.only_compares() {
        let a = kept!(mmu.load_kept(address, W), cpu, mmu, op);
        alu(operation, a, b, W, &mut cpu.flags);
        return Flow::Next;
    }
    let page = kept!(mmu.writable_kept(address), cpu, mmu, op);
    let a = kept!(page.load(address & 0xfff, W), cpu, mmu, op);
    let mut flags = cpu.flags;
    let result = alu(operation, a, b, W, &mut flags);
    kept!(page.store(address & 0xfff, W, result), cpu, mmu, op);
    cpu.flags = flags;
    Flow::Next
}

fn alu_rr<const ALU: u8, const W: u8>(cpu: &mut Cpu, _: &mut Mmu<'_>, op: &Op) -> Flow {
    to_register::<ALU, W>(cpu, op, cpu.get(op.src, W))
}

fn alu_ri<const ALU: u8, const W: u8>(cpu: &mut Cpu, _: &mut Mmu<'_>, op: &Op) -> Flow {
    to_register::<ALU, W>(cpu, op, op.imm & mask(W))
}

fn alu_rm<const ALU: u8, const W: u8>(cpu: &mut Cpu, mmu: &mut Mmu<'_>, op: &Op) -> Flow {
    let b = kept!(mmu.load_kept(cpu.address(op), W), cpu, mmu, op);
    to_register::<ALU, W>(cpu, op, b)
}

fn alu_mr<const ALU: u8, const W: u8>(cpu: &mut Cpu, mmu: &mut Mmu<'_>, op: &Op) -> Flow {
    let b = cpu.get(op.src, W);
    to_memory::<ALU, W>(cpu, mmu, op, b)
}

fn alu_mi<const ALU: u8, const W: u8>(cpu: &mut Cpu, mmu: &mut Mmu<'_>, op: &Op) -> Flow {
    to_memory::<ALU, W>(cpu, mmu, op, op.imm & mask(W))
}

fn unary_r<const UNARY: u8, const W: u8>(cpu: &mut Cpu, _: &mut Mmu<'_>, op: &Op) -> Flow {
    let result = unary(unary_of(UNARY), cpu.get(op.dst, W), op.imm, W, &mut cpu.flags);
    // A shift of a 32-bit register by 0 clears the upper half as well.
    cpu.set(op.dst, W, result);
    Flow::Next
}

fn shift_cl_r<const UNARY: u8, const W: u8>(cpu: &mut Cpu, _: &mut Mmu<'_>, op: &Op) -> Flow {
    let count = cpu.get(RCX, 0);
    let result = unary(unary_of(UNARY), cpu.get(op.dst, W), count, W, &mut cpu.flags);
    cpu.set(op.dst, W, result);
    Flow::Next
}

fn jump_if<const CONDITION: u8>(cpu: &mut Cpu, _: &mut Mmu<'_>, op: &Op) -> Flow {
    cpu.rip = if cpu.flags.condition(CONDITION) { op.imm } else { op.disp };
    Flow::Jumped
}

fn jump(cpu: &mut Cpu, _: &mut Mmu<'_>, op: &Op) -> Flow {
    cpu.rip = op.imm;
    Flow::Jumped
}

fn jump_register(cpu: &mut Cpu, mmu: &mut Mmu<'_>, op: &Op) -> Flow {
    let target = cpu.whole(op.dst);
    if !is_canonical(target) {
        return slow(cpu, mmu, op);
    }
    cpu.rip = target;
    Flow::Jumped
}

fn call(cpu: &mut Cpu, mmu: &mut Mmu<'_>, op: &Op) -> Flow {
    let top = cpu.whole(RSP).wrapping_sub(8);
    kept!(mmu.store_kept(top, 3, op.disp), cpu, mmu, op);
    cpu.set(RSP, 3, top);
    cpu.rip = op.imm;
    Flow::Jumped
}

fn ret(cpu: &mut Cpu, mmu: &mut Mmu<'_>, op: &Op) -> Flow {
    let top = cpu.whole(RSP);
    let target = kept!(mmu.load_kept(top, 3), cpu, mmu, op);
    if !is_canonical(target) {
        return slow(cpu, mmu, op);
    }
    cpu.set(RSP, 3, top.wrapping_add(8));
    cpu.rip = target;
    Flow::Jumped
}

fn push(cpu: &mut Cpu, mmu: &mut Mmu<'_>, op: &Op) -> Flow {
    let top = cpu.whole(RSP).wrapping_sub(8);
    kept!(mmu.store_kept(top, 3, cpu.whole(op.src)), cpu, mmu, op);
    cpu.set(RSP, 3, top);
    Flow::Next
}

fn pop(cpu: &mut Cpu, mmu: &mut Mmu<'_>, op: &Op) -> Flow {
    let top = cpu.whole(RSP);
    let value = kept!(mmu.load_kept(top, 3), cpu, mmu, op);
    cpu.set(RSP, 3, top.wrapping_add(8));
    cpu.set(op.dst, 3, value);
    Flow::Next
}
