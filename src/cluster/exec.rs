//! The interpreter.

use super::arith::{alu, extend, imul, mask, mul, sign, unary};
use super::blocks::Blocks;
use super::flags::{CF, DF, Flags, IF};
use super::mmu::Mmu;
use super::op::{Alu, BitOp, Form, HIGH, Kind, Op};
use crate::measure::clusters::ClusterEnd as End;
use std::sync::atomic::{Ordering, fence};

const RAX: u8 = 0;
const RDX: u8 = 2;
const RSP: u8 = 4;
const RBP: u8 = 5;
/// RF and VM, which PUSHF stores as 0 (SDM vol. 2B).
const NOT_PUSHED: u64 = 3 << 16;
/// How many instructions are run between two looks at the clock.
const STRIDE: u64 = 64;

/// What a port access has led to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum PortEnd {
    /// Nothing: the guest goes on.
    Nothing,
    /// A device has raised an interrupt.
    Interrupt,
    /// The run is over.
    Stop,
}

/// The ports of a machine.
pub(super) trait Ports {
    /// Reads `1 << width` bytes. `None`, and nothing is read, where no device of hwvmm's has the port.
    fn input(&mut self, port: u16, width: u8) -> Option<(u64, PortEnd)>;
    /// Writes `1 << width` bytes. `None`, and nothing is written, where no device of hwvmm's has the port.
    fn output(&mut self, port: u16, width: u8, value: u64) -> Option<PortEnd>;
    /// Returns the reason where time is up, or the thread is wanted elsewhere.
    fn interrupted(&mut self) -> Option<End>;
}

/// The registers of an interpreted vCPU.
pub(super) struct Cpu {
    /// By their numbers; from 16 on they are 0.
    pub(super) regs: [u64; 32],
    pub(super) rip: u64,
    pub(super) flags: Flags,
    /// The segment bases, by [`Op::segment`].
    pub(super) bases: [u64; 4],
}

enum Next {
    Instruction,
    Jumped,
    End(End),
}

impl Cpu {
    #[inline]
    fn get(&self, number: u8, width: u8) -> u64 {
        let value = self.regs[usize::from(number & 31)];
        if width == 0 && number & HIGH != 0 { value >> 8 & 0xff } else { value & mask(width) }
    }

    #[inline]
    fn whole(&self, number: u8) -> u64 {
        self.regs[usize::from(number & 31)]
    }

