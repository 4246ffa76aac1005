//! Images of QEMU are accepted, and damaged ones refused with the field that is wrong.
#![allow(clippy::cast_possible_truncation, clippy::precedence, reason = "numbers of tests are small, entries are bits")]

use super::super::{Format, Image, ImageError, ImageOptions, Qcow2Error};
use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::Command;

const CLUSTER: usize = 4096;

/// Writes a big-endian number of `width` bytes.
pub(super) fn put(bytes: &mut [u8], at: usize, value: u64, width: usize) {
    bytes[at..at + width].copy_from_slice(&value.to_be_bytes()[8 - width..]);
}

/// A disk of 1 MiB in clusters of 4 KiB: header, refcount table, refcount block, L1 table, L2 table, 4 data clusters.
pub(super) fn image() -> Vec<u8> {
    let mut file = vec![0_u8; 9 * CLUSTER];
    file[..4].copy_from_slice(b"QFI\xfb");
    for (at, value, width) in [
        (4, 3, 4),
        (20, 12, 4),
        (24, 1 << 20, 8),
        (36, 1, 4),
        (40, 3 * CLUSTER as u64, 8),
        (48, CLUSTER as u64, 8),
        (56, 1, 4),
        (96, 4, 4),
        (100, 104, 4),
        (CLUSTER, 2 * CLUSTER as u64, 8),
        (3 * CLUSTER, 1 << 63 | 4 * CLUSTER as u64, 8),
    ] {
        put(&mut file, at, value, width);
    }
    for index in 0..9 {
        put(&mut file, 2 * CLUSTER + 2 * index, 1, 2);
    }
    for index in 0..4 {
        put(&mut file, 4 * CLUSTER + 8 * index, 1 << 63 | ((5 + index) * CLUSTER) as u64, 8);
    }
    file
}

fn options(path: &Path, format: Format) -> ImageOptions {
    ImageOptions { path: path.to_owned(), format, read_only: false, direct: false, data_file: None }
}

/// Opens an image of these bytes, by detection and by configuration, which must come to the same.
fn open(bytes: &[u8]) -> Result<(), Qcow2Error> {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("a.qcow2");
    let [detected, configured] = [Format::Auto, Format::Qcow2].map(|format| {
        std::fs::write(&path, bytes).expect("written");
        let opened = Image::open(&options(&path, format)).map(drop);
        if opened.is_err() {
            assert!(std::fs::read(&path).expect("there") == bytes, "a refused image is written");
        }
        opened
    });
    assert_eq!(format!("{detected:?}"), format!("{configured:?}"));
    match detected {
        Ok(()) => Ok(()),
        Err(ImageError::Qcow2 { source, .. }) => Err(source),
        Err(other) => panic!("{other}"),
    }
}

