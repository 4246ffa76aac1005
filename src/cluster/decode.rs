//! Decodes a block: the instructions from an address on, up to the first jump or the first instruction that is not interpreted.

use super::op::{Alu, BitOp, FS, Form, GS, HIGH, Kind, NO_SEGMENT, Op, Unary, ZERO, is_canonical};
use iced_x86::{Code, Decoder, DecoderOptions, FlowControl, Instruction, Mnemonic, OpKind, Register};

/// The most instructions of a block.
pub(super) const MAX_OPS: usize = 32;
/// The most bytes of a block.
pub(super) const MAX_BYTES: usize = 128;

/// Decodes the block of at most `most` instructions in `bytes`, which lie at the linear address `rip`, in 64-bit mode. Returns its instructions and their length
/// in bytes; none where the first is not interpreted.
pub(super) fn decode(bytes: &[u8], rip: u64, most: usize) -> (Vec<Op>, usize) {
    let bytes = &bytes[..bytes.len().min(MAX_BYTES)];
    let mut decoder = Decoder::with_ip(64, bytes, rip, DecoderOptions::NONE);
    let (mut ops, mut length) = (Vec::new(), 0);
    while ops.len() < most && decoder.can_decode() {
        let instruction = decoder.decode();
        if instruction.is_invalid() {
            break;
        }
        let end = decoder.position();
        // A branch with an operand-size prefix: processors of AMD and of Intel take it differently (SDM vol. 2A, JMP; APM vol. 3, JMP).
        let start = end.saturating_sub(instruction.len());
        if instruction.flow_control() != FlowControl::Next && bytes.get(start..end).is_some_and(has_size_prefix) {
            break;
        }
        let Some(mut op) = translate(&instruction) else { break };
        let Ok(next) = u8::try_from(end) else { break };
        op.next = next;
        match op.kind {
            Kind::Jcc(_) | Kind::Call => op.disp = instruction.next_ip(),
            Kind::CallR | Kind::CallM => op.imm = instruction.next_ip(),
            _ => {}
        }
        length = end;
        ops.push(op);
        if op.kind.ends_block() {
            break;
        }
    }
    (ops, length)
}

/// The number of a general-purpose register, and the log2 of its bytes.
/// Returns true if one of the instruction's legacy prefixes is that of the operand size.
fn has_size_prefix(instruction: &[u8]) -> bool {
    let prefixes = [0x26, 0x2e, 0x36, 0x3e, 0x64, 0x65, 0x66, 0x67, 0xf0, 0xf2, 0xf3];
    instruction.iter().take_while(|byte| prefixes.contains(*byte)).any(|byte| *byte == 0x66)
}

fn register(register: Register) -> Option<(u8, u8)> {
    let high = match register {
        Register::AH => Some(0),
        Register::CH => Some(1),
        Register::DH => Some(2),
        Register::BH => Some(3),
        _ => None,
    };
    if let Some(number) = high {
        return Some((HIGH + number, 0));
    }
    if !register.is_gpr() {
        return None;
    }
    let number = u8::try_from(register.full_register().number()).ok().filter(|number| *number < 16)?;
    Some((number, log2(register.size())?))
}

fn log2(bytes: usize) -> Option<u8> {
    match bytes {
        1 => Some(0),
        2 => Some(1),
        4 => Some(2),
        8 => Some(3),
        _ => None,
    }
}

/// An operand.
enum Operand {
    Register(u8, u8),
    /// The log2 of its bytes.
    Memory(u8),
    Immediate(u64),
}

fn operand(instruction: &Instruction, number: u32) -> Option<Operand> {
    match instruction.op_kind(number) {
        OpKind::Register => {
            register(instruction.op_register(number)).map(|(number, width)| Operand::Register(number, width))
        }
        OpKind::Memory => Some(Operand::Memory(log2(instruction.memory_size().size())?)),
        OpKind::Immediate8
        | OpKind::Immediate16
        | OpKind::Immediate32
        | OpKind::Immediate64
        | OpKind::Immediate8to16
        | OpKind::Immediate8to32
        | OpKind::Immediate8to64
        | OpKind::Immediate32to64 => Some(Operand::Immediate(instruction.immediate(number))),
        _ => None,
    }
}