    #[inline]
    fn set(&mut self, number: u8, width: u8, value: u64) {
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
    fn address(&self, op: &Op) -> u64 {
        let index = self.whole(op.index) << (op.scale & 3);
        let base = self.whole(op.base).wrapping_add(self.bases[usize::from(op.segment & 3)]);
        base.wrapping_add(index).wrapping_add(op.disp)
    }

    #[inline]
    fn load(&self, op: &Op, width: u8, mmu: &mut Mmu<'_>) -> Result<u64, End> {
        mmu.load(self.address(op), width)
    }

    #[inline]
    fn push(&mut self, value: u64, mmu: &mut Mmu<'_>) -> Result<(), End> {
        let top = self.whole(RSP).wrapping_sub(8);
        mmu.store(top, 3, value)?;
        self.set(RSP, 3, top);
        Ok(())
    }

    #[inline]
    fn pop(&mut self, mmu: &mut Mmu<'_>) -> Result<u64, End> {
        let top = self.whole(RSP);
        let value = mmu.load(top, 3)?;
        self.set(RSP, 3, top.wrapping_add(8));
        Ok(value)
    }
}

/// Runs instructions from RIP on until one cannot be interpreted, or the time is up. Returns the number of instructions run and the
/// reason for the end; RIP is that of the next instruction.
pub(super) fn run(
    cpu: &mut Cpu,
    mmu: &mut Mmu<'_>,
    blocks: &mut Blocks,
    ports: &mut impl Ports,
    most: u64,
) -> (u64, End) {
    blocks.start();
    let (mut done, mut check) = (0, STRIDE);
    loop {
        if done >= check {
            if done >= most {
                return (done, End::Instructions);
            }
            if let Some(end) = ports.interrupted() {
                return (done, end);
            }
            check = done + STRIDE;
        }
        let block = match blocks.at(cpu.rip, mmu) {
            Ok(block) if !block.ops.is_empty() => block,
            Ok(_) => return (done, End::Unsupported),
            Err(end) => return (done, end),
        };
        let start = cpu.rip;
        let mut at = 0;
        let mut jumped = false;
        for op in &block.ops {
            match step(cpu, op, start, mmu, ports) {
                Ok(Next::Instruction) => {}
                Ok(Next::Jumped) => jumped = true,
                Ok(Next::End(end)) => {
                    cpu.rip = start.wrapping_add(op.next.into());
                    return (done + 1, end);
                }
                Err(end) => {
                    cpu.rip = start.wrapping_add(at.into());
                    return (done, end);
                }
            }
            done += 1;
            at = op.next;
        }
        if !jumped {
            cpu.rip = start.wrapping_add(at.into());
        }
    }
}

/// Runs one instruction. Where it fails nothing has changed.
#[inline(always)]
#[allow(clippy::inline_always, reason = "the loop is one function: a call an instruction is dear")]
fn step(cpu: &mut Cpu, op: &Op, start: u64, mmu: &mut Mmu<'_>, ports: &mut impl Ports) -> Result<Next, End> {
    // One copy of the code for each width: masks and sign bits are constants in it.
    match op.width {
        3 => step_of(3, cpu, op, start, mmu, ports),
        2 => step_of(2, cpu, op, start, mmu, ports),
        1 => step_of(1, cpu, op, start, mmu, ports),
        _ => step_of(0, cpu, op, start, mmu, ports),
    }
}

/// [`step`] for one width.
#[inline(always)]
#[allow(clippy::inline_always, reason = "the width must be a constant")]
fn step_of(
    width: u8,
    cpu: &mut Cpu,
    op: &Op,
    start: u64,
    mmu: &mut Mmu<'_>,
    ports: &mut impl Ports,
) -> Result<Next, End> {
    match op.kind {
        Kind::MovRr => cpu.set(op.dst, width, cpu.get(op.src, width)),
        Kind::MovRi => cpu.set(op.dst, width, op.imm),
        Kind::Load => {
            let value = cpu.load(op, width, mmu)?;
            cpu.set(op.dst, width, value);
        }
        Kind::Store => mmu.store(cpu.address(op), width, cpu.get(op.src, width))?,
        Kind::StoreImm => mmu.store(cpu.address(op), width, op.imm)?,
        Kind::Alu(operation, form) => arithmetic(width, cpu, op, operation, form, mmu)?,
        Kind::Lea => {
            let address = cpu.address(op);
            cpu.set(op.dst, width, address);
        }
        Kind::Jcc(condition) => {
            let next = start.wrapping_add(op.next.into());
            cpu.rip = if cpu.flags.condition(condition) { op.imm } else { next };
            return Ok(Next::Jumped);
        }
        Kind::Jmp | Kind::JmpR | Kind::JmpM | Kind::Call | Kind::CallR | Kind::CallM | Kind::Ret => {
            jump(cpu, op, start, mmu)?;
            return Ok(Next::Jumped);
        }
        Kind::PushR => cpu.push(cpu.get(op.src, 3), mmu)?,
        Kind::Pop => {
            let value = cpu.pop(mmu)?;
            cpu.set(op.dst, 3, value);
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
        Kind::Nop => {}
        Kind::InDx | Kind::InImm => return input(cpu, op, ports),
        Kind::OutDx | Kind::OutImm => return output(cpu, op, ports),
        _ => rare(cpu, op, mmu)?,
    }
    Ok(Next::Instruction)
}

/// An instruction with a destination and a source.
#[inline(always)]
#[allow(clippy::inline_always, reason = "the width must be a constant")]
fn arithmetic(width: u8, cpu: &mut Cpu, op: &Op, operation: Alu, form: Form, mmu: &mut Mmu<'_>) -> Result<(), End> {
    let keeps = !matches!(operation, Alu::Cmp | Alu::Test);
    match form {
        Form::Rr | Form::Ri | Form::Rm => {
            let b = match form {
                Form::Rr => cpu.get(op.src, width),
                Form::Ri => op.imm & mask(width),
                _ => cpu.load(op, width, mmu)?,
            };
            let result = alu(operation, cpu.get(op.dst, width), b, width, &mut cpu.flags);
            if keeps {
                cpu.set(op.dst, width, result);
            }
        }
        Form::Mr | Form::Mi => {
            let b = if form == Form::Mr { cpu.get(op.src, width) } else { op.imm & mask(width) };
            let address = cpu.address(op);
            if keeps {
                let page = mmu.writable(address)?;
                let a = page.load(address & 0xfff, width).ok_or(End::Unaligned)?;
                let result = alu(operation, a, b, width, &mut cpu.flags);
                page.store(address & 0xfff, width, result).ok_or(End::Unaligned)?;
            } else {
                alu(operation, mmu.load(address, width)?, b, width, &mut cpu.flags);
            }
        }
    }
    Ok(())
}

/// Unconditional jumps, calls and returns.
#[inline]
fn jump(cpu: &mut Cpu, op: &Op, start: u64, mmu: &mut Mmu<'_>) -> Result<(), End> {
    let target = match op.kind {
        Kind::JmpR | Kind::CallR => cpu.whole(op.dst),
        Kind::JmpM | Kind::CallM => cpu.load(op, 3, mmu)?,
        Kind::Ret => mmu.load(cpu.whole(RSP), 3)?,
        _ => op.imm,
    };
    // A jump to an address that is not canonical faults before it; where 4 levels and 5 levels differ, the page walk ends the cluster.
    if (target.cast_signed() >> 47).wrapping_add(1).cast_unsigned() > 1 {
        return Err(End::Page);
    }
    match op.kind {
        Kind::Call | Kind::CallR | Kind::CallM => cpu.push(start.wrapping_add(op.next.into()), mmu)?,
        Kind::Ret => cpu.set(RSP, 3, cpu.whole(RSP).wrapping_add(8)),
        _ => {}
    }
    cpu.rip = target;
    Ok(())
}

#[allow(clippy::cast_possible_truncation, reason = "a port's number is 16 bits")]
fn port(cpu: &Cpu, op: &Op) -> u16 {
    if matches!(op.kind, Kind::InDx | Kind::OutDx) { cpu.whole(RDX) as u16 } else { op.imm as u16 }
}

fn after(end: PortEnd, flags: &Flags) -> Next {
    match end {
        PortEnd::Nothing => Next::Instruction,
        PortEnd::Interrupt if flags.control(IF) == 0 => Next::Instruction,
        PortEnd::Interrupt => Next::End(End::Interrupt),
        PortEnd::Stop => Next::End(End::Stopped),
    }
}

#[inline(never)]
fn input(cpu: &mut Cpu, op: &Op, ports: &mut impl Ports) -> Result<Next, End> {
    let (value, end) = ports.input(port(cpu, op), op.width).ok_or(End::Port)?;
    cpu.set(RAX, op.width, value);
    Ok(after(end, &cpu.flags))
}

#[inline(never)]
fn output(cpu: &mut Cpu, op: &Op, ports: &mut impl Ports) -> Result<Next, End> {
    let end = ports.output(port(cpu, op), op.width, cpu.get(RAX, op.width)).ok_or(End::Port)?;
    Ok(after(end, &cpu.flags))
}

/// A change of memory in place.
fn in_place(cpu: &Cpu, op: &Op, mmu: &mut Mmu<'_>, change: impl FnOnce(u64) -> u64) -> Result<(), End> {
    let address = cpu.address(op);
    let page = mmu.writable(address)?;
    let value = page.load(address & 0xfff, op.width).ok_or(End::Unaligned)?;
    page.store(address & 0xfff, op.width, change(value)).ok_or(End::Unaligned)
}

/// Instructions that are less frequent.
#[inline(never)]
fn rare(cpu: &mut Cpu, op: &Op, mmu: &mut Mmu<'_>) -> Result<(), End> {
    let width = op.width;
    match op.kind {
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
            set_shifted(cpu, op, result);
        }
        Kind::ShiftClR(operation) => {
            let count = cpu.get(1, 0);
            let result = unary(operation, cpu.get(op.dst, width), count, width, &mut cpu.flags);
            set_shifted(cpu, op, result);
        }
        Kind::UnaryM(operation) => {
            let mut flags = cpu.flags;
            in_place(cpu, op, mmu, |value| unary(operation, value, op.imm, width, &mut flags))?;
            cpu.flags = flags;
        }
        Kind::ShiftClM(operation) => {
            let (mut flags, count) = (cpu.flags, cpu.get(1, 0));
            in_place(cpu, op, mmu, |value| unary(operation, value, count, width, &mut flags))?;
            cpu.flags = flags;
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
        Kind::Cli => cpu.flags.clear_control(IF),
        // The others are the interpreter's own.
        _ => return Err(End::Unsupported),
    }
    Ok(())
}

/// Writes a result back; a shift of a 32-bit register by 0 clears the upper half as well.
fn set_shifted(cpu: &mut Cpu, op: &Op, result: u64) {
    cpu.set(op.dst, op.width, result);
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
            let page = mmu.writable(address)?;
            let value = page.load(address & 0xfff, width).ok_or(End::Unaligned)?;
            page.store(address & 0xfff, width, changed(value)).ok_or(End::Unaligned)?;
            value
        }
    };
    let carry = if value & selected != 0 { CF } else { 0 };
    cpu.flags.set(CF, carry);
    Ok(())
}
