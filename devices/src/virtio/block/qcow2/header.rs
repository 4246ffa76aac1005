//! The header of a qcow2 image (QEMU's docs/interop/qcow2.txt).

use super::super::request::SECTOR_BYTES;
use super::error::{FeatureBit, Qcow2Error};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

const MAGIC: u64 = 0x5146_49fb;
/// Length of the header of version 2 in bytes; the extensions begin there.
const V2_BYTES: u64 = 72;
/// The shortest header of version 3 in bytes.
const V3_BYTES: u64 = 104;
/// The largest L1 table in entries (32 MiB), as in QEMU and imago.
const MAX_L1_ENTRIES: u64 = 4 << 20;
/// The largest refcount table in bytes, as in QEMU.
const MAX_REFCOUNT_TABLE_BYTES: u64 = 8 << 20;
/// The most snapshots, as in QEMU.
const MAX_SNAPSHOTS: u64 = 65_536;
/// The longest name of a backing file in bytes.
const MAX_BACKING_NAME_BYTES: u64 = 1023;

// Types of header extensions.
const EXTENSION_END: u64 = 0;
const EXTENSION_BACKING_FORMAT: u64 = 0xe279_2aca;
const EXTENSION_DATA_FILE: u64 = 0x4441_5441;
const EXTENSION_FEATURE_NAMES: u64 = 0x6803_f857;
/// Size in bytes of an entry of the table of feature names.
const FEATURE_NAME_BYTES: u64 = 48;

/// The bit of `incompatible_features` of an external data file.
const EXTERNAL_DATA_FILE: u32 = 2;

/// The image that has what this one does not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::virtio::block) struct Backing {
    /// The name in the header.
    pub(in crate::virtio::block) name: Vec<u8>,
    /// The format in the header.
    pub(in crate::virtio::block) format: Option<Vec<u8>>,
}

/// Where the data of an image is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::virtio::block) enum DataPlace {
    /// In clusters of the image file itself.
    Image,
    /// In another file, which the header may name.
    File(Option<Vec<u8>>),
}

/// What a checked header says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::virtio::block) struct Header {
    pub(super) version: u64,
    pub(super) cluster_bits: u32,
    pub(super) l1_offset: u64,
    pub(super) l1_entries: u64,
    pub(super) refcount_table_offset: u64,
    pub(super) refcount_table_clusters: u64,
    /// Binary logarithm of the bits of a reference count, 0 to 6.
    pub(super) refcount_order: u32,
    pub(in crate::virtio::block) backing: Option<Backing>,
    pub(in crate::virtio::block) data: DataPlace,
}

/// Big-endian numbers of the first cluster.
struct Bytes<'a>(&'a [u8]);

impl Bytes<'_> {
    fn number(&self, at: u64, bytes: usize) -> u64 {
        self.range(at, bytes as u64).map_or(0, |part| part.iter().fold(0, |value, byte| value << 8 | u64::from(*byte)))
    }

    fn range(&self, at: u64, bytes: u64) -> Option<&[u8]> {
        let end = usize::try_from(at.checked_add(bytes)?).ok()?;
        self.0.get(usize::try_from(at).ok()?..end)
    }
}

fn field(field: &'static str, value: u64, valid: bool, rule: &'static str) -> Result<u64, Qcow2Error> {
    if valid { Ok(value) } else { Err(Qcow2Error::Field { field, value, rule }) }
}

/// Reads `buffer.len()` bytes at `at`; zeroes behind the end of the file, as imago does.
pub(super) fn read(file: &File, at: u64, buffer: &mut [u8]) -> Result<(), Qcow2Error> {
    let bytes = buffer.len();
    let mut done = 0;
    while done < bytes {
        match file.read_at(&mut buffer[done..], at + done as u64) {
            Ok(0) => break,
            Ok(count) => done += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(source) => return Err(Qcow2Error::Read { at, bytes, source }),
        }
    }
    buffer[done..].fill(0);
    Ok(())
}