/// Sets the address of the memory operand. `None` for addresses that are not interpreted.
fn address(instruction: &Instruction, op: &mut Op) -> Option<()> {
    let base = instruction.memory_base();
    if matches!(base, Register::RIP) {
        op.disp = instruction.memory_displacement64();
    } else {
        let part = |part: Register| match part {
            Register::None => Some(ZERO),
            part => register(part).filter(|(_, width)| *width == 3).map(|(number, _)| number),
        };
        (op.base, op.index) = (part(base)?, part(instruction.memory_index())?);
        op.scale = log2(usize::try_from(instruction.memory_index_scale()).ok()?)?;
        op.disp = instruction.memory_displacement64();
        // With 32-bit addressing the address is cut off.
        if base == Register::None
            && instruction.memory_index() == Register::None
            && instruction.memory_displ_size() == 4
        {
            return None;
        }
    }
    op.segment = match instruction.segment_prefix() {
        Register::FS => FS,
        Register::GS => GS,
        _ => NO_SEGMENT,
    };
    op.indexed = op.index != ZERO || op.segment != NO_SEGMENT;
    Some(())
}

fn empty(kind: Kind, width: u8) -> Op {
    Op {
        kind,
        width,
        dst: ZERO,
        src: ZERO,
        base: ZERO,
        index: ZERO,
        scale: 0,
        indexed: false,
        locked: false,
        segment: NO_SEGMENT,
        next: 0,
        imm: 0,
        disp: 0,
    }
}

/// Returns the internal form of an instruction; `None` for one that is not interpreted.
fn translate(instruction: &Instruction) -> Option<Op> {
    let mnemonic = instruction.mnemonic();
    let repeated = instruction.has_rep_prefix() || instruction.has_repne_prefix();
    // As padding of a return or a jump; elsewhere they mean something else.
    if repeated && !matches!(mnemonic, Mnemonic::Ret | Mnemonic::Nop | Mnemonic::Pause) {
        return None;
    }
    let mut op = control_flow(instruction).or_else(|| data_flow(instruction)).or_else(|| single(instruction))?;
    op.locked = instruction.has_lock_prefix();
    (!op.locked || can_be_locked(op.kind)).then_some(op)
}

/// Returns true for the forms that may have a LOCK prefix and are interpreted with one.
fn can_be_locked(kind: Kind) -> bool {
    match kind {
        Kind::Alu(operation, Form::Mr | Form::Mi) => !operation.only_compares(),
        Kind::UnaryM(operation) => matches!(operation, Unary::Inc | Unary::Dec | Unary::Neg | Unary::Not),
        Kind::BitM(operation, _) => operation != BitOp::Test,
        kind => matches!(kind, Kind::XchgMr | Kind::CmpxchgMr | Kind::XaddMr),
    }
}

/// Jumps, calls, returns and the stack.
fn control_flow(instruction: &Instruction) -> Option<Op> {
    let code = instruction.code();
    if instruction.is_jcc_short_or_near() {
        return direct(instruction, Kind::Jcc(condition(instruction)));
    }
    match code {
        Code::Jmp_rel8_64 | Code::Jmp_rel32_64 => direct(instruction, Kind::Jmp),
        Code::Call_rel32_64 => direct(instruction, Kind::Call),
        Code::Jmp_rm64 => one(instruction, Kind::JmpR, Kind::JmpM),
        Code::Call_rm64 => one(instruction, Kind::CallR, Kind::CallM),
        Code::Retnq => Some(empty(Kind::Ret, 3)),
        Code::Push_r64 | Code::Push_rm64 => {
            let mut op = one(instruction, Kind::PushR, Kind::PushM)?;
            op.src = op.dst;
            Some(op)
        }
        Code::Pushq_imm8 | Code::Pushq_imm32 => {
            let Operand::Immediate(imm) = operand(instruction, 0)? else { return None };
            Some(Op { imm, ..empty(Kind::PushI, 3) })
        }
        Code::Pop_r64 => one(instruction, Kind::Pop, Kind::Pop),
        Code::Leaveq => Some(empty(Kind::Leave, 3)),
        Code::Pushfq => Some(empty(Kind::Pushf, 3)),
        _ => None,
    }
}