#[test]
fn each_field_is_checked() {
    open(&image()).expect("a sound image");
    let l2 = 4 * CLUSTER;
    for (at, value, width, words) in [
        (4, 4, 4, "version in its header is 0x4"),
        (20, 8, 4, "cluster_bits in its header is 0x8"),
        (20, 22, 4, "cluster_bits"),
        (20, u64::from(u32::MAX), 4, "cluster_bits"),
        (24, (2 << 20) + 512, 8, "size in its header"),
        (24, u64::MAX, 8, "size in its header"),
        (24, 0x4100, 8, "a multiple of 0x200"),
        (32, 1, 4, "encrypted"),
        (36, 0, 4, "size in its header"),
        (36, 0x40_0001, 4, "l1_size in its header is 0x400001"),
        (40, 1 << 20, 8, "l1_table_offset in its header is 0x100000"),
        (40, 3 * 4096 + 512, 8, "l1_table_offset"),
        (40, 0, 8, "has metadata"),
        (48, 512, 8, "refcount_table_offset"),
        (48, u64::MAX - 4095, 8, "refcount_table_offset"),
        (48, 0, 8, "has metadata"),
        (48, 3 * 4096, 8, "has metadata"),
        (56, 0, 4, "refcount_table_clusters"),
        (56, 2049, 4, "refcount_table_clusters"),
        (60, 65_537, 4, "nb_snapshots"),
        (72, 1, 8, "'dirty'"),
        (72, 2, 8, "qemu-img check -r all"),
        (72, 8, 8, "'compression type'"),
        (72, 16, 8, "'extended L2 entries'"),
        (72, 1 << 40, 8, "'unknown' (bit 40)"),
        (96, 7, 4, "refcount_order"),
        (100, 96, 4, "header_length"),
        (100, 8192, 4, "header_length"),
        // An extension beyond the first cluster; a table of feature names of 49 bytes, at which imago panics.
        (104, 0x1234_5678_0000_1000, 8, "the length of a header extension"),
        (104, 0x6803_f857_0000_0031, 8, "feature name table"),
        (CLUSTER, 0, 8, "reference count of 0"),
        (CLUSTER, 8192 + 1, 8, "entry 0 of the refcount table"),
        (CLUSTER, 9 << 12, 8, "entry 0 of the refcount table"),
        (CLUSTER + 8, 2 << 12, 8, "has metadata"),
        (CLUSTER + 8, 4 << 12, 8, "has metadata"),
        (3 * CLUSTER, 1 << 63 | 9 << 12, 8, "entry 0 of the L1 table is 0x8000000000009000"),
        (3 * CLUSTER, 1 << 63 | 4 << 12 | 512, 8, "entry 0 of the L1 table"),
        (3 * CLUSTER, 1 << 63 | 2 << 12, 8, "has metadata"),
        (3 * CLUSTER, 1 << 62 | 4 << 12, 8, "entry 0 of the L1 table"),
        (l2 + 24, 1 << 63 | 9 << 12, 8, "entry 3 of the L2 table"),
        (l2 + 24, 1 << 63, 8, "entry 3 of the L2 table"),
        (l2 + 24, 1 << 63 | 8 << 12 | 2, 8, "entry 3 of the L2 table"),
        (l2 + 24, 1 << 63 | 4 << 12, 8, "has metadata"),
        (l2 + 24, 1 << 63 | 5 << 12, 8, "the cluster at 0x5000 has a reference count of 1 and 2 uses"),
        (l2 + 24, 3 << 62 | 5 << 12, 8, "entry 3 of the L2 table"),
        (l2 + 24, 1 << 62 | 2 << 12, 8, "has metadata"),
        (2 * CLUSTER + 2 * 4, 0, 2, "the cluster at 0x4000 has a reference count of 0"),
        (2 * CLUSTER, 0, 2, "the cluster at 0x0 has a reference count of 0"),
        (2 * CLUSTER + 2 * 8, 2, 2, "reference count of 2, and its table entry"),
    ] {
        let mut bytes = image();
        put(&mut bytes, at, value, width);
        // A bit that imago clears in images that it opens for writing.
        put(&mut bytes, 88, 1, 8);
        let error = open(&bytes).err().unwrap_or_else(|| panic!("{at}: {value:#x} is accepted")).to_string();
        assert!(error.contains(words), "{at}: {value:#x}: {error}");
    }
    // imago reads extensions behind the offset of an empty name too.
    let mut bytes = image();
    put(&mut bytes, 8, 104, 8);
    put(&mut bytes, 104, 0x6803_f857_0000_0031, 8);
    assert!(open(&bytes).is_err_and(|error| error.to_string().contains("feature name table")));
    for length in [0, 4, 71, 72, 104, 4096, 8192, 12_288, 16_384, 20_480, 24_576] {
        if length >= 4 {
            assert!(open(&image()[..length]).is_err(), "cut at {length}");
        }
    }
    // What the last cluster lacks is zeroes.
    open(&image()[..8 * CLUSTER + 1]).expect("a file that ends within a cluster");
}

#[test]
fn clusters_that_nothing_uses_are_no_error_but_behind_the_end() {
    let mut bytes = image();
    put(&mut bytes, 4 * CLUSTER, 0, 8);
    open(&bytes).expect("a leak");
    let mut bytes = image();
    put(&mut bytes, 2 * CLUSTER + 2 * 2000, 1, 2);
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("a.qcow2");
    std::fs::write(&path, &bytes).expect("written");
    assert!(Image::open(&options(&path, Format::Qcow2)).is_ok());
    let error = Image::open(&options(&path, Format::Auto)).err().expect("refused");
    assert!(
        error.source().is_some_and(|source| source.to_string().contains("behind the end of the file")),
        "{error:?}"
    );
}

#[test]
fn what_the_check_reads_is_limited() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("a.qcow2");
    let mut bytes = image();
    // Many L2 tables, as holes of a sparse file, in clusters of 2 MiB.
    bytes.resize(64 << 20, 0);
    let refused = |bytes: &[u8], file_bytes: u64| {
        std::fs::write(&path, bytes).expect("written");
        std::fs::File::options().write(true).open(&path).and_then(|file| file.set_len(file_bytes)).expect("sparse");
        match Image::open(&options(&path, Format::Qcow2)).err() {
            Some(ImageError::Qcow2 { source, .. }) => source,
            other => panic!("{other:?}"),
        }
    };
    assert!(matches!(refused(&image(), 1 << 40), Qcow2Error::TooLarge { value: 0x1000_0000, .. }));
    let big = 2 << 20;
    for (at, value, width) in [(20, 21, 4), (36, 4096, 4), (40, 3 * big, 8), (48, big, 8), (big as usize, 2 * big, 8)] {
        put(&mut bytes, at, value, width);
    }
    for index in 0..4096_u64 {
        put(&mut bytes, 3 * big as usize + 8 * index as usize, (index + 16) * big, 8);
    }
    assert!(matches!(refused(&bytes, 1 << 40), Qcow2Error::TooLarge { what: "a number of bytes of L2 tables", .. }));
}