impl Header {
    /// Reads the header of `file`, which has `file_bytes` bytes, and checks each field.
    pub(in crate::virtio::block) fn read(file: &File, file_bytes: u64) -> Result<Self, Qcow2Error> {
        let mut fixed = [0; 104];
        read(file, 0, &mut fixed)?;
        let bytes = Bytes(&fixed);
        field("magic", bytes.number(0, 4), bytes.number(0, 4) == MAGIC && file_bytes >= V2_BYTES, "0x514649fb")?;
        // Before any field whose place depends on it.
        version(&bytes)?;
        let cluster_bits = bytes.number(20, 4);
        field("cluster_bits", cluster_bits, (9..=21).contains(&cluster_bits), "from 9 to 21")?;
        let mut cluster = vec![0; usize::try_from(file_bytes.min(1 << cluster_bits)).unwrap_or(0)];
        read(file, 0, &mut cluster)?;
        Self::parse(&cluster, file_bytes)
    }

    /// Checks the header in the first cluster of a file of `file_bytes` bytes; the cluster may be cut by the file's end.
    fn parse(cluster: &[u8], file_bytes: u64) -> Result<Self, Qcow2Error> {
        let bytes = Bytes(cluster);
        let version = version(&bytes)?;
        let cluster_bits = bytes.number(20, 4);
        field("cluster_bits", cluster_bits, (9..=21).contains(&cluster_bits), "from 9 to 21")?;
        let cluster_bytes = 1_u64 << cluster_bits;
        if bytes.number(32, 4) != 0 {
            return Err(Qcow2Error::Encrypted(u32::try_from(bytes.number(32, 4)).unwrap_or(u32::MAX)));
        }
        let (header_bytes, refcount_order) =
            if version == 3 { version_3(&bytes, cluster_bytes)? } else { (V2_BYTES, 4) };
        let incompatible = if version == 3 { bytes.number(72, 8) } else { 0 };
        let external_data = incompatible & (1 << EXTERNAL_DATA_FILE) != 0;
        let other = incompatible & !(1 << EXTERNAL_DATA_FILE);
        if other != 0 {
            return Err(Qcow2Error::Feature(FeatureBit(other.trailing_zeros())));
        }
        let l1_entries =
            field("l1_size", bytes.number(36, 4), bytes.number(36, 4) <= MAX_L1_ENTRIES, "at most 0x400000")?;
        let size = bytes.number(24, 8);
        let covered = u128::from(l1_entries) << (2 * cluster_bits - 3);
        field("size", size, u128::from(size) <= covered, "at most what l1_size entries of the L1 table cover")?;
        // Before imago opens the image, which clears bits in the header.
        field("size", size, size.is_multiple_of(SECTOR_BYTES), "a multiple of 0x200")?;
        let in_file = |name, at: u64, bytes: u64| {
            field(name, at, at.is_multiple_of(cluster_bytes), "a multiple of the cluster size")?;
            // The file may end within the last cluster.
            let inside = at.checked_add(bytes).is_some_and(|end| end <= file_bytes.next_multiple_of(cluster_bytes));
            field(name, at, inside, "an offset from which the table is inside the file")
        };
        let l1_offset = in_file("l1_table_offset", bytes.number(40, 8), l1_entries * 8)?;
        let clusters = bytes.number(56, 4);
        let few = (1..=MAX_REFCOUNT_TABLE_BYTES >> cluster_bits).contains(&clusters);
        field("refcount_table_clusters", clusters, few, "from 1 to 8 MiB in clusters")?;
        let refcount_table_offset = in_file("refcount_table_offset", bytes.number(48, 8), clusters << cluster_bits)?;
        let snapshots =
            field("nb_snapshots", bytes.number(60, 4), bytes.number(60, 4) <= MAX_SNAPSHOTS, "at most 0x10000")?;
        if snapshots > 0 {
            in_file("snapshots_offset", bytes.number(64, 8), 1)?;
        }
        // As imago, which reads those of version 3 to their end mark. In version 2, which it does not read, there may be none.
        let end = match bytes.number(8, 8) {
            backing if version == 2 && backing != 0 => backing.min(cluster_bytes),
            _ => cluster_bytes,
        };
        let extensions = Extensions::parse(&bytes, header_bytes, end)?;
        let backing = backing_name(&bytes, cluster_bytes)?;
        Ok(Self {
            version,
            cluster_bits: u32::try_from(cluster_bits).unwrap_or(0),
            l1_offset,
            l1_entries,
            refcount_table_offset,
            refcount_table_clusters: clusters,
            refcount_order,
            backing: backing.map(|name| Backing { name, format: extensions.backing_format }),
            data: if external_data { DataPlace::File(extensions.data_file) } else { DataPlace::Image },
        })
    }

