//! Backing files and data files: what is opened, and what is refused.
#![allow(clippy::precedence, reason = "table entries are bits")]

use super::super::image::Content;
use super::super::{FileRole, Format, Image, ImageError, ImageOptions, NamedFileError, Qcow2Error};
use super::tests::{image, put};
use std::path::{Path, PathBuf};
use std::sync::PoisonError;

fn options(path: &Path) -> ImageOptions {
    ImageOptions { path: path.to_owned(), format: Format::Qcow2, read_only: false, direct: false, data_file: None }
}

/// An image without data whose header names a backing file.
fn overlay(name: &[u8], format: Option<&[u8]>) -> Vec<u8> {
    let mut bytes = image();
    bytes[4 * 4096..4 * 4096 + 32].fill(0);
    let mut at = 104;
    if let Some(format) = format {
        put(&mut bytes, at, 0xe279_2aca, 4);
        put(&mut bytes, at + 4, format.len() as u64, 4);
        bytes[at + 8..at + 8 + format.len()].copy_from_slice(format);
        at += 8 + format.len().next_multiple_of(8);
    }
    at += 8;
    put(&mut bytes, 8, at as u64, 8);
    put(&mut bytes, 16, name.len() as u64, 4);
    bytes[at..at + name.len()].copy_from_slice(name);
    bytes
}

fn read(image: &Image, at: u64) -> [u8; 512] {
    let Content::Qcow2(access) = &image.content else { panic!("qcow2") };
    let mut bytes = [0; 512];
    access.read().unwrap_or_else(PoisonError::into_inner).read(&mut bytes[..], at).expect("read");
    bytes
}

fn write(image: &Image, at: u64, byte: u8) {
    let Content::Qcow2(access) = &image.content else { panic!("qcow2") };
    let access = access.read().unwrap_or_else(PoisonError::into_inner);
    access.write(&[byte; 512][..], at).and_then(|()| access.flush()).expect("written");
}

struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Self {
        Self(tempfile::tempdir().expect("a folder"))
    }

    fn put(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.path(name);
        std::fs::write(&path, bytes).expect("written");
        path
    }

    /// Counts the descriptors of this process for files in the folder.
    fn descriptors(&self) -> usize {
        let all = std::fs::read_dir("/proc/self/fd").expect("/proc").flatten();
        all.filter_map(|entry| std::fs::read_link(entry.path()).ok()).filter(|to| to.starts_with(self.0.path())).count()
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }
}

/// The error of the file that the image, or one of its backing files, names.
fn named(options: &ImageOptions) -> NamedFileError {
    match Image::open(options).err() {
        Some(ImageError::NamedFile { source, .. }) => source,
        other => panic!("{other:?}"),
    }
}

#[test]
fn backing_files_are_read_and_not_written() {
    let folder = Folder::new();
    let base = folder.put("base.raw", &[5; 1 << 20]);
    folder.put("middle", &overlay(b"base.raw", Some(b"raw")));
    let top = folder.put("top", &overlay(folder.path("middle").as_os_str().as_encoded_bytes(), Some(b"qcow2")));
    let opened = Image::open(&options(&top)).expect("a chain");
    assert_eq!(read(&opened, 4096), [5; 512]);
    write(&opened, 4096, 7);
    assert_eq!((read(&opened, 4096), read(&opened, 8192)), ([7; 512], [5; 512]));
    // Locked against writers, but other images can have it too.
    let raw = |read_only| ImageOptions { format: Format::Raw, read_only, ..options(&base) };
    assert!(matches!(Image::open(&raw(false)), Err(ImageError::Locked { .. })));
    let shared = Image::open(&raw(true)).expect("shared");
    drop(opened);
    assert_eq!(std::fs::read(&base).expect("there"), [5; 1 << 20]);
    drop(shared);
    let writer = Image::open(&raw(false)).expect("free again");
    assert!(matches!(named(&options(&top)), NamedFileError::Locked(_)));
    drop(writer);
    assert_eq!(read(&Image::open(&options(&top)).expect("again"), 4096), [7; 512]);
}

#[test]
fn a_chain_can_bypass_the_page_cache() {
    let folder = Folder(tempfile::tempdir_in("/var/tmp").expect("a folder"));
    let base = folder.put("base", &[5; 1 << 20]);
    let top = folder.put("top", &overlay(b"base", Some(b"raw")));
    // Not every file system can.
    if Image::open(&ImageOptions { format: Format::Raw, direct: true, ..options(&base) }).is_err() {
        return crate::skip::skipped("/var/tmp has no O_DIRECT");
    }
    let direct = ImageOptions { direct: true, ..options(&top) };
    let opened = Image::open(&direct).expect("a chain");
    write(&opened, 512, 7);
    assert_eq!((read(&opened, 0), read(&opened, 512), read(&opened, 1024)), ([5; 512], [7; 512], [5; 512]));
    drop(opened);
    assert_eq!(read(&Image::open(&direct).expect("again"), 512), [7; 512]);
}