fn qemu_img(arguments: &[&str]) -> bool {
    Command::new("qemu-img").args(arguments).status().is_ok_and(|status| status.success())
}

/// Adds a name of a backing file, or of a data file, to the header.
fn naming(mut bytes: Vec<u8>, backing: Option<&str>, data: Option<&str>) -> Vec<u8> {
    let mut at = 104;
    if let Some(name) = data {
        put(&mut bytes, 72, 4, 8);
        put(&mut bytes, at, 0x4441_5441, 4);
        put(&mut bytes, at + 4, name.len() as u64, 4);
        bytes[at + 8..at + 8 + name.len()].copy_from_slice(name.as_bytes());
        at += 8 + name.len().next_multiple_of(8);
        for index in 0..4 {
            put(&mut bytes, 4 * CLUSTER + 8 * index, 1 << 63 | (index * CLUSTER) as u64, 8);
        }
    }
    at += 8;
    if let Some(name) = backing {
        put(&mut bytes, 8, at as u64, 8);
        put(&mut bytes, 16, name.len() as u64, 4);
        bytes[at..at + name.len()].copy_from_slice(name.as_bytes());
    }
    bytes
}

#[test]
fn a_detected_image_opens_no_other_file() {
    let folder = tempfile::tempdir().expect("a folder");
    let (path, victim) = (folder.path().join("a.qcow2"), folder.path().join("victim"));
    std::fs::write(&victim, [b'v'; 4 * CLUSTER]).expect("written");
    let victim_name = victim.to_str().expect("UTF-8");
    for bytes in [
        naming(image(), Some(victim_name), None),
        naming(image(), None, Some(victim_name)),
        naming(image(), Some("/dev/zero"), Some(victim_name)),
    ] {
        for format in [Format::Auto, Format::DetectedQcow2] {
            std::fs::write(&path, &bytes).expect("written");
            let error = Image::open(&options(&path, format)).err().expect("refused");
            assert!(matches!(error, ImageError::NamesFile { .. }), "{error:?}");
            let text = error.to_string();
            assert!(text.contains(victim_name) || text.contains("/dev/zero"), "{text}");
            assert!(text.contains("format=qcow2") && text.contains("format=raw"), "{text}");
        }
    }
    let escape = naming(image(), Some("a\x1b[2Jb\n"), None);
    std::fs::write(&path, escape).expect("written");
    let error = Image::open(&options(&path, Format::Auto)).err().expect("refused").to_string();
    assert!(!error.contains(char::is_control) && error.contains("[2Jb"), "{error}");
    assert_eq!(std::fs::read(&victim).expect("there"), [b'v'; 4 * CLUSTER]);
}

#[test]
fn images_of_qemu_are_accepted() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = |name: &str| -> PathBuf { folder.path().join(name) };
    let (raw, image) = (path("raw"), path("image"));
    let (raw, image) = (raw.to_str().expect("UTF-8"), image.to_str().expect("UTF-8"));
    let content: Vec<u8> =
        (0..3_000_000_u32).flat_map(|at| (at / 700).wrapping_mul(2_654_435_761).to_le_bytes()).collect();
    std::fs::write(raw, &content).expect("written");
    // scripts/test installs qemu-img; without it there is no image to test.
    if !qemu_img(&["create", "-q", "-f", "qcow2", image, "0"]) {
        return crate::skip::skipped("qemu-img is not installed");
    }
    for options in [
        "cluster_size=512",
        "cluster_size=2M",
        "refcount_bits=1",
        "refcount_bits=64",
        "compat=0.10",
        "preallocation=metadata",
        "preallocation=full",
        "lazy_refcounts=on",
    ] {
        assert!(qemu_img(&["convert", "-q", "-f", "raw", "-O", "qcow2", "-o", options, raw, image]), "{options}");
        assert_opens(image, options);
        // imago leaves an image that both accept.
        assert!(qemu_img(&["check", "-q", "-f", "qcow2", image]), "{options}");
    }
    for compressed in ["cluster_size=4k", "cluster_size=64k"] {
        assert!(qemu_img(&["convert", "-q", "-c", "-f", "raw", "-O", "qcow2", "-o", compressed, raw, image]));
        assert_opens(image, compressed);
    }
    for size in ["0", "512", "1M", "5G", "2T"] {
        assert!(qemu_img(&["create", "-q", "-f", "qcow2", image, size]));
        assert_opens(image, size);
    }
    assert!(qemu_img(&["convert", "-q", "-f", "raw", "-O", "qcow2", raw, image]));
    assert!(qemu_img(&["snapshot", "-c", "one", image]));
    assert_opens(image, "snapshot");
    assert!(qemu_img(&["snapshot", "-d", "one", image]));
    assert_opens(image, "after a snapshot");
}

fn assert_opens(path: &str, what: &str) {
    if let Err(error) = Image::open(&options(Path::new(path), Format::Auto)) {
        panic!("{what}: {error}: {}", error.source().map(ToString::to_string).unwrap_or_default());
    }
}
