//! Arithmetic with its flags. Flags that the architecture leaves undefined are those that AMD's and Intel's processors leave: unchanged
//! by bit operations, and otherwise as said at each function; no code may depend on them.

use super::flags::{CF, Flags, OF, PF, SF, ZF};
use super::op::{Alu, Unary};

/// The bits of a width (log2 of its bytes).
#[inline]
pub(super) fn mask(width: u8) -> u64 {
    u64::MAX >> (64 - (8_u32 << (width & 3)))
}

/// The number of the sign bit of a width.
#[inline]
pub(super) fn sign(width: u8) -> u32 {
    (8 << (width & 3)) - 1
}

/// Sign-extends the lower bytes of a value.
#[inline]
pub(super) fn extend(value: u64, width: u8) -> u64 {
    let unused = 63 - sign(width);
    (value << unused).cast_signed().wrapping_shr(unused).cast_unsigned()
}

/// The result of `a` and `b`; the flags are set. Both must be zero-extended.
#[inline]
pub(super) fn alu(operation: Alu, a: u64, b: u64, width: u8, flags: &mut Flags) -> u64 {
    let (all, top) = (mask(width), sign(width));
    let (result, carries) = match operation {
        Alu::Add => added(a, b, 0, all),
        Alu::Adc => added(a, b, flags.cf().into(), all),
        Alu::Sub | Alu::Cmp => subtracted(a, b, 0, all),
        Alu::Sbb => subtracted(a, b, flags.cf().into(), all),
        // AF is undefined: 0.
        Alu::And | Alu::Test => (a & b, 0),
        Alu::Or => (a | b, 0),
        Alu::Xor => (a ^ b, 0),
    };
    flags.set_lazy(result, carries, top);
    result
}

#[inline]
fn added(a: u64, b: u64, carry: u64, all: u64) -> (u64, u64) {
    let sum = a.wrapping_add(b).wrapping_add(carry) & all;
    (sum, a & b | (a | b) & !sum)
}

#[inline]
fn subtracted(a: u64, b: u64, borrow: u64, all: u64) -> (u64, u64) {
    let difference = a.wrapping_sub(b).wrapping_sub(borrow) & all;
    (difference, !a & b | (!a | b) & difference)
}

/// PF, ZF and SF of a result.
fn of_result(result: u64, width: u8) -> u64 {
    let parity = if (result & 0xff).count_ones() & 1 == 0 { PF } else { 0 };
    let zero = if result == 0 { ZF } else { 0 };
    parity | zero | if result >> sign(width) & 1 != 0 { SF } else { 0 }
}

fn flag(flag: u64, set: bool) -> u64 {
    if set { flag } else { 0 }
}

/// The result of an operation with one operand, or with a `count`. The operand must be zero-extended.
#[inline]
pub(super) fn unary(operation: Unary, a: u64, count: u64, width: u8, flags: &mut Flags) -> u64 {
    let all = mask(width);
    match operation {
        Unary::Not => !a & all,
        Unary::Neg => {
            let (result, borrows) = subtracted(0, a, 0, all);
            flags.set_lazy(result, borrows, sign(width));
            result
        }
        Unary::Inc | Unary::Dec => {
            let carry = flags.cf();
            let (result, carries) =
                if operation == Unary::Inc { added(a, 1, 0, all) } else { subtracted(a, 1, 0, all) };
            // CF is the carry out of the highest bit, and OF is where it differs from that of the bit below: both of these carries are
            // set so that CF stays and OF is the result's.
            let top = sign(width);
            let overflow = (carries >> top ^ carries >> (top - 1)) & 1;
            let kept = u64::from(carry);
            let carries = carries & !(3 << (top - 1)) | kept << top | (kept ^ overflow) << (top - 1);
            flags.set_lazy(result, carries, top);
            result
        }
        Unary::Shl | Unary::Shr | Unary::Sar => shift(operation, a, count, width, flags),
        Unary::Rol | Unary::Ror => rotate(operation, a, count, width, flags),
    }
}

