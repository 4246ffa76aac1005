//! By which protocol a kernel is entered: generated ELF files of both classes with and without notes, alone and in a bzImage.

use hwvmm::boot::{KernelError, KernelFile, Loaded, Request, UnpackOptions, Wanted, load, prepare};
use hwvmm::config::{BootProtocol, Unpack};
use hwvmm::memory::{Backing, GuestRam};
use hwvmm::sandbox::Isolation;
use hwvmm_arch::acpi::Platform;
use hwvmm_arch::boot::Decompressor;
use hwvmm_arch::boot::EntryProtocol::{self, Linux64, Pvh};
use hwvmm_arch::layout::{GpaRange, UARTS};
use std::error::Error as _;
use std::fs;

const MEMORY: u64 = 32 << 20;
const LOAD: u32 = 0x100_0000;
const PVH_ENTRY: u32 = LOAD + 0x40;

/// What an ELF kernel is made of.
#[derive(Clone, Copy, Debug)]
struct Kernel {
    bits: u32,
    entry: u32,
    notes: &'static [Note],
}

#[derive(Clone, Copy, Debug)]
enum Note {
    /// XEN_ELFNOTE_PHYS32_ENTRY.
    Pvh,
    /// LINUX_ELFNOTE_BUILD_SALT.
    Salt,
    /// XEN_ELFNOTE_GUEST_OS.
    Os(&'static [u8]),
}

const LINUX_64: Kernel = Kernel { bits: 64, entry: LOAD, notes: &[Note::Salt, Note::Pvh] };
const LINUX_32: Kernel = Kernel { bits: 32, ..LINUX_64 };
const FOREIGN_64: Kernel = Kernel { notes: &[Note::Pvh], ..LINUX_64 };

impl Note {
    fn bytes(self) -> Vec<u8> {
        let (name, kind, description): (&[u8], u32, Vec<u8>) = match self {
            Self::Pvh => (b"Xen\0", 18, u64::from(PVH_ENTRY).to_le_bytes().to_vec()),
            Self::Salt => (b"Linux\0", 0x100, vec![0]),
            Self::Os(name) => (b"Xen\0", 6, name.to_vec()),
        };
        let mut bytes = Vec::new();
        for word in [u32::try_from(name.len()).expect("short"), u32::try_from(description.len()).expect("short"), kind]
        {
            bytes.extend(word.to_le_bytes());
        }
        for part in [name, &description] {
            bytes.extend(part);
            bytes.resize(bytes.len().next_multiple_of(4), 0);
        }
        bytes
    }
}

impl Kernel {
    /// An ELF file with a segment of a page at [`LOAD`], and a segment of notes.
    fn elf(self) -> Vec<u8> {
        let notes: Vec<u8> = self.notes.iter().flat_map(|note| note.bytes()).collect();
        let (code_at, notes_at) = (512_u32, 1024_u32);
        let length = u32::try_from(notes.len()).expect("short");
        let mut file = b"\x7fELF\x01\x01\x01".to_vec();
        file.resize(16, 0);
        file[4] = if self.bits == 64 { 2 } else { 1 };
        let machine = if self.bits == 64 { 62_u16 } else { 3 };
        file.extend([2_u16.to_le_bytes(), machine.to_le_bytes()].concat());
        file.extend(1_u32.to_le_bytes());
        let word = |value: u32| {
            if self.bits == 64 { u64::from(value).to_le_bytes().to_vec() } else { value.to_le_bytes().to_vec() }
        };
        let (header, entry) = if self.bits == 64 { (64_u16, 56_u16) } else { (52, 32) };
        file.extend([word(self.entry), word(header.into()), word(0)].concat());
        file.extend(0_u32.to_le_bytes());
        for half in [header, entry, 2, 0, 0, 0] {
            file.extend(half.to_le_bytes());
        }
        for (kind, at, address, in_file, in_memory) in
            [(1_u32, code_at, LOAD, 64, 4096), (4, notes_at, 0, length, length)]
        {
            file.extend(kind.to_le_bytes());
            if self.bits == 64 {
                file.extend(7_u32.to_le_bytes());
            }
            file.extend([word(at), word(address), word(address), word(in_file), word(in_memory)].concat());
            if self.bits == 32 {
                file.extend(7_u32.to_le_bytes());
            }
            file.extend(word(4096));
        }
        file.resize(code_at as usize, 0);
        file.extend([0xf4; 64]);
        file.resize(notes_at as usize, 0);
        file.extend(notes);
        file
    }

