//! Unpacked kernels and initrds, kept from run to run: unpacking takes a second, reading what was unpacked a few milliseconds.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt};
use std::path::{Path, PathBuf};

/// Kernels kept; the longest unused goes first.
const KEPT: usize = 8;
/// Bytes looked at at each end of the file, and at each of the samples between.
const END_BYTES: u64 = 64 << 10;
const SAMPLE_BYTES: u64 = 4 << 10;
const SAMPLES: u64 = 16;

/// A folder of unpacked kernels.
pub struct Cache {
    folder: PathBuf,
}

/// Names one packed kernel: its size, its time, its ends (where version and checksums are) and samples between. Not
/// all of it: that would take longer than reading the unpacked kernel.
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
    /// A cache in `folder`, which is made when something is kept.
    #[must_use]
    pub fn new(folder: &Path) -> Self {
        Self { folder: folder.to_owned() }
    }

    /// The unpacked kernel of `packed`, if it is kept.
    #[must_use]
    pub fn find(&self, packed: &File) -> Option<File> {
        let path = self.folder.join(key(packed).ok()?);
        let file = File::options().read(true).open(path).ok()?;
        // Someone else's file is not to be trusted; an empty one is an accident.
        let metadata = file.metadata().ok()?;
        let mine = metadata.uid() == rustix::process::geteuid().as_raw();
        (mine && metadata.is_file() && metadata.len() > 0).then_some(file)
    }

    /// Keeps what `fill` writes as the unpacked kernel of `packed`. Complete or not at all: written under another name
    /// first.
    ///
    /// # Errors
    /// Where the folder or the file cannot be written, or `fill` fails.
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

    /// Removes the oldest beyond [`KEPT`]. What cannot be removed stays.
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
    fn what_was_kept_is_found_for_that_kernel_only() {
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
    fn a_failed_unpacking_leaves_nothing() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let cache = Cache::new(folder.path());
        let one = packed(b"short");
        let error: io::Result<File> = cache.keep(&one, |_| Err(io::Error::other("no")));
        assert!(error.is_err() && cache.find(&one).is_none());
        assert_eq!(fs::read_dir(folder.path()).expect("listed").count(), 0);
    }

    #[test]
    fn the_folder_does_not_grow_without_end() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let cache = Cache::new(folder.path());
        for size in 1..20 {
            keep(&cache, &packed(&vec![1; size]), b"x").expect("kept");
        }
        assert_eq!(fs::read_dir(folder.path()).expect("listed").count(), KEPT);
    }
}
