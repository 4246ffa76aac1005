//! Hostile kernel files, profiles and symbols: the corpus of the fuzz targets and thousands of mutations of it must be loaded or
//! refused, and never make hwvmm panic, hang or write outside of guest memory.

use hwvmm::boot::image::{Range, find, grub_entries};
use hwvmm::boot::initramfs::{Driver, IndexError, IndexFiles, ModuleIndex};
use hwvmm::boot::unpack::{Limits, unpack, unpack_parts};
use hwvmm::boot::{KernelError, KernelFile, Loaded, Request, UnpackOptions, Wanted, load, prepare};
use hwvmm::config::{BootProtocol, Unpack, parse_file};
use hwvmm::memory::{Backing, GuestRam};
use hwvmm::profile::Profile;
use hwvmm::profile::render::{Format, Style, render};
use hwvmm::profile::symbols::Symbols;
use hwvmm::sandbox::Isolation;
use hwvmm_arch::acpi::{IoApicPins, Platform};
use hwvmm_arch::boot::{BootMethod, Decompressor, EntryProtocol};
use hwvmm_arch::layout::{GpaRange, UARTS};
use proptest::prelude::*;
use std::fs;
use std::path::Path;
use std::rc::Rc;

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
        vmgenid: None,
    };
    let kernel = KernelFile::open(file.path())?;
    let boot = BootProtocol::Auto;
    let how = UnpackOptions { cache: None, isolation: Isolation::None, progress: &|_| {} };
    let wanted = Wanted { initrd: None, memory_bytes: MEMORY, unpack, boot, how };
    let prepared = prepare(&kernel, &wanted)?;
    let request = Request {
        kernel: &kernel,
        prepared: &prepared,
        modules: &[],
        cmdline: "console=ttyS0",
        arguments: "",
        memory_bytes: MEMORY,
        boot,
        platform: &platform,
    };
    load(&request, &ram)
}

/// All drivers' modules by a file of the corpus: modules.dep, modules.builtin and modules.softdep, with NUL between them.
fn resolve(text: &str) -> Result<Vec<&str>, IndexError> {
    let mut parts = text.splitn(3, '\0');
    let mut part = || parts.next().unwrap_or_default();
    let index = ModuleIndex::parse(IndexFiles { dependencies: part(), builtin: part(), soft: part() });
    index.resolve(&[Driver::VirtioMmio, Driver::VirtioPci, Driver::Vsock, Driver::Virtiofs, Driver::Overlay])
}

#[test]
fn module_indexes_of_the_corpus_are_resolved_or_refused() {
    for (name, bytes) in corpus("module_index") {
        let text = String::from_utf8(bytes).expect("text");
        let found = resolve(&text).map(|paths| paths.len());
        let expected = match name.as_str() {
            "debian-6.1" => Ok(12),
            "debian-6.12" => Ok(5),
            "circle" => Ok(2),
            "outside" => Err(IndexError::Outside("../virtio_mmio.ko".to_owned())),
            _ => panic!("{name} has no expected result"),
        };
        assert_eq!(found, expected, "{name}");
    }
}

/// The number of entries of a grub.cfg and a grubenv, with NUL between them.
fn grub(text: &str) -> Result<usize, String> {
    let (script, environment) = text.split_once('\0').unwrap_or((text, ""));
    grub_entries(script, environment).map(|entries| entries.len())
}

#[test]
fn boot_loaders_of_the_corpus_are_read() {
    for (name, bytes) in corpus("grub_config") {
        let expected = match name.as_str() {
            "debian-12" => 2,
            "fedora" => 1,
            _ => panic!("{name} has no expected result"),
        };
        assert_eq!(grub(&String::from_utf8(bytes).expect("text")), Ok(expected), "{name}");
    }
    for (name, bytes) in corpus("disk_image") {
        let disk = Range::whole(Rc::new(bytes), 8 << 20);
        let mut kernel = Vec::new();
        let found =
            find(&disk, None, &mut kernel, Some(&mut Vec::new())).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!((found.cmdline.as_str(), kernel.len()), ("root=/dev/vda1 ro", 6), "{name}");
    }
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
fn archives_and_configurations_of_the_corpus_are_read() {
    for (name, bytes) in corpus("unpack_parts") {
        let out = tempfile::tempfile().expect("a temporary file");
        let unpacked =
            unpack_parts(&bytes, &out, &Limits::of(MEMORY)).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert!(unpacked > 0, "{name}");
    }
    for (name, bytes) in corpus("config_file") {
        let text = String::from_utf8(bytes).expect("text");
        let options = parse_file(Path::new(&name), &text).unwrap_or_else(|error| panic!("{error:?}"));
        options.into_config().unwrap_or_else(|error| panic!("{name}: {error}"));
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
    fn changed_boot_loaders_are_read_or_refused(bytes in changed("grub_config", 12)) {
        let _ = grub(&String::from_utf8_lossy(&bytes));
    }

    #[test]
    fn changed_module_indexes_lead_nowhere_else(bytes in changed("module_index", 12)) {
        let text = String::from_utf8_lossy(&bytes);
        if let Ok(paths) = resolve(&text) {
            prop_assert!(paths.iter().all(|path| !path.starts_with('/') && path.split('/').all(|part| part != "..")));
        }
    }

    #[test]
    fn changed_symbols_are_read_or_refused(bytes in changed("symbols", 12)) {
        let mut file = tempfile::tempfile().expect("a temporary file");
        std::io::Write::write_all(&mut file, &bytes).expect("written");
        if let Ok(Some(mut symbols)) = Symbols::read(&file) {
            let _ = symbols.locate(0xffff_ffff_8100_0000);
            for rip in (0xffff_ffff_8100_0000..0xffff_ffff_8102_0000_u64).step_by(4096).chain([0, u64::MAX]) {
                let _ = (symbols.resolve(rip), symbols.resolve_unmapped(rip));
            }
        }
    }

    #[test]
    fn changed_payloads_are_unpacked_or_refused(bytes in changed("unpack", 20)) {
        let out = tempfile::tempfile().expect("a temporary file");
        let _ = unpack(&bytes, &out, &Limits::of(MEMORY));
        prop_assert!(out.metadata().expect("metadata").len() <= MEMORY);
    }

    #[test]
    fn changed_archives_are_unpacked_or_refused(bytes in changed("unpack_parts", 20)) {
        let out = tempfile::tempfile().expect("a temporary file");
        let limits = Limits::of(1 << 20);
        let _ = unpack_parts(&bytes, &out, &limits);
        prop_assert!(out.metadata().expect("metadata").len() <= limits.output_bytes);
    }

    #[test]
    fn changed_configurations_are_used_or_refused(bytes in changed("config_file", 8)) {
        match parse_file(Path::new("changed"), &String::from_utf8_lossy(&bytes)) {
            Ok(options) => drop(options.into_config()),
            Err(error) => prop_assert!(!error.to_string().is_empty()),
        }
    }
}
