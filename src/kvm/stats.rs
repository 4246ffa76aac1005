//! KVM's binary statistics (KVM API 4.133): the kernel's own counts for a machine and for a vCPU.

use super::{KvmError, Named};
use kvm_bindings::{
    KVM_STATS_TYPE_CUMULATIVE, KVM_STATS_TYPE_INSTANT, KVM_STATS_TYPE_LINEAR_HIST, KVM_STATS_TYPE_LOG_HIST,
    KVM_STATS_TYPE_MASK, KVM_STATS_TYPE_PEAK,
};
use number::KVM_GET_STATS_FD;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::FileExt;
use vmm_sys_util::ioctl::ioctl;

#[allow(missing_docs, reason = "the macro makes a public function without documentation")]
mod number {
    vmm_sys_util::ioctl_io_nr!(KVM_GET_STATS_FD, kvm_bindings::KVMIO, 0xce);
}

/// The header: flags, name size, number, offsets of id, descriptors and data.
const HEADER_BYTES: usize = 24;
/// A descriptor without its name: flags, exponent, size, offset, bucket size.
const DESCRIPTOR_BYTES: usize = 16;
/// More than any kernel has.
const MAX_STATS: usize = 4096;

/// What a statistic's number means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A count since the start.
    Cumulative,
    /// The value now.
    Instant,
    /// The largest value so far.
    Peak,
    /// A histogram.
    Histogram,
}

/// One statistic.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stat {
    /// KVM's name for it.
    pub name: String,
    /// What the numbers mean.
    pub kind: Kind,
    /// One number, or the buckets of a histogram.
    pub values: Vec<u64>,
}

/// Opens the statistics of a machine or a vCPU.
pub(super) fn open<F: AsRawFd>(fd: &F) -> Result<File, KvmError> {
    // SAFETY: KVM_GET_STATS_FD takes no argument; on another fd or an older kernel it fails.
    let stats = unsafe { ioctl(fd, KVM_GET_STATS_FD()) };
    if stats < 0 {
        return Err(kvm_ioctls::Error::last()).named("KVM_GET_STATS_FD");
    }
    // SAFETY: the ioctl succeeded, so this is a new file descriptor that nobody else owns.
    Ok(unsafe { File::from_raw_fd(stats) })
}

/// The statistics' names and places; read once, their values again and again.
pub struct Reader {
    file: File,
    data_offset: u64,
    /// Name, kind, index of the first number, how many.
    layout: Vec<(String, Kind, usize, usize)>,
}

impl Reader {
    /// Reads the descriptors.
    ///
    /// # Errors
    /// Where the file cannot be read or makes no sense.
    pub fn new(file: File) -> io::Result<Self> {
        let mut header = [0; HEADER_BYTES];
        file.read_exact_at(&mut header, 0)?;
        let word = |index: usize| u32_at(&header, index * 4);
        let (name_bytes, count) = (word(1)? as usize, word(2)? as usize);
        let (descriptors, data_offset) = (u64::from(word(4)?), u64::from(word(5)?));
        if count > MAX_STATS || name_bytes > 256 {
            return Err(io::Error::other(format!("{count} statistics with names of {name_bytes} bytes")));
        }
        let entry_bytes = DESCRIPTOR_BYTES + name_bytes;
        let mut bytes = vec![0; count * entry_bytes];
        file.read_exact_at(&mut bytes, descriptors)?;
        let layout = bytes.chunks_exact(entry_bytes).map(descriptor).collect::<io::Result<_>>()?;
        Ok(Self { file, data_offset, layout })
    }

    /// The values now.
    ///
    /// # Errors
    /// Where the file cannot be read.
    pub fn read(&self) -> io::Result<Vec<Stat>> {
        let words = self.layout.iter().map(|(_, _, first, count)| first + count).max().unwrap_or(0);
        let mut bytes = vec![0; words * 8];
        self.file.read_exact_at(&mut bytes, self.data_offset)?;
        let values: Vec<u64> = bytes.as_chunks::<8>().0.iter().map(|chunk| u64::from_le_bytes(*chunk)).collect();
        let stat = |(name, kind, first, count): &(String, Kind, usize, usize)| Stat {
            name: name.clone(),
            kind: *kind,
            values: values[*first..first + count].to_vec(),
        };
        Ok(self.layout.iter().map(stat).collect())
    }
}

fn descriptor(entry: &[u8]) -> io::Result<(String, Kind, usize, usize)> {
    let kind = match u32_at(entry, 0)? & KVM_STATS_TYPE_MASK {
        KVM_STATS_TYPE_CUMULATIVE => Kind::Cumulative,
        KVM_STATS_TYPE_INSTANT => Kind::Instant,
        KVM_STATS_TYPE_PEAK => Kind::Peak,
        KVM_STATS_TYPE_LINEAR_HIST | KVM_STATS_TYPE_LOG_HIST => Kind::Histogram,
        other => return Err(io::Error::other(format!("a statistic of unknown type {other}"))),
    };
    let count = usize::from(u16::from_le_bytes([entry[6], entry[7]]));
    let first = u32_at(entry, 8)? as usize / 8;
    let name = &entry[DESCRIPTOR_BYTES..];
    let end = name.iter().position(|byte| *byte == 0).unwrap_or(name.len());
    Ok((String::from_utf8_lossy(&name[..end]).into_owned(), kind, first, count))
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
    fn nonsense_is_an_error() {
        assert!(Reader::new(file(u32::MAX)).is_err());
        assert!(Reader::new(file(50)).is_err(), "descriptors beyond the end");
    }
}
