//! The file systems of a disk image: those that are read (ext2 to ext4, FAT), and the names of those that are not.

use super::disk::Range;
use super::ext::Ext;
use super::file::{FileError, PATH_BYTES, copy_pieces};
use fatfs::FsOptions;
use std::fmt;
use std::io::{self, Read as _, Seek, SeekFrom, Write};

/// What a range of a disk holds.
pub(super) enum Content {
    /// A file system that can be read.
    FileSystem(FileSystem),
    /// Something that cannot be read: what, for messages.
    Other(String),
}

/// What has a magic number: its name, the number, and the bytes before it.
const OTHERS: &[(&str, u64, &[u8])] = &[
    ("xfs", 0, b"XFSB"),
    ("btrfs", 0x1_0040, b"_BHRfS_M"),
    ("LUKS (encrypted)", 0, b"LUKS\xba\xbe"),
    ("LVM", 512 + 24, b"LVM2 001"),
    ("LVM", 24, b"LVM2 001"),
    ("a part of a RAID", 4096, &[0xfc, 0x4e, 0x2b, 0xa9]),
    ("squashfs", 0, b"hsqs"),
    ("erofs", 1024, &[0xe2, 0xe1, 0xf5, 0xe0]),
    ("f2fs", 1024, &[0x10, 0x20, 0xf5, 0xf2]),
    ("ISO 9660", 0x8001, b"CD001"),
    ("NTFS", 3, b"NTFS    "),
    ("exFAT", 3, b"EXFAT   "),
    ("BitLocker", 3, b"-FVE-FS-"),
    ("swap", 4086, b"SWAPSPACE2"),
];

/// Finds out what `range` holds.
#[must_use]
pub(super) fn content(range: &Range) -> Content {
    if range.array(1024 + 56) == Some([0x53, 0xef]) {
        return match Ext::load(range) {
            Ok(ext) => Content::FileSystem(FileSystem::Ext(Box::new(ext))),
            Err(what) => Content::Other(what),
        };
    }
    let has = |at, magic: &[u8]| {
        let mut bytes = vec![0; magic.len()];
        range.read(&mut bytes, at).is_ok() && bytes == magic
    };
    if let Some((name, ..)) = OTHERS.iter().find(|(_, at, magic)| has(*at, magic)) {
        return Content::Other((*name).to_owned());
    }
    if !looks_like_fat(range) {
        return Content::Other("no file system that hwvmm knows".into());
    }
    match fatfs::FileSystem::new(FatDisk { range: range.clone(), at: 0 }, FsOptions::new()) {
        Ok(fat) => Content::FileSystem(FileSystem::Fat(Box::new(fat))),
        Err(error) => Content::Other(format!("FAT that cannot be read ({error})")),
    }
}

/// Returns true if the boot sector is that of FAT, with areas that add up: fatfs takes that for granted.
fn looks_like_fat(range: &Range) -> bool {
    let Some(sector) = range.array::<512>(0) else { return false };
    let u16_at = |at: usize| u64::from(u16::from_le_bytes([sector[at], sector[at + 1]]));
    let u32_at = |at: usize| u16_at(at) | u16_at(at + 2) << 16;
    let or = |small: u64, large: u64| if small == 0 { large } else { small };
    let (sector_bytes, total) = (u16_at(11), or(u16_at(19), u32_at(32)));
    let (fats, fat_sectors) = (u64::from(sector[16]), or(u16_at(22), u32_at(36)));
    let jump = matches!(sector[0], 0xeb | 0xe9);
    if !jump || !sector.ends_with(&[0x55, 0xaa]) || !matches!(sector_bytes, 512 | 1024 | 2048 | 4096) {
        return false;
    }
    let root_sectors = (u16_at(17) * 32).div_ceil(sector_bytes);
    let data = u16_at(14) + fats * fat_sectors + root_sectors;
    let whole = total.checked_mul(sector_bytes).is_some_and(|bytes| bytes <= range.bytes());
    // FAT has at least two bytes for three clusters, and at most four bytes for one.
    let entries = fat_sectors * sector_bytes >= 3 && fat_sectors * sector_bytes <= 1 << 30;
    sector[13].is_power_of_two() && matches!(fats, 1 | 2) && whole && entries && data < total
}

/// A file system that can be read.
pub(super) enum FileSystem {
    /// ext2, ext3 or ext4.
    Ext(Box<Ext>),
    /// FAT12, FAT16 or FAT32.
    Fat(Box<fatfs::FileSystem<FatDisk>>),
}

impl FileSystem {
    /// Its UUID as GRUB and Linux write it; for FAT its serial number.
    #[must_use]
    pub(super) fn uuid(&self) -> String {
        match self {
            Self::Ext(ext) => ext.uuid(),
            Self::Fat(fat) => format!("{:04X}-{:04X}", fat.volume_id() >> 16, fat.volume_id() & 0xffff),
        }
    }