/// The number of the instruction's condition: the lower four bits of its opcode.
fn condition(instruction: &Instruction) -> u8 {
    use iced_x86::ConditionCode as C;
    match instruction.condition_code() {
        C::o | C::None => 0,
        C::no => 1,
        C::b => 2,
        C::ae => 3,
        C::e => 4,
        C::ne => 5,
        C::be => 6,
        C::a => 7,
        C::s => 8,
        C::ns => 9,
        C::p => 10,
        C::np => 11,
        C::l => 12,
        C::ge => 13,
        C::le => 14,
        C::g => 15,
    }
}

fn direct(instruction: &Instruction, kind: Kind) -> Option<Op> {
    let target = instruction.near_branch64();
    let is_direct = instruction.op_kind(0) == OpKind::NearBranch64 && is_canonical(target);
    is_direct.then(|| Op { imm: target, ..empty(kind, 3) })
}

/// An instruction with one operand, a register or memory.
fn one(instruction: &Instruction, of_register: Kind, of_memory: Kind) -> Option<Op> {
    match operand(instruction, 0)? {
        Operand::Register(number, width) => Some(Op { dst: number, src: number, ..empty(of_register, width) }),
        Operand::Memory(width) => {
            let mut op = empty(of_memory, width);
            address(instruction, &mut op)?;
            Some(op)
        }
        Operand::Immediate(_) => None,
    }
}

/// The operands of an instruction with two of them, or three with an immediate last.
fn two(instruction: &Instruction, kind: impl FnOnce(Form) -> Option<Kind>) -> Option<Op> {
    let mut op = empty(Kind::Nop, 0);
    let form = match (operand(instruction, 0)?, operand(instruction, 1)?) {
        (Operand::Register(dst, width), Operand::Register(src, _)) => {
            (op.dst, op.src, op.width) = (dst, src, width);
            Form::Rr
        }
        (Operand::Register(dst, width), Operand::Immediate(imm)) => {
            (op.dst, op.imm, op.width) = (dst, imm, width);
            Form::Ri
        }
        (Operand::Register(dst, width), Operand::Memory(_)) => {
            (op.dst, op.width) = (dst, width);
            Form::Rm
        }
        (Operand::Memory(width), Operand::Register(src, _)) => {
            (op.src, op.width) = (src, width);
            Form::Mr
        }
        (Operand::Memory(width), Operand::Immediate(imm)) => {
            (op.imm, op.width) = (imm, width);
            Form::Mi
        }
        _ => return None,
    };
    if matches!(form, Form::Rm | Form::Mr | Form::Mi) {
        address(instruction, &mut op)?;
    }
    op.kind = kind(form)?;
    Some(op)
}

