//! The magic numbers of image formats. A guest that writes one of them to a raw disk turns the disk into an image of that
//! format for every program that detects formats, this one and others on the host.

use std::fmt;

/// Size in bytes of the start of a disk that decides on its format: a sector, as in QEMU.
pub(super) const START_BYTES: usize = 512;

/// An image format that is known by its first sector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ForeignFormat {
    /// qcow2: versions 2 and 3 of the format, and what may follow.
    Qcow2,
    /// qcow: version 1, of which nothing but the magic number is the same.
    Qcow,
    /// VMDK of VMware: sparse extents and text descriptors.
    Vmdk,
    /// VHD of Virtual PC: dynamic, differencing and fixed.
    Vhd,
    /// VHDX of Hyper-V, the successor of VHD.
    Vhdx,
    /// VDI, the disk format of VirtualBox.
    Vdi,
    /// QED, a former disk format of QEMU.
    Qed,
    /// LUKS, an encrypted disk.
    Luks,
    /// Disk format of Parallels Desktop.
    Parallels,
    /// Disk format of the emulator Bochs.
    Bochs,
    /// cloop, a compressed loop device.
    Cloop,
    /// DMG of macOS.
    Dmg,
}

impl fmt::Display for ForeignFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Qcow2 => "qcow2",
            Self::Qcow => "qcow (version 1)",
            Self::Vmdk => "VMDK",
            Self::Vhd => "VHD",
            Self::Vhdx => "VHDX",
            Self::Vdi => "VDI",
            Self::Qed => "QED",
            Self::Luks => "LUKS",
            Self::Parallels => "Parallels",
            Self::Bochs => "Bochs",
            Self::Cloop => "cloop",
            Self::Dmg => "DMG",
        })
    }
}

/// A magic number: the bytes at an offset.
struct Magic {
    format: ForeignFormat,
    at: usize,
    bytes: &'static [u8],
}