    pub(super) fn cluster_bytes(&self) -> u64 {
        1 << self.cluster_bits
    }
}

/// Returns the version of the format, which is 2 or 3.
fn version(bytes: &Bytes<'_>) -> Result<u64, Qcow2Error> {
    field("version", bytes.number(4, 4), [2, 3].contains(&bytes.number(4, 4)), "2 or 3")
}

/// Checks the fields of version 3. Returns the length of the header in bytes and `refcount_order`.
fn version_3(bytes: &Bytes<'_>, cluster_bytes: u64) -> Result<(u64, u32), Qcow2Error> {
    let length = bytes.number(100, 4);
    let valid = length >= V3_BYTES && length <= cluster_bytes && length.is_multiple_of(8);
    field("header_length", length, valid, "a multiple of 8 from 104 to the cluster size")?;
    let order = field("refcount_order", bytes.number(96, 4), bytes.number(96, 4) <= 6, "at most 6")?;
    if length > V3_BYTES {
        field(
            "compression_type",
            bytes.number(V3_BYTES, 1),
            bytes.number(V3_BYTES, 1) == 0,
            "0 without its feature bit",
        )?;
    }
    Ok((length, u32::try_from(order).unwrap_or(0)))
}

/// Returns the name of the backing file; `None` where there is none.
fn backing_name(bytes: &Bytes<'_>, cluster_bytes: u64) -> Result<Option<Vec<u8>>, Qcow2Error> {
    let (at, length) = (bytes.number(8, 8), bytes.number(16, 4));
    if at == 0 {
        return Ok(None);
    }
    field("backing_file_size", length, length <= MAX_BACKING_NAME_BYTES, "at most 1023")?;
    let inside = at.checked_add(length).is_some_and(|end| end <= cluster_bytes);
    field("backing_file_offset", at, inside, "an offset from which the name is inside the first cluster")?;
    let name = bytes.range(at, length).map(<[u8]>::to_vec);
    field("backing_file_offset", at, name.is_some(), "an offset from which the name is inside the file")?;
    Ok(name.filter(|name| !name.is_empty()))
}

/// What the extensions of the header say.
#[derive(Default)]
struct Extensions {
    backing_format: Option<Vec<u8>>,
    data_file: Option<Vec<u8>>,
}

impl Extensions {
    /// Reads the extensions from `at` to their end mark, or to `end`.
    fn parse(bytes: &Bytes<'_>, mut at: u64, end: u64) -> Result<Self, Qcow2Error> {
        let mut extensions = Self::default();
        // A file that ends within the first cluster has zeroes there: an end mark.
        while at + 8 <= end {
            let (kind, length) = (bytes.number(at, 4), bytes.number(at + 4, 4));
            at += 8;
            let inside = length <= end.saturating_sub(at);
            field("the length of a header extension", length, inside, "one that ends inside the first cluster")?;
            let data = bytes.range(at, length).unwrap_or_default();
            match kind {
                EXTENSION_END => break,
                EXTENSION_BACKING_FORMAT => extensions.backing_format = Some(data.to_vec()),
                EXTENSION_DATA_FILE => extensions.data_file = Some(data.to_vec()),
                // imago panics at an entry of one byte.
                EXTENSION_FEATURE_NAMES => {
                    let whole = length.is_multiple_of(FEATURE_NAME_BYTES);
                    field("the length of the feature name table", length, whole, "a multiple of 48")?;
                }
                _ => {}
            }
            at += length.next_multiple_of(8);
        }
        Ok(extensions)
    }
}
