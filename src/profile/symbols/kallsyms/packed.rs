//! The tables of kallsyms in the answer of another process.
//!
//! The number of symbols (4 bytes), their addresses (8 bytes each), the number of tokens (2 bytes), each token's length (2 bytes) and
//! bytes, and then the compressed names; all numbers are little-endian.

use super::super::limits::{MAX_NAMES_BYTES, MAX_SYMBOLS};
use super::read::{MARKED, name_at};
use super::search::Tables;
use super::{Kallsyms, NAME_BYTES};

/// The most tokens, each of which is a byte of a compressed name.
const MAX_TOKENS: usize = 256;

impl Kallsyms {
    /// `None` where there are fewer names than addresses, or no addresses.
    pub(super) fn new(tokens: Vec<Vec<u8>>, names: Vec<u8>, addresses: Vec<u64>) -> Option<Self> {
        let (mut starts, mut at) = (Vec::with_capacity(addresses.len() / MARKED + 1), 0);
        for number in 0..addresses.len() {
            if number % MARKED == 0 {
                starts.push(at);
            }
            at = name_at(&names, at)?.end;
        }
        (!starts.is_empty()).then_some(Self { tables: Tables { tokens, names, starts, addresses } })
    }

    /// The tables as bytes; `None` where a number does not fit.
    pub(in super::super) fn pack(&self) -> Option<Vec<u8>> {
        let Tables { tokens, names, addresses, .. } = &self.tables;
        let mut packed = Vec::with_capacity(addresses.len() * 8 + names.len() + (64 << 10));
        packed.extend(u32::try_from(addresses.len()).ok()?.to_le_bytes());
        for address in addresses {
            packed.extend_from_slice(&address.to_le_bytes());
        }
        packed.extend(u16::try_from(tokens.len()).ok()?.to_le_bytes());
        for token in tokens {
            packed.extend(u16::try_from(token.len()).ok()?.to_le_bytes());
            packed.extend_from_slice(token);
        }
        packed.extend_from_slice(names);
        Some(packed)
    }

    /// The tables of [`Kallsyms::pack`]; `None` where the bytes are none, or where there are more than any kernel has.
    pub(in super::super) fn unpack(packed: &[u8]) -> Option<Self> {
        let (count, rest) = packed.split_first_chunk()?;
        let count = usize::try_from(u32::from_le_bytes(*count)).ok().filter(|count| *count <= MAX_SYMBOLS)?;
        let (addresses, rest) = rest.split_at_checked(count * 8)?;
        let addresses: Vec<u64> = addresses.as_chunks().0.iter().map(|address| u64::from_le_bytes(*address)).collect();
        if !addresses.is_sorted() {
            return None;
        }
        let (count, mut rest) = rest.split_first_chunk()?;
        let count = usize::from(u16::from_le_bytes(*count));
        if count > MAX_TOKENS {
            return None;
        }
        let mut tokens = Vec::with_capacity(count);
        for _ in 0..count {
            let (length, behind) = rest.split_first_chunk()?;
            let (token, behind) = behind.split_at_checked(u16::from_le_bytes(*length).into())?;
            if token.len() > NAME_BYTES {
                return None;
            }
            tokens.push(token.to_vec());
            rest = behind;
        }
        if rest.len() > MAX_NAMES_BYTES {
            return None;
        }
        Self::new(tokens, rest.to_vec(), addresses)
    }
}
