//! All instructions but port I/O, by one function for all forms and widths. `steps.rs` has shorter ways for the frequent ones.

use super::arith::{alu, extend, imul, mask, mul, sign, unary};
use super::cpu::{Cpu, Flow, RAX, RBP, RCX, RDX, RSP};
use super::flags::{CF, DF, Flags, IF};
use super::mmu::Mmu;
use super::op::{Alu, BitOp, Form, Kind, Op, is_canonical};
use crate::measure::clusters::ClusterEnd as End;
use std::sync::atomic::{Ordering, fence};

/// RF and VM, which PUSHF stores as 0 (SDM vol. 2B).
const NOT_PUSHED: u64 = 3 << 16;
/// How often a LOCK instruction is tried where other vCPUs change its operand meanwhile.
const TRIES: u32 = 64;

/// A change of memory in place: of the operand, or of the word at `address` where a bit offset has moved it. `change` gets the value and
/// the flags before it, and with a LOCK prefix is called again where another processor has changed the operand meanwhile.
fn in_place(
    cpu: &mut Cpu,
    op: &Op,
    address: u64,
    mmu: &mut Mmu<'_>,
    change: impl Fn(u64, &mut Flags) -> u64,
) -> Result<u64, End> {
    let (page, offset) = (mmu.writable(address)?, address & 0xfff);
    for _ in 0..TRIES {
        let value = page.load(offset, op.width).ok_or(End::Unaligned)?;
        let mut flags = cpu.flags;
        let new = change(value, &mut flags);
        let found = if op.locked {
            page.compare_exchange(offset, op.width, value, new)
        } else {
            page.store(offset, op.width, new).map(|()| value)
        };
        if found.ok_or(End::Unaligned)? == value {
            cpu.flags = flags;
            return Ok(value);
        }
    }
    Err(End::Contended)
}

/// Carries any instruction out, but port I/O.
pub(super) fn any(cpu: &mut Cpu, mmu: &mut Mmu<'_>, op: &Op) -> Flow {
    match op.kind {
        Kind::Jcc(_) | Kind::Jmp | Kind::JmpR | Kind::JmpM | Kind::Call | Kind::CallR | Kind::CallM | Kind::Ret => {
            let result = jump(cpu, op, mmu);
            cpu.flow(result, Flow::Jumped)
        }
        _ => {
            let result = data(cpu, op, mmu);
            cpu.flow(result, Flow::Next)
        }
    }
}

/// Jumps, calls and returns.
fn jump(cpu: &mut Cpu, op: &Op, mmu: &mut Mmu<'_>) -> Result<(), End> {
    let target = match op.kind {
        Kind::JmpR | Kind::CallR => cpu.whole(op.dst),
        Kind::JmpM | Kind::CallM => cpu.load(op, 3, mmu)?,
        Kind::Ret => mmu.load(cpu.whole(RSP), 3)?,
        Kind::Jcc(condition) if !cpu.flags.condition(condition) => op.disp,
        _ => op.imm,
    };
    if !is_canonical(target) {
        return Err(End::Page);
    }
    match op.kind {
        Kind::Call => cpu.push(op.disp, mmu)?,
        Kind::CallR | Kind::CallM => cpu.push(op.imm, mmu)?,
        Kind::Ret => cpu.set(RSP, 3, cpu.whole(RSP).wrapping_add(8)),
        _ => {}
    }
    cpu.rip = target;
    Ok(())
}

