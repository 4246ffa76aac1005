//! Hostile qcow2 images for the fuzz target and for a bounded test: the input changes fields of a sound image, and then reads
//! and writes what has been accepted.

use super::image::{Content, Image};
use super::options::{Format, ImageOptions};
use imago::FormatAccess;
use std::io;
use std::path::Path;
use std::sync::PoisonError;

const CLUSTER: usize = 512;
/// Entries of the L1 table.
const L1_ENTRIES: usize = 4;
/// Bytes of the disk.
const DISK: u64 = (L1_ENTRIES * CLUSTER / 8 * CLUSTER) as u64;
// Clusters of the image.
const REFCOUNT_TABLE: usize = 1;
const REFCOUNTS: usize = 2;
const L1: usize = 3;
const L2: [usize; 2] = [4, 5];
const DATA: usize = 6;
const DATA_CLUSTERS: usize = 6;
const COMPRESSED: usize = DATA + DATA_CLUSTERS;
const CLUSTERS: usize = COMPRESSED + 1;
/// 512 bytes of `z`, deflated.
const DEFLATED: &[u8] = &[0xab, 0xaa, 0x1a, 0x5, 0x23, 0x19, 0x0, 0x0];

/// Offset and width in bytes of the header's fields.
const FIELDS: &[(usize, usize)] = &[
    (4, 4),
    (8, 8),
    (16, 4),
    (20, 4),
    (24, 8),
    (32, 4),
    (36, 4),
    (40, 8),
    (48, 8),
    (56, 4),
    (60, 4),
    (64, 8),
    (72, 8),
    (80, 8),
    (88, 8),
    (96, 4),
    (100, 4),
    (104, 4),
    (108, 4),
];

/// Reads numbers from the input; zeros after its end.
struct Source<'a>(&'a [u8]);

