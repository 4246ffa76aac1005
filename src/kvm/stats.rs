//! KVM's binary statistics (KVM API 4.133, KVM_GET_STATS_FD): the kernel's counters of a machine and of a vCPU.

use super::error::{KvmError, Named};
use kvm_bindings::{
    KVM_STATS_TYPE_CUMULATIVE, KVM_STATS_TYPE_INSTANT, KVM_STATS_TYPE_LINEAR_HIST, KVM_STATS_TYPE_LOG_HIST,
    KVM_STATS_TYPE_MASK, KVM_STATS_TYPE_PEAK,
};
use number::KVM_GET_STATS_FD;
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::FileExt;
use thiserror::Error;
use vmm_sys_util::ioctl::ioctl;

#[allow(missing_docs, reason = "the macro makes a public function without documentation")]
mod number {
    vmm_sys_util::ioctl_io_nr!(KVM_GET_STATS_FD, kvm_bindings::KVMIO, 0xce);
}

/// The size of the header in bytes: flags, name size, number of descriptors, offsets of id, descriptors and data.
const HEADER_BYTES: usize = 24;
/// The size of a descriptor in bytes, without its name: flags, exponent, size, offset, bucket size.
const DESCRIPTOR_BYTES: usize = 16;
/// The largest accepted number of statistics: more than any kernel has.
const MAX_STATS: usize = 4096;
/// The largest accepted size of a name in bytes (KVM_STATS_NAME_SIZE is 48).
const MAX_NAME_BYTES: usize = 256;

/// Why statistics cannot be read.
#[derive(Debug, Error)]
pub enum StatsError {
    /// The file cannot be read, or ends too early.
    #[error("cannot read KVM's statistics")]
    Read(#[from] io::Error),
    /// The header has figures that no kernel has.
    #[error("KVM's statistics have {count} entries with names of {name_bytes} bytes: their format is unknown")]
    Header {
        /// The number of statistics.
        count: usize,
        /// The size of a name in bytes.
        name_bytes: usize,
    },
    /// A statistic has a type (KVM_STATS_TYPE_*) that hwvmm does not know.
    #[error("KVM has a statistic of the unknown type {0}")]
    UnknownType(u32),
}

/// The type of a statistic (KVM_STATS_TYPE_*).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// A count since the start of the machine, which only grows.
    Cumulative,
    /// The value at the time of reading, which grows and shrinks.
    Instant,
    /// The largest value so far.
    Peak,
    /// A histogram with linear or logarithmic buckets.
    Histogram,
}

/// One statistic with its values.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stat {
    /// KVM's name for the statistic, such as `io_exits`.
    pub name: String,
    /// The type, which says what the values mean.
    pub kind: Kind,
    /// One value, or the buckets of a histogram.
    pub values: Vec<u64>,
}

/// Opens the statistics of the machine or the vCPU that `fd` belongs to.
pub(super) fn open<F: AsRawFd>(fd: &F) -> Result<File, KvmError> {
    // SAFETY: KVM_GET_STATS_FD takes no argument; on another fd or an older kernel it fails.
    let stats = unsafe { ioctl(fd, KVM_GET_STATS_FD()) };
    if stats < 0 {
        return Err(kvm_ioctls::Error::last()).named("KVM_GET_STATS_FD");
    }
    // SAFETY: the ioctl succeeded, so this is a new file descriptor, which is owned here only.
    Ok(unsafe { File::from_raw_fd(stats) })
}

/// What is known of a statistic beside its values.
struct Descriptor {
    name: String,
    kind: Kind,
    /// The index of its first value among all values.
    first: usize,
    /// The number of its values.
    count: usize,
}

/// Reads statistics: the descriptors once, the values as often as needed.
pub struct Reader {
    file: File,
    data_offset: u64,
    layout: Vec<Descriptor>,
}

