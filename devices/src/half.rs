//! 64-bit registers that are accessed as two 32-bit halves.

/// One half of a 64-bit register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Half {
    /// Bits 0 to 31.
    Low,
    /// Bits 32 to 63.
    High,
}

impl Half {
    /// Returns the half that a selector register (virtio 1.3 §4.1.4.3, §4.2.2) chooses; there are only halves 0 and 1.
    pub(crate) fn from_selector(selector: u32) -> Option<Self> {
        match selector {
            0 => Some(Self::Low),
            1 => Some(Self::High),
            _ => None,
        }
    }

    /// Returns this half of `register`.
    pub(crate) fn get(self, register: u64) -> u32 {
        let half = match self {
            Self::Low => register & 0xffff_ffff,
            Self::High => register >> 32,
        };
        u32::try_from(half).unwrap_or(0)
    }

    /// Replaces this half of `register`; the other half is unchanged.
    pub(crate) fn set(self, register: &mut u64, value: u32) {
        *register = match self {
            Self::Low => *register >> 32 << 32 | u64::from(value),
            Self::High => *register & 0xffff_ffff | u64::from(value) << 32,
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_half_leaves_the_other_alone() {
        let mut register = 0x1111_2222_3333_4444;
        Half::Low.set(&mut register, 0xaaaa_bbbb);
        assert_eq!(register, 0x1111_2222_aaaa_bbbb);
        Half::High.set(&mut register, 0xcccc_dddd);
        assert_eq!(register, 0xcccc_dddd_aaaa_bbbb);
        assert_eq!(
            [0, 1].map(|selector| Half::from_selector(selector).map(|half| half.get(register))),
            [Some(0xaaaa_bbbb), Some(0xcccc_dddd)]
        );
        assert_eq!(Half::from_selector(2), None);
    }
}