impl Source<'_> {
    fn byte(&mut self) -> u8 {
        let Some((first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        *first
    }

    fn index(&mut self, end: usize) -> usize {
        usize::from(self.byte()) % end
    }
}

fn put(bytes: &mut [u8], at: usize, value: u64, width: usize) {
    if let Some(field) = bytes.get_mut(at..at + width) {
        field.copy_from_slice(&value.to_be_bytes()[8 - width..]);
    }
}

/// Sets a reference count of 2^`order` bits.
fn put_refcount(bytes: &mut [u8], index: usize, value: u64, order: u32) {
    let bits = 1_usize << order;
    if bits >= 8 {
        put(bytes, REFCOUNTS * CLUSTER + index * (bits / 8), value, bits / 8);
    } else if let Some(byte) = bytes.get_mut(REFCOUNTS * CLUSTER + index * bits / 8) {
        let (shift, mask) = (index * bits % 8, (1_u8 << bits) - 1);
        *byte = *byte & !(mask << shift) | (value.to_le_bytes()[0] & mask) << shift;
    }
}

/// Returns a sound image: two L2 tables with data at their first clusters, and a compressed cluster.
fn sound(order: u32, version: u64) -> Vec<u8> {
    let mut bytes = vec![0; CLUSTERS * CLUSTER];
    bytes[..4].copy_from_slice(b"QFI\xfb");
    let order = if version == 2 { 4 } else { order };
    let cluster = |index: usize| (index * CLUSTER) as u64;
    for (at, value, width) in [
        (4, version, 4),
        (20, 9, 4),
        (24, DISK, 8),
        (36, L1_ENTRIES as u64, 4),
        (40, cluster(L1), 8),
        (48, cluster(REFCOUNT_TABLE), 8),
        (56, 1, 4),
        (REFCOUNT_TABLE * CLUSTER, cluster(REFCOUNTS), 8),
    ] {
        put(&mut bytes, at, value, width);
    }
    if version == 3 {
        put(&mut bytes, 96, order.into(), 4);
        put(&mut bytes, 100, 104, 4);
    }
    for index in 0..CLUSTERS {
        put_refcount(&mut bytes, index, 1, order);
    }
    for (index, table) in L2.into_iter().enumerate() {
        put(&mut bytes, L1 * CLUSTER + 8 * index, 1 << 63 | cluster(table), 8);
        for entry in 0..DATA_CLUSTERS / 2 {
            let data = cluster(DATA + index * DATA_CLUSTERS / 2 + entry);
            put(&mut bytes, table * CLUSTER + 8 * entry, 1 << 63 | data, 8);
        }
    }
    put(&mut bytes, L2[0] * CLUSTER + 8 * 9, 1 << 62 | cluster(COMPRESSED), 8);
    bytes[COMPRESSED * CLUSTER..][..DEFLATED.len()].copy_from_slice(DEFLATED);
    bytes
}

/// Changes a field, an entry of a table, a reference count or a byte.
fn change(bytes: &mut [u8], source: &mut Source<'_>, order: u32) {
    let (class, index, high, low) = (source.byte(), source.byte(), source.byte(), source.byte());
    let value = u64::from(high) << 8 | u64::from(low);
    // A cluster of the image, its neighbours, and flags.
    let entry =
        u64::from(high & 0xc0) << 56 | u64::from(high & 0x20) << 4 | u64::from(high & 1) | (u64::from(low) << 9);
    let index = usize::from(index);
    match class % 8 {
        0 | 1 => {
            let (at, width) = FIELDS[index % FIELDS.len()];
            let value = match class >> 6 {
                0 => value,
                1 => u64::from(low) << 9,
                2 => u64::MAX - value,
                _ => 1 << (low % 64),
            };
            put(bytes, at, value, width);
        }
        2 => put(bytes, REFCOUNT_TABLE * CLUSTER + index % 64 * 8, entry, 8),
        3 => put(bytes, L1 * CLUSTER + index % L1_ENTRIES * 8, entry, 8),
        4 | 5 => put(bytes, L2[index / 64 % 2] * CLUSTER + index % 64 * 8, entry, 8),
        6 => put_refcount(bytes, index, value, order),
        _ => put(bytes, (usize::from(class >> 3) << 8 | index) % bytes.len(), low.into(), 1),
    }
}

/// Makes the image of the input, and does the requests of the input where it is accepted. An image that was accepted reads as it
/// was written, does not grow beyond its disk and its tables, and is accepted again. Returns true if it was accepted. The image is
/// a file in `folder`.
///
/// # Errors
/// Returns an error where the host's file system fails.
///
/// # Panics
/// Panics where the image is not what it should be.
pub fn drive(bytes: &[u8], folder: &Path) -> io::Result<bool> {
    let mut source = Source(bytes);
    let kind = source.byte();
    let order = [4, 0, 3, 6][usize::from(kind & 3)];
    let mut image = sound(order, if kind & 4 == 0 { 3 } else { 2 });
    for _ in 0..source.index(16) {
        change(&mut image, &mut source, if kind & 4 == 0 { order } else { 4 });
    }
    let cut = usize::from(source.byte());
    image.truncate(image.len().saturating_sub(cut * cut));
    let path = folder.join("image.qcow2");
    std::fs::write(&path, &image)?;
    let format = if kind & 8 == 0 { Format::DetectedQcow2 } else { Format::Qcow2 };
    let options = ImageOptions { path, format, read_only: kind & 0xf0 == 0xf0, direct: false, data_file: None };
    let Ok(opened) = Image::open(&options) else {
        assert!(std::fs::read(&options.path)? == image, "a refused image is written");
        return Ok(false);
    };
    let grown = opened.bytes() + image.len() as u64 + 64 * CLUSTER as u64;
    while !source.0.is_empty() {
        request(&opened, &mut source);
    }
    drop(opened);
    if format == Format::DetectedQcow2 {
        assert!(std::fs::metadata(&options.path)?.len() <= grown, "the file grows beyond its disk");
    }
    let again = Image::open(&options).err();
    assert!(again.is_none(), "accepted once, and then not: {again:?}");
    Ok(true)
}

fn request(image: &Image, source: &mut Source<'_>) {
    let Content::Qcow2(lock) = &image.content else { return };
    let (kind, sector, sectors) = (source.byte(), u64::from(source.byte()), usize::from(source.byte() % 16) + 1);
    let (at, bytes) = (sector * 512, sectors * 512);
    if at + bytes as u64 > image.bytes() {
        return;
    }
    let length = bytes as u64;
    let done = match kind % 5 {
        0 => lock.write().unwrap_or_else(PoisonError::into_inner).discard_to_any(at, length),
        1 => lock.read().unwrap_or_else(PoisonError::into_inner).write_zeroes(at, length),
        2 => lock.read().unwrap_or_else(PoisonError::into_inner).flush(),
        _ => return write(&lock.read().unwrap_or_else(PoisonError::into_inner), at, &vec![kind; bytes]),
    };
    // An image of version 2 has no clusters of zeroes: an error is right.
    drop(done);
}

/// Writes, and reads what was written.
fn write(access: &FormatAccess<imago::file::File>, at: u64, data: &[u8]) {
    if access.write(data, at).is_ok() {
        let mut seen = vec![0; data.len()];
        assert!(
            access.read(seen.as_mut_slice(), at).is_ok_and(|()| seen == data),
            "what is read is not what was written"
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn sound_images_are_accepted_and_stay_sound() {
        let folder = tempfile::tempdir().expect("a folder");
        for kind in 0..16 {
            for cut in [0, 1, 22] {
                let requests: Vec<u8> = (0..=255_u8).flat_map(|at| [at, at.wrapping_mul(7), at]).collect();
                let input = [vec![kind, 0, cut], requests].concat();
                assert!(drive(&input, folder.path()).expect("a file system"), "{kind} {cut}");
            }
        }
    }

    #[test]
    fn the_corpus_is_refused_or_stays_sound() {
        let folder = tempfile::tempdir().expect("a folder");
        let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fuzz/corpus/qcow2");
        for entry in std::fs::read_dir(corpus).expect("the corpus").flatten() {
            let accepted =
                drive(&std::fs::read(entry.path()).expect("readable"), folder.path()).expect("a file system");
            let name = entry.file_name();
            let sound = ["sound", "shared"].iter().any(|start| name.to_string_lossy().starts_with(start));
            assert!(accepted || !sound, "{}", name.display());
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]
        #[test]
        fn hostile_images_are_refused_or_stay_sound(
            kind in any::<u8>(),
            changes in proptest::collection::vec(any::<[u8; 4]>(), 0..6),
            cut in prop_oneof![Just(0), any::<u8>()],
            requests in proptest::collection::vec(any::<[u8; 3]>(), 0..40),
        ) {
            let folder = tempfile::tempdir().expect("a folder");
            let input = [vec![kind, u8::try_from(changes.len()).expect("few")], changes.concat(), vec![cut], requests.concat()].concat();
            drive(&input, folder.path()).expect("a file system");
        }
    }
}