/// Moves, arithmetic, shifts and bits.
fn data_flow(instruction: &Instruction) -> Option<Op> {
    let alu = |operation| two(instruction, |form| Some(Kind::Alu(operation, form)));
    let unary = |operation| one(instruction, Kind::UnaryR(operation), Kind::UnaryM(operation));
    match instruction.mnemonic() {
        Mnemonic::Mov => two(instruction, |form| {
            Some(match form {
                Form::Rr => Kind::MovRr,
                Form::Ri => Kind::MovRi,
                Form::Rm => Kind::Load,
                Form::Mr => Kind::Store,
                Form::Mi => Kind::StoreImm,
            })
        }),
        Mnemonic::Movzx => extended(instruction, Kind::MovzxR, Kind::MovzxM),
        Mnemonic::Movsx | Mnemonic::Movsxd => extended(instruction, Kind::MovsxR, Kind::MovsxM),
        Mnemonic::Lea => lea(instruction),
        Mnemonic::Xchg => two(instruction, |form| match form {
            Form::Rr => Some(Kind::XchgRr),
            Form::Mr => Some(Kind::XchgMr),
            Form::Rm | Form::Ri | Form::Mi => None,
        }),
        Mnemonic::Xadd => two(instruction, |form| match form {
            Form::Rr => Some(Kind::XaddRr),
            Form::Mr => Some(Kind::XaddMr),
            Form::Rm | Form::Ri | Form::Mi => None,
        }),
        Mnemonic::Cmpxchg => two(instruction, |form| (form == Form::Mr).then_some(Kind::CmpxchgMr)),
        Mnemonic::Add => alu(Alu::Add),
        Mnemonic::Or => alu(Alu::Or),
        Mnemonic::Adc => alu(Alu::Adc),
        Mnemonic::Sbb => alu(Alu::Sbb),
        Mnemonic::And => alu(Alu::And),
        Mnemonic::Sub => alu(Alu::Sub),
        Mnemonic::Xor => alu(Alu::Xor),
        Mnemonic::Cmp => alu(Alu::Cmp),
        Mnemonic::Test => alu(Alu::Test),
        Mnemonic::Inc => unary(Unary::Inc),
        Mnemonic::Dec => unary(Unary::Dec),
        Mnemonic::Neg => unary(Unary::Neg),
        Mnemonic::Not => unary(Unary::Not),
        Mnemonic::Shl | Mnemonic::Sal => shift(instruction, Unary::Shl),
        Mnemonic::Shr => shift(instruction, Unary::Shr),
        Mnemonic::Sar => shift(instruction, Unary::Sar),
        Mnemonic::Rol => shift(instruction, Unary::Rol),
        Mnemonic::Ror => shift(instruction, Unary::Ror),
        Mnemonic::Imul => imul(instruction),
        Mnemonic::Mul => one_register(instruction, Kind::MulR(false)),
        Mnemonic::Bt => bit(instruction, BitOp::Test),
        Mnemonic::Bts => bit(instruction, BitOp::Set),
        Mnemonic::Btr => bit(instruction, BitOp::Reset),
        Mnemonic::Btc => bit(instruction, BitOp::Complement),
        Mnemonic::Bswap => one_register(instruction, Kind::Bswap).filter(|op| op.width >= 2),
        mnemonic if is_cmov(mnemonic) => {
            let condition = condition(instruction);
            two(instruction, |form| match form {
                Form::Rr => Some(Kind::CmovR(condition)),
                Form::Rm => Some(Kind::CmovM(condition)),
                Form::Ri | Form::Mr | Form::Mi => None,
            })
        }
        mnemonic if is_setcc(mnemonic) => {
            let condition = condition(instruction);
            one(instruction, Kind::SetccR(condition), Kind::SetccM(condition))
        }
        _ => None,
    }
}

fn is_cmov(mnemonic: Mnemonic) -> bool {
    use Mnemonic as M;
    matches!(mnemonic, M::Cmovo | M::Cmovno | M::Cmovb | M::Cmovae | M::Cmove | M::Cmovne | M::Cmovbe | M::Cmova)
        || matches!(mnemonic, M::Cmovs | M::Cmovns | M::Cmovp | M::Cmovnp | M::Cmovl | M::Cmovge | M::Cmovle | M::Cmovg)
}

fn is_setcc(mnemonic: Mnemonic) -> bool {
    use Mnemonic as M;
    matches!(mnemonic, M::Seto | M::Setno | M::Setb | M::Setae | M::Sete | M::Setne | M::Setbe | M::Seta)
        || matches!(mnemonic, M::Sets | M::Setns | M::Setp | M::Setnp | M::Setl | M::Setge | M::Setle | M::Setg)
}

fn one_register(instruction: &Instruction, kind: Kind) -> Option<Op> {
    one(instruction, kind, kind).filter(|_| instruction.op_kind(0) == OpKind::Register)
}

/// MOVZX, MOVSX and MOVSXD: the source is narrower than the destination.
fn extended(instruction: &Instruction, of_register: fn(u8) -> Kind, of_memory: fn(u8) -> Kind) -> Option<Op> {
    let from = match operand(instruction, 1)? {
        Operand::Register(_, width) | Operand::Memory(width) => width,
        Operand::Immediate(_) => return None,
    };
    two(instruction, |form| match form {
        Form::Rr => Some(of_register(from)),
        Form::Rm => Some(of_memory(from)),
        Form::Ri | Form::Mr | Form::Mi => None,
    })
}