/// The number of bits by which an operand of the width is shifted (SDM vol. 2B, SAL).
fn bits(count: u64, width: u8) -> u32 {
    let most = if width == 3 { 63 } else { 31 };
    u32::try_from(count & most).unwrap_or(0)
}

/// AF is undefined: 0. OF is defined for a shift by one only: as for one, of the last bit's step.
#[inline]
fn shift(operation: Unary, a: u64, count: u64, width: u8, flags: &mut Flags) -> u64 {
    let (all, top, count) = (mask(width), sign(width), bits(count, width));
    if count == 0 {
        return a;
    }
    // The last step by itself has all flags.
    let before = count - 1;
    let (last, result, carry, overflow);
    match operation {
        Unary::Shl => {
            last = a.checked_shl(before).unwrap_or(0) & all;
            (result, carry) = (last << 1 & all, last >> top & 1 != 0);
            overflow = (result >> top & 1 != 0) != carry;
        }
        Unary::Shr => {
            last = a.checked_shr(before).unwrap_or(0);
            (result, carry) = (last >> 1, last & 1 != 0);
            overflow = last >> top & 1 != 0;
        }
        _ => {
            let signed = extend(a, width).cast_signed();
            last = (signed >> before.min(63)).cast_unsigned();
            (result, carry) = ((signed >> count.min(63)).cast_unsigned() & all, last & 1 != 0);
            overflow = false;
        }
    }
    flags.set_status(of_result(result, width) | flag(CF, carry) | flag(OF, overflow));
    result
}

/// Only CF and OF change; OF is defined for a rotation by one only: as for one, of the result.
fn rotate(operation: Unary, a: u64, count: u64, width: u8, flags: &mut Flags) -> u64 {
    let (all, top, count) = (mask(width), sign(width), bits(count, width));
    if count == 0 {
        return a;
    }
    let size = top + 1;
    let left = if operation == Unary::Rol { count % size } else { (size - count % size) % size };
    let result = if left == 0 { a } else { (a << left | a >> (size - left)) & all };
    let highest = result >> top & 1 != 0;
    let (carry, overflow) = if operation == Unary::Rol {
        (result & 1 != 0, highest != (result & 1 != 0))
    } else {
        (highest, highest != (result >> (top - 1) & 1 != 0))
    };
    flags.set(CF | OF, flag(CF, carry) | flag(OF, overflow));
    result
}

/// The lower half of a signed product. SF, ZF, AF and PF are undefined: those of the result, with AF 0.
pub(super) fn imul(a: u64, b: u64, width: u8, flags: &mut Flags) -> u64 {
    let (low, high) = multiply(a, b, width, true);
    let overflow = high != if low >> sign(width) & 1 != 0 { mask(width) } else { 0 };
    let carry = if overflow { CF | OF } else { 0 };
    flags.set_status(of_result(low, width) | carry);
    low
}

/// Both halves of a product: lower, higher. Flags as for [`imul`], from the lower half.
pub(super) fn mul(a: u64, b: u64, width: u8, signed: bool, flags: &mut Flags) -> (u64, u64) {
    let (low, high) = multiply(a, b, width, signed);
    let none = if signed && low >> sign(width) & 1 != 0 { mask(width) } else { 0 };
    let carry = if high == none { 0 } else { CF | OF };
    flags.set_status(of_result(low, width) | carry);
    (low, high)
}

#[allow(clippy::cast_possible_truncation, reason = "the halves are cut out")]
fn multiply(a: u64, b: u64, width: u8, signed: bool) -> (u64, u64) {
    let product = if signed {
        let wide = |value| i128::from(extend(value, width).cast_signed());
        (wide(a) * wide(b)).cast_unsigned()
    } else {
        u128::from(a) * u128::from(b)
    };
    (product as u64 & mask(width), (product >> (sign(width) + 1)) as u64 & mask(width))
}
