use super::*;
use proptest::prelude::*;

/// A 64-bit ELF with one segment of 16 bytes at 16 MiB and a PVH note.
fn kernel() -> Vec<u8> {
    let mut file = vec![0_u8; 64 + 2 * 56];
    file[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
    file[16..18].copy_from_slice(&ET_EXEC.to_le_bytes());
    file[18..20].copy_from_slice(&EM_X86_64.to_le_bytes());
    file[24..32].copy_from_slice(&0x100_0000_u64.to_le_bytes());
    file[32..40].copy_from_slice(&64_u64.to_le_bytes());
    file[54..56].copy_from_slice(&56_u16.to_le_bytes());
    file[56..58].copy_from_slice(&2_u16.to_le_bytes());
    let mut header = |index: usize, kind: u32, fields: [u64; 4]| {
        let at = 64 + index * 56;
        file[at..at + 4].copy_from_slice(&kind.to_le_bytes());
        for (field, value) in [8, 24, 32, 40].into_iter().zip(fields) {
            file[at + field..at + field + 8].copy_from_slice(&value.to_le_bytes());
        }
    };
    header(0, PT_LOAD, [176, 0x100_0000, 16, 4096]);
    header(1, PT_NOTE, [192, 0, 40, 40]);
    file.extend([0x90; 16]);
    for word in [5_u32, 1, 7] {
        file.extend(word.to_le_bytes());
    }
    file.extend(b"skip\0\0\0\0\x01\0\0\0");
    // An entry follows a note whose name and description are padded.
    let at = file.len();
    file.extend([4_u32, 4, XEN_PHYS32_ENTRY].iter().flat_map(|w| w.to_le_bytes()));
    file.extend(b"Xen\0");
    file.extend(0x100_0040_u32.to_le_bytes());
    let note_bytes = (file.len() - 192) as u64;
    file[64 + 56 + 32..64 + 56 + 40].copy_from_slice(&note_bytes.to_le_bytes());
    assert_eq!(at, 192 + 24);
    file
}

#[test]
fn segments_and_the_pvh_note_are_found() {
    let image = ElfImage::parse(kernel().as_slice()).expect("a kernel");
    assert_eq!(image.class, ElfClass::Elf64);
    assert_eq!(image.entry, 0x100_0000);
    let segment = Segment { offset: 176, address: 0x100_0000, file_bytes: 16, memory_bytes: 4096 };
    assert_eq!(image.segments, [segment]);
    assert_eq!(image.notes, Notes { pvh_entry: Some(0x100_0040), is_linux: false });
    assert_eq!(image.end(), 0x100_1000);
    assert!(image.contains(0x100_0fff) && !image.contains(0x100_1000));
}

/// [`kernel`] with one note more.
fn kernel_with_note(name: &[u8], kind: u32, description: &[u8]) -> Vec<u8> {
    let mut file = kernel();
    let lengths = [name.len(), description.len()].map(|length| u32::try_from(length).expect("short"));
    file.extend([lengths[0], lengths[1], kind].iter().flat_map(|w| w.to_le_bytes()));
    for part in [name, description] {
        file.extend(part);
        file.resize(file.len().next_multiple_of(4), 0);
    }
    let note_bytes = (file.len() - 192) as u64;
    file[64 + 56 + 32..64 + 56 + 40].copy_from_slice(&note_bytes.to_le_bytes());
    file
}

#[test]
fn linux_is_known_by_its_notes() {
    let cases: [(&[u8], u32, &[u8], bool); 8] = [
        (b"Linux\0", 0x100, b"\0", true),
        (b"Linux\0", 0x101, b"\0\0\0\0", true),
        (b"Xen\0", XEN_GUEST_OS, b"linux\0", true),
        (b"Linux\0", 0, b"\0\0\0\0", false),
        (b"Linux", 0x100, b"\0", false),
        (b"Xen\0", XEN_GUEST_OS, b"FreeBSD\0", false),
        (b"Xen\0", XEN_GUEST_OS, b"linuxoid\0", false),
        (b"GNU\0", 0x100, b"linux\0", false),
    ];
    for (name, kind, description, is_linux) in cases {
        let image = ElfImage::parse(kernel_with_note(name, kind, description).as_slice()).expect("a kernel");
        assert_eq!(image.notes, Notes { pvh_entry: Some(0x100_0040), is_linux }, "{name:?} {kind:#x} {description:?}");
    }
}

#[test]
fn every_truncation_is_an_error() {
    let file = kernel();
    for length in 0..file.len() {
        assert!(ElfImage::parse(&file[..length]).is_err(), "{length} of {} bytes", file.len());
    }
}

#[test]
fn other_machines_and_objects_are_refused() {
    let mut arm = kernel();
    arm[18] = 183;
    assert!(ElfImage::parse(arm.as_slice()).expect_err("aarch64").to_string().contains("machine 183"));
    let mut object = kernel();
    object[16] = 1;
    assert!(ElfImage::parse(object.as_slice()).expect_err("relocatable").to_string().contains("object file"));
}

#[test]
fn a_segment_larger_in_the_file_than_in_memory_is_refused() {
    let mut file = kernel();
    file[64 + 40..64 + 48].copy_from_slice(&8_u64.to_le_bytes());
    assert!(ElfImage::parse(file.as_slice()).is_err());
}

proptest! {
    #[test]
    fn a_changed_file_is_parsed_or_refused(changes in proptest::collection::vec((0..230_usize, any::<u8>()), 1..12)) {
        let mut file = kernel();
        for (at, value) in changes {
            if let Some(byte) = file.get_mut(at) {
                *byte = value;
            }
        }
        if let Ok(image) = ElfImage::parse(file.as_slice()) {
            for segment in &image.segments {
                prop_assert!(segment.offset + segment.file_bytes <= file.len() as u64);
                prop_assert!(segment.file_bytes <= segment.memory_bytes);
                prop_assert!(segment.address.checked_add(segment.memory_bytes).is_some());
            }
        }
    }
}