/// What is neither a jump nor port I/O.
fn data(cpu: &mut Cpu, op: &Op, mmu: &mut Mmu<'_>) -> Result<(), End> {
    let width = op.width;
    match op.kind {
        Kind::MovRr => cpu.set(op.dst, width, cpu.get(op.src, width)),
        Kind::MovRi => cpu.set(op.dst, width, op.imm),
        Kind::Load => {
            let value = cpu.load(op, width, mmu)?;
            cpu.set(op.dst, width, value);
        }
        Kind::Store => mmu.store(cpu.address(op), width, cpu.get(op.src, width))?,
        Kind::StoreImm => mmu.store(cpu.address(op), width, op.imm)?,
        Kind::Lea => {
            let address = cpu.address(op);
            cpu.set(op.dst, width, address);
        }
        Kind::Nop => {}
        Kind::PushR => cpu.push(cpu.whole(op.src), mmu)?,
        Kind::Pop => {
            let value = cpu.pop(mmu)?;
            cpu.set(op.dst, 3, value);
        }
        Kind::Alu(operation, form) => arithmetic(cpu, op, operation, form, mmu)?,
        Kind::XchgRr => {
            let (a, b) = (cpu.get(op.dst, width), cpu.get(op.src, width));
            cpu.set(op.dst, width, b);
            cpu.set(op.src, width, a);
        }
        Kind::XchgMr => {
            let address = cpu.address(op);
            let page = mmu.writable(address)?;
            let value = page.exchange(address & 0xfff, width, cpu.get(op.src, width)).ok_or(End::Unaligned)?;
            cpu.set(op.src, width, value);
        }
        Kind::CmpxchgMr => compare_exchange(cpu, op, mmu)?,
        Kind::UnaryR(operation) => {
            let result = unary(operation, cpu.get(op.dst, width), op.imm, width, &mut cpu.flags);
            cpu.set(op.dst, width, result);
        }
        Kind::ShiftClR(operation) => {
            let count = cpu.get(RCX, 0);
            let result = unary(operation, cpu.get(op.dst, width), count, width, &mut cpu.flags);
            // A shift of a 32-bit register by 0 clears the upper half as well.
            cpu.set(op.dst, width, result);
        }
        Kind::UnaryM(operation) => {
            in_place(cpu, op, cpu.address(op), mmu, |value, flags| unary(operation, value, op.imm, width, flags))?;
        }
        Kind::ShiftClM(operation) => {
            let count = cpu.get(RCX, 0);
            in_place(cpu, op, cpu.address(op), mmu, |value, flags| unary(operation, value, count, width, flags))?;
        }
        Kind::XaddMr => {
            let b = cpu.get(op.src, width);
            let value = in_place(cpu, op, cpu.address(op), mmu, |value, flags| alu(Alu::Add, value, b, width, flags))?;
            cpu.set(op.src, width, value);
        }
        Kind::XaddRr => {
            let (a, b) = (cpu.get(op.dst, width), cpu.get(op.src, width));
            let sum = alu(Alu::Add, a, b, width, &mut cpu.flags);
            cpu.set(op.src, width, a);
            cpu.set(op.dst, width, sum);
        }
        Kind::MovzxR(from) => cpu.set(op.dst, width, cpu.get(op.src, from)),
        Kind::MovzxM(from) => {
            let value = cpu.load(op, from, mmu)?;
            cpu.set(op.dst, width, value);
        }
        Kind::MovsxR(from) => cpu.set(op.dst, width, extend(cpu.get(op.src, from), from)),
        Kind::MovsxM(from) => {
            let value = cpu.load(op, from, mmu)?;
            cpu.set(op.dst, width, extend(value, from));
        }
        Kind::ImulR | Kind::ImulM | Kind::ImulRi | Kind::ImulMi | Kind::MulR(_) => multiply(cpu, op, mmu)?,
        Kind::BitR(..) | Kind::BitM(..) => bit(cpu, op, mmu)?,
        Kind::Bswap => {
            let value = cpu.get(op.dst, width).swap_bytes();
            cpu.set(op.dst, width, if width == 3 { value } else { value >> 32 });
        }
        Kind::PushI => cpu.push(op.imm, mmu)?,
        Kind::PushM => {
            let value = cpu.load(op, 3, mmu)?;
            cpu.push(value, mmu)?;
        }
        Kind::Leave => {
            let frame = cpu.whole(RBP);
            let value = mmu.load(frame, 3)?;
            cpu.set(RSP, 3, frame.wrapping_add(8));
            cpu.set(RBP, 3, value);
        }
        Kind::Pushf => cpu.push(cpu.flags.get() & !NOT_PUSHED, mmu)?,
        Kind::SignExtendA => cpu.set(RAX, width, extend(cpu.get(RAX, width - 1), width - 1)),
        Kind::SignExtendD => {
            let negative = cpu.get(RAX, width) >> sign(width) & 1 != 0;
            cpu.set(RDX, width, if negative { u64::MAX } else { 0 });
        }
        Kind::SetccR(condition) => cpu.set(op.dst, 0, cpu.flags.condition(condition).into()),
        Kind::SetccM(condition) => mmu.store(cpu.address(op), 0, cpu.flags.condition(condition).into())?,
        Kind::CmovR(_) | Kind::CmovM(_) => conditional_move(cpu, op, mmu)?,
        Kind::Fence => fence(Ordering::SeqCst),
        Kind::Cld => cpu.flags.clear_control(DF),
        // An interrupt that has come meanwhile is taken before it, and not only after what it guards.
        Kind::Cli if cpu.flags.control(IF) != 0 => return Err(End::Unsupported),
        Kind::Cli => {}
        // Jumps and port I/O are not for this function.
        Kind::Jcc(_)
        | Kind::Jmp
        | Kind::JmpR
        | Kind::JmpM
        | Kind::Call
        | Kind::CallR
        | Kind::CallM
        | Kind::Ret
        | Kind::InDx
        | Kind::InImm
        | Kind::OutDx
        | Kind::OutImm => return Err(End::Unsupported),
    }
    Ok(())
}

