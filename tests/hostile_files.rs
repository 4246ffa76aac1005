//! Hostile kernel files, profiles and symbols: the corpus of the fuzz targets and thousands of mutations of it must be loaded or
//! refused, and never make hwvmm panic, hang or write outside of guest memory.

use hwvmm::boot::unpack::unpack;
use hwvmm::boot::{KernelError, Loaded, Request, load};
use hwvmm::config::{BootProtocol, Unpack};
use hwvmm::memory::{Backing, GuestRam};
use hwvmm::profile::Profile;
use hwvmm::profile::render::{Format, Style, render};
use hwvmm::profile::symbols::Symbols;
use hwvmm_arch::acpi::{IoApicPins, Platform};
use hwvmm_arch::boot::{BootMethod, Decompressor, EntryProtocol};
use hwvmm_arch::layout::{GpaRange, UARTS};
use proptest::prelude::*;
use std::fs;
use std::path::Path;

const MEMORY: u64 = 16 << 20;

fn corpus(target: &str) -> Vec<(String, Vec<u8>)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/corpus").join(target);
    let mut files: Vec<_> = fs::read_dir(folder)
        .expect("a corpus")
        .flatten()
        .map(|entry| (entry.file_name().to_string_lossy().into_owned(), fs::read(entry.path()).expect("readable")))
        .collect();
    files.sort();
    assert!(!files.is_empty());
    files
}

fn load_bytes(bytes: &[u8], unpack: Unpack) -> Result<Loaded, KernelError> {
    let file = tempfile::NamedTempFile::new().expect("a temporary file");
    fs::write(file.path(), bytes).expect("written");
    let ram = GuestRam::new(&[GpaRange { start: 0, bytes: MEMORY }], Backing::SmallPages).expect("16 MiB");
    let platform = Platform {
        apic_ids: &[0],
        uarts: &UARTS[..1],
        legacy_free: true,
        pins: Some(IoApicPins { first_gsi: 0, count: 24 }),
        pci: Some(1),
        virtio_mmio: &[],
    };
    let request = Request {
        kernel: file.path(),
        initrd: None,
        modules: &[],
        cmdline: "console=ttyS0",
        arguments: "",
        memory_bytes: MEMORY,
        unpack,
        boot: BootProtocol::Auto,
        cache: None,
        platform: &platform,
        progress: &|_| {},
    };
    load(&request, &ram)
}

#[test]
fn kernels_of_the_corpus_are_loaded_by_their_protocol() {
    for (name, bytes) in corpus("kernel_file") {
        let loaded = load_bytes(&bytes, Unpack::Host).unwrap_or_else(|error| panic!("{name}: {error}"));
        let (decompressor, protocol) = match name.as_str() {
            "vmlinux-pvh" => (Decompressor::None, EntryProtocol::Pvh),
            "multiboot" => (Decompressor::None, EntryProtocol::Multiboot),
            "bzimage-unknown" => (Decompressor::Guest, EntryProtocol::Linux64),
            _ => (Decompressor::Host, EntryProtocol::Linux64),
        };
        assert_eq!(loaded.method, BootMethod { decompressor, protocol }, "{name}");
        if name.starts_with("bzimage") {
            let guest = load_bytes(&bytes, Unpack::Guest).unwrap_or_else(|error| panic!("{name}: {error}"));
            assert_eq!(guest.entry.rip(), 0x10_0200);
        }
    }
}

#[test]
fn profiles_and_symbols_of_the_corpus_are_read() {
    for (name, bytes) in corpus("profile") {
        let profile = Profile::from_json(&bytes, Path::new(&name)).unwrap_or_else(|error| panic!("{error}"));
        assert!(profile.userspace_exits.total > 0);
    }
    for (name, bytes) in corpus("symbols") {
        let mut file = tempfile::tempfile().expect("a temporary file");
        std::io::Write::write_all(&mut file, &bytes).expect("written");
        let symbols = Symbols::read(&file).expect("readable").unwrap_or_else(|| panic!("{name} has no symbols"));
        assert_eq!(symbols.resolve(0xffff_ffff_8100_0100).map(|place| place.offset), Some(0), "{name}");
    }
}

#[test]
fn every_truncation_is_refused_or_loaded() {
    for (_, bytes) in corpus("kernel_file") {
        for length in (0..bytes.len()).step_by(bytes.len() / 60 + 1) {
            if let Err(error) = load_bytes(&bytes[..length], Unpack::Host) {
                assert!(!error.to_string().is_empty());
            }
        }
    }
}

/// A file of the corpus with some bytes changed, perhaps truncated.
fn changed(target: &'static str, strides: usize) -> impl Strategy<Value = Vec<u8>> {
    let change = (any::<prop::sample::Index>(), prop_oneof![any::<u8>(), Just(0), Just(0xff), Just(0x80)]);
    (
        any::<prop::sample::Index>(),
        prop::collection::vec(change, 1..strides),
        any::<prop::sample::Index>(),
        any::<bool>(),
    )
        .prop_map(move |(which, changes, cut, cuts)| {
            let files = corpus(target);
            let mut bytes = files[which.index(files.len())].1.clone();
            for (at, value) in changes {
                let at = at.index(bytes.len());
                bytes[at] = value;
            }
            if cuts {
                bytes.truncate(cut.index(bytes.len()));
            }
            bytes
        })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1500, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn changed_kernels_are_loaded_or_refused(bytes in changed("kernel_file", 12), guest in any::<bool>()) {
        let unpack = if guest { Unpack::Guest } else { Unpack::Host };
        if let Ok(loaded) = load_bytes(&bytes, unpack) {
            prop_assert!(loaded.entry.rip() < MEMORY);
        }
    }

    #[test]
    fn changed_profiles_are_rendered_or_refused(bytes in changed("profile", 6)) {
        if let Ok(profile) = Profile::from_json(&bytes, Path::new("changed")) {
            for format in [Format::Text, Format::Csv, Format::Svg, Format::Html, Format::ChromeTrace, Format::Prometheus] {
                let _ = render(&profile, format, Style::default());
            }
        }
    }

    #[test]
    fn changed_symbols_are_read_or_refused(bytes in changed("symbols", 12)) {
        let mut file = tempfile::tempfile().expect("a temporary file");
        std::io::Write::write_all(&mut file, &bytes).expect("written");
        if let Some(mut symbols) = Symbols::read(&file).expect("readable") {
            let _ = symbols.locate(0xffff_ffff_8100_0000);
            for rip in (0xffff_ffff_8100_0000..0xffff_ffff_8102_0000_u64).step_by(4096).chain([0, u64::MAX]) {
                let _ = (symbols.resolve(rip), symbols.resolve_unmapped(rip));
            }
        }
    }

    #[test]
    fn changed_payloads_are_unpacked_or_refused(bytes in changed("unpack", 20)) {
        let out = tempfile::tempfile().expect("a temporary file");
        let _ = unpack(&bytes, &out);
    }
}
