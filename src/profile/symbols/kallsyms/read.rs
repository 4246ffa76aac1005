//! Reads of numbers and compressed names.

use std::ops::Range;

/// Names between two markers.
pub(super) const MARKED: usize = 256;
/// More bytes than any name has, compressed or expanded (Linux: KSYM_NAME_LEN, 512).
pub(super) const NAME_BYTES: usize = 1024;

pub(super) fn align(offset: usize, to: usize) -> usize {
    offset.next_multiple_of(to)
}

pub(super) fn u16_at(image: &[u8], at: usize) -> Option<usize> {
    Some(usize::from(u16::from_le_bytes(image.get(at..at.checked_add(2)?)?.try_into().ok()?)))
}

pub(super) fn u32_at(image: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(image.get(at..at.checked_add(4)?)?.try_into().ok()?))
}

pub(super) fn u64_at(image: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(image.get(at..at.checked_add(8)?)?.try_into().ok()?))
}

/// A number of `bytes` bytes, 4 or 8.
pub(super) fn number_at(image: &[u8], at: usize, bytes: usize) -> Option<u64> {
    if bytes == 4 { u32_at(image, at).map(u64::from) } else { u64_at(image, at) }
}

/// The compressed name at `at`: where its tokens are. Since Linux 6.1 a length of 128 and more has two bytes.
pub(super) fn name_at(image: &[u8], at: usize) -> Option<Range<usize>> {
    let first = usize::from(*image.get(at)?);
    let (start, length) = if first & 0x80 != 0 {
        (at + 2, first & 0x7f | usize::from(*image.get(at + 1)?) << 7)
    } else {
        (at + 1, first)
    };
    ((1..=NAME_BYTES).contains(&length) && start + length <= image.len()).then_some(start..start + length)
}

pub(super) fn expand(tokens: &[Vec<u8>], name: &[u8]) -> Vec<u8> {
    name.iter().flat_map(|token| tokens.get(usize::from(*token)).map_or(&[][..], Vec::as_slice)).copied().collect()
}