/// The formats that QEMU detects (the `bdrv_probe` functions of its drivers), by the part of their headers that does not
/// depend on a version.
const MAGICS: &[Magic] = &[
    Magic { format: ForeignFormat::Qcow2, at: 0, bytes: b"QFI\xfb" },
    Magic { format: ForeignFormat::Vmdk, at: 0, bytes: b"KDMV" },
    Magic { format: ForeignFormat::Vmdk, at: 0, bytes: b"COWD" },
    Magic { format: ForeignFormat::Vhd, at: 0, bytes: b"conectix" },
    Magic { format: ForeignFormat::Vhdx, at: 0, bytes: b"vhdxfile" },
    Magic { format: ForeignFormat::Vdi, at: 64, bytes: &[0x7f, 0x10, 0xda, 0xbe] },
    Magic { format: ForeignFormat::Qed, at: 0, bytes: b"QED\0" },
    Magic { format: ForeignFormat::Luks, at: 0, bytes: b"LUKS\xba\xbe" },
    Magic { format: ForeignFormat::Parallels, at: 0, bytes: b"WithoutFreeSpace" },
    Magic { format: ForeignFormat::Parallels, at: 0, bytes: b"WithouFreSpacExt" },
    Magic { format: ForeignFormat::Bochs, at: 0, bytes: b"Bochs Virtual HD Image" },
    Magic { format: ForeignFormat::Cloop, at: 0, bytes: b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop" },
];

/// The magic number that qcow and qcow2 share, and version 1.
const QCOW_VERSION_1: &[u8] = b"QFI\xfb\0\0\0\x01";

/// The offset of the checksum in the footer of a VHD, in bytes.
const VHD_CHECKSUM: usize = 64;

/// Returns the format whose magic number is in `start`, the first bytes of a disk; `None` where there is no such format.
pub(super) fn detect(start: &[u8; START_BYTES]) -> Option<ForeignFormat> {
    if start.starts_with(QCOW_VERSION_1) {
        return Some(ForeignFormat::Qcow);
    }
    let magic = MAGICS.iter().find(|magic| start[magic.at..].starts_with(magic.bytes));
    magic.map(|magic| magic.format).or_else(|| is_vmdk_descriptor(start).then_some(ForeignFormat::Vmdk))
}

/// Returns the format whose data come first, of which `end`, the last sector of a file, is the footer; `None` where it is none.
/// Unlike magic numbers, footers are checked further: a disk can end with anything.
pub(super) fn detect_end(end: &[u8; START_BYTES]) -> Option<ForeignFormat> {
    let number = |at: usize| end[at..at + 4].iter().fold(0, |value: u32, byte| value << 8 | u32::from(*byte));
    if end.starts_with(b"conectix") {
        // "Hard Disk Footer Format" of the VHD specification: the checksum is of all bytes but its own.
        let bytes = end.iter().enumerate().filter(|(at, _)| !(VHD_CHECKSUM..VHD_CHECKSUM + 4).contains(at));
        let sum = bytes.fold(0_u32, |sum, (_, byte)| sum.wrapping_add(u32::from(*byte)));
        return (number(VHD_CHECKSUM) == !sum).then_some(ForeignFormat::Vhd);
    }
    // Version 4, and the size of the footer.
    (end.starts_with(b"koly") && number(4) == 4 && number(8) == 512).then_some(ForeignFormat::Dmg)
}

/// Returns true if the first line that is neither a comment nor blank has the version of a VMDK descriptor, which is a text.
/// Such a line may come after the first sector where the sector has nothing but comments.
fn is_vmdk_descriptor(start: &[u8; START_BYTES]) -> bool {
    let lines = start.split(|byte| *byte == b'\n').map(<[u8]>::trim_ascii);
    let mut lines = lines.filter(|line| !line.is_empty() && !line.starts_with(b"#"));
    match lines.next() {
        Some(line) => line.starts_with(b"version="),
        None => start.starts_with(b"# Disk DescriptorFile"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn start(at: usize, bytes: &[u8]) -> [u8; START_BYTES] {
        let mut start = [0; START_BYTES];
        start[at..at + bytes.len()].copy_from_slice(bytes);
        start
    }

    #[test]
    fn every_magic_is_detected_and_only_in_its_place() {
        for magic in MAGICS {
            assert_eq!(detect(&start(magic.at, magic.bytes)), Some(magic.format));
            assert_eq!(detect(&start(magic.at + 1, magic.bytes)), None);
            let mut cut = magic.bytes.to_vec();
            cut[magic.bytes.len() - 1] ^= 1;
            assert_eq!(detect(&start(magic.at, &cut)), None);
        }
    }

    #[test]
    fn versions_of_qcow_are_told_apart() {
        assert_eq!(detect(&start(0, b"QFI\xfb\0\0\0\x01")), Some(ForeignFormat::Qcow));
        for version in [0, 2, 3, 4] {
            assert_eq!(detect(&start(0, &[b'Q', b'F', b'I', 0xfb, 0, 0, 0, version])), Some(ForeignFormat::Qcow2));
        }
    }

    #[test]
    fn a_descriptor_is_detected_behind_comments() {
        let text: &[u8] = b"# Disk DescriptorFile\r\n\n  \n#x\nversion=1\nCID=1\n";
        assert_eq!(detect(&start(0, text)), Some(ForeignFormat::Vmdk));
        assert_eq!(detect(&start(0, b"version=3\n")), Some(ForeignFormat::Vmdk));
        let mut comments = [b'#'; START_BYTES];
        assert_eq!(detect(&comments), None);
        comments[..22].copy_from_slice(b"# Disk DescriptorFile\n");
        assert_eq!(detect(&comments), Some(ForeignFormat::Vmdk));
    }

    #[test]
    fn footers_are_detected() {
        let mut vhd = start(0, b"conectix\0\0\0\x02\0\x01\0\0");
        vhd[VHD_CHECKSUM - 4..VHD_CHECKSUM].copy_from_slice(&2_u32.to_be_bytes());
        let sum: u32 = vhd.iter().map(|byte| u32::from(*byte)).sum();
        vhd[VHD_CHECKSUM..VHD_CHECKSUM + 4].copy_from_slice(&(!sum).to_be_bytes());
        assert_eq!(detect_end(&vhd), Some(ForeignFormat::Vhd));
        vhd[100] ^= 1;
        assert_eq!(detect_end(&vhd), None, "the checksum is wrong");
        let dmg = start(0, b"koly\0\0\0\x04\0\0\x02\0");
        assert_eq!(detect_end(&dmg), Some(ForeignFormat::Dmg));
        assert_eq!(detect_end(&start(0, b"koly\0\0\0\x05\0\0\x02\0")), None);
        assert_eq!(detect_end(&start(0, b"EFI PART")), None, "the end of a disk with a GPT");
        assert_eq!(detect_end(&[0; START_BYTES]), None);
    }

    #[test]
    fn disks_are_not_images() {
        assert_eq!(detect(&[0; START_BYTES]), None);
        assert_eq!(detect(&[0xff; START_BYTES]), None);
        // A boot sector: a jump, a name, a signature.
        let mut boot = start(0, b"\xeb\x58\x90mkfs.fat");
        boot[510..].copy_from_slice(&[0x55, 0xaa]);
        assert_eq!(detect(&boot), None);
        assert_eq!(detect(&start(0, b"#!/bin/sh\nversion=1\n")), Some(ForeignFormat::Vmdk), "as QEMU takes it");
    }
}