impl Reader {
    /// Reads the descriptors.
    ///
    /// # Errors
    /// [`StatsError`] where the file cannot be read or its format is unknown.
    pub fn new(file: File) -> Result<Self, StatsError> {
        let mut header = [0; HEADER_BYTES];
        file.read_exact_at(&mut header, 0)?;
        let word = |index: usize| u32_at(&header, index * 4);
        let (name_bytes, count) = (word(1)? as usize, word(2)? as usize);
        let (descriptors, data_offset) = (u64::from(word(4)?), u64::from(word(5)?));
        if count > MAX_STATS || name_bytes > MAX_NAME_BYTES {
            return Err(StatsError::Header { count, name_bytes });
        }
        let entry_bytes = DESCRIPTOR_BYTES + name_bytes;
        let mut bytes = vec![0; count * entry_bytes];
        file.read_exact_at(&mut bytes, descriptors)?;
        let layout = bytes.chunks_exact(entry_bytes).map(descriptor).collect::<Result<_, _>>()?;
        Ok(Self { file, data_offset, layout })
    }

    /// Reads the current values.
    ///
    /// # Errors
    /// Where the file cannot be read.
    pub fn read(&self) -> io::Result<Vec<Stat>> {
        let words = self.layout.iter().map(|entry| entry.first + entry.count).max().unwrap_or(0);
        let mut bytes = vec![0; words * 8];
        self.file.read_exact_at(&mut bytes, self.data_offset)?;
        let values: Vec<u64> = bytes.as_chunks::<8>().0.iter().map(|chunk| u64::from_le_bytes(*chunk)).collect();
        let stat = |entry: &Descriptor| Stat {
            name: entry.name.clone(),
            kind: entry.kind,
            values: values[entry.first..entry.first + entry.count].to_vec(),
        };
        Ok(self.layout.iter().map(stat).collect())
    }
}

fn descriptor(entry: &[u8]) -> Result<Descriptor, StatsError> {
    let kind = match u32_at(entry, 0)? & KVM_STATS_TYPE_MASK {
        KVM_STATS_TYPE_CUMULATIVE => Kind::Cumulative,
        KVM_STATS_TYPE_INSTANT => Kind::Instant,
        KVM_STATS_TYPE_PEAK => Kind::Peak,
        KVM_STATS_TYPE_LINEAR_HIST | KVM_STATS_TYPE_LOG_HIST => Kind::Histogram,
        other => return Err(StatsError::UnknownType(other)),
    };
    let count = usize::from(u16::from_le_bytes([entry[6], entry[7]]));
    let first = u32_at(entry, 8)? as usize / 8;
    let name = &entry[DESCRIPTOR_BYTES..];
    let end = name.iter().position(|byte| *byte == 0).unwrap_or(name.len());
    Ok(Descriptor { name: String::from_utf8_lossy(&name[..end]).into_owned(), kind, first, count })
}

fn u32_at(bytes: &[u8], offset: usize) -> io::Result<u32> {
    let word = bytes.get(offset..offset + 4).and_then(|word| word.try_into().ok());
    word.map(u32::from_le_bytes).ok_or_else(|| io::Error::from(io::ErrorKind::UnexpectedEof))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    /// Two statistics as KVM lays them out: "exits" (one count) and "waits" (a histogram of two).
    fn file(count: u32) -> File {
        let mut file = tempfile::tempfile().expect("a temporary file");
        for word in [0, 8, count, 24, 24, 72_u32] {
            file.write_all(&word.to_le_bytes()).expect("written");
        }
        let mut entry = |flags: u32, size: u16, offset: u32, name: &[u8; 8]| {
            file.write_all(&flags.to_le_bytes()).expect("written");
            file.write_all(&0_u16.to_le_bytes()).expect("written");
            file.write_all(&size.to_le_bytes()).expect("written");
            file.write_all(&offset.to_le_bytes()).expect("written");
            file.write_all(&0_u32.to_le_bytes()).expect("written");
            file.write_all(name).expect("written");
        };
        entry(0, 1, 0, b"exits\0\0\0");
        entry(4, 2, 8, b"waits\0\0\0");
        for value in [7_u64, 1, 2] {
            file.write_all(&value.to_le_bytes()).expect("written");
        }
        file
    }

    #[test]
    fn names_kinds_and_values_are_read() {
        let stats = Reader::new(file(2)).expect("a layout").read().expect("values");
        assert_eq!(stats[0], Stat { name: "exits".into(), kind: Kind::Cumulative, values: vec![7] });
        assert_eq!(stats[1], Stat { name: "waits".into(), kind: Kind::Histogram, values: vec![1, 2] });
    }

    #[test]
    fn impossible_headers_are_errors() {
        assert!(Reader::new(file(u32::MAX)).is_err());
        assert!(Reader::new(file(50)).is_err(), "descriptors beyond the end");
    }
}