    /// Its label; empty where it has none.
    #[must_use]
    pub(super) fn label(&self) -> String {
        match self {
            Self::Ext(ext) => ext.label(),
            Self::Fat(fat) => fat.volume_label(),
        }
    }

    /// Returns true if its journal is to be replayed. FAT has none.
    #[must_use]
    pub(super) fn needs_recovery(&self) -> bool {
        match self {
            Self::Ext(ext) => ext.needs_recovery(),
            Self::Fat(_) => false,
        }
    }

    /// Returns true if there is a file or a folder at `path`.
    #[must_use]
    pub(super) fn exists(&self, path: &str) -> bool {
        path.len() <= PATH_BYTES
            && match self {
                Self::Ext(ext) => ext.exists(path),
                Self::Fat(fat) => {
                    let path = path.trim_matches('/');
                    let root = fat.root_dir();
                    path.is_empty() || root.open_file(path).is_ok() || root.open_dir(path).is_ok()
                }
            }
    }

    /// The names in the folder at `path`, at most `limit` of them.
    ///
    /// # Errors
    /// [`FileError`].
    pub(super) fn names(&self, path: &str, limit: usize) -> Result<Vec<String>, FileError> {
        match self {
            Self::Ext(ext) => ext.names(path, limit),
            Self::Fat(fat) => {
                let entries = fat.root_dir().open_dir(path.trim_matches('/'))?.iter().take(limit);
                entries.map(|entry| Ok(entry?.file_name())).collect()
            }
        }
    }

    /// Reads the file at `path`. Symbolic links lead to files of this file system only.
    ///
    /// # Errors
    /// [`FileError`]; [`FileError::TooLarge`] with more than `limit` bytes.
    pub(super) fn read(&self, path: &str, limit: u64) -> Result<Vec<u8>, FileError> {
        let mut bytes = Vec::new();
        self.copy(path, limit, &mut bytes)?;
        Ok(bytes)
    }

    /// Copies the file at `path` to the end of `out`. Returns its size in bytes.
    ///
    /// # Errors
    /// As [`FileSystem::read`], and [`FileError::Write`].
    pub(super) fn copy(&self, path: &str, limit: u64, out: &mut dyn Write) -> Result<u64, FileError> {
        if path.len() > PATH_BYTES {
            return Err(FileError::NotFound);
        }
        match self {
            Self::Ext(ext) => ext.copy(path, limit, out),
            Self::Fat(fat) => {
                let path = path.trim_matches('/');
                let mut file = fat.root_dir().open_file(path)?;
                let bytes = copy_pieces(limit, out, |piece| Ok(file.read(piece)?))?;
                // For fatfs a chain of clusters that breaks off is the end of the file.
                let whole = fat_file_bytes(fat, path)?;
                if bytes == whole {
                    Ok(bytes)
                } else {
                    Err(FileError::Read(format!("the file has {whole} bytes, and ends after {bytes}")))
                }
            }
        }
    }
}

/// The size in bytes of the file at `path` in its folder's entry.
fn fat_file_bytes(fat: &fatfs::FileSystem<FatDisk>, path: &str) -> Result<u64, FileError> {
    let (folder, name) = path.rsplit_once('/').unwrap_or(("", path));
    let root = fat.root_dir();
    let folder = if folder.is_empty() { root } else { root.open_dir(folder)? };
    let upper = |name: &str| name.to_uppercase();
    for entry in folder.iter() {
        let entry = entry?;
        if entry.is_file() && (upper(&entry.file_name()) == upper(name) || entry.short_file_name() == upper(name)) {
            return Ok(entry.len());
        }
    }
    Err(FileError::NotFound)
}

/// A range as fatfs reads it. It cannot be written.
pub(super) struct FatDisk {
    range: Range,
    at: u64,
}

impl fmt::Debug for FatDisk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FatDisk").field("at", &self.at).finish_non_exhaustive()
    }
}

impl io::Read for FatDisk {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = self.range.bytes().saturating_sub(self.at);
        let count = usize::try_from(left).unwrap_or(usize::MAX).min(buffer.len());
        let buffer = buffer.get_mut(..count).unwrap_or_default();
        self.range.read(buffer, self.at)?;
        self.at += count as u64;
        Ok(count)
    }
}

impl Seek for FatDisk {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let at = match to {
            SeekFrom::Start(at) => Some(at),
            SeekFrom::Current(by) => self.at.checked_add_signed(by),
            SeekFrom::End(by) => self.range.bytes().checked_add_signed(by),
        };
        self.at = at.ok_or(io::ErrorKind::InvalidInput)?;
        Ok(self.at)
    }
}

impl Write for FatDisk {
    fn write(&mut self, _: &[u8]) -> io::Result<usize> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
