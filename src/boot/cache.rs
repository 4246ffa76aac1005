//! A cache of unpacked kernels and initrds on disk: unpacking takes about a second, reading an unpacked file a few
//! milliseconds.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt};
use std::path::{Path, PathBuf};

/// The number of files in the cache. The least recently used one is removed first.
const KEPT: usize = 8;
/// The number of bytes at each end of a packed file that go into its key.
const END_BYTES: u64 = 64 << 10;
/// The size of each sample between the ends, in bytes.
const SAMPLE_BYTES: u64 = 4 << 10;
/// The number of samples between the ends.
const SAMPLES: u64 = 16;

/// A cache of unpacked files in a directory.
pub struct Cache {
    folder: PathBuf,
}

/// The name of a packed file in the cache: size, modification time, and a CRC of both ends (where version and checksums are)
/// and of samples between. A CRC of the whole file would take longer than reading the unpacked one.
fn key(packed: &File) -> io::Result<String> {
    let metadata = packed.metadata()?;
    let (size, mut crc) = (metadata.len(), flate2::Crc::new());
    let mut sample = |offset: u64, bytes: u64| -> io::Result<()> {
        let count = usize::try_from(bytes.min(size.saturating_sub(offset))).unwrap_or(0);
        let mut buffer = vec![0; count];
        packed.read_exact_at(&mut buffer, offset)?;
        crc.update(&buffer);
        Ok(())
    };
    sample(0, END_BYTES)?;
    for index in 1..=SAMPLES {
        sample(size / (SAMPLES + 1) * index, SAMPLE_BYTES)?;
    }
    sample(size.saturating_sub(END_BYTES), END_BYTES)?;
    Ok(format!("{size}-{}-{:08x}.unpacked", metadata.mtime(), crc.sum()))
}

impl Cache {
    /// A cache in the directory `folder`, which is created by the first [`Cache::keep`].
    #[must_use]
    pub fn new(folder: &Path) -> Self {
        Self { folder: folder.to_owned() }
    }

    /// The unpacked file for `packed`, if it is in the cache.
    #[must_use]
    pub fn find(&self, packed: &File) -> Option<File> {
        let path = self.folder.join(key(packed).ok()?);
        let file = File::options().read(true).open(path).ok()?;
        // A file of another user is not trusted; an empty file was left by a crash.
        let metadata = file.metadata().ok()?;
        let mine = metadata.uid() == rustix::process::geteuid().as_raw();
        (mine && metadata.is_file() && metadata.len() > 0).then_some(file)
    }

    /// Adds the unpacked file for `packed`, whose content `fill` writes. It is written under a temporary name first, so that the
    /// cache has complete files only.
    ///
    /// # Errors
    /// Where the directory or the file cannot be written, or `fill` fails.
    pub fn keep<E: From<io::Error>>(
        &self,
        packed: &File,
        fill: impl FnOnce(&File) -> Result<(), E>,
    ) -> Result<File, E> {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&self.folder)?;
        let path = self.folder.join(key(packed)?);
        let temporary = path.with_extension(format!("{}.tmp", std::process::id()));
        let result = self.write(&temporary, &path, fill);
        if result.is_err() {
            let _ = fs::remove_file(&temporary);
        }
        result
    }

    fn write<E: From<io::Error>>(
        &self,
        temporary: &Path,
        path: &Path,
        fill: impl FnOnce(&File) -> Result<(), E>,
    ) -> Result<File, E> {
        let file = File::options().read(true).write(true).create(true).truncate(true).open(temporary)?;
        fill(&file)?;
        fs::rename(temporary, path)?;
        self.prune(path);
        Ok(file)
    }

    /// Removes the least recently used files beyond [`KEPT`]. A file that cannot be removed stays.
    fn prune(&self, newest: &Path) {
        let Ok(entries) = fs::read_dir(&self.folder) else { return };
        let mut kernels: Vec<_> = entries
            .flatten()
            .filter(|entry| entry.file_name().to_string_lossy().ends_with(".unpacked"))
            .filter_map(|entry| Some((entry.metadata().ok()?.atime(), entry.path())))
            .filter(|(_, path)| path != newest)
            .collect();
        kernels.sort();
        let surplus = kernels.len().saturating_sub(KEPT - 1);
        for (_, path) in kernels.into_iter().take(surplus) {
            if let Err(error) = fs::remove_file(&path) {
                log::debug!("{}: {error}", path.display());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};

    fn packed(content: &[u8]) -> File {
        let mut file = tempfile::tempfile().expect("a temporary file");
        file.write_all(content).expect("written");
        file
    }

    fn keep(cache: &Cache, packed: &File, content: &[u8]) -> io::Result<File> {
        cache.keep(packed, |file| {
            let mut file = file;
            file.write_all(content)
        })
    }

    #[test]
    fn a_cached_file_is_found_for_its_packed_file_only() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let cache = Cache::new(&folder.path().join("new"));
        let (one, two) = (packed(&[1; 200_000]), packed(&[2; 200_000]));
        assert!(cache.find(&one).is_none());
        keep(&cache, &one, b"unpacked").expect("kept");
        let mut content = String::new();
        cache.find(&one).expect("found").read_to_string(&mut content).expect("read");
        assert_eq!(content, "unpacked");
        assert!(cache.find(&two).is_none());
    }

    #[test]
    fn a_failed_unpacking_leaves_no_file() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let cache = Cache::new(folder.path());
        let one = packed(b"short");
        let error: io::Result<File> = cache.keep(&one, |_| Err(io::Error::other("no")));
        assert!(error.is_err() && cache.find(&one).is_none());
        assert_eq!(fs::read_dir(folder.path()).expect("listed").count(), 0);
    }

    #[test]
    fn the_cache_keeps_a_limited_number_of_files() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let cache = Cache::new(folder.path());
        for size in 1..20 {
            keep(&cache, &packed(&vec![1; size]), b"x").expect("kept");
        }
        assert_eq!(fs::read_dir(folder.path()).expect("listed").count(), KEPT);
    }
}
