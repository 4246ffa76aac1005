//! The addresses of kallsyms, in each of the forms that Linux has had.

use super::super::image_map::ImageMap;
use super::read::{align, number_at};

/// Where 64-bit kernels are linked to, and where 32-bit ones are (CONFIG_PAGE_OFFSET at its lowest).
const KERNEL_BASE_64: u64 = 0xffff_8000_0000_0000;
const KERNEL_BASE_32: u64 = 0x4000_0000;

/// A table of addresses, in the image that it is read from.
#[derive(Clone, Copy, Debug)]
enum Form {
    /// Offsets of 4 bytes from a base.
    FromBase { offsets_at: usize, base_at: usize },
    /// Offsets of 4 bytes, each from its own place.
    FromPlace { offsets_at: usize },
    /// Virtual addresses, each of the size of a pointer.
    Absolute { at: usize },
}

/// Reads the addresses of `count` symbols from a part of the file.
pub(super) struct Reader<'a> {
    pub(super) image: Vec<u8>,
    /// Where the image starts in the file.
    pub(super) start: u64,
    pub(super) map: &'a ImageMap,
    pub(super) count: usize,
}

impl Reader<'_> {
    /// The addresses at the end of the image, before the count of the names: up to Linux 6.4.
    pub(super) fn before(&self) -> Option<Vec<u64>> {
        let (pointer, count_at) = (self.map.pointer(), self.image.len());
        let from_base = || {
            let base_at = count_at.checked_sub(pointer)?;
            Some(Form::FromBase { offsets_at: base_at.checked_sub(align(4 * self.count, pointer))?, base_at })
        };
        let absolute = || Some(Form::Absolute { at: count_at.checked_sub(pointer * self.count)? });
        [from_base(), absolute()].into_iter().flatten().find_map(|form| self.read(form))
    }

    /// The addresses behind `end`, the end of the tokens' index: since Linux 6.5.
    pub(super) fn behind(&self, end: usize) -> Option<Vec<u64>> {
        let pointer = self.map.pointer();
        let aligned = align(end, pointer);
        let forms = [
            Form::FromBase { offsets_at: aligned, base_at: aligned + align(4 * self.count, pointer) },
            Form::FromPlace { offsets_at: align(end, 4) },
            Form::FromPlace { offsets_at: align(end, 8) },
            Form::Absolute { at: aligned },
        ];
        forms.into_iter().find_map(|form| self.read(form))
    }

    fn read(&self, form: Form) -> Option<Vec<u64>> {
        let addresses = match form {
            Form::FromBase { offsets_at, base_at } => self.with_base(offsets_at, base_at)?,
            Form::FromPlace { offsets_at } => self.by_place(offsets_at)?,
            Form::Absolute { at } => {
                let pointer = self.map.pointer();
                (0..self.count)
                    .map(|number| number_at(&self.image, at + pointer * number, pointer))
                    .collect::<Option<_>>()?
            }
        };
        self.are_a_kernels(&addresses).then_some(addresses)
    }

    fn offsets(&self, at: usize) -> Option<Vec<u32>> {
        let bytes = self.image.get(at..at.checked_add(self.count.checked_mul(4)?)?)?;
        Some(bytes.as_chunks().0.iter().map(|offset| u32::from_le_bytes(*offset)).collect())
    }

    fn with_base(&self, offsets_at: usize, base_at: usize) -> Option<Vec<u64>> {
        let base = number_at(&self.image, base_at, self.map.pointer()).filter(|base| *base >= self.kernel_base())?;
        let offsets = self.offsets(offsets_at)?;
        // With CONFIG_KALLSYMS_ABSOLUTE_PERCPU (until Linux 6.14), what is not negative is an address by itself.
        let absolute_percpu = self.map.pointer() == 8 && offsets.last().is_some_and(|last| last.cast_signed() < 0);
        let address = |offset: &u32| match (absolute_percpu, offset.cast_signed()) {
            (true, negative @ i32::MIN..0) => base.wrapping_sub(1).wrapping_sub(i64::from(negative).cast_unsigned()),
            (true, _) => u64::from(*offset),
            (false, _) => base.wrapping_add(u64::from(*offset)),
        };
        Some(offsets.iter().map(address).collect())
    }

    fn by_place(&self, offsets_at: usize) -> Option<Vec<u64>> {
        let place = self.map.address(self.start + offsets_at as u64)?;
        let mask = if self.map.pointer() == 8 { u64::MAX } else { u32::MAX.into() };
        let offsets = self.offsets(offsets_at)?;
        let address = |(number, offset): (u64, &u32)| {
            place.wrapping_add(4 * number).wrapping_add(i64::from(offset.cast_signed()).cast_unsigned()) & mask
        };
        Some((0..).zip(&offsets).map(address).collect())
    }

    fn kernel_base(&self) -> u64 {
        if self.map.pointer() == 8 { KERNEL_BASE_64 } else { KERNEL_BASE_32 }
    }

    /// Returns true if the addresses are sorted, and more than half of them lie in the kernel. Those that are left are of
    /// per-CPU data, and of what the kernel finds somewhere else.
    fn are_a_kernels(&self, addresses: &[u64]) -> bool {
        if !addresses.is_sorted() {
            return false;
        }
        // Since they are sorted, those of a segment need not be looked at one by one.
        let of_kernel = &addresses[addresses.partition_point(|address| *address < self.kernel_base())..];
        let inside = if self.map.segments.is_empty() { of_kernel.len() } else { self.map.count_inside(of_kernel) };
        2 * inside > addresses.len()
    }
}
