//! Opens a qcow2 image with the files that it needs: backing files by the names in the headers, within rules, and the data
//! file that the command line names.

use super::super::error::{FileRole, ImageError};
use super::super::file::{HostCache, again, open_file, reopen, size};
use super::super::lock::{LockedFile, Use};
use super::super::options::ImageOptions;
use super::error::{NamedFileError, Qcow2Error};
use super::header::{Backing, DataPlace};
use super::inspect::{CheckPlace, Facts, inspect};
use super::tables::FormatSource;
use crate::path_text::PathText as _;
use imago::qcow2::Qcow2;
use imago::raw::Raw;
use imago::{DenyImplicitOpenGate, FormatAccess, FormatDriverBuilder};
use rustix::fs::{FileType, Mode, OFlags};
use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// The most backing files of an image.
const MAX_BACKING_FILES: usize = 16;

type Access = FormatAccess<imago::file::File>;

/// An open image and the files that are locked for it.
pub(in crate::virtio::block) struct OpenChain {
    pub(in crate::virtio::block) access: Access,
    pub(in crate::virtio::block) locks: Vec<LockedFile>,
    /// The paths of its backing files.
    pub(in crate::virtio::block) backing: Vec<PathBuf>,
    /// The numbers of the files that `access` has; they are open as long as it is.
    pub(in crate::virtio::block) storage: Vec<RawFd>,
}

/// Identifies a file of the host.
#[derive(PartialEq, Eq)]
struct FileId {
    device: u64,
    inode: u64,
}

struct Chain<'a> {
    options: &'a ImageOptions,
    place: Option<&'a CheckPlace<'a>>,
    host_cache: HostCache,
    seen: Vec<FileId>,
    locks: Vec<LockedFile>,
    backing: Vec<PathBuf>,
    storage: Vec<RawFd>,
}

/// An image of the chain that was opened, and not yet given to imago.
struct Layer<'a> {
    path: &'a Path,
    file: &'a File,
}

/// Opens the image of `options`, which is open as `file`, with backing files and data file. Headers and tables are
/// checked at `place`, or else in this process.
///
/// # Errors
/// [`ImageError`] where the image or one of its files cannot be used.
pub(in crate::virtio::block) fn open(
    options: &ImageOptions,
    file: &File,
    format: FormatSource,
    place: Option<&CheckPlace<'_>>,
) -> Result<OpenChain, ImageError> {
    let path = &options.path;
    let bad = |source| ImageError::Qcow2 { path: path.clone(), source };
    let stat = |source| ImageError::Stat { path: path.clone(), source };
    let facts = checked(file, size(file).map_err(stat)?, format, place).map_err(bad)?;
    if format == FormatSource::Detected {
        names_no_file(path, &facts)?;
    }
    let host_cache = if options.direct { HostCache::Bypassed } else { HostCache::Used };
    let seen = vec![id(file).map_err(stat)?];
    let mut chain =
        Chain { options, place, host_cache, seen, locks: Vec::new(), backing: Vec::new(), storage: Vec::new() };
    let data = match (&facts.data, &options.data_file) {
        (DataPlace::Image, None) => None,
        (DataPlace::Image, Some(_)) => return Err(bad(Qcow2Error::NoDataFile)),
        (DataPlace::File(name), None) => return Err(bad(Qcow2Error::DataFileNotGiven(name.as_deref().map(text)))),
        (DataPlace::File(_), Some(data)) => Some(chain.data_file(data)?),
    };
    let used = if options.read_only { Use::Reading } else { Use::ReadingAndWriting };
    let access = chain.image(&Layer { path, file }, facts.backing.as_ref(), data, used)?;
    Ok(OpenChain { access, locks: chain.locks, backing: chain.backing, storage: chain.storage })
}

/// # Errors
/// [`ImageError::NamesFile`] where the image needs another file.
fn names_no_file(path: &Path, facts: &Facts) -> Result<(), ImageError> {
    let named = match (&facts.data, &facts.backing) {
        (DataPlace::File(name), _) => Some((FileRole::Data, name.as_deref().unwrap_or_default())),
        (DataPlace::Image, Some(backing)) => Some((FileRole::Backing, backing.name.as_slice())),
        (DataPlace::Image, None) => None,
    };
    named.map_or(Ok(()), |(role, name)| Err(ImageError::NamesFile { path: path.to_owned(), role, name: text(name) }))
}