    /// A bzImage of protocol 2.15 with the ELF file as its payload, not compressed.
    fn bzimage(self) -> Vec<u8> {
        let elf = self.elf();
        let mut file = vec![0_u8; 1024];
        file[0x1f1] = 1;
        file[0x1fe..0x200].copy_from_slice(&0xaa55_u16.to_le_bytes());
        file[0x200..0x206].copy_from_slice(b"\xeb\x66HdrS");
        file[0x206..0x208].copy_from_slice(&0x020f_u16.to_le_bytes());
        file[0x236] = u8::from(self.bits == 64);
        file[0x238..0x23c].copy_from_slice(&2047_u32.to_le_bytes());
        file[0x24c..0x250].copy_from_slice(&u32::try_from(elf.len()).expect("small").to_le_bytes());
        file.extend(elf);
        // The size that the format has behind the payload.
        file.extend([0; 4]);
        file
    }
}

fn load_bytes(bytes: &[u8], boot: BootProtocol) -> Result<Loaded, KernelError> {
    let file = tempfile::NamedTempFile::new().expect("a temporary file");
    fs::write(file.path(), bytes).expect("written");
    let ram = GuestRam::new(&[GpaRange { start: 0, bytes: MEMORY }], Backing::SmallPages).expect("memory");
    let platform = Platform {
        apic_ids: &[0],
        uarts: &UARTS[..1],
        legacy_free: true,
        pins: None,
        pci: None,
        virtio_mmio: &[],
        vmgenid: None,
    };
    let kernel = KernelFile::open(file.path())?;
    let unpack = Unpack::Host;
    let how = UnpackOptions { cache: None, isolation: Isolation::None, progress: &|_| {} };
    let wanted = Wanted { initrd: None, memory_bytes: MEMORY, unpack, boot, how };
    load(
        &Request {
            kernel: &kernel,
            prepared: &prepare(&kernel, &wanted)?,
            modules: &[],
            cmdline: "quiet",
            arguments: "",
            memory_bytes: MEMORY,
            boot,
            platform: &platform,
        },
        &ram,
    )
}

/// The protocol and the address of the entry.
fn entry(bytes: &[u8], boot: BootProtocol) -> Result<(EntryProtocol, u64), String> {
    let text = |error: KernelError| {
        let source = error.source().map(|source| format!(": {source}")).unwrap_or_default();
        format!("{error}{source}")
    };
    load_bytes(bytes, boot).map(|loaded| (loaded.method.protocol, loaded.entry.rip())).map_err(text)
}

const AT_64: (EntryProtocol, u64) = (Linux64, LOAD as u64);
const AT_PVH: (EntryProtocol, u64) = (Pvh, PVH_ENTRY as u64);

#[test]
fn a_linux_elf_is_entered_by_its_64_bit_protocol() {
    let xen = Kernel { notes: &[Note::Pvh, Note::Os(b"linux\0")], ..LINUX_64 };
    for kernel in [LINUX_64, xen] {
        assert_eq!(entry(&kernel.elf(), BootProtocol::Auto), Ok(AT_64), "{kernel:?}");
        assert_eq!(entry(&kernel.elf(), BootProtocol::Pvh), Ok(AT_PVH), "{kernel:?}");
        assert_eq!(entry(&kernel.elf(), BootProtocol::Linux64), Ok(AT_64), "{kernel:?}");
    }
    let no_entry = Kernel { entry: 0x10, ..LINUX_64 };
    assert_eq!(entry(&no_entry.elf(), BootProtocol::Auto), Ok(AT_PVH), "e_entry leads to nothing");
}

#[test]
fn other_kernels_with_a_pvh_note_are_entered_there() {
    let bsd = Kernel { notes: &[Note::Os(b"FreeBSD\0"), Note::Pvh], ..LINUX_64 };
    for kernel in [FOREIGN_64, bsd] {
        assert_eq!(entry(&kernel.elf(), BootProtocol::Auto), Ok(AT_PVH), "{kernel:?}");
        assert_eq!(entry(&kernel.elf(), BootProtocol::Linux64), Ok(AT_64), "{kernel:?}: asked for");
    }
    let bare = Kernel { notes: &[], ..LINUX_64 };
    assert_eq!(entry(&bare.elf(), BootProtocol::Auto), Ok(AT_64));
}

#[test]
fn a_32_bit_kernel_is_entered_by_pvh_in_a_bzimage_too() {
    for (bytes, decompressor) in [(LINUX_32.elf(), Decompressor::None), (LINUX_32.bzimage(), Decompressor::Host)] {
        for boot in [BootProtocol::Auto, BootProtocol::Pvh] {
            assert_eq!(entry(&bytes, boot), Ok(AT_PVH), "{decompressor:?} {boot:?}");
            assert_eq!(load_bytes(&bytes, boot).expect("loaded").method.decompressor, decompressor);
        }
        let error = entry(&bytes, BootProtocol::Linux64).expect_err("no 64-bit entry");
        assert!(error.contains("--boot linux64") && error.contains("is a 32-bit kernel"), "{error}");
    }
}

#[test]
fn a_64_bit_bzimage_is_entered_as_before() {
    for kernel in [LINUX_64, FOREIGN_64, Kernel { notes: &[], ..LINUX_64 }] {
        assert_eq!(entry(&kernel.bzimage(), BootProtocol::Auto), Ok(AT_64), "{kernel:?}");
    }
    assert_eq!(entry(&LINUX_64.bzimage(), BootProtocol::Pvh), Ok(AT_PVH));
}

#[test]
fn a_32_bit_kernel_without_a_pvh_note_is_refused() {
    let kernel = Kernel { notes: &[Note::Salt], ..LINUX_32 };
    for bytes in [kernel.elf(), kernel.bzimage()] {
        let error = entry(&bytes, BootProtocol::Auto).expect_err("no entry");
        assert!(error.contains("32-bit") && error.contains("PVH note"), "{error}");
        let error = entry(&bytes, BootProtocol::Pvh).expect_err("no entry");
        assert!(error.contains("--boot pvh") && error.contains("CONFIG_PVH"), "{error}");
    }
}
