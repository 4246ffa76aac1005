//! Where what is in a kernel's file.

use hwvmm_arch::boot::elf::ElfClass;

/// A part of a file that has an address in the running kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Mapped {
    /// The first byte in the file.
    pub(super) offset: u64,
    /// The number of bytes in the file.
    pub(super) file_bytes: u64,
    /// The virtual address of the first byte.
    pub(super) address: u64,
    /// The number of bytes in memory.
    pub(super) memory_bytes: u64,
}

/// The layout of a kernel's file.
#[derive(Clone, Debug)]
pub(super) struct ImageMap {
    /// The class of the ELF file, which gives the size of a pointer.
    pub(super) class: ElfClass,
    /// The offset of the read-only data, in which the tables are; 0 where it is unknown.
    pub(super) read_only_data: u64,
    /// The segments; none where the file is no ELF file.
    pub(super) segments: Vec<Mapped>,
}

impl Default for ImageMap {
    fn default() -> Self {
        Self { class: ElfClass::Elf64, read_only_data: 0, segments: Vec::new() }
    }
}

impl ImageMap {
    /// The virtual address of the byte at `offset` of the file.
    pub(super) fn address(&self, offset: u64) -> Option<u64> {
        let inside = |part: &&Mapped| offset.checked_sub(part.offset).is_some_and(|at| at < part.file_bytes);
        let part = self.segments.iter().find(inside)?;
        part.address.checked_add(offset - part.offset)
    }

    /// Returns how many of `addresses`, which are sorted, lie in a segment, or just behind one, as `_end` does.
    pub(super) fn count_inside(&self, addresses: &[u64]) -> usize {
        let mut segments: Vec<_> = self.segments.iter().map(|part| (part.address, part.memory_bytes)).collect();
        segments.sort_unstable();
        let (mut count, mut done) = (0, 0);
        for (start, bytes) in segments {
            let first = addresses.partition_point(|address| *address < start).max(done);
            done = addresses.partition_point(|address| *address <= start.saturating_add(bytes)).max(first);
            count += done - first;
        }
        count
    }

    /// The size of a pointer in bytes.
    pub(super) fn pointer(&self) -> usize {
        match self.class {
            ElfClass::Elf32 => 4,
            ElfClass::Elf64 => 8,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn addresses_are_counted_once(
            segments in proptest::collection::vec((0..100_u64, 0..30_u64), 0..5),
            mut addresses in proptest::collection::vec(0..150_u64, 0..60),
        ) {
            addresses.sort_unstable();
            let part = |(address, memory_bytes)| Mapped { offset: 0, file_bytes: 0, address, memory_bytes };
            let map = ImageMap { segments: segments.iter().copied().map(part).collect(), ..ImageMap::default() };
            let inside = |at: &&u64| segments.iter().any(|(start, bytes)| (*start..=start + bytes).contains(*at));
            prop_assert_eq!(map.count_inside(&addresses), addresses.iter().filter(inside).count());
        }
    }
}