/// An instruction with a destination and a source.
fn arithmetic(cpu: &mut Cpu, op: &Op, operation: Alu, form: Form, mmu: &mut Mmu<'_>) -> Result<(), End> {
    let width = op.width;
    let b = match form {
        Form::Rr | Form::Mr => cpu.get(op.src, width),
        Form::Ri | Form::Mi => op.imm & mask(width),
        Form::Rm => cpu.load(op, width, mmu)?,
    };
    match form {
        Form::Rr | Form::Ri | Form::Rm => {
            let result = alu(operation, cpu.get(op.dst, width), b, width, &mut cpu.flags);
            if !operation.only_compares() {
                cpu.set(op.dst, width, result);
            }
        }
        Form::Mr | Form::Mi if operation.only_compares() => {
            let a = cpu.load(op, width, mmu)?;
            alu(operation, a, b, width, &mut cpu.flags);
        }
        Form::Mr | Form::Mi => {
            in_place(cpu, op, cpu.address(op), mmu, |value, flags| alu(operation, value, b, width, flags))?;
        }
    }
    Ok(())
}

/// The source is read, and a 32-bit destination's upper half cleared, in any case (SDM vol. 2A, CMOVcc).
fn conditional_move(cpu: &mut Cpu, op: &Op, mmu: &mut Mmu<'_>) -> Result<(), End> {
    let (value, condition) = match op.kind {
        Kind::CmovM(condition) => (cpu.load(op, op.width, mmu)?, condition),
        Kind::CmovR(condition) => (cpu.get(op.src, op.width), condition),
        _ => return Err(End::Unsupported),
    };
    let value = if cpu.flags.condition(condition) { value } else { cpu.get(op.dst, op.width) };
    cpu.set(op.dst, op.width, value);
    Ok(())
}

/// The accumulator is written only where it was not equal (SDM vol. 2A, CMPXCHG): RAX keeps its upper half where EAX was.
fn compare_exchange(cpu: &mut Cpu, op: &Op, mmu: &mut Mmu<'_>) -> Result<(), End> {
    let (width, address) = (op.width, cpu.address(op));
    let (expected, new) = (cpu.get(RAX, width), cpu.get(op.src, width));
    let page = mmu.writable(address)?;
    let found = page.compare_exchange(address & 0xfff, width, expected, new).ok_or(End::Unaligned)?;
    alu(Alu::Cmp, expected, found, width, &mut cpu.flags);
    if found != expected {
        cpu.set(RAX, width, found);
    }
    Ok(())
}

fn multiply(cpu: &mut Cpu, op: &Op, mmu: &mut Mmu<'_>) -> Result<(), End> {
    let width = op.width;
    if let Kind::MulR(signed) = op.kind {
        let (low, high) = mul(cpu.get(RAX, width), cpu.get(op.dst, width), width, signed, &mut cpu.flags);
        if width == 0 {
            cpu.set(RAX, 1, high << 8 | low);
        } else {
            cpu.set(RAX, width, low);
            cpu.set(RDX, width, high);
        }
        return Ok(());
    }
    let a = match op.kind {
        Kind::ImulM | Kind::ImulMi => cpu.load(op, width, mmu)?,
        _ => cpu.get(op.src, width),
    };
    let b = match op.kind {
        Kind::ImulRi | Kind::ImulMi => op.imm,
        _ => cpu.get(op.dst, width),
    };
    let product = imul(a, b, width, &mut cpu.flags);
    cpu.set(op.dst, width, product);
    Ok(())
}

/// BT and its like: the bit goes to CF; the other flags stay (they are undefined but for ZF).
fn bit(cpu: &mut Cpu, op: &Op, mmu: &mut Mmu<'_>) -> Result<(), End> {
    let (width, size) = (op.width, u64::from(sign(op.width)) + 1);
    let (operation, offset) = match op.kind {
        Kind::BitR(operation, true) | Kind::BitM(operation, true) => (operation, cpu.get(op.src, width)),
        Kind::BitR(operation, false) | Kind::BitM(operation, false) => (operation, op.imm % size),
        _ => return Err(End::Unsupported),
    };
    let selected = 1 << (offset % size);
    let changed = |value: u64| match operation {
        BitOp::Test => value,
        BitOp::Set => value | selected,
        BitOp::Reset => value & !selected,
        BitOp::Complement => value ^ selected,
    };
    let value = if let Kind::BitR(..) = op.kind {
        let value = cpu.get(op.dst, width);
        if operation != BitOp::Test {
            cpu.set(op.dst, width, changed(value));
        }
        value
    } else {
        // A bit offset in a register reaches beyond the operand, both ways.
        let words = extend(offset, width).cast_signed() >> (width + 3);
        let words = if matches!(op.kind, Kind::BitM(_, true)) { words } else { 0 };
        let address = cpu.address(op).wrapping_add((words << width).cast_unsigned());
        if operation == BitOp::Test {
            mmu.load(address, width)?
        } else {
            in_place(cpu, op, address, mmu, |value, _| changed(value))?
        }
    };
    let carry = if value & selected != 0 { CF } else { 0 };
    cpu.flags.set(CF, carry);
    Ok(())
}