impl Chain<'_> {
    /// Gives a checked image to imago.
    fn image(
        &mut self,
        layer: &Layer<'_>,
        backing: Option<&Backing>,
        data: Option<imago::file::File>,
        used: Use,
    ) -> Result<Access, ImageError> {
        let backing = backing.map(|backing| self.backing(layer.path, backing)).transpose()?;
        let imago = |source| ImageError::Qcow2 { path: layer.path.to_owned(), source: Qcow2Error::Imago(source) };
        let storage = self.storage(layer.file, used).map_err(imago)?;
        let builder = Qcow2::<imago::file::File>::builder(storage).write(used == Use::ReadingAndWriting);
        let image = builder.backing(backing).data_file(data).open(DenyImplicitOpenGate::default()).map_err(imago)?;
        Ok(FormatAccess::new(image))
    }

    /// Opens the backing file of the image at `image`.
    fn backing(&mut self, image: &Path, backing: &Backing) -> Result<Access, ImageError> {
        let bad = |source| ImageError::NamedFile {
            image: image.to_owned(),
            role: FileRole::Backing,
            name: text(&backing.name),
            source,
        };
        if self.seen.len() > MAX_BACKING_FILES {
            return Err(bad(NamedFileError::TooDeep { limit: MAX_BACKING_FILES }));
        }
        let path = resolve(image, &backing.name).ok_or_else(|| bad(NamedFileError::Protocol))?;
        let file = open_regular(&path).map_err(bad)?;
        let locked = self.keep(file).map_err(bad)?;
        let file = &locked.0;
        self.backing.push(path.clone());
        let used = Use::Reading;
        match backing.format.as_deref() {
            None => Err(bad(NamedFileError::NoFormat)),
            Some(b"raw" | b"file") => {
                let raw = self
                    .storage(file, used)
                    .and_then(|storage| Raw::builder(storage).write(false).open(DenyImplicitOpenGate::default()));
                self.locks.push(locked);
                Ok(FormatAccess::new(raw.map_err(|source| bad(NamedFileError::Open(source)))?))
            }
            Some(b"qcow2") => {
                let bytes = size(file).map_err(|source| bad(NamedFileError::Open(source)))?;
                let damaged = |source| bad(NamedFileError::Qcow2(source));
                let facts = checked(file, bytes, FormatSource::Configured, self.place).map_err(damaged)?;
                if let DataPlace::File(name) = facts.data {
                    return Err(damaged(Qcow2Error::DataFileNotGiven(name.as_deref().map(text))));
                }
                let access = self.image(&Layer { path: &path, file }, facts.backing.as_ref(), None, used)?;
                self.locks.push(locked);
                Ok(access)
            }
            Some(other) => Err(bad(NamedFileError::Format(text(other)))),
        }
    }

    /// Opens the data file that the command line names.
    fn data_file(&mut self, path: &Path) -> Result<imago::file::File, ImageError> {
        let bad = |source| ImageError::NamedFile {
            image: self.options.path.clone(),
            role: FileRole::Data,
            name: path.shown().to_string(),
            source,
        };
        let options = ImageOptions { path: path.to_owned(), ..self.options.clone() };
        let file = open_file(&options)?;
        let used = if options.read_only { Use::Reading } else { Use::ReadingAndWriting };
        let new = id(&file).map_err(|source| bad(NamedFileError::Open(source)))?;
        if self.seen.contains(&new) {
            return Err(bad(NamedFileError::Loop));
        }
        let locked = LockedFile::new(file, used).map_err(|error| bad(error.into()))?;
        let storage = self.storage(&locked.0, used).map_err(|source| bad(NamedFileError::Open(source)))?;
        self.seen.push(new);
        self.locks.push(locked);
        Ok(storage)
    }

    /// Locks a backing file against writers, and notes that it is part of the chain.
    fn keep(&mut self, file: File) -> Result<LockedFile, NamedFileError> {
        let new = id(&file).map_err(NamedFileError::Open)?;
        if self.seen.contains(&new) {
            return Err(NamedFileError::Loop);
        }
        self.seen.push(new);
        LockedFile::new(file, Use::Reading).map_err(Into::into)
    }

    /// Returns an open file as imago takes it: the same file, whatever its name means by now.
    fn storage(&mut self, file: &File, used: Use) -> io::Result<imago::file::File> {
        let file = again(file, used == Use::Reading, self.host_cache)?;
        self.storage.push(file.as_raw_fd());
        file.try_into()
    }
}

/// Checks an image. Another process gets a file descriptor that it cannot write with.
fn checked(
    file: &File,
    file_bytes: u64,
    format: FormatSource,
    place: Option<&CheckPlace<'_>>,
) -> Result<Facts, Qcow2Error> {
    let Some(place) = place else { return inspect(file, file_bytes, format, None) };
    let read = |source| Qcow2Error::Read { at: 0, bytes: 0, source };
    inspect(&reopen(file, true, OFlags::empty()).map_err(read)?, file_bytes, format, Some(place))
}

/// Returns the path of a file that the header of `image` names: relative to the folder of the image. `None` where the name
/// begins with a protocol, as QEMU has them (`json:`, `nbd:`).
fn resolve(image: &Path, name: &[u8]) -> Option<PathBuf> {
    let before_slash = name.split(|byte| *byte == b'/').next().unwrap_or_default();
    let folder = image.parent().unwrap_or(Path::new(""));
    (!before_slash.contains(&b':')).then(|| folder.join(OsStr::from_bytes(name)))
}

/// Opens a regular file for reading. Anything else is not even opened, as the open of a device can do something.
fn open_regular(path: &Path) -> Result<File, NamedFileError> {
    let found = rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty());
    let found = File::from(found.map_err(|errno| NamedFileError::Open(errno.into()))?);
    let stat = rustix::fs::fstat(&found).map_err(|errno| NamedFileError::Open(errno.into()))?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Err(NamedFileError::Kind);
    }
    reopen(&found, true, OFlags::empty()).map_err(NamedFileError::Open)
}

fn id(file: &File) -> io::Result<FileId> {
    let stat = file.metadata()?;
    Ok(FileId { device: stat.dev(), inode: stat.ino() })
}

fn text(name: &[u8]) -> String {
    OsStr::from_bytes(name).shown().to_string()
}