#[test]
fn only_regular_files_with_a_stated_format_are_opened() {
    let folder = Folder::new();
    folder.put("base", &[5; 1 << 20]);
    let error =
        |name: &str, format: Option<&[u8]>| named(&options(&folder.put("top", &overlay(name.as_bytes(), format))));
    assert!(matches!(error("base", None), NamedFileError::NoFormat));
    assert!(matches!(error("base", Some(b"vmdk")), NamedFileError::Format(format) if format == "vmdk"));
    assert!(matches!(error("base", Some(b"qcow2")), NamedFileError::Qcow2(Qcow2Error::Field { .. })));
    assert!(matches!(error("/dev/zero", Some(b"raw")), NamedFileError::Kind));
    assert!(matches!(error(".", Some(b"raw")), NamedFileError::Kind));
    assert!(matches!(error("none", Some(b"raw")), NamedFileError::Open(_)));
    assert!(matches!(error("a\0b", Some(b"raw")), NamedFileError::Open(_)));
    assert!(matches!(error("nbd:unix:/s", Some(b"raw")), NamedFileError::Protocol));
    assert!(matches!(error("json:{\"file\":\"/x\"}", Some(b"raw")), NamedFileError::Protocol));
    // A FIFO would block an open for reading.
    let fifo = folder.path("fifo");
    let made = std::process::Command::new("mkfifo").arg(&fifo).status();
    assert!(made.is_ok_and(|status| status.success()));
    assert!(matches!(error("fifo", Some(b"raw")), NamedFileError::Kind));
    let link = folder.path("link");
    std::os::unix::fs::symlink("base", link).expect("linked");
    let linked = folder.put("top", &overlay(b"link", Some(b"raw")));
    assert_eq!(read(&Image::open(&options(&linked)).expect("a link to a file"), 0), [5; 512]);
}

#[test]
fn a_chain_has_no_loop_and_an_end() {
    let folder = Folder::new();
    let own = folder.put("own", &overlay(b"own", Some(b"qcow2")));
    assert!(matches!(named(&options(&own)), NamedFileError::Loop));
    folder.put("b", &overlay(b"a", Some(b"qcow2")));
    let a = folder.put("a", &overlay(b"b", Some(b"qcow2")));
    assert!(matches!(named(&options(&a)), NamedFileError::Loop));
    // Another name for the same file.
    std::fs::hard_link(&own, folder.path("other")).expect("linked");
    std::fs::write(&own, overlay(b"other", Some(b"qcow2"))).expect("written");
    assert!(matches!(named(&options(&own)), NamedFileError::Loop));
    folder.put("0", &[5; 1 << 20]);
    for index in 1..=18_u32 {
        let format: &[u8] = if index == 1 { b"raw" } else { b"qcow2" };
        folder.put(&index.to_string(), &overlay((index - 1).to_string().as_bytes(), Some(format)));
    }
    let longest = Image::open(&options(&folder.path("16"))).expect("16 backing files");
    assert_eq!(read(&longest, 0), [5; 512]);
    assert_eq!(folder.descriptors(), 2 * 17);
    drop(longest);
    assert_eq!(folder.descriptors(), 0);
    assert!(matches!(named(&options(&folder.path("17"))), NamedFileError::TooDeep { limit: 16 }));
}

/// An image whose data is in another file, which its header names.
fn with_data_file(name: &str) -> Vec<u8> {
    let mut bytes = image();
    put(&mut bytes, 72, 4, 8);
    put(&mut bytes, 104, 0x4441_5441, 4);
    put(&mut bytes, 108, name.len() as u64, 4);
    bytes[112..112 + name.len()].copy_from_slice(name.as_bytes());
    for index in 0..4 {
        put(&mut bytes, 4 * 4096 + 8 * index, 1 << 63 | (index * 4096) as u64, 8);
    }
    bytes
}

#[test]
fn a_data_file_is_the_one_of_the_command_line() {
    let folder = Folder::new();
    let victim = folder.put("victim", &[b'v'; 16384]);
    let data = folder.put("data", &[b'd'; 16384]);
    let top = folder.put("top", &with_data_file(victim.to_str().expect("UTF-8")));
    let refused = Image::open(&options(&top)).err().expect("refused");
    let ImageError::Qcow2 { source, .. } = refused else { panic!("{refused:?}") };
    assert!(source.to_string().contains(victim.to_str().expect("UTF-8")), "{source}");
    assert!(source.to_string().contains("data-file=PATH"), "{source}");
    let given = ImageOptions { data_file: Some(data.clone()), ..options(&top) };
    let opened = Image::open(&given).expect("a data file");
    assert_eq!(read(&opened, 0), [b'd'; 512]);
    write(&opened, 0, 7);
    assert!(matches!(
        Image::open(&ImageOptions { format: Format::Raw, ..options(&data) }),
        Err(ImageError::Locked { .. })
    ));
    drop(opened);
    assert_eq!(std::fs::read(&victim).expect("there"), [b'v'; 16384]);
    assert_eq!(std::fs::read(&data).expect("there")[..512], [7; 512]);
    // The image itself is none, nor is one given to an image that has its data.
    let own = ImageOptions { data_file: Some(top.clone()), ..options(&top) };
    assert!(matches!(Image::open(&own), Err(ImageError::NamedFile { role: FileRole::Data, .. })));
    let plain = folder.put("plain", &image());
    let needless = ImageOptions { data_file: Some(data), ..options(&plain) };
    assert!(matches!(Image::open(&needless), Err(ImageError::Qcow2 { source: Qcow2Error::NoDataFile, .. })));
    // A backing file's is not opened.
    let over = folder.put("over", &overlay(b"top", Some(b"qcow2")));
    assert!(matches!(named(&options(&over)), NamedFileError::Qcow2(Qcow2Error::DataFileNotGiven(Some(_)))));
}