fn lea(instruction: &Instruction) -> Option<Op> {
    let (dst, width) = register(instruction.op0_register())?;
    let mut op = Op { dst, ..empty(Kind::Lea, width) };
    address(instruction, &mut op)?;
    op.segment = NO_SEGMENT;
    op.indexed = op.index != ZERO;
    Some(op)
}

fn shift(instruction: &Instruction, operation: Unary) -> Option<Op> {
    if instruction.op1_kind() == OpKind::Register {
        return one(instruction, Kind::ShiftClR(operation), Kind::ShiftClM(operation));
    }
    let mut op = one(instruction, Kind::UnaryR(operation), Kind::UnaryM(operation))?;
    op.imm = instruction.immediate(1);
    Some(op)
}

fn imul(instruction: &Instruction) -> Option<Op> {
    let has_immediate = instruction.op_count() == 3;
    if instruction.op_count() == 1 {
        return one_register(instruction, Kind::MulR(true));
    }
    let mut op = two(instruction, |form| match form {
        Form::Rr => Some(if has_immediate { Kind::ImulRi } else { Kind::ImulR }),
        Form::Rm => Some(if has_immediate { Kind::ImulMi } else { Kind::ImulM }),
        Form::Ri | Form::Mr | Form::Mi => None,
    })?;
    if has_immediate {
        op.imm = instruction.immediate(2);
    }
    Some(op)
}

fn bit(instruction: &Instruction, operation: BitOp) -> Option<Op> {
    two(instruction, |form| {
        Some(match form {
            Form::Rr => Kind::BitR(operation, true),
            Form::Ri => Kind::BitR(operation, false),
            Form::Mr => Kind::BitM(operation, true),
            Form::Mi => Kind::BitM(operation, false),
            Form::Rm => return None,
        })
    })
}

/// Instructions that are recognised by their opcode alone.
fn single(instruction: &Instruction) -> Option<Op> {
    let port =
        |op: u32| u64::from(instruction.op_kind(op) == OpKind::Immediate8).checked_mul(instruction.immediate8().into());
    Some(match instruction.code() {
        Code::In_AL_DX => empty(Kind::InDx, 0),
        Code::In_AX_DX => empty(Kind::InDx, 1),
        Code::In_EAX_DX => empty(Kind::InDx, 2),
        Code::Out_DX_AL => empty(Kind::OutDx, 0),
        Code::Out_DX_AX => empty(Kind::OutDx, 1),
        Code::Out_DX_EAX => empty(Kind::OutDx, 2),
        Code::In_AL_imm8 => Op { imm: port(1)?, ..empty(Kind::InImm, 0) },
        Code::In_AX_imm8 => Op { imm: port(1)?, ..empty(Kind::InImm, 1) },
        Code::In_EAX_imm8 => Op { imm: port(1)?, ..empty(Kind::InImm, 2) },
        Code::Out_imm8_AL => Op { imm: port(0)?, ..empty(Kind::OutImm, 0) },
        Code::Out_imm8_AX => Op { imm: port(0)?, ..empty(Kind::OutImm, 1) },
        Code::Out_imm8_EAX => Op { imm: port(0)?, ..empty(Kind::OutImm, 2) },
        Code::Nopw | Code::Nopd | Code::Nopq | Code::Nop_rm16 | Code::Nop_rm32 | Code::Nop_rm64 => empty(Kind::Nop, 0),
        Code::Pause | Code::Endbr64 => empty(Kind::Nop, 0),
        Code::Lfence | Code::Sfence | Code::Mfence => empty(Kind::Fence, 0),
        Code::Cld => empty(Kind::Cld, 0),
        Code::Cli => empty(Kind::Cli, 0),
        Code::Cbw => empty(Kind::SignExtendA, 1),
        Code::Cwde => empty(Kind::SignExtendA, 2),
        Code::Cdqe => empty(Kind::SignExtendA, 3),
        Code::Cwd => empty(Kind::SignExtendD, 1),
        Code::Cdq => empty(Kind::SignExtendD, 2),
        Code::Cqo => empty(Kind::SignExtendD, 3),
        _ => return None,
    })
}
