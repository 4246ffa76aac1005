//! The internal form of an instruction: of a fixed size, with its operands worked out.

/// The number of the register that is always 0: the base or index of an address that has none.
pub(super) const ZERO: u8 = 16;
/// Added to the number of RAX, RCX, RDX or RBX for AH, CH, DH or BH.
pub(super) const HIGH: u8 = 32;

/// Segment bases by number.
pub(super) const NO_SEGMENT: u8 = 0;
pub(super) const FS: u8 = 1;
pub(super) const GS: u8 = 2;

/// The operation of an instruction with a destination and a source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Alu {
    Add,
    Or,
    Adc,
    Sbb,
    And,
    Sub,
    Xor,
    Cmp,
    Test,
}

impl Alu {
    /// Returns true for an operation that sets flags only.
    pub(super) const fn only_compares(self) -> bool {
        matches!(self, Self::Cmp | Self::Test)
    }
}

/// Returns true if an address is canonical with four levels of page tables (SDM vol. 1 §3.3.7.1). A jump to one that is not faults
/// before it; with five levels some of those that are refused here are canonical.
pub(super) const fn is_canonical(address: u64) -> bool {
    (address.cast_signed() >> 47).wrapping_add(1).cast_unsigned() <= 1
}

/// The operation of an instruction with one operand, or with one operand and a count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Unary {
    Inc,
    Dec,
    Neg,
    Not,
    Shl,
    Shr,
    Sar,
    Rol,
    Ror,
}

/// What is done with the selected bit, which goes to CF first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum BitOp {
    Test,
    Set,
    Reset,
    Complement,
}

/// Where operands are: destination first. `R` a register, `M` memory, `I` an immediate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Form {
    Rr,
    Ri,
    Rm,
    Mr,
    Mi,
}

/// An instruction's kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    MovRr,
    MovRi,
    Load,
    Store,
    StoreImm,
    /// The source's width is in the field.
    MovzxR(u8),
    MovzxM(u8),
    MovsxR(u8),
    MovsxM(u8),
    Lea,
    XchgRr,
    /// With memory both are atomic, with or without LOCK.
    XchgMr,
    CmpxchgMr,
    XaddRr,
    XaddMr,
    Alu(Alu, Form),
    UnaryR(Unary),
    UnaryM(Unary),
    /// A shift or rotate by CL.
    ShiftClR(Unary),
    ShiftClM(Unary),
    /// IMUL with two or three operands; the second factor is the destination or the immediate.
    ImulR,
    ImulM,
    ImulRi,
    ImulMi,
    /// MUL and IMUL of RAX (signed: true).
    MulR(bool),
    BitR(BitOp, bool),
    BitM(BitOp, bool),
    Bswap,
    PushR,
    PushI,
    PushM,
    Pop,
    Leave,
    Pushf,
    /// CBW, CWDE, CDQE.
    SignExtendA,
    /// CWD, CDQ, CQO.
    SignExtendD,
    SetccR(u8),
    SetccM(u8),
    CmovR(u8),
    CmovM(u8),
    /// A conditional jump; the immediate is the target, the displacement the address behind it.
    Jcc(u8),
    Jmp,
    JmpR,
    JmpM,
    /// The immediate is the target, the displacement the return address.
    Call,
    /// The immediate is the return address.
    CallR,
    CallM,
    Ret,
    /// The port is in DX, or the immediate.
    InDx,
    InImm,
    OutDx,
    OutImm,
    Nop,
    Fence,
    Cld,
    Cli,
}

impl Kind {
    /// Returns true if no instruction after this one can be in the same block.
    pub(super) fn ends_block(self) -> bool {
        matches!(
            self,
            Self::Jcc(_) | Self::Jmp | Self::JmpR | Self::JmpM | Self::Call | Self::CallR | Self::CallM | Self::Ret
        )
    }
}

/// An instruction.
#[derive(Clone, Copy, Debug)]
pub(super) struct Op {
    pub(super) kind: Kind,
    /// The operand size: log2 of its bytes.
    pub(super) width: u8,
    pub(super) dst: u8,
    pub(super) src: u8,
    pub(super) base: u8,
    pub(super) index: u8,
    /// How far the index is shifted left.
    pub(super) scale: u8,
    /// The address has an index or a segment.
    pub(super) indexed: bool,
    /// It has a LOCK prefix, and its operand in memory is changed in one step for all processors.
    pub(super) locked: bool,
    pub(super) segment: u8,
    /// The offset of the next instruction from the block's start.
    pub(super) next: u8,
    /// The immediate, sign-extended; for a direct jump or call its target.
    pub(super) imm: u64,
    /// The displacement of the address; with a RIP-relative one the address itself.
    pub(super) disp: u64,
}

impl Op {
    /// Returns true if this is port I/O of the direction and width.
    pub(super) fn is_port_io(&self, input: bool, width: u8) -> bool {
        let kinds = if input { [Kind::InDx, Kind::InImm] } else { [Kind::OutDx, Kind::OutImm] };
        kinds.contains(&self.kind) && self.width == width
    }
}
